"""`training.sharded` with every toy recipe: losses are those of DDP, or the task says that it cannot."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml
from recipe_files import TOYS
from tiny import free_port

from mmssl.build import build
from mmssl.errors import RecipeError
from mmssl.recipe import load
from mmssl.training.launch import start_processes
from mmssl.training.loop import fit

STEPS, ROWS = 3, 8
REFUSED = {
    "coca_toy": "set objective.conflicts=0",
    "rotation_jigsaw_colorization_toy": "set objective.conflicts=0",
    "captioning_toy": "set objective.blind=0",
    "cross_modal_clustering_toy": "set training.sharded=false",
    "cross_modal_clustering_sinkhorn_toy": "set training.sharded=false",
    "cross_modal_distillation_toy": "set training.sharded=false",
    "deepcluster_toy": "set training.sharded=false",
}
"""What measures or copies whole weights, and the way out."""
TIMES = {"samples_per_second", "data_wait", "peak_memory_gib", "eta", "gradient_norm"}


def _records(path: Path, sharded: bool) -> list[dict[str, float]] | str:
    """What a short run in double precision logs, or why it cannot be."""
    tree: dict[str, Any] = yaml.safe_load(path.read_text("utf-8"))
    tree.pop("probe", None)
    tree.pop("probes", None)
    for data in [tree["data"]] if "source" in tree["data"] else tree["data"].values():
        data["limit"] = min(data.get("limit", 32), 32)
    tree["training"] |= {"steps": STEPS, "batch_size": ROWS, "log_every": 1, "precision": "fp64", "sharded": sharded}
    recipe = load(tree)
    torch.manual_seed(0)
    try:
        task, loader = build(recipe)
        history = fit(task, loader, recipe.training, quiet=True)
    except RecipeError as error:
        return str(error)
    kept = [{k: v for k, v in record.items() if k not in TIMES and not k.startswith("monitor/")} for record in history]
    return kept


def _compare(rank: int, port: int, path: str, out: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {"LOCAL_RANK": str(rank), "RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    start_processes()
    found = [_records(Path(path), sharded) for sharded in (False, True)]
    if rank == 0:
        Path(out).write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("path", TOYS, ids=lambda path: path.stem)
def test_steps_are_those_of_ddp_or_it_is_said_why_not(path: Path, tmp_path: Path, processes: Callable) -> None:
    processes(_compare, (free_port(), str(path), str(tmp_path / "found.json")), 2)
    whole, sharded = json.loads((tmp_path / "found.json").read_text())
    assert isinstance(whole, list), whole
    if path.stem in REFUSED:
        assert re.fullmatch(rf".* whole .*, and these are sharded; {REFUSED[path.stem]}", sharded)
        return
    assert len(sharded) == STEPS + 1
    for one, other in zip(sharded, whole, strict=True):
        assert one == pytest.approx(other, rel=1e-6, abs=1e-9)
