"""MoCo: the queue, the copy, and no way for BatchNorm to betray the key."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tiny_encoders import NormedImage, TinyImage, tiny_batch, tiny_encoders
from torch import Tensor, nn

from mmssl.encoders import create as create_encoder
from mmssl.errors import RecipeError
from mmssl.objectives import create
from mmssl.ops.draws import Draws
from mmssl.ops.gather import average, gather


def units(generator: torch.Generator, *shape: int) -> Tensor:
    return F.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1)


@pytest.mark.parametrize("encoder", ["image", "audio"])
@pytest.mark.parametrize("form", ["v2", "v3"])
def test_queries_meet_the_keys_of_the_other_view(form, encoder):
    torch.manual_seed(0)
    task = create("moco", tiny_encoders(), encoder=encoder, form=form, hidden=12, queue=8).eval()
    inputs = task.transform(tiny_batch(5), Draws(0, 0, 5))
    width, views = (128, 1) if form == "v2" else (256, 2)
    outputs = task.predict(inputs)
    assert outputs["q"].shape == outputs["k"].shape == (5, views, width)
    torch.testing.assert_close(outputs["q"].norm(dim=-1), torch.ones(5, views))
    assert outputs["q"].requires_grad
    assert not outputs["k"].requires_grad

    def parts(view: int) -> list[Tensor]:
        return [inputs[key][:, view] for key in ("views", "valid") if key in inputs]

    with torch.no_grad():  # the copy is equal at the start
        net, head = task.encoder(encoder), task.projection
        key_of_second = F.normalize(head(net(*parts(1)).pooled), dim=1)
        torch.testing.assert_close(outputs["k"][:, 0], key_of_second)
        if form == "v2":
            torch.testing.assert_close(outputs["q"][:, 0], F.normalize(head(net(*parts(0)).pooled), dim=1))
        else:
            query = task.prediction(head(net(*parts(1)).pooled))
            torch.testing.assert_close(outputs["q"][:, 1], F.normalize(query, dim=1))
            torch.testing.assert_close(outputs["k"][:, 1], F.normalize(head(net(*parts(0)).pooled), dim=1))


@pytest.mark.usefixtures("double")
def test_v2_is_the_softmax_over_one_key_and_the_queue_with_its_gradient():
    generator = torch.Generator().manual_seed(0)
    task = create("moco", tiny_encoders(), queue=50, width=6, temperature=0.3)
    q, k = units(generator, 4, 1, 6).requires_grad_(), units(generator, 4, 1, 6).requires_grad_()
    loss = task.loss({"q": q, "k": k}, {})["loss"]
    loss.backward()
    assert k.grad is None
    expected = 0.0
    for query, key, gradient in zip(q.detach()[:, 0], k.detach()[:, 0], q.grad[:, 0], strict=True):
        positive = math.exp(float(query @ key) / 0.3)
        negatives = [math.exp(float(query @ old) / 0.3) for old in task.queue.rows]
        total = positive + sum(negatives)
        expected -= math.log(positive / total) / 4
        pull = sum(n / total * old for n, old in zip(negatives, task.queue.rows, strict=True))
        torch.testing.assert_close(gradient, ((positive / total - 1) * key + pull) / 0.3 / 4)
    assert loss.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.usefixtures("double")
def test_v3_is_symmetric_cross_entropy_over_the_batch_times_twice_the_temperature():
    generator = torch.Generator().manual_seed(0)
    task = create("moco", tiny_encoders(), form="v3", hidden=8, temperature=0.4)
    q, k = units(generator, 5, 2, 6).requires_grad_(), units(generator, 5, 2, 6)
    losses = task.loss({"q": q, "k": k}, {})
    losses["loss"].backward()
    expected = 0.0
    gradient = torch.zeros_like(q)
    for view in range(2):
        share = (q[:, view] @ k[:, view].T / 0.4).exp().detach()
        share = share / share.sum(1, keepdim=True)
        expected -= 2 * 0.4 * float(share.diagonal().log().mean())
        gradient[:, view] = 2 * 0.4 * (share - torch.eye(5)) @ k[:, view] / 0.4 / 5
    assert losses["loss"].item() == pytest.approx(expected, rel=1e-12)
    torch.testing.assert_close(q.grad, gradient)
    swapped = task.loss({"q": q.flip(1), "k": k.flip(1)}, {})["loss"]
    torch.testing.assert_close(swapped, losses["loss"])


@pytest.mark.usefixtures("double")
def test_before_training_the_queue_is_noise_around_the_key():
    task = create("moco", tiny_encoders(), queue=4096)
    torch.testing.assert_close(task.queue.rows.norm(dim=1), torch.ones(4096))
    q = units(torch.Generator().manual_seed(1), 16, 1, 128)
    loss = float(task.loss({"q": q, "k": q}, {})["loss"])
    cosine = q[:, 0] @ task.queue.rows.T
    expected = (1 + ((cosine - 1) / 0.2).exp().sum(1)).log().mean()
    assert loss == pytest.approx(float(expected), rel=1e-10)
    # The mean over random directions of exp(cos / T) is exp(1 / (2 D T²)) for large D.
    assert loss == pytest.approx(math.log(1 + 4096 * math.exp(-5 + 1 / (2 * 128 * 0.04))), abs=0.02)


@pytest.mark.parametrize("form", ["v2", "v3"])
def test_what_sees_nothing_is_at_chance(form):
    task = create("moco", tiny_encoders(), form=form, queue=100, hidden=8)
    same = torch.ones(6, 1 if form == "v2" else 2, 4) / 2
    if form == "v2":
        task.queue.rows = same[:1, 0].expand(100, -1)
    losses, chance = task.loss({"q": same, "k": same}, {}), task.chance(6)
    assert losses["loss"] == pytest.approx(chance.loss, rel=1e-6)
    assert losses["accuracy"] == pytest.approx(chance.metrics["accuracy"])  # ties are guesses
    assert losses["spread"] == pytest.approx(0, abs=1e-6)
    assert chance.loss == pytest.approx(math.log(101) if form == "v2" else 4 * math.log(6))


def test_the_oldest_keys_leave_the_queue_also_around_its_end():
    torch.manual_seed(0)
    task = create("moco", tiny_encoders(), queue=7, width=6).train()
    expected, oldest = task.queue.rows.clone(), 0
    for step in range(6):
        inputs = task.transform(tiny_batch(3, seed=step), Draws(0, step, 3))
        outputs = task.predict(inputs)
        before = task.queue.rows.clone()
        task.loss(outputs, inputs)
        task.loss(outputs, inputs)  # asking twice enters nothing twice
        assert torch.equal(task.queue.rows, before)  # compared first, entered later
        with torch.no_grad():
            task.after_step(0.5)
        for key in outputs["k"][:, 0]:
            expected[oldest % 7] = key
            oldest += 1
        assert torch.equal(task.queue.rows, expected)
        assert int(task.queue.pointer) == oldest % 7
    task.eval().loss(outputs, inputs)
    task.after_step(0.5)
    assert torch.equal(task.queue.rows, expected)  # evaluation enters nothing


def test_a_batch_must_fit_into_the_queue():
    task = create("moco", tiny_encoders(), queue=3, width=4)
    q = torch.eye(4)[:, None]
    with pytest.raises(RecipeError, match="queue = 3 should hold the keys of a batch, 4 rows"):
        task.loss({"q": q, "k": q}, {})


@pytest.mark.parametrize(("form", "progress", "share"), [("v2", 0.5, 0.999), ("v3", 0.0, 0.99), ("v3", 1.0, 1.0)])
def test_the_copy_follows_by_momentum_and_learns_nothing_itself(form, progress, share):
    torch.manual_seed(0)
    task = create("moco", tiny_encoders(), form=form, hidden=8, queue=16).train()
    before = {name: p.clone() for name, p in task.teacher.named_parameters()}
    inputs = task.transform(tiny_batch(8), Draws(0, 0, 8))
    task(inputs)["loss"].backward()
    assert all(p.grad is None and not p.requires_grad for p in task.teacher.parameters())
    with torch.no_grad():
        for p in task.parameters():
            if p.grad is not None:
                p -= p.grad + 0.1
        task.after_step(progress)
    student = nn.ModuleDict({"encoder": task.encoder("image"), "projection": task.projection})
    for name, own in task.teacher.named_parameters():
        torch.testing.assert_close(own, share * before[name] + (1 - share) * student.get_parameter(name))
    assert not any("prediction" in name for name, _ in task.teacher.named_parameters())


def influence(task: nn.Module, inputs: dict[str, Tensor], key: str, view: int) -> Tensor:
    """Bool (B, B): whether output i changes with the input of row j."""
    rows = len(inputs["views"])
    with torch.no_grad():
        still = task.predict(inputs)[key]
        moved = []
        for j in range(rows):
            views = inputs["views"].clone()
            views[j, view] += 0.5 * torch.rand_like(views[j, view])
            moved.append((task.predict(inputs | {"views": views})[key] - still).abs().amax((1, 2)) > 1e-12)
    return torch.stack(moved, dim=1)


@pytest.mark.quick(1)
@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("rows", [27, 32])
def test_batch_statistics_of_a_query_are_not_those_of_its_key(rows):
    torch.manual_seed(0)
    task = create("moco", {"image": NormedImage()}, queue=64).train()
    inputs = task.transform(tiny_batch(rows), Draws(0, 0, rows))
    of_query, of_key = influence(task, inputs, "q", 0), influence(task, inputs, "k", 1)
    itself = torch.eye(rows, dtype=torch.bool)
    for reached in (of_query, of_key):
        assert torch.equal(reached, reached.T)
        assert (reached & itself).sum() == rows
        assert set(reached.sum(1).tolist()) <= {rows // 8, rows // 8 + 1}
    # The order of keys is another one; that two rows share statistics in both happens by chance, about 1 in 8.
    met, others = int((of_query & of_key & ~itself).sum()), int((of_key & ~itself).sum())
    assert met / others < 0.3
    later = influence(task, task.transform(tiny_batch(rows), Draws(0, 1, rows)), "k", 1)
    assert not torch.equal(later, of_key)

    leaking = create("moco", {"image": NormedImage()}, queue=64, groups=1).train()
    inputs = leaking.transform(tiny_batch(rows), Draws(0, 0, rows))
    assert influence(leaking, inputs, "q", 0).all()
    assert influence(leaking, inputs, "k", 1).all()


def shuffled_step(rank: int, world: int) -> dict[str, Tensor]:
    """Outputs and gradients of this process's rows of a batch of 16 in four groups, BatchNorm in training mode."""
    torch.manual_seed(0)
    task = create("moco", {"image": NormedImage()}, queue=64, groups=4).train()
    with torch.no_grad():  # keys by another network than queries
        for parameter in task.teacher.parameters():
            parameter.mul_(1.1)
    rows = 16 // world
    own = {key: value[rank * rows : (rank + 1) * rows] for key, value in tiny_batch(16).items()}
    inputs = task.transform(own, Draws(0, 0, rows, share=rank, shares=world))
    outputs = task.predict(inputs)
    task.loss(outputs, inputs)["loss"].backward()
    learned = [parameter.grad for parameter in task.parameters() if parameter.grad is not None]
    gradient = average(torch.cat([value.flatten() for value in learned]))
    return {"gradient": gradient, **{key: gather(value.detach()) for key, value in outputs.items()}}


