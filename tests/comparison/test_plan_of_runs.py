"""Baselines of runs that are there: the network and the budget of most of them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

import mmssl
from mmssl import recipe as recipes
from mmssl.comparison import plan_of_runs
from mmssl.comparison.plan import Plan, cost_of_row
from mmssl.errors import DataError, RecipeError
from mmssl.recipe import Data, ImageDecode

ROWS = Data(source="toy", limit=32, image=ImageDecode(size=32))


def run(task: str = "rotation", model: str = "timm/test_resnet", steps: int = 40, batch: int = 16) -> SimpleNamespace:
    tree = {
        "encoders": {"image": {"model": model}},
        "objective": {"name": task},
        "data": {"source": "toy", "limit": 32, "image": {"size": 32}},
        "training": {"steps": steps, "batch_size": batch},
    }
    return SimpleNamespace(recipe=recipes.load(tree))


def test_the_network_of_most_runs_is_that_of_the_baselines():
    runs = {"a": run(model="timm/resnet10t"), "b": run(), "c": run()}
    line, notes = plan_of_runs._like(runs, "image")
    assert line == "b"
    assert notes == ["baselines have the network timm/test_resnet of most runs, and a another"]
    assert plan_of_runs._like({"b": run(), "c": run()}, "image") == ("b", [])


@pytest.mark.long
@pytest.mark.parametrize(("task", "cost"), [("rotation", 4.0), ("simclr", 2.0)])
def test_what_a_row_of_a_run_cost_is_measured(task, cost):
    assert cost_of_row(run(task).recipe, "image", ROWS, task, 4) == pytest.approx(cost, rel=0.01)


def test_the_budget_of_most_runs_is_that_of_the_supervised_network(monkeypatch):
    def cost(recipe: recipes.Recipe, *others: object) -> float:
        if recipe.objective["name"] == "moco":
            raise DataError("photos is not there")
        return {"rotation": 4.0, "simclr": 2.0}[recipe.objective["name"]]

    monkeypatch.setattr(plan_of_runs, "cost_of_row", cost)
    runs = {"turns": run(batch=8), "views": run("simclr"), "long": run(steps=400), "keys": run("moco", batch=32)}
    spent, samples, notes = plan_of_runs._spent(runs, "image", ROWS)
    assert spent == (40, 32)
    assert samples == {"turns": 4.0, "views": 2.0, "long": 4.0}
    assert notes == [
        "the supervised network learned in 40 steps of 32 encoder samples, as most runs did; long had 400 steps of 64 "
        "encoder samples",
        "a row of keys is counted as one encoder sample, for its own cannot be read: photos is not there",
    ]
    plan = Plan(
        {"source": "toy"}, "shape", "image", runs={"a": ["a"]}, budget=f"steps={spent.steps}", batch=spent.batch
    )
    assert plan.steps == 40


def test_what_runs_had_cannot_be_asked_for(tmp_path):
    with pytest.raises(RecipeError, match="runs are compared as they are; leave budget, batch out"):
        mmssl.compare(runs=["one"], budget="steps=9", batch=8, out=tmp_path / "out")
