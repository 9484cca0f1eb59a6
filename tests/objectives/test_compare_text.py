"""The models that count, which text tasks are compared with: exact where a chain is known, at the tokens not seen."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from compare_text import Counts, masked_tokens, removed_tokens
from tiny_encoders import TinyText, tiny_batch, tiny_text_to_text

from mmssl.objectives import create
from mmssl.ops.draws import Draws

SIZE, SPECIAL = 6, 2


def _chain(texts: int) -> tuple[Counts, np.ndarray]:
    """Texts of a Markov chain between token 0, which starts one, and token 1, which ends it; and its matrix."""
    rng = np.random.default_rng(0)
    step = np.zeros((SIZE, SIZE))
    step[0, SPECIAL:] = rng.dirichlet(np.ones(SIZE - SPECIAL))
    step[SPECIAL:, 1:] = rng.dirichlet(np.ones(SIZE - 1), SIZE - SPECIAL)
    counts = Counts(np.arange(SIZE) < SPECIAL)
    for _ in range(texts):
        text = [0]
        while text[-1] != 1:
            text.append(int(rng.choice(SIZE, p=step[text[-1]])))
        counts.see(np.array(text))
    return counts.fit(), step


@pytest.mark.long
def test_what_is_counted_is_the_chain_and_its_posterior():
    counts, step = _chain(20_000)
    for left in (0, *range(SPECIAL, SIZE)):
        for right in range(1, SIZE):
            found = counts.chances(left, right)
            for name, exact in {"bigram": step[left], "both neighbors": step[left] * step[:, right]}.items():
                exact = exact * (np.arange(SIZE) >= SPECIAL)
                np.testing.assert_allclose(found[name], exact / exact.sum(), atol=0.03)


def test_chances_add_up_and_none_is_nothing():
    counts, _ = _chain(3)
    for left in (None, *range(SIZE)):
        for right in (None, *range(SIZE)):
            for chance in counts.chances(left, right).values():
                assert chance.sum() == pytest.approx(1)
                assert (chance[SPECIAL:] > 0).all()
                assert not chance[:SPECIAL].any()
    alone = counts.chances(None, None)
    np.testing.assert_array_equal(alone["bigram"], alone["unigram"])


def test_masked_tokens_have_the_neighbors_they_had():
    batch = tiny_batch(60, length=40)
    task = create("masked_language", {"text": TinyText()}, mask_ratio=0.3)
    mask_id = task.vocabulary.mask_id
    inputs = task.transform(batch, Draws(0, 0, 60))
    hidden, beside = 0, 0
    for row, slot, target, left, right in masked_tokens(inputs, task.vocabulary.tokenizer):
        place = int(inputs["places"][row, slot])
        assert int(batch["text"][row, place]) == target
        assert int(inputs["text"][row, place]) == mask_id
        for token, where in ((left, place - 1), (right, place + 1)):
            beside += token is None
            assert int(inputs["text"][row, where]) == (mask_id if token is None else token)
        hidden += 1
    assert hidden == int(((inputs["text"] == mask_id) & (batch["text"] != mask_id)).sum())
    assert beside


def test_removed_tokens_follow_what_they_followed():
    batch = tiny_batch(60, length=40)
    task = create("span_denoising", {"text": tiny_text_to_text("t5", 24)}, mask_ratio=0.5)
    inputs = task.transform(batch, Draws(0, 0, 60))
    texts = [row[mask].tolist() for row, mask in zip(batch["text"], batch["text_mask"], strict=True)]
    removed = [[] for _ in texts]
    unknown = 0
    for row, place, target, left, _ in removed_tokens(inputs, task.tokenizer):
        assert int(inputs["target"][row, place]) == target
        if left is None:
            unknown += 1
        else:
            assert (left, target) in zip(texts[row], texts[row][1:], strict=False)
        removed[row].append(target)
    # What is removed and what is shown are together the text.
    sentinels = torch.tensor(task.tokenizer.sentinel_ids)
    for row, text in enumerate(texts):
        shown = inputs["text"][row][inputs["text_mask"][row]]
        assert sorted([*removed[row], *shown[~torch.isin(shown, sentinels)].tolist()]) == sorted(text)
    # Only a roll that cuts a span puts two gaps side by side, or a gap in front of the text; the start token is left.
    assert unknown <= len(texts)
