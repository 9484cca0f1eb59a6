"""BatchNorm on several processes is that of one with the whole batch, also where a norm has an activation inside."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import mmssl
from mmssl.modules.batch_norm import SynchronizedBatchNorm, synchronize
from mmssl.ops.gather import process_share

ROWS = 8
NORMS = {
    "rows": lambda: nn.BatchNorm1d(3),
    "places": lambda: nn.BatchNorm2d(3),
    "mean of all steps": lambda: nn.BatchNorm2d(3, momentum=None),
    "no scale": lambda: nn.BatchNorm2d(3, affine=False),
    "nothing kept": lambda: nn.BatchNorm2d(3, track_running_stats=False),
}


def _results(name: str) -> dict[str, Tensor]:
    """Output, gradients and buffers, of the global batch."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 3) if name == "rows" else nn.Conv2d(2, 3, 1), NORMS[name]()).double()
    rank, world = process_share()
    if world > 1:
        synchronize(net, torch.device("cpu"))
        assert isinstance(net[1], SynchronizedBatchNorm)
    x = torch.randn(ROWS, 2, dtype=torch.float64) if name == "rows" else torch.randn(ROWS, 2, 4, 5).double()
    weight = torch.linspace(-1, 2, ROWS, dtype=torch.float64).view(-1, *[1] * (x.ndim - 1))
    own = slice(rank * ROWS // world, (rank + 1) * ROWS // world)
    x = x[own].requires_grad_()
    for _ in range(2):
        output = net(x)
    (output.tanh() * weight[own]).sum().backward()
    rest = {key: value.grad for key, value in net.named_parameters() if value.grad is not None}
    net.eval()
    return {
        "output": output.detach(),
        "input": x.grad,
        "evaluated": net(x).detach(),
        **rest,
        **dict(net.named_buffers()),
    }


def _process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.save({name: _results(name) for name in NORMS}, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.long
def test_two_processes_normalize_as_one(tmp_path: Path, processes: Callable) -> None:
    processes(_process, (str(tmp_path),), 2)
    both = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for name in NORMS:
        for key, value in _results(name).items():
            parts = [one[name][key] for one in both]
            if key in ("output", "input", "evaluated"):
                found = torch.cat(parts)
            else:  # gradients are summed; buffers are the same on both
                found = sum(parts) if key.startswith("0.") or key in ("1.weight", "1.bias") else parts[0]
            torch.testing.assert_close(found, value, rtol=1e-10, atol=1e-12, msg=f"{name}: {key}")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_norms_that_have_an_activation_inside_keep_it(device: str) -> None:
    network = mmssl.encoder("timm/test_efficientnet", modality="image").eval()
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        before = network(images).pooled
        names = list(network.state_dict())
        synchronize(network, torch.device(device))
        torch.testing.assert_close(network(images).pooled, before)
    assert list(network.state_dict()) == names
