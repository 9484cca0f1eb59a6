"""A probe at every depth, by one protocol: choose on the first seed's validation rows, then score each seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from mmssl.adaptation.probes.base import Probe, RawRows, draw_shots
from mmssl.adaptation.scores import Row, score

Views = Mapping[str, Tensor | RawRows]


def probe_depths(
    probe: Probe,
    encoder: str,
    train: Sequence[Views],
    test: Sequence[Views],
    labels: Tensor,
    truth: Tensor,
    *,
    seeds: Sequence[int],
    groups: Tensor | None = None,
    shots: int | None = None,
) -> list[Row]:
    """One row of the table for every depth of one encoder.

    Args:
        probe: whose setting is chosen anew for every depth.
        encoder: name in the table.
        train: {depth: N rows} as this encoder sees them, one mapping a seed.
        test: {depth: M rows}, one a seed.
        labels: classes of the training rows, int64 (N,).
        truth: classes of the test rows, int64 (M,).
        seeds: as many as `train` has.
        groups: int64 (N,), kept together by the validation split.
        shots: learn from only so many rows a class, drawn by each seed.
    """
    picks = [draw_shots(labels, shots, seed) if shots else None for seed in seeds]
    rows = []
    for depth in train[0]:
        setting: Mapping[str, float] | None = None
        guesses: list[Tensor] = []
        for seed, pick, learned, asked in zip(seeds, picks, train, test, strict=True):
            known, classes, together = learned[depth], labels, groups
            if pick is not None:
                known, classes, together = known[pick], labels[pick], None if groups is None else groups[pick]
            if setting is None:
                setting = probe.choose(known, classes, seed, together)
            guesses.extend(probe.predict(known, classes, asked[depth], [setting], seed))
        rows.append(score(encoder, depth, guesses, truth, dict(setting or {})))
    return rows
