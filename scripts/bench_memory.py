"""Memory of the contrastive losses as the batch grows, against open_clip's, on one process; a table of docs/results.md.

    python scripts/bench_memory.py

Counted are the bytes of all tensors that are alive, embeddings included (float32, 512 wide, two a row): `held` after
the forward pass, which is what waits for the backward pass, and at the `peak` of both. Checkpointed parts hide from
`torch.autograd.graph.saved_tensors_hooks`; a tensor that is alive does not. What an operation allocates and frees
within itself is not seen. open_clip 3.3.0 has no chunks in its losses; its main branch has them for SigLIP, without
recompute.
"""

from __future__ import annotations

import argparse
import weakref
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import torch
import torch.nn.functional as F
from tables import write_tables
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mmssl.ops.pairs import info_nce, sigmoid_pairs

ROWS, WIDTH, CHUNK = (512, 1024, 2048, 4096, 8192), 512, 256
Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class Alive(TorchDispatchMode):
    """Bytes of the storages that operations made and that still exist, and the most there were."""

    def __init__(self) -> None:
        super().__init__()
        self.known: set[int] = set()
        self.bytes = self.peak = 0

    def see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self.known:
            return
        self.known.add(key)
        self.bytes += size
        self.peak = max(self.peak, self.bytes)
        weakref.finalize(storage, self.forget, key, size)

    def forget(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.bytes -= size

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operation(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self.see(value)
        return result


def measure(loss: Loss, rows: int) -> tuple[float, float]:
    """MiB held between the passes, and at the peak."""
    torch.manual_seed(0)
    a, b = (F.normalize(torch.randn(rows, WIDTH), dim=-1).requires_grad_() for _ in range(2))
    scale, bias = (torch.tensor(value, requires_grad=True) for value in (10.0, -10.0))
    with Alive() as alive:
        for embedding in (a, b):
            alive.see(embedding)
        value = loss(a, b, scale, bias)
        held = alive.bytes
        value.backward()
    return held / 2**20, alive.peak / 2**20


def losses() -> dict[str, Loss]:
    """Name -> loss; ours beside theirs."""
    from open_clip.loss import ClipLoss, SigLipLoss  # `Alive` is asked for where there is no open_clip, too

    return {
        "open_clip `ClipLoss`": lambda a, b, scale, bias: ClipLoss()(a, b, scale),
        "`clip`": lambda a, b, scale, bias: info_nce(a, b, scale)[0],
        f"`clip`, chunk {CHUNK}": lambda a, b, scale, bias: info_nce(a, b, scale, chunk=CHUNK)[0],
        "open_clip `SigLipLoss`": lambda a, b, scale, bias: SigLipLoss()(a, b, scale, bias),
        "`siglip`": lambda a, b, scale, bias: sigmoid_pairs(a, b, scale, bias)[0],
        f"`siglip`, chunk {CHUNK}": lambda a, b, scale, bias: sigmoid_pairs(a, b, scale, bias, chunk=CHUNK)[0],
    }


def table() -> str:
    found = losses()
    lines = ["| B | " + " | ".join(found) + " |", "|---|" + "---|" * len(found)]
    held: dict[str, list[float]] = {}
    for rows in ROWS:
        cells = []
        for name, loss in found.items():
            between, peak = measure(loss, rows)
            held.setdefault(name, []).append(between)
            cells.append(f"{between:.1f} / {peak:.0f}")
        lines.append(f"| {rows} | " + " | ".join(cells) + " |")
        print(lines[-1], flush=True)
    for name, values in held.items():
        growth = values[-1] / values[-2]
        assert "chunk" not in name or growth < 2.05, f"{name}: twice the rows hold {growth:.2f} times as much"
    return "\n".join(lines)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.set_num_threads(1)
    print(f"MiB held / at the peak, open_clip {version('open-clip-torch')}")
    write_tables("memory", table())


if __name__ == "__main__":
    main()
