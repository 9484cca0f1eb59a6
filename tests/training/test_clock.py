"""What a step's time goes to, and workers that are counted by themselves."""

from __future__ import annotations

import os
import time
from typing import Any

import pytest
import torch
from test_loop import settings
from tiny import Denoise, MemoryLoader, make

from mmssl.data.decoding import ENOUGH_WORKERS, cores_to_spare
from mmssl.errors import RecipeError
from mmssl.recipe import load
from mmssl.training.loop import fit
from mmssl.training.progress import ADVICE, Clock


class Slow(MemoryLoader):
    def batches(self, start: int, stop: int):  # type: ignore[no-untyped-def]
        for batch in super().batches(start, stop):
            time.sleep(0.03)
            yield batch


class SlowViews(Denoise):
    def transform(self, batch: Any, draws: Any) -> Any:
        time.sleep(0.03)
        return super().transform(batch, draws)


class SlowNetwork(Denoise):
    def predict(self, inputs: Any) -> Any:
        time.sleep(0.03)
        return super().predict(inputs)


class SlowTeacher(Denoise):
    def after_step(self, progress: float) -> None:
        time.sleep(0.03)


@pytest.mark.parametrize(
    ("task", "loader", "part"),
    [
        (Denoise, Slow(), "decoding"),
        (SlowViews, MemoryLoader(), "augmentation"),
        (SlowNetwork, MemoryLoader(), "network"),
        (SlowTeacher, MemoryLoader(), "optimizer"),
    ],
)
def test_the_last_line_of_a_run_says_what_bounds_it_and_what_to_change(
    task: type[Denoise], loader: MemoryLoader, part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(make(task), loader, settings(steps=12, log_every=5))
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"bound by {part} (decoding ")
    assert last.endswith(ADVICE[part])
    assert sum(int(word.rstrip("%,):")) for word in last.partition(": what")[0].split() if "%" in word) in range(
        98, 103
    )


def test_marks_are_read_once_and_what_has_no_name_is_not_counted() -> None:
    clock = Clock(torch.device("cpu"))
    assert clock.bound_by() == ""
    for part in ("network", "", "optimizer", ""):
        clock.enter(part)
        time.sleep(0.05 if part == "" else 0.01)
    clock.read()
    once = clock.bound_by()
    clock.read()
    assert clock.bound_by() == once
    assert "%" in once
    assert "decoding" not in once.partition(":")[0]


def test_workers_are_counted_by_the_cores_of_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for cores, processes, workers in ((1, 1, 0), (8, 1, 7), (8, 2, 3), (8, 8, 0), (256, 4, ENOUGH_WORKERS)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda process, cores=cores: set(range(cores)), raising=False)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
        assert cores_to_spare() == workers


def test_workers_are_a_number_or_auto() -> None:
    tree = {"encoders": {"image": {"model": "timm/test_vit"}}, "objective": {"name": "rotation"}}
    tree["data"] = {"source": "toy"}
    assert load(tree, {"training.workers": "auto"}).training.workers == "auto"
    assert load(tree, {"training.workers": "3"}).training.workers == 3
    for wrong in ("many", "-1", "257"):
        with pytest.raises(RecipeError, match=r"training.workers.* should be 0 to 256, or auto"):
            load(tree, {"training.workers": wrong})


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("slower", [4.0, 1.0])
def test_a_precision_that_the_processor_is_slow_in_is_told_before_the_first_step(
    precision: str, slower: float, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seconds = {torch.float32: 1e-3, torch.bfloat16: slower * 1e-3}
    monkeypatch.setattr("mmssl.training.launch._linear_seconds", seconds.__getitem__)
    fit(make(Denoise), MemoryLoader(), settings(steps=1, precision=precision))
    first = capsys.readouterr().err.splitlines()[0]
    told = "training.precision=bf16: a linear layer takes this processor 4.0 times as long as in full precision; "
    assert first.startswith(told) == (precision == "bf16" and slower > 1)
