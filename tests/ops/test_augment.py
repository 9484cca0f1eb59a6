"""Augmentation: equal to torchvision for given choices, and each sample's choices distributed as they should be."""

from __future__ import annotations

import math

import pytest
import torch
import torchvision.transforms.v2.functional as TF
from scipy import stats
from torchvision.transforms import v2

from mmssl.ops import augment
from mmssl.ops.draws import Draws

SURE = 1e-4  # significance of the tests of distributions; seeds are fixed


def _images(n: int = 8, height: int = 40, width: int = 56) -> torch.Tensor:
    return torch.rand(n, 3, height, width, generator=torch.Generator().manual_seed(0))


# Up to 64 pixels as products of matrices, above one by one.
@pytest.mark.parametrize("size", [16, 24, 64, 80], ids=["smaller", "mixed", "larger", "one by one"])
def test_crop_is_torchvisions_antialiased_resize(size):
    images = _images()
    boxes = augment.draw_crops(Draws(0, 0, len(images)), 1, 40, 56)[:, 0]
    flip = torch.arange(len(images)) % 2 == 0
    found = augment.resized_crop(images, boxes, size, flip)
    for image, box, mirrored, mine in zip(images, boxes.tolist(), flip, found, strict=True):
        expected = TF.resized_crop(image, *box, [size, size], antialias=True)
        torch.testing.assert_close(mine, expected.flip(-1) if mirrored else expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", [16, 24, 64, 80], ids=["smaller", "mixed", "larger", "one by one"])
def test_bicubic_is_torchvisions_cut_to_the_range(size):
    images = _images().round()  # black and white, where the kernel overshoots
    boxes = augment.draw_crops(Draws(0, 0, len(images)), 1, 40, 56)[:, 0]
    flip = torch.arange(len(images)) % 2 == 0
    found = augment.resized_crop(images, boxes, size, flip, "bicubic")
    cut = 0
    for image, box, mirrored, mine in zip(images, boxes.tolist(), flip, found, strict=True):
        expected = TF.resized_crop(image, *box, [size, size], TF.InterpolationMode.BICUBIC, antialias=True)
        cut += int(expected.max() > 1)
        expected = (expected.flip(-1) if mirrored else expected).clamp(0, 1)
        torch.testing.assert_close(mine, expected, atol=1e-5, rtol=0)
    assert cut or size < 40


@pytest.mark.parametrize("size", [24, 80])
def test_bytes_are_floats_over_255(size):
    images = (_images() * 255).round().to(torch.uint8)
    boxes = augment.draw_crops(Draws(0, 0, len(images)), 1, 40, 56)[:, 0]
    flip = torch.zeros(len(images), dtype=torch.bool)
    torch.testing.assert_close(
        augment.resized_crop(images, boxes, size, flip), augment.resized_crop(images / 255, boxes, size, flip)
    )


def test_jitter_is_torchvisions_in_each_images_own_order():
    images = _images(24)
    images[0] = 0.5  # gray: no hue
    factors, order = (x[:, 0] for x in augment.draw_jitter(Draws(0, 0, len(images)), 1))
    changes = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue)
    found = augment.color_jitter(images.clone(), factors, order)
    for image, values, turns, mine in zip(images, factors.tolist(), order.tolist(), found, strict=True):
        for turn in turns:
            image = changes[turn](image, values[turn])
        torch.testing.assert_close(mine, image, atol=1e-5, rtol=0)


