"""Processes of one run that were not started alike, or of which one is lost: each ends with one sentence."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny import free_port

import mmssl
from mmssl.errors import RunError
from mmssl.objectives.transformation.rotation import Rotation


def _run(
    folder: Path, steps: int = 2, lr: float = 1e-3, out: str = "run", sharded: bool = False, **options: Any
) -> str:
    """What a process of a run says at its end."""
    recipe = {
        "encoders": {"image": {"model": "timm/test_resnet"}},
        "objective": {"name": "rotation"},
        "data": {"source": "$PICTURES", "image": {"size": 16}},
        "training": {"steps": steps, "batch_size": 4, "workers": 0, "sharded": sharded, "optimizer": {"lr": lr}},
    }
    try:
        mmssl.run(recipe, out=folder / out, quiet=True, **options)
    except RunError as error:
        return str(error)
    return "done"


def _process(rank: int, port: int, place: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {"LOCAL_RANK": str(rank), "RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    folder = Path(place)
    os.environ["PICTURES"] = str(folder / "many")
    said = [_run(folder, lr=1e-3 if rank else 1e-2)]
    os.environ["PICTURES"] = str(folder / ("few" if rank else "many"))
    said.append(_run(folder))
    os.environ["PICTURES"] = str(folder / "many")
    with warnings.catch_warnings(record=True) as warned:
        said.append(_run(folder, sharded=True))
    said.append(f"{sum('FSDP' in str(one.message) for one in warned)} warnings")
    said.append(_run(folder, steps=4, out="elsewhere" if rank else "run", resume=True))
    if rank:
        Rotation.transform = lambda *_: os._exit(0)  # type: ignore[assignment]
    said.append(_run(folder, steps=4, resume=True))
    (folder / "said").write_text("\n".join(said))


@pytest.mark.long
def test_processes_that_differ_or_are_lost_are_one_sentence(tmp_path: Path, processes: Callable[..., None]) -> None:
    for name, count in {"many": 8, "few": 7}.items():
        (tmp_path / name).mkdir()
        for n in range(count):
            Image.new("RGB", (16, 16), (n, 0, 0)).save(tmp_path / name / f"{n}.png")
    processes(_process, (free_port(), str(tmp_path)), 2)
    recipe, data, done, warned, resumed, lost = (tmp_path / "said").read_text().splitlines()
    assert recipe == (
        "process 1 has training.optimizer.lr = 0.001, and process 0 0.01; start all of them with the same line"
    )
    assert data.startswith("process 1 has data = 7 rows")
    assert data.endswith("all of them have to see the same files")
    assert (done, warned) == ("done", "0 warnings")
    assert resumed == (
        "process 1 has checkpoint = none, and process 0 step_00000002; --out has to be a folder that all of them see"
    )
    assert lost.startswith("another process has ended or is out of reach")
