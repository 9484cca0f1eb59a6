"""Matching: who is drawn as a negative, what the loss is, and the slow copy with its queue."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from tiny_encoders import tiny_batch, tiny_encoders, tiny_fused
from torch import Tensor, nn
from transformers import BlipConfig, BlipForImageTextRetrieval

from mmssl.encoders import create as create_encoder
from mmssl.encoders.base import Encoder, Features
from mmssl.errors import RecipeError
from mmssl.objectives import create
from mmssl.objectives.correspondence.matching import PRIOR
from mmssl.ops.draws import Draws
from mmssl.ops.pairs import draw_negatives

DISTILLED = {"momentum": 0.9, "queue": 10, "width": 7}


pytestmark = pytest.mark.usefixtures("double")


def matching(kind: str = "cross", rows: int = 4, **hyper):
    """Task, inputs, outputs."""
    torch.manual_seed(0)
    task = create("matching", tiny_fused(kind), **{"width": 7} | hyper)
    inputs = task.transform(tiny_batch(rows), Draws(0, 0, rows))
    return task, inputs, task.predict(inputs)


@pytest.mark.long
def test_no_draw_of_ten_thousand_crashes_or_takes_an_equal_row_while_another_is_left():
    generator = torch.Generator().manual_seed(0)
    lonely = 0
    for trial in range(10_000):
        rows = int(torch.randint(2, 9, (), generator=generator))
        # Ids and contents of few values make duplicates, triples and batches of one item alone.
        items = torch.randint(0, int(torch.randint(1, 12, (), generator=generator)), (rows, 3), generator=generator)
        items[:, 0] = torch.arange(rows) if trial % 2 else items[:, 0]
        equal = (items[:, None] == items).any(2)
        # Cosines over a temperature of 0.001 are logits of ±1000: every softmax saturates.
        scale = (1.0, 100.0, 1000.0)[trial % 3]
        similar = (torch.rand(rows, rows, generator=generator) * 2 - 1).mul(scale).float()
        if trial % 5 == 0:
            similar[:] = scale
        noise = torch.rand(rows, rows, generator=generator, dtype=torch.float32)
        if trial % 7 == 0:
            noise[:, 0], noise[:, -1] = 0.0, 1 - 2**-24
        drawn, found = draw_negatives(similar, equal, noise)
        assert torch.equal(found, ~equal.all(1))
        assert not equal[torch.arange(rows), drawn][found].any()
        lonely += int((~found).sum())
    assert lonely > 1000


def test_negatives_are_drawn_by_the_softmax_over_rows_that_are_not_equal():
    similar = torch.tensor([[5.0, 0.0, 1.0, 2.0, 9.0]])
    equal = torch.tensor([[True, False, False, False, True]])
    noise = torch.rand(20_000, 5, generator=torch.Generator().manual_seed(0))
    drawn, _ = draw_negatives(similar.expand(20_000, -1), equal.expand(20_000, -1), noise)
    expected = torch.tensor([0.0, 1.0, 2.0]).softmax(0) * 20_000
    assert drawn.bincount(minlength=5)[[0, 4]].sum() == 0
    assert stats.chisquare(drawn.bincount()[1:4], expected).pvalue > 0.01


def three_pairs(task, outputs, other_b: Tensor, other_a: Tensor) -> Tensor:
    """Logits (B, 3, 2) of each row's pairs, one row and one pair at a time."""

    def features(key: str, row: int) -> Features:
        tokens = outputs[f"{key}_tokens"][row : row + 1]
        valid = outputs.get(f"{key}_valid")
        return Features(tokens, tokens.mean(1), (), None if valid is None else valid[row : row + 1].bool())

    def judge(a: int, b: int) -> Tensor:
        return task.head(task.encoder("fusion")(features("a", a), features("b", b)).pooled)[0]

    rows = range(len(other_a))
    return torch.stack([torch.stack([judge(i, i), judge(i, other_b[i]), judge(other_a[i], i)]) for i in rows])


