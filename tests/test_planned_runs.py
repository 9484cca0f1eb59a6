"""scripts/plan.py: its pieces against a network whose operations and bytes are known, and its arithmetic by hand."""

from __future__ import annotations

from pathlib import Path

import plan
import pytest
import torch

from mmssl import catalog
from mmssl.recipe import Recipe, load

# Two layers over 16 places of 8 x 8 pixels, in four turns.
TREE = {
    "encoders": {
        "image": {
            **{"model": "timm/vit_tiny_patch16_224", "img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2},
            **{"num_heads": 2, "global_pool": "avg", "class_token": False},
        }
    },
    "objective": {"name": "rotation"},
    "data": {"source": "toy", "image": {"size": 32}},
    "training": {"steps": 1000, "batch_size": 64},
}


def test_operations_of_a_row_are_those_of_the_formula() -> None:
    pieces = plan.measure(load(TREE))
    views, places, width = 4, 16, 64
    layer = 12 * width**2 * places + 2 * places**2 * width  # multiplications: projections and MLP, attention
    patches = 8 * 8 * 3 * width * places  # whose input takes no gradient
    expected = 2 * views * (3 * 2 * layer + 2 * patches + 3 * 4 * width)
    assert pieces.flops == pytest.approx(expected, rel=1e-3)
    assert pieces.state == pytest.approx(8 * pieces.trained, rel=1e-2)  # two moments of AdamW


@pytest.mark.long
def test_recomputed_blocks_hold_less_and_work_more() -> None:
    kept, again = (plan.measure(load(TREE, {"training.checkpointing": on})) for on in (False, True))
    assert again.activations < 0.5 * kept.activations
    assert 1.2 * kept.flops < again.flops < 1.4 * kept.flops
    assert again.weights == kept.weights


def test_the_table_is_arithmetic() -> None:
    pieces = plan.Pieces(weights=10**9, trained=10**9, state=8 * 10**9, flops=1e12, activations=1e8)
    recipe = load(TREE, {"training.precision": "bf16", "training.accumulate": 2})
    found = plan.plan(recipe, pieces, gpus=4, gpu="h200", mfu=0.5, rows=None, kilobytes=100)
    assert found["speed"] == pytest.approx(4 * 989e12 * 0.5 / 1e12)
    assert found["gigabytes"] == pytest.approx(16 + 64 / 4 / 2 * 0.1)
    assert found["days"] == pytest.approx(64_000 / found["speed"] / 86400)
    assert found["terabytes"] == pytest.approx(64_000 * 100e3 / 1e12)
    sharded = recipe.model_copy(update={"training": recipe.training.model_copy(update={"sharded": True})})
    found = plan.plan(sharded, pieces, gpus=4, gpu="4090", mfu=0.5, rows=None, kilobytes=None)
    assert found["gigabytes"] == pytest.approx(4 + 0.8)
    assert found["terabytes"] is None
    assert "?" in plan.line("x", 4, "4090", found)
    whole = plan.plan(recipe, pieces, gpus=1, gpu="4090", mfu=0.5, rows=None, kilobytes=None)
    assert "16.0 of 24" not in plan.line("x", 1, "4090", whole)
    assert plan.plan(recipe, pieces, 1, "a100-40", 0.5, None, None)["fits"]


def test_a_run_in_epochs_asks_for_rows() -> None:
    pieces = plan.Pieces(1, 1, 1, 1e9, 1e6)
    recipe = load(TREE | {"training": {"epochs": 3, "batch_size": 64}})
    assert plan.plan(recipe, pieces, 1, "h100", 0.4, None, None)["days"] is None
    speed = 67e12 * 0.4 / 1e9
    assert plan.plan(recipe, pieces, 1, "h100", 0.4, 1000, None)["days"] == pytest.approx(3000 / speed / 86400)


def test_long_operations_stand_in_for_themselves_and_small_ones_are_made() -> None:
    large, small = torch.rand(300, 300), torch.rand(3, 3)
    with plan.Shapes():
        assert not (large @ large).any()
        assert not (large + 1).any()
        assert (small + 1 > 0.5).all()
        assert torch.equal((large > 0.5).sum(), (large > 0.5).sum())
        first = torch.nn.Linear(3, 3)
    assert not first.weight.any()
    assert (large > 0).any()


def test_what_was_measured_is_kept_and_others_are_left_for_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[str] = []

    def measure(recipe: Recipe) -> plan.Pieces:
        measured.append(recipe.objective["name"])
        return plan.Pieces(10**6, 10**6, 8 * 10**6, 1e9, 1e6)

    tables: dict[str, str] = {}
    monkeypatch.setattr(plan, "measure", measure)
    monkeypatch.setattr(plan, "KEPT", tmp_path / "plan.json")
    monkeypatch.setattr(plan, "write_tables", tables.__setitem__)
    plan.main(["--published", "simclr_imagenet"])
    plan.main(["--published", "simclr_imagenet", "jepa_imagenet"])
    assert measured == ["simclr", "jepa"]
    assert [row.split(" | ")[:2] for row in tables["plan"].splitlines()[2:]] == [
        ["| jepa_imagenet", "16 h200"],
        ["| simclr_imagenet", f"{plan.gpus_of(catalog.head(catalog.find_recipe('simclr_imagenet')))} h200"],
    ]
