"""Records of steps in which no row counts, or in which there was nothing to predict."""

from __future__ import annotations

import pytest
import torch
from test_loop import settings
from tiny import Denoise, MemoryLoader, make
from torch import Tensor

from mmssl.batch import Batch
from mmssl.objectives.base import Chance, Step
from mmssl.ops.draws import Draws
from mmssl.training.loop import fit
from mmssl.training.monitors import averaged
from mmssl.training.progress import describe


class EverySecond(Denoise):
    """Leaves out all rows of every second step, the first one too."""

    def before_step(self, step: Step) -> None:
        self.counts = step.number % 2

    def loss(self, outputs: Batch, inputs: Batch) -> dict[str, Tensor]:
        found = super().loss(outputs, inputs)["loss"] * self.counts
        return {"loss": found, "accuracy": found.detach(), "valid": torch.tensor(float(self.counts))}


def test_a_step_in_which_no_row_counts_has_no_loss_and_no_score() -> None:
    history = fit(make(EverySecond), MemoryLoader(), settings(steps=4), quiet=True)
    for record, counts in zip(history, [0, 0, 1, 0, 1], strict=True):
        assert record["valid"] == counts
        assert ("loss" in record) == ("accuracy" in record) == bool(counts)
        assert ("no row counts" in describe(record, Chance(1.0))) != bool(counts)
    both = {"loss": 1.0, "a/loss": 0.0, "a/b/loss": 2.0, "a/valid": 0.0}
    losses = {key: torch.tensor(value) for key, value in both.items()}
    assert averaged(losses, {}) == {key: value for key, value in both.items() if key != "a/loss"}
    assert averaged(losses, {"": torch.tensor(0.0)}) == {"valid": 0, "a/valid": 0}
    assert averaged(losses, {"a": torch.tensor(2.0), "a/b": torch.tensor(0.0)}) == {
        "loss": 1.0,
        "a/valid": 0,
        "a/b/valid": 0,
    }


class HidesNow(Denoise):
    """Nothing is chosen in every second step, and the mean over it is 0."""

    @torch.no_grad()
    def transform(self, batch: Batch, draws: Draws) -> Batch:
        inputs = super().transform(batch, draws)
        chosen = inputs["chosen"] & bool(draws.step % 2)
        return inputs | {"chosen": chosen, "chosen_rows": chosen.sum()}

    def loss(self, outputs: Batch, inputs: Batch) -> dict[str, Tensor]:
        return super().loss(outputs, inputs | {"chosen_rows": inputs["chosen_rows"].clamp(min=1e-6)})


@pytest.mark.parametrize("parts", [1, 2])
def test_a_step_that_hides_nothing_has_no_loss(parts: int) -> None:
    history = fit(make(HidesNow), MemoryLoader(), settings(steps=4, accumulate=parts), quiet=True)
    told = [(record.get("valid"), "loss" in record) for record in history]
    assert told == [(0, False), (0, False), (None, True), (0, False), (None, True)]
    assert (history[-1]["same_rows/valid"], "same_rows/loss" in history[-1]) == (0, False)
    assert "no row counts" in describe(history[0], Chance(1.0))