def test_hue_of_colors_with_equal_channels_is_torchvisions():
    levels = torch.tensor([0.0, 0.25, 0.5, 1.0])
    colors = torch.cartesian_prod(levels, levels, levels).T.reshape(3, 8, 8)
    shift = torch.linspace(-0.5, 0.5, 13)
    turned = augment.shift_hue(colors.expand(13, -1, -1, -1), shift)
    for mine, by in zip(turned, shift.tolist(), strict=True):
        torch.testing.assert_close(mine, TF.adjust_hue(colors, by), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kernel", [3, 7, 23])
def test_blur_and_gray_are_torchvisions(kernel):
    images = _images()
    sigma = torch.linspace(0.1, 2, len(images))
    blurred = augment.gaussian_blur(images, sigma, kernel)
    for image, width, mine in zip(images, sigma.tolist(), blurred, strict=True):
        expected = TF.gaussian_blur(image, [kernel, kernel], [width, width])
        torch.testing.assert_close(mine, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(augment.gray(images), TF.rgb_to_grayscale(images))


def test_area_and_log_ratio_are_uniform():
    side = 2000
    boxes = augment.draw_crops(Draws(0, 0, 4000), 2, side, side, area=(0.1, 0.4)).flatten(0, 1).double()
    area, ratio = boxes[:, 2] * boxes[:, 3] / side**2, (boxes[:, 3] / boxes[:, 2]).log()
    reach = math.log(4 / 3)
    assert stats.kstest(area.numpy(), "uniform", (0.1, 0.3)).pvalue > SURE
    assert stats.kstest(ratio.numpy(), "uniform", (-reach, 2 * reach)).pvalue > SURE
    assert abs(stats.pearsonr(area, ratio).statistic) < 0.05
    free = side - boxes[:, 2:]
    for axis in (0, 1):
        assert stats.kstest((boxes[:, axis] / free[:, axis]).numpy(), "uniform").pvalue > SURE


@pytest.mark.quick(1)
@pytest.mark.parametrize("shape", [(64, 64), (48, 96), (20, 300)], ids=["square", "wide", "very wide"])
def test_crops_are_distributed_as_torchvisions(shape):
    n = 3000
    torch.manual_seed(0)
    image = torch.empty(3, *shape)
    crop = v2.RandomResizedCrop(8)
    drawn = [crop.make_params([image]) for _ in range(n)]
    theirs = torch.tensor([[params[key] for key in ("top", "left", "height", "width")] for params in drawn])
    mine = augment.draw_crops(Draws(1, 0, n), 1, *shape)[:, 0]
    for column in range(4):
        assert stats.ks_2samp(mine[:, column].numpy(), theirs[:, column].numpy(), method="asymp").pvalue > SURE
    assert (mine[:, :2] >= 0).all()
    assert (mine[:, :2] + mine[:, 2:] <= torch.tensor(shape)).all()


@pytest.mark.quick(1)
@pytest.mark.parametrize("file", [(448, 448), (387, 469), (640, 360), (300, 900), (800, 400)])
def test_crops_of_squeezed_pictures_are_torchvisions_of_the_file(file):
    n, side = 3000, 448
    height, width = file
    torch.manual_seed(0)
    crop = v2.RandomResizedCrop(8)
    drawn = [crop.make_params([torch.empty(3, height, width)]) for _ in range(n)]
    theirs = torch.tensor([[params[key] for key in ("top", "left", "height", "width")] for params in drawn]).double()
    aspect = torch.full((n,), width / height)
    boxes = augment.draw_crops(Draws(1, 0, n), 1, side, side, aspect=aspect)[:, 0].double()
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, 2:] >= 1).all()
    assert (boxes[:, :2] + boxes[:, 2:] <= side).all()
    mine = boxes * torch.tensor([height, width, height, width]) / side
    # Whole pixels of the one and of the other: by less than that no two are told apart.
    noise = torch.rand(2, n, 4, generator=torch.Generator().manual_seed(0)) - 0.5
    pixel = torch.tensor([height, width, height, width]) / side
    both = [mine + noise[0] * pixel.clamp(min=1), theirs + noise[1] * pixel.clamp(min=1)]
    columns = [(a, b) for a, b in zip(*(each.unbind(1) for each in both), strict=True)]
    columns.append(tuple(each[:, 2] * each[:, 3] for each in (mine, theirs)))
    columns.append(tuple((each[:, 3] / each[:, 2]).log() for each in (mine, theirs)))
    for a, b in columns:
        assert stats.ks_2samp(a.numpy(), b.numpy(), method="asymp").pvalue > SURE


@pytest.mark.parametrize("file", [(60, 900), (900, 40), (1, 500)])
def test_where_no_crop_fits_the_largest_of_the_file_is_taken(file):
    height, width = file
    torch.manual_seed(0)
    crop = v2.RandomResizedCrop(8, scale=(1, 1))
    theirs = torch.tensor([*crop.make_params([torch.empty(3, height, width)]).values()])
    (mine,) = augment.draw_crops(Draws(0, 0, 1), 1, 448, 448, area=(1, 1), aspect=torch.tensor([width / height]))[0]
    pixel = torch.tensor([height, width, height, width]) / 448
    assert ((mine * pixel - theirs).abs() <= pixel.clamp(min=1)).all()


def test_crops_of_square_pictures_are_those_of_unsqueezed_ones():
    for area in ((0.08, 1.0), (1.0, 1.0)):
        plain = augment.draw_crops(Draws(0, 0, 50), 3, 64, 64, area=area)
        assert torch.equal(plain, augment.draw_crops(Draws(0, 0, 50), 3, 64, 64, area=area, aspect=torch.ones(50)))


