"""Step 0 and its rows again at the end, and what monitors see, without a trace in the run."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from test_loop import settings
from tiny import Denoise, MemoryLoader, Pull, TinyEncoder, free_port, make
from torch import Tensor, nn

from mmssl import recipe
from mmssl.batch import Batch
from mmssl.build import build
from mmssl.encoders.base import Features
from mmssl.ops.draws import Draws
from mmssl.training.loop import fit
from mmssl.training.monitors import Monitors


def losses_by_hand(task: Denoise) -> dict[str, float]:
    """Of the first batch and its draws."""
    batch = next(MemoryLoader().batches(0, 1))
    with torch.no_grad():
        return {key: float(value) for key, value in task(task.transform(batch, Draws(0, 0, 8))).items()}


@pytest.mark.parametrize("kind", [Denoise, Pull])
def test_step_0_is_the_untrained_network_and_the_last_record_the_trained_one_on_its_rows(kind: type) -> None:
    task = make(kind)
    torch.set_default_dtype(torch.float64)
    try:
        before = losses_by_hand(task.double())
        history = fit(task, MemoryLoader(), settings(log_every=7), quiet=True)
        after = losses_by_hand(task)
    finally:
        torch.set_default_dtype(torch.float32)
    assert [record["step"] for record in history] == [0, 7, 14, 20]
    assert {key: history[0][key] for key in before} == pytest.approx(before, rel=1e-9)
    assert {key: history[-1][f"same_rows/{key}"] for key in after} == pytest.approx(after, rel=1e-9)
    assert after["loss"] < before["loss"]
    assert not [key for record in history[:-1] for key in record if key.startswith("same_rows/")]


def normed(dropout: float = 0.3) -> Pull:
    task = make(Pull, dropout=dropout)
    task.encoders["image"].net[1] = nn.BatchNorm1d(16)
    return task


@pytest.mark.quick(1)
@pytest.mark.parametrize("parts", [1, 2])
def test_measuring_leaves_no_trace(parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """BatchNorm's statistics, dropout's random numbers, a queue: as in a run that measures nothing."""
    watched, plain = normed(), normed()
    fit(watched, MemoryLoader(), settings(accumulate=parts), quiet=True)
    monkeypatch.setattr("mmssl.training.monitors.Monitors.due", lambda self, now: False)
    monkeypatch.setattr("mmssl.training.monitors.Monitors.read", lambda self, inputs: {})
    monkeypatch.setattr("mmssl.training.loop.losses_of", lambda *arguments: {})
    fit(plain, MemoryLoader(), settings(accumulate=parts), quiet=True)
    for name, value in plain.state_dict().items():
        assert torch.equal(value, watched.state_dict()[name]), name


def test_a_run_that_starts_over_measures_step_0_once(tmp_path: Path) -> None:
    class Stops(MemoryLoader):
        def batches(self, start: int, stop: int):  # type: ignore[no-untyped-def]
            for step, batch in enumerate(super().batches(start, stop), start):
                if step == 3:
                    raise ConnectionError("unplugged")
                yield batch

    with pytest.raises(ConnectionError):
        fit(make(Pull), Stops(), settings(), tmp_path, quiet=True)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 4
    fit(make(Pull), MemoryLoader(), settings(), tmp_path, resume=True, quiet=True)
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(21))


@pytest.mark.quick(1)
@pytest.mark.parametrize(("steps", "every", "expected"), [(9, 4, 4), (20, 1, 11), (100, 7, 11), (200, 60, 5)])
def test_monitors_are_read_ten_times_a_run_and_first_and_last(steps: int, every: int, expected: int) -> None:
    history = fit(make(Pull), MemoryLoader(), settings(steps=steps, log_every=every), quiet=True)
    seen = [record["step"] for record in history if "monitor/image/rank" in record]
    assert (seen[0], seen[-1], len(seen)) == (0, steps, expected)


class Collapsing(TinyEncoder):
    """All rows become one point."""

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Features:
        pooled = 0 * super().forward(x, valid).pooled + 1
        return Features(pooled[:, None], pooled, (1,))


class Choosy(TinyEncoder):
    """Reads rows of one size alone, as a network with fixed positions does."""

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Features:
        if x.dtype == torch.uint8:
            raise AssertionError("Input height (8) doesn't match model (7).")
        return super().forward(x, valid)


def test_a_collapsed_encoder_is_seen_and_one_that_reads_views_alone_is_left_out() -> None:
    record = fit(Denoise({"image": Collapsing()}), MemoryLoader(), settings(steps=4), quiet=True)[-1]
    seen = {key: record[f"monitor/image/{key}"] for key in ("rank", "spread", "dead", "uniformity")}
    assert seen == pytest.approx({"rank": 1, "spread": 0, "dead": 1, "uniformity": 0}, abs=1e-6)
    history = fit(Denoise({"image": Choosy()}), MemoryLoader(), settings(steps=4), quiet=True)
    assert not [key for record in history for key in record if key.startswith("monitor")]


def toy(name: str, **changes: Any) -> dict[str, Any]:
    loaded = recipe.load(name, {"training.steps": 2, "training.schedule.warmup": 0, **changes})
    torch.manual_seed(0)
    task, loader = build(loaded)
    (*_, record) = fit(task, loader, loaded.training, quiet=True)
    return {key.removeprefix("monitor/"): value for key, value in record.items() if key.startswith("monitor/")}


@pytest.mark.long
@pytest.mark.parametrize("name", ["simclr_toy", "byol_toy", "moco_toy", "dino_toy"])
def test_views_and_embeddings_of_two_view_tasks_are_seen(name: str) -> None:
    seen = toy(name)
    room = {"rank", "spread", "dead", "uniformity"}
    aligned = set() if name == "moco_toy" else {"embeddings/alignment"}
    assert set(seen) == {f"{what}/{key}" for what in ("image", "embeddings") for key in room} | aligned | {
        "image/alignment"
    }
    assert seen["embeddings/rank"] > 1.5
    assert seen["image/alignment"] > 0


def test_encoders_of_a_pair_are_aligned_in_their_common_space() -> None:
    seen = toy("contrastive_toy")
    assert 0 < seen["image_text/alignment"] < 4
    assert {"image/rank", "text/rank"} <= set(seen)


def test_only_the_first_rows_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    class Counts(TinyEncoder):
        def forward(self, x: Tensor, valid: Tensor | None = None) -> Features:
            if not self.training:
                sizes.append(len(x))
            return super().forward(x, valid)

    monkeypatch.setattr("mmssl.training.monitors.ROWS", 3)
    batch: Batch = next(MemoryLoader().batches(0, 1))
    assert len(batch["image"]) > 3
    fit(Denoise({"image": Counts()}), MemoryLoader(), settings(steps=2), quiet=True)
    assert sizes == [3, 3, 3]


def test_of_rows_of_several_windows_the_middle_one_is_measured() -> None:
    task = make(Denoise)
    monitors = Monitors(task, settings(), nullcontext, False)
    batch = next(MemoryLoader().batches(0, 1))
    inputs = task.transform(batch, Draws(0, 0, len(batch["image"])))
    monitors.keep(0, batch)
    one = monitors.read(inputs)
    other = batch["image"].roll(1, -1)
    monitors.keep(0, {**batch, "image": torch.stack([other, batch["image"], other], 1)})
    assert monitors.read(inputs) == one


def _measure_twice(rank: int, port: int) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    task = normed(dropout=0.0)
    norm = task.encoders["image"].net[1]
    norm.running_var.fill_(1.0 + 8 * rank)  # as unsynchronized norms of other rows have it
    monitors = Monitors(task, settings(), nullcontext, False)
    batch = next(MemoryLoader().batches(0, 1))
    monitors.keep(0, batch)
    inputs = task.transform(batch, Draws(0, 0, 4, share=rank, shares=2))
    before = monitors.read(inputs)
    assert torch.equal(norm.running_var, torch.full((16,), 1.0 + 8 * rank))
    norm.running_var.fill_(1.0)  # as after a resume
    assert monitors.read(inputs) == before
    torch.distributed.destroy_process_group()


@pytest.mark.long
def test_monitors_of_several_processes_are_those_of_a_resumed_run(processes: Callable) -> None:
    processes(_measure_twice, (free_port(),), 2)
