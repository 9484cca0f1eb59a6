"""Which depth is best is chosen on validation rows, and said with the spread of the difference on test rows."""

import math

import numpy as np
import pytest
from PIL import Image
from scipy import stats

import mmssl
from mmssl import encoder as create
from mmssl.adaptation.depths import Depth, compare_depths, sentence_of, spread_of
from mmssl.errors import RecipeError

LAST = Depth("pooled", (0.5, 0.6, 0.55), None, 0.4)


def test_the_best_depth_is_that_of_validation_rows_and_a_tie_is_the_last_layers():
    shallow = Depth("layer1", (0.9, 0.9, 0.9), None, 0.3)
    deep = Depth("layer2", (0.6, 0.7, 0.7), None, 0.45)
    assert compare_depths([LAST, shallow, deep]) == (deep, LAST)
    assert compare_depths([LAST, shallow]) == (LAST, shallow)
    equal = deep._replace(validation=0.4)
    assert compare_depths([LAST, equal]) == (LAST, equal)
    same = LAST._replace(name="layer4")  # a network's last stage is what it pools
    assert compare_depths([LAST, same]) is None
    assert compare_depths([LAST, same, shallow]) == (LAST, shallow)
    assert compare_depths([LAST._replace(validation=None), deep]) is None


def test_the_spread_over_seeds_is_paired_and_of_one_seed_that_of_two_shares():
    other = Depth("layer2", (0.6, 0.75, 0.6))
    differences = np.array([0.1, 0.15, 0.05])
    expected = stats.t.interval(0.95, 2, differences.mean(), stats.sem(differences))
    assert spread_of(other, LAST) == pytest.approx((expected[1] - expected[0]) / 2)
    one, two = Depth("a", (0.5,), (0.4, 0.6)), Depth("b", (0.7,), (0.55, 0.85))
    assert spread_of(one, two) == pytest.approx(math.sqrt(0.1**2 + 0.15**2))
    assert spread_of(one, two._replace(interval=None)) == math.inf


@pytest.mark.parametrize(
    ("best", "other", "difference", "half", "percent", "words"),
    [
        ("layer3", "pooled", 0.062, 0.041, True, "6.2 points above the last layer, 2.1 beyond the spread (± 4.1)"),
        ("layer3", "pooled", -0.01, 0.041, True, "1.0 points below the last layer, within the spread (± 4.1)"),
        ("pooled", "layer3", 0.5, 0.1, False, "0.500 above layer3, 0.400 beyond the spread (± 0.100)"),
        ("layer3", "pooled", 0.5, math.inf, False, "0.500 above the last layer, and one seed tells no spread"),
    ],
)
def test_the_sentence(best, other, difference, half, percent, words):
    name = "the last layer" if best == "pooled" else best
    expected = f"{name} is the best depth on validation rows; on test rows it is {words}"
    assert sentence_of(best, other, difference, half, percent=percent) == expected


@pytest.mark.long
def test_a_table_of_depths_ends_in_the_sentence_and_draws_them(tmp_path):
    encoder = create("timm/test_resnet", modality="image")
    settings = {"label": "shape", "probe": "ridge", "seeds": 2, "limit": 60}
    table = mmssl.adapt(encoder, "toy", layers=True, **settings)
    assert str(table).splitlines()[-1] == table.depth_sentence
    assert "is the best depth on validation rows; on test rows it is" in table.depth_sentence
    assert {depth.name for depth in table.depths()} == {"pooled", "act1", "layer1", "layer2", "layer3", "layer4"}
    table.figure(tmp_path / "depths.png")
    with Image.open(tmp_path / "depths.png") as picture:
        assert picture.width > 1000
        assert len(set(picture.convert("RGB").getdata())) > 50
    plain = mmssl.adapt(encoder, "toy", baseline=False, **settings)
    assert plain.depth_sentence == ""
    with pytest.raises(RecipeError, match="depths, which were not probed; ask for layers"):
        plain.figure(tmp_path / "none.png")
