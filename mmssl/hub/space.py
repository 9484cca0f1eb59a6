"""The space in which a task compares two encoders, for those who search in it without mmssl."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torchvision.models import VGG, AlexNet

from mmssl.encoders._network import NetworkEncoder
from mmssl.encoders.backbones._transformers_patches import pair as both_sides
from mmssl.encoders.base import Encoder
from mmssl.objectives.base import Pair

if TYPE_CHECKING:
    from mmssl.run_directory import Run

PROJECTIONS = "projections.safetensors"

SPACE = """
import torch
from safetensors.torch import load_file

{loading}
maps = load_file("{file}")


def to_space(name, pooled):  # (B, D) -> unit vectors (B, W)
    mapped = torch.nn.functional.linear(pooled, maps[f"{{name}}.weight"], maps.get(f"{{name}}.bias"))
    return torch.nn.functional.normalize(mapped, dim=-1)


{functions}


# How well each {a} fits each {b}: embed_{a}(...) @ embed_{b}(...).T
"""


def projections(run: Run) -> dict[str, Tensor]:
    """The maps of every pair of a run's task, `<a>_<b>.<name>.weight` and `.bias`; empty where there are none."""
    found = {}
    for pair in run.objective.pairs:
        for name, linear in zip((pair.a, pair.b), pair.project or (), strict=False):
            found[f"{_title(pair)}.{name}.weight"] = linear.weight
            if linear.bias is not None:
                found[f"{_title(pair)}.{name}.bias"] = linear.bias
    return {key: value.detach().cpu().contiguous() for key, value in found.items()}


def explain(run: Run, loads: Mapping[str, str]) -> list[str]:
    """Lines of README.md: plain PyTorch that embeds both sides of each pair.

    Args:
        run: whose task compares them.
        loads: name of encoder -> the lines that load its native network as `model`.
    """
    lines: list[str] = []
    for pair in run.objective.pairs:
        if pair.project is None:
            continue
        loading: dict[str, list[str]] = {}
        for name in (pair.a, pair.b):
            loading.setdefault(loads[name], []).append(name)
        code = SPACE.format(
            file=PROJECTIONS,
            loading="\n".join(
                f"{text}\n{' = '.join(map(_variable, names))} = model.eval()" for text, names in loading.items()
            ),
            functions="\n\n\n".join(_function(pair, name, run.encoders) for name in (pair.a, pair.b)),
            a=_variable(pair.a),
            b=_variable(pair.b),
        )
        lines += [
            "",
            f"## One space for {pair.a} and {pair.b}",
            "",
            "What the task learned to compare, and search needs. Inputs are as `preprocessing.json` says.",
            "",
            "```python",
            *code.strip().split("\n"),
            "```",
        ]
    return lines


def _title(pair: Pair) -> str:
    return f"{pair.a}_{pair.b}"


def _variable(name: str) -> str:
    return name.replace("-", "_")


def _function(pair: Pair, name: str, encoders: Mapping[str, Encoder]) -> str:
    """`embed_<name>`, from what the network reads to the space."""
    given, lines, pooled = pooled_lines(encoders[name], _variable(name))
    body = [*lines, f'return to_space("{_title(pair)}.{name}", {pooled})']
    return f"def embed_{_variable(name)}({given}):\n" + "\n".join(f"    {line}" for line in body)


def resampling(encoder: Encoder) -> str:
    """The argument with which a network of transformers takes pictures of another size than it was built for."""
    network: Any = encoder.backbone
    config = network.native.net.config
    assert isinstance(encoder, NetworkEncoder)  # as all of transformers are
    asks = config.model_type in ("vit", "siglip_vision_model")  # others need not be told
    other = asks and both_sides(config.image_size) != encoder.input_size()[1:]
    return ", interpolate_pos_encoding=True" if other else ""


def over_frames(encoder: Encoder, expression: str) -> str:
    """An expression for pictures `x` as one for what the network reads: frame by frame where that is a clip."""
    network: Any = encoder.backbone
    if network.native is network:
        return expression
    over = "mean(1)" if network.temporal == "mean" else "amax(1)"
    return f"{expression.replace('(x', '(x.flatten(0, 1)', 1)}.unflatten(0, x.shape[:2]).{over}"


def pooled_lines(encoder: Encoder, model: str) -> tuple[str, list[str], str]:
    """Argument, lines and expression of the pooled features of a native network, whose variable is `model`.

    The argument `x` is normalized, and of clips not yet what changed; see `input_lines` for all of it.
    """
    library = str(encoder.spec["model"]).partition("/")[0]
    network: Any = encoder.backbone
    if encoder.modality == "text":
        if library == "open_clip":
            return "texts", [], f"{model}.encode_text(tokenizer(texts))"
        lines = [
            'tokens = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")',
            f"hidden = {model}(**tokens).last_hidden_state",
        ]
        if encoder.spec.get("pool") == "first":
            return "texts", lines, "hidden[:, 0]"
        mask = 'mask = tokens["attention_mask"].unsqueeze(2)'
        return "texts", [*lines, mask], "(hidden * mask).sum(1) / mask.sum(1)"
    unsaid = "pooled", ["# (B, D): see `pooled` of mmssl's Features for what this network's is"], "pooled"
    if encoder.spec.get("temporal") == "transformer":  # which is not among the native files
        return unsaid
    net, lines = network.native.net, list[str]()
    if encoder.spec.get("difference"):
        time, first = (2, ":, :, :1") if getattr(encoder, "layout", "") == "(B, 3, T, H, W)" else (1, ":, :1")
        lines = [f"x = torch.cat([torch.zeros_like(x[{first}]), x.diff(dim={time})], dim={time})"]
    if library == "transformers":
        attends = getattr(net, "head", None) is not None
        siglip = "pooler_output" if attends else "last_hidden_state.mean(1)"
        pooled = {
            "convnext": "pooler_output",
            "siglip_vision_model": siglip,
            "audio-spectrogram-transformer": "pooler_output",
            **dict.fromkeys(("videomae", "wav2vec2", "hubert", "wavlm"), "last_hidden_state.mean(1)"),
        }
        where = pooled.get(net.config.model_type, "last_hidden_state[:, 0]")
        return "x", lines, over_frames(encoder, f"{model}(x{resampling(encoder)}).{where}")
    calls = {"timm": f"{model}(x)", "torchvision": f"{model}(x)", "open_clip": f"{model}.encode_image(x)"}
    if library not in calls:
        return unsaid
    if isinstance(net, AlexNet | VGG):  # their classifier sees several places
        return "x", lines, over_frames(encoder, f"{model}.features(x).mean((2, 3))")
    return "x", lines, over_frames(encoder, calls[library])
