"""DeepCluster: whose clusters crops are to say, spherical k-means, renewal, and what keeps clusters apart."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tiny_encoders import tiny_batch, tiny_encoders
from torch import Tensor

from mmssl.errors import RecipeError
from mmssl.objectives import create
from mmssl.objectives.base import Step
from mmssl.objectives.invariance.deepcluster import DeepCluster
from mmssl.ops.draws import Draws

K = 5


def make(**hyper) -> DeepCluster:
    torch.manual_seed(0)
    small = {"clusters": K, "every": 10, "hidden": 12, "width": 6, "local_crops": 2, "local_views": {"size": 8}}
    return create("deepcluster", tiny_encoders(), **(small | hyper))


def step(number: int, rows: int = 32, batches: int = 4, share: int = 0, shares: int = 1) -> Step:
    own = slice(share * rows // shares, (share + 1) * rows // shares)

    def data():
        return ({k: v[own] for k, v in tiny_batch(rows, seed=seed).items()} for seed in range(batches))

    return Step(number, data)


@pytest.mark.usefixtures("double")
def test_every_other_crop_says_the_cluster_of_a_large_one_and_each_cluster_counts_the_same():
    task = make().eval()
    task.before_step(step(0))
    inputs = task.transform(tiny_batch(12, seed=9), Draws(0, 0, 12))
    outputs = task.predict(inputs)
    losses = task.loss(outputs, inputs)
    expected = right = total = 0.0
    share = (task.codebook.counts + 1) / (task.codebook.counts + 1).sum()
    for row in range(12):
        for i in range(2):
            own = inputs["views"][row, i][None]
            # Nothing has moved since, so that the copy is the network.
            vector = F.normalize(task.projection(task.encoder("image")(own).pooled), dim=1)
            code = int((vector @ task.codebook.centers.T).argmax())
            assert int(inputs["code"][row, i]) == code
            others = [v for v in range(4) if v != i]
            terms = [F.cross_entropy(outputs["logits"][row, v], torch.tensor(code)) for v in others]
            weight = float(1 / share[code])
            expected += weight * sum(terms) / 3
            right += weight * float(outputs["logits"][row, 1 - i].argmax() == code)
            total += weight
    torch.testing.assert_close(losses["loss"], expected / total)
    assert float(losses["accuracy"]) == pytest.approx(right / total)
    flat = task.loss({key: torch.zeros_like(value) for key, value in outputs.items()}, inputs)
    assert float(flat["loss"]) == pytest.approx(task.chance(12).loss) == pytest.approx(math.log(K))


@pytest.mark.usefixtures("double")
def test_centers_are_spherical_k_means_and_the_head():
    task = make(points=1000).eval()
    task.before_step(step(0))
    centers = task.codebook.centers
    torch.testing.assert_close(centers.norm(dim=1), torch.ones(K))
    points = torch.cat(list(task._vectors_of_all(step(0))))
    assert points.shape == (4 * 32 * 2, 6)
    assert torch.equal(torch.cat(list(task._vectors_of_all(step(0)))), points)
    nearest = (points @ centers.T).argmax(1)
    for k in range(K):  # each is where the unit vectors that are nearest to it point to
        torch.testing.assert_close(centers[k], F.normalize(points[nearest == k].mean(0), dim=0), rtol=1e-6, atol=1e-8)
    assert torch.bincount(nearest, minlength=K).tolist() == task.codebook.counts.tolist()
    inputs = task.transform(tiny_batch(3), Draws(0, 0, 3))
    outputs = task.predict(inputs)
    torch.testing.assert_close(outputs["logits"][:, :2], outputs["z"] @ centers.T / 0.1)
    assert not any(centers is parameter for parameter in task.parameters())


def test_clusters_stay_until_they_are_renewed_and_then_follow_the_network():
    task = make().eval()
    task.before_step(step(0))
    batch = tiny_batch(16, seed=7)

    def codes() -> Tensor:
        return task.transform(batch, Draws(0, 0, 16))["code"]

    before, centers = codes(), task.codebook.centers.clone()
    with torch.no_grad():
        for parameter in (*task.encoder("image").parameters(), *task.projection.parameters()):
            parameter.add_(torch.randn_like(parameter))
    for number in (1, 9, 11):
        task.before_step(step(number))
        assert torch.equal(codes(), before)
    task.before_step(step(10))
    assert not torch.equal(task.codebook.centers, centers)
    for name, module in task._student().items():
        copied = task.copy[name].state_dict()
        assert all(torch.equal(value, copied[key]) for key, value in module.state_dict().items())


def test_one_cluster_for_all_is_told_and_no_error():
    still = {"area": [1.0, 1.0], "flip": 0.0, "jitter": 0.0, "grayscale": 0.0, "blur": 0.0}
    task = make(views=still).eval()
    rows = {key: value[:1].expand(8, *value.shape[1:]) for key, value in tiny_batch(8).items()}
    task.views.settings = [
        type(view)(area=(1.0, 1.0), flip=0, jitter=0, grayscale=0, blur=0)
        for view in range(2)
        for view in task.views.settings[:1]
    ]
    task.before_step(Step(0, lambda: iter([rows])))
    losses = task(task.transform(rows, Draws(0, 0, 8)))
    assert all(value.isfinite() for value in losses.values())
    task.codebook.counts.copy_(torch.tensor([1000, 0, 0, 0, 0]))
    assert float(task(task.transform(rows, Draws(0, 0, 8)))["perplexity"]) < 1.1


def _fit(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store{world}", rank=rank, world_size=world)
    task = make()
    task.before_step(step(0, share=rank, shares=world))
    torch.save(task.codebook.state_dict(), f"{folder}/{world}-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.long
@pytest.mark.usefixtures("double")
def test_clusters_are_those_of_one_process_on_any_number(processes, tmp_path: Path):
    task = make()
    task.before_step(step(0))
    for world in (2, 4):
        processes(_fit, (world, str(tmp_path)), world)
        for rank in range(world):
            found = torch.load(tmp_path / f"{world}-{rank}.pt")
            for name, value in task.codebook.state_dict().items():
                torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-9)


def test_refuses_what_cannot_work():
    with pytest.raises(RecipeError, match="these are sharded; set training"):
        make().before_step(Step(0, lambda: iter(()), sharded=True))
    with pytest.raises(RecipeError, match="deepcluster compares crops of images or of sounds"):
        make(encoder="video")
