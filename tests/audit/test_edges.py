"""The edge solver: tiles that touch are put together, and distance makes it harder."""

from __future__ import annotations

from typing import Any

import pytest

from mmssl import recipe
from mmssl.audit.edges import edges
from mmssl.audit.nulls import Arm
from mmssl.errors import RecipeError
from mmssl.recipe import Recipe

BARE: dict[str, dict[str, Any]] = {
    "jigsaw": {"gray": 0.0, "projection": 0.0, "shift": 0, "orders": 24, "tile_width": 4, "hidden": 4},
    "relative_position": {"color": "none", "coarse": 0.0, "jitter": 0, "grids": 1, "hidden": 4},
}


def task(name: str, **options: Any) -> Recipe:
    return recipe.load(
        {
            "encoders": {"image": {"model": "timm/resnet18"}},
            "objective": {"name": name} | BARE.get(name, {}) | options,
            "data": {"source": "toy", "image": {"size": 48}},
        }
    )


@pytest.mark.quick(1)
@pytest.mark.parametrize(
    ("name", "touching", "apart"),
    [
        ("jigsaw", {"tile": 16, "gap": 0}, {"tile": 8, "gap": 8}),
        ("relative_position", {"patch": 16, "gap": 0}, {"patch": 8, "gap": 8}),
    ],
)
def test_tiles_that_touch_are_put_together_and_a_gap_makes_it_harder(name, touching, apart):
    close, far = (
        edges(task(name, standardize=False, **options), Arm("natural"), rows=64) for options in (touching, apart)
    )
    assert close.accuracy > 0.95
    assert close.verdict == "leaks"
    assert close.chance + 0.02 < far.accuracy < close.accuracy - 0.1
    assert close.chance == pytest.approx(1 / 24 if name == "jigsaw" else 1 / 4)


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "apart"), [("jigsaw", {"tile": 8, "gap": 8}), ("relative_position", {"patch": 8, "gap": 8})]
)
def test_what_is_out_of_focus_continues_over_no_gap(name, apart):
    touching = {"tile": 16, "gap": 0} if name == "jigsaw" else {"patch": 16, "gap": 0}
    assert edges(task(name, standardize=False, **touching), rows=64).accuracy > 0.95
    assert edges(task(name, standardize=False, **apart), rows=256).verdict == "clean"


@pytest.mark.parametrize(("name", "cut"), [("jigsaw", {"tile": 8, "gap": 8}), ("relative_position", {"patch": 8})])
def test_white_noise_has_no_edges(name, cut):
    assert edges(task(name, **cut), Arm(), rows=96).verdict == "clean"


def test_refuses_a_task_without_tiles():
    with pytest.raises(RecipeError, match="Rotation cuts no tiles"):
        edges(task("rotation"), rows=8)
