"""Momentum distillation of matching: ALBEF's targets, the queue of keys, and the copy that follows slowly."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tiny_encoders import tiny_batch, tiny_fused
from torch import Tensor

from mmssl.objectives import create
from mmssl.ops.draws import Draws

DISTILLED = {"momentum": 0.9, "queue": 10, "width": 7}


pytestmark = pytest.mark.usefixtures("double")


def matching(kind: str = "cross", rows: int = 4, **hyper):
    """Task, inputs, outputs."""
    torch.manual_seed(0)
    task = create("matching", tiny_fused(kind), **{"width": 7} | hyper)
    inputs = task.transform(tiny_batch(rows), Draws(0, 0, rows))
    return task, inputs, task.predict(inputs)


def albef(outputs: dict[str, Tensor], queues: dict[str, Tensor], temperature: float, alpha: float) -> Tensor:
    """Its contrastive term, written out row by row for rows that differ."""
    total = torch.zeros(())
    rows = len(outputs["a"])
    for side, other in (("a", "b"), ("b", "a")):
        columns = [*outputs[f"{other}_key"], *queues[other]]
        for i in range(rows):
            mine = torch.stack([outputs[side][i].dot(column) / temperature for column in columns])
            slow = torch.stack([outputs[f"{side}_key"][i].dot(column) / temperature for column in columns]).softmax(0)
            target = alpha * slow + (1 - alpha) * F.one_hot(torch.tensor(i), len(columns))
            total = total - (target * mine.log_softmax(0)).sum() / (2 * rows)
    return total


def test_distilled_contrastive_term_is_albefs():
    task, inputs, outputs = matching(alpha=0.3, **DISTILLED)
    for p in task.distillation.teacher.parameters():
        p.data += 0.1 * torch.randn_like(p)
    outputs = task.predict(inputs)
    assert (outputs["a"] - outputs["a_key"]).abs().max() > 1e-3
    losses = task.loss(outputs, inputs)
    queues = {side: task.distillation.get_buffer(f"queue_{side}") for side in ("a", "b")}
    assert queues["a"].shape == (10, 7)
    expected = albef({key: value.detach() for key, value in outputs.items()}, queues, 0.07, 0.3)
    torch.testing.assert_close(losses["contrastive"].detach(), expected)
    losses["loss"].backward()
    assert all(p.grad is None for p in task.distillation.parameters())
    assert all(p.grad is not None for p in task.encoder("image").parameters())


def test_negatives_are_drawn_by_the_copys_keys_of_the_batch():
    task, _, outputs = matching(**DISTILLED)
    to_b, to_a = task._similar(outputs, 4)
    torch.testing.assert_close(to_b, outputs["a"].detach() @ outputs["b_key"].T / 0.07)
    torch.testing.assert_close(to_a, outputs["b"].detach() @ outputs["a_key"].T / 0.07)


def test_queue_takes_the_newest_keys_and_the_copy_follows_slowly():
    task, inputs, outputs = matching(**DISTILLED)
    state = task.distillation
    weight = task.project_a.weight.detach().clone()
    with torch.no_grad():
        task.project_a.weight += 1.0
    seen = []
    for step in range(5):  # 20 rows through a queue of 10
        inputs["items"] = torch.arange(4 * step, 4 * step + 4)[:, None].expand(-1, 3).clone()
        outputs = task.predict(inputs)
        before = {name: value.clone() for name, value in state.named_buffers()}
        task.loss(outputs, inputs)
        for name, value in state.named_buffers():  # compared first, enqueued after the step
            assert torch.equal(value, before[name])
        task.after_step(0.5)
        seen.append(outputs["a_key"])
        torch.testing.assert_close(state.teacher["project_a"].weight, weight + 1 - 0.9 ** (step + 1))
    assert sorted(state.items[:, 0].tolist()) == list(range(10, 20))
    rows = torch.cat(seen)
    torch.testing.assert_close(state.queue_a, rows[state.items[:, 0]])
    assert int(state.pointer) == 0
    # Looking does not move it.
    task.eval()
    task.loss(task.predict(inputs), inputs)
    task.after_step(0.5)
    assert sorted(state.items[:, 0].tolist()) == list(range(10, 20))


def test_an_older_key_of_the_very_pair_is_a_positive():
    task, inputs, outputs = matching(alpha=0.0, **DISTILLED)
    task.distillation.items[3] = inputs["items"][2]
    loss = task.loss(outputs, inputs)["contrastive"]
    columns = {side: [*outputs[f"{side}_key"], *task.distillation.get_buffer(f"queue_{side}")] for side in ("a", "b")}
    expected = torch.zeros(())
    for side, other in (("a", "b"), ("b", "a")):
        logits = outputs[side] @ torch.stack(columns[other]).T / 0.07
        target = torch.eye(4, 14)
        target[2, 4 + 3], target[2, 2] = 0.5, 0.5
        expected = expected + F.cross_entropy(logits, target) / 2
    torch.testing.assert_close(loss, expected)


def test_share_of_the_copys_targets_rises_over_the_ramp_and_is_state():
    task, inputs, outputs = matching(alpha=0.4, ramp=4, **DISTILLED)
    detached = {key: value.detach() for key, value in outputs.items()}
    for step in range(6):
        queues = {side: task.distillation.get_buffer(f"queue_{side}") for side in ("a", "b")}
        expected = albef(detached, queues, 0.07, 0.4 * min(1, step / 4))
        torch.testing.assert_close(task.loss(detached, inputs)["contrastive"].detach(), expected)
        with torch.no_grad():
            task.distillation.items.fill_(-1)  # the same rows again are no positives here
        task.distillation._newest = None
        task.after_step(0.0)
    assert int(task.state_dict()["distillation.steps"]) == 6
