"""Masked pairs: FLAVA's six terms against transformers, what is hidden, what levels mean, both sides are used."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_encoders import TinyText, TinyTokenizer, tiny_batch, tiny_encoders, tiny_pairs
from torch import Tensor, nn
from transformers import FlavaConfig, FlavaForPreTraining

from mmssl.encoders.base import Encoder, Features, hide
from mmssl.encoders.fusion import Fused, FusionEncoder
from mmssl.encoders.image import Normalize
from mmssl.errors import RecipeError
from mmssl.objectives import Objective, create
from mmssl.objectives.base import Step
from mmssl.ops.draws import Draws
from mmssl.ops.pairs import draw_negatives, info_nce

ROWS, LENGTH, CODES = 6, 10, 20


def _task(kind: str = "joint", *, seed: int = 0, **hyper: Any) -> Objective:
    torch.manual_seed(seed)
    encoders = tiny_pairs(kind, "audio" if hyper.get("a") == "audio" else "image")
    return create("masked_pair", encoders, **{"codes": CODES, **hyper})


# FLAVA's own networks, weights and losses.


class FlavaImage(Encoder):
    modality, dim, width, subsets, patch_size = "image", 8, 8, True, (4, 4)

    def __init__(self, net: nn.Module, normed: bool) -> None:
        super().__init__()
        self.net, self.normed = net, normed
        self.normalize = Normalize([0.5] * 3, [0.5] * 3)

    def prepare(self, x: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        return self.normalize(x), valid

    def embed(self, x: Tensor, hidden: Tensor | None = None, mask_token: Tensor | None = None) -> Tensor:
        own = self.net.embeddings
        return hide(own.patch_embeddings(self.normalize(x)), hidden, mask_token) + own.position_embeddings[:, 1:]

    def encode(self, tokens: Tensor, valid: Tensor | None = None) -> Features:
        own = self.net.embeddings
        start = (own.cls_token + own.position_embeddings[:, :1]).expand(len(tokens), -1, -1)
        out = self.net.encoder(torch.cat([start, tokens], 1)).last_hidden_state
        out = self.net.layernorm(out) if self.normed else out
        return Features(out[:, 1:], out[:, 0], ())


class FlavaText(Encoder):
    modality, dim = "text", 8

    def __init__(self, net: nn.Module, normed: bool) -> None:
        super().__init__()
        self.net, self.normed, self.tokenizer = net, normed, TinyTokenizer()

    @property
    def token_embedding(self) -> nn.Parameter:
        return self.net.embeddings.word_embeddings.weight

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Features:
        out = self.net.encoder(self.net.embeddings(x)).last_hidden_state
        out = self.net.layernorm(out) if self.normed else out
        return Features(out, out[:, 0], (x.shape[1],), None)


class FlavaFusion(FusionEncoder):
    """The image's start token goes in as well, and out again."""

    def forward(self, a: Features, b: Features, *, causal: bool = False) -> Fused:  # type: ignore[override]
        fused = super().forward(a._replace(tokens=torch.cat([a.pooled[:, None], a.tokens], 1)), b, causal=causal)
        return fused._replace(a=fused.a[:, 1:])


@pytest.fixture
def flava() -> FlavaForPreTraining:
    torch.manual_seed(3)
    layer = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12}
    layer |= {"layer_norm_eps": 1e-5, "initializer_range": 0.5}
    config = FlavaConfig(
        image_config={**layer, "image_size": 12, "patch_size": 4, "vocab_size": CODES, "mask_token": True},
        text_config={**layer, "vocab_size": TinyTokenizer.vocab_size, "max_position_embeddings": LENGTH},
        multimodal_config=layer,
        hidden_size=8,
        layer_norm_eps=1e-5,
        projection_dim=7,
        init_codebook=False,
    )
    net = FlavaForPreTraining(config).double().eval()
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.3)
    for head in (net.mlm_head, net.mmm_text_head):
        head.decoder.weight = net.flava.text_model.embeddings.word_embeddings.weight  # ours is tied
    return net


