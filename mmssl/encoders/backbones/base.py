"""What the networks of all libraries share: the contract, names, and what a library's constructor says no to."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from mmssl.encoders.backbones._files import REFUSALS
from mmssl.encoders.base import Features
from mmssl.errors import RecipeError, nearest
from mmssl.registry import components, find

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
WEIGHTS = (".pt", ".pth", ".bin", ".ckpt", ".safetensors", ".npz")
# What an encoder of a modality can hand to its network.
INPUTS = {
    "image": ("pictures",),
    "text": ("texts",),
    "audio": ("pictures", "filter banks", "waveforms"),
    "video": ("clips", "pictures"),
}

# How many layers and how wide, in the words of timm, transformers and open_clip.
DEPTHS = {"depth", "depths", "layers", "num_layers", "num_hidden_layers"}
SIZES = {
    *("embed_dim", "embed_dims", "width", "channels", "stem_width", "hidden_size", "hidden_sizes", "intermediate_size"),
    *("heads", "num_heads", "num_attention_heads", "img_size", "image_size", "patch_size", "num_frames"),
    *("tubelet_size", "context_length", "vocab_size", "conv_dim"),
}
Pretrained = bool | str | None


class Backbone(nn.Module):
    """A network of one library: its `forward` is the library's own, cut where tokens can be left out.

    Attributes:
        net: the library's module, without its classifier.
        model: `library/name`.
        reads: what `forward` takes: `pictures` (B, C, H, W), that is photographs, spectrograms or single frames, and
            `clips` (B, C, T, H, W), both normalized; `filter banks` (B, 1, M, T); `waveforms` (B, S); `texts`, ids
            (B, L).
        dim: width D of tokens and pooled vectors.
        subsets: whether `encode` takes any subset of the tokens of `embed`.
        padding: whether `encode` takes `valid`, and lets nothing attend to the rest.
        patch_size: extent of a token, where tokens are patches that do not overlap: (h, w) in pixels, (frames, h, w)
            for clips; else None.
        width: of the mask token of `embed`, where there is one.
        channels: channels C of a picture.
        kwargs: what the constructor was given, the network's part of `Encoder.spec`.
        size: side of the pictures that the network was built for, in pixels.
        frames: of the clips that it was built for; None for any number.
        context: most ids of a text; None for any number.
        mean, std: normalization that the weights, or the library's default for them, expect; one value a channel.
    """

    # The libraries are untyped.
    net: Any
    model: str
    reads: str = "pictures"
    dim: int
    subsets: bool = False
    padding: bool = True
    patch_size: tuple[int, ...] | None = None
    width: int | None = None
    channels: int = 3
    size: int = 224
    frames: int | None = None
    context: int | None = None
    kwargs: dict[str, Any]
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    @property
    def undecayed(self) -> Iterable[nn.Parameter]:
        """What the library leaves out of weight decay, beside biases and norms: class tokens, tables of positions."""
        return ()

    @property
    def native(self) -> Backbone:
        """What `export` writes: itself, unless it wraps another."""
        return self

    def embed(self, x: Tensor, hidden: Tensor | None = None, mask_token: Tensor | None = None) -> Tensor:
        """Input -> position-aware tokens (B, N, ...); see `mmssl.encoders.base.Encoder.embed`."""
        raise TypeError(f"{self.model} has no tokens that can be left out")

    def encode(self, tokens: Tensor, valid: Tensor | None = None) -> Features:
        """Any subset of the tokens of `embed` -> Features."""
        raise TypeError(f"{self.model} has no tokens that can be left out")

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Features:
        """Input -> Features; `valid` is False where the last axis of `x` is padding, bool (B, W), (B, S) or (B, L)."""
        raise TypeError(f"{type(self).__name__} has no forward")

    def forward_layers(self, x: Tensor, valid: Tensor | None = None) -> tuple[Features, dict[str, Features]]:
        """What `forward` returns, and every depth, shallow to deep; see `mmssl.encoders.base.Encoder.layers`."""
        raise TypeError(f"{type(self).__name__} names no layers")

    def attention(self, x: Tensor, valid: Tensor | None = None) -> Tensor | None:
        """Attention from the class token to each place in the last layer, (B, N); None where that cannot be told."""
        return None

    def export(self, directory: Path, preprocessing: Mapping[str, Any]) -> None:
        """Write files that the library loads.

        Args:
            directory: made if missing.
            preprocessing: `mean` and `std` of its input, one a channel; where they are known also `input_size`
                (channels, height, width), `decoding`, the settings of the run, and `origin`, see `Encoder.origin`; of
                sounds `rate` in Hz and, of waveforms, `normalize`.
        """
        raise TypeError(f"{type(self).__name__} has no native form")


class Library:
    """What a file here defines, in addition to its networks: how a network is built by name.

    Attributes:
        refused: arguments of the library's constructors that read files, run code or undo what an encoder is. A recipe
            cannot name them, in a folder of somebody else's least of all (`mmssl.hub.pull`).
        modalities: of the encoders that it has networks for.
    """

    refused: ClassVar[Collection[str]]
    modalities: ClassVar[Collection[str]]

    @staticmethod
    def create(name: str, modality: str, pretrained: Pretrained, kwargs: Mapping[str, Any], **options: Any) -> Backbone:
        """The network `name` for encoders of a modality.

        Args:
            name: without the library.
            modality: of the encoder.
            pretrained: see `mmssl.encoders.create`.
            kwargs: of the library's constructor.
            **options: of a text encoder: `tokenizer`, `pool`, `decoder`.
        """
        raise TypeError(f"there is no network '{name}' for {modality}")


def split_model(model: str) -> tuple[str, str]:
    """`library/name` -> (library, name).

    Raises:
        RecipeError: where there is no such library or no name.
    """
    library, _, name = model.partition("/")
    known = components("backbone")
    if library not in known:
        raise RecipeError(f"model '{model}': '{library}' is no library{nearest(library, known)}")
    if not name:
        raise RecipeError(f"model '{model}' needs a name after the library, for instance timm/resnet18")
    return library, name


def library_of(model: str) -> type[Library]:
    """The library of `library/name`; raises RecipeError where there is none."""
    return cast(type[Library], find("backbone", split_model(model)[0]))


def create_backbone(
    model: str, modality: str, pretrained: Pretrained, kwargs: Mapping[str, Any], **options: Any
) -> Backbone:
    """The network `library/name` for encoders of a modality; see `Library.create`.

    Raises:
        RecipeError: where the library has no such network, refuses a keyword, or the network reads something else.
    """
    library = library_of(model)
    if modality not in library.modalities:
        raise RecipeError(
            f"model '{model}': {split_model(model)[0]} has no networks for {modality}; "
            "`mmssl list` names the libraries that have"
        )
    refuse(model, kwargs)
    backbone = library.create(split_model(model)[1], modality, pretrained, kwargs, **options)
    if backbone.reads not in INPUTS[modality]:
        raise RecipeError(f"model '{model}' reads {backbone.reads}, which no encoder of {modality} makes")
    _order_weights(backbone)
    return backbone


def _order_weights(net: nn.Module) -> None:
    """Put the channels of weights last in memory where most weights of a network are convolutions over pictures.

    Convolutions, norms and pooling then run in that order, which is faster, and give the same up to rounding. Vision
    transformers gain nothing, and convolutions over clips lose.
    """
    convolutions = [module for module in net.modules() if isinstance(module, nn.Conv2d)]
    weights = sum(convolution.weight.numel() for convolution in convolutions)
    if 2 * weights > sum(parameter.numel() for parameter in net.parameters()):
        for convolution in convolutions:
            convolution.to(memory_format=torch.channels_last)


def refuse_path(model: str, pretrained: str) -> None:
    """Raise RecipeError for what can only be a file of weights, and is not there; or is the directory of a run."""
    if (Path(pretrained) / "recipe.yaml").is_file():
        raise RecipeError(
            f"{model}: pretrained: '{pretrained}' is the directory of a run, which a recipe may start from; its "
            f"encoders are mmssl.load('{pretrained}').encoders"
        )
    if "/" in pretrained or Path(pretrained).suffix in WEIGHTS:
        raise RecipeError(f"{model}: pretrained: there is no file '{pretrained}'")


def refuse(model: str, kwargs: Mapping[str, Any]) -> None:
    """Raise RecipeError where a keyword is the library's own business and not an encoder's, or a size is too small."""
    for key in kwargs:
        if key in library_of(model).refused:
            raise RecipeError(f"{model}: '{key}' is not for an encoder; 'pretrained' says where weights are from")
    _refuse_sizes(model, kwargs)


def _refuse_sizes(model: str, kwargs: Mapping[str, Any]) -> None:
    """Libraries build networks of width 0 or fewer layers than none, or fall over them later."""
    for key, value in kwargs.items():
        if isinstance(value, Mapping):
            _refuse_sizes(model, value)
        smallest = 0 if key in DEPTHS else 1  # without layers a network is what embeds its input
        sizes = [size for size in (value if isinstance(value, Sequence) else [value]) if isinstance(size, int | float)]
        if key in DEPTHS | SIZES and any(size < smallest for size in sizes):
            raise RecipeError(f"{model}: '{key}' has to be {smallest} or more, and is {value}")


def check_clip(model: str, x: Tensor, built: tuple[int, ...], options: str = "") -> None:
    """Raise RecipeError where clips (B, C, T, H, W) are not of the frames, height and width that it was built for.

    Args:
        model: for the error.
        x: the clips.
        built: frames, height and width.
        options: of the network that change them, for the error.
    """
    if tuple(x.shape[-3:]) != built:
        frames, height, width = x.shape[-3:]
        raise RecipeError(
            f"{model} reads clips of {built[0]} frames of {built[1]} x {built[2]} pixels, got {frames} of {height} x "
            f"{width}: change data.video{options and f', or {options}'}"
        )


def nearest_model(name: str, known: Iterable[str], listing: str) -> str:
    """Like `nearest`, for thousands of names: the closest one, else the call that lists them."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" (did you mean '{close[0]}'?)" if close else f" ({listing} lists the names)"


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
        reason = " ".join(str(error).partition("Exception raised from")[0].split())  # and not torch's own stack
        unknown = re.search(r"(\w+)(?:\.__init__)?\(\) got an unexpected keyword argument '(\w+)'", reason)
        fixed = re.search(r"multiple values for keyword argument '(\w+)'", reason)
        if fixed:
            raise RecipeError(f"{where}: '{fixed[1]}' cannot be chosen: it is a part of what the name says") from error
        if unknown:
            hint = nearest(unknown[2], {"pretrained", *parameters(unknown[1])})
            raise RecipeError(f"{where}: unknown key '{unknown[2]}'{hint}") from error
        raise RecipeError(f"{where} cannot be built: {reason or 'its constructor refuses these values'}") from error
