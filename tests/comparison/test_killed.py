"""A comparison that is killed again and again ends in the table of one that was left alone."""

from __future__ import annotations

import csv
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
CALL = (
    *("compare", "--data", "toy", "--label", "shape", "--tasks", "rotation,simclr", "--encoder", "timm/test_resnet"),
    *("--budget", "steps=40", "--batch", "16", "--seeds", "2", "--size", "32", "--shots", "4", "--rates", "1,3"),
    *("--limit", "200", "--no-audit", "--jobs", "2"),
)
TIMES = ("seconds",)
KILLS = 10


def start(out: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "mmssl", *CALL, "--out", str(out)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )


def table(out: Path) -> list[dict[str, str]]:
    with (out / "table.csv").open() as file:
        return [{key: cell for key, cell in row.items() if key not in TIMES} for row in csv.DictReader(file)]


def test_ten_kills_change_nothing(tmp_path):
    began = time.monotonic()
    assert start(tmp_path / "alone").wait() == 0
    whole, expected = time.monotonic() - began, table(tmp_path / "alone")
    dice, kills, outs = random.Random(0), 0, [tmp_path / "killed-0"]
    while kills < KILLS:
        process = start(outs[-1])
        try:
            assert process.wait(dice.uniform(0.1, 0.4) * whole) == 0
            outs.append(tmp_path / f"killed-{len(outs)}")  # it came to its end, and the next kills fall on another
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            kills += 1
    assert start(outs[-1]).wait() == 0
    for out in outs:
        assert table(out) == expected