def _enlarged(boxes: torch.Tensor, view: int = 224) -> float:
    return (boxes[..., 2] * boxes[..., 3] < view**2).double().mean().item()


def test_twice_the_view_is_enough_pixels():
    n = 20_000
    aspect = torch.full((n,), 469 / 387)  # the mean of ImageNet's files
    file = _enlarged(augment.draw_crops(Draws(0, 0, n), 1, 387, 469))
    squeezed = _enlarged(augment.draw_crops(Draws(0, 0, n), 1, 448, 448, aspect=aspect))
    cropped = _enlarged(augment.draw_crops(Draws(0, 0, n), 1, 256, 256))
    assert file == pytest.approx(0.27, abs=0.01)
    assert squeezed < file + 0.03
    assert cropped > 0.8


def test_an_area_is_a_range_of_shares():
    for area in ((0, 1), (0.5, 0.4), (0.5, 2)):
        with pytest.raises(ValueError, match="area = "):
            augment.draw_crops(Draws(0, 0, 2), 1, 8, 8, area=area)


def test_jitter_factors_and_orders_are_uniform():
    factors, order = (x.flatten(0, 1) for x in augment.draw_jitter(Draws(0, 0, 3000), 2, strength=0.5))
    for column, (low, high) in enumerate([(0.6, 1.4)] * 3 + [(-0.1, 0.1)]):
        assert stats.kstest(factors[:, column].double().numpy(), "uniform", (low, high - low)).pvalue > SURE
    code = (order * torch.tensor([64, 16, 4, 1])).sum(1)
    assert len(code.unique()) == 24
    assert stats.chisquare(code.unique(return_counts=True)[1].numpy()).pvalue > SURE
    strong, _ = augment.draw_jitter(Draws(0, 0, 100), 1, strength=2.0)
    assert strong[..., :3].min() >= 0


@pytest.mark.parametrize(
    ("changed", "share"),
    [({"flip": 0.3}, 0.3), ({"jitter": 0.8}, 0.8), ({"grayscale": 0.2}, 0.2), ({"blur": 0.5}, 0.5)],
)
def test_each_change_hits_its_share_of_the_views(changed, share):
    n = 800
    image = _images(1, 20, 20)
    off = {"flip": 0.0, "jitter": 0.0, "grayscale": 0.0, "blur": 0.0}
    views = augment.random_views(image.expand(n, -1, -1, -1), Draws(0, 0, n), 2, 20, area=(1, 1), **off | changed)
    hit = (views - image[:, None]).abs().amax((2, 3, 4)).flatten() > 1e-6
    assert stats.binomtest(int(hit.sum()), 2 * n, share).pvalue > SURE
    if "grayscale" in changed:
        gray = views.flatten(0, 1)[hit]
        assert torch.equal(gray[:, 0], gray[:, 2])


def test_views_differ_and_do_not_depend_on_how_the_work_is_cut(monkeypatch):
    images = _images(6, 32, 32)[:1].expand(6, -1, -1, -1)
    views = augment.random_views(images, Draws(0, 0, 6), 2, 32).flatten(0, 1)
    assert len({tuple(view.flatten().tolist()[:20]) for view in views}) == 12
    assert views.min() >= 0
    assert views.max() <= 1
    monkeypatch.setattr(augment, "_CPU_PIXELS", 1)
    alone = augment.random_views(images, Draws(0, 0, 6), 2, 32).flatten(0, 1)
    torch.testing.assert_close(views, alone, atol=1e-5, rtol=0)


def test_random_squares_are_the_same_in_all_frames():
    frames = torch.arange(9 * 12).view(1, 1, 1, 9, 12).repeat(50, 3, 2, 1, 1)
    squares = augment.random_squares(frames, 5, Draws(0, 0, 50))
    assert (squares == squares[:, :1, :1]).all()
    corner = squares[:, 0, 0, 0, 0]
    expected = corner[:, None, None] + torch.arange(5)[:, None] * 12 + torch.arange(5)
    assert torch.equal(squares[:, 0, 0], expected)
    assert (corner // 12).unique().tolist() == list(range(5))
    assert (corner % 12).unique().tolist() == list(range(8))
    with pytest.raises(ValueError, match="no square of 10 pixels"):
        augment.random_squares(frames, 10, Draws(0, 0, 50))