def _copy_head(head: nn.Sequential, theirs: nn.Module) -> None:
    head[0].load_state_dict(theirs.transform.dense.state_dict())
    head[2].load_state_dict(theirs.transform.LayerNorm.state_dict())


def _flava_encoders(net: FlavaForPreTraining, normed: bool) -> dict[str, Encoder]:
    fusion = FlavaFusion("transformers/flava", reads={"image": 8, "text": 8}, **{
        key: getattr(net.config.multimodal_config, key)
        for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "layer_norm_eps")
    }).double()  # fmt: skip
    fusion.net.net, fusion.map_a, fusion.map_b = (
        net.flava.multimodal_model, net.flava.image_to_mm_projection, net.flava.text_to_mm_projection
    )  # fmt: skip
    return {
        "image": FlavaImage(net.flava.image_model, normed).double(),
        "text": FlavaText(net.flava.text_model, normed).double(),
        "fusion": fusion.eval(),
    }


def _flava_batch() -> dict[str, Tensor]:
    batch = tiny_batch(ROWS, length=LENGTH)
    return {"image": batch["image"], "text": torch.randint(5, 30, (ROWS, LENGTH)), "id": torch.arange(ROWS)}


def _same_gradients(ours: Tensor, theirs: Tensor, parameters: list[nn.Parameter]) -> None:
    mine, other = (
        torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True) for loss in (ours, theirs)
    )
    used = [(a, b) for a, b in zip(mine, other, strict=True) if a is not None or b is not None]
    assert len(used) > 0.8 * len(parameters)  # all but poolers
    for a, b in used:
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    # Biases of keys shift all scores alike: their gradient is 0.
    assert sum(b.abs().max() > 1e-6 for _, b in used) > 0.8 * len(used)


def _labels(side: dict[str, Tensor], size: int) -> Tensor:
    target = torch.where(side["chosen"], side["target"], -100)
    return torch.full((ROWS, size), -100).scatter(1, side["places"], target)


def _side(inputs: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key.partition("/")[2]: value for key, value in inputs.items() if key.startswith(f"{name}/")}


def _patches_of(task: Objective, head: nn.Module, net: FlavaForPreTraining) -> None:
    task.double()
    _copy_head(task.patches.head, head)
    task.patches.head[3].load_state_dict(head.decoder.state_dict())
    task.patches.mask_token.data = net.flava.image_model.embeddings.mask_token.data[0, 0]


def _pixels(task: Objective, image: Tensor) -> Tensor:
    return task.encoder("image").normalize(image)


def test_masked_multimodal_modeling_is_flavas(flava):
    torch.manual_seed(0)
    task = create(
        "masked_pair", _flava_encoders(flava, normed=False), codes=CODES, mask_ratio_b=0.3, views={"area": None}
    )
    _patches_of(task, flava.mmm_image_head, flava)
    _copy_head(task.words.head.transform, flava.mmm_text_head)
    task.words.head.bias.data = flava.mmm_text_head.decoder.bias.data
    inputs = task.transform(_flava_batch(), Draws(0, 0, ROWS))
    ours = task(inputs)
    a, b = _side(inputs, "a"), _side(inputs, "b")
    theirs = flava(
        input_ids_masked=inputs["b"],
        pixel_values=_pixels(task, inputs["a"]),
        bool_masked_pos=a["hidden"],
        mim_labels=_labels(a, 9),
        mlm_labels=_labels(b, LENGTH),
        return_loss=True,
    ).loss_info
    torch.testing.assert_close(ours["image/loss"], theirs.mmm_image, rtol=1e-12, atol=0)
    torch.testing.assert_close(ours["text/loss"], theirs.mmm_text, rtol=1e-12, atol=0)
    torch.testing.assert_close(ours["loss"], theirs.mmm_image + theirs.mmm_text, rtol=1e-12, atol=0)
    shared = [*flava.flava.image_model.encoder.parameters(), *flava.flava.text_model.encoder.parameters()]
    shared += [*flava.flava.multimodal_model.parameters(), *flava.flava.image_to_mm_projection.parameters()]
    _same_gradients(ours["loss"], theirs.mmm_image + theirs.mmm_text, shared)
    (mine,) = torch.autograd.grad(ours["loss"], [task.patches.mask_token])
    (other,) = torch.autograd.grad(theirs.mmm_image + theirs.mmm_text, [flava.flava.image_model.embeddings.mask_token])
    torch.testing.assert_close(mine, other[0, 0], rtol=1e-9, atol=1e-12)


