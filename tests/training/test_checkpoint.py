"""Checkpoints: every tensor once, errors that name what does not fit, sharded weights stored whole."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from tiny import Pull, free_port, make
from torch import nn

from mmssl.errors import RunError
from mmssl.recipe import Optimizer
from mmssl.training import checkpoint
from mmssl.training.optim import make_optimizer


def trained(module: nn.Module) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        sum(p.square().sum() for p in module.parameters()).backward()
        optimizer.step()
    return optimizer


def test_shared_modules_are_stored_once() -> None:
    shared = nn.Linear(2, 2)
    module = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared, nn.BatchNorm1d(2))})
    names = checkpoint.tensors(module).keys()
    assert "a.weight" in names
    assert not any(name.startswith("b.0") for name in names)
    assert "b.1.running_mean" in names


def test_optimizer_round_trip(tmp_path: Path) -> None:
    task = make(Pull)
    optimizer = trained(task)
    checkpoint.save(tmp_path, task, optimizer, {"step": 2}, main=True)
    other = make(Pull, seed=5)
    again = torch.optim.AdamW(other.parameters(), lr=0.1)
    last = checkpoint.newest(tmp_path)
    checkpoint.load_weights(other, last / checkpoint.WEIGHTS)
    checkpoint.load_optimizer(other, again, last)
    for (name, a), b in zip(task.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name
        for key, value in optimizer.state[a].items():
            assert torch.equal(value, again.state[b][key]), (name, key)


@pytest.mark.parametrize("name", ["adamw", "sgd", "lars", "lamb"])
def test_a_restored_optimizer_goes_on_with_the_same_bits(tmp_path: Path, name: str) -> None:
    """Of weights in any order of memory: a fused optimizer pairs moments with weights by their places in memory."""

    def build() -> nn.Module:
        module = nn.Conv2d(5, 3, 3).to(memory_format=torch.channels_last)
        module.scale = nn.Parameter(torch.tensor(2.0))
        return module

    def train(module: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            optimizer.zero_grad()
            x = torch.randn(2, 5, 4, 4, generator=torch.Generator().manual_seed(step))
            (module(x) * module.scale).square().sum().backward()
            optimizer.step()

    straight, resumed = (build() for _ in range(2))
    settings = Optimizer(name=name, lr=0.01)
    optimizer = make_optimizer(straight, settings)
    train(straight, optimizer, range(3))
    checkpoint.save(tmp_path, straight, optimizer, {"step": 3}, main=True)
    train(straight, optimizer, range(3, 5))
    again = make_optimizer(resumed, settings)
    last = checkpoint.newest(tmp_path)
    checkpoint.load_weights(resumed, last / checkpoint.WEIGHTS)
    checkpoint.load_optimizer(resumed, again, last)
    train(resumed, again, range(3, 5))
    for (key, a), b in zip(straight.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b), key


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    task = make(Pull)
    checkpoint.save(tmp_path, task, trained(task), {"step": 2}, main=True)
    path = tmp_path / checkpoint.WEIGHTS
    with pytest.raises(RunError, match=r"mean has shape \(8,\), the recipe's is \(4,\)|shape"):
        checkpoint.load_weights(make(Pull, dim=4), path)
    with pytest.raises(RunError, match="tensors missing"):
        checkpoint.load_weights(nn.Linear(2, 2), path)
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(RunError, match="not a readable safetensors file"):
        checkpoint.load_weights(task, path)


@pytest.mark.parametrize(("key", "shape"), [("exp_avg", (1,)), ("exp_avg", (3, 7)), ("step", (2,))])
def test_moments_of_another_shape_are_named(tmp_path: Path, key: str, shape: tuple[int, ...]) -> None:
    task = make(Pull)
    checkpoint.save(tmp_path, task, trained(task), {"step": 2}, main=True)
    last = checkpoint.newest(tmp_path)
    stored = load_file(last / "optimizer.safetensors")
    entry = next(name for name in stored if name.endswith(f":{key}"))
    save_file(stored | {entry: torch.zeros(shape)}, last / "optimizer.safetensors")
    again = torch.optim.AdamW(task.parameters(), lr=0.1)
    with pytest.raises(RunError, match=re.escape(f"{entry} has shape {shape}, the recipe's is (")):
        checkpoint.load_optimizer(task, again, last)


def test_a_half_written_checkpoint_is_passed_over_and_removed(tmp_path: Path) -> None:
    task = make(Pull)
    optimizer = trained(task)
    checkpoint.save(tmp_path, task, optimizer, {"step": 2}, main=True)
    (tmp_path / "state" / ".writing_step_00000003").mkdir()
    assert checkpoint.newest(tmp_path).name == "step_00000002"
    checkpoint.save(tmp_path, task, optimizer, {"step": 4}, main=True)
    assert [p.name for p in (tmp_path / "state").iterdir()] == ["step_00000004"]


def _sharded(rank: int, port: int, folder: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    task = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    checkpoint.load_weights(task, Path(folder) / "start.safetensors")
    fully_shard(task, mesh=mesh)
    optimizer = torch.optim.AdamW(task.parameters(), lr=0.1)
    x = torch.linspace(-1, 1, 24).reshape(4, 6)
    for _ in range(2):
        optimizer.zero_grad()
        task(x[rank * 2 : rank * 2 + 2]).square().mean().backward()
        optimizer.step()
    checkpoint.save(Path(folder), task, optimizer, {"step": 2}, main=rank == 0)
    dist.barrier()
    last = checkpoint.newest(Path(folder))
    checkpoint.load_weights(task, last / checkpoint.WEIGHTS)
    checkpoint.load_optimizer(task, optimizer, last)
    checkpoint.save(Path(folder) / "again", task, optimizer, {"step": 2}, main=rank == 0)
    dist.destroy_process_group()


def test_what_a_kill_between_renaming_and_publishing_left_is_made_good(tmp_path: Path) -> None:
    task = make(Pull)
    checkpoint.save(tmp_path, task, trained(task), {"step": 2}, main=True)
    stale = (tmp_path / checkpoint.WEIGHTS).read_bytes()
    checkpoint.save(tmp_path, task, trained(task), {"step": 4}, main=True)
    new = (tmp_path / checkpoint.WEIGHTS).read_bytes()
    (tmp_path / checkpoint.WEIGHTS).unlink()
    (tmp_path / checkpoint.WEIGHTS).write_bytes(stale)  # of step 2, as its name still said
    (tmp_path / "state" / "step_00000002").mkdir()
    (tmp_path / "state" / ".writing_step_00000006").mkdir()
    checkpoint.settle(tmp_path)
    assert stale != new == (tmp_path / checkpoint.WEIGHTS).read_bytes()
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["step_00000004"]


@pytest.mark.long
def test_sharded_weights_are_stored_whole(tmp_path: Path, processes: Callable) -> None:
    """FSDP2 on two processes saves what one process would have, and reads it back into shards."""
    from safetensors.torch import save_file

    torch.manual_seed(0)
    task = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    save_file(task.state_dict(), tmp_path / "start.safetensors")
    processes(_sharded, (free_port(), str(tmp_path)), 2)
    optimizer = torch.optim.AdamW(task.parameters(), lr=0.1)
    x = torch.linspace(-1, 1, 24).reshape(4, 6)
    for _ in range(2):
        optimizer.zero_grad()
        task(x).square().mean().backward()
        optimizer.step()
    stored = load_file(tmp_path / checkpoint.WEIGHTS)
    for name, value in task.state_dict().items():
        assert torch.allclose(stored[name], value, atol=1e-6), name
    for file in ("model.safetensors", "optimizer.safetensors"):
        once = load_file(tmp_path / "state" / "step_00000002" / file)
        twice = load_file(tmp_path / "again" / "state" / "step_00000002" / file)
        assert once.keys() == twice.keys()
        assert all(torch.equal(once[name], twice[name]) for name in once)
