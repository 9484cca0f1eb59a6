"""A classifier of pictures that somebody else has trained, and that only answers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmssl.encoders import create
from mmssl.encoders.backbones._files import load_weights, read_weights
from mmssl.encoders.backbones.base import build_errors, split_model
from mmssl.encoders.base import Encoder
from mmssl.errors import RecipeError, nearest
from mmssl.modules.mode import evaluating


class PictureClassifier(nn.Module):
    """Pictures -> probabilities of classes, without gradient and always in evaluation mode.

    Args:
        given: `{model: timm/NAME, pretrained: true, ...}`, a network of timm with the classifier that it was published
            with, whose weights come when `load` is called; or `{folder: PATH}`, what `mmssl adapt --probe finetune
            --save PATH` wrote.

    Attributes:
        classes: K.

    Raises:
        RecipeError: for anything else, or a folder that holds no classifier of pictures.
    """

    classes: int

    def __init__(self, given: Mapping[str, Any]) -> None:
        super().__init__()
        if not ("folder" in given) ^ ("model" in given) or ("folder" in given and len(given) > 1):
            raise RecipeError(
                f"a classifier is {{model: timm/NAME, pretrained: true}} or {{folder: PATH}}, and here is {dict(given)}"
            )
        self.given = dict(given)
        net: Any = self._saved(Path(given["folder"])) if "folder" in given else self._published(pretrained=False)
        self.net, self.classes = net, int(net.num_classes)
        self.requires_grad_(False)

    def _published(self, *, pretrained: bool) -> _Published:
        kwargs = {key: value for key, value in self.given.items() if key not in ("model", "pretrained")}
        library, name = split_model(self.given["model"])
        if library != "timm":
            raise RecipeError(f"classifiers that are published are timm's, and {self.given['model']} is {library}'s")
        import timm

        if not timm.is_model(name):
            raise RecipeError(f"timm has no network '{name}'{nearest(name, timm.list_models())}")
        with build_errors(self.given["model"]):
            return _Published(timm.create_model(name, pretrained=pretrained, **kwargs))

    @staticmethod
    def _saved(folder: Path) -> _Saved:
        try:
            stored = json.loads((folder / "classifier.json").read_text(encoding="utf-8"))
            arguments, target = stored["encoder"], stored["target"]["name"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RecipeError(
                f"{folder} holds no classifier; mmssl adapt RUN --probe finetune --save {folder} writes one"
            ) from error
        if arguments.get("modality") != "image" or target != "classes":
            raise RecipeError(f"{folder}: this classifier is not of pictures into classes")
        state = read_weights(folder / "model.safetensors")
        net = _Saved(create(**arguments), len(state["head.bias"]))
        load_weights(net, state, str(folder), drop=("scale", "shift"))  # units, which classes have not
        return net

    @torch.no_grad()
    def load(self) -> None:
        """Fetch the weights of a published network, where they are asked for."""
        if self.given.get("pretrained"):
            self.net.load_state_dict(self._published(pretrained=True).state_dict())

    @torch.no_grad()
    def forward(self, pictures: Tensor) -> Tensor:
        """Pictures (B, 3, H, W), uint8 or floats in [0, 1] -> probabilities (B, K)."""
        with evaluating(self.net):
            probabilities: Tensor = self.net(pictures).softmax(1)
        return probabilities


class _Published(nn.Module):
    """A network of timm with its classifier, and what its pictures are normalized by."""

    def __init__(self, net: Any) -> None:
        super().__init__()
        self.net, self.num_classes = net, net.num_classes
        self.mean, self.std = (
            nn.Buffer(torch.tensor(net.pretrained_cfg[key])[:, None, None]) for key in ("mean", "std")
        )

    def forward(self, pictures: Tensor) -> Tensor:
        x = pictures if pictures.is_floating_point() else pictures / 255
        logits: Tensor = self.net((x.to(self.mean.dtype) - self.mean) / self.std)
        return logits


class _Saved(nn.Module):
    """An encoder with a linear head, by the names that fine-tuning gives its weights."""

    def __init__(self, encoder: Encoder, classes: int) -> None:
        super().__init__()
        self.encoders = nn.ModuleDict({"image": encoder})
        self.center, self.spread = nn.Buffer(torch.zeros(encoder.dim)), nn.Buffer(torch.ones(()))
        self.head, self.num_classes = nn.Linear(encoder.dim, classes), classes

    def forward(self, pictures: Tensor) -> Tensor:
        pooled = self.encoders["image"](pictures).pooled
        logits: Tensor = self.head((pooled - self.center) / self.spread)
        return logits
