"""Lab equal to scikit-image's, and the 313 colors with the errors of their encoding."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from skimage.color import lab2rgb, rgb2lab

from mmssl.ops.color import annealed_mean, bins_nearby, color_bins, lab_to_rgb, rgb_to_lab, soft_encode

pytestmark = pytest.mark.usefixtures("double")


def cube(step: int = 15) -> torch.Tensor:
    """The sRGB cube as pictures (N, 3, 18, 18), black, white, grays and the dark end of the curve among them."""
    line = torch.arange(0, 256, step) / 255
    return torch.stack(torch.meshgrid(line, line, line, indexing="ij"), 1).contiguous()


def random_colors(n: int = 20000) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return rgb_to_lab(torch.rand(1, 3, 1, n, generator=generator))[:, 1:]


def test_lab_is_that_of_scikit_image():
    fine = torch.linspace(0, 0.06, 60).expand(1, 3, 1, 60)  # both sides of where the curve becomes a line
    for images in (cube(), fine):
        expected = rgb2lab(images.numpy(), channel_axis=1)
        found = rgb_to_lab(images)
        np.testing.assert_allclose(found.numpy(), expected, atol=1e-10)
        np.testing.assert_allclose(rgb_to_lab(images.float()).numpy(), expected, atol=2e-3)
        np.testing.assert_allclose(lab_to_rgb(found).numpy(), lab2rgb(expected, channel_axis=1), atol=1e-10)
        np.testing.assert_allclose(lab_to_rgb(found).numpy(), images.numpy(), atol=1e-5)


@pytest.mark.filterwarnings("ignore:Conversion from CIE-LAB")
def test_colors_outside_of_srgb_are_clipped_as_scikit_image_does():
    generator = torch.Generator().manual_seed(0)
    lab = torch.rand(1, 3, 50, 80, generator=generator) * 300 - 150
    lab[:, 0] = lab[:, 0].abs().clamp(max=110)
    lab[..., :2] = torch.tensor([0.0, 120, 120])[:, None, None]  # of so much yellow that Z would be below 0
    rgb = lab_to_rgb(lab)
    assert rgb.min() == 0
    assert rgb.max() == 1
    np.testing.assert_allclose(rgb.numpy(), lab2rgb(lab.numpy(), channel_axis=1), atol=1e-10)


def test_black_and_white_have_finite_gradients():
    images = torch.tensor([0.0, 1.0, 0.04045]).expand(1, 3, 1, 3).clone().requires_grad_()
    rgb_to_lab(images).sum().backward()
    assert torch.isfinite(images.grad).all()
    lab = torch.tensor([0.0, 100.0, 50.0])[:, None] * torch.tensor([1.0, 0.0, 0.0])
    lab = lab.T[None, :, None].clone().requires_grad_()
    lab_to_rgb(lab).sum().backward()
    assert torch.isfinite(lab.grad).all()


@pytest.mark.long
def test_the_table_has_313_colors_that_hold_those_of_rounded_srgb():
    bins = {tuple(row) for row in color_bins().int().tolist()}
    assert color_bins().shape == (313, 2)
    assert len(bins) == 313
    ab = rgb_to_lab(cube(3))[:, 1:]  # every third value a channel already meets all of them
    rounded = {
        tuple(row) for row in (ab / 10).round().int().mul(10).movedim(1, -1).reshape(-1, 2).unique(dim=0).tolist()
    }
    assert len(rounded) == 261
    assert rounded < bins
    # The rows as published: a -> lowest and highest b.
    for a, low, high in [(-90, 50, 90), (-50, -30, 100), (0, -70, 100), (40, -100, 90), (90, -110, 70), (100, -90, 0)]:
        row = [b for x, b in bins if x == a]
        assert (min(row), max(row), len(row)) == (low, high, (high - low) // 10 + 1)


def test_soft_code_on_a_bin():
    bins = color_bins()
    index, share = soft_encode(torch.tensor([10.0, 20.0])[None, :, None, None], bins, bins_nearby(bins, 10))
    assert bins[index[0, 0, 0, 0]].tolist() == [10, 20]
    expected = torch.tensor([0.6192, *[0.0838] * 4, *[0.0113] * 4, 0.0002])
    torch.testing.assert_close(share.flatten(), expected, atol=5e-5, rtol=0)


@pytest.mark.quick(1)
@pytest.mark.parametrize(("neighbors", "mean", "largest"), [(10, 0.235, 0.353), (5, 0.221, 0.705), (1, 3.82, 7.06)])
def test_a_color_survives_its_code(neighbors, mean, largest):
    ab, bins = random_colors(), color_bins()
    index, share = soft_encode(ab, bins, bins_nearby(bins, neighbors), neighbors=neighbors)
    torch.testing.assert_close(share.sum(1), torch.ones_like(share[:, 0]))
    back = (bins[index] * share[..., None]).sum(1).movedim(-1, 1)
    error = (back - ab).norm(dim=1)
    assert float(error.mean()) == pytest.approx(mean, rel=0.01)
    assert float(error.max()) == pytest.approx(largest, rel=0.03)


@pytest.mark.long
def test_the_annealed_mean_of_a_code_is_near_its_color():
    ab, bins = random_colors(), color_bins()
    index, share = soft_encode(ab, bins, bins_nearby(bins, 10))
    code = torch.zeros(1, 313, *ab.shape[2:]).scatter(1, index, share)
    error = (annealed_mean(code.log(), bins) - ab).norm(dim=1)
    assert float(error.mean()) == pytest.approx(1.81, abs=0.02)
    assert float(error.max()) == pytest.approx(2.71, abs=0.05)


def test_neighbors_are_those_of_a_full_sort():
    bins = color_bins()
    corners = rgb_to_lab(cube(85))[:, 1:].movedim(1, 0).reshape(1, 2, 1, -1)  # as far out as sRGB reaches
    ab = torch.cat([random_colors(4000), corners], 3)
    index, share = soft_encode(ab, bins, bins_nearby(bins, 10))
    points = ab[0, :, 0].T.numpy()
    distance = np.sqrt(((points[:, None] - bins.numpy()) ** 2).sum(-1))
    expected = np.sort(distance, 1)[:, :10]
    np.testing.assert_allclose(np.take_along_axis(distance, index[0, :, 0].T.numpy(), 1), expected)
    gaussian = np.exp(-(expected**2) / 50)
    np.testing.assert_allclose(share[0, :, 0].T.numpy(), gaussian / gaussian.sum(1, keepdims=True), atol=1e-12)