@pytest.mark.parametrize("kind", ["cross", "joint", "multiway"])
def test_loss_is_the_mean_cross_entropy_of_a_pair_and_its_two_negatives(kind):
    """ALBEF's formula with given negatives: labels 1 for B pairs and 0 for 2B others."""
    task, inputs, outputs = matching(kind)
    task.eval()
    others = torch.tensor([2, 0, 3, 1]), torch.tensor([1, 3, 0, 2])
    # The noise that makes just these the drawn ones.
    inputs["noise"] = torch.stack([F.one_hot(other, 4) * (1 - 1e-15) for other in others], 1).clamp(min=1e-300)
    losses = task.loss(outputs, inputs)
    logits = three_pairs(task, outputs, *others)
    expected = F.cross_entropy(logits.flatten(0, 1), torch.tensor([1, 0, 0] * 4))
    torch.testing.assert_close(losses["matching"], expected)
    torch.testing.assert_close(losses["loss"], expected + losses["contrastive"])
    right = logits.argmax(2) == torch.tensor([1, 0, 0])
    torch.testing.assert_close(losses["accuracy"], right.double().mean())
    score = logits[..., 1] - logits[..., 0]
    torch.testing.assert_close(losses["ranking"], (score[:, :1] > score[:, 1:]).double().mean())
    assert losses["negatives"] == 1
    own = [p for p in task.parameters() if p.requires_grad]
    theirs = torch.autograd.grad(expected, own, allow_unused=True, retain_graph=True)
    ours = torch.autograd.grad(losses["matching"], own, allow_unused=True)
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b)


def test_contrastive_term_is_clips_with_a_temperature():
    task, inputs, outputs = matching(contrastive=0.5)
    losses = task.loss(outputs, inputs)
    logits = outputs["a"] @ outputs["b"].T / 0.07
    own = torch.arange(4)
    expected = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
    torch.testing.assert_close(losses["contrastive"], expected)
    torch.testing.assert_close(losses["loss"], losses["matching"] + 0.5 * expected)
    torch.testing.assert_close(losses["accuracy_image_to_text"], (logits.argmax(1) == own).double().mean())


def test_hard_negatives_are_the_similar_ones_and_uniform_ones_are_not():
    def drawn(**hyper) -> tuple[Tensor, Tensor]:
        task, _, outputs = matching(rows=6, **hyper)
        (to_b, to_a), equal = task._similar(outputs, 6), torch.eye(6, dtype=torch.bool)
        noise = torch.rand(300 * 6, 2, 6, generator=torch.Generator().manual_seed(0))
        (other_b, _), _ = task._draw((to_b.repeat(300, 1), to_a.repeat(300, 1)), equal.repeat(300, 1), noise)
        return F.one_hot(other_b.view(300, 6), 6).double().mean(0), outputs

    hard, outputs = drawn(temperature=0.5)
    expected = (outputs["a"] @ outputs["b"].T / 0.5).masked_fill(torch.eye(6, dtype=torch.bool), -math.inf).softmax(1)
    assert (hard - expected).abs().max() < 0.12
    assert (drawn(negatives="uniform")[0] - (1 - torch.eye(6)) / 5).abs().max() < 0.12


def test_equal_rows_are_never_negatives_and_lonely_ones_are_left_out():
    task, _, _ = matching()
    batch = tiny_batch(4)
    batch["text"][1], batch["text_mask"][1] = batch["text"][0], batch["text_mask"][0]  # one caption twice
    batch["image"][3] = batch["image"][2]  # one picture twice
    batch["id"][2] = batch["id"][0]  # one row twice, as far as its number says
    for step in range(30):
        inputs = task.transform(batch, Draws(0, step, 4))
        equal = (inputs["items"][:, None] == inputs["items"]).any(2)
        pairs = {(0, 1), (1, 0), (2, 3), (3, 2), (0, 2), (2, 0)} | {(i, i) for i in range(4)}
        assert {(int(i), int(j)) for i, j in equal.nonzero()} == pairs
        similar = task._similar(task.predict(inputs), 4)
        for drawn, found in task._draw(similar, equal, inputs["noise"]):
            assert found.all()
            assert not equal[torch.arange(4), drawn].any()
    # All captions the same: no negative at all, and only the pairs are left in the mean.
    batch["text"][:], batch["text_mask"][:] = batch["text"][0], batch["text_mask"][0]
    inputs = task.transform(batch, Draws(0, 0, 4))
    outputs = task.predict(inputs)
    losses = task.loss(outputs, inputs)
    alone = three_pairs(task, outputs, torch.arange(4), torch.arange(4))[:, 0]
    torch.testing.assert_close(losses["matching"], F.cross_entropy(alone, torch.ones(4, dtype=torch.long)))
    assert losses["negatives"] == 0
    assert all(value.isfinite() for value in losses.values())


