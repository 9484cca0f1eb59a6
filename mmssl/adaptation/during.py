"""A probe while training goes on, quick enough to be called every few hundred steps."""

from __future__ import annotations

import torch

from mmssl import registry
from mmssl.adaptation.features import POOLED, extract
from mmssl.adaptation.probes.base import HELD_OUT, Probe, hold_out
from mmssl.adaptation.rows import groups_of, labels_of, open_rows
from mmssl.adaptation.scores import balanced_accuracy
from mmssl.encoders.base import Encoder
from mmssl.recipe import Data
from mmssl.recipe import Probe as Spec

ROWS = 5000
"""Used where the recipe sets no limit: they are kept decoded in memory."""


class ProbeDuring:
    """A function of no argument: scores of the encoder as it is now.

    It learns from four fifths of the *training* split and scores the fifth that was held out; test rows stay unseen, so
    that no checkpoint is chosen by them. Rows are decoded once, when this is built.

    Args:
        spec: of the recipe.
        encoder: in training; its mode and statistics are left as they are.
        data: labeled source and decode settings.
        seed: of both splits, which are the same at every call.
        batch_size: rows that go through the encoder at a time.
    """

    def __init__(self, spec: Spec, encoder: Encoder, data: Data, *, seed: int = 0, batch_size: int = 256) -> None:
        self.encoder, self.seed, self.kind = encoder, seed, registry.find("probe", spec.probe)
        rows = open_rows(
            data, encoder, label=spec.label, groups=spec.groups, limit=spec.limit or ROWS, batch_size=batch_size
        )
        self.batches = list(rows.batches)
        beside = {key: torch.cat([batch[key] for batch in self.batches]) for key in ("label", "id")}
        self.labels, self.groups = labels_of(rows, beside), groups_of(rows, beside, spec.groups)
        self.held = hold_out(self.labels, HELD_OUT, seed, self.groups)

    def __call__(self) -> dict[str, float]:
        """`accuracy` and `balanced` of the probe, and the `constant` accuracy of the majority class."""
        (views,), _ = extract([self.encoder], self.batches)
        vectors, labels, held = views[POOLED], self.labels, self.held
        together = None if self.groups is None else self.groups[~held]
        probe: Probe = self.kind()
        setting = probe.choose(vectors[~held], labels[~held], self.seed, together)
        (guess,) = probe.predict(vectors[~held], labels[~held], vectors[held], [setting], self.seed)
        majority = labels[~held].bincount().argmax()
        return {
            "accuracy": (guess == labels[held]).double().mean().item(),
            "balanced": balanced_accuracy(guess == labels[held], labels[held]),
            "constant": (labels[held] == majority).double().mean().item(),
        }
