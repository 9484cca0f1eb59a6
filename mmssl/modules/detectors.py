"""Detectors of torchvision on any pyramid of feature maps, for pictures of any size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchvision.models.detection import FCOS, FasterRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import MultiScaleRoIAlign

Kind = Literal["fcos", "retinanet", "faster_rcnn"]

BEST = 100
"""Boxes a picture, as COCO counts them."""


class ExactAnchors(AnchorGenerator):
    """Anchors as far from each other as places of the map are: torchvision rounds that down to whole pixels.

    Its own detectors are for pictures whose sides are padded to a multiple of all strides, which these are not.
    """

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        """Anchors of each picture, (places * anchors a place, 4) in pixels."""
        height, width = image_list.tensors.shape[-2:]
        first = feature_maps[0]
        grids = [list(level.shape[-2:]) for level in feature_maps]
        strides = [[first.new_tensor(height / rows), first.new_tensor(width / columns)] for rows, columns in grids]
        self.set_cell_anchors(first.dtype, first.device)
        anchors = torch.cat(self.grid_anchors(grids, strides))
        return [anchors for _ in image_list.image_sizes]


def make_detector(kind: Kind, backbone: nn.Module, classes: int, size: int, strides: Sequence[float]) -> nn.Module:
    """A detector with random weights.

    Args:
        kind: FCOS (Tian et al. 2019), RetinaNet (Lin et al. 2017) or Faster R-CNN (Ren et al. 2015).
        backbone: pictures (B, 3, H, W) in [0, 1] -> name of a level -> map; its `out_channels` are their width.
        classes: number of classes; 0 is the background, and theirs are from 1.
        size: side of the square pictures.
        strides: of the levels in pixels, from fine to coarse.

    Returns:
        What torchvision documents: lists of pictures and of `{"boxes", "labels"}` to losses, or in evaluation mode
        pictures to lists of `{"boxes", "scores", "labels"}`.
    """
    # Pictures stay as they are: neither resized nor normalized nor padded.
    common: dict[str, Any] = {"min_size": size, "max_size": size, "image_mean": [0.0] * 3, "image_std": [1.0] * 3}
    common["size_divisible"] = 1
    if kind == "fcos":
        anchors = ExactAnchors(tuple((max(1, round(stride)),) for stride in strides), ((1.0,),) * len(strides))
        best = {"score_thresh": 0.01, "detections_per_img": BEST}
        return FCOS(backbone, classes + 1, anchor_generator=anchors, **best, **common)
    if kind == "retinanet":
        sizes = tuple(tuple(round(4 * stride * 2 ** (k / 3)) for k in range(3)) for stride in strides)
        anchors = ExactAnchors(sizes, ((0.5, 1.0, 2.0),) * len(strides))
        best = {"score_thresh": 0.01, "detections_per_img": BEST}
        return RetinaNet(backbone, classes + 1, anchor_generator=anchors, **best, **common)
    anchors = ExactAnchors(tuple((round(8 * stride),) for stride in strides), ((0.5, 1.0, 2.0),) * len(strides))
    pool = MultiScaleRoIAlign([str(i) for i in range(len(strides))], 7, 2)
    best = {"box_score_thresh": 0.01, "box_detections_per_img": BEST}
    return FasterRCNN(backbone, classes + 1, rpn_anchor_generator=anchors, box_roi_pool=pool, **best, **common)
