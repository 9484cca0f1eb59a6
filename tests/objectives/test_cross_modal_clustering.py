"""Cross-modal clustering: whose clusters are whose classes, when they are renewed, and what keeps them apart."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from scipy import stats
from tiny_encoders import tiny_batch, tiny_encoders
from torch import Tensor

from mmssl.errors import RecipeError
from mmssl.objectives import create
from mmssl.objectives.base import Step
from mmssl.ops.draws import Draws

KINDS = ("kmeans", "sinkhorn")


def _task(**hyper):
    torch.manual_seed(0)
    hyper = {"clusters": 4, "every": 10, "views": {"area": None, "flip": 0.0}} | hyper
    return create("cross_modal_clustering", tiny_encoders(), **hyper)


def _step(number: int, rows: int = 32, batches: int = 4, kept: dict | None = None, share: int = 0, shares: int = 1):
    local = rows // shares
    own = slice(share * local, (share + 1) * local)

    def data():
        return ({k: v[own] for k, v in tiny_batch(rows, seed=seed).items()} for seed in range(batches))

    return Step(number, data, log=(kept if kept is not None else {}).update)


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("kind", KINDS)
def test_each_side_learns_the_clusters_of_the_other_and_every_cluster_counts_the_same(kind):
    task = _task(assignment=kind).double()
    task.before_step(_step(0))
    inputs = task.transform(tiny_batch(12, seed=9), Draws(0, 0, 12))
    outputs = task.predict(inputs)
    losses = task.loss(outputs, inputs)
    expected = 0.0
    for key, other, name in (("a", "b", "video"), ("b", "a", "audio")):
        book = task.codebooks[other]
        vectors = F.normalize(
            task.encoder("audio" if key == "a" else "video")(inputs[other], inputs.get(f"{other}_valid")).pooled
        )
        distance = torch.cdist(vectors, book.centers).square() - getattr(book, "offsets", 0)
        assert torch.equal(inputs[f"{other}_code"], distance.argmin(1))
        share = (book.counts + 1) / (book.counts + 1).sum()
        weight = 1 / share[inputs[f"{other}_code"]]
        torch.testing.assert_close(inputs[f"{other}_weight"] * 4, weight.to(inputs[f"{other}_weight"].dtype))
        surprise = F.cross_entropy(outputs[key], inputs[f"{other}_code"], reduction="none")
        expected += (surprise * weight).sum() / weight.sum()
        right = (outputs[key].argmax(1) == inputs[f"{other}_code"]).double()
        torch.testing.assert_close(losses[f"accuracy_{name}"], (right * weight).sum() / weight.sum())
    torch.testing.assert_close(losses["loss"], expected)
    flat = task.loss({key: torch.zeros_like(value) for key, value in outputs.items()}, inputs)
    assert float(flat["loss"]) == pytest.approx(task.chance(12).loss) == pytest.approx(2 * math.log(4))


@pytest.mark.parametrize("kind", KINDS)
def test_clusters_stay_until_they_are_renewed_and_then_follow_the_network(kind):
    task, kept = _task(assignment=kind), {}
    task.before_step(_step(0, kept=kept))
    assert kept.keys() == {"perplexity_video", "perplexity_audio"}
    batch = tiny_batch(16, seed=7)

    def codes() -> Tensor:
        inputs = task.transform(batch, Draws(0, 0, 16))
        return torch.stack([inputs["a_code"], inputs["b_code"]])

    before, centers = codes(), task.codebooks["a"].centers.clone()
    with torch.no_grad():
        for encoder in task.encoders.values():
            for parameter in encoder.parameters():
                parameter.add_(torch.randn_like(parameter))
    for number in (1, 9, 11):
        task.before_step(_step(number))
        assert torch.equal(codes(), before)
    task.before_step(_step(10))
    assert not torch.equal(task.codebooks["a"].centers, centers)
    for side in task.sides.values():
        copied = task.copy[side.key].state_dict()
        assert all(torch.equal(value, copied[name]) for name, value in side.encoder.state_dict().items())


def test_clusters_of_equal_vectors_do_not_collapse_the_loss():
    """All rows alike: one cluster has them all, the others none, and the loss stays that of what is there."""
    task = _task()
    rows = {key: value[:1].expand(8, *value.shape[1:]) for key, value in tiny_batch(8).items()}
    task.before_step(Step(0, lambda: iter([rows])))
    inputs = task.transform(rows, Draws(0, 0, 8))
    losses = task(inputs)
    assert len(inputs["a_code"].unique()) == 1
    assert all(math.isfinite(float(value)) for value in losses.values())


def test_clusters_of_equal_size_are_more_even():
    even, plain = (_task(assignment=kind, points=64) for kind in ("sinkhorn", "kmeans"))
    for task in (even, plain):
        task.before_step(_step(0, rows=64))
    for key in ("a", "b"):
        assert even.codebooks[key].perplexity() > plain.codebooks[key].perplexity()
        assert even.codebooks[key].perplexity() > 3.7


@pytest.mark.long
def test_clusters_of_noise_are_told_at_chance():
    task = _task(every=1000)
    task.before_step(_step(0, rows=64, batches=8))
    optimizer = torch.optim.Adam([p for p in task.parameters() if p.requires_grad], 3e-3)
    for number in range(30):
        optimizer.zero_grad()
        task(task.transform(tiny_batch(32, seed=number % 4), Draws(0, number, 32)))["loss"].backward()
        optimizer.step()
    agree, expected, rows = 0.0, 0.0, 0
    with torch.no_grad():
        for seed in range(20, 24):
            inputs = task.transform(tiny_batch(150, seed=seed), Draws(1, seed, 150))
            said, code = task.predict(inputs)["a"].argmax(1), inputs["b_code"]
            agree += float((said == code).sum())
            rows += 150
            expected += float(sum((said == k).double().mean() * (code == k).double().mean() for k in range(4))) / 4
    assert stats.binomtest(round(agree), rows, expected).pvalue > 1e-3


def _fit(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store{world}", rank=rank, world_size=world)
    found = {}
    for kind in KINDS:
        task = _task(assignment=kind)
        task.before_step(_step(0, share=rank, shares=world))
        found[kind] = task.codebooks.state_dict()
    torch.save(found, f"{folder}/{world}-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.long
@pytest.mark.usefixtures("double")
def test_clusters_are_those_of_one_process_on_any_number(processes, tmp_path: Path):
    alone = {}
    for kind in KINDS:
        task = _task(assignment=kind)
        task.before_step(_step(0))
        alone[kind] = task.codebooks.state_dict()
    for world in (2, 4):
        processes(_fit, (world, str(tmp_path)), world)
        for rank in range(world):
            found = torch.load(tmp_path / f"{world}-{rank}.pt")
            for kind in KINDS:
                for name, value in alone[kind].items():
                    torch.testing.assert_close(found[kind][name], value, rtol=1e-9, atol=1e-9)


def test_refuses_what_cannot_work():
    with pytest.raises(RecipeError, match="a and b are both 'audio'"):
        _task(a="audio")
    with pytest.raises(RecipeError, match="these are sharded; set training"):
        _task().before_step(Step(0, lambda: iter(()), sharded=True))
