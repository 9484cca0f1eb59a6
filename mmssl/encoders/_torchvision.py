"""Networks of torchvision for images and video, without their classifier."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models.swin_transformer import SwinTransformer

from mmssl.encoders.backbones import (
    LOCAL_DIR,
    Pretrained,
    VisionBackbone,
    build_errors,
    load_weights,
    masked_mean,
    native_state,
    nearest_model,
    places,
    read_config,
    read_weights,
    write_json,
)
from mmssl.encoders.base import Features
from mmssl.errors import RecipeError

HEADS = ("fc", "classifier", "heads", "head")
# A child of these names is a row of depths of its own.
TRUNKS = ("features", "layers", "blocks", "trunk_output", "encoder")
KINETICS_MEAN, KINETICS_STD = (0.43216, 0.394666, 0.37645), (0.22803, 0.22145, 0.216989)


class TorchvisionBackbone(VisionBackbone):
    """A classification network of torchvision, over pictures (B, 3, H, W) or clips (B, 3, T, H, W).

    Tokens are the places of the last map before pooling. The pooled vector is the network's own where it has their
    width, and else their mean (AlexNet, VGG, whose hidden layers behind the pooling belong to the classifier).
    """

    def __init__(self, name: str, pretrained: Pretrained, kwargs: Mapping[str, Any], *, video: bool = False) -> None:
        super().__init__()
        self.model, self.kwargs = f"torchvision/{name}", dict(kwargs)
        known = names(video)
        if name not in known:
            hint = nearest_model(name, known, "torchvision.models.list_models()")
            raise RecipeError(
                f"model '{self.model}': torchvision has no such {'video' if video else 'image'} network{hint}"
            )
        if "num_classes" in kwargs:
            raise RecipeError(f"{self.model}: 'num_classes' is not for an encoder: it has no classifier")
        if video:
            self.mean, self.std = KINETICS_MEAN, KINETICS_STD
        weights, state = self._weights(name, pretrained)
        keywords = {"aux_logits": False, **self.kwargs} if name in ("googlenet", "inception_v3") else self.kwargs
        builder = torchvision.models.get_model_builder(name)
        with build_errors(self.model, lambda owner: set(inspect.signature(builder).parameters) | _parameters(owner)):
            net = torchvision.models.get_model(name, weights=weights, **keywords)
        self.head = next(head for head in HEADS if hasattr(net, head))
        setattr(net, self.head, _without_classifier(getattr(net, self.head)))
        self.net = net
        if state is not None:
            load_weights(net, state, self.model, (self.head, "aux1", "aux2", "AuxLogits"))
        self._channels_last = isinstance(net, SwinTransformer)
        self._prefix = 1 if hasattr(net, "class_token") else 0
        size = kwargs.get("image_size", 224)
        with torch.no_grad():
            training = net.training
            probe = torch.zeros(1, 3, 16, 64, 64) if video else torch.zeros(1, 3, size, size)
            self.dim = net.eval() and self(probe).tokens.shape[2]
            net.train(training)

    def _weights(self, name: str, pretrained: Pretrained) -> tuple[str | None, dict[str, Tensor] | None]:
        if not isinstance(pretrained, str):
            return ("DEFAULT" if pretrained else None), None
        if pretrained.startswith(LOCAL_DIR):
            directory = Path(pretrained.removeprefix(LOCAL_DIR))
            config = read_config(directory, "config.json")
            if config.get("builder") != name:
                raise RecipeError(f"{self.model}: pretrained: {directory} holds a {config.get('builder')}")
            self.kwargs = {**config.get("kwargs", {}), **self.kwargs}
            return None, read_weights(directory / "model.safetensors")
        if Path(pretrained).is_file():
            return None, read_weights(pretrained)
        return pretrained, None

    def _depths(self) -> dict[str, nn.Module]:
        """Modules whose outputs are maps, shallow to deep, by name."""
        depths: dict[str, nn.Module] = {}
        for name, child in self.net.named_children():
            if name in (self.head, "avgpool", "flatten", "dropout"):
                continue
            inner = child.layers if name == "encoder" else child
            if name in TRUNKS and isinstance(inner, nn.Sequential | nn.ModuleList):
                depths |= {f"{name}.{key}": module for key, module in inner.named_children()}
            else:
                depths[name] = child
        return depths

    @contextmanager
    def _record(self) -> Iterator[dict[str, Tensor]]:
        """Outputs of the depths while the network runs, in order of execution."""
        maps: dict[str, Tensor] = {}

        def keep(name: str) -> Any:
            def hook(module: nn.Module, inputs: Any, output: Any) -> None:
                if isinstance(output, Tensor) and output.ndim >= 3:
                    maps[name] = output

            return hook

        handles = [module.register_forward_hook(keep(name)) for name, module in self._depths().items()]
        if self._prefix:
            handles.append(self.net.encoder.register_forward_hook(keep("encoder")))
        try:
            yield maps
        finally:
            for handle in handles:
                handle.remove()

    def _places(self, value: Tensor, name: str) -> tuple[Tensor, tuple[int, ...]]:
        """A recorded map -> (B, N, D) and the extent of its places."""
        if value.ndim == 3:
            side = round((value.shape[1] - self._prefix) ** 0.5)
            return value[:, self._prefix :], (side, side)
        if self._channels_last and name != "permute":
            return value.flatten(1, -2), tuple(value.shape[1:-1])
        return value.flatten(2).transpose(1, 2), tuple(value.shape[2:])

    def forward(self, x: Tensor, columns: Tensor | None = None) -> Features:
        """Pictures or clips -> Features, grid (h, w) or (t, h, w); see the base class."""
        with self._record() as maps:
            pooled: Tensor = self.net(x)
        name, last = maps.popitem()
        tokens, grid = self._places(last, name)
        mask = places(columns, grid)
        if mask is not None or pooled.shape[1:] != tokens.shape[2:]:
            pooled = masked_mean(tokens, mask)
        return Features(tokens, pooled, grid, mask)

    def layers(self, x: Tensor, columns: Tensor | None = None) -> dict[str, Tensor]:
        """The top-level children, the trunk's one by one; see the base class."""
        with self._record() as maps:
            self.net(x)
        depths = {}
        for name, value in maps.items():
            tokens, grid = self._places(value, name)
            depths[name] = masked_mean(tokens, places(columns, grid))
        return depths

    def export(self, directory: Path, preprocessing: Mapping[str, Any]) -> None:
        """`get_model(builder, **kwargs)`, the named module replaced, then `load_state_dict`: config.json says how."""
        directory.mkdir(parents=True, exist_ok=True)
        save_file(native_state(self.net), directory / "model.safetensors")
        name = self.model.partition("/")[2]
        replaced = getattr(self.net, self.head)
        write_json(
            directory / "config.json",
            {
                "library": "torchvision",
                "builder": name,
                "kwargs": self.kwargs,
                "without": self.head,
                "load": f"net = torchvision.models.get_model({name!r}, **kwargs); the classifier is cut off: load "
                f"model.safetensors with net.load_state_dict(state, strict=False), then put "
                f"{'torch.nn.Identity()' if isinstance(replaced, nn.Identity) else 'its first layers'} into net.{self.head}",
            },
        )


def names(video: bool) -> list[str]:
    """Classification networks of torchvision for images, or for video."""
    clips = torchvision.models.list_models(module=torchvision.models.video)
    return clips if video else torchvision.models.list_models(module=torchvision.models)


def _parameters(owner: str) -> set[str]:
    network = getattr(torchvision.models, owner, None)
    return set(inspect.signature(network).parameters) if network else set()


def _without_classifier(head: nn.Module) -> nn.Module:
    """The part of a head before its first layer that belongs to the classifier: ConvNeXt's norm, else nothing."""
    kept = []
    for module in head if isinstance(head, nn.Sequential) else [head]:
        if isinstance(module, nn.Linear | nn.Dropout | nn.Conv2d | nn.Conv3d):
            break
        kept.append(module)
    return nn.Sequential(*kept) if kept else nn.Identity()
