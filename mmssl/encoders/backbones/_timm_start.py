"""How published vision transformers start, where timm's constructors do not know it: weights and fixed positions."""

from __future__ import annotations

import math

import torch
from timm.models import VisionTransformer
from torch import Tensor, nn

from mmssl.errors import RecipeError

STARTS = ("mae", "moco_v3")
"""Values of a transformer's `weight_init`, next to those of timm."""


@torch.no_grad()
def start_as_published(net: nn.Module, start: str, model: str) -> None:
    """Give a network the random weights and the positions of a published one.

    Linear layers by Glorot & Bengio's uniform distribution ("xavier", as in the official ViT), the patch embedding as
    the linear layer that it is, biases 0; positions are sines and cosines that do not learn (He et al. 2021, arXiv
    2111.06377, appendix A.1, and its code; Chen, Xie & He 2021, arXiv 2104.02057, section 4, and its code).

    Args:
        net: a plain vision transformer of timm.
        start: `mae`, or `moco_v3`, which takes queries, keys and values for three layers and begins with a class token
            of nearly 0.
        model: its name, for errors.

    Raises:
        RecipeError: for another network, or one whose width is no multiple of 4.
    """
    if not isinstance(net, VisionTransformer) or net.pos_embed is None or net.embed_dim % 4:
        raise RecipeError(
            f"{model}: weight_init = '{start}' is for a plain vision transformer with positions, of a width that is a "
            "multiple of 4, such as timm/vit_base_patch16_224"
        )
    for name, module in net.named_modules():
        if isinstance(module, nn.Linear):
            if start == "moco_v3" and name.endswith("qkv"):
                bound = math.sqrt(6 / (module.out_features // 3 + module.in_features))
                nn.init.uniform_(module.weight, -bound, bound)
            else:
                nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    patches = net.patch_embed.proj
    nn.init.xavier_uniform_(patches.weight.flatten(1))  # a view: the weight itself
    if start == "moco_v3" and patches.bias is not None:
        nn.init.zeros_(patches.bias)
    if net.cls_token is not None:
        nn.init.normal_(net.cls_token, std=0.02 if start == "mae" else 1e-6)
    height, width = net.patch_embed.grid_size
    net.pos_embed.zero_()
    net.pos_embed[0, -height * width :] = sines_and_cosines(height, width, net.embed_dim)
    net.pos_embed.requires_grad_(False)


def sines_and_cosines(height: int, width: int, dim: int) -> Tensor:
    """Positions on a grid, (height * width, dim): half of the numbers for the column, half for the row."""
    frequencies = 10_000 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    angles = [place.reshape(-1, 1) * frequencies for place in (columns, rows)]
    return torch.cat([wave for angle in angles for wave in (angle.sin(), angle.cos())], dim=1).float()