def test_masked_image_modeling_is_flavas(flava):
    encoders = _flava_encoders(flava, normed=True)
    task = create("masked_pair", {"image": encoders["image"]}, b=None, fusion=None, codes=CODES, views={"area": None})
    _patches_of(task, flava.mim_head, flava)
    inputs = task.transform(_flava_batch(), Draws(0, 0, ROWS))
    a = _side(inputs, "a")
    theirs = flava(
        pixel_values=_pixels(task, inputs["a"]), bool_masked_pos=a["hidden"], mim_labels=_labels(a, 9), return_loss=True
    ).loss_info.mim
    ours = task(inputs)
    torch.testing.assert_close(ours["loss"], theirs, rtol=1e-12, atol=0)
    _same_gradients(ours["loss"], theirs, list(flava.flava.image_model.encoder.parameters()))


def test_masked_language_modeling_is_flavas(flava):
    task = create("masked_language", {"text": _flava_encoders(flava, normed=True)["text"]}).double()
    _copy_head(task.head.transform, flava.mlm_head)
    task.head.bias.data = flava.mlm_head.decoder.bias.data
    inputs = task.transform(_flava_batch(), Draws(0, 0, ROWS))
    theirs = flava(input_ids_masked=inputs["text"], mlm_labels=_labels(inputs, LENGTH), return_loss=True).loss_info.mlm
    ours = task(inputs)["loss"]
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    _same_gradients(ours, theirs, list(flava.flava.text_model.encoder.parameters()))


def test_matching_is_flavas(flava):
    encoders = _flava_encoders(flava, normed=False)
    task = create("matching", encoders, negatives="uniform", contrastive=0.0, views={"area": None}).double()
    pooler, final = flava.itm_head.pooler.dense, flava.itm_head.seq_relationship
    task.head = nn.Sequential(pooler, nn.Tanh(), final)
    # The start token of an image is a token of it, for FLAVA.
    task.encoders["fusion"].__class__ = FusionEncoder
    image, batch = encoders["image"], _flava_batch()
    inputs = task.transform(batch, Draws(0, 0, ROWS))
    with_start = {
        "a_tokens": torch.cat([(a := image(batch["image"])).pooled[:, None], a.tokens], 1),
        "b_tokens": encoders["text"](batch["text"]).tokens,
    }
    ours = task.loss(with_start, inputs)["matching"]

    none = torch.zeros(ROWS, ROWS, dtype=torch.float64)
    equal = torch.eye(ROWS, dtype=torch.bool)
    own = torch.arange(ROWS)
    other_b, other_a = (draw_negatives(none, equal, inputs["noise"][:, i])[0] for i in (0, 1))
    from_a, from_b = torch.cat([own, own, other_a]), torch.cat([own, other_b, own])
    hidden = torch.zeros(3 * ROWS, 9, dtype=torch.bool)
    theirs = flava(
        input_ids_masked=batch["text"][from_b],
        pixel_values=image.normalize(batch["image"])[from_a],
        bool_masked_pos=hidden,
        mim_labels=torch.zeros_like(hidden, dtype=torch.long),
        itm_labels=torch.cat([torch.ones(ROWS), torch.zeros(2 * ROWS)]).long(),
        return_loss=True,
    ).loss_info.itm
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    _same_gradients(ours, theirs, [*flava.flava.multimodal_model.parameters(), *flava.itm_head.parameters()])


