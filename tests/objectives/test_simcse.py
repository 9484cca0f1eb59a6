"""SimCSE: dropout makes the two views, and the loss is one direction over N candidates."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from tiny_encoders import DroppingText, tiny_batch, tiny_encoders

from mmssl.encoders import create as create_encoder
from mmssl.errors import RecipeError
from mmssl.media.text import Tokenizer
from mmssl.objectives import create
from mmssl.ops.draws import Draws
from mmssl.ops.representation import alignment

ROWS = 6
WORDS = Tokenizer.train(["the quick brown fox jumps over the lazy dog"], 40)


def bert(**rates: float):
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    return create_encoder("transformers/bert", "text", tokenizer=WORDS, **size, **rates)


def equation_4(z: np.ndarray, temperature: float) -> float:
    """Mean over i of -ln exp(cos(h_i, h'_i) / t) / sum over j of exp(cos(h_i, h'_j) / t), by loops."""
    first, second = z[:, 0], z[:, 1]
    losses = []
    for i, one in enumerate(first):
        cosines = [one @ other / np.linalg.norm(one) / np.linalg.norm(other) for other in second]
        terms = np.exp(np.array(cosines) / temperature)
        losses.append(-np.log(terms[i] / terms.sum()))
    return float(np.mean(losses))


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("temperature", [0.05, 0.7])
def test_loss_and_gradient_are_those_of_the_equation(temperature):
    task = create("simcse", {"text": DroppingText()}, temperature=temperature)
    torch.manual_seed(0)
    z = torch.nn.functional.normalize(torch.randn(ROWS, 2, 5), dim=-1).requires_grad_()
    losses = task.loss({"z": z}, {})
    assert losses["loss"].item() == pytest.approx(equation_4(z.detach().numpy(), temperature), rel=1e-12)
    losses["loss"].backward()
    for place in ((0, 0, 1), (3, 1, 4)):  # on the sphere alone is the norm 1: along a tangent
        tangent = torch.zeros(5)
        tangent[place[2]] = 1
        unit = z[place[:2]].detach()
        tangent -= (tangent @ unit) * unit
        moved = [z.detach().clone().numpy() for _ in range(2)]
        for sign, one in zip((1, -1), moved, strict=True):
            one[place[:2]] += sign * 1e-6 * tangent.numpy()
        slope = (equation_4(moved[0], temperature) - equation_4(moved[1], temperature)) / 2e-6
        assert float(z.grad[place[:2]] @ tangent) == pytest.approx(slope, rel=1e-5)
    nearest = (z[:, 0] @ z[:, 1].T).argmax(1) == torch.arange(ROWS)
    assert float(losses["accuracy"]) == pytest.approx(float(nearest.double().mean()))


def test_a_text_is_read_twice_with_two_masks_and_as_it_is():
    task = create("simcse", {"text": bert()})
    batch = tiny_batch(ROWS)
    inputs = task.transform(batch, Draws(0, 0, ROWS))
    assert torch.equal(inputs["a"], batch["text"])
    assert torch.equal(inputs["a_valid"], batch["text_mask"])
    torch.manual_seed(0)
    z = task.train().predict(inputs)["z"]
    assert z.shape == (ROWS, 2, 16)
    torch.testing.assert_close(z.norm(dim=-1), torch.ones(ROWS, 2))
    assert (z[:, 0] - z[:, 1]).norm(dim=-1).min().item() > 1e-2
    calm = task.eval().predict(inputs)["z"]
    torch.testing.assert_close(calm[:, 0], calm[:, 1])


def test_the_monitors_see_both_readings():
    task = create("simcse", {"text": bert()}).train()
    inputs = task.transform(tiny_batch(ROWS), Draws(0, 0, ROWS))
    seen = task.drawn_together(inputs)
    assert set(seen) == {"text", "embeddings"}
    assert all(value.shape == (ROWS, 2, 16) for value in seen.values())
    assert 0 < float(alignment(*seen["embeddings"].unbind(1))) < 2


def test_an_encoder_that_drops_nothing_is_refused():
    assert create("simcse", {"text": bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.1)})
    for encoder in (
        bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
        bert().freeze(),
        tiny_encoders()["text"],
    ):
        with pytest.raises(RecipeError, match=r"dropout makes the two views, and the encoder 'text' has none"):
            create("simcse", {"text": encoder})
    with pytest.raises(RecipeError, match="simcse reads text, and the encoder 'image' reads image"):
        create("simcse", tiny_encoders(), encoder="image")


def test_chance_is_the_loss_of_collapse():
    task = create("simcse", {"text": bert()})
    losses = task.loss({"z": torch.ones(8, 2, 4) / 2}, {})
    assert math.isclose(losses["loss"], task.chance(8).loss, rel_tol=1e-6)
    assert task.chance(8).metrics == {"accuracy": 1 / 8}


def test_the_preview_names_the_nearest_other_text():
    task = create("simcse", {"text": bert()})
    inputs = task.transform(tiny_batch(3), Draws(0, 0, 3))
    z = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])[:, None].expand(3, 2, 2)
    texts, other = task.preview(inputs, {"z": z})
    assert list(other.cells) == [texts.cells[2], texts.cells[2], texts.cells[1]]
