"""A run that is stopped and goes on with another number of processes, again and again, is the run of one process."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml
from lottery_runs import make_stream
from safetensors.torch import load_file
from tiny import free_port

import mmssl
from mmssl.errors import Interrupted
from mmssl.training import checkpoint
from mmssl.training.history import History

RECIPES = Path(mmssl.__file__).parent.parent / "recipes"
LEGS = ((1, 2), (2, 4), (4, 6), (1, 8))
"""Number of processes, and the step after which they are stopped."""
STEPS = LEGS[-1][1]
TASKS: dict[str, tuple[str, dict[str, Any]]] = {
    "negatives of all processes": ("invariance/simclr", {}),
    "a teacher, and BatchNorm in its heads": ("invariance/byol", {}),
    "a queue, and BatchNorm in groups of rows": ("invariance/moco", {"groups": 4}),
    "a stream with workers, two pictures of which are broken": ("correspondence/contrastive", {"width": 16}),
    "clips and their sound": ("correspondence/temporal_alignment", {}),
}
TIMES = {"samples_per_second", "data_wait", "peak_memory_gib", "eta"}
# In double precision sums of other orders differ by 1e-16 of what is summed, and Adam divides by its epsilon, 1e-8,
# where there is nothing but such a rest. A wrong row, draw or share would show in the first digits.
SAME = {"rtol": 1e-6, "atol": 1e-9}


def _tree(name: str, folder: Path) -> dict[str, Any]:
    recipe, changes = TASKS[name]
    tree: dict[str, Any] = yaml.safe_load((RECIPES / f"{recipe}_toy.yaml").read_text("utf-8"))
    tree["objective"] |= changes
    tree["data"]["limit"] = 32
    if "text" in tree["encoders"]:  # the masks of dropout are those of a layout
        tree["encoders"]["text"] |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    if "stream" in name:
        tree["data"] |= {"source": str(folder / "shards"), "streaming": True, "shuffle_buffer": 32, "max_bad": 0.5}
        del tree["data"]["limit"]
    training = {"steps": STEPS, "batch_size": 8, "precision": "fp64", "log_every": 1, "save_every": 100}
    tree["training"] = tree["training"] | training | {"workers": 2 if "workers" in name else 0}
    return tree


def _leg(rank: int, world: int, port: int, stop: int, folder: str, out: str) -> None:
    torch.set_num_threads(1)
    if world > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        os.environ |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    advance = History.advance

    def advance_and_stop(self: History, step: int) -> None:
        advance(self, step)
        if step == stop < STEPS and rank == world - 1:  # one is told, and all stop
            os.kill(os.getpid(), signal.SIGUSR1)

    History.advance = advance_and_stop  # type: ignore[method-assign]
    for number, name in enumerate(TASKS):
        with suppress(Interrupted):
            mmssl.run(_tree(name, Path(folder)), out=Path(folder, out, str(number)), resume=True, quiet=True)
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, processes: Callable) -> Path:
    """`moved` holds the runs that were stopped, `stayed` those that were not."""
    folder = tmp_path_factory.mktemp("elsewhere")
    make_stream(folder / "shards")
    for world, stop in LEGS:
        processes(_leg, (world, free_port(), stop, str(folder), "moved"), world)
    processes(_leg, (1, 0, STEPS, str(folder), "stayed"), 1)
    return folder


def _records(out: Path) -> list[dict[str, Any]]:
    lines = (out / "metrics.jsonl").read_text("utf-8").splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in TIMES} for line in lines]


@pytest.mark.slow
@pytest.mark.parametrize("name", TASKS)
def test_a_run_that_moves_between_layouts_is_the_same_run(name: str, folder: Path) -> None:
    number = str(list(TASKS).index(name))
    moved, stayed = folder / "moved" / number, folder / "stayed" / number
    machines = json.loads((moved / "machines.json").read_text("utf-8"))
    assert [machine["processes"] for machine in machines] == [world for world, _ in LEGS]
    found, expected = _records(moved), _records(stayed)
    assert [record["step"] for record in found] == [*range(STEPS + 1)]
    for one, other in zip(found, expected, strict=True):
        if other["step"] <= LEGS[0][1]:  # one process, and the same sums
            assert one == other
        whole = {key: value for key, value in other.items() if not _of_a_process(name, key)}
        assert {key: one[key] for key in whole} == pytest.approx(whole, rel=1e-6, abs=1e-9)
    for file in (checkpoint.WEIGHTS, checkpoint.OPTIMIZER):
        ours, theirs = (load_file(checkpoint.newest(out) / file) for out in (moved, stayed))
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            if not _of_a_process(name, key):
                torch.testing.assert_close(ours[key], value, **SAME, msg=f"{file} {key}")
    assert (moved / "data.json").read_text() == (stayed / "data.json").read_text()
    errors = [sorted((out / "errors.jsonl").read_text().splitlines()) for out in (moved, stayed) if "broken" in name]
    assert not errors or len(errors[0]) == 2
    assert not errors or errors[0] == errors[1]


def _of_a_process(name: str, key: str) -> bool:
    """Whether a value is of the rows of one process, as is documented of it."""
    groups = "groups" in name and ("running_" in key or "num_batches" in key or key.startswith("monitor/"))
    return groups or key.rpartition("/")[2] == "ranking"