def one_of(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    results = shuffled_step(rank, world)
    if rank == 0:
        torch.save(results, f"{folder}/results.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.long
@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.long)])
def test_processes_make_the_groups_of_one_without_synchronized_statistics(world, processes, tmp_path):
    processes(one_of, (world, str(tmp_path)), world)
    found, expected = torch.load(tmp_path / "results.pt"), shuffled_step(0, 1)
    assert found.keys() == expected.keys() == {"gradient", "q", "k"}
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-9, atol=1e-12)


def test_its_statistics_are_synchronized_in_v3_alone():
    assert create("moco", tiny_encoders(), queue=8).local_norms
    assert not create("moco", tiny_encoders(), form="v3", hidden=8).local_norms
    tasks = {"search": {"name": "moco", "queue": 16}, "turn": {"name": "rotation"}}
    assert create("combine", {"image": TinyImage()}, tasks=tasks).local_norms


def test_groups_are_for_batch_norm_alone_and_hold_two_rows():
    without = create("moco", tiny_encoders(), queue=8)
    assert without.groups == 1
    assert "place" not in without.transform(tiny_batch(2), Draws(0, 0, 2))
    task = create("moco", {"image": NormedImage()}, queue=64).train()
    sizes: list[int] = []
    task.encoder("image").register_forward_hook(lambda module, given, result: sizes.append(len(given[0])))
    inputs = task.transform(tiny_batch(11), Draws(0, 0, 11))
    task.predict(inputs)
    assert sizes == [3, 2, 2, 2, 2]
    for module in task.modules():  # without their statistics groups leave no trace, and rows come back in their order
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    outputs = task.predict(inputs)
    alone = [task.predict({key: value[i : i + 1] for key, value in inputs.items()}) for i in range(11)]
    for key in ("q", "k"):
        torch.testing.assert_close(outputs[key], torch.cat([one[key] for one in alone]))


VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}


@pytest.mark.parametrize(
    ("model", "arguments", "published"),
    [
        ("timm/vit_tiny_patch16_224", VIT, (0.2, 3, True, 0.08)),
        ("timm/test_resnet", {}, (1.0, 2, False, 0.2)),
    ],
)
def test_v3_as_published_for_transformers_and_for_convolutional_networks(model, arguments, published):
    net = create_encoder(model, modality="image", **arguments)
    task = create("moco", {"image": net}, form="v3", hidden=24)
    linear = [m for m in task.projection if isinstance(m, nn.Linear)]
    last = task.prediction[-1]
    smallest = {view.area[0] for view in task.views.settings}
    assert (task.temperature, len(linear), isinstance(last, nn.BatchNorm1d), *smallest) == published
    assert [(v.blur, v.solarize) for v in task.views.settings] == [(1.0, 0.0), (0.1, 0.2)]
    assert isinstance(task.projection[-1], nn.BatchNorm1d)
    assert not task.projection[-1].affine
    frozen = {name for name, p in net.named_parameters() if not p.requires_grad}
    conv = {"backbone.net.patch_embed.proj.weight", "backbone.net.patch_embed.proj.bias"}
    assert frozen == (conv if "vit" in model else set())
    free = create_encoder(model, modality="image", **arguments)
    create("moco", {"image": free}, form="v3", hidden=24, freeze_patch_embedding=False)
    assert all(p.requires_grad for p in free.parameters())


