"""Image and sound augmentation on the device: one random draw a sample, whole batches at a time.

Each function takes its random choices as tensors with one entry a sample, so that it can be compared with any other
implementation; `draw_*` makes those choices from `Draws`, with the distributions of torchvision. Images are floats in
[0, 1], (N, 3, H, W). Cropping, resizing and flipping are two small matrices a sample: exactly torchvision's antialiased
resize, bilinear or bicubic, and a fast batched product on any device.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mmssl.ops.draws import Draws
from mmssl.ops.transfers import chosen_rows, upload

Range = tuple[float, float]
Interpolation = Literal["bilinear", "bicubic"]

_LUMA = (0.2989, 0.587, 0.114)
_TRIES = 10
# Rows that are augmented together on a CPU: about what its caches hold, and still many operations a call.
_CPU_PIXELS = 1 << 17
# Sides up to which products of small matrices resize faster than one image after another, on a CPU.
_PRODUCT_SIDE = 64
# Pixels that are blurred by one product.
_BLOCK = 16


def draw_crops(
    draws: Draws,
    views: int,
    height: int,
    width: int,
    *,
    area: Range = (0.08, 1.0),
    ratio: Range = (3 / 4, 4 / 3),
    aspect: Tensor | None = None,
) -> Tensor:
    """Random boxes with the distribution of torchvision's RandomResizedCrop.

    Share of the area and log of the aspect ratio are uniform among boxes that fit; the first of ten that fits is taken,
    the largest centered one otherwise. In a squeezed picture those boxes are drawn that hold what RandomResizedCrop
    takes of the picture as it was: resized to a square, they are in their right shape.

    Args:
        draws: source of randomness.
        views: V, boxes a row.
        height: of the image, in pixels.
        width: of the image, in pixels.
        area: smallest and largest share of the image.
        ratio: smallest and largest width / height.
        aspect: (B,), width / height of the pictures that were squeezed to these images; None where nothing was.

    Returns:
        int64 (B, V, 4): top, left, height, width in pixels of the image.

    Raises:
        ValueError: for an area that is no range of shares.
    """
    if not 0 < area[0] <= area[1] <= 1:
        raise ValueError(
            f"area = {area} should be the smallest and the largest share of the image, above 0 and up to 1"
        )
    share = draws.uniform(views, _TRIES, low=area[0], high=area[1])
    shape = draws.uniform(views, _TRIES, low=math.log(ratio[0]), high=math.log(ratio[1])).exp()
    if aspect is not None:
        stretch = aspect.to(shape.dtype) * (height / width)  # width of a pixel over its height, as it was
        shape = shape / stretch[:, None, None]
    place = draws.uniform(views, 2)
    target = share * (height * width)
    sizes = torch.stack([(target / shape).sqrt(), (target * shape).sqrt()], -1).round().long()
    limit = upload([height, width], sizes.device)
    fits = ((sizes > 0) & (sizes <= limit)).all(-1)
    if aspect is None:
        nearest = max(ratio[0], min(width / height, ratio[1]))
        fallback = upload([min(height, round(width / nearest)), min(width, round(height * nearest))], sizes.device)
    else:
        nearest_of_each = aspect.to(shape.dtype).clamp(*ratio) / stretch
        whole = torch.stack([width / nearest_of_each, height * nearest_of_each], -1).round().long()
        fallback = whole.clamp(min=1).minimum(limit)[:, None]
    first = fits.int().argmax(-1)[..., None, None].expand(-1, -1, 1, 2)
    any_fits = fits.any(-1, keepdim=True)
    size = torch.where(any_fits, sizes.gather(2, first).squeeze(2), fallback)
    free = limit - size
    corner = torch.where(any_fits, (place * (free + 1)).long().minimum(free), free // 2)
    return torch.cat([corner, size], -1)


def squares_of_squeezed(images: Tensor, aspect: Tensor, size: int, draws: Draws | None) -> Tensor:
    """Boxes (B, 4) of squares in the pictures as they were, whose shorter sides count as long as the image's.

    Args:
        images: (..., H, W), squeezed.
        aspect: (B,), see `draw_crops`.
        size: of the squares, in pixels of that picture.
        draws: source of random places; None for the center.

    Raises:
        ValueError: where the squares do not fit.
    """
    height, width = images.shape[-2:]
    if size > min(height, width):
        raise ValueError(f"no square of {size} pixels fits into images of {height} x {width}")
    limit = upload([height, width], aspect.device)
    # The shorter side counts as long as it is; the longer one was shortened by the aspect ratio.
    shrunk = torch.stack([aspect.clamp(max=1), (1 / aspect).clamp(max=1)], -1)
    extent = (shrunk * size * limit / min(height, width)).round().long().clamp(min=1).minimum(limit)
    free = limit - extent
    corner = free // 2 if draws is None else (draws.uniform(2) * (free + 1)).long().minimum(free)
    return torch.cat([corner, extent], -1)


def _linear(distance: Tensor) -> Tensor:
    return (1 - distance.abs_()).clamp_(min=0)


def _cubic(distance: Tensor) -> Tensor:
    """Keys' kernel with a = -1/2, as PIL and torch have it where they antialias."""
    x = distance.abs_()
    near, far = (1.5 * x - 2.5) * x * x + 1, ((2.5 - 0.5 * x) * x - 4) * x + 2
    return torch.where(x < 1, near, torch.where(x < 2, far, 0.0))


