"""Views: the published settings of each, and what a recipe changes in them."""

from __future__ import annotations

import pytest
import torch
from tiny_encoders import tiny_batch, tiny_encoders

from mmssl.errors import RecipeError
from mmssl.modules.views import Crop, Views, encode_views
from mmssl.ops.draws import Draws

PLAIN = {"area": (1.0, 1.0), "flip": 0, "jitter": 0, "grayscale": 0, "blur": 0}


def test_a_recipe_changes_all_views_or_each():
    image = tiny_encoders()["image"]
    published = ({"blur": 1.0}, {"blur": 0.1, "solarize": 0.2})
    assert [v.blur for v in Views(image, None, image=published).settings] == [1.0, 0.1]
    same = Views(image, {"solarize": 0.5}, image=published).settings
    assert [(v.blur, v.solarize) for v in same] == [(1.0, 0.5), (0.1, 0.5)]
    each = Views(image, [{}, {"blur": 0.7}], image=published).settings
    assert [(v.blur, v.solarize) for v in each] == [(1.0, 0.0), (0.7, 0.2)]
    assert [v.window for v in Views(tiny_encoders()["audio"], None, image=published).settings] == [0.5, 0.5]


def test_each_view_is_made_by_its_own_settings():
    image = tiny_encoders()["image"]
    batch = tiny_batch(4)
    views = Views(image, [PLAIN, PLAIN | {"solarize": 1.0}, PLAIN | {"flip": 1.0}], 3)
    (made,) = views(batch, Draws(0, 0, 4), image)
    plain = batch["image"] / 255
    torch.testing.assert_close(made[:, 0], plain, atol=1e-5, rtol=0)
    torch.testing.assert_close(made[:, 1], torch.where(plain < 0.5, plain, 1 - plain), atol=1e-5, rtol=0)
    torch.testing.assert_close(made[:, 2], plain.flip(-1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["image", "audio"])
def test_all_views_go_through_the_encoder_in_one_pass(name):
    encoder = tiny_encoders()[name]
    made = Views(encoder, None, 3)(tiny_batch(4), Draws(0, 0, 4), encoder)
    calls: list[int] = []
    encoder.register_forward_hook(lambda module, given, result: calls.append(len(given[0])))
    pooled = encode_views(encoder, *made)
    assert calls == [12]
    assert pooled.shape == (4, 3, encoder.dim)
    mask = made[1][2, 1:2] if name == "audio" else None
    torch.testing.assert_close(pooled[2, 1:2], encoder(made[0][2, 1:2], mask).pooled)


def test_what_cannot_work_is_said_when_built():
    encoders = tiny_encoders()
    with pytest.raises(RecipeError, match="reads text"):
        Views(encoders["text"], None)
    with pytest.raises(RecipeError, match=r"views: unknown key 'blurr' \(did you mean 'blur'"):
        Views(encoders["image"], {"blurr": 0})
    with pytest.raises(RecipeError, match="views: 3 are given, and the task has 2"):
        Views(encoders["image"], [{}, {}, {}])
    with pytest.raises(RecipeError, match="one size"):
        Views(encoders["image"], [{"size": 8}, {}])(tiny_batch(2), Draws(0, 0, 2), encoders["image"])


def test_a_crop_says_nothing_where_nothing_is_asked_of_it():
    image = tiny_batch(4)["image"]
    draws = Draws(0, 0, 4)
    assert Crop()(image, draws) is image
    assert torch.equal(draws.uniform(), Draws(0, 0, 4).uniform())  # nor does it use up numbers
    assert Crop.of({"area": (0.5, 1.0), "flip": 0.5}, {"flip": None}) == Crop(area=(0.5, 1.0))
    with pytest.raises(RecipeError, match=r"views: unknown key 'aera' \(did you mean 'area'"):
        Crop.of({}, {"aera": None})


@pytest.mark.parametrize("area", [None, (0.3, 0.6)])
def test_all_frames_of_a_clip_are_cropped_alike(area):
    clip = tiny_batch(6, frames=3)["video"]
    crop = Crop(area=area, flip=0.5, size=8)
    cut = crop(clip, Draws(0, 0, 6))
    assert cut.shape == (6, 3, 3, 8, 8)
    for number in range(3):
        torch.testing.assert_close(cut[:, number], crop(clip[:, number], Draws(0, 0, 6)))


def test_without_an_area_a_square_is_cut_and_not_resized():
    image = tiny_batch(64)["image"]
    cut = Crop(flip=0.5, size=5)(image, Draws(0, 0, 64))
    windows = image.unfold(2, 5, 1).unfold(3, 5, 1).permute(0, 2, 3, 1, 4, 5).flatten(1, 2)
    same, mirrored = ((windows == square[:, None]).flatten(2).all(2).any(1) for square in (cut, cut.flip(-1)))
    assert (same | mirrored).all()
    assert 16 < int(mirrored.sum()) < 48
