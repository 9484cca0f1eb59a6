"""A classifier's linear head inside of the class that its network's library has for classifiers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from transformers import (
    AutoModelForAudioClassification,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoModelForVideoClassification,
)

from mmssl.encoders.base import Encoder
from mmssl.encoders.text import TextEncoder
from mmssl.hub.classifier import Classifier
from mmssl.hub.space import resampling

PROBLEMS = {"classes": "single_label_classification", "labels": "multi_label_classification", "values": "regression"}
# What a network reads -> the class of transformers that has a classifier on it.
AUTO: dict[str, Any] = {
    "pictures": AutoModelForImageClassification,
    "texts": AutoModelForSequenceClassification,
    "clips": AutoModelForVideoClassification,
    "waveforms": AutoModelForAudioClassification,
    "filter banks": AutoModelForAudioClassification,
}
# Model type -> the layer with a tanh that its class has between the first token and the classifier.
TANH = {
    **dict.fromkeys(("bert", "albert"), "pooler"),
    **dict.fromkeys(("roberta", "xlm-roberta", "camembert"), "classifier.dense"),
}
AST = "audio-spectrogram-transformer"
SLOPE = 2.0**-12
"""Of that layer: tanh(s x) / s is x up to a part of (s x)^2 / 3, six millionths of it at x = 16."""


class Unsaid(Exception):
    """A sentence on why no class of the library holds this head."""


def with_head(classifier: Classifier) -> Encoder:
    """A copy of the encoder, whose network is the library's own classifier with the head in it; `export` writes that.

    Raises:
        Unsaid: where there is no such class, or it pools otherwise: its outputs on random inputs are others.
    """
    encoder: Any = copy.deepcopy(classifier.encoder).cpu().eval()
    library = str(encoder.spec["model"]).partition("/")[0]
    builders: dict[str, Callable[..., nn.Module]] = {
        "timm": _of_timm,
        "torchvision": _of_torchvision,
        "transformers": _of_transformers,
    }
    if library not in builders:
        raise Unsaid(f"{library} has no class for classifiers")
    network: Any = encoder.backbone.native
    if network is not encoder.backbone and encoder.backbone.temporal != "mean":
        raise Unsaid("the frames of a clip are pooled by their maximum, and a classifier of pictures sees one alone")
    weight, bias = classifier.objective.linear()
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        x, valid = _some_inputs(encoder)
        expected = encoder(x, valid).pooled @ weight.T + bias
        net = builders[library](network, weight, bias, classifier).eval()
        outputs = _outputs(net, encoder, x, valid)
    if outputs.shape != expected.shape or not torch.allclose(outputs, expected, atol=1e-5, rtol=1e-4):
        raise Unsaid(f"{type(net).__name__} of {library} makes something else of the network's tokens")
    network.net = net
    return encoder


def _outputs(net: Any, encoder: Any, x: Tensor, valid: Tensor | None) -> Tensor:
    """Of a network with its head, of raw rows; of the frames of a clip the mean, which is what a linear head does."""
    if valid is not None:
        logits: Tensor = net(input_ids=x, attention_mask=valid.long()).logits
        return logits
    network, given = encoder.backbone, encoder.prepare(x)[0]
    if network.native is not network:
        given = given.transpose(1, 2).flatten(0, 1)
    elif network.reads == "clips" and encoder.layout != "(B, 3, T, H, W)":
        given = given.transpose(1, 2)
    elif network.reads == "filter banks":
        given = given[:, 0].mT
    asked: dict[str, Any] = {}
    if hasattr(net, "config") and network.native.reads == "pictures" and resampling(encoder):
        asked["interpolate_pos_encoding"] = True
    outputs: Any = net(given, **asked)
    found: Tensor = getattr(outputs, "logits", outputs)
    return found if network.native is network else found.unflatten(0, (len(x), -1)).mean(1)


def _some_inputs(encoder: Any) -> tuple[Tensor, Tensor | None]:
    if isinstance(encoder, TextEncoder):
        length = min(encoder.reading().text.length, 16)
        valid = torch.arange(length) < torch.tensor([[length], [length // 2]])
        return torch.randint(encoder.tokenizer.vocab_size, (2, length)), valid
    if encoder.modality == "audio":
        how = encoder.reading().audio
        return torch.rand(2, round(how.rate * how.seconds)) - 0.5, None
    frames = (encoder.reading().video.frames,) if encoder.modality == "video" else ()
    return torch.randint(256, (2, *frames, *encoder.input_size()), dtype=torch.uint8), None


def _of_timm(network: Any, weight: Tensor, bias: Tensor, classifier: Classifier) -> nn.Module:
    net = network.net
    net.reset_classifier(len(weight))
    found = net.get_classifier()
    # A distilled network has two, and its answer is their mean.
    for layer in found if isinstance(found, tuple) else (found,):
        if not isinstance(layer, nn.Linear | nn.Conv2d) or layer.weight.numel() != weight.numel() or layer.bias is None:
            raise Unsaid(f"the classifier of timm's {type(net).__name__} is no linear map of these features")
        layer.weight.copy_(weight.view_as(layer.weight))
        layer.bias.copy_(bias)
    return net


def _of_torchvision(network: Any, weight: Tensor, bias: Tensor, classifier: Classifier) -> nn.Module:
    kwargs = {**network.kwargs, "num_classes": len(weight)}
    net: nn.Module = torchvision.models.get_model(network.model.partition("/")[2], **kwargs)
    missing = net.load_state_dict(network.net.state_dict(), strict=False).missing_keys
    layers = dict.fromkeys(name.rpartition(".")[0] for name in missing)
    layer = net.get_submodule(next(iter(layers)))
    if len(layers) > 1 or not isinstance(layer, nn.Linear) or layer.weight.shape != weight.shape:
        raise Unsaid(f"the classifier of torchvision's {type(net).__name__} is not one linear layer")
    layer.weight.copy_(weight)
    layer.bias.copy_(bias)
    network.kwargs = kwargs
    return net


def _of_transformers(network: Any, weight: Tensor, bias: Tensor, classifier: Classifier) -> nn.Module:
    config, auto = copy.deepcopy(network.net.config), AUTO[network.reads]
    names = classifier.target.names or range(len(weight))
    config.id2label = {number: str(name) for number, name in enumerate(names)}
    config.label2id = {str(name): number for number, name in enumerate(names)}
    config.problem_type = PROBLEMS[classifier.target.name]
    if type(config) not in auto._model_mapping or config.is_encoder_decoder:
        raise Unsaid(f"{auto.__name__} has no class for {network.model}")
    if network.reads == "waveforms":  # frames are projected before their mean, here by the identity
        config.classifier_proj_size, config.use_weighted_layer_sum = config.hidden_size, False
    net: Any = auto.from_config(config)
    kind, type_ = type(net).__name__, config.model_type
    if classifier.encoder.modality == "text" and network.pooling == "mean":
        raise Unsaid(f"it reads the mean of the tokens, and {kind} does not put its classifier there")
    if classifier.encoder.modality == "text" and type_ not in TANH:
        raise Unsaid(f"it reads the first token, and {kind} has a layer of its own before its classifier")
    missing, unexpected = net.base_model.load_state_dict(network.net.state_dict(), strict=False)
    if unexpected or any(not name.startswith("pooler") for name in missing):
        raise Unsaid(f"{kind} holds another network than {network.model}")
    if getattr(net, "fc_norm", None) is not None or type_ == AST:
        raise Unsaid(f"{kind} has a norm of its own before its classifier")
    if network.reads == "waveforms":
        net.projector.weight.copy_(torch.eye(config.hidden_size))
        net.projector.bias.zero_()
    if type_ in TANH:
        _pass_through(net, TANH[type_])
        weight = weight / SLOPE
    last = net.classifier if isinstance(net.classifier, nn.Linear) else net.classifier.out_proj
    # DINOv2's sees the mean of the patches after the class token.
    last.weight.zero_()
    last.weight[:, : weight.shape[1]] = weight
    last.bias.copy_(bias)
    return net


def _pass_through(net: Any, name: str) -> None:
    """Make a square layer before a tanh the identity, so small that tanh is linear."""
    layer = net.base_model.pooler if name == "pooler" else net.get_submodule(name)
    layer = getattr(layer, "dense", layer)
    layer.weight.copy_(SLOPE * torch.eye(len(layer.weight)))
    layer.bias.zero_()
