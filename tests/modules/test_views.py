"""Views: the published settings of each, and what a recipe changes in them."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as TF
from PIL import Image
from tiny_encoders import tiny_batch, tiny_encoders, tiny_waves
from torchvision.transforms import v2

from mmssl.encoders import create as create_encoder
from mmssl.errors import RecipeError
from mmssl.media.image import decode_image, decode_squeezed
from mmssl.modules.views import Crop, Views, encode_views
from mmssl.objectives import create
from mmssl.ops.augment import squares_of_squeezed
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


@pytest.mark.parametrize(("model", "side"), [("timm/test_vit", 64), ("timm/test_resnet", 70)])
def test_pixels_of_a_view_are_whole_patches_where_the_encoder_has_them(model, side):
    image = create_encoder(model, "image")
    pictures = {"image": torch.zeros(1, 3, 96, 96, dtype=torch.uint8)}
    (made,) = Views(image, {"size": 70}, 1)(pictures, Draws(0, 0, 1), image)
    assert made.shape == (1, 1, 3, side, side)


def test_each_view_of_a_clip_is_of_a_moment_of_its_own():
    video = create_encoder("timm/test_resnet", "video")
    rows, frames, taken = 400, 12, 4
    number = torch.arange(frames, dtype=torch.uint8)
    batch = {"video": (20 * number).view(1, -1, 1, 1, 1).expand(rows, -1, 3, 16, 16)}
    (made,) = Views(video, PLAIN | {"frames": taken})(batch, Draws(0, 0, rows), video)
    assert made.shape == (rows, 2, taken, 3, 16, 16)
    seen = (made[:, :, :, 0, 0, 0] * 255 / 20).round().long()
    start = seen[:, :, 0]
    assert (seen - start[:, :, None] == torch.arange(taken)).all()
    places = frames - taken + 1
    # CVRL's distances: of M + 1 places, d apart in (M + 1 - d) of the ways either way, the farther the more seldom.
    apart = (start[:, 0] - start[:, 1]).abs().bincount(minlength=places) / rows
    expected = torch.tensor([places, *(2 * (places - d) for d in range(1, places))]) / places**2
    assert (apart - expected).abs().max() < 4 * (0.25 / rows) ** 0.5
    with pytest.raises(RecipeError, match="13 frames are more than a row's 12"):
        Views(video, {"frames": 13})(batch, Draws(0, 0, rows), video)
    with pytest.raises(RecipeError, match="frames are of clips"):
        Views(tiny_encoders()["image"], {"frames": 4})


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


@pytest.mark.parametrize("crop", [Crop(margin=0.25), Crop(margin=0.25, area=(1.0, 1.0)), Crop(margin=0.25, size=8)])
def test_no_crop_sees_the_margin(crop):
    image = torch.zeros(4, 3, 32, 32)
    image[..., 8:24, 8:24] = 1
    cut = crop(image, Draws(0, 0, 4))
    assert cut.shape[-1] == crop.side(image, None) == (crop.size or 16)
    assert cut.min() == 1


def waves(rows: int, aspect: float, size: int, seed: int = 0) -> torch.Tensor:
    """Waves of one length in every direction, of a picture of that aspect ratio squeezed to a square."""
    generator = torch.Generator().manual_seed(seed)
    angle, phase = (torch.rand(2, rows, 40, 1, 1, generator=generator) * 2 * math.pi).unbind(0)
    down, across = torch.arange(size)[:, None] / size, aspect * torch.arange(size) / size
    pictures = (50 * (angle.cos() * across + angle.sin() * down) + phase).cos().mean(1)
    return (0.5 + pictures)[:, None].expand(-1, 3, -1, -1)


def slant(views: torch.Tensor) -> float:
    """Ratio of the slopes across to those down; 1 where waves run in all directions alike."""
    return (views.diff(dim=-1).square().mean() / views.diff(dim=-2).square().mean()).item()


SQUEEZED = [
    *(Crop(area=(0.3, 1.0), size=24), Crop(area=(0.3, 1.0), size=24, flip=0.5), Crop(), Crop(size=32), Crop(flip=0.5)),
    Crop(area=(0.3, 0.6), size=24, interpolation="bicubic"),
]


@pytest.mark.quick(6)
@pytest.mark.parametrize("crop", SQUEEZED, ids=str)
@pytest.mark.parametrize("aspect", [0.5, 1.0, 2.5])
def test_a_crop_of_a_squeezed_picture_is_in_its_right_shape(crop, aspect):
    pictures = waves(60, aspect, 64)
    assert slant(pictures) == pytest.approx(aspect**2, rel=0.25)
    cut = crop(pictures, Draws(0, 0, 60), torch.full((60,), aspect), square=True)
    assert cut.shape[-1] == (crop.size or 64)
    assert slant(cut) == pytest.approx(1, abs=0.25)


def test_views_of_squeezed_pictures_are_in_their_right_shape():
    encoder, settings = tiny_encoders()["image"], {**PLAIN, "area": (0.3, 0.6), "size": 24}
    for aspect in (0.5, 2.0):
        batch = {"image": waves(60, aspect, 64), "image_aspect": torch.full((60,), aspect)}
        (views,) = Views(encoder, settings, 2)(batch, Draws(0, 0, 60), encoder)
        # Of shapes from 3/4 to 4/3, as many wide ones as tall ones.
        assert slant(views.flatten(0, 1)) == pytest.approx(1, abs=0.25)


def test_the_whole_of_a_squeezed_picture_is_the_square_that_is_decoded_without():
    rng = np.random.default_rng(0)
    file = Image.fromarray(rng.integers(0, 255, (15, 28, 3), dtype=np.uint8)).resize(
        (280, 150), Image.Resampling.BICUBIC
    )
    square, aspect = decode_squeezed(file, 64)
    expected = decode_image(file, 64).float() / 255
    (found,) = Crop()(square[None], Draws(0, 0, 1), torch.tensor([aspect]))
    assert (found - expected).square().mean().sqrt() < 0.05
    assert (square / 255 - expected).square().mean().sqrt() > 0.2  # another one is far from it


def test_squares_of_squeezed_pictures_lie_everywhere():
    aspect = torch.full((400,), 2.0)
    boxes = squares_of_squeezed(torch.empty(400, 3, 100, 100), aspect, 60, Draws(0, 0, 400))
    assert boxes[:, 2:].unique(dim=0).tolist() == [[60, 30]]
    assert boxes[:, :2].amin(0).tolist() == [0, 0]
    assert boxes[:, :2].amax(0).tolist() == [40, 70]
    with pytest.raises(ValueError, match="no square of 101 pixels"):
        squares_of_squeezed(torch.empty(4, 3, 100, 100), aspect[:4], 101, None)


def test_a_random_crop_of_a_squeezed_picture_has_to_say_its_size():
    encoder, batch = tiny_encoders()["image"], tiny_batch(4) | {"image_aspect": torch.ones(4)}
    for size in (None, 0.5):
        with pytest.raises(RecipeError, match="views: size, in pixels"):
            Views(encoder, {"size": size})(batch, Draws(0, 0, 4), encoder)
    with pytest.raises(RecipeError, match="views: size, in pixels"):
        Crop(area=(0.5, 1.0))(batch["image"], Draws(0, 0, 4), batch["image_aspect"])


def photo(width: int, height: int, seed: int) -> bytes:
    """A JPEG of noise whose amplitude falls as 1/f, as that of photographs does."""
    white = np.random.default_rng(seed).normal(size=(height, width))
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    gray = np.fft.irfft2(np.fft.rfft2(white) / frequency.clip(1 / max(width, height)), (height, width))
    pixels = np.uint8(np.clip(128 + 45 * gray / gray.std(), 0, 255))
    stream = io.BytesIO()
    Image.fromarray(pixels).convert("RGB").save(stream, "JPEG", quality=95)
    return stream.getvalue()


def detail(views: torch.Tensor) -> torch.Tensor:
    """Logarithm of the variance of the Laplacian, (N,)."""
    kernel = torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]])[None, None]
    return torch.nn.functional.conv2d(views.mean(1, keepdim=True), kernel).flatten(1).var(1).log()


@pytest.mark.long
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_views_of_squeezed_files_have_the_detail_of_those_that_torchvision_cuts(interpolation):
    # At a quarter of the published sizes: files of 90 to 124 pixels a side, 112 decoded, 56 cut. Lanczos' filter takes
    # a tenth of what there is near the highest frequency of the file; today's 64 pixels lack two thirds of it.
    encoder, crops, side, view = tiny_encoders()["image"], 100, 112, 56
    torch.manual_seed(0)
    theirs, squeezed, cropped = [], [], []
    theirs_cut = v2.RandomResizedCrop(view, interpolation=v2.InterpolationMode(interpolation), antialias=True)
    views = Views(encoder, {**PLAIN, "area": (0.08, 1.0), "size": view, "interpolation": interpolation}, 1)
    for number, (width, height) in enumerate(((117, 97), (97, 117), (106, 106), (120, 90), (92, 124))):
        data = photo(width, height, number)
        image = TF.pil_to_tensor(Image.open(io.BytesIO(data)).convert("RGB"))
        theirs.append(detail(torch.stack([theirs_cut(image) for _ in range(crops)]) / 255))
        square, aspect = decode_squeezed(data, side)
        batch = {"image": square.expand(crops, -1, -1, -1), "image_aspect": torch.full((crops,), aspect)}
        squeezed.append(detail(views(batch, Draws(number, 0, crops), encoder)[0][:, 0]))
        batch = {"image": decode_image(data, 64).expand(crops, -1, -1, -1)}
        cropped.append(detail(views(batch, Draws(number, 0, crops), encoder)[0][:, 0]))
    expected, mine, before = (torch.cat(each) for each in (theirs, squeezed, cropped))
    error = ((expected.var() + mine.var()) / len(mine)).sqrt()
    gap = (mine.mean() - expected.mean()).abs()
    assert gap < 0.1 + 3 * error
    assert expected.mean() - before.mean() > 1 - 3 * error


@pytest.mark.long
def test_a_view_with_another_row_in_it_makes_rows_meet_in_the_transform():
    encoders, mixed = {"audio": tiny_encoders()["audio"]}, {"mix": 0.4}
    batch = tiny_batch(4)
    other = {key: torch.cat([value[:2], value[2:].flip(0)]) for key, value in batch.items()}
    for name, hyper in (("byol", {}), ("dino", {"prototypes": 8, "local_crops": 1}), ("simclr", {})):
        plain = create(name, encoders, encoder="audio", **hyper)
        task = create(name, encoders, encoder="audio", views=mixed, **hyper)
        assert task.meets == ("loss" if name == "simclr" else "transform")
        assert plain.meets == ("loss" if name == "simclr" else "nowhere")
        for one, depends in ((plain, False), (task, True)):
            first, second = (one.transform(rows, Draws(0, 0, 4))["views"][:2] for rows in (batch, other))
            assert torch.equal(first, second) is not depends
    local = create("dino", encoders, encoder="audio", prototypes=8, local_views=mixed)
    assert local.meets == "transform"
    with pytest.raises(RecipeError, match=r"mix is of spectrograms, and .*wav2vec2 reads waveforms; leave it out"):
        Views(tiny_waves(), mixed)
