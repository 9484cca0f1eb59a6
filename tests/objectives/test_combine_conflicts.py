"""Cosines between the gradients of tasks, and what tasks measure next to them."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tiny_encoders import tiny_batch, tiny_captioners, tiny_encoders
from torch import Tensor

from mmssl import recipe
from mmssl.build import build
from mmssl.errors import RecipeError
from mmssl.objectives import Objective, create
from mmssl.objectives.base import Step
from mmssl.ops.draws import Draws
from mmssl.training.loop import fit
from mmssl.training.step import task_gradients

FIGHT = {
    "turn": {"name": "rotation", "weight": 0.5},
    "pairs": {"name": "contrastive", "width": 7},
    "words": {"name": "masked_language", "weight": 3.0},
}
ROWS = 8


def test_conflicts_need_two_tasks_and_a_number_of_steps():
    with pytest.raises(RecipeError, match="between two tasks, and there is one"):
        create("combine", tiny_encoders(), tasks={"a": {"name": "rotation"}}, conflicts=5)
    with pytest.raises(RecipeError, match="conflicts = -1 should be int from 0"):
        create("combine", tiny_encoders(), tasks=FIGHT, conflicts=-1)


def _logged(task: Objective, inputs: dict[str, Tensor], parts: int = 1, number: int = 0) -> dict[str, Tensor]:
    """What a task says before a step."""
    numbers: dict[str, Tensor] = {}
    gradients = partial(task_gradients, task, parts=parts, reseed=torch.manual_seed)
    task.before_step(Step(number, data=list, prepare=lambda: inputs, gradients=gradients, log=numbers.update))
    return numbers


def _conflicts(rank: int = 0, world: int = 1, parts: int = 1) -> dict[str, Tensor]:
    torch.manual_seed(1)
    task = create("combine", tiny_encoders(), tasks=FIGHT, conflicts=1)
    local = ROWS // world
    own = {key: value[rank * local : (rank + 1) * local] for key, value in tiny_batch(ROWS).items()}
    inputs, random = task.transform(own, Draws(5, 3, local, share=rank, shares=world)), torch.get_rng_state()
    numbers = _logged(task, inputs, parts)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(parameter.grad is None for parameter in task.parameters())
    return numbers


def _process(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    torch.save([_conflicts(rank, world, parts) for parts in (1, 2)], f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.long
@pytest.mark.usefixtures("double")
def test_conflicts_are_cosines_of_the_gradients_of_each_alone_however_the_batch_is_cut(tmp_path: Path, processes):
    torch.manual_seed(1)
    task = create("combine", tiny_encoders(), tasks=FIGHT, conflicts=1)
    inputs = task.transform(tiny_batch(ROWS), Draws(5, 3, ROWS))
    alone = {}
    for name, given in FIGHT.items():
        task.zero_grad()
        (given.get("weight", 1.0) * task(inputs)[f"{name}/loss"]).backward()
        alone[name] = {
            modality: torch.cat([p.grad.flatten() for p in encoder.parameters()])
            for modality, encoder in task.encoders.items()
            if all(p.grad is not None for p in encoder.parameters())
        }
    cosine = torch.nn.functional.cosine_similarity
    norms = {name: torch.cat(list(own.values())).norm() for name, own in alone.items()}
    expected = {f"gradient_share/{name}": norm / sum(norms.values()) for name, norm in norms.items()}
    expected["conflict/turn_pairs"] = cosine(alone["turn"]["image"], alone["pairs"]["image"], 0)
    expected["conflict/pairs_words"] = cosine(alone["pairs"]["text"], alone["words"]["text"], 0)
    assert expected["conflict/turn_pairs"].abs() > 1e-3

    processes(_process, (2, str(tmp_path)), 2)
    cut = [
        _conflicts(),
        _conflicts(parts=4),
        *(part for rank in (0, 1) for part in torch.load(tmp_path / f"{rank}.pt")),
    ]
    for found in cut:
        assert found.keys() == expected.keys()  # rotation and masked language share no encoder
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, rtol=1e-10, atol=1e-12)


@pytest.mark.long
def test_a_run_that_measures_conflicts_has_the_same_bits_and_logs_them_when_due():
    def trained(conflicts: int) -> tuple[dict[str, Tensor], list[dict]]:
        # BatchNorm in the image encoder, dropout in the text encoder, cached accumulation.
        changes = {"objective.conflicts": conflicts, "training.steps": 5, "training.log_every": 4}
        loaded = recipe.load("rotation_contrastive_toy", changes | {"training.accumulate": 2})
        torch.manual_seed(0)
        objective, loader = build(loaded)
        history = fit(objective, loader, loaded.training, quiet=True)
        return objective.state_dict(), history

    (state, history), (plain_state, plain) = trained(2), trained(0)
    assert all(torch.equal(value, plain_state[key]) for key, value in state.items())
    assert [record["step"] for record in history] == [0, 2, 4, 5]
    assert [record["step"] for record in plain] == [0, 4, 5]
    assert ["conflict/turn_match" in record for record in history] == [False, True, True, False]
    for record in plain:
        (same,) = (other for other in history if other["step"] == record["step"])
        assert {key: same[key] for key in record if "loss" in key} == {
            key: value for key, value in record.items() if "loss" in key
        }


COCA = {
    "match": {"name": "contrastive", "width": 7, "views": {"area": None}},
    "caption": {"name": "captioning", "weight": 2.0},
}


CAPTION = {
    "match": {"name": "contrastive", "width": 7, "views": {"area": None}},
    "caption": {"name": "captioning", "weight": 2.0, "blind": 3},
}


def test_what_tasks_measure_themselves_is_logged_at_their_own_pace():
    task = create("combine", tiny_captioners(), tasks=CAPTION, conflicts=2)
    inputs = task.transform(tiny_batch(4), Draws(0, 0, 4))
    conflicts = {"conflict/match_caption", "gradient_share/match", "gradient_share/caption"}
    blind = {"caption/loss_over_blind"}
    logged = [set(_logged(task, inputs, number=number)) for number in range(6)]
    assert logged == [set(), conflicts, blind, conflicts, set(), blind | conflicts]


def test_conflicts_are_refused_at_the_first_step_where_weights_are_sharded():
    task = create("combine", tiny_encoders(), tasks=FIGHT, conflicts=100)
    with pytest.raises(RecipeError, match=r"set objective\.conflicts=0"):
        task.before_step(Step(0, data=list, sharded=True))
