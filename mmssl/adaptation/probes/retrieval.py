"""Retrieval between the two sides of a pair, both ways, in the space that the task trained; nothing is learned.

R@k is the share of queries with a right item among the k best (several may be right), ties counting against the
model. A task that also matches pairs by a network that sees both sides orders the best ones anew (Li et al. 2021,
"Align before Fuse", arXiv 2107.07651); one that does only this scores every pair by it. Baselines: the same networks
with random weights, the linear maps under which the raw inputs of the training pairs agree best, and a random order.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import torch

from mmssl.adaptation.pairs import (
    Asked,
    Network,
    PairProbe,
    Sides,
    every_pair,
    fresh_tasks,
    matcher,
    network_of,
    read_sides,
    turned,
)
from mmssl.adaptation.probes.base import HELD_OUT, hold_out
from mmssl.adaptation.ranks import Ranking, by_vectors, rank
from mmssl.adaptation.raw import agree, bag, frequent
from mmssl.adaptation.rows import Rows
from mmssl.adaptation.scores import (
    CHANCE,
    PRETRAINED,
    RANDOM,
    RAW,
    RERANKED,
    RetrievalRow,
    RetrievalScores,
    wilson,
)
from mmssl.errors import RecipeError
from mmssl.objectives.base import Objective


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
        if not ks or min(ks) < 1:
            raise RecipeError(f"retrieval: ks = {ks} should be numbers of items from 1, such as 1, 5, 10")
        if rerank < 0:
            raise RecipeError(f"retrieval: rerank = {rerank} should be a number of items, or 0 for none")
        self.a, self.b, self.ks, self.rerank = a, b, tuple(sorted(set(ks))), rerank

    def score(self, task: Objective, asked: Asked) -> RetrievalScores:
        """The table; see the module."""
        network = network_of(task, self.a, self.b)
        known, wanted = asked.open()
        needs = tuple(dict.fromkeys(network.modalities))
        randoms = fresh_tasks(task, asked.seeds) if asked.baseline else []
        networks = [network, *(network_of(one, *network.pair[:2]) for one in randoms)]
        # Without a common space all is done by `match`; else it orders the best of the pretrained network anew.
        alone = network.pair.embed is None
        again = network.pair.match is not None and self.rerank > 0
        rows = asked.test_rows(wanted, task, needs)
        keep = [alone or again, *[alone] * len(randoms)]
        sides = read_sides(networks, network.modalities, rows, groups=asked.groups, keep=keep)
        parts = int(sides.relation.parts().max()) + 1
        table = [(PRETRAINED, [_ways(network, sides, 0, asked.batch_size)])]
        if again and not alone:
            table.append((RERANKED, [_ways(network, sides, 0, asked.batch_size, self.rerank)]))
        if randoms:
            table.append((RANDOM, [_ways(one, sides, i, asked.batch_size) for i, one in enumerate(networks) if i]))
        pairs = asked.train_rows(known, task, needs) if asked.baseline else None
        if pairs is not None:
            table.append((RAW, [_raw(network.modalities, pairs, sides, asked.seeds[0])]))
        names = (network.pair.a, network.pair.b)
        found = [self._row(name, names, way, runs, parts) for name, runs in table for way in (0, 1)]
        found += [self._chance(names, way, table[0][1][0][way]) for way in (0, 1)]
        return RetrievalScores(
            rows=tuple(found),
            pairs=len(sides.a.item),
            items={names[0]: len(sides.a), names[1]: len(sides.b)},
            parts=parts,
            test=rows.where,
            seeds=asked.seeds,
        )

    def _row(
        self, encoder: str, names: tuple[str, str], way: int, runs: Sequence[tuple[Ranking, Ranking]], parts: int
    ) -> RetrievalRow:
        recalls = {k: [run[way].recall(k) for run in runs] for k in self.ks}
        mean = {k: statistics.fmean(values) for k, values in recalls.items()}
        return RetrievalRow(
            encoder=encoder,
            query=names[way],
            gallery=names[1 - way],
            recall=mean,
            spread={k: statistics.stdev(values) for k, values in recalls.items()} if len(runs) > 1 else None,
            interval={k: wilson(share, parts) for k, share in mean.items()},
            median_rank=statistics.fmean(run[way].median for run in runs),
        )

    def _chance(self, names: tuple[str, str], way: int, ranking: Ranking) -> RetrievalRow:
        curve = ranking.chance()
        recall = {k: float(curve[min(k, ranking.gallery) - 1]) for k in self.ks}
        median = 1 + int((curve < 0.5).sum())
        return RetrievalRow(CHANCE, names[way], names[1 - way], recall, None, None, median)


def _ways(network: Network, sides: Sides, index: int, batch_size: int, top: int = 0) -> tuple[Ranking, Ranking]:
    """Both directions, by the network's vectors where it has any."""
    a, b = sides.a.features[index], sides.b.features[index]
    match = None if a is None or b is None else matcher(network, a, b, batch_size)
    left, right = sides.a.vectors[index], sides.b.vectors[index]
    back = None if match is None else turned(match)
    there, again = sides.relation, sides.relation.turned()
    if left is None or right is None:
        assert match is not None  # a pair has either
        return rank(every_pair(match, len(sides.b)), there), rank(every_pair(turned(match), len(sides.a)), again)
    return (
        rank(by_vectors(left, right), there, match=match, top=top),
        rank(by_vectors(right, left), again, match=back, top=top),
    )


def _raw(modalities: tuple[str, str], rows: Rows, wanted: Sides, seed: int) -> tuple[Ranking, Ranking]:
    """Both directions by linear maps that are learned from training pairs; their ridge is chosen on a fifth of them."""
    known = read_sides((), modalities, rows)
    learned, asked = [known.a.plain, known.b.plain], [wanted.a.plain, wanted.b.plain]
    for i, modality in enumerate(modalities):
        if modality == "text":
            words = frequent(learned[i])
            learned[i], asked[i] = bag(learned[i], words), bag(asked[i], words)
    # Rows with an item in common, such as captions of one picture, are not divided.
    parts = known.relation.parts()[known.a.item]
    held = hold_out(torch.zeros_like(parts), HELD_OUT, seed, parts)
    agreement, _ = agree(learned[0], learned[1], (known.a.item, known.b.item), held)
    left, right = agreement(asked[0], asked[1])
    return rank(by_vectors(left, right), wanted.relation), rank(by_vectors(right, left), wanted.relation.turned())
