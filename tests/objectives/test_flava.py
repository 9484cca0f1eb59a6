"""FLAVA's six terms are those of transformers, on its own networks and weights: loss and every gradient."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tiny_encoders import TinyTokenizer, tiny_batch
from torch import Tensor, nn
from transformers import FlavaConfig, FlavaForPreTraining

from mmssl.encoders.base import Encoder, Features, hide
from mmssl.encoders.fusion import Fused, FusionEncoder
from mmssl.encoders.image import Normalize
from mmssl.objectives import Objective, create
from mmssl.ops.draws import Draws
from mmssl.ops.pairs import draw_negatives, info_nce

ROWS, LENGTH, CODES = 6, 10, 20


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
