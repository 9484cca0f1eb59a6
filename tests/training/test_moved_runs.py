"""A clock that is set while a run trains, and a run that goes on in another folder and on another machine."""

from __future__ import annotations

import itertools
import json
import os
import signal
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import nn

import mmssl
from mmssl.comparison.budget import Budget, step_seconds
from mmssl.errors import Interrupted, RunError
from mmssl.training import checkpoint
from mmssl.training.history import History
from mmssl.training.lock import LOCK

RECIPES = Path(mmssl.__file__).parent.parent / "recipes"
STEPS, STOP = 4, 2
TIMES = {"samples_per_second", "data_wait", "peak_memory_gib", "eta"}
JUMPS = (0.0, -1e9, 1e9, -3600.0, 7200.0, -1e9)
"""Seconds by which the clock on the wall is set, one jump a reading."""


def tree() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((RECIPES / "transformation" / "rotation_toy.yaml").read_text("utf-8"))
    found["data"]["limit"] = 16
    found["training"] |= {"steps": STEPS, "batch_size": 8, "log_every": 1, "save_every": 1}
    return found


def run(out: Path, stop: int = STEPS) -> None:
    """Train, and stop after so many steps."""
    advance = History.advance

    def advance_and_stop(self: History, step: int) -> None:
        advance(self, step)
        if step == stop < STEPS:
            os.kill(os.getpid(), signal.SIGUSR1)

    with pytest.MonkeyPatch.context() as patch, suppress(Interrupted):
        patch.setattr(History, "advance", advance_and_stop)
        mmssl.run(tree(), out=out, resume=True, quiet=True)


def records(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text("utf-8").splitlines()]


def same(one: Path, other: Path) -> None:
    """The same numbers but for times, and the same bits."""
    ours, theirs = ([{k: v for k, v in r.items() if k not in TIMES} for r in records(out)] for out in (one, other))
    assert ours == theirs
    for file in (checkpoint.WEIGHTS, checkpoint.OPTIMIZER):
        a, b = (load_file(checkpoint.newest(out) / file) for out in (one, other))
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "run"
    run(out)
    return out


def set_clock(patch: pytest.MonkeyPatch) -> None:
    now, jumps = time.time, itertools.cycle(JUMPS)
    patch.setattr(time, "time", lambda: now() + next(jumps))
    patch.setattr(time, "ctime", lambda *at: "Thu Jan  1 00:00:00 1970")


@pytest.mark.long
def test_a_clock_that_is_set_changes_neither_a_run_nor_its_times(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_clock(monkeypatch)
    run(tmp_path / "run", STOP)
    run(tmp_path / "run")
    same(tmp_path / "run", whole)
    for record in records(tmp_path / "run")[1:]:
        assert 0 <= record["data_wait"] <= 1
        assert 0 < record["samples_per_second"] < 1e6
        assert 0 <= record["eta"] < 600


@pytest.mark.long
def test_a_run_goes_on_in_another_folder_on_another_machine_bit_for_bit(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = tmp_path / "here" / "run", tmp_path / "there" / "another name"
    run(old, STOP)
    left = {"host": socket.gethostname(), "process": os.getpid(), "began": "1", "since": "noon"}
    (old / LOCK).write_text(json.dumps(left), encoding="utf-8")  # of a machine that was switched off
    new.parent.mkdir()
    old.rename(new)
    old.parent.rmdir()
    monkeypatch.setattr(socket, "gethostname", lambda: "elsewhere")
    with pytest.raises(RunError, match=rf"on {left['host']} has been writing .* since noon; .*delete .*/{LOCK}\)"):
        run(new)
    (new / LOCK).unlink()
    run(new)
    same(new, whole)
    assert not old.parent.exists()
    for file in new.rglob("*.json*"):
        assert str(old.parent) not in file.read_text("utf-8"), file


class Still(nn.Module):
    """A task that takes no time."""

    def transform(self, batch: dict[str, Any], draws: Any) -> dict[str, Any]:
        return batch

    def forward(self, inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
        return {"loss": torch.zeros((), requires_grad=True)}


@pytest.mark.parametrize("jump", [-1e6, 1e6])
def test_a_budget_of_minutes_does_not_depend_on_the_clock_on_the_wall(
    jump: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, wall = itertools.count(0.0, 0.25), itertools.count(0.0, jump)
    monkeypatch.setattr(time, "perf_counter", lambda: next(now))
    monkeypatch.setattr(time, "time", lambda: next(wall))
    seconds = step_seconds(Still(), {"id": torch.arange(4)})
    assert seconds == 0.25
    assert Budget.of("minutes=1").steps(4, seconds) == 240


def test_a_step_that_took_long_once_does_not_shorten_a_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    ends = iter((0, 1, 1, 2, 2, 9e6, 9e6, 9e6 + 1))  # warm-up, 1 s, suspended for months, 1 s
    monkeypatch.setattr(time, "perf_counter", lambda: next(ends))
    assert Budget.of("minutes=1").steps(4, step_seconds(Still(), {"id": torch.arange(4)})) == 60
