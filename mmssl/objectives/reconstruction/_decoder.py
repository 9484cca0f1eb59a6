"""From an encoder's features back to a dense map of any size; shared by the tasks that answer in pixels."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from mmssl.encoders.base import Features
from mmssl.errors import RecipeError

STAGES = 4
GROUPS = 8


def feature_map(features: Features) -> Tensor:
    """Tokens on their grid with the pooled vector added at each place, (B, D, h, w).

    The pooled vector tells every place of the whole picture (Iizuka et al. 2016, "Let there be Color!"), and gives
    a gradient to weights that only pooling uses, such as those of an attention pool.

    Raises:
        RecipeError: for tokens that lie on no grid of two dimensions.
    """
    if len(features.grid) != 2 or features.grid[0] == 1 < features.grid[1]:
        raise RecipeError(
            f"a dense task needs tokens on a grid of height and width, and this encoder's are {features.grid}; "
            "take a convolutional network or a plain vision transformer, such as timm/vit_tiny_patch16_224"
        )
    return features.tokens.mT.unflatten(2, features.grid) + features.pooled[:, :, None, None]


class Decoder(nn.Module):
    """A small convolutional upsampler: four times bilinear resize, convolution, GroupNorm, GELU.

    The sizes of the four stages grow by equal factors up to the one asked for, so that one set of weights serves any
    grid and any size, and all of them are always used. Resizing before the convolution leaves no checkerboard; groups
    are normalized within a row. The width halves from stage to stage, down to 32 channels (64 where the answer
    has that many).

    Args:
        dim: width D of the features.
        channels: of the answer.
        width: of the first stage, in channels; a power of 2.
    """

    def __init__(self, dim: int, channels: int, *, width: int = 256) -> None:
        super().__init__()
        # Not much narrower than what there is to tell, and several channels a group: one alone would lose its level.
        narrowest = 64 if channels >= 64 else 32
        widths = [max(width >> stage, narrowest) for stage in range(STAGES)]
        self.project = nn.Conv2d(dim, width, 1)
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(before, after, 3, padding=1, bias=False), nn.GroupNorm(GROUPS, after), nn.GELU())
            for before, after in zip([width, *widths], widths, strict=False)
        )
        self.head = nn.Conv2d(widths[-1], channels, 1)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """A map (B, D, h, w) -> (B, channels, *size)."""
        start = x.shape[2:]
        x = self.project(x)
        for number, stage in enumerate(self.stages, 1):
            grown = [round(a * (b / a) ** (number / STAGES)) for a, b in zip(start, size, strict=True)]
            x = stage(F.interpolate(x, size=grown, mode="bilinear"))
        return self.head(x)
