"""Processes of a launcher, or tasks of a job array, share the cells of one folder and end in one table."""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path

import pytest

import mmssl
from mmssl.comparison.cells import cells_of
from mmssl.recipe import Data

FEW = {
    **{"label": "shape", "tasks": ["rotation"], "encoder": {"model": "timm/test_resnet"}, "budget": "steps=2"},
    **{"batch": 8, "seeds": 2, "size": 32, "probe": "ridge", "shots": [4], "rates": [1.0], "limit": 60},
    **{"audit": False, "supervised": False},
}
CALL = (
    *("compare", "--data", "toy", "--set", "limit=64", "--label", "shape", "--tasks", "rotation", "--batch", "8"),
    *("--encoder", "{model: timm/test_resnet}", "--budget", "steps=2", "--seeds", "2", "--size", "32", "--rates", "1"),
    *("--probe", "ridge", "--shots", "4", "--limit", "60", "--no-audit", "--no-supervised"),
)
PORT = "29999"  # at which nobody waits
LAUNCHED = {
    "torchrun": lambda rank: {
        **{"RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"},
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": PORT, "TORCHELASTIC_RUN_ID": "none"},
    },
    "job array": lambda rank: {
        **{"SLURM_JOB_ID": f"{70 + rank}", "SLURM_ARRAY_JOB_ID": "70", "SLURM_ARRAY_TASK_ID": f"{rank}"},
        **{"SLURM_ARRAY_TASK_COUNT": "2", "SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"},
    },
}


def compare(rank: int, launcher: str, out: Path) -> None:
    os.environ |= LAUNCHED[launcher](rank)
    with Path(f"{out}-{rank}.txt").open("w") as said, redirect_stdout(said):
        mmssl.compare(Data(source="toy", limit=64), out=out, **FEW)


def table(out: Path) -> list[dict[str, str]]:
    with (out / "table.csv").open() as file:
        return [{key: cell for key, cell in row.items() if key != "seconds"} for row in csv.DictReader(file)]


def measured(said: str) -> list[str]:
    return sorted(re.findall(r"^\d of 5: (\w[\w ]*, seed \d)", said, re.MULTILINE))


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("launched") / "alone"
    mmssl.compare(Data(source="toy", limit=64), out=out, quiet=True, **FEW)
    return out


@pytest.mark.long
@pytest.mark.parametrize("launcher", list(LAUNCHED))
def test_two_processes_share_one_list_and_end_in_the_table_of_one(
    alone: Path, tmp_path: Path, processes: Callable[..., None], launcher: str
) -> None:
    processes(compare, (launcher, tmp_path / "out"), 2)
    assert table(tmp_path / "out") == table(alone)
    found = mmssl.Comparison.read(tmp_path / "out")
    said = [Path(f"{tmp_path / 'out'}-{rank}.txt").read_text() for rank in range(2)]
    assert measured("\n".join(said)) == sorted(
        f"{cell.line}, seed {cell.seed}" for cell in cells_of(found.plan)
    )  # each of them once


@pytest.mark.slow
def test_torchrun_shares_the_cells_and_prints_one_table(alone: Path, tmp_path: Path) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "mmssl"]
    done = subprocess.run([*launch, *CALL, "--out", str(tmp_path / "out")], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert table(tmp_path / "out") == table(alone)
    assert len(measured(done.stdout)) == 5
    assert done.stdout.count("over untrained: ridge, 4 a class") == 1
