"""Encoders of a few hundred weights, without BatchNorm or dropout, that keep the contract of the real ones."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer as Words
from tokenizers.models import WordLevel
from torch import Tensor, nn

from mmssl.encoders import create
from mmssl.encoders.base import Encoder, Features
from mmssl.encoders.fusion import Fused
from mmssl.media.text import Tokenizer
from mmssl.media.vocabulary import SPECIAL_TOKENS


def _floats(x: Tensor, like: Tensor) -> Tensor:
    return x.to(like.dtype) if x.is_floating_point() else x.to(like.dtype) / 255


class TinyImage(Encoder):
    modality, dim = "image", 6

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 5, 3, stride=2), nn.Conv2d(5, self.dim, 3, stride=2)

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Features:
        maps = self.second(F.gelu(self.first(_floats(x, self.first.weight))))
        tokens = maps.flatten(2).mT
        return Features(tokens, tokens.mean(1), tuple(maps.shape[-2:]))


class NormedImage(TinyImage):
    """The rows of a batch meet in its BatchNorm, as in a ResNet."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(5)

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Features:
        maps = self.second(self.norm(self.first(x)).relu())
        return Features(maps.flatten(2).mT, maps.mean((2, 3)), tuple(maps.shape[-2:]))


class TinyVideo(Encoder):
    modality, dim = "video", 6

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Conv3d(3, self.dim, (3, 4, 4), stride=(1, 4, 4), padding=(1, 0, 0))

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Features:
        maps = self.net(_floats(x, self.net.weight).transpose(1, 2)).tanh()
        tokens = maps.flatten(2).mT
        return Features(tokens, tokens.mean(1), tuple(maps.shape[-3:]))


class TinyAudio(Encoder):
    modality, dim, rate, hop, mels, has_spectrogram = "audio", 5, 100, 4, 8, True

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Conv2d(1, self.dim, (4, 3), stride=(4, 1), padding=(0, 1))

    def spectrogram(self, x: Tensor) -> Tensor:
        frames = F.pad(x.to(self.net.weight.dtype), (0, self.mels)).unfold(1, self.mels, self.hop)
        return frames.mT.abs()

    def valid_frames(self, valid: Tensor) -> Tensor:
        return F.pad(valid, (0, self.mels)).unfold(1, self.mels, self.hop)[:, :, 0]

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Features:
        if x.ndim == 2:
            x, valid = self.spectrogram(x), None if valid is None else self.valid_frames(valid)
        if valid is not None:
            x = x * valid[:, None]
        maps = self.net(x[:, None]).tanh()
        tokens = maps.flatten(2).mT
        return Features(tokens, tokens.mean(1), tuple(maps.shape[-2:]))


class TinyTokenizer:
    """Ids 0 to 4 are padding, unknown, start, end and mask; the rest are words."""

    vocab_size, pad_id, special_ids, pair_ids = 30, 0, frozenset(range(5)), (2, 3)

    def __init__(self, mask_id: int | None = 4) -> None:
        self.mask_id = mask_id

    def __call__(self, text: str, length: int) -> tuple[Tensor, Tensor]:
        """Of the empty text."""
        return F.pad(torch.tensor([2, 3]), (0, length - 2)), torch.arange(length) < 2

    def decode(self, ids: Tensor) -> str:
        return " ".join(str(int(i)) for i in ids)


class TinyText(Encoder):
    modality, dim, decodes, embeds_segments = "text", 6, False, False

    def __init__(self, tokenizer: TinyTokenizer | None = None) -> None:
        super().__init__()
        self.tokenizer = tokenizer or TinyTokenizer()
        self.embedding, self.net = nn.Embedding(self.tokenizer.vocab_size, 4), nn.Linear(8, self.dim)

    @property
    def token_embedding(self) -> nn.Parameter:
        return self.embedding.weight

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Features:
        valid = torch.ones_like(x, dtype=torch.bool) if valid is None else valid
        words = self.embedding(x)
        weight = valid[..., None].to(words.dtype)
        mean = (words * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True)
        tokens = F.gelu(self.net(torch.cat([words, mean.expand_as(words)], -1)))
        return Features(tokens, (tokens * weight).sum(1) / weight.sum(1), (x.shape[1],), valid)

    def layers(self, x: Tensor, valid: Tensor | None = None) -> dict[str, Features]:
        return {"layers.0": self(x, valid)}