_KERNELS = {"bilinear": _linear, "bicubic": _cubic}


def resize_matrix(
    start: Tensor,
    length: Tensor,
    source: int,
    size: int,
    mirror: Tensor | None = None,
    interpolation: Interpolation = "bilinear",
) -> Tensor:
    """Weights (N, size, source) of the antialiased resize of `source[start : start + length]` to `size`."""
    dtype = torch.get_default_dtype()
    place = torch.arange(size, device=start.device, dtype=dtype) + 0.5
    if mirror is not None:
        place = torch.where(mirror[:, None], size - place, place)
    scale = (length.to(dtype) / size)[:, None]
    center = (start[:, None] + place * scale)[..., None]
    pixel = torch.arange(source, device=start.device, dtype=dtype) + 0.5
    weight = _KERNELS[interpolation]((pixel - center) / scale.clamp(min=1)[..., None])
    inside = (pixel > start[:, None]) & (pixel < (start + length)[:, None])
    weight *= inside[:, None, :]
    return weight / weight.sum(-1, keepdim=True)


def resized_crop(
    images: Tensor, boxes: Tensor, size: int, flip: Tensor, interpolation: Interpolation = "bilinear"
) -> Tensor:
    """Cut one box out of each image, resize it to a square, mirror some.

    Args:
        images: uint8 or float in [0, 1], (N, 3, H, W).
        boxes: int64 (N, 4), see `draw_crops`.
        size: of the result, in pixels.
        flip: bool (N,), True where mirrored left to right.
        interpolation: `bicubic` is sharper, and cut to [0, 1].

    Returns:
        Float in [0, 1], (N, 3, size, size).
    """
    n, channels, height, width = images.shape
    if images.device.type == "cpu" and max(height, width, size) > _PRODUCT_SIDE:
        return _resize_one_by_one(images, boxes, size, flip, interpolation)
    top, left, tall, wide = boxes.unbind(-1)
    rows = resize_matrix(top, tall, height, size, interpolation=interpolation)
    columns = resize_matrix(left, wide, width, size, flip, interpolation)
    if images.dtype == torch.uint8:
        columns = columns / 255
    across = images.to(columns.dtype).reshape(n, channels * height, width) @ columns.mT
    resized = rows[:, None] @ across.view(n, channels, height, size)
    return resized.clamp_(0, 1) if interpolation == "bicubic" else resized


def _resize_one_by_one(images: Tensor, boxes: Tensor, size: int, flip: Tensor, interpolation: Interpolation) -> Tensor:
    """`resized_crop` without products with the zeros of its matrices, which are most of the work on large images."""
    whole = torch.empty(len(images), images.shape[1], size, size, dtype=torch.get_default_dtype())
    for row, (top, left, tall, wide, mirrored) in enumerate(torch.cat([boxes, flip[:, None]], 1).tolist()):
        cut = images[row : row + 1, :, top : top + tall, left : left + wide].to(whole.dtype)
        resized = F.interpolate(cut, (size, size), mode=interpolation, antialias=True)[0]
        whole[row] = resized.flip(-1) if mirrored else resized
    whole = whole.div_(255) if images.dtype == torch.uint8 else whole
    return whole.clamp_(0, 1) if interpolation == "bicubic" else whole


def random_squares(frames: Tensor, size: int, draws: Draws) -> Tensor:
    """One random square of `size` pixels a clip, the same in all frames: (B, T, C, H, W) -> (B, T, C, size, size).

    Raises:
        ValueError: where the frames are smaller.
    """
    rows, _, _, height, width = frames.shape
    if min(height, width) < size:
        raise ValueError(f"no square of {size} pixels fits into frames of {height} x {width}")
    free = upload([height - size + 1, width - size + 1], frames.device)
    corner = (draws.uniform(2) * free).long().minimum(free - 1)
    line = torch.arange(size, device=frames.device)
    down, across = (corner[:, :1] + line).view(rows, 1, 1, size, 1), (corner[:, 1:] + line).view(rows, 1, 1, 1, size)
    strip = frames.gather(3, down.expand(*frames.shape[:3], size, width))
    return strip.gather(4, across.expand(*strip.shape[:4], size))


