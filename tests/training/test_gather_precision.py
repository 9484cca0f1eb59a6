"""Features that travel in half precision: the gradient of one process but for rounding, and nothing else rounded."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from test_objective_gradients import ROWS, SEED, STEP, case
from tiny import MemoryLoader, Pull, free_port, make
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from mmssl.objectives.base import Step
from mmssl.ops.draws import Draws
from mmssl.ops.gather import gather, sent_as
from mmssl.recipe import Training
from mmssl.training.launch import start_processes
from mmssl.training.loop import fit
from mmssl.training.step import ForwardPass, accumulated_backward

# Pairs with the items' numbers, a loss of the global batch on every process, a queue of keys.
ROUNDED = ("unicl", "siglip_chunked", "barlow_twins_image", "moco")
# What they send in the loss are statistics: means of cosines, of codes, the mass of prototypes.
EXACT = ("lejepa", "wav2vec2", "swav_audio")
HALF, INT = torch.bfloat16, torch.int64


class Asking(Pull):
    """It notes what travels when it transforms and when it asks for its gradient before the step."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.sent: set[torch.dtype] = set()

    def transform(self, batch: dict[str, Tensor], draws: Draws) -> dict[str, Tensor]:
        inputs = super().transform(batch, draws)
        assert torch.equal(gather(inputs["views"])[draws.share * draws.rows :][: draws.rows], inputs["views"])
        return inputs

    def before_step(self, step: Step) -> None:
        inputs = step.inputs
        with Sent() as sent:
            step.gradients(self, inputs)
        self.sent |= sent.there


class Sent:
    """The dtypes of what reaches the collectives inside: of rows sent `there`, of rows' gradients that come `back`."""

    def __enter__(self) -> Sent:
        self.there: set[torch.dtype] = set()
        self.back: set[torch.dtype] = set()
        all_gather, all_reduce = dist.all_gather, dist.all_reduce

        def there(parts: list[Tensor], local: Tensor) -> None:
            self.there |= {local.dtype, *(part.dtype for part in parts)}
            all_gather(parts, local)

        def back(value: Tensor) -> None:
            self.back |= {value.dtype} if value.ndim > 1 else set()  # the others are logged sums
            all_reduce(value)

        self.patches = [patch.object(dist, "all_gather", there), patch.object(dist, "all_reduce", back)]
        for each in self.patches:
            each.start()
        return self

    def __exit__(self, *_: object) -> None:
        for each in self.patches:
            each.stop()


def _results(name: str, sent: torch.dtype | None, rank: int = 0, world: int = 1) -> dict[str, Any]:
    """Gradients, and on several processes what was sent, this process's loss and buffers."""
    task, batch = case(name)
    local = ROWS // world
    own = {key: value[rank * local : (rank + 1) * local] for key, value in batch.items()}
    inputs = task.transform(own, Draws(SEED, STEP, local, share=rank, shares=world))
    passes = ForwardPass(task, sent)
    with Sent() as record:
        losses = accumulated_backward(passes, inputs, wrapped=DistributedDataParallel(passes) if world > 1 else None)
    gradients = {key: value.grad for key, value in task.named_parameters() if value.grad is not None}
    rest = {"losses": losses, "buffers": dict(task.named_buffers())}
    return {"gradients": gradients, "there": record.there, "back": record.back, **rest}


def _fitted(precision: str) -> dict[str, Any]:
    """What a run sends where the recipe says so, and its weights."""
    task = make(Asking)
    training = {"steps": 3, "batch_size": 8, "accumulate": 2, "precision": "fp64", "gather_precision": precision}
    with Sent() as record:
        fit(task, MemoryLoader(), Training.model_validate(training), quiet=True)
    return {"there": record.there, "asked": task.sent, "weights": dict(task.named_parameters())}


def _process(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        **dict.fromkeys(("RANK", "LOCAL_RANK"), str(rank)),
        **dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), "2"),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    start_processes()
    results: dict[Any, Any] = {precision: _fitted(precision) for precision in ("full", "bf16")}
    torch.set_default_dtype(torch.float64)
    results |= {(name, sent): _results(name, sent, rank, 2) for name in ROUNDED + EXACT for sent in (None, HALF)}
    torch.save(results, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory, processes: Callable) -> list[dict[Any, Any]]:
    """Of each of two processes."""
    folder: Path = tmp_path_factory.mktemp("precision")
    processes(_process, (free_port(), str(folder)), 2)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


def _error(name: str, sent: torch.dtype | None, found: list[dict[Any, Any]]) -> float:
    """Of the whole gradient against that of one process, relative: single sums, such as the scale's, may cancel."""
    expected, gradients = _results(name, None)["gradients"], found[0][name, sent]["gradients"]
    assert gradients.keys() == expected.keys()
    wrong = torch.cat([(gradients[key] - value).flatten() for key, value in expected.items()])
    return float(wrong.norm() / torch.cat([value.flatten() for value in expected.values()]).norm())


@pytest.mark.long
@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("name", ROUNDED)
def test_gradients_are_those_of_one_process_but_for_rounding(name, found):
    assert _error(name, None, found) < 1e-10
    assert 1e-4 < _error(name, HALF, found) < 0.02


@pytest.mark.long
@pytest.mark.parametrize("name", ROUNDED)
def test_features_and_their_gradients_are_sent_in_half_precision(name, found):
    exact, half = found[0][name, None], found[0][name, HALF]
    assert exact["there"] - {INT} == {torch.float64}
    assert half["there"] - {INT} == {HALF}
    assert (INT in half["there"]) == (name == "unicl")  # numbers of items are never rounded
    comes_back = name != "moco"  # whose keys have no gradient
    assert (half["back"], exact["back"]) == (({HALF}, {torch.float64}) if comes_back else (set(), set()))


@pytest.mark.long
def test_every_process_computes_of_the_same_rows(found):
    """Of its own ones, too: else statistics of the global batch and queues would differ between processes."""
    first, second = (of["barlow_twins_image", HALF]["losses"]["diagonal"] for of in found)
    assert torch.equal(first, second)
    assert not torch.equal(first, found[0]["barlow_twins_image", None]["losses"]["diagonal"])
    queues = [{key: b for key, b in of["moco", HALF]["buffers"].items() if "queue" in key} for of in found]
    assert queues[0]
    for key, value in queues[0].items():
        assert torch.equal(value, queues[1][key]), key


@pytest.mark.long
@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("name", EXACT)
def test_statistics_are_never_rounded(name, found):
    assert _error(name, HALF, found) < 1e-10
    assert torch.float64 in found[0][name, HALF]["there"]


@pytest.mark.long
def test_the_recipe_decides_what_a_run_sends(found):
    full, half = found[0]["full"], found[0]["bf16"]
    assert HALF not in full["there"] | full["asked"]
    assert half["asked"] == {HALF}
    assert HALF in half["there"]
    for key, value in half["weights"].items():
        assert torch.equal(value, found[1]["bf16"]["weights"][key]), key
        assert not torch.equal(value, full["weights"][key]), key


def test_one_process_sends_nothing():
    x = torch.rand(3, 2)
    with sent_as(HALF):
        assert gather(x) is x
