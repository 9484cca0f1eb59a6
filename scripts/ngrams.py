"""Held-out loss of a masked language model beside that of counting models, on the same hidden tokens.

    MMSSL_DATA=path/to/data python scripts/ngrams.py runs/masked_language_wordnet

The counting models know the training texts, the neighbours of a hidden token where these are visible, and what the
network knows as well: that a hidden token which shows a word shows the right one every second time. `bigram` is the
exact answer of a bigram model to both neighbours, P(token | left) P(right | token), normalised; it is smoothed by
absolute discounting with the unigram model.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

import mmssl
from mmssl.data.loader import read
from mmssl.ops.draws import Draws

DISCOUNT = 0.75
ROWS = 4096


def main() -> None:
    """Print a line a model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    run = mmssl.load(parser.parse_args().run)
    (data,) = run.recipe.sources().values()
    task, size = run.objective.eval(), run.tokenizers["text"].vocab_size
    special = np.isin(np.arange(size), sorted(run.tokenizers["text"].special_ids))

    pairs = np.zeros((size, size), dtype=np.float32)
    for batch in read(data, ("text",), tokenizers=run.tokenizers):
        for row, mask in zip(batch["text"].numpy(), batch["text_mask"].numpy(), strict=True):
            np.add.at(pairs, (row[mask][:-1], row[mask][1:]), 1)
    count = pairs.sum(0) * ~special
    unigram = (count + 1) * ~special
    unigram /= unigram.sum()
    given = _conditional(pairs, np.where(special, pairs.sum(0) + 1, count + 1))

    held_out = data.model_copy(update={"split": "test", "limit": ROWS})
    names = ("network", "unigram", "left neighbour", "bigram")
    visible: dict[str, list[float]] = {name: [] for name in names}
    masked: dict[str, list[float]] = {name: [] for name in names}
    for step, batch in enumerate(read(held_out, task.needs, tokenizers=run.tokenizers)):
        with torch.no_grad():
            inputs = task.transform(batch, Draws(0, step, len(batch["id"])))
            logits = task.predict(inputs)["logits"].log_softmax(-1)
        for row, slot in inputs["chosen"].nonzero().tolist():
            seen, place = inputs["text"][row].numpy(), int(inputs["places"][row, slot])
            target = int(inputs["target"][row, slot])
            left, right, own = int(seen[place - 1]), int(seen[place + 1]), int(seen[place])
            to_left = unigram if left == task.mask_id else given[left] * ~special
            to_right = 1.0 if right == task.mask_id else given[:, right]
            rule = 1.0 if own == task.mask_id else 1 / (~special).sum() + (np.arange(size) == own)
            for name, weights in zip(names[1:], (unigram, to_left, to_left * to_right), strict=True):
                losses = masked if own == task.mask_id else visible
                losses[name].append(-float(np.log(weights[target] / weights.sum()) if own == task.mask_id else
                                           np.log((weights * rule)[target] / (weights * rule).sum())))  # fmt: skip
            (masked if own == task.mask_id else visible)["network"].append(-float(logits[row, slot, target]))
    for name in names:
        both = masked[name] + visible[name]
        print(f"{name:15s} all {np.mean(both):.3f}  masked {np.mean(masked[name]):.3f}  ({len(both)} tokens)")


def _conditional(pairs: np.ndarray, count: np.ndarray) -> np.ndarray:
    """P(column | row) with absolute discounting, the rest spread like `count`."""
    total = np.maximum(pairs.sum(1, keepdims=True), 1)
    kept = np.maximum(pairs - DISCOUNT, 0) / total
    return kept + (1 - kept.sum(1, keepdims=True)) * (count / count.sum())


if __name__ == "__main__":
    main()