def test_its_encoder_has_one_name_in_a_combination():
    tasks = {"search": {"name": "moco", "queue": 16}, "turn": {"name": "rotation"}}
    task = create("combine", {"image": TinyImage()}, tasks=tasks).train()
    names = [name for name in task.state_dict() if name.endswith("first.weight")]
    assert sorted(names) == ["encoders.image.first.weight", "tasks.search.teacher.encoder.first.weight"]
    task(task.transform(tiny_batch(4), Draws(0, 0, 4)))["loss"].backward()
    task.after_step(0.5)
    assert int(task.get_buffer("tasks.search.queue.pointer")) == 4


def test_preview_finds_the_nearest_key():
    task = create("moco", tiny_encoders(), queue=8)
    inputs = task.transform(tiny_batch(3), Draws(0, 0, 3))
    query, key, nearest = task.preview(inputs, {"q": torch.eye(3)[:, None], "k": torch.eye(3)[[1, 0, 2]][:, None]})
    assert query.cells[0].shape == (3, 12, 12)
    assert torch.equal(nearest.cells[0], key.cells[1])
    assert torch.equal(nearest.cells[2], key.cells[2])
    assert nearest.right == [False, False, True]


def test_refuses_other_modalities():
    with pytest.raises(RecipeError, match="reads text"):
        create("moco", tiny_encoders(), encoder="text")
