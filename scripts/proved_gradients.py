"""The gradient table of docs/results.md: every pair loss on several processes, micro-batches and chunks, in float64.

    python scripts/proved_gradients.py

Each number is the largest error of any parameter's gradient, relative to that parameter's largest gradient, against one
process with the whole batch at once: 16 rows of tests/objectives/test_objective_gradients.py, whose cases and processes
these are. A new case of a task of pairs is a new line here.

In the same run open_clip's loss takes the place of ours, on the same networks and rows, with the steps of its training
script: cached features for `--accum-freq`, one backward pass a micro-batch, DistributedDataParallel. There a number is
what the gradient is multiplied by: that of the towers, then that of the scale (and the bias).
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "objectives"))

import test_objective_gradients as proofs  # noqa: E402 - is in the folder of its tiny encoders
from open_clip.loss import ClipLoss, SigLipLoss  # noqa: E402
from tables import write_tables  # noqa: E402

from mmssl.batch import Batch, split_rows  # noqa: E402
from mmssl.objectives import Objective  # noqa: E402
from mmssl.ops.draws import Draws  # noqa: E402
from mmssl.registry import components, find  # noqa: E402

FAMILY = "correspondence"

OTHERS = ("captioning", "masked_pair", "audio_visual_autoencoder")
TASKS = (
    *(name for name in components("objective") if find("objective", name).__module__.split(".")[-2] == FAMILY),
    *OTHERS,
)
"""The family of pairs, and those of another that read pairs as well."""
LAYOUTS = [(1, 1), (1, 4), (2, 1), (2, 4), (4, 1), (4, 4)]  # processes, micro-batches of each
CHUNKED = "_chunked"
# The case that a loss of open_clip is compared with, and its flags; the first ones are the defaults.
OPEN_CLIP: dict[str, tuple[str, Callable[..., nn.Module], dict[str, Any]]] = {
    "`ClipLoss`": ("clip", ClipLoss, {}),
    "`ClipLoss`, `--local-loss`": ("clip", ClipLoss, {"local_loss": True}),
    "`ClipLoss`, `--local-loss --gather-with-grad`": ("clip", ClipLoss, {"local_loss": True, "gather_with_grad": True}),
    "`SigLipLoss`": ("siglip", SigLipLoss, {}),
}


def names() -> list[str]:
    """Cases of pair losses, alone and combined, each before its chunked twin."""

    def about_pairs(name: str) -> bool:
        kind, hyper = proofs.CASES[name]
        return kind in TASKS or any(task["name"] in TASKS for task in hyper.get("tasks", {}).values())

    return sorted(filter(about_pairs, proofs.CASES), key=lambda name: name.removesuffix(CHUNKED))


class Towers(nn.Module):
    """What open_clip's model returns: unit features, the scale and where there is one the bias."""

    def __init__(self, objective: Objective) -> None:
        super().__init__()
        self.objective = objective

    def forward(self, inputs: Batch) -> dict[str, Tensor]:
        objective: Any = self.objective
        outputs = objective.predict(inputs)
        found = {"image_features": outputs["a"], "text_features": outputs["b"]}
        found["logit_scale"] = objective.logit_scale[0].exp()
        if objective.form == "siglip":
            found["logit_bias"] = objective.logit_bias[0]
        return found


def of_open_clip(label: str, parts: int, rank: int = 0, world: int = 1) -> dict[str, Tensor]:
    """The gradient that a step of its training script leaves."""
    name, kind, flags = OPEN_CLIP[label]
    loss = kind(rank=rank, world_size=world, **flags)
    objective, batch = proofs.case(name)
    local = proofs.ROWS // world
    own = {key: value[rank * local : (rank + 1) * local] for key, value in batch.items()}
    inputs = objective.transform(own, Draws(proofs.SEED, proofs.STEP, local, share=rank, shares=world))
    model: nn.Module = Towers(objective)
    if world > 1:
        model = DistributedDataParallel(model)
    micro_batches = split_rows(inputs, parts)
    with torch.no_grad():
        cached = [model(micro_batch) for micro_batch in micro_batches]
    for i, micro_batch in enumerate(micro_batches):
        found = model(micro_batch)
        for key in ("image_features", "text_features"):
            found[key] = torch.cat([found[key] if i == j else other[key] for j, other in enumerate(cached)])
        loss(**found).backward()
    return {f"gradient of {key}": p.grad for key, p in objective.named_parameters() if p.grad is not None}