@pytest.mark.parametrize("rows", [1, 2])
def test_a_batch_of_two_has_negatives_and_one_of_one_has_none(rows):
    for hyper in ({}, DISTILLED, {"contrastive": 0.0, "negatives": "uniform"}):
        task, inputs, outputs = matching(rows=rows, **hyper)
        losses = task.loss(outputs, inputs)
        assert all(value.isfinite() for value in losses.values())
        assert losses["negatives"] == rows - 1
        losses["loss"].backward()
        assert len(task.preview(inputs, outputs)[-1].cells) == rows


def test_guessing_scores_its_level():
    task, inputs, outputs = matching(rows=8, **DISTILLED)
    chance = task.chance(8)
    blind = {key: torch.zeros_like(value) for key, value in outputs.items()}
    task.head.weight.data.zero_()
    task.head.bias.data.copy_(torch.tensor([2 / 3, 1 / 3]).log())
    losses = task.loss(blind, inputs)
    for key in ("matching", "accuracy", "ranking", "contrastive"):
        assert float(losses[key].detach()) == pytest.approx(chance.metrics[key], rel=1e-9), key
    assert chance.metrics["contrastive"] == math.log(8 + 10)
    assert float(losses["accuracy_image_to_text"]) == pytest.approx(1 / 8)
    assert pytest.approx(-(math.log(1 / 3) + 2 * math.log(2 / 3)) / 3) == PRIOR


def test_temperature_stays_in_its_bounds():
    task, _, _ = matching()
    for value, expected in ((9.0, 0.5), (-1.0, 0.001), (0.2, 0.2)):
        task.temperature.data.fill_(value)
        task.after_step(0.5)
        assert math.isclose(task.temperature.item(), expected)


def test_pairs_can_be_matched_one_by_one_for_re_ranking():
    task, _, outputs = matching()
    (pair,) = task.pairs
    assert (pair.a, pair.b) == ("image", "text")
    batch = tiny_batch(4)
    image = task.encoder("image")(batch["image"])
    text = task.encoder("text")(batch["text"], batch["text_mask"])
    embedded = pair.embed[1](text)
    torch.testing.assert_close(embedded.norm(dim=1), torch.ones(4))
    torch.testing.assert_close(embedded, outputs["b"])
    logits = pair.match(image, text)
    assert logits.shape == (4,)
    both = task.head(task.encoder("fusion")(image, text).pooled).softmax(1)[:, 1]
    torch.testing.assert_close(logits.sigmoid(), both)
    uniform, _, _ = matching(contrastive=0.0, negatives="uniform")
    assert uniform.pairs[0].embed is None


class Given(Encoder):
    """Tokens that another model made."""

    dim = 16

    def __init__(self, modality: str, tokens: Tensor, valid: Tensor | None = None) -> None:
        super().__init__()
        self.modality, self.tokens, self.valid = modality, tokens, valid

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Features:
        return Features(self.tokens, self.tokens[:, 0], (), self.valid)


