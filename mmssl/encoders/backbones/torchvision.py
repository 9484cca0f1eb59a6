"""Networks of torchvision for images and video, without their classifier."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.func import functional_call
from torchvision.models.swin_transformer import SwinTransformer
from torchvision.models.video import S3D, MViT
from torchvision.models.video.swin_transformer import SwinTransformer3d
from torchvision.models.vision_transformer import VisionTransformer

from mmssl.encoders.backbones._files import (
    LOCAL_DIR,
    load_weights,
    native_state,
    read_config,
    read_weights,
    write_json,
)
from mmssl.encoders.backbones.base import (
    Backbone,
    Library,
    Pretrained,
    build_errors,
    check_clip,
    nearest_model,
    refuse,
    refuse_path,
)
from mmssl.encoders.base import Features, at_depth, masked_mean, places
from mmssl.errors import RecipeError

HEADS = ("fc", "classifier", "heads", "head")
# A child of these names is a row of depths of its own.
TRUNKS = ("features", "layers", "blocks", "trunk_output", "encoder")
POOLING = "model.avgpool = torch.nn.AdaptiveAvgPool3d(1)"
S3D_LEAST = (5, 17, 17)
"""Frames, height and width of a clip of which S3D's five halvings leave a place."""
S3D_POOLED = (13, 209, 209)
"""Likewise, of a clip of which they leave the 2 x 7 x 7 places that torchvision pools."""