def test_the_contrastive_term_is_flavas(flava):
    encoders, batch = _flava_encoders(flava, normed=True), _flava_batch()
    a = F.normalize(flava.flava.image_projection(encoders["image"](batch["image"]).pooled), dim=-1)
    b = F.normalize(flava.flava.text_projection(encoders["text"](batch["text"]).pooled), dim=-1)
    ours, *_ = info_nce(a, b, flava.flava.logit_scale.exp())
    theirs = flava(
        input_ids=batch["text"],
        input_ids_masked=batch["text"],
        pixel_values=encoders["image"].normalize(batch["image"]),
        bool_masked_pos=torch.zeros(ROWS, 9, dtype=torch.bool),
        mim_labels=torch.zeros(ROWS, 9, dtype=torch.long),
        return_loss=True,
    ).loss_info.global_contrastive
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    shared = [flava.flava.logit_scale, *flava.flava.image_projection.parameters()]
    _same_gradients(ours, theirs, [*shared, *flava.flava.text_model.encoder.parameters()])


# What is hidden.


def test_what_is_hidden_is_what_is_asked_and_cannot_be_seen():
    task = _task(views={"area": None}).eval()
    batch = tiny_batch(ROWS)
    inputs = task.transform(batch, Draws(0, 0, ROWS))
    hidden = inputs["a/hidden"]
    assert torch.equal(torch.zeros_like(hidden).scatter(1, inputs["a/places"], inputs["a/chosen"]), hidden)
    assert inputs["a/hidden_places"] == hidden.sum()
    # Other pixels behind the mask, and other words behind the mask token, change no answer.
    answers = task.logits(inputs)
    pixels = hidden.view(ROWS, 3, 3).repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None]
    noise = torch.randint(0, 256, batch["image"].shape, dtype=torch.uint8)
    unseen = task.logits({**inputs, "a": torch.where(pixels, noise, batch["image"])})
    seen = task.logits({**inputs, "a": torch.where(pixels, batch["image"], noise)})
    for side in "ab":
        torch.testing.assert_close(unseen[side], answers[side])
        assert (seen[side] - answers[side]).abs().max() > 1e-3  # both sides look at the image
    words = task.logits({**inputs, "b": torch.where(batch["text_mask"], 7, 0)})
    assert (words["a"] - answers["a"]).abs().max() > 1e-3
    b = _side(inputs, "b")
    restored = torch.where(b["chosen"], b["target"], inputs["b"].gather(1, b["places"]))
    assert torch.equal(inputs["b"].scatter(1, b["places"], restored), batch["text"])


@pytest.mark.parametrize(
    ("form", "sides", "share_a", "share_b"),
    [
        ("flava", {}, 75 / 196, 0.15),
        ("beit3", {}, 0.4, 0.5),
        ("beit3", {"a": None}, 0.0, 0.15),
        ("beit3", {"b": None}, 0.4, 0.0),
        ("beit3", {"mask_ratio_a": 0, "mask_ratio_b": 0.25}, 0.0, 0.25),
    ],
)
def test_rates_are_those_of_the_form(form, sides, share_a, share_b):
    task = _task("multiway", form=form, views={"area": None}, **sides)
    batch = tiny_batch(ROWS, size=32, length=60)
    inputs = task.transform(batch, Draws(0, 0, ROWS))
    assert ("a" in inputs) == ("a" in task.sides)
    assert ("b" in inputs) == ("b" in task.sides)
    assert inputs["a/hidden"].sum(1).max() == round(share_a * 64) if share_a else "a/hidden" not in inputs
    lengths = batch["text_mask"].sum(1)
    words = (batch["text"] > 4).sum(1)
    if share_b:
        expected = [min(w, max(1, round(share_b * n))) for n, w in zip(lengths.tolist(), words.tolist(), strict=True)]
        assert inputs["b/chosen"].sum(1).tolist() == expected
    else:
        assert "b/chosen" not in inputs
    outputs = task.predict(inputs)
    sides = {side for side, share in (("a", share_a), ("b", share_b)) if share}
    assert outputs.keys() == {f"{side}/{name}" for side in sides for name in ("log_likelihood_ratio", "right")}
    # Whole sides go through the encoder as they are, which a combination then runs once for several tasks.
    if "a" in task.sides and not share_a:
        assert inputs["a"] is batch["image"]