def gray(images: Tensor) -> Tensor:
    """Luma (N, 1, H, W) of (N, 3, H, W)."""
    red, green, blue = images.unbind(1)
    return (red * _LUMA[0]).add_(green, alpha=_LUMA[1]).add_(blue, alpha=_LUMA[2])[:, None]


def shift_hue(images: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue of each image by `shift` (N,) of a full circle; value and saturation stay."""
    red, green, blue = images.unbind(1)
    high = torch.maximum(red, green).clamp_(min=blue)
    low = torch.minimum(red, green).clamp_(max=blue)
    chroma = high - low
    # In sixths of the circle from red, by arithmetic alone, for choices between tensors are slow on a CPU. Scaled to
    # [0, 1], the distance from red is 1 - red + green + blue on both sides; the sign tells the nearer of the others.
    hue = (green + blue).sub_(red).sub_(low).mul_(chroma.clamp(min=1e-20).reciprocal_()).add_(1)
    hue.copysign_(green - blue).add_(6 * shift[:, None, None])
    hue.sub_((hue / 6).floor_(), alpha=6)
    result = torch.empty_like(images)
    for channel, (center, sign, level) in enumerate(((3, 1, -1), (2, -1, 2), (4, -1, 2))):
        share = (hue - center).abs_().mul_(sign).add_(level).clamp_(0, 1)
        torch.addcmul(low, chroma, share, out=result[:, channel])
    return result


def draw_jitter(draws: Draws, views: int, *, strength: float = 1.0, saturation: float = 0.8) -> tuple[Tensor, Tensor]:
    """What `color_jitter` takes: factors (B, V, 4) and order (B, V, 4), all uniform.

    Args:
        draws: source of randomness.
        views: V, of each row.
        strength: s of SimCLR: brightness, contrast in 1 ± 0.8 s (not below 0), hue in ± 0.2 s.
        saturation: in 1 ± this times s; 0.8 in SimCLR, half of that in BYOL and its successors.
    """
    reach = upload([0.8, 0.8, saturation], draws.device) * strength
    hue = upload([0.2 * strength], draws.device)
    low, high = torch.cat([(1 - reach).clamp(min=0), -hue]), torch.cat([1 + reach, hue])
    return draws.uniform(views, 4) * (high - low) + low, draws.uniform(views, 4).argsort(-1)


def color_jitter(images: Tensor, factors: Tensor, order: Tensor) -> Tensor:
    """Brightness, contrast, saturation and hue, each image in an order of its own.

    Args:
        images: (N, 3, H, W) in [0, 1].
        factors: (N, 4): factors of brightness, contrast and saturation (1 changes nothing), shift of hue in circles.
        order: int64 (N, 4), one permutation of 0..3 a row: which of the four comes first, second ...

    Returns:
        (N, 3, H, W) in [0, 1].
    """
    for turn, rows in zip(order.unbind(1), chosen_rows(order.mT == 3), strict=True):
        factor = factors.gather(1, turn[:, None])[:, 0]
        is_hue = turn == 3
        # The first three blend with black, with the mean luma or with the luma.
        luma = gray(images)
        mean = luma.mean((2, 3), keepdim=True)
        keep = torch.where(is_hue, 1.0, factor)[:, None, None, None]
        rest = 1 - keep
        luma *= torch.where(turn == 2, 1.0, 0.0)[:, None, None, None] * rest
        luma += mean * torch.where(turn == 1, 1.0, 0.0)[:, None, None, None] * rest
        images = (images * keep).add_(luma).clamp_(0, 1)
        images.index_copy_(0, rows, shift_hue(images.index_select(0, rows), factor[rows]))
    return images


def gaussian_blur(images: Tensor, sigma: Tensor, kernel: int) -> Tensor:
    """Separable Gaussian blur with reflected borders.

    Args:
        images: (N, C, H, W).
        sigma: (N,), in pixels.
        kernel: odd number of taps.
    """
    radius = kernel // 2
    taps = torch.arange(-radius, radius + 1, device=images.device)
    # Far taps are exactly 0: products with denormal numbers are slow.
    weight = F.threshold(torch.exp(-0.5 * (taps / sigma[:, None].to(images.dtype)) ** 2), 1e-20, 0.0)
    weight = weight / weight.sum(1, keepdim=True)
    # A matrix product for each block of pixels: all of the image at once would be mostly products with 0.
    window = _BLOCK + kernel - 1
    place = torch.arange(_BLOCK, device=images.device)[:, None] + torch.arange(kernel, device=images.device)
    empty = torch.zeros(len(sigma), _BLOCK, window, device=images.device, dtype=images.dtype)
    band = empty.scatter_(2, place.expand(len(sigma), -1, -1), weight[:, None].expand(-1, _BLOCK, -1))

    n, channels, height, width = images.shape
    down, across = (-length % _BLOCK for length in (height, width))
    padded = F.pad(F.pad(images, (radius, radius, radius, radius), mode="reflect"), (0, across, 0, down))
    lines = padded.unfold(3, window, _BLOCK).reshape(n, -1, window) @ band.mT
    columns = lines.view(n, channels, -1, width + across).unfold(2, window, _BLOCK)
    blurred = band[:, None, None] @ columns.mT
    return blurred.reshape(n, channels, height + down, width + across)[..., :height, :width]


def random_views(
    images: Tensor,
    draws: Draws,
    views: int,
    size: int,
    *,
    area: Range = (0.08, 1.0),
    flip: float = 0.5,
    jitter: float = 0.8,
    strength: float = 1.0,
    saturation: float = 0.8,
    grayscale: float = 0.2,
    blur: float = 0.5,
    solarize: float = 0.0,
    interpolation: Interpolation = "bilinear",
    aspect: Tensor | None = None,
) -> Tensor:
    """SimCLR's augmentation (arXiv 2002.05709, appendix A): crop, flip, jitter, gray, blur, each view on its own.

    With `solarize`, BYOL's (arXiv 2006.07733, appendix B).

    Args:
        images: uint8 or float in [0, 1], (B, 3, H, W); or clips (B, T, 3, H, W), all frames of which a view changes
            alike.
        draws: source of randomness.
        views: V, views of each image.
        size: of a view, in pixels.
        area: smallest and largest share of the image that a crop covers.
        flip: probability.
        jitter: probability of color jitter.
        strength: see `draw_jitter`.
        saturation: see `draw_jitter`.
        grayscale: probability.
        blur: probability; kernel a tenth of the size, sigma from 0.1 to 2 pixels.
        solarize: probability that what is brighter than 0.5 is inverted.
        interpolation: of the crop.
        aspect: (B,), of squeezed images; see `draw_crops`.

    Returns:
        Float in [0, 1], (B, V, 3, size, size) or (B, V, T, 3, size, size).
    """
    shape = (-1, views, *images.shape[1:-2], size, size)
    frames = images.shape[1] if images.ndim == 5 else 1
    images = images.flatten(0, -4)
    n, device = len(images) * views, images.device
    boxes = draw_crops(draws, views, *images.shape[-2:], area=area, aspect=aspect).flatten(0, 1)
    mirrored = draws.chance(flip, views).flatten()
    jitters = draw_jitter(draws, views, strength=strength, saturation=saturation)
    factors, order = (values.flatten(0, 1) for values in jitters)
    jittered = draws.chance(jitter, views).flatten()
    grayed = draws.chance(grayscale, views).flatten()
    blurred = draws.chance(blur, views).flatten()
    sigma = draws.uniform(views, low=0.1, high=2.0).flatten()
    solarized = draws.chance(solarize, views).flatten()
    chosen = torch.stack([jittered, grayed, blurred, solarized])
    kernel = 2 * (size // 20) + 1

    def augment(pictures: Tensor) -> Tensor:
        rows = pictures // frames  # of what was drawn for each view
        frame = images[rows // views * frames + pictures % frames]
        out = resized_crop(frame, boxes[rows], size, mirrored[rows], interpolation)
        changes: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (
            lambda part, at: color_jitter(part, factors[at], order[at]),
            lambda part, at: gray(part).expand_as(part),
            lambda part, at: gaussian_blur(part, sigma[at], kernel),
            lambda part, at: torch.minimum(part, 1 - part),  # solarized
        )
        for change, which in zip(changes, chosen_rows(chosen[:, rows]), strict=True):
            if len(which):
                out.index_copy_(0, which, change(out.index_select(0, which), rows[which]))
        return out

    together = n if device.type != "cpu" else max(1, _CPU_PIXELS // size**2)
    everything = torch.arange(n, device=device)
    return torch.cat([augment(pictures) for pictures in everything.split(together)]).view(shape)