def test_logits_are_those_of_blips_matching_head():
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    text = size | {"vocab_size": 30, "encoder_hidden_size": 16, "attention_probs_dropout_prob": 0.0, "bos_token_id": 2}
    config = BlipConfig(text_config=text, vision_config=size | {"image_size": 12, "patch_size": 4})
    blip = BlipForImageTextRetrieval(config).eval()
    batch = tiny_batch(4)
    pixels = batch["image"] / 255
    expected = blip(batch["text"], pixels, attention_mask=batch["text_mask"].long()).itm_score
    with torch.no_grad():
        seen = blip.vision_model(pixels)[0]
        words = blip.text_encoder.embeddings(batch["text"])
    kwargs = size | {"hidden_act": "gelu", "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    fusion = create_encoder("transformers/bert", "fusion", reads={"image": 16, "text": 16}, **kwargs)
    fusion.net.net.load_state_dict(blip.text_encoder.encoder.state_dict())
    for linear in (fusion.map_a, fusion.map_b):
        nn.init.eye_(linear.weight), nn.init.zeros_(linear.bias)
    towers = {"image": Given("image", seen), "text": Given("text", words, batch["text_mask"])}
    task = create("matching", {**towers, "fusion": fusion}, width=7).eval()
    task.head.load_state_dict(blip.itm_head.state_dict())
    image, caption = task.encoder("image")(pixels), task.encoder("text")(batch["text"])
    torch.testing.assert_close(task.match(image, caption), expected[:, 1] - expected[:, 0])


@pytest.mark.parametrize("pair", [("audio", "text"), ("video", "audio")])
def test_any_two_encoders_make_a_pair(pair):
    a, b = pair
    encoders = tiny_fused("joint", a, b)
    task = create("matching", encoders, a=a, b=b, width=7)
    assert task.needs == pair
    inputs = task.transform(tiny_batch(4), Draws(0, 0, 4))
    losses = task(inputs)
    losses["loss"].backward()
    assert f"accuracy_{a}_to_{b}" in losses


def _bert(chunk: int | None):
    """A fusion with dropout, its matching loss and gradients, and the numbers that were held for the backward pass."""
    torch.manual_seed(0)
    size = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    encoders = tiny_encoders()
    reads = {name: encoders[name].dim for name in ("image", "text")}
    fusion = create_encoder("transformers/bert", "fusion", reads=reads, hidden_dropout_prob=0.5, **size)
    task = create("matching", {**encoders, "fusion": fusion}, width=7, chunk=chunk)
    inputs = task.transform(tiny_batch(8), Draws(0, 0, 8))
    held = {}

    def keep(tensor: Tensor) -> Tensor:
        held[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        losses = task(inputs)
    losses["loss"].backward()
    gradients = {name: p.grad for name, p in task.named_parameters() if p.grad is not None}
    return losses["matching"], gradients, sum(tensor.untyped_storage().nbytes() for tensor in held.values())


def test_chunks_hold_less_and_repeat_their_dropout():
    loss, gradients, held = _bert(None)
    at_once, same, _ = _bert(24)
    torch.testing.assert_close(at_once, loss)
    torch.testing.assert_close(same, gradients)
    assert _bert(3)[2] < 0.3 * held


def test_what_cannot_work_is_refused_when_built():
    encoders = tiny_fused("cross")
    for hyper, message in (
        ({"fusion": "text"}, "reads text; it should be an encoder"),
        ({"a": "text", "b": "image"}, "the fusion 'fusion' reads image and text"),
        ({"contrastive": 0.0}, "negatives = uniform"),
        ({"contrastive": 0.0, "negatives": "uniform", "momentum": 0.9}, "negatives = uniform"),
        ({"contrastive": -1.0}, "contrastive = -1.0 .* greater than or equal to 0"),
        ({"momentum": 1.5}, "momentum = 1.5 .* less than or equal to 1"),
        ({"momentum": 0.9, "queue": -1}, "queue = -1 .* greater than or equal to 0"),
        ({"temperature": 0.9}, "temperature = 0.9 .* less than or equal to 0.5"),
        ({"negatives": "easy"}, "negatives = 'easy'"),
        ({"chunk": 0}, "chunk = 0 .* greater than or equal to 1"),
    ):
        with pytest.raises(RecipeError, match=message):
            create("matching", encoders, **hyper)
    with pytest.raises(ValueError, match="needs an encoder named 'fusion'"):
        create("matching", tiny_encoders())
