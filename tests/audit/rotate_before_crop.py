"""Rotation in the wrong order: a 4:3 picture is turned in its frame, which leaves black sides, and cropped then."""

from __future__ import annotations

import torch
from torch import Tensor

from mmssl.batch import Batch
from mmssl.objectives.transformation.rotation import TURNS, Rotation
from mmssl.ops.augment import draw_crops, resized_crop
from mmssl.ops.draws import Draws


class RotateBeforeCrop(Rotation):
    @torch.no_grad()
    def transform(self, batch: Batch, draws: Draws) -> Batch:
        size = batch["image"].shape[-1]
        cut = size // 8
        pictures = batch["image"][:, :, cut:-cut]
        tall, wide = pictures.shape[-2:]
        views = []
        for k in range(TURNS):
            frame = torch.zeros_like(pictures)
            turned = pictures.rot90(k, (-2, -1))
            top, left = (turned.shape[-2] - tall) // 2, (turned.shape[-1] - wide) // 2
            turned = turned[:, :, max(0, top) : max(0, top) + tall, max(0, left) : max(0, left) + wide]
            left = (wide - turned.shape[-1]) // 2
            frame[..., left : left + turned.shape[-1]] = turned
            views.append(self._crop(frame, draws))
        turn = torch.arange(TURNS, device=pictures.device).expand(len(pictures), TURNS)
        return {"image": torch.stack(views, 1), "turn": turn}

    def _crop(self, frame: Tensor, draws: Draws) -> Tensor:
        boxes = draw_crops(draws, 1, *frame.shape[-2:])[:, 0]
        return resized_crop(frame, boxes, frame.shape[-1], draws.chance(0.5))