class DroppingText(TinyText):
    """Dropout whose masks are those of even rows and of odd ones, so that they do not depend on how a batch is cut."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Features:
        features = super().forward(x, valid)
        masks = torch.tensor([[2.0, 0, 2, 2, 0, 2], [0, 2, 2, 0, 2, 2]], dtype=features.pooled.dtype)
        return features._replace(pooled=features.pooled * masks[torch.arange(len(x)) % 2])


class TinyCausal(TinyText):
    """Each word with the mean of those up to it."""

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Features:
        valid = torch.ones_like(x, dtype=torch.bool) if valid is None else valid
        words = self.embedding(x)
        weight = valid[..., None].to(words.dtype)
        so_far = (words * weight).cumsum(1) / weight.cumsum(1).clamp(min=1)
        tokens = F.gelu(self.net(torch.cat([words, so_far], -1)))
        return Features(tokens, (tokens * weight).sum(1) / weight.sum(1), (x.shape[1],), valid)


class TinyCross(Encoder):
    """Each token of `b` attends to those of `a`, after a look at the mean of the tokens up to it, or of all."""

    modality, kind, dim = "fusion", "cross", 5

    def __init__(self, width_a: int = TinyImage.dim, width_b: int = TinyText.dim) -> None:
        super().__init__()
        self.map_a, self.map_b = nn.Linear(width_a, self.dim), nn.Linear(2 * width_b, self.dim)

    def forward(self, a: Features, b: Features, *, causal: bool = False) -> Fused:  # type: ignore[override]
        weight = torch.ones_like(b.tokens[..., :1]) if b.valid is None else b.valid[..., None].to(b.tokens.dtype)
        sums, counts = (b.tokens * weight).cumsum(1), weight.cumsum(1)
        mean = sums / counts.clamp(min=1) if causal else (sums[:, -1:] / counts[:, -1:]).expand_as(sums)
        query, memory = self.map_b(torch.cat([b.tokens, mean], -1)), self.map_a(a.tokens)
        score = query @ memory.mT
        if a.valid is not None:
            score = score.masked_fill(~a.valid[:, None], -1e4)
        tokens = torch.tanh(query + score.softmax(-1) @ memory)
        return Fused(None, tokens, tokens[:, 0])


def tiny_encoders() -> dict[str, Encoder]:
    return {"image": TinyImage(), "text": TinyText(), "audio": TinyAudio(), "video": TinyVideo()}


def tiny_captioners(a: str = "image") -> dict[str, Encoder]:
    """All of them with a causal text encoder, and the fusion of `a` and text."""
    encoders = tiny_encoders() | {"text": TinyCausal()}
    return encoders | {"fusion": TinyCross(encoders[a].dim)}


def tiny_fused(kind: str, a: str = "image", b: str = "text") -> dict[str, Encoder]:
    """All of them with a real fusion of `a` and `b`: `cross`, `joint` or `multiway`."""
    encoders = tiny_encoders()
    layer = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12}
    model, kwargs = {
        "cross": ("transformers/bert", layer | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}),
        "joint": ("transformers/flava", layer),
        "multiway": ("timm/vit_tiny_patch16_224", {"embed_dim": 8, "depth": 2, "num_heads": 2, "joint_layers": 0}),
    }[kind]
    reads = {name: encoders[name].dim for name in (a, b)}
    encoders["fusion"] = create(model, "fusion", reads=reads, **kwargs)
    for name, parameter in encoders["fusion"].named_parameters():
        nn.init.normal_(parameter, std=0.5)  # far from where every token says the same
        if name.endswith("key.bias"):  # it moves all scores of a softmax alike and has no gradient
            parameter.requires_grad_(False)
    return encoders


def tiny_patches() -> dict[str, Encoder]:
    """Networks that read their input patch by patch, for tasks that hide patches."""
    vit = {"patch_size": 4, "embed_dim": 8, "depth": 1, "num_heads": 2}
    sound = {"rate": 100, "n_fft": 16, "hop": 8, "mels": 8, "img_size": [8, 16]}
    return {
        "image": create("timm/vit_tiny_patch16_224", "image", img_size=12, **vit),
        "audio": create("timm/vit_tiny_patch16_224", "audio", **sound, **vit),
        "video": create("timm/vit_tiny_patch16_224", "video", img_size=12, **vit),
    }


def tiny_pairs(kind: str = "joint", a: str = "image") -> dict[str, Encoder]:
    """Patches of `a`, texts, and a fusion of both."""
    encoders = {a: tiny_patches()[a], "text": TinyText()}
    layer = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12}
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model, sizes = {
        "joint": ("transformers/flava", layer),
        "cross": ("transformers/bert", layer | still),
        "multiway": (
            "timm/vit_tiny_patch16_224",
            {"embed_dim": 8, "depth": 1, "num_heads": 2, "mlp_ratio": 1.5, "joint_layers": 0},
        ),
    }[kind]
    widths = {name: encoder.dim for name, encoder in encoders.items()}
    return encoders | {"fusion": create(model, "fusion", reads=widths, **sizes)}


def tiny_text_to_text(kind: str = "t5", sentinels: int = 12) -> Encoder:
    """An encoder with a decoder, over words that have the ids of `TinyTokenizer`."""
    from transformers import PreTrainedTokenizerFast  # takes a second, and few tasks need it

    sizes: dict[str, dict[str, float]] = {
        "t5": {"d_model": 8, "d_kv": 4, "d_ff": 12, "num_layers": 1, "num_heads": 2, "dropout_rate": 0},
        "bart": {
            **{"d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 12, "decoder_ffn_dim": 12},
            **{"encoder_attention_heads": 2, "decoder_attention_heads": 2, "dropout": 0},
        },
    }
    words = [*SPECIAL_TOKENS.values(), *map(str, range(5, 30))]
    model = WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]")
    tokenizer = Tokenizer(PreTrainedTokenizerFast(tokenizer_object=Words(model), **SPECIAL_TOKENS))
    return create(f"transformers/{kind}", "text", tokenizer=tokenizer, sentinels=sentinels, decoder=True, **sizes[kind])


def tiny_waves(kind: str = "wav2vec2") -> Encoder:
    """A network of waveforms without dropout: frames of 20 samples, every 8."""
    sizes: dict[str, Any] = {
        **{"conv_dim": [6, 6, 6], "conv_stride": [2, 2, 2], "conv_kernel": [4, 3, 4], "num_feat_extract_layers": 3},
        **{"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "feat_extract_norm": "layer"},
        **{"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12},
        **{"hidden_dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0, "feat_proj_dropout": 0.0},
        **{"do_stable_layer_norm": True, "initializer_range": 0.5, "rate": 100},
    }
    encoder = create(f"transformers/{kind}", "audio", **sizes)
    for name, parameter in encoder.named_parameters():
        if name.endswith("k_proj.bias"):  # it moves all scores of a softmax alike and has no gradient
            parameter.requires_grad_(False)
    return encoder


def tiny_batch(rows: int, seed: int = 0, length: int = 24, size: int = 12, frames: int = 12) -> dict[str, Tensor]:
    """Noise in every modality; texts and sounds are ragged, texts stand between a start and an end token."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(5, 30, (rows, length), generator=generator)
    lengths = torch.randint(3, length + 1, (rows, 1), generator=generator)
    place = torch.arange(length)
    text[:, 0] = 2
    text.scatter_(1, lengths - 1, 3)
    text_mask = place < lengths
    ends = (text % 5 == 0) & (text > 4)
    samples = 10 * frames
    audio = torch.rand(rows, samples, generator=generator) * 2 - 1
    audio_mask = torch.arange(samples) < torch.randint(samples // 2, samples + 1, (rows, 1), generator=generator)
    return {
        "image": torch.randint(0, 256, (rows, 3, size, size), generator=generator, dtype=torch.uint8),
        "text": text * text_mask,
        "text_mask": text_mask,
        # An id that 3 divides goes on with the word before it.
        "text_word": torch.where(text_mask & (text > 4), ((text % 3 > 0) & (text > 4)).cumsum(1), -1),
        # An id that 5 divides ends its sentence.
        "text_sentence": torch.where(text_mask & (text > 4), F.pad(ends.cumsum(1), (1, -1)), -1),
        "audio": audio * audio_mask,
        "audio_mask": audio_mask,
        "video": torch.randint(0, 256, (rows, frames, 3, size, size), generator=generator, dtype=torch.uint8),
        "id": torch.arange(rows),
    }


def tiny_world(rows: int, seed: int) -> dict[str, torch.Tensor]:
    """Rows of six topics: a color of the picture, a pitch of the sound, a word of the text; all else is noise."""
    noise = tiny_batch(rows, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    topic = torch.randint(6, (rows,), generator=generator)
    corners = torch.tensor([[a, b, c] for a in (0, 1) for b in (0, 1) for c in (0, 1)])[1:-1]
    image = noise["image"] // 2 + corners[topic][:, :, None, None].to(torch.uint8) * 127
    time = torch.arange(noise["audio"].shape[1]) / 100
    phase = torch.rand(rows, 1, generator=generator)
    audio = torch.sin(2 * math.pi * (time * (3.0 * (1 + topic[:, None])) + phase)) + 0.1 * noise["audio"]
    text = torch.where(torch.rand(rows, 24, generator=generator) < 0.5, 5 + topic[:, None], noise["text"])
    return {
        "image": image,
        "audio": audio,
        "audio_mask": torch.ones_like(audio, dtype=torch.bool),
        "text": text * noise["text_mask"],
        "text_mask": noise["text_mask"],
        "topic": topic,
    }
