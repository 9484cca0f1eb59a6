"""Clips: a spatio-temporal network of torchvision or transformers, or any image network frame by frame."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from mmssl.encoders._network import NetworkEncoder
from mmssl.encoders.backbones._framewise import Framewise
from mmssl.encoders.backbones._temporal import TemporalTransformer
from mmssl.encoders.backbones.base import Pretrained, create_backbone
from mmssl.encoders.image import Normalize, check_channels
from mmssl.errors import RecipeError
from mmssl.media.video import decode_video
from mmssl.ranges import Positive
from mmssl.recipe import Data


class VideoEncoder(NetworkEncoder):
    """Clips (B, T, 3, H, W), uint8 or floats in [0, 1] -> Features, grid (t, h, w).

    Args:
        model: `torchvision/r3d_18`, `mc3_18`, `r2plus1d_18` or `s3d`, which convolve in time, `mvit_v1_b`, `mvit_v2_s`,
            `swin3d_t`, `swin3d_s` or `swin3d_b`; `transformers/videomae`, `vivit` or `timesformer`; or any image
            network, which sees each frame alone.
        pretrained: see `mmssl.encoders.create`.
        temporal: how the frames of an image network become one vector: `mean` (default) or `max` over time, or the mean
            of a `transformer` over them, which sees in which order they come. Its weights start at random; what
            `export` writes is the network of frames, without it.
        temporal_depth: number of the transformer's blocks (1).
        temporal_num_heads: of its attention; where left out, as many as give each 64 channels, or the next number below
            that divides the width.
        difference: whether the network sees what changed since the frame before in place of the frame; of the first
            one, nothing. A clip's motion is then all there is, which tasks about time learn from much sooner (the
            "RGB difference" of Wang et al. 2016, "Temporal Segment Networks", arXiv 1608.00859).
        mean: normalization, one value a channel; the library's constants for these weights where left out.
        std: likewise.
        **kwargs: of the network's constructor; for transformers of its configuration: `num_frames`, `image_size` ...

    Attributes:
        sees_order: whether it can know in which order the frames come; a network that sees each alone cannot, unless
            what it sees is the `difference` to the one before, or a `transformer` over time follows.
    """

    modality = "video"
    shapes: ClassVar[dict[int, str]] = {5: "(B, T, 3, H, W)"}

    def __init__(
        self,
        model: str,
        *,
        pretrained: Pretrained = False,
        temporal: Literal["mean", "max", "transformer"] | None = None,
        temporal_depth: Positive | None = None,
        temporal_num_heads: Positive | None = None,
        difference: bool = False,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
        **kwargs: Any,
    ) -> None:
        backbone = create_backbone(model, "video", pretrained, kwargs)
        self.layout = "(B, T, 3, H, W)" if model.startswith("transformers/") else "(B, 3, T, H, W)"
        pictures = backbone.reads == "pictures"
        # What a change leads to is another change when played backward.
        self.sees_order = not pictures or difference or temporal == "transformer"
        over_time: dict[str, Any] = {"temporal": temporal} if temporal else {}
        for key, value in (("temporal_depth", temporal_depth), ("temporal_num_heads", temporal_num_heads)):
            if value is not None and temporal != "transformer":
                raise RecipeError(f"{model}: '{key}' is for temporal: transformer")
        if temporal and not pictures:
            raise RecipeError(f"{model}: 'temporal' is for image networks; this one pools over time itself")
        if temporal == "transformer":
            depth, heads = temporal_depth or 1, temporal_num_heads or _heads(backbone.dim)
            if backbone.dim % heads:
                raise RecipeError(f"{model}: temporal_num_heads = {heads} does not divide its width, {backbone.dim}")
            backbone = Framewise(backbone, TemporalTransformer(backbone.dim, depth, heads))
            over_time |= {"temporal_depth": depth, "temporal_num_heads": heads}
            self.layout = "each frame alone; the transformer over them, which pools, is not in these files"
        elif pictures:
            backbone = Framewise(backbone, temporal or "mean")
            self.layout = f"each frame alone, then {backbone.temporal} over time"
        super().__init__(backbone)
        mean, std = mean or backbone.mean, std or backbone.std
        check_channels(model, backbone.channels, mean, std)
        self.normalize, self.difference = Normalize(mean, std), difference
        self.spec = {"model": model, "modality": "video", "mean": list(mean), "std": list(std), **backbone.kwargs}
        self.spec |= over_time
        if difference:
            self.spec["difference"] = True

    def prepare(self, x: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Normalized clips (B, 3, T, H, W); `valid` (B, W) is False where a column is padding."""
        frames = self.normalize(x)
        if self.difference:
            frames = torch.cat([torch.zeros_like(frames[:, :1]), frames.diff(dim=1)], dim=1)
        return frames.transpose(1, 2), valid

    def span(self, x: Tensor, fps: float | None = None) -> float:
        """See the base class."""
        return x.shape[1] / (fps or self.reading().video.fps)

    def built_for(self) -> dict[str, Any]:
        """See the base class."""
        frames = self.backbone.frames
        return {"size": self.backbone.size} | ({} if frames is None else {"frames": frames})

    def fitting(self, data: Data) -> Data:
        """As many frames as the network was built for; a task may show it some of more."""
        frames = self.backbone.frames or data.video.frames
        return data.model_copy(update={"video": data.video.model_copy(update={"frames": frames})})

    def decode_one(self, cell: Any, data: Data) -> tuple[Tensor, None]:
        """See the base class."""
        how, window = data.video, self.window(data)
        return decode_video(cell, how.size, how.fps, how.frames, window, how.fit), None

    def normalization(self) -> dict[str, list[float]]:
        """See the base class."""
        return {"mean": self.spec["mean"], "std": self.spec["std"]}

    def preprocessing(self) -> dict[str, Any]:
        """See the base class."""
        change = ", of which each frame minus the one before it, the first 0" if self.difference else ""
        return {"input": f"RGB in [0, 1]: (x - mean) / std{change}; {self.layout}", **self.normalization()}


def _heads(width: int) -> int:
    """As many as give each 64 channels, or the next number below that divides `width`."""
    return next(heads for heads in range(max(1, width // 64), 0, -1) if width % heads == 0)