class TorchvisionNetwork(Backbone):
    """A classification network of torchvision, over pictures (B, 3, H, W) or clips (B, 3, T, H, W).

    Tokens are the places of the last map before pooling, or the patches of a vision transformer. The pooled vector is
    the class token where there is one, and else the mean of the tokens, after ConvNeXt's and MaxViT's last norm. The
    hidden layers of AlexNet, VGG and MobileNetV3 after the pooling belong to their classifier. MViT reads clips of one
    size alone. S3D averages windows of 2 x 7 x 7 places first, so that places in the middle count more; where there
    are fewer places than that, which torchvision refuses, pooled is their mean.

    Attributes:
        note: what one who loads it with torchvision alone has to know besides; empty for most.
    """

    note = ""

    def __init__(self, name: str, pretrained: Pretrained, kwargs: Mapping[str, Any]) -> None:
        super().__init__()
        self.model, self.kwargs = f"torchvision/{name}", dict(kwargs)
        of_clips = torchvision.models.list_models(module=torchvision.models.video)
        known = [*torchvision.models.list_models(module=torchvision.models), *of_clips]
        if name not in known:
            hint = nearest_model(name, known, "torchvision.models.list_models()")
            raise RecipeError(f"model '{self.model}': torchvision has no such classification network{hint}")
        if name in of_clips:
            published = torchvision.models.get_model_weights(name)["DEFAULT"]
            preset = published.transforms()
            self.mean, self.std, self.reads = tuple(preset.mean), tuple(preset.std), "clips"
            self.size = preset.crop_size[0]
        if name in ("googlenet", "inception_v3"):
            self.kwargs.setdefault("aux_logits", False)
        weights, state = self._weights(name, pretrained)
        refuse(self.model, self.kwargs)
        with build_errors(self.model, _parameters):
            net = torchvision.models.get_model(name, weights=weights, **self.kwargs)
        self.head = next(head for head in HEADS if hasattr(net, head))
        setattr(net, self.head, _without_classifier(getattr(net, self.head)))
        self.net = net
        if state is not None:
            load_weights(net, state, self.model, (self.head, "aux1", "aux2", "AuxLogits"))
        self._channels_last = isinstance(net, SwinTransformer | SwinTransformer3d)
        self._prefix = 1 if hasattr(net, "class_token") or isinstance(net, MViT) else 0
        if isinstance(net, VisionTransformer):
            self.patch_size = (net.patch_size, net.patch_size)
        if isinstance(net, S3D):
            net.avgpool = _WindowMean(net.avgpool.kernel_size, net.avgpool.stride)
            self.note = f"for clips below {' x '.join(map(str, S3D_POOLED))}: {POOLING}"
        # The width is in no attribute: run a picture of the smallest size that all of these networks take.
        self.size = self.kwargs.get("image_size", self.size)
        size = self.kwargs.get("image_size", 224 if name.startswith(("vit", "maxvit")) else 96)
        probe = torch.zeros(1, 3, 8, 32, 32) if self.reads == "clips" else torch.zeros(1, 3, size, size)
        shapes: dict[str, Tensor] = {}
        if isinstance(net, MViT):  # of its own size, which takes it half a minute on one core: shapes are enough
            self.frames = published.meta["min_temporal_size"]
            probe = torch.zeros(1, 3, self.frames, self.size, self.size, device="meta")
            shapes = {key: value.to("meta") for key, value in net.state_dict().items()}
        self._map: Tensor | None = None
        with torch.no_grad(), build_errors(self.model):
            self.eval()
            with self._record(lambda tokens, grid: (tokens.shape[2], grid)) as found:
                functional_call(net, shapes, probe)
            self._deepest, (self.dim, self._grid) = found.popitem()
            # It stays: torch.compile cannot look into what hangs a hook up and takes it down. A method is copied with
            # the network that it belongs to.
            self._depths()[self._deepest].register_forward_hook(self._keep)
            self.train()

    def _weights(self, name: str, pretrained: Pretrained) -> tuple[str | None, dict[str, Tensor] | None]:
        """Torchvision's name of weights, or a state dictionary; sets the constructor arguments stored with it."""
        if not isinstance(pretrained, str):
            return ("DEFAULT" if pretrained else None), None
        if pretrained.startswith(LOCAL_DIR):
            directory = Path(pretrained.removeprefix(LOCAL_DIR))
            config = read_config(directory, "config.json")
            if config.get("builder") != name:
                raise RecipeError(f"{self.model}: pretrained: {directory} holds a {config.get('builder')}")
            stored = {key: value for key, value in config.get("kwargs", {}).items() if key != "num_classes"}
            self.kwargs = {**stored, **self.kwargs}
            return None, read_weights(directory / "model.safetensors")
        if Path(pretrained).is_file():
            return None, read_weights(pretrained)
        refuse_path(self.model, pretrained)
        return pretrained, None

    def _depths(self) -> dict[str, nn.Module]:
        """Modules whose outputs are maps, shallow to deep, by name."""
        depths: dict[str, nn.Module] = {}
        for name, child in self.net.named_children():
            if name in (self.head, "avgpool", "flatten", "dropout", "pos_drop"):
                continue
            inner = child.layers if name == "encoder" else child
            if name in TRUNKS and isinstance(inner, nn.Sequential | nn.ModuleList):
                depths |= {f"{name}.{key}": module for key, module in inner.named_children()}
            else:
                depths[name] = child
            if name == "encoder":
                depths["encoder.ln"] = child
        return depths

    @contextmanager
    def _record(self, read: Callable[[Tensor, tuple[int, ...]], Any]) -> Iterator[dict[str, Any]]:
        """While the network runs: what `read` makes of every depth's tokens and grid, in order of execution.

        It is read at once, because the activation after it may overwrite a map in place.
        """
        found: dict[str, Any] = {}
        grid: tuple[int, ...] = ()

        def keep(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, inputs: Any, output: Any) -> None:
                nonlocal grid
                tokens, grid = self._tokens(output, name, grid)
                found[name] = read(tokens, grid)

            return hook

        handles = [module.register_forward_hook(keep(name)) for name, module in self._depths().items()]
        try:
            yield found
        finally:
            for handle in handles:
                handle.remove()

    def _keep(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self._map = output

    def _tokens(self, value: Any, name: str, grid: tuple[int, ...]) -> tuple[Tensor, tuple[int, ...]]:
        """A depth's output -> tokens (B, N, D) and the extent of their places: `grid` where it does not say."""
        if isinstance(value, tuple):  # of a block of MViT
            value, grid = value
        if value.ndim == 3:
            return value[:, self._prefix :], grid
        if self._channels_last and name != "permute":
            return value.flatten(1, -2), tuple(value.shape[1:-1])
        return value.flatten(2).transpose(1, 2), tuple(value.shape[2:])

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Features:
        """Pictures or clips -> Features, grid (h, w) or (t, h, w); see the base class."""
        self._check(x)
        output: Tensor = self.net(x)
        deepest, self._map = self._map, None
        assert deepest is not None  # the hook saw it pass
        tokens, grid = self._tokens(deepest, self._deepest, self._grid)
        valid = places(valid, grid)
        if self._prefix or (isinstance(self.net, S3D) and valid is None):
            return Features(tokens, output, grid, valid)
        pooled: Tensor = getattr(self.net, self.head)(masked_mean(tokens, valid)[:, :, None, None])
        return Features(tokens, pooled.flatten(1), grid, valid)

    def pooling(self, frames: int, size: int) -> str:
        """The line without which torchvision takes no clips so small; empty where it does. See `note`."""
        small = frames < S3D_POOLED[0] or size < S3D_POOLED[1]
        return POOLING if small and isinstance(self.net, S3D) else ""

    def _check(self, x: Tensor) -> None:
        if self.frames is not None:
            check_clip(self.model, x, (self.frames, self.size, self.size))
        small = [extent < least for extent, least in zip(x.shape[2:], S3D_LEAST, strict=False)]
        if isinstance(self.net, S3D) and any(small):
            least, given = (" of ".join([str(t), f"{h} x {w}"]) for t, h, w in (S3D_LEAST, x.shape[2:]))
            raise RecipeError(f"{self.model} reads clips from {least} pixels on, got {given}: raise data.video")

    def forward_layers(self, x: Tensor, valid: Tensor | None = None) -> tuple[Features, dict[str, Features]]:
        """Depths are the top-level children, the trunk's one by one; see the base class."""
        with self._record(lambda tokens, grid: at_depth(tokens.clone(), grid, places(valid, grid))) as found:
            features = self(x, valid)
        return features, found

    def export(self, directory: Path, preprocessing: Mapping[str, Any]) -> None:
        """`model.safetensors`, and `config.json` that says how torchvision loads it."""
        directory.mkdir(parents=True, exist_ok=True)
        save_file(native_state(self.net), directory / "model.safetensors")
        config = {"library": "torchvision", "builder": self.model.partition("/")[2], "kwargs": self.kwargs}
        load = "net = torchvision.models.get_model(builder, **kwargs); net.load_state_dict(weights"
        if "num_classes" in self.kwargs:  # the whole network, with a classifier
            config |= {"load": f"{load})"}
        else:
            missing = f"misses nothing but the classifier in '{self.head}', which was not trained"
            config |= {"without": self.head, "load": f"{load}, strict=False) {missing}"}
        write_json(directory / "config.json", config | ({"note": self.note} if self.note else {}))


def _parameters(owner: str) -> set[str]:
    """Constructor's keywords of a network class of torchvision."""
    for module in (torchvision.models, torchvision.models.video):
        if hasattr(module, owner):
            return set(inspect.signature(getattr(module, owner)).parameters) - {"num_classes"}
    return set()


class _WindowMean(nn.AvgPool3d):
    """Of maps (B, C, t, h, w): the means of windows, or of all places where they are fewer than a window has."""

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        assert isinstance(self.kernel_size, tuple)
        fits = all(extent >= size for extent, size in zip(x.shape[2:], self.kernel_size, strict=True))
        return super().forward(x) if fits else F.adaptive_avg_pool3d(x, 1)


def _without_classifier(head: nn.Module) -> nn.Module:
    """What is in a head before the first layer of the classifier: a norm in ConvNeXt and MaxViT, else nothing."""
    kept = []
    for module in head if isinstance(head, nn.Sequential) else [head]:
        if isinstance(module, nn.Linear | nn.Dropout):
            break
        kept.append(module)
    return nn.Sequential(*kept) if kept else nn.Identity()


class Torchvision(Library):
    """Networks of torchvision for images and video, without their classifier."""

    refused = ("num_classes", "weights", "weights_backbone", "progress")
    modalities = ("image", "audio", "video")

    @staticmethod
    def create(
        name: str, modality: str, pretrained: Pretrained, kwargs: Mapping[str, Any], **options: Any
    ) -> TorchvisionNetwork:
        """See the base class."""
        return TorchvisionNetwork(name, pretrained, kwargs)