def test_padding_behind_a_sound_is_never_asked_for_nor_learned_from():
    task = _task(a="audio", mask_ratio_a=0.5, codes=3)
    batch = tiny_batch(ROWS, frames=12)
    inputs = task.transform(batch, Draws(0, 0, ROWS))
    valid = inputs["a_valid"]
    assert not valid.all()
    assert not (inputs["a/chosen"] & ~valid.gather(1, inputs["a/places"])).any()
    task.before_step(Step(0, lambda: [batch]))
    assert int(task.patches.codebook.counts.sum()) == int(valid.sum())
    assert task.patches.codebook.centers.isfinite().all()


# What the levels mean.


def test_the_histogram_scores_one_and_the_most_frequent_code_makes_all_its_mistakes(monkeypatch):
    task, batch = _task(views={"area": None}), tiny_batch(64)
    batch["image"][:, :, :, :8] = 255  # blank patches
    task.before_step(Step(0, lambda: [batch]))
    inputs = task.transform(batch, Draws(0, 0, 64))
    task.double()
    blind = {
        "a": torch.zeros(int(inputs["a/hidden_places"]), CODES),
        "b": torch.zeros(int(inputs["b/hidden_places"]), 30),
    }
    monkeypatch.setattr(task, "logits", lambda inputs: blind)
    uniform = task(inputs)
    assert float(uniform["loss"]) == pytest.approx(task.chance(64).loss)
    assert float(uniform["loss"]) == pytest.approx(math.log(CODES) + math.log(30), rel=1e-6)
    codes, words = task.patches.codebook.counts + 1, task.words.unigram.counts + 1
    shares = {"a": (codes / codes.sum()).log(), "b": (words / words.sum()).log()}
    blind = {side: shares[side].expand_as(blind[side]) for side in "ab"}
    counted = task(inputs)
    for name in ("image", "text"):
        assert float(counted[f"{name}/relative_error"]) == pytest.approx(1, rel=1e-5)
    assert float(counted["image/relative_mistakes"]) == pytest.approx(1, rel=1e-5)
    # Blank patches make the histogram far better than 1 / K.
    assert counted["image/loss"] < 0.75 * uniform["image/loss"]
    assert counted["image/accuracy"] > 0.5
    assert counted["image/perplexity"] < 0.6 * CODES
    assert int(task.words.unigram.counts.sum()) == int((batch["text"] > 4).sum())


def test_the_codebook_is_learned_once_from_crops_as_they_are_trained_on():
    task, batch = _task(), tiny_batch(64)
    read = []

    def batches():
        for i in range(100):
            read.append(i)
            yield batch

    task.before_step(Step(0, batches))
    # 64 patches for each of 20 codes, 32 words for each of 30 tokens; a batch has 576 patches and some 750 words.
    assert read == [0, 1, 2]
    task.before_step(Step(1, batches))
    task.before_step(Step(0, batches))  # it has learned already, or what it was lent has
    _task().before_step(Step(1, batches))
    assert read == [0, 1, 2]
    again = _task()
    again.before_step(Step(0, lambda: [batch] * 3))
    assert torch.equal(task.patches.codebook.centers, again.patches.codebook.centers)
    assert "patches.codebook.centers" in task.state_dict()
    assert "words.unigram.counts" in task.state_dict()
    # Quantized patches are nearer to the picture than its mean is.
    patches = task.patches.vectors(task.sides["a"], batch, 0)
    error = (patches - task.patches.codebook.decode(task.patches.codebook(patches))).square().mean()
    assert error < 0.95 * patches.var()


