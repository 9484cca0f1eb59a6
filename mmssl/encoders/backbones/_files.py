"""Weights and configurations as the libraries' files hold them; nothing is unpickled but tensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from mmssl.errors import RecipeError

LOCAL_DIR = "local-dir:"
# What the libraries' constructors and readers raise.
REFUSALS = (
    *(TypeError, ValueError, AssertionError, LookupError, RuntimeError, ArithmeticError, OSError),
    *(EOFError, SafetensorError, UnpicklingError, StrictDataclassError),
)


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """State dictionary from a safetensors file, or from one of torch.save without unpickling code.

    Raises:
        RecipeError: where the file is missing or holds something else.
    """
    path = Path(path)
    if not path.is_file():
        raise RecipeError(f"pretrained: there is no file {path}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except REFUSALS as error:
        raise RecipeError(f"pretrained: {path} holds no weights that can be read safely") from error
    state = state.get("state_dict", state) if isinstance(state, dict) else None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise RecipeError(f"pretrained: {path} is no state dictionary")
    return state


def read_config(directory: str | Path, name: str) -> dict[str, Any]:
    """The JSON file of that name in a directory of native files.

    Raises:
        RecipeError: where it is missing or broken.
    """
    path = Path(directory) / name
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RecipeError(f"pretrained: cannot read {path}: {error}") from error
    return config


def load_weights(net: nn.Module, state: Mapping[str, Tensor], where: str, drop: tuple[str, ...] = ()) -> None:
    """Load a state dictionary whole; keys below the modules in `drop` (a classifier that was cut off) are passed over.

    Raises:
        RecipeError: naming the first key that is missing, too many or of another shape.
    """
    own = net.state_dict()
    kept = {key: value for key, value in state.items() if key in own or key.partition(".")[0] not in drop}
    odd = sorted(own.keys() ^ kept.keys())
    wrong = [key for key in own if key in kept and own[key].shape != kept[key].shape]
    if odd or wrong:
        what = f"{len(odd)} keys differ, the first is {odd[0]}" if odd else f"{wrong[0]} has another shape"
        raise RecipeError(f"{where}: these weights are of another network: {what}")
    net.load_state_dict(kept)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Indented JSON, UTF-8."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def native_state(net: nn.Module) -> dict[str, Tensor]:
    """State dictionary as safetensors wants it: on the CPU, contiguous, no storage shared between names."""
    return {key: value.detach().cpu().clone().contiguous() for key, value in net.state_dict().items()}
