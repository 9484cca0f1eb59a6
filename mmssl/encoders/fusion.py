"""Two modalities together: layers over what two encoders made of a pair.

`joint`: the tokens of both attend to each other after a start token of their own, as in FLAVA (Singh et al. 2022,
arXiv 2112.04482): transformers' `FlavaMultimodalModel`. `cross`: `b` attends to itself, then to `a`, as the text layers
of ALBEF and BLIP and the decoder of CoCa do (arXiv 2107.07651, 2201.12086, 2205.01917): layers of transformers' BERT
with cross-attention. `multiway`: all attend together, then each modality has a feed-forward expert of its own and pairs
have a third one in the top layers, as in VLMo and BEiT-3 (Bao et al. 2022, arXiv 2111.02358; Wang et al. 2022, arXiv
2208.10442): blocks of a timm vision transformer. `bottleneck`: each modality has blocks of its own, and a few tokens
that both read are all that passes between them, as in MBT (Nagrani et al. 2021, arXiv 2107.00135, section 3.2): in each
layer either side writes a version of these, and the mean of both versions is read in the next.

Known traps. A padding token that may be attended to changes a row with the length of its neighbors. transformers
starts weights with a standard deviation of 0.02, made for a width of 768: in narrow layers `b` hardly sees `a` at
first, and whether they match is learned late. An `initializer_range` of 0.02 · sqrt(768 / width) starts them alike: at
width 32, two layers on synthetic pairs were at a loss of 0.43 after 300 steps with 0.02, and at 0.02 with 0.1. An
expert that sees no token has no gradient, which distributed training waits for; here it gets one of 0. torchscale's
code for BEiT-3 splits the projections of attention and its norms by modality, too, and has no expert for pairs; here,
as in the paper, attention and its norm are shared, and an expert is a norm and a feed-forward network. Of a bottleneck,
what one side writes in the last layer nobody reads: with one layer nothing passes at all.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mmssl.encoders.backbones._files import LOCAL_DIR, load_weights, native_state, read_weights, write_json
from mmssl.encoders.backbones.base import Pretrained, build_errors, refuse, split_model
from mmssl.encoders.base import Encoder, Features, attendable, masked_mean
from mmssl.errors import RecipeError, nearest
from mmssl.ranges import Positive

# What of transformers' configurations makes a layer.
LAYER = {
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act", "layer_norm_eps"),
    *("hidden_dropout_prob", "attention_probs_dropout_prob", "initializer_range"),
}
KINDS: dict[str, Literal["joint", "cross"]] = {"transformers/flava": "joint", "transformers/bert": "cross"}


class Fused(NamedTuple):
    """What the fusion says about a batch of pairs.

    Attributes:
        a: (B, N, D), one vector a token of `a`; None where it was not given, and for `cross`.
        b: (B, L, D), one vector a token of `b`; None where it was not given.
        pooled: (B, D), one vector a pair.
    """

    a: Tensor | None
    b: Tensor | None
    pooled: Tensor


class FusionEncoder(Encoder):
    """Features of `a` and of `b` -> Fused; it reads no data of its own, and no probe reads it.

    Args:
        model: `transformers/flava` (joint), `transformers/bert` (cross) or the name of a timm vision transformer,
            `timm/vit_base_patch16_224` (multiway, or bottleneck), of which the blocks are taken.
        reads: name -> width of the two encoders, `a` first. A recipe names them, `reads: [image, text]`, and their
            widths are filled in.
        pretrained: `local-dir:` and a directory that `export` wrote.
        pool: of `cross`, how a pair becomes one vector: the `first` token of `b` (default), or the `mean` of its valid
            ones. `joint` has a start token, `multiway` takes the mean of all valid tokens, and `bottleneck` that of
            `a`'s mean and `b`'s.
        joint_layers: of `multiway`, number of top layers in which pairs have an expert (default 3).
        bottleneck_tokens: how many tokens pass between the two sides, 4 in MBT; a timm vision transformer is
            `bottleneck` with them and `multiway` without.
        **kwargs: of the layers: `hidden_size`, `num_hidden_layers`, `num_attention_heads`, `intermediate_size` ... for
            transformers; `embed_dim`, `depth`, `num_heads`, `mlp_ratio` ... for timm.
    """

    modality = "fusion"
    kind: Literal["joint", "cross", "multiway", "bottleneck"]

    def __init__(
        self,
        model: str,
        *,
        reads: dict[str, int] | list[str],
        pretrained: Pretrained = False,
        pool: Literal["first", "mean"] | None = None,
        joint_layers: int | None = None,
        bottleneck_tokens: Positive | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        library, name = split_model(model)
        if isinstance(reads, list):
            raise RecipeError(
                f"{model}: reads = {reads}: outside a recipe their widths are needed, {{image: 64, text: 32}}"
            )
        if len(reads) != 2:
            raise RecipeError(f"{model}: reads names two encoders, a and b; got {', '.join(reads) or 'none'}")
        if model not in KINDS and library != "timm":
            raise RecipeError(
                f"model '{model}' is no fusion; there are {', '.join(KINDS)} and the vision transformers of timm"
            )
        self.kind = KINDS.get(model, "multiway" if bottleneck_tokens is None else "bottleneck")
        if pool is not None and self.kind != "cross":
            raise RecipeError(f"{model}: 'pool' is for transformers/bert; a {self.kind} fusion has one way to pool")
        if joint_layers is not None and self.kind != "multiway":
            raise RecipeError(
                f"{model}: 'joint_layers' is for the experts of a timm vision transformer, a multiway one"
            )
        if bottleneck_tokens is not None and self.kind != "bottleneck":
            raise RecipeError(f"{model}: 'bottleneck_tokens' is for the blocks of a timm vision transformer")
        self.net: Any
        if self.kind == "joint":
            self.net = _Joint(model, kwargs)
        elif self.kind == "cross":
            self.net = _Cross(model, kwargs, pool or "first")
        elif bottleneck_tokens is not None:
            self.net = _Bottleneck(name, kwargs, bottleneck_tokens)
        else:
            self.net = _Multiway(name, kwargs, 3 if joint_layers is None else joint_layers)
        self.dim = self.net.dim
        self.reads = dict(reads)
        width_a, width_b = reads.values()
        self.map_a, self.map_b = nn.Linear(width_a, self.dim), nn.Linear(width_b, self.dim)
        self.spec = {"model": model, "modality": "fusion", "reads": self.reads, **kwargs}
        own = {"pool": pool, "joint_layers": joint_layers, "bottleneck_tokens": bottleneck_tokens}
        self.spec |= {key: value for key, value in own.items() if value is not None}
        if pretrained:
            if not isinstance(pretrained, str) or not pretrained.startswith(LOCAL_DIR):
                raise RecipeError(f"{model}: pretrained: a fusion has no published weights; give local-dir:DIRECTORY")
            folder = Path(pretrained.removeprefix(LOCAL_DIR))
            load_weights(self, read_weights(folder / "model.safetensors"), f"{model}: pretrained: {folder}")

    # A fusion reads what encoders made, not raw data.
    def forward(self, a: Features | None, b: Features | None, *, causal: bool = False) -> Fused:  # type: ignore[override]
        """Fuse pairs.

        Args:
            a: of the first encoder; only `multiway` takes None.
            b: of the second, likewise.
            causal: `cross` only: a token of `b` sees no later ones.

        Raises:
            ValueError: for a missing side, or `causal` where it is not possible.
        """
        given = b if a is None else a
        if given is None or (self.kind != "multiway" and (a is None or b is None)):
            raise ValueError(f"{self.spec['model']} fuses both sides of a pair, and one is missing")
        if causal and self.kind != "cross":
            raise ValueError(f"{self.spec['model']} reads both ways; for a causal decoder take transformers/bert")
        rows = given.tokens.shape[0]
        sides = []
        for features, linear in ((a, self.map_a), (b, self.map_b)):
            # A missing side has no tokens, and its map a gradient of 0.
            tokens = given.tokens.new_zeros(rows, 0, linear.in_features) if features is None else features.tokens
            valid = None if features is None else features.valid
            valid = tokens.new_ones(tokens.shape[:2], dtype=torch.bool) if valid is None else attendable(valid)
            sides.append((linear(tokens), valid))
        fused: Fused = self.net(*sides, causal)
        return fused._replace(a=None if a is None else fused.a, b=None if b is None else fused.b)

    def export(self, directory: Path) -> None:
        """Write `model.safetensors` and `fusion.json`, the arguments of `mmssl.encoder` that go with it.

        No library reads two encoders' tokens by itself, so there is no native form: the folder is loaded by
        `mmssl.encoder(**arguments, pretrained="local-dir:FOLDER")`.
        """
        write_json(Path(directory) / "fusion.json", self.spec)
        save_file(native_state(self), Path(directory) / "model.safetensors", metadata={"format": "pt"})


Side = tuple[Tensor, Tensor]
"""Tokens (B, N, D) and which of them may be attended to, bool (B, N)."""


def _check_layer(model: str, kwargs: Mapping[str, Any], *also: str) -> None:
    refuse(model, kwargs)
    known = LAYER | {*also}
    for key in kwargs:
        if key not in known:
            raise RecipeError(f"{model}: unknown key '{key}'{nearest(key, known)}")


class _Joint(nn.Module):
    """transformers' multimodal model of FLAVA, without its pooler."""

    def __init__(self, model: str, kwargs: Mapping[str, Any]) -> None:
        super().__init__()
        from transformers import FlavaMultimodalConfig, FlavaMultimodalModel

        _check_layer(model, kwargs, "qkv_bias")
        with build_errors(model):
            config = FlavaMultimodalConfig(**kwargs)
            self.net: Any = FlavaMultimodalModel(config, add_pooling_layer=False)
        self.dim = int(config.hidden_size)

    def forward(self, side_a: Side, side_b: Side, causal: bool) -> Fused:
        (a, valid_a), (b, valid_b) = side_a, side_b
        start = torch.ones_like(valid_a[:, :1])
        valid = torch.cat([start, valid_a, valid_b], dim=1)
        tokens = self.net(torch.cat([a, b], dim=1), attention_mask=valid.long()).last_hidden_state
        return Fused(tokens[:, 1 : 1 + a.shape[1]], tokens[:, 1 + a.shape[1] :], tokens[:, 0])


