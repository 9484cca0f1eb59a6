"""Instance discrimination: both losses against loops, the bank, the constant, and which rows may be known by number."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.linear_model import LogisticRegression
from tiny_encoders import tiny_batch, tiny_encoders
from torch import Tensor

import mmssl
from mmssl import recipe
from mmssl.build import build, counted
from mmssl.errors import RecipeError
from mmssl.objectives import create
from mmssl.objectives.invariance.instance_discrimination import InstanceDiscrimination
from mmssl.ops.draws import Draws
from mmssl.training.step import ForwardPass, accumulated_backward

N, ROWS = 15, 4


def make(**hyper) -> InstanceDiscrimination:
    torch.manual_seed(0)
    small = {"rows": N, "width": 6, "negatives": 7, "temperature": 0.3}
    return create("instance_discrimination", tiny_encoders(), **(small | hyper))


def given(task: InstanceDiscrimination, rows: int = ROWS) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    batch = tiny_batch(rows) | {"id": torch.tensor([3, 14, 0, 7])}
    inputs = task.transform(batch, Draws(0, 0, rows))
    generator = torch.Generator().manual_seed(1)
    z = F.normalize(torch.randn(rows, 1, 6, generator=generator, dtype=torch.float64), dim=-1)
    return {"z": z.requires_grad_()}, inputs


@pytest.mark.usefixtures("double")
def test_softmax_is_over_all_rows():
    task = make(form="softmax")
    outputs, inputs = given(task)
    losses = task.loss(outputs, inputs)
    losses["loss"].backward()
    for z, gradient, row in zip(outputs["z"].detach()[:, 0], outputs["z"].grad[:, 0], inputs["row"], strict=True):
        share = (task.bank @ z / 0.3).exp()
        share = share / share.sum()
        pull = share @ task.bank - task.bank[row]
        torch.testing.assert_close(gradient, pull / 0.3 / ROWS)
    expected = [
        -(task.bank @ z / 0.3).log_softmax(0)[row] for z, row in zip(outputs["z"][:, 0], inputs["row"], strict=True)
    ]
    torch.testing.assert_close(losses["loss"], torch.stack(expected).mean())


@pytest.mark.usefixtures("double")
def test_nce_is_equations_5_to_7_with_the_constant_of_the_first_batch():
    task = make().train()
    outputs, inputs = given(task)
    losses = task.loss(outputs, inputs)
    losses["loss"].backward()
    assert inputs["noise"].shape == (ROWS, 7)
    again = outputs["z"].detach().requires_grad_()
    columns = torch.cat([inputs["row"][:, None], inputs["noise"]], 1)
    constant = N * float(
        torch.stack([(task.bank[j] @ again[i, 0].detach() / 0.3).exp() for i in range(ROWS) for j in columns[i]]).mean()
    )

    def posterior(z: Tensor, j: Tensor) -> Tensor:
        p = (task.bank[j] @ z / 0.3).exp() / constant
        return p / (p + 7 / N)

    terms, wins = [], []
    for z, row, noise in zip(again[:, 0], inputs["row"], inputs["noise"], strict=True):
        terms.append(-posterior(z, row).log() - sum((1 - posterior(z, j)).log() for j in noise))
        wins += [float(task.bank[row] @ z > task.bank[j] @ z) for j in noise if j != row]
    expected = torch.stack(terms).mean()
    expected.backward()
    torch.testing.assert_close(losses["loss"], expected)
    torch.testing.assert_close(outputs["z"].grad, again.grad)
    assert float(losses["ranking"]) == pytest.approx(sum(wins) / len(wins))
    task.after_step(0.1)
    assert float(task.partition) == pytest.approx(constant)
    task.bank.mul_(0.5)
    task.loss(outputs, inputs)
    task.after_step(0.2)
    assert float(task.partition) == pytest.approx(constant)  # it stays


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("form", ["nce", "softmax"])
def test_the_bank_moves_after_the_step_and_only_where_rows_were_seen(form):
    task = make(form=form, momentum=0.8).train()
    before = task.bank.clone()
    torch.testing.assert_close(before.norm(dim=1), torch.ones(N))
    outputs, inputs = given(task)
    first = task.loss(outputs, inputs)["loss"]
    torch.testing.assert_close(task.loss(outputs, inputs)["loss"], first)
    assert torch.equal(task.bank, before)
    task.after_step(0.1)
    row, z = inputs["row"], outputs["z"].detach()[:, 0]
    torch.testing.assert_close(task.bank[row], F.normalize(0.8 * before[row] + 0.2 * z, dim=1))
    others = [i for i in range(N) if i not in row.tolist()]
    assert torch.equal(task.bank[others], before[others])
    moved = task.bank.clone()
    task.eval().loss(outputs, inputs)
    task.after_step(0.2)
    assert torch.equal(task.bank, moved)


def test_micro_batches_move_the_bank_as_one_batch_does():
    banks = []
    for parts in (1, 4):
        task = make()
        inputs = task.transform(tiny_batch(8) | {"id": torch.arange(8)}, Draws(0, 0, 8))
        accumulated_backward(ForwardPass(task), inputs, parts)
        task.after_step(0.5)
        banks.append((task.bank, task.partition))
    assert banks[0][1] > 0
    torch.testing.assert_close(*banks)


@pytest.mark.parametrize("form", ["nce", "softmax"])
def test_a_bank_of_one_vector_is_chance(form):
    task = make(form=form).double()
    outputs, inputs = given(task)
    task.bank.copy_(task.bank[:1].clone().expand_as(task.bank))
    losses, chance = task.loss({"z": torch.zeros_like(outputs["z"])}, inputs), task.chance(ROWS)
    assert float(losses["loss"]) == pytest.approx(chance.loss, rel=1e-6)
    for key, level in chance.metrics.items():
        assert float(losses[key]) == pytest.approx(level)


def test_the_posterior_is_that_of_a_classifier_of_rows_and_noise():
    """Of P(i|v) = 1 / n, all that can be known is how many are noise: logistic regression without a feature."""
    chance = make(negatives=9).chance(1).loss
    fitted = LogisticRegression(C=1e9).fit([[0.0]] * 100, [1] * 10 + [0] * 90).predict_proba([[0.0]])[0, 1]
    assert chance == pytest.approx(-math.log(fitted) - 9 * math.log(1 - fitted), rel=1e-4)


def test_it_knows_rows_by_their_number_and_finds_how_many_there_are(tmp_path):
    for i in range(6):
        Image.new("RGB", (8, 8), (40 * i, 0, 0)).save(tmp_path / f"{i}.png")
    own = {"data.source": str(tmp_path), "data.limit": None, "training.batch_size": 4}
    loaded = recipe.load("instance_discrimination_toy", own)
    task, loader = build(loaded)
    assert task.bank.shape == (6, 32)
    batch = next(loader.batches(0, 1))
    assert torch.equal(task.transform(batch, Draws(0, 0, 4))["row"], batch["id"])
    combined = {"name": "combine", "tasks": {"who": loaded.objective, "turn": {"name": "rotation"}}}
    assert counted(loaded.model_copy(update={"objective": combined})).objective["tasks"]["who"]["rows"] == 6
    with pytest.raises(RecipeError, match=r"objective.rows = 5: .* has 6 rows; leave it out"):
        build(recipe.load("instance_discrimination_toy", own | {"objective.rows": 5}))
    with pytest.raises(RecipeError, match="rows should say how many"):
        create("instance_discrimination", tiny_encoders())


def test_a_stream_is_refused(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "rows.csv").write_text("image\na.png\na.png\n")
    stream = {"data.source": str(tmp_path / "rows.csv"), "data.streaming": True, "data.limit": None}
    with pytest.raises(RecipeError, match="is a stream, whose rows have no number that lasts"):
        build(recipe.load("instance_discrimination_toy", stream))


@pytest.mark.long
def test_a_run_says_how_many_rows_it_has_and_goes_on_from_there(tmp_path):
    short = {"training.steps": 4, "training.save_every": 2, "training.batch_size": 16, "training.schedule.warmup": 0}
    run = mmssl.run("instance_discrimination_toy", short, out=tmp_path / "run", quiet=True)
    assert recipe.load(tmp_path / "run" / "recipe.yaml").objective["rows"] == 64
    again = mmssl.load(tmp_path / "run")
    assert torch.equal(again.objective.bank, run.objective.bank)
    more = mmssl.run(
        "instance_discrimination_toy", short | {"training.steps": 6}, tmp_path / "run", resume=True, quiet=True
    )
    assert more.step == 6
    assert not torch.equal(more.objective.bank, again.objective.bank)


def test_preview_tells_the_place_of_the_own_vector():
    task = make()
    _, inputs = given(task)
    z = task.bank[inputs["row"]][:, None]
    view, nearest, place = task.preview(inputs, {"z": z[[1, 0, 2, 3]]})
    assert torch.equal(nearest.cells[0], view.cells[1])
    assert nearest.right == [False, False, True, True]
    assert place.cells[2] == "1 of 15"
    assert place.cells[0] != "1 of 15"


def test_refuses_other_modalities():
    with pytest.raises(RecipeError, match="reads text"):
        make(encoder="text")
