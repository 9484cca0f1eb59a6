"""A small task and an in-memory loader: the smallest thing that the loop can train."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mmssl.batch import Batch
from mmssl.encoders.base import Encoder, Features
from mmssl.objectives.base import Chance, Objective
from mmssl.ops.draws import Draws, mix_seed
from mmssl.ops.gather import gather, process_share


class TinyEncoder(Encoder):
    """Mean color of four quadrants, then an MLP."""

    modality = "image"

    def __init__(self, dim: int = 8, dropout: float = 0.0) -> None:
        super().__init__()
        self.dim = dim
        self.spec = {"model": "test/tiny", "modality": "image"}
        self.net = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Dropout(dropout), nn.Linear(16, dim))

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Features:
        x = x.to(self.net[0].weight.dtype)
        pooled = self.net(nn.functional.adaptive_avg_pool2d(x / 255 if x.max() > 2 else x, 2).flatten(1))
        return Features(pooled[:, None], pooled, (1,))


class Denoise(Objective):
    """Predict the mean of a random share of the pixels: a mean over a count that differs from row to row."""

    needs = ("image",)
    divisors = ("chosen_rows",)

    def __init__(self, encoders: dict[str, Encoder]) -> None:
        super().__init__(encoders)
        self.head = nn.Linear(self.encoder("image").dim, 3)

    def chance(self, rows: int) -> Chance:
        return Chance(1.0)

    @torch.no_grad()
    def transform(self, batch: Batch, draws: Draws) -> Batch:
        image = batch["image"].to(torch.get_default_dtype()) / 255
        noisy = image + 0.1 * draws.normal(*image.shape[1:])
        chosen = draws.uniform() < 0.5
        return {"image": noisy, "target": image.mean((2, 3)), "chosen": chosen, "chosen_rows": chosen.sum()}

    def predict(self, inputs: Batch) -> Batch:
        return {"guess": self.head(self.encoder("image")(inputs["image"]).pooled)}

    def loss(self, outputs: Batch, inputs: Batch) -> dict[str, Tensor]:
        error = (outputs["guess"] - inputs["target"]).square().mean(1)
        return {"loss": (error * inputs["chosen"]).sum() / inputs["chosen_rows"]}


class Pull(Objective):
    """Two noisy views attract, all other rows repel; the temperature belongs to the loss; a queue is its state."""

    needs = ("image",)
    meets = "loss"

    def __init__(self, encoders: dict[str, Encoder]) -> None:
        super().__init__(encoders)
        self.scale = nn.Parameter(torch.tensor([1.0]))
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(self.encoder("image").dim))
        self.latest: Tensor | None = None

    def chance(self, rows: int) -> Chance:
        return Chance(float(torch.tensor(rows).log()), {"accuracy": 1 / rows})

    @torch.no_grad()
    def transform(self, batch: Batch, draws: Draws) -> Batch:
        image = batch["image"].to(torch.get_default_dtype()) / 255
        return {"views": image[:, None] + 0.1 * draws.normal(2, *image.shape[1:])}

    def predict(self, inputs: Batch) -> Batch:
        views = inputs["views"]
        z = self.encoder("image")(views.flatten(0, 1)).pooled.unflatten(0, views.shape[:2])
        return {"z": nn.functional.normalize(z, dim=2)}

    def loss(self, outputs: Batch, inputs: Batch) -> dict[str, Tensor]:
        a, b = outputs["z"].unbind(1)
        everyone = gather(b)
        logits = self.scale.exp() * a @ everyone.T
        target = torch.arange(len(a)) + process_share()[0] * len(a)
        self.latest = everyone.detach().mean(0)
        accuracy = (logits.argmax(1) == target).to(logits.dtype).mean()
        return {"loss": nn.functional.cross_entropy(logits, target), "accuracy": accuracy}

    def after_step(self, progress: float) -> None:
        self.seen += 1
        if self.latest is not None:
            self.mean.lerp_(self.latest, 0.1)
        self.scale.clamp_(max=3.0)


class MemoryLoader:
    """This process's rows of batches drawn from (seed, step)."""

    def __init__(self, rows: int = 8, seed: int = 0, size: int = 8) -> None:
        self.rows, self.seed, self.size = rows, seed, size

    def batches(self, start: int, stop: int) -> Iterator[Batch]:
        share, shares = process_share()
        local = self.rows // shares
        for step in range(start, stop):
            generator = torch.Generator().manual_seed(mix_seed(self.seed, step))
            image = torch.randint(0, 256, (self.rows, 3, self.size, self.size), generator=generator, dtype=torch.uint8)
            image = image // 4 + 48 * torch.arange(4)[torch.arange(self.rows) % 4, None, None, None].to(torch.uint8)
            yield {
                "image": image[share * local : (share + 1) * local],
                "id": torch.arange(self.rows)[share * local : (share + 1) * local],
            }


def make(task: type[Objective], seed: int = 0, **options: Any) -> Objective:
    torch.manual_seed(seed)
    return task({"image": TinyEncoder(**options)})


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
