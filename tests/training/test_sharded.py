"""FSDP2: sharded parameters get the gradient of one process with the whole batch.

accelerate shards on accelerators only, so the sharding here is torch's own, on the CPU, as accelerate would call it.
"""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DistributedType
from tiny import Denoise, Pull, TinyEncoder, free_port
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import mmssl
from mmssl.errors import RecipeError
from mmssl.objectives.base import Objective
from mmssl.ops.draws import Draws
from mmssl.recipe import Training
from mmssl.training import launch
from mmssl.training.step import ForwardPass, accumulated_backward

ROWS = 8
TASKS: dict[str, type[Objective]] = {"denoise": Denoise, "pull": Pull}


def _task(name: str) -> Objective:
    torch.manual_seed(0)
    return TASKS[name]({"image": TinyEncoder()})


def _gradients(passes: ForwardPass, parts: int, rank: int = 0, world: int = 1) -> dict[str, Tensor]:
    images = torch.randint(0, 256, (ROWS, 3, 8, 8), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    local = ROWS // world
    own = {"image": images[rank * local : (rank + 1) * local]}
    task = passes.objective
    inputs = task.transform(own, Draws(0, 0, local, share=rank, shares=world))
    accumulated_backward(passes, inputs, parts)
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
    "training": {"steps": 4, "batch_size": 8, "log_every": 1},
    "probe": {"label": "shape", "limit": 24},
}


class _Sharding(Accelerator):
    """What accelerate does with its FSDP2 plugin, which it leaves out on the CPU."""

    def prepare(self, passes: Any, optimizer: Any) -> Any:  # type: ignore[override]
        before = dict(passes.named_parameters())
        fully_shard(passes, mesh=init_device_mesh("cpu", (2,))).collect_shards()
        after = {id(before[name]): parameter for name, parameter in passes.named_parameters()}
        for group in optimizer.param_groups:
            group["params"] = [after[id(parameter)] for parameter in group["params"]]
        return passes, AcceleratedOptimizer(optimizer)


def _run(rank: int, folder: str, port: int) -> None:
    torch.set_num_threads(1)
    os.environ |= {"LOCAL_RANK": str(rank), "RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    launch.Accelerator = _Sharding  # type: ignore[attr-defined, misc]
    finished = mmssl.run(RECIPE, out=f"{folder}/run", quiet=True)
    assert not any(isinstance(parameter, DTensor) for parameter in finished.objective.parameters())
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.long
def test_a_sharded_run_is_finished_and_read_back_whole(tmp_path, processes):
    processes(_run, (str(tmp_path), free_port()), 2)
    alone = mmssl.run(RECIPE, out=tmp_path / "alone", quiet=True)
    sharded = mmssl.load(tmp_path / "run")
    assert [r["loss"] for r in sharded.history] == pytest.approx([r["loss"] for r in alone.history], abs=1e-5)
    assert sharded.probes is not None
    assert (tmp_path / "run" / "report.html").exists()
    stored = dict(sharded.objective.named_parameters())
    for name, parameter in alone.objective.named_parameters():
        torch.testing.assert_close(stored[name], parameter, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    ("kind", "second", "every", "message"),
    [
        ("DEEPSPEED", False, 0, "DeepSpeed keeps weights .* use accelerate launch --use_fsdp --fsdp_version 2"),
        ("FSDP", False, 0, "FSDP of the first version .* use accelerate launch"),
        ("FSDP", True, 10, "set probe.every=0"),
    ],
)
def test_what_sharding_cannot_do_is_said_before_training(kind, second, every, message):
    launched = SimpleNamespace(distributed_type=DistributedType[kind], is_fsdp2=second)
    with pytest.raises(RecipeError, match=message):
        launch.check_sharding(launched, every)


def test_weights_are_cut_in_the_usual_order_of_memory():
    task = mmssl.objective("rotation", {"image": mmssl.encoder("timm/test_resnet", modality="image")})
    assert not all(parameter.is_contiguous() for parameter in task.parameters())
    handed = []

    def cut(passes: ForwardPass, optimizer: Any) -> tuple[Any, Any]:
        handed.extend(passes.parameters())
        return SimpleNamespace(collect_shards=lambda: None), optimizer

    accelerator: Any = SimpleNamespace(device=torch.device("cpu"), is_fsdp2=True, num_processes=1, prepare=cut)
    launch.prepare(task, Training(steps=1, batch_size=4), accelerator)
    assert handed
    assert all(parameter.is_contiguous() for parameter in handed)
