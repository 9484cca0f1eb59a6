"""One training step of every image task as a good engineer writes it for one task on one device; for bench_tasks.py.

torchvision's transforms image by image for what is random per image, whole batches for the rest, timm's network called
directly, nothing logged. A function takes a task of mmssl, whose modules it uses and whose methods it does not, at the
settings of the task's defaults.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.layers.pos_embed_sincos import build_sincos2d_pos_embed
from torch import Tensor
from torchvision.transforms import v2

Net = Callable[[Tensor], Tensor]


class Hand(NamedTuple):
    """A task by hand: bytes -> inputs, without gradient; inputs -> loss; what follows the optimizer."""

    transform: Callable[[Tensor], tuple[Tensor, ...]]
    loss: Callable[..., Tensor]
    after: Callable[[], None] = lambda: None


def trunk(encoder: Any) -> Net:
    """Floats in [0, 1] -> pooled vectors, by timm's network alone."""
    return lambda x: encoder.backbone.net(encoder.normalize(x))


def each(transform: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    return torch.stack([transform(image) for image in images]).float() / 255


def crop(size: int, area: tuple[float, float] = (0.08, 1.0), ratio: tuple[float, float] = (1.0, 1.0)) -> v2.Compose:
    return v2.Compose([v2.RandomResizedCrop(size, area, ratio, antialias=True), v2.RandomHorizontalFlip()])


def view(
    size: int,
    area: tuple[float, float] = (0.08, 1.0),
    strength: float = 0.5,
    saturation: float = 0.4,
    blur: float = 0.5,
    solarize: float = 0.0,
) -> v2.Compose:
    jitter = v2.ColorJitter(0.8 * strength, 0.8 * strength, saturation * strength, 0.2 * strength)
    smooth = v2.GaussianBlur(2 * (size // 20) + 1, (0.1, 2.0))
    color = [v2.RandomApply([jitter], 0.8), v2.RandomGrayscale(0.2), v2.RandomApply([smooth], blur)]
    return v2.Compose(
        [crop(size, area, (3 / 4, 4 / 3)), *color, *([v2.RandomSolarize(128, solarize)] if solarize else [])]
    )


def two(first: v2.Compose, second: v2.Compose | None = None) -> Callable[[Tensor], tuple[Tensor]]:
    return lambda images: (torch.cat([each(first, images), each(second or first, images)]),)


def byol_views(size: int, area: tuple[float, float] = (0.08, 1.0)) -> Callable[[Tensor], tuple[Tensor]]:
    return two(view(size, area, blur=1.0), view(size, area, blur=0.1, solarize=0.2))


@torch.no_grad()
def follow(teacher: Any, leaders: list[Any], momentum: float) -> None:
    leading = [p for leader in leaders for p in leader.parameters()]
    for mine, theirs in zip(teacher.parameters(), leading, strict=True):
        mine.mul_(momentum).add_(theirs, alpha=1 - momentum)


def standardized(tiles: Tensor) -> Tensor:
    """To mean 0.5 and standard deviation 0.25, tile by tile."""
    mean, std = tiles.mean((-3, -2, -1), keepdim=True), tiles.std((-3, -2, -1), keepdim=True, correction=0)
    return (tiles - mean) / std.clamp(min=1 / 255) * 0.25 + 0.5


def rotation(task: Any, net: Net, size: int) -> Hand:
    square = crop(size)

    def transform(images: Tensor) -> tuple[Tensor, ...]:
        x = each(square, images)
        turn = torch.arange(4, device=x.device).repeat_interleave(len(x))
        return torch.cat([x.rot90(k, (2, 3)) for k in range(4)]), turn

    return Hand(transform, lambda x, turn: F.cross_entropy(task.head(net(x)), turn))


def jigsaw(task: Any, net: Net, size: int) -> Hand:
    cell = size // 3
    tile, shift, room = round(cell * 64 / 85), max(1, round(cell * 64 / 85 / 32)), size - 3 * cell
    axis = torch.tensor([-1.0, 2.0, -1.0], device=task.orders.device)
    plain = torch.eye(3, device=axis.device)
    mixes = torch.stack([torch.full_like(plain, 1 / 3), plain - torch.outer(axis, axis) / 6, plain])

    def transform(images: Tensor) -> tuple[Tensor, ...]:
        order = torch.randint(len(task.orders), (len(images),), device=images.device)
        tiles = []
        for image, places in zip(images, task.orders[order].tolist(), strict=True):
            top, left = random.randint(0, room), random.randint(0, room)
            for place in places:
                y = top + place // 3 * cell + random.randint(0, cell - shift - tile)
                x = left + place % 3 * cell + random.randint(0, cell - shift - tile)
                for channel in image:
                    dy, dx = y + random.randint(0, shift), x + random.randint(0, shift)
                    tiles.append(channel[dy : dy + tile, dx : dx + tile])
        puzzles = torch.stack(tiles).view(-1, 9, 3, tile, tile).float() / 255
        fate = torch.multinomial(torch.tensor([0.5, 0.25, 0.25], device=images.device), len(images), replacement=True)
        return standardized(torch.einsum("bdc,btcyx->btdyx", mixes[fate], puzzles)), order

    def loss(x: Tensor, order: Tensor) -> Tensor:
        return F.cross_entropy(task.head(task.each(net(x.flatten(0, 1))).view(len(x), -1)), order)

    return Hand(transform, loss)


def relative_position(task: Any, net: Net, size: int) -> Hand:
    patch = round(size * 96 / 398)
    jitter = max(1, round(patch * 7 / 96))
    gap = min(round(patch / 2), (size - 3 * patch - 2 * jitter) // 2)
    room = size - 3 * patch - 2 * gap - 2 * jitter
    square = v2.RandomResizedCrop(size, (1 / 3, 1.0), (1.0, 1.0), antialias=True)
    ahead = {4: (0, 1), 5: (1, -1), 6: (1, 0), 7: (1, 1)}  # of eight directions those whose opposites are 3 to 0
    cells = [(y, x) for y in range(3) for x in range(3)]
    lines = {
        k: torch.tensor([(3 * y + x, 3 * (y + dy) + x + dx) for y, x in cells if (y + dy, x + dx) in cells])
        for k, (dy, dx) in ahead.items()
    }
    direction = torch.tensor([k for k in ahead for _ in range(4)]).repeat(4)

    def coarse(x: Tensor) -> Tensor:
        if random.random() > 0.33:
            return x
        side = int(random.uniform(min(10, patch) ** 2, patch**2) ** 0.5)
        down = F.interpolate(x[None], size=(side, side), mode="bilinear", antialias=True)
        return F.interpolate(down, size=(patch, patch), mode="bilinear", antialias=True)[0]

    def transform(images: Tensor) -> tuple[Tensor, ...]:
        patches = []
        for x in each(square, images.repeat_interleave(4, 0)):
            top, left = random.randint(0, room), random.randint(0, room)
            for row, column in cells:
                y = top + row * (patch + gap) + random.randint(0, 2 * jitter)
                z = left + column * (patch + gap) + random.randint(0, 2 * jitter)
                patches.append(coarse(x[:, y : y + patch, z : z + patch]))
        x = torch.stack(patches).unflatten(0, (len(images), 36))
        kept = F.one_hot(torch.randint(3, x.shape[:2], device=x.device), 3).bool()[..., None, None]
        x = torch.where(kept, x - x.mean((3, 4), keepdim=True), (torch.rand_like(x) - 0.5) / 255) + 0.5
        picks = [lines[k][torch.rand(len(images), 4, len(lines[k])).argsort(-1)[..., :4]] for k in ahead]
        pairs = (torch.cat(picks, 2) + 9 * torch.arange(4)[:, None, None]).flatten(1, 2)
        pairs = torch.cat([pairs, pairs.flip(-1)], 1).to(x.device)
        return standardized(x), pairs, torch.cat([direction, 7 - direction]).to(x.device).repeat(len(x))

    def loss(x: Tensor, pairs: Tensor, directions: Tensor) -> Tensor:
        z = net(x.flatten(0, 1)).unflatten(0, x.shape[:2])
        both = z[torch.arange(len(z), device=z.device)[:, None, None], pairs].flatten(2)
        return F.cross_entropy(task.head(both).flatten(0, 1), directions)

    return Hand(transform, loss)


def autoencoder(task: Any, net: Net, size: int) -> Hand:
    square = crop(size)

    def loss(x: Tensor) -> Tensor:
        return F.mse_loss(task.decoder(task.spread(task.code(net(x))).unflatten(1, (-1, 4, 4)), x.shape[2:]), x)

    return Hand(lambda images: (each(square, images),), loss)


def dense(task: Any, x: Tensor, size: int) -> Tensor:
    """The decoder's answer to the last map with the pooled vector at each place."""
    encoder = task.encoders["image"]
    features = encoder.backbone.net.forward_features(encoder.normalize(x))
    pooled = encoder.backbone.net.forward_head(features, pre_logits=True)
    return task.decoder(features + pooled[:, :, None, None], (size, size))


def colorization(task: Any, net: Net, size: int) -> Hand:
    square, bins = crop(size, (0.4727, 0.4727)), task.bins
    xyz = torch.tensor([[0.412453, 0.357580, 0.180423], [0.212671, 0.715160, 0.072169], [0.019334, 0.119193, 0.950227]])
    xyz = (xyz / torch.tensor([[0.95047], [1.0], [1.08883]])).to(bins.device)
    prior, seen = torch.full((313,), 1 / 313, device=bins.device), torch.ones((), device=bins.device)

    def transform(images: Tensor) -> tuple[Tensor, ...]:
        rgb = each(square, images)
        linear = torch.where(rgb > 0.04045, ((rgb + 0.055) / 1.055) ** 2.4, rgb / 12.92)
        t = torch.einsum("dc,bcyx->bdyx", xyz, linear)
        x, y, z = torch.where(t > 0.008856, t ** (1 / 3), 7.787 * t + 16 / 116).unbind(1)
        ab = torch.stack([500 * (x - y), 200 * (y - z)], -1)[:, ::4, ::4]
        colored = (ab.abs() > 5).flatten(1).any(1)
        distance, near = torch.cdist(ab.flatten(0, 2), bins).topk(10, largest=False)
        target = torch.zeros(len(near), 313, device=bins.device).scatter_(1, near, (-(distance**2) / 50).softmax(1))
        weight = 1 / (0.5 * prior + 0.5 / 313)
        weight = (weight / (prior * weight).sum())[near[:, 0]] * colored.repeat_interleave(len(near) // len(ab))
        prior.mul_(seen).add_(target.view(len(ab), -1, 313).mean(1)[colored].sum(0))
        prior.div_(seen.add_(colored.sum()))
        return ((116 * y - 16) / 100)[:, None].expand(-1, 3, -1, -1), target, weight

    def loss(gray: Tensor, target: Tensor, weight: Tensor) -> Tensor:
        logits = dense(task, gray, size // 4).permute(0, 2, 3, 1).flatten(0, 2)
        error = F.cross_entropy(logits, target, reduction="none")
        return ((error.detach() + weight * (error - error.detach())) * (weight > 0)).sum() / (weight > 0).sum()

    return Hand(transform, loss)


def inpainting(task: Any, net: Net, size: int) -> Hand:
    judge, flip = task.discriminator, v2.RandomHorizontalFlip()
    rim, hole = slice(size // 4, size - size // 4), slice(size // 4 + 4, size - size // 4 - 4)

    def transform(images: Tensor) -> tuple[Tensor, ...]:
        x = each(flip, images)
        target = 2 * x[:, :, rim, rim] - 1
        x[:, :, hole, hole] = task.fill
        return x, target

    def loss(x: Tensor, target: Tensor) -> Tensor:
        fake = dense(task, x, size)[:, :, rim, rim]
        weight = torch.full_like(target[:, :1], 10)
        weight[:, :, 4:-4, 4:-4] = 1
        judge.requires_grad_(False)
        fooled = judge(fake)
        judge.requires_grad_(True)
        painted = 0.999 * (weight * (fake - target) ** 2).mean() + 0.001 * F.softplus(-fooled).mean()
        return painted + F.softplus(-judge(target)).mean() + F.softplus(judge(fake.detach())).mean()

    return Hand(transform, loss)


def masked_autoencoder(task: Any, net: Net, size: int) -> Hand:
    encoder, decoder, square = task.encoders["image"], task.decoder, crop(size, (0.2, 1.0), (3 / 4, 4 / 3))
    vit, patch, side = encoder.backbone.net, task.pixels.patch[0], size // task.pixels.patch[0]
    places = build_sincos2d_pos_embed([side, side], len(decoder.mask_token), interleave_sin_cos=True)
    places = F.pad(places, (0, 0, 1, 0)).to(decoder.mask_token.device)

    def pick(tokens: Tensor, index: Tensor) -> Tensor:
        return tokens.gather(1, index[:, :, None].expand(-1, -1, tokens.shape[2]))

    def loss(x: Tensor) -> Tensor:
        x = encoder.normalize(x)
        target = F.unfold(x, patch, stride=patch).unflatten(1, (3, -1)).permute(0, 3, 2, 1).flatten(2)
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
        shuffle = torch.rand(len(x), side * side, device=x.device).argsort(1)
        restore, keep = shuffle.argsort(1), side * side // 4
        tokens = pick(vit.patch_embed(x).flatten(1, 2) + vit.pos_embed[:, 1:], shuffle[:, :keep])
        first = (vit.cls_token + vit.pos_embed[:, :1]).expand(len(x), -1, -1)
        z = decoder.embed(vit.norm(vit.blocks(torch.cat([first, tokens], 1))))
        blank = decoder.mask_token.expand(len(x), side * side - keep, -1)
        z = torch.cat([z[:, :1], pick(torch.cat([z[:, 1:], blank], 1), restore)], 1) + places
        pixels = decoder.head(decoder.norm(decoder.blocks(z)))[:, 1:]
        hidden = (restore >= keep).float()
        return ((pixels - target).square().mean(-1) * hidden).sum() / hidden.sum()

    return Hand(lambda images: (each(square, images),), loss)


def simclr(task: Any, net: Net, size: int) -> Hand:
    def loss(x: Tensor) -> Tensor:
        z = F.normalize(task.projection(net(x)), dim=1)
        logits = (z @ z.T / 0.1).fill_diagonal_(-math.inf)
        return F.cross_entropy(logits, torch.arange(len(z), device=z.device).roll(len(z) // 2))

    return Hand(two(view(size, strength=1.0, saturation=0.8)), loss)


def moco(task: Any, net: Net, size: int) -> Hand:
    taught, keys, place = trunk(task.teacher["encoder"]), task.queue[:0], 0

    def grouped(net: Net, x: Tensor) -> Tensor:
        return torch.cat([net(part) for part in x.chunk(8)])

    def loss(x: Tensor) -> Tensor:
        nonlocal keys
        a, b = x.chunk(2)
        q = F.normalize(task.projection(grouped(net, a)), dim=1)
        with torch.no_grad():
            order = torch.randperm(len(b), device=b.device)
            keys = F.normalize(task.teacher["projection"](grouped(taught, b[order])[order.argsort()]), dim=1)
        logits = torch.cat([(q * keys).sum(1, keepdim=True), q @ task.queue.T], 1) / 0.2
        return F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long, device=q.device))

    def after() -> None:
        nonlocal place
        follow(task.teacher, [task.encoders["image"], task.projection], 0.999)
        task.queue[place : place + len(keys)] = keys
        place = (place + len(keys)) % len(task.queue)

    return Hand(two(view(size, (0.2, 1.0), saturation=0.8)), loss, after)


def byol(task: Any, net: Net, size: int) -> Hand:
    taught = trunk(task.target["encoder"])

    def loss(x: Tensor) -> Tensor:
        p = task.prediction(task.projection(net(x)))
        with torch.no_grad():
            z = task.target["projection"](taught(x)).roll(len(x) // 2, 0)
        return 4 - 4 * F.cosine_similarity(p, z).mean()

    leaders = [task.encoders["image"], task.projection]
    return Hand(byol_views(size), loss, lambda: follow(task.target, leaders, 0.996))


def simsiam(task: Any, net: Net, size: int) -> Hand:
    def loss(x: Tensor) -> Tensor:
        z = task.projection(net(x))
        return -F.cosine_similarity(task.prediction(z), z.detach().roll(len(x) // 2, 0)).mean()

    return Hand(two(view(size, (0.2, 1.0), saturation=0.8)), loss)


def barlow_twins(task: Any, net: Net, size: int) -> Hand:
    def loss(x: Tensor) -> Tensor:
        a, b = (F.batch_norm(z, None, None, training=True) for z in task.projection(net(x)).chunk(2))
        c = a.T @ b / len(a)
        redundancy = c.square().sum() - c.diagonal().square().sum()
        return (c.diagonal() - 1).square().sum() + 0.0051 * redundancy

    return Hand(byol_views(size), loss)


def vicreg(task: Any, net: Net, size: int) -> Hand:
    def regularize(z: Tensor) -> Tensor:
        z = z - z.mean(0)
        c = z.T @ z / (len(z) - 1)
        hinge = F.relu(1 - (z.var(0) + 1e-4).sqrt()).mean() / 2
        return 25 * hinge + (c.square().sum() - c.diagonal().square().sum()) / z.shape[1]

    def loss(x: Tensor) -> Tensor:
        a, b = task.expander(net(x)).chunk(2)
        return 25 * F.mse_loss(a, b) + regularize(a) + regularize(b)

    return Hand(byol_views(size), loss)


def dino(task: Any, net: Net, size: int) -> Hand:
    taught, center, patch = trunk(task.teacher["encoder"]), task.center, task.encoders["image"].patch_size[0]
    large, small = byol_views(size, (0.4, 1.0)), view(round(size * 96 / 224 / patch) * patch, (0.05, 0.4))
    mean = center

    def head(part: Any, pooled: Tensor) -> Tensor:
        return F.linear(F.normalize(part.mlp(pooled), dim=-1), F.normalize(part.prototypes.weight, dim=-1))

    def loss(whole: Tensor, part: Tensor) -> Tensor:
        nonlocal mean
        rows = len(whole) // 2
        student = (head(task.head, torch.cat([net(whole), net(part)])) / 0.1).log_softmax(-1).split(rows)
        with torch.no_grad():
            logits = head(task.teacher["head"], taught(whole))
            teacher, mean = ((logits - center) / 0.04).softmax(-1).split(rows), logits.mean(0)
        pairs = [-(t * s).sum(-1).mean() for i, t in enumerate(teacher) for j, s in enumerate(student) if i != j]
        return torch.stack(pairs).mean()

    def after() -> None:
        follow(task.teacher, [task.encoders["image"], task.head], 0.996)
        center.mul_(0.9).add_(mean, alpha=0.1)

    return Hand(lambda x: (*large(x), torch.cat([each(small, x) for _ in range(8)])), loss, after)


CNN = {"model": "timm/resnet10t", "channels": [32, 64, 128, 256], "stem_width": 16}
VIT = {"model": "timm/vit_tiny_patch16_224", "patch_size": 8, "embed_dim": 64, "depth": 4, "num_heads": 4}
TASKS: dict[Callable[[Any, Net, int], Hand], dict[str, Any]] = {
    rotation: {},
    jigsaw: {"tile_width": 128, "hidden": 512},
    relative_position: {"hidden": 512},
    autoencoder: {"width": 64},
    colorization: {"width": 64},
    inpainting: {"width": 64, "discriminator_width": 16},
    masked_autoencoder: {"decoder_depth": 2, "decoder_width": 64, "decoder_heads": 4},
    simclr: {},
    moco: {"queue": 4096},
    byol: {"hidden": 512},
    simsiam: {"width": 512, "bottleneck": 128},
    barlow_twins: {"width": 512, "hidden": 512},
    vicreg: {"width": 512, "hidden": 512},
    dino: {"prototypes": 1024, "hidden": 256, "bottleneck": 64, "freeze_last": 0.0},
}
