"""Retrieval between the two sides of a pair, both ways, in the space that the task trained; nothing is learned.

R@k is the share of queries with a right item among the k best (several may be right), ties counting against the
model. A task that also matches pairs by a network that sees both sides orders the best ones anew (Li et al. 2021,
"Align before Fuse", arXiv 2107.07651); one that does only this scores every pair by it. Baselines: the same networks
with random weights, the linear maps under which the raw inputs of the training pairs agree best, and a random order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mmssl.adaptation.canonical_correlation import bag_of_words, fit_canonical_correlation, frequent_words
from mmssl.adaptation.metrics import Metric
from mmssl.adaptation.pairs import (
    Network,
    PairedItems,
    PairProbe,
    every_pair,
    matcher,
    network_of,
    read_pairs,
    reinitialized_tasks,
    transposed,
)
from mmssl.adaptation.ranks import Ranking, by_vectors, rank
from mmssl.adaptation.request import Model, Request
from mmssl.adaptation.rows import Split
from mmssl.adaptation.table import CHANCE, PRETRAINED, RANDOM, RAW, RERANKED, Row, Table
from mmssl.adaptation.targets.base import HELD_OUT, hold_out
from mmssl.errors import RecipeError

MEDIAN_RANK = Metric("median_rank", "median rank", percent=False)


class Retrieval(PairProbe):
    """Both directions of one pair of encoders.

    Args:
        a: name of one encoder; that of the first pair that the task compares where left out.
        b: name of the other.
        ks: numbers of items that are looked at.
        rerank: number of best items that `match` orders anew, where the task has one; 0 for none. 128 is ALBEF's for
            1,000 pictures, 256 for 5,000.
    """

    def __init__(
        self, *, a: str | None = None, b: str | None = None, ks: tuple[int, ...] = (1, 5, 10), rerank: int = 128
    ) -> None:
        super().__init__(a, b)
        if not ks or min(ks) < 1:
            raise RecipeError(f"retrieval: ks = {ks} should be numbers of items from 1, such as 1, 5, 10")
        if rerank < 0:
            raise RecipeError(f"retrieval: rerank = {rerank} should be a number of items, or 0 for none")
        self.recalls = {k: Metric(f"recall_at_{k}", f"R@{k}") for k in sorted(set(ks))}
        self.rerank = rerank

    def compare(self, network: Network, model: Model, request: Request) -> Table:
        """The table; see the module."""
        train, test = request.open(model, network.modalities, learns=False)
        assert test is not None  # without test rows the others are
        randoms = reinitialized_tasks(network.task, request.seeds) if request.baseline else []
        networks = [network, *(network_of(one, *network.names) for one in randoms)]
        # Without a common space all is done by `match`; else it orders the best of the pretrained network anew.
        alone = network.pair.embed is None
        again = network.pair.match is not None and self.rerank > 0
        keep = [alone or again, *[alone] * len(randoms)]
        size = request.batch_size
        pairs = read_pairs(networks, network.modalities, test, groups=request.groups, keep=keep, batch_size=size)
        parts = int(pairs.relation.parts().max()) + 1
        plan = [(PRETRAINED, [_both_ways(network, pairs, 0, size)])]
        if again and not alone:
            plan.append((RERANKED, [_both_ways(network, pairs, 0, size, self.rerank)]))
        if randoms:
            plan.append((RANDOM, [_both_ways(one, pairs, i, size) for i, one in enumerate(networks) if i]))
        if request.baseline and train is not None:
            plan.append((RAW, [_linear_maps(network.modalities, train, pairs, request.seeds[0], size)]))
        lacking = request.baseline and train is None
        missing = ["no linear maps of raw inputs, for there are no training rows to learn them from"] * lacking
        a, b = network.names
        rows = [
            self._row(name, f"{query} to {gallery}", [run[way] for run in runs], parts)
            for name, runs in plan
            for way, (query, gallery) in enumerate(((a, b), (b, a)))
        ]
        chance = [self._chance(part, plan[0][1][0][way]) for way, part in enumerate((f"{a} to {b}", f"{b} to {a}"))]
        return Table(
            rows=(*rows, *chance),
            metrics=(*self.recalls.values(), MEDIAN_RANK),
            probe=self.name,
            target="",
            label="",
            encoder=f"{a} and {b}",
            train_rows=0,
            test_rows=len(pairs.a.item),
            counts={f"{a} items": len(pairs.a), f"{b} items": len(pairs.b), "parts that share nothing": parts},
            shots=None,
            test=test.where,
            validation="",
            seeds=request.seeds,
            notes=("of several right items the best counts, a tie counts as wrong", *missing),
        )

    def _row(self, encoder: str, part: str, runs: Sequence[Ranking], parts: int) -> Row:
        scores = [
            {metric.name: run.recall(k) for k, metric in self.recalls.items()} | {MEDIAN_RANK.name: run.median}
            for run in runs
        ]
        shares = [metric.name for metric in self.recalls.values()]
        return Row.of_seeds(encoder, part, scores, shares=shares, trials=parts)

    def _chance(self, part: str, ranking: Ranking) -> Row:
        curve = ranking.chance()
        recall = {metric.name: float(curve[min(k, ranking.gallery) - 1]) for k, metric in self.recalls.items()}
        return Row(CHANCE, part, {**recall, MEDIAN_RANK.name: 1.0 + int((curve < 0.5).sum())})


def _both_ways(
    network: Network, pairs: PairedItems, index: int, batch_size: int, top: int = 0
) -> tuple[Ranking, Ranking]:
    """Both directions, by the network's vectors where it has any."""
    a, b = pairs.a.features[index], pairs.b.features[index]
    match = None if a is None or b is None else matcher(network, a, b, batch_size)
    back = None if match is None else transposed(match)
    left, right = pairs.a.vectors[index], pairs.b.vectors[index]
    relation, other = pairs.relation, pairs.relation.transposed()
    if left is None or right is None:
        assert match is not None  # a pair has either
        return (
            rank(every_pair(match, len(pairs.b)), relation),
            rank(every_pair(transposed(match), len(pairs.a)), other),
        )
    return (
        rank(by_vectors(left, right), relation, match=match, top=top),
        rank(by_vectors(right, left), other, match=back, top=top),
    )


def _linear_maps(
    modalities: tuple[str, str], train: Split, pairs: PairedItems, seed: int, batch_size: int
) -> tuple[Ranking, Ranking]:
    """Both directions by linear maps that are learned from training pairs; their ridge is chosen on a fifth of them."""
    learned = read_pairs((), modalities, train, batch_size=batch_size)
    train_raw, test_raw = [learned.a.raw, learned.b.raw], [pairs.a.raw, pairs.b.raw]
    for i, modality in enumerate(modalities):
        if modality == "text":
            words = frequent_words(train_raw[i])
            train_raw[i], test_raw[i] = bag_of_words(train_raw[i], words), bag_of_words(test_raw[i], words)
    # Rows with an item in common, such as captions of one picture, are not divided.
    parts = learned.relation.parts()[learned.a.item]
    held = hold_out(torch.zeros_like(parts), HELD_OUT, seed, parts)
    maps, _ = fit_canonical_correlation(train_raw[0], train_raw[1], (learned.a.item, learned.b.item), held)
    left, right = maps(test_raw[0], test_raw[1])
    return rank(by_vectors(left, right), pairs.relation), rank(by_vectors(right, left), pairs.relation.transposed())