def process(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store{world}", rank=rank, world_size=world)
    layouts = [parts for number, parts in LAYOUTS if number == world]
    ours = {(name, world, parts): proofs.gradients(name, parts, rank, world) for name in names() for parts in layouts}
    theirs = {(label, world, p): of_open_clip(label, p, rank, world) for label in OPEN_CLIP for p in layouts}
    if rank == 0:
        torch.save(ours | theirs, f"{folder}/{world}.pt")
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


def measure() -> dict[tuple[str, int, int], dict[str, Tensor]]:
    """(name of a case or label of open_clip's, processes, micro-batches) -> the gradient of each parameter."""
    multiprocessing.set_forkserver_preload(["torch.distributed", "test_objective_gradients"])
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for world in sorted({world for world, _ in LAYOUTS}):
            torch.multiprocessing.start_processes(process, (world, folder), nprocs=world, start_method="forkserver")
            found |= torch.load(f"{folder}/{world}.pt")
    return {key: {k: v for k, v in one.items() if k.startswith("gradient of ")} for key, one in found.items()}


def error(found: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    """Largest over the parameters."""
    assert found.keys() == exact.keys()
    return max(((found[key] - value).abs().max() / value.abs().max()).item() for key, value in exact.items())


def factor(found: dict[str, Tensor], exact: dict[str, Tensor]) -> str:
    """What the gradient of the towers and that of the scale (and the bias) are multiplied by."""
    cells = []
    for keys in ([key for key in exact if "logit_" not in key], [key for key in exact if "logit_" in key]):
        mine, true = (torch.cat([side[key].flatten() for key in keys]) for side in (found, exact))
        times = (mine @ true / (true @ true)).item()
        turned = (mine - times * true).norm() / mine.norm()
        cells.append(f"{times:.4g}" if turned < 1e-9 else f"turned by {turned.asin().rad2deg():.0f}°")
    text = " / ".join(cells)
    return text if text == "1 / 1" else f"**{text}**"


def table() -> str:
    found = measure()
    header = " | ".join(f"{world} x {parts}" for world, parts in LAYOUTS)
    lines = [f"| processes x micro-batches: largest error | {header} |", "|---|" + "---|" * len(LAYOUTS)]
    worst = 0.0
    for name in names():
        plain = name.removesuffix(CHUNKED)
        exact = found[plain, 1, 1]
        errors = [error(found[name, *layout], exact) for layout in LAYOUTS]
        worst = max(worst, *errors)
        tasks = [task["name"] for task in proofs.CASES[plain][1].get("tasks", {}).values()]
        label = f"`{plain}`" + (f": {' + '.join(tasks)}" if tasks else "") + (", chunked" if name != plain else "")
        lines.append(f"| {label} | " + " | ".join(f"{e:.0e}" if e else "0" for e in errors) + " |")
    assert worst < 1e-9, f"a gradient is off by {worst:.1e}"
    lines += ["", f"| open_clip {version('open-clip-torch')}: towers / scale, times the true gradient | {header} |"]
    lines.append("|---|" + "---|" * len(LAYOUTS))
    for label, (name, _, flags) in OPEN_CLIP.items():
        cells = [factor(found[label, *layout], found[name, 1, 1]) for layout in LAYOUTS]
        lines.append(f"| {label}{'' if flags else ' (default flags)'} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    write_tables("gradients", table())


if __name__ == "__main__":
    main()