class _Cross(nn.Module):
    """Layers of transformers' BERT with cross-attention."""

    def __init__(self, model: str, kwargs: Mapping[str, Any], pool: str) -> None:
        super().__init__()
        from transformers import BertConfig, BertModel

        _check_layer(model, kwargs)
        # Its embeddings are thrown away.
        fixed: dict[str, Any] = {"vocab_size": 1, "max_position_embeddings": 1, "attn_implementation": "sdpa"}
        with build_errors(model):
            config = BertConfig(is_decoder=True, add_cross_attention=True, **fixed, **kwargs)
            self.net: Any = BertModel(config, add_pooling_layer=False).encoder
        self.dim, self.pool = int(config.hidden_size), pool

    def forward(self, side_a: Side, side_b: Side, causal: bool) -> Fused:
        (a, valid_a), (b, valid_b) = side_a, side_b
        # (B, 1, from, to). A causal token always sees itself, so that none before the first valid one sees nothing.
        seen = valid_b[:, None, None].expand(-1, -1, b.shape[1], -1)
        if causal:
            itself = torch.eye(b.shape[1], dtype=torch.bool, device=b.device)
            seen = seen.tril() | itself
        tokens = self.net(
            b,
            attention_mask=seen,
            encoder_hidden_states=a,
            encoder_attention_mask=valid_a[:, None, None].expand(-1, -1, b.shape[1], -1),
            use_cache=False,
        ).last_hidden_state
        return Fused(None, tokens, tokens[:, 0] if self.pool == "first" else masked_mean(tokens, valid_b))


