"""What only a GPU can show; skipped without one, and run on the CPU as far as it goes by MMSSL_GPU_TESTS=cpu."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.distributed.tensor import DTensor
from torch.nn.modules._functions import SyncBatchNorm

from mmssl.batch import Batch, to_device
from mmssl.build import build
from mmssl.data.loader import Loader
from mmssl.objectives.base import Objective
from mmssl.ops.draws import Draws
from mmssl.recipe import Training, load
from mmssl.training import launch, loop
from mmssl.training.loop import fit
from mmssl.training.step import ForwardPass

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        DEVICE.type == "cpu" and os.environ.get("MMSSL_GPU_TESTS") != "cpu",
        reason="there is no GPU; MMSSL_GPU_TESTS=cpu runs what can be run without one",
    ),
]
needs_gpu = pytest.mark.skipif(DEVICE.type == "cpu", reason="there is no GPU")

# Networks of torchvision and transformers, and the toy source: nothing here asks for timm, open_clip, datasets or av.
CNN = {"model": "torchvision/resnet18"}
VIT = {"model": "transformers/vit", "image_size": 32, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 3}
VIT |= {"num_attention_heads": 2, "intermediate_size": 64, "hidden_dropout_prob": 0.1}


def made(task: str, encoder: dict[str, Any], **training: Any) -> tuple[Objective, Loader, Training]:
    settings = {"steps": 6, "batch_size": 16, "log_every": 100, "schedule": {"name": "constant"}} | training
    data = {"source": "toy", "limit": 32, "image": {"size": 32}}
    recipe = load({"encoders": {"image": encoder}, "objective": {"name": task}, "data": data, "training": settings})
    return (*build(recipe), recipe.training)


def trained(task: str, encoder: dict[str, Any], **training: Any) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    objective, loader, settings = made(task, encoder, **training)
    history = fit(objective, loader, settings, quiet=True)
    return {name: value.cpu() for name, value in objective.state_dict().items()}, history


@pytest.fixture
def deterministic(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp16", marks=needs_gpu)])
@pytest.mark.parametrize("encoder", [CNN, VIT], ids=["cnn", "vit"])
def test_half_precision_starts_at_the_loss_of_single_precision_and_stays_finite(
    encoder: dict[str, Any], precision: str
) -> None:
    weights, half = trained("rotation", encoder, precision=precision)
    _, single = trained("rotation", encoder)
    assert half[0]["loss"] == pytest.approx(single[0]["loss"], rel=0.05)
    assert all(value.isfinite().all() for value in weights.values())
    assert all(value.dtype != torch.float16 for value in weights.values())


@pytest.mark.parametrize("encoder", [CNN, VIT], ids=["cnn", "vit"])
def test_blocks_that_are_computed_anew_give_the_same_bits(encoder: dict[str, Any], deterministic: None) -> None:
    plain, _ = trained("rotation", encoder)
    again, _ = trained("rotation", encoder, checkpointing=True)
    assert all(torch.equal(value, again[name]) for name, value in plain.items())


def test_a_resumed_run_has_the_bits_of_one_that_never_stopped(tmp_path: Any, deterministic: None) -> None:
    whole, _ = trained("simclr", VIT, steps=4)
    for steps, resume in ((2, False), (4, True)):
        objective, loader, settings = made("simclr", VIT, steps=steps)
        fit(objective, loader, settings, tmp_path, resume=resume, quiet=True)
    found = {name: value.cpu() for name, value in objective.state_dict().items()}
    assert all(torch.equal(value, found[name]) for name, value in whole.items())


def test_views_are_those_of_the_cpu() -> None:
    objective, loader, _ = made("simclr", VIT)
    batch = next(loader.batches(0, 1))
    draws = {device: Draws(0, 0, len(batch["id"]), device=device) for device in (torch.device("cpu"), DEVICE)}
    views = [objective.transform(to_device(batch, device), own) for device, own in draws.items()]
    for key, value in views[0].items():
        torch.testing.assert_close(views[-1][key].cpu(), value, atol=1e-4, rtol=1e-4)


class Watched:
    """Batches of a loader; from the third step to the last but one, what waits for the device is an error."""

    def __init__(self, loader: Loader, steps: int) -> None:
        self.loader, self.steps, self.watched = loader, steps, 0

    def batches(self, start: int, stop: int) -> Iterator[Batch]:
        for step, batch in enumerate(self.loader.batches(start, stop), start):
            if stop == self.steps and DEVICE.type == "cuda":
                torch.cuda.set_sync_debug_mode("error" if 2 <= step < self.steps - 1 else "default")
            self.watched += stop == self.steps
            yield batch


@pytest.mark.parametrize("task", ["rotation", "simclr", "byol", "masked_autoencoder"])
def test_a_step_that_does_not_log_waits_for_nothing(task: str) -> None:
    if task == "masked_autoencoder":
        pytest.importorskip("timm", reason="its decoder is of timm")
    objective, loader, settings = made(task, VIT, steps=8)
    watched = Watched(loader, settings.steps)
    fit(objective, watched, settings, quiet=True)
    assert watched.watched == settings.steps


def test_batches_arrive_whole_while_the_device_is_busy() -> None:
    batches = [{"image": torch.full((64, 3, 64, 64), i, dtype=torch.uint8)} for i in range(8)]
    busy = torch.randn(2048, 2048, device=DEVICE)
    sums = []
    for batch in batches:
        pinned = {key: value.pin_memory() for key, value in batch.items()} if DEVICE.type == "cuda" else batch
        busy = busy @ busy.T / 2048
        sums.append(to_device(pinned, DEVICE)["image"].long().sum())
    assert [int(value) for value in sums] == [i * 64 * 3 * 64 * 64 for i in range(8)]


@pytest.fixture
def alone(tmp_path: Any) -> Iterator[None]:
    """A group of one process, over NCCL where there is a card."""
    own = ("nccl", DEVICE.type) if DEVICE.type == "cuda" else ("gloo", "cpu")
    dist.init_process_group(own[0], init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("encoder", [CNN, VIT], ids=["cnn", "vit"])
def test_weights_that_are_sharded_over_one_card_take_the_same_steps(
    encoder: dict[str, Any], alone: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    # Of plain descent: AdamW takes the sign of a gradient that is all rounding for a direction.
    settled = {"steps": 4, "clip": 1.0, "optimizer": {"name": "sgd", "lr": 0.05}}
    objective, loader, settings = made("simclr", encoder, **settled)
    objective.to(memory_format=torch.contiguous_format)  # as weights are that are cut
    plain = fit(objective, loader, settings, quiet=True)
    for module in (launch, loop):
        monkeypatch.setattr(module, "is_sharded", lambda training: training.sharded)
    objective, loader, settings = made("simclr", encoder, sharded=True, **settled)
    sharded = fit(objective, loader, settings, tmp_path / "run", quiet=True)
    assert all(isinstance(parameter, DTensor) for parameter in objective.parameters())
    for one, other in zip(plain, sharded, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-3)


@needs_gpu
def test_synchronized_norms_on_one_card_are_those_of_batch_norm(alone: None) -> None:
    torch.manual_seed(0)
    for order in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(16, 8, 6, 6, device=DEVICE).contiguous(memory_format=order)
        plain, own = nn.BatchNorm2d(8).to(DEVICE), nn.BatchNorm2d(8).to(DEVICE)
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        expected = plain(a)
        # A module of this kind takes the short way where the group has one member; this is the long one.
        statistics = (own.running_mean, own.running_var, own.eps, own.momentum)
        found = SyncBatchNorm.apply(b, own.weight, own.bias, *statistics, dist.group.WORLD, 1)
        (expected**3).sum().backward()
        (found**3).sum().backward()
        torch.testing.assert_close(found, expected)
        for one, other in ((a.grad, b.grad), (plain.weight.grad, own.weight.grad), (plain.bias.grad, own.bias.grad)):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(plain.running_var, own.running_var)


def test_convolutions_and_norms_pass_maps_with_their_channels_last() -> None:
    objective, loader, settings = made("rotation", CNN, steps=2, precision="bf16")
    orders: list[bool] = []

    def look(module: nn.Module, given: Any, x: Tensor) -> None:
        orders.append(x.is_contiguous(memory_format=torch.channels_last))

    for module in objective.modules():
        if isinstance(module, nn.Conv2d | nn.BatchNorm2d):
            module.register_forward_hook(look)
    fit(objective, loader, settings, quiet=True)
    assert orders
    assert all(orders)


@pytest.mark.parametrize("encoder", [CNN, VIT], ids=["cnn", "vit"])
def test_the_compiled_pass_has_no_graph_break_and_is_not_compiled_again(
    encoder: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.reset()
    counters.clear()
    if DEVICE.type == "cpu":  # what is captured is the same, and generating code takes minutes
        monkeypatch.setattr(ForwardPass, "compile", lambda self: nn.Module.compile(self, backend="eager"))
    objective, loader, settings = made("simclr", encoder, compile=True, steps=8, precision="bf16")
    graphs: list[int] = []

    class Counted:
        def batches(self, start: int, stop: int) -> Iterator[Batch]:
            for batch in loader.batches(start, stop):
                graphs.append(counters["stats"]["unique_graphs"])
                yield batch

    fit(objective, Counted(), settings, quiet=True)
    assert not counters["graph_break"]
    assert graphs[2] == graphs[settings.steps - 1] > 0
    assert counters["stats"]["unique_graphs"] <= 2  # training, and the rows of the first step once more
