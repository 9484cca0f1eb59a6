"""FSDP2: sharded parameters get the gradient of one process with the whole batch, and a run may change its layout."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate.utils import DistributedType
from tiny import Denoise, Pull, TinyEncoder, free_port
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import mmssl
from mmssl.batch import Batch
from mmssl.build import build
from mmssl.errors import RecipeError
from mmssl.objectives.base import Objective
from mmssl.ops.draws import Draws
from mmssl.recipe import Training, load
from mmssl.training import checkpoint, launch
from mmssl.training.loop import fit
from mmssl.training.step import ForwardPass, accumulated_backward

ROWS = 8


class Logged(Pull):
    """It logs a view of a weight, whose memory FSDP2 gives back."""

    def loss(self, outputs: Batch, inputs: Batch) -> dict[str, Tensor]:
        return super().loss(outputs, inputs) | {"scale": self.scale[0]}


TASKS: dict[str, type[Objective]] = {"denoise": Denoise, "pull": Logged}


def _task(name: str) -> Objective:
    torch.manual_seed(0)
    return TASKS[name]({"image": TinyEncoder()})


def _gradients(passes: ForwardPass, parts: int, rank: int = 0, world: int = 1) -> dict[str, Tensor]:
    images = torch.randint(0, 256, (ROWS, 3, 8, 8), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    local = ROWS // world
    own = {"image": images[rank * local : (rank + 1) * local]}
    task = passes.objective
    inputs = task.transform(own, Draws(0, 0, local, share=rank, shares=world))
    logs = accumulated_backward(passes, inputs, parts)
    assert float(logs.get("scale", 1.0)) == 1.0
    gradients = {}
    for name, parameter in task.named_parameters():
        assert parameter.grad is not None, name
        assert isinstance(parameter.grad, DTensor) == (world > 1)
        gradients[name] = parameter.grad.full_tensor() if world > 1 else parameter.grad
    return gradients


def _process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    results = {}
    for name in TASKS:
        for parts in (1, 2):
            task = _task(name)
            fully_shard(task.encoder("image"), mesh=mesh)
            passes = fully_shard(ForwardPass(task), mesh=mesh)
            passes.collect_shards()
            results[name, parts] = _gradients(passes, parts, rank, 2)
    if rank == 0:
        torch.save(results, f"{folder}/results.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def sharded(tmp_path_factory, processes) -> dict[tuple[str, int], dict[str, Tensor]]:
    folder: Path = tmp_path_factory.mktemp("sharded")
    processes(_process, (str(folder),), 2)
    return torch.load(folder / "results.pt")


@pytest.mark.long
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("name", TASKS)
def test_sharded_gradients_are_those_of_one_process(name, parts, sharded):
    torch.set_default_dtype(torch.float64)
    try:
        expected = _gradients(ForwardPass(_task(name)), 1)
    finally:
        torch.set_default_dtype(torch.float32)
    found = sharded[name, parts]
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-10, atol=1e-12)


RECIPE = {
    "encoders": {"image": {"model": "timm/test_vit", "img_size": 32, "patch_size": 8}},
    "objective": {"name": "rotation"},
    "data": {"source": "toy", "limit": 32, "image": {"size": 32}},
    "training": {"steps": 4, "batch_size": 8, "log_every": 1, "schedule": {"name": "constant"}},
    "probe": {"label": "shape", "limit": 24},
}


def _join(rank: int, port: int) -> None:
    torch.set_num_threads(1)
    os.environ |= {"LOCAL_RANK": str(rank), "RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def _leave() -> None:
    dist.barrier()
    dist.destroy_process_group()


def _run(rank: int, folder: str, port: int) -> None:
    _join(rank, port)
    mmssl.run(RECIPE, SHARDED | {"training.steps": 2}, out=f"{folder}/run", quiet=True)
    finished = mmssl.run(RECIPE, SHARDED, out=f"{folder}/run", resume=True, quiet=True)
    assert not any(isinstance(parameter, DTensor) for parameter in finished.objective.parameters())
    _leave()


SHARDED = {"training.sharded": True, "training.clip": 1.0}


@pytest.mark.long
def test_a_sharded_run_is_resumed_finished_and_read_back_whole(tmp_path, processes):
    processes(_run, (str(tmp_path), free_port()), 2)
    alone = mmssl.run(RECIPE, {"training.clip": 1.0}, out=tmp_path / "alone", quiet=True)
    sharded = mmssl.load(tmp_path / "run")
    for key in ("loss", "gradient_norm"):
        found, expected = ([record[key] for record in run.history[1:]] for run in (sharded, alone))
        assert found == pytest.approx(expected, abs=1e-5)
    assert sharded.probes is not None
    assert (tmp_path / "run" / "report.html").exists()
    stored = dict(sharded.objective.named_parameters())
    for name, parameter in alone.objective.named_parameters():
        torch.testing.assert_close(stored[name], parameter, atol=1e-4, rtol=1e-3)
    # Its checkpoint holds whole tensors: one process goes on with it.
    longer = SHARDED | {"training.steps": 5}
    gone_on = mmssl.run(RECIPE, longer, out=tmp_path / "run", resume=True, quiet=True)
    assert gone_on.step == 5


TURNS = {
    "name": "combine",
    "pick": "one",
    "tasks": {"turn": {"name": "rotation"}, "patch": {"name": "masked_autoencoder", "decoder_width": 16}},
}


def _trained(objective: dict[str, Any], **training: Any) -> tuple[dict[str, Tensor], bool]:
    """Weights after training in double precision, and whether some step left a parameter without gradient."""
    settings = RECIPE["training"] | {"precision": "fp64", "optimizer": {"name": "sgd", "lr": 0.01}} | training
    recipe = load(RECIPE | {"objective": objective, "training": settings, "probe": None})
    task, loader = build(recipe)
    fit(task, loader, recipe.training, quiet=True)
    return {name: checkpoint.whole(value) for name, value in checkpoint.tensors(task).items()}, task.takes_turns


def _both(rank: int, folder: str, port: int) -> None:
    _join(rank, port)
    launch.start_processes()
    names = {"turns": TURNS, "simclr": {"name": "simclr"}, "moco": {"name": "moco", "queue": 32}}
    results = {
        (name, sharded): _trained(objective, sharded=sharded, accumulate=1 + (name == "simclr"), clip=1.0)
        for name, objective in names.items()
        for sharded in (False, True)
    }
    if rank == 0:
        torch.save(results, f"{folder}/results.pt")
    _leave()


@pytest.mark.long
def test_steps_are_those_of_ddp_also_of_tasks_that_take_turns(tmp_path, processes):
    processes(_both, (str(tmp_path), free_port()), 2)
    results = torch.load(tmp_path / "results.pt")
    assert results["turns", True][1]
    for name in ("turns", "simclr", "moco"):
        whole, sharded = results[name, False][0], results[name, True][0]
        assert whole.keys() == sharded.keys()
        for key, value in whole.items():
            torch.testing.assert_close(sharded[key], value, rtol=1e-9, atol=1e-12, msg=f"{name}: {key}")


@pytest.mark.parametrize(
    ("settings", "every", "message"),
    [
        ({}, 10, "set probe.every=0"),
        ({"precision": "fp16"}, 0, "training.sharded: the scaler of fp16 .*; use bf16"),
        ({"optimizer": {"name": "lars"}}, 0, "training.sharded: lars measures whole weights"),
    ],
)
def test_what_sharding_cannot_do_is_said_before_training(settings, every, message, monkeypatch):
    training = Training(sharded=True, **settings)
    launch.check_sharding(training, every)  # alone there is nothing to shard
    monkeypatch.setattr(launch, "process_share", lambda: (0, 2))
    with pytest.raises(RecipeError, match=message):
        launch.check_sharding(training, every)


@pytest.mark.parametrize("kind", ["DEEPSPEED", "FSDP"])
def test_a_launcher_that_splits_models_by_itself_is_refused(kind, monkeypatch):
    launched = SimpleNamespace(distributed_type=DistributedType[kind])
    monkeypatch.setattr(launch, "Accelerator", lambda **options: launched)
    with pytest.raises(RecipeError, match=rf"the launcher asks for {kind}.*set training.sharded=true"):
        launch.make_accelerator(Training(), None, False)


def test_weights_are_cut_in_the_usual_order_of_memory(monkeypatch):
    task = mmssl.objective("rotation", {"image": mmssl.encoder("timm/test_resnet", modality="image")})
    assert not all(parameter.is_contiguous() for parameter in task.parameters())
    handed: list[Tensor] = []
    monkeypatch.setattr(launch, "process_share", lambda: (0, 2))
    monkeypatch.setattr(launch, "shard", lambda passes, *rest: handed.extend(passes.parameters()))
    accelerator: Any = SimpleNamespace(
        device=torch.device("cpu"), num_processes=2, prepare=lambda optimizer: optimizer, print=print
    )
    launch.prepare(task, Training(sharded=True), accelerator)
    assert handed
    assert all(parameter.is_contiguous() for parameter in handed)
