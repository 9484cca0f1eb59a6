"""What the backbones of all libraries share: names, errors, weights from files, and the contract of image networks.

An image network (`VisionBackbone`) reads normalized pictures: photographs, spectrograms or single frames. Its
`forward` is the library's own, cut where tokens can be left out.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from mmssl.encoders.base import Features
from mmssl.errors import RecipeError, nearest

LIBRARIES = ("timm", "torchvision", "open_clip", "transformers")
LOCAL_DIR = "local-dir:"
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# What the libraries' constructors and readers raise.
REFUSALS = (
    *(TypeError, ValueError, AssertionError, LookupError, RuntimeError, ArithmeticError, OSError),
    *(EOFError, SafetensorError, UnpicklingError),
)

Pretrained = bool | str | None


class VisionBackbone(nn.Module):
    """A network of one library over normalized pictures (B, C, H, W).

    Attributes:
        net: the library's module, without its classifier.
        model: `library/name`.
        dim: width D of tokens and pooled vectors.
        subsets: whether `encode` takes any subset of the tokens of `embed`.
        patch_size: height and width in pixels of a token, where tokens are patches; None for convolutional networks.
        width: of the tokens of `embed`, where there are any.
        channels: channels C of a picture.
        kwargs: what the constructor was given, the network's part of `Encoder.spec`.
        mean, std: normalization that the weights, or the library's default for them, expect; one value a channel.
    """

    # The libraries are untyped.
    net: Any
    model: str
    dim: int
    subsets: bool = False
    patch_size: tuple[int, int] | None = None
    width: int | None = None
    channels: int = 3
    kwargs: dict[str, Any]
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def embed(self, x: Tensor, hidden: Tensor | None = None, mask_token: Tensor | None = None) -> Tensor:
        """Picture -> position-aware tokens (B, N, width); see `mmssl.encoders.base.Encoder.embed`."""
        raise TypeError(f"{self.model} has no tokens that can be left out")

    def encode(self, tokens: Tensor, valid: Tensor | None = None) -> Features:
        """Any subset of the tokens of `embed` -> Features."""
        raise TypeError(f"{self.model} has no tokens that can be left out")

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Features:
        """Picture -> Features; `valid` (B, W) is False where a column is padding, as after the end of a sound."""
        raise TypeError(f"{type(self).__name__} has no forward")

    def layers(self, x: Tensor, valid: Tensor | None = None) -> dict[str, Features]:
        """Every depth, shallow to deep: {name: Features}; see `mmssl.encoders.base.Encoder.layers`."""
        raise TypeError(f"{type(self).__name__} names no layers")

    def export(self, directory: Path, preprocessing: Mapping[str, Any]) -> None:
        """Write files that the library loads."""
        raise TypeError(f"{type(self).__name__} has no native form")


def split_model(model: str) -> tuple[str, str]:
    """`library/name` -> (library, name).

    Raises:
        RecipeError: where there is no such library or no name.
    """
    library, _, name = model.partition("/")
    if library not in LIBRARIES:
        raise RecipeError(f"model '{model}': '{library}' is no library{nearest(library, LIBRARIES)}")
    if not name:
        raise RecipeError(f"model '{model}' needs a name behind the library, for instance timm/resnet18")
    return library, name


def create_vision(model: str, pretrained: Pretrained, kwargs: Mapping[str, Any]) -> VisionBackbone:
    """The image network of that name; `kwargs` go to the library's constructor.

    Raises:
        RecipeError: where the library has no such network or refuses a keyword.
    """
    library, name = split_model(model)
    if library == "timm":
        from mmssl.encoders._timm import create_timm

        return create_timm(name, pretrained, kwargs)
    if library == "torchvision":
        from mmssl.encoders._torchvision import TorchvisionBackbone

        return TorchvisionBackbone(name, pretrained, kwargs)
    if library == "open_clip":
        from mmssl.encoders._open_clip_vision import create_open_clip

        return create_open_clip(name, pretrained, kwargs)
    raise RecipeError(
        f"model '{model}': {library} builds text encoders here; image networks: timm, torchvision, open_clip"
    )


def nearest_model(name: str, known: Iterable[str], listing: str) -> str:
    """Like `nearest`, for thousands of names: the closest one, else the call that lists them."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" (did you mean '{close[0]}'?)" if close else f" ({listing} lists the names)"


def refuse(model: str, kwargs: Iterable[str], refused: Collection[str]) -> None:
    """Raise RecipeError where a keyword is the library's own business and not an encoder's."""
    for key in kwargs:
        if key in refused:
            raise RecipeError(f"{model}: '{key}' is not for an encoder; 'pretrained' says where weights are from")


@contextmanager
def build_errors(where: str, parameters: Callable[[str], Iterable[str]] = lambda owner: ()) -> Iterator[None]:
    """Turn what a library's constructor raises into one sentence.

    Args:
        where: the model, for the error.
        parameters: name of the class that refused a keyword -> the keywords it has.
    """
    try:
        yield
    except REFUSALS as error:
        reason = " ".join(str(error).split())
        unknown = re.search(r"(\w+)(?:\.__init__)?\(\) got an unexpected keyword argument '(\w+)'", reason)
        if unknown:
            hint = nearest(unknown[2], {"pretrained", *parameters(unknown[1])})
            raise RecipeError(f"{where}: unknown key '{unknown[2]}'{hint}") from error
        raise RecipeError(f"{where} cannot be built: {reason or 'its constructor refuses these values'}") from error


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


def attendable(valid: Tensor) -> Tensor:
    """(B, N) bool: a row without any valid place counts as valid throughout, so that no softmax or mean is empty."""
    return valid | ~valid.any(dim=1, keepdim=True)


def masked_mean(tokens: Tensor, valid: Tensor | None) -> Tensor:
    """(B, N, D) -> (B, D), the mean over places where `valid` (B, N) is True."""
    if valid is None:
        return tokens.mean(dim=1)
    weight = attendable(valid).unsqueeze(2).to(tokens.dtype)
    return (tokens * weight).sum(dim=1) / weight.sum(dim=1)


def at_depth(tokens: Tensor, grid: tuple[int, ...], valid: Tensor | None = None) -> Features:
    """Tokens of one depth as Features: pooled is the mean over valid places."""
    return Features(tokens, masked_mean(tokens, valid), grid, valid)


def hide(tokens: Tensor, hidden: Tensor | None, mask_token: Tensor | None) -> Tensor:
    """(B, N, D) with `mask_token` (D,) where `hidden` (B, N) is True; neither means that nothing is hidden.

    Raises:
        ValueError: where one of the two is missing.
    """
    if hidden is None and mask_token is None:
        return tokens
    if hidden is None or mask_token is None:
        raise ValueError("embed: hidden and mask_token come together")
    return torch.where(hidden.unsqueeze(2), mask_token.to(tokens.dtype), tokens)


def places(valid: Tensor | None, grid: tuple[int, ...]) -> Tensor | None:
    """Valid columns of a picture (B, W) -> valid places of an h × w grid, (B, h·w): those over a valid column."""
    if valid is None:
        return None
    height, width = grid
    kept = F.adaptive_max_pool1d(valid.unsqueeze(1).float(), width) > 0
    return kept.expand(-1, height, -1).flatten(1)