def _colors(rows: int, step: int) -> dict[str, Tensor]:
    """Images of one of three colors and the word for it, between start and end."""
    generator = torch.Generator().manual_seed(step)
    which = torch.randint(0, 3, (rows,), generator=generator)
    image = torch.zeros(rows, 3, 12, 12, dtype=torch.uint8)
    image[torch.arange(rows), which] = 255
    text = torch.stack([torch.full_like(which, 2), which + 10, torch.full_like(which, 3)], 1)
    return {"image": image, "text": text, "text_mask": torch.ones_like(text, dtype=torch.bool)}


@pytest.mark.parametrize("kind", ["joint", "multiway", "cross"])
def test_one_side_tells_the_other(kind):
    sides = {"mask_ratio_a": 0, "mask_ratio_b": 0.5} if kind == "cross" else {"mask_ratio_a": 0.8, "mask_ratio_b": 0.0}
    task = _task(kind, seed=4 if kind == "cross" else 0, codes=3, views={"area": None}, **sides)
    task.before_step(Step(0, lambda: [_colors(64, 999)]))
    optimizer = torch.optim.Adam(task.parameters(), lr=2e-2)
    for step in range(50):
        loss = task(task.transform(_colors(24, step), Draws(0, step, 24)))["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    task.eval()
    inputs = task.transform(_colors(64, 1000), Draws(0, 1000, 64))
    name, side = ("text", "a") if kind == "cross" else ("image", "b")
    assert task(inputs)[f"{name}/relative_error"] < 0.2
    other = {**inputs, side: inputs[side].roll(1, 0)}
    if kind == "cross":  # of the image a few patches are left, which tell as well
        assert task(other)["text/relative_error"] > 1


@pytest.mark.parametrize(
    ("kind", "hyper", "message"),
    [
        ("joint", {"mask_ratio_a": 0, "mask_ratio_b": 0}, "hides nothing"),
        ("joint", {"mask_ratio_a": 1.0}, "should be shares"),
        ("joint", {"a": None}, "a joint fusion reads pairs; .*multiway"),
        ("joint", {"fusion": None}, "without a fusion only patches"),
        ("joint", {"a": None, "fusion": None}, "masked_language"),
        ("joint", {"fusion": "text"}, "fusion = 'text' reads text; it should be an encoder"),
        ("joint", {"a": "text", "b": "image"}, "a = text and b = image, and the fusion 'fusion' reads image and text"),
        ("cross", {}, "a cross fusion says nothing of a; set mask_ratio_a: 0"),
        ("joint", {"codes": 1}, "codes = 1 should be 2 or more"),
    ],
)
def test_what_cannot_work_is_told_when_built(kind, hyper, message):
    with pytest.raises(RecipeError, match=message):
        _task(kind, **hyper)


def test_networks_that_cannot_hide_anything_are_told_when_built():
    encoders = tiny_pairs()
    image = tiny_encoders()["image"]
    image.spec = {"model": "timm/resnet18"}
    with pytest.raises(RecipeError, match=r"timm/resnet18 has none; take a plain vision transformer"):
        create("masked_pair", {**encoders, "image": image})
    with pytest.raises(RecipeError, match="needs a mask token"):
        create("masked_pair", {**encoders, "text": TinyText(TinyTokenizer(mask_id=None))})
    task = _task(views={"area": None})
    with pytest.raises(RecipeError, match="a grid of 1 x 3 patches"):
        task.transform({**tiny_batch(2), "image": torch.zeros(2, 3, 4, 12, dtype=torch.uint8)}, Draws(0, 0, 2))
