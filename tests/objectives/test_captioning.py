"""Captioning: what may be seen, what is counted, two published implementations, greedy captions."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from tiny_encoders import TinyCausal, TinyCross, TinyText, TinyTokenizer, tiny_batch, tiny_captioners, tiny_encoders
from torch import Tensor, nn

from mmssl.encoders import create as create_encoder
from mmssl.encoders.base import Encoder, Features
from mmssl.encoders.fusion import Fused
from mmssl.errors import RecipeError
from mmssl.media.text import Tokenizer
from mmssl.objectives import Objective, create
from mmssl.objectives.base import Step
from mmssl.objectives.reconstruction.captioning import Captioning
from mmssl.ops.draws import Draws

LAYERS = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 20}
TOWER = {"width": 16, "layers": 2, "heads": 2}
SMALL = {"embed_dim": 16, "vision_cfg": {"width": 64, "layers": 1}}
CAUSAL = {
    "transformers/bert": {**LAYERS, "is_decoder": True},
    "transformers/gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2},
    "open_clip/ViT-B-32": {**SMALL, "text_cfg": TOWER},
    "open_clip/coca_ViT-B-32": {**SMALL, "text_cfg": TOWER},
}
SEES_ALL = {
    "transformers/bert": LAYERS,
    "transformers/modernbert": LAYERS,
    "open_clip/ViT-B-32": {**SMALL, "text_cfg": {**TOWER, "no_causal_mask": True}},
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["a red circle above a blue square", "two green stars, far from here"] * 3, 80)


def _task(a: str = "image", **hyper) -> Captioning:
    torch.manual_seed(0)
    return create("captioning", tiny_captioners(a), a=a, **hyper)


def _real(model: str, kwargs: dict, tokenizer: Tokenizer) -> Captioning:
    torch.manual_seed(0)
    text = create_encoder(model, "text", tokenizer=tokenizer, **kwargs)
    image = tiny_encoders()["image"]
    fusion = create_encoder("transformers/bert", "fusion", reads={"image": image.dim, "text": text.dim}, **LAYERS)
    return create("captioning", {"image": image, "text": text, "fusion": fusion}).eval()


@pytest.mark.quick(2)
@pytest.mark.parametrize("model", CAUSAL)
def test_no_logit_has_a_gradient_on_a_later_token_and_all_look_at_the_image(model, tokenizer):
    task = _real(model, CAUSAL[model], tokenizer).double()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randperm(tokenizer.vocab_size - 5, generator=generator)[None, :9] + 5
    images = torch.rand(1, 3, 12, 12, dtype=torch.float64, generator=generator, requires_grad=True)
    embedded = []

    def watch(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
        # A leaf in place of what the embedding made: what the tied output layer reads is left out.
        embedded.append(output.detach().requires_grad_())
        return embedded[-1]

    weight = task.encoder("text").token_embedding
    (table,) = (m for m in task.encoder("text").modules() if isinstance(m, nn.Embedding) and m.weight is weight)
    handle = table.register_forward_hook(watch)
    logits = task.logits({"a": images, "b": ids})
    handle.remove()
    for t in range(8):
        to_words, to_image = torch.autograd.grad(logits[t, 7], [embedded[0], images], retain_graph=True)
        sizes = to_words[0, : len(ids[0])].abs().amax(-1)
        assert (sizes[t + 1 :] == 0).all()
        assert (sizes[: t + 1] > 0).all()
        assert to_image.abs().max() > 0


@pytest.mark.parametrize("model", SEES_ALL)
def test_a_tower_that_sees_later_tokens_is_refused(model, tokenizer):
    with pytest.raises(RecipeError, match=r"'text' sees later tokens.*take a causal one: transformers/gpt2"):
        _real(model, SEES_ALL[model], tokenizer)


class Peeks(TinyCross):
    def forward(self, a: Features, b: Features, *, causal: bool = False) -> Fused:
        return super().forward(a, b, causal=False)


def test_a_fusion_that_sees_later_tokens_is_refused():
    with pytest.raises(RecipeError, match="the fusion 'fusion' lets a token see later ones"):
        create("captioning", tiny_captioners() | {"fusion": Peeks()})


def test_a_frozen_tower_is_proved_too_and_nothing_changes_mode():
    encoders = tiny_captioners()
    encoders["text"].freeze()
    encoders["fusion"].map_a.eval()
    task = create("captioning", encoders)
    assert task.encoder("fusion").training
    assert not task.encoder("fusion").map_a.training
    assert not task.encoder("text").token_embedding.requires_grad
    with pytest.raises(RecipeError, match="sees later tokens"):
        create("captioning", encoders | {"text": TinyText().freeze()})


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_equal_to_blip_on_its_logits(smoothing, monkeypatch):
    from transformers import BlipTextConfig
    from transformers.models.blip.modeling_blip_text import BlipTextLMHeadModel

    task, batch = _task(smoothing=smoothing), tiny_batch(5)
    torch.manual_seed(0)
    config = BlipTextConfig(
        vocab_size=30, hidden_size=8, encoder_hidden_size=6, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=30, label_smoothing=smoothing, bos_token_id=2, sep_token_id=3,
    )  # fmt: skip
    blip = BlipTextLMHeadModel(config).eval()
    inputs = task.transform(batch, Draws(0, 0, 5))
    output = blip(
        input_ids=batch["text"],
        attention_mask=batch["text_mask"].long(),
        encoder_hidden_states=torch.randn(5, 7, 6),
        labels=batch["text"].masked_fill(~batch["text_mask"], -100),
        is_decoder=True,
    )
    output.logits.retain_grad()
    output.loss.backward()
    logits = output.logits.detach().requires_grad_()
    monkeypatch.setattr(task, "logits", lambda inputs: logits[:, :-1][inputs["b_valid"][:, 1:]])
    losses = task(inputs)
    losses["loss"].backward()
    torch.testing.assert_close(losses["loss"], output.loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(logits.grad, output.logits.grad, rtol=1e-10, atol=1e-15)


class CoCaText(Encoder):
    """The text tower of an open_clip CoCa, tokens as its decoder gets them."""

    modality = "text"

    def __init__(self, tower: nn.Module, dim: int) -> None:
        super().__init__()
        self.tower, self.dim, self.tokenizer = tower, dim, TinyTokenizer()

    @property
    def token_embedding(self) -> nn.Parameter:
        return self.tower.token_embedding.weight

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Features:
        room = self.tower.context_length - 1 - x.shape[1]  # one place is that of its own CLS token
        pooled, tokens = self.tower(F.pad(x, (0, room)))
        return Features(tokens[:, : x.shape[1]], pooled, (x.shape[1],), valid)


class CoCaImage(Encoder):
    modality = "image"

    def __init__(self, tower: nn.Module, dim: int) -> None:
        super().__init__()
        self.tower, self.dim = tower, dim

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Features:
        pooled, tokens = self.tower(x)
        return Features(tokens, pooled, (1, tokens.shape[1]))


class CoCaFusion(Encoder):
    """Its decoder without the last projection; always causal."""

    modality, kind = "fusion", "cross"

    def __init__(self, decoder: nn.Module, dim: int) -> None:
        super().__init__()
        self.decoder, self.dim = decoder, dim

    def forward(self, a: Features, b: Features, *, causal: bool = False) -> Fused:
        tokens = self.decoder(a.tokens, b.tokens)
        return Fused(None, tokens, tokens[:, 0])


@pytest.mark.usefixtures("double")
def test_equal_to_coca_of_open_clip_with_its_weights():
    from open_clip.coca_model import CoCa
    from open_clip.loss import CoCaLoss

    torch.manual_seed(0)
    coca = CoCa(
        embed_dim=16,
        multimodal_cfg={"context_length": 25, "vocab_size": 30, "width": 16, "heads": 2, "layers": 2},
        text_cfg={
            **{"context_length": 25, "vocab_size": 30, "width": 16, "heads": 2, "layers": 2},
            **{"embed_cls": True, "output_tokens": True},
        },
        vision_cfg={
            **{"image_size": 12, "layers": 1, "width": 64, "patch_size": 4},
            **{"attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True},
        },
    )
    batch, pictures = tiny_batch(5), torch.rand(5, 3, 12, 12)
    # Its projection is the transposed embedding here, which ours is tied to.
    projection = coca.text_decoder.text_projection
    projection.data = coca.text.token_embedding.weight.data.T.clone()
    result = coca(pictures, batch["text"])
    assert result["logits"].shape == (5, 23, 30)
    _, expected = CoCaLoss(2.0, 1.0)(
        *(result[key] for key in ("image_features", "text_features", "logits", "labels", "logit_scale"))
    )
    expected.backward()
    gradients = {name: parameter.grad for name, parameter in coca.named_parameters() if parameter.grad is not None}
    gradients["text.token_embedding.weight"] += projection.grad.T
    coca.zero_grad()

    coca.text_decoder.text_projection = None
    task = create(
        "captioning",
        {
            "image": CoCaImage(coca.visual, 16),
            "text": CoCaText(coca.text, 16),
            "fusion": CoCaFusion(coca.text_decoder, 16),
        },
    )
    task.head.transform = nn.Identity()
    losses = task(task.transform({**batch, "image": pictures}, Draws(0, 0, 5)))
    (2 * losses["loss"]).backward()
    torch.testing.assert_close(2 * losses["loss"], expected, rtol=1e-12, atol=0)
    found = {name: parameter.grad for name, parameter in coca.named_parameters() if parameter.grad is not None}
    assert found.keys() == gradients.keys() - {"text_decoder.text_projection"}
    assert len(found) > 40
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, gradients[name], rtol=1e-9, atol=1e-15, msg=name)


def test_every_next_token_counts_once_and_padding_never():
    task, batch = _task(), tiny_batch(6)
    inputs = task.transform(batch, Draws(0, 0, 6))
    assert inputs["caption_tokens"] == (batch["text_mask"].sum(1) - 1).sum()
    losses = task(inputs)
    ours = {key: value.detach() for key, value in losses.items()}
    flat = [
        F.cross_entropy(task.logits({"a": batch["image"][i : i + 1], "b": row[None, :n]}), row[1:n], reduction="none")
        for i, (row, n) in enumerate(zip(batch["text"], batch["text_mask"].sum(1).tolist(), strict=True))
    ]
    torch.testing.assert_close(ours["loss"], torch.cat(flat).mean())
    batch["text"] = torch.where(batch["text_mask"], batch["text"], 9)
    again = task(task.transform(batch, Draws(0, 0, 6)))
    for key, value in ours.items():
        torch.testing.assert_close(again[key], value)


def test_chance_is_that_of_equal_logits_and_of_known_frequencies():
    for smoothing in (0.0, 0.2):
        task, batch = _task(smoothing=smoothing), tiny_batch(200)
        assert task.chance(4).loss == math.log(30)
        nn.init.zeros_(task.head.transform[2].weight)
        losses = {key: float(value.detach()) for key, value in task(task.transform(batch, Draws(0, 0, 200))).items()}
        assert math.isclose(losses["loss"], math.log(30), rel_tol=1e-6)
        assert math.isclose(losses["relative_error"], 1, rel_tol=1e-6)
        # One that has learned the frequencies of tokens and nothing else is no better than the running counts.
        task.after_step(0.5)
        task.head.bias.data = -task.unigram.surprise(torch.arange(30))
        losses = task(task.transform(tiny_batch(200, seed=1), Draws(0, 1, 200)))
        assert smoothing or losses["loss"] < math.log(30) - 0.1
        assert math.isclose(losses["relative_error"], 1, rel_tol=1e-3)


def _measured(task: Objective, inputs: dict[str, Tensor], number: int) -> dict[str, Tensor]:
    numbers: dict[str, Tensor] = {}
    task.before_step(Step(number, data=list, prepare=lambda: inputs, log=numbers.update))
    assert task.encoder("text").training
    return numbers


@pytest.mark.parametrize("a", ["image", "audio", "video"])
def test_whatever_is_described_is_looked_at(a):
    task, batch = _task(a, blind=5), tiny_batch(8)
    assert task.needs == (a, "text")
    inputs = task.transform(batch, Draws(0, 0, 8))
    assert ("a_valid" in inputs) == (a == "audio")
    rolled = {key: value.roll(1, 0) if key in ("a", "a_valid") else value for key, value in inputs.items()}
    expected = task(inputs)["loss"] / task(rolled)["loss"]
    torch.testing.assert_close(_measured(task, inputs, 4), {"loss_over_blind": expected.detach()})
    assert not any(_measured(task, inputs, number) for number in (0, 3, 5))
    assert not _measured(task, {}, 4)  # whose turn it is not
    assert _measured(task, inputs, 9)
    assert expected != 1
    if a == "audio":
        task.encoder("fusion").map_a.weight.data.zero_()
        torch.testing.assert_close(_measured(task, inputs, 4)["loss_over_blind"], torch.tensor(1.0))
    assert task.preview(inputs, task.predict(inputs))[0].title == a


@pytest.mark.long
def test_it_learns_what_the_picture_says_and_writes_it():
    # Its color says which of four words comes; all else is the same everywhere.
    torch.manual_seed(0)
    task = _task(blind=1)
    words = torch.arange(16) % 4
    colors = torch.tensor([[255, 0, 0], [0, 255, 0], [0, 0, 255], [0, 0, 0]], dtype=torch.uint8)
    images = colors[words][..., None, None].expand(-1, -1, 12, 12)
    text = torch.stack([torch.full_like(words, 2), words + 10, torch.full_like(words, 7), torch.full_like(words, 3)], 1)
    batch = {"image": images, "text": F.pad(text, (0, 2)), "text_mask": torch.arange(6).expand(16, -1) < 4}
    optimizer = torch.optim.Adam(task.parameters(), 0.01)
    inputs = task.transform(batch, Draws(0, 0, 16))
    for _ in range(200):
        optimizer.zero_grad()
        losses = task(inputs)
        losses["loss"].backward()
        optimizer.step()
    assert losses["accuracy"] == 1
    assert losses["loss"] < 0.1
    assert _measured(task, inputs, 0)["loss_over_blind"] < 0.1
    written = task.generate({"a": images[:8]}, 6)
    assert written.tolist() == batch["text"][:8].tolist()
    seen, caption, generated = task.preview(inputs, task.predict(inputs))
    assert generated.cells[5] == "2 11 7"  # up to the end token, which this tokenizer would show
    assert caption.cells[5] == "2 11 7 3"
    assert len(seen.cells) == 16


def test_greedy_choices_are_those_of_the_logits():
    task, images = _task(), tiny_batch(4)["image"]
    written = task.generate({"a": images}, 9)
    assert (written[:, 0] == 2).all()
    likeliest = task.logits({"a": images, "b": written}).argmax(-1).view(4, 8)
    for row, best in zip(written.tolist(), likeliest.tolist(), strict=True):
        end = row.index(3) if 3 in row else 8
        assert row[1 : end + 1] == best[:end]
    task.head.bias.data[3] = 99
    assert task.generate({"a": images}, 5).tolist() == [[2, 3, 0, 0, 0]] * 4


def test_images_are_cropped_where_asked_for():
    batch = tiny_batch(4)
    assert _task().transform(batch, Draws(0, 0, 4))["a"] is batch["image"]
    assert _task(views={"area": (0.5, 1.0)}).transform(batch, Draws(0, 0, 4))["a"].is_floating_point()


class NoEnds(TinyTokenizer):
    def __call__(self, text: str, length: int) -> tuple[Tensor, Tensor]:
        return torch.zeros(length, dtype=torch.long), torch.zeros(length, dtype=torch.bool)


@pytest.mark.parametrize(
    ("encoders", "hyper", "message"),
    [
        ({}, {"b": "audio"}, "reads text, and the encoder 'audio' reads audio"),
        ({}, {"a": "text"}, "reads image or audio or video, and the encoder 'text' reads text"),
        ({}, {"fusion": "image"}, "needs a fusion in which text attends to 'image', and 'image' is none"),
        ({}, {"smoothing": 1.0}, "smoothing = 1.0 .* less than 1"),
        ({}, {"blind": -1}, "blind = -1 .* greater than or equal to 0"),
        (
            {"fusion": TinyCross(5)},
            {"a": "audio", "views": {"area": [0.5, 1]}},
            "views crop images, and the encoder 'audio'",
        ),
        ({"text": TinyCausal(NoEnds())}, {}, "needs a start and an end token around each text"),
    ],
)
def test_what_cannot_work_is_refused(encoders, hyper, message):
    with pytest.raises(RecipeError, match=message):
        create("captioning", tiny_captioners() | encoders, **hyper)