class _Expert(nn.Module):
    """Norm and feed-forward network of a timm block."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.norm, self.mlp, self.scale = block.norm2, block.mlp, block.ls2

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.scale(self.mlp(self.norm(x)))
        return out


class _MultiwayLayer(nn.Module):
    """One timm block whose feed-forward half depends on what a token is.

    Args:
        blocks: of equal shape, each with random weights of its own: the first gives the attention, and all an expert,
            of `a`, of `b` and, where there is a third, of pairs.
    """

    def __init__(self, blocks: list[Any]) -> None:
        super().__init__()
        first = blocks[0]
        self.norm, self.attention, self.scale = first.norm1, first.attn, first.ls1
        self.drop, self.drop_expert = first.drop_path1, first.drop_path2
        self.experts = nn.ModuleList(_Expert(block) for block in blocks)

    def forward(self, x: Tensor, seen: Tensor, length_a: int) -> Tensor:
        """Tokens x (B, N + L, D), of which the first N are of `a`, and `seen` bool (B, 1, 1, N + L)."""
        x = x + self.drop(self.scale(self.attention(self.norm(x), attn_mask=seen)))
        a, b = x[:, :length_a], x[:, length_a:]
        parts = [a, b]
        if len(self.experts) == 3:
            none = x[:, :0]
            parts = [none, none, x] if a.shape[1] and b.shape[1] else [a, b, none]
        # An expert without a token gets a gradient of 0 and not none: DistributedDataParallel waits for one.
        out = torch.cat([expert(part) for expert, part in zip(self.experts, parts, strict=True)], dim=1)
        return x + self.drop_expert(out)


def _vision_transformers(name: str, kwargs: Mapping[str, Any], number: int) -> list[Any]:
    """So many networks of timm of one shape, with random weights of their own and plain blocks."""
    import timm
    from timm.models.vision_transformer import Block

    model = f"timm/{name}"
    refuse(model, kwargs)
    with build_errors(model):
        nets: list[Any] = [timm.create_model(name, num_classes=0, **kwargs) for _ in range(number)]
    if not all(type(block) is Block for block in getattr(nets[0], "blocks", [None])):
        raise RecipeError(f"{model}: a fusion needs plain blocks, such as those of timm/vit_base_patch16_224")
    return nets


class _Multiway(nn.Module):
    """Blocks of a timm vision transformer with an expert a modality, and one for pairs in the top layers."""

    def __init__(self, name: str, kwargs: Mapping[str, Any], joint_layers: int) -> None:
        super().__init__()
        nets = _vision_transformers(name, kwargs, 3)
        stacks = [list(net.blocks) for net in nets]
        if not 0 <= joint_layers <= len(stacks[0]):
            raise RecipeError(f"timm/{name}: joint_layers = {joint_layers}, and there are {len(stacks[0])} layers")
        joint_from = len(stacks[0]) - joint_layers
        self.layers = nn.ModuleList(
            _MultiwayLayer(list(blocks[: 2 if i < joint_from else 3]))
            for i, blocks in enumerate(zip(*stacks, strict=True))
        )
        self.norm, self.dim = nets[0].norm, int(nets[0].num_features)

    def forward(self, side_a: Side, side_b: Side, causal: bool) -> Fused:
        (a, valid_a), (b, valid_b) = side_a, side_b
        x, valid, length = torch.cat([a, b], dim=1), torch.cat([valid_a, valid_b], dim=1), a.shape[1]
        for layer in self.layers:
            x = layer(x, valid[:, None, None], length)
        x = self.norm(x)
        return Fused(x[:, :length], x[:, length:], masked_mean(x, valid))


class _Bottleneck(nn.Module):
    """Blocks of a timm vision transformer for each modality, and the tokens through which alone they exchange."""

    def __init__(self, name: str, kwargs: Mapping[str, Any], tokens: int) -> None:
        super().__init__()
        nets = _vision_transformers(name, kwargs, 2)
        if len(nets[0].blocks) < 2:
            raise RecipeError(
                f"timm/{name}: a bottleneck needs a depth of 2 or more: what one layer writes is read in the next"
            )
        self.blocks, self.norms = (nn.ModuleList(getattr(net, part) for net in nets) for part in ("blocks", "norm"))
        self.dim = int(nets[0].num_features)
        self.tokens = nn.Parameter(torch.randn(tokens, self.dim) * 0.02)

    def forward(self, side_a: Side, side_b: Side, causal: bool) -> Fused:
        rows, number = len(side_a[0]), len(self.tokens)
        both, valid = map(list, zip(side_a, side_b, strict=True))
        always = valid[0].new_ones(rows, number)
        seen = [torch.cat([own, always], dim=1)[:, None, None] for own in valid]
        passed = self.tokens.to(both[0].dtype).expand(rows, -1, -1)
        for layer in zip(*self.blocks, strict=True):
            written = []
            for i, block in enumerate(layer):
                x = block(torch.cat([both[i], passed], dim=1), attn_mask=seen[i])
                both[i] = x[:, :-number]
                written.append(x[:, -number:])
            passed = (written[0] + written[1]) / 2
        a, b = (norm(x) for norm, x in zip(self.norms, both, strict=True))
        return Fused(a, b, (masked_mean(a, valid[0]) + masked_mean(b, valid[1])) / 2)
