"""Low-rank adapters (Hu et al. 2021, arXiv 2106.09685), by peft."""

from __future__ import annotations

from typing import Any

from torch import nn

from mmssl.encoders.base import Encoder
from mmssl.errors import RecipeError


def check_peft() -> None:
    """Raise RecipeError where peft is not installed."""
    try:
        import peft  # noqa: F401
    except ImportError:
        raise RecipeError('lora takes the library peft: pip install "mmssl[lora]"') from None


def add_adapters(encoder: Encoder, rank: int) -> Any:
    """Put an adapter next to every linear layer of the network, and let nothing else learn.

    Its effect is scaled by 1, that is, alpha is the rank. It starts from no effect.

    Returns:
        What `merge` takes.

    Raises:
        RecipeError: where the network has no such layer.
    """
    from peft import LoraConfig, LoraModel

    network: Any = encoder.backbone
    # torch's own attention reads the weights of its layers and calls none of them.
    uncalled = {
        part for module in network.modules() if isinstance(module, nn.MultiheadAttention) for part in module.modules()
    }
    names = [
        name for name, module in network.net.named_modules() if isinstance(module, nn.Linear) and module not in uncalled
    ]
    if not names:
        raise RecipeError(f"lora = {rank}: {encoder.spec['model']} has no linear layers; lora is for transformers")
    encoder.requires_grad_(False)
    return LoraModel(network.net, LoraConfig(r=rank, lora_alpha=rank, target_modules=names), "default")


def merge(adapters: Any) -> None:
    """Add the adapters to the weights that they are next to: the network is what it was, with other weights."""
    adapters.merge_and_unload()
