"""Two sides of the same rows, as the networks that a task has learned to compare them with see them.

An item that stands in several rows, such as a picture with five captions, is encoded once and stands once in the
gallery: equal inputs are one item. What is right follows from the rows, or from a column of groups.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mmssl.adaptation.features import evaluating, inputs_of
from mmssl.adaptation.ranks import Matcher, Relation, Scorer
from mmssl.adaptation.raw import plain
from mmssl.adaptation.rows import Opened, Rows, groups_of, open_asked, read_rows
from mmssl.batch import Batch, count_rows, to_device
from mmssl.build import tokenizers_of
from mmssl.encoders.base import Encoder, Features
from mmssl.errors import DataError, RecipeError, RunError
from mmssl.media.text import Tokenizer
from mmssl.objectives import reinitialized
from mmssl.objectives.base import Objective, Pair
from mmssl.recipe import Data


@dataclass(frozen=True)
class Asked:
    """What a probe of pairs is given: the arguments of `mmssl.adapt` that concern it."""

    train: Any
    test: Any = None
    label: str = "label"
    baseline: bool = True
    seeds: tuple[int, ...] = (0, 1, 2)
    groups: str | None = None
    data: Data | None = None
    columns: Mapping[str, str] | None = None
    limit: int | None = None
    batch_size: int = 256
    workers: int = 0

    def open(self) -> tuple[Opened | None, Opened | None]:
        """Sources of training and test rows, None for batches and for training rows that there are not."""
        return open_asked(self.train, self.test, data=self.data, columns=self.columns, limit=self.limit)

    def rows(self, opened: Opened, task: Objective, needs: Sequence[str], **more: Any) -> Rows:
        """Batches of a source; `more` as `label`, `classes` and `groups` of `read_rows`."""
        tokenizers = tokenizers_of(task.exported)
        return read_rows(opened, needs, tokenizers, batch_size=self.batch_size, workers=self.workers, **more)

    def train_rows(self, opened: Opened | None, task: Objective, needs: Sequence[str]) -> Rows | None:
        """Of the source, or the batches that were given apart from test rows; None where there are none."""
        if opened is not None:
            return self.rows(opened, task, needs)
        return None if self.test is None else Rows(self.train, "batches")

    def test_rows(self, opened: Opened | None, task: Objective, needs: Sequence[str], **more: Any) -> Rows:
        """Of the source, or the batches that were given; see `rows`."""
        if opened is not None:
            return self.rows(opened, task, needs, groups=self.groups, **more)
        return Rows(self.train if self.test is None else self.test, "batches")


class PairProbe:
    """Compares two sides of rows as a task does; learns nothing.

    Subclasses take keyword-only hyper-parameters; see `mmssl.adapt`, which calls them.
    """

    def score(self, task: Objective, asked: Asked) -> Any:
        """The table of `task`, which stays as it was."""
        raise TypeError(f"{type(self).__name__} scores nothing")


@dataclass(frozen=True)
class Network:
    """One set of weights that compares two sides.

    Attributes:
        task: whose weights they are.
        pair: how.
        encoders: of `pair.a` and of `pair.b`.
    """

    task: Objective
    pair: Pair
    encoders: tuple[Encoder, Encoder]

    @property
    def device(self) -> torch.device:
        """Of the weights."""
        return next(self.encoders[0].parameters()).device

    @property
    def modalities(self) -> tuple[str, str]:
        """Of both encoders."""
        return self.encoders[0].modality, self.encoders[1].modality


def network_of(task: Objective, a: str | None = None, b: str | None = None) -> Network:
    """What a task compares pairs with.

    Args:
        task: one, or several together.
        a: name of an encoder; that of the first pair with a common space where left out, else of the first pair.
        b: likewise.

    Raises:
        RecipeError: where the task compares nothing, or not these.
    """
    pairs = task.pairs
    fit = [pair for pair in pairs if (a or pair.a, b or pair.b) == (pair.a, pair.b)]
    if not fit:
        have = ", ".join(f"{pair.a} and {pair.b}" for pair in pairs)
        wanted = f"{a or 'anything'} and {b or 'anything'}"
        raise RecipeError(
            f"the task compares {have}, not {wanted}"
            if have
            else f"{type(task).__name__} compares no two encoders; contrastive and matching do"
        )
    first = next((pair for pair in fit if pair.embed), fit[0])
    match = next((p.match for p in fit if p.match and (p.a, p.b) == (first.a, first.b)), None)
    encoders = task.exported
    return Network(task, first._replace(match=match), (encoders[first.a], encoders[first.b]))


def fresh_tasks(task: Objective, seeds: Iterable[int]) -> list[Objective]:
    """The task with new random weights, on its device; raises RecipeError where it cannot be made again."""
    device = next(task.parameters()).device
    try:
        return [reinitialized(task, seed).to(device) for seed in seeds]
    except TypeError as error:
        raise RecipeError(f"{error}; or leave the random-initialized baseline out (baseline=False)") from error


@dataclass
class Side:
    """Distinct items of one side.

    Attributes:
        item: of each row, int64 (R,).
        vectors: of each network, float32 (items, W); none for a network without a common space.
        features: of each network, where they are kept for its `match`.
        plain: float32 (items, D), or token ids; see `raw.plain`.
    """

    item: Tensor
    vectors: list[Tensor | None]
    features: list[Features | None]
    plain: Tensor

    def __len__(self) -> int:
        return len(self.plain)


@dataclass
class Sides:
    """Both sides of all rows.

    Attributes:
        a, b: the sides.
        relation: which items belong together.
    """

    a: Side
    b: Side
    relation: Relation


@dataclass
class _Growing:
    """A side while rows come in."""

    number: dict[bytes, int] = field(default_factory=dict)
    item: list[int] = field(default_factory=list)
    vectors: list[list[Tensor]] = field(default_factory=list)
    features: list[list[Features]] = field(default_factory=list)
    plain: list[Tensor] = field(default_factory=list)

    def new(self, batch: Batch) -> Tensor:
        """Positions of the rows that were not seen before; every row gets the number of its item."""
        positions = []
        for position in range(count_rows(batch)):
            content = hashlib.blake2b(b"".join(v[position].contiguous().numpy().tobytes() for v in batch.values()))
            known = len(self.number)
            number = self.number.setdefault(content.digest(), known)
            if number == known:
                positions.append(position)
            self.item.append(number)
        return torch.tensor(positions, dtype=torch.int64)

    def done(self) -> Side:
        return Side(
            item=torch.tensor(self.item),
            vectors=[torch.cat(parts) if parts else None for parts in self.vectors],
            features=[_joined(parts) if parts else None for parts in self.features],
            plain=torch.cat(self.plain),
        )


def read_sides(
    networks: Sequence[Network],
    modalities: tuple[str, str],
    rows: Rows,
    *,
    groups: str | None = None,
    keep: Sequence[bool] = (),
) -> Sides:
    """Every distinct item of both sides once through each network.

    Args:
        networks: that see the same modalities; none for raw numbers alone.
        modalities: of both sides.
        rows: to read.
        groups: column or key of what belongs together; else the sides of one row do.
        keep: for each network, whether to keep its features for `match`: tokens of all items, in memory.

    Raises:
        DataError: where there is no row.
        RunError: where vectors are not finite.
    """
    growing = [_Growing(vectors=[[] for _ in networks], features=[[] for _ in networks]) for _ in modalities]
    rest: list[Batch] = []
    with evaluating(network.task for network in networks), torch.no_grad():
        for batch in rows.batches:
            for index, (modality, side) in enumerate(zip(modalities, growing, strict=True)):
                own = own_inputs(batch, modality)
                new = side.new(own)
                if len(new):
                    own = {key: value[new] for key, value in own.items()}
                    side.plain.append(plain(modality, own[modality], own.get(f"{modality}_mask")))
                    for number, network in enumerate(networks):
                        features, vectors = look(network, index, own)
                        if vectors is not None:
                            side.vectors[number].append(vectors)
                        if keep[number]:
                            side.features[number].append(_on(features, "cpu"))
            beside = [key for key in ("id", groups) if key in batch]
            rest.append({key: batch[key] for key in beside})
    if not rest:
        raise DataError(f"{rows.where}: there are no rows")
    a, b = (side.done() for side in growing)
    every = {key: torch.cat([part[key] for part in rest]) for key in rest[0]}
    group = groups_of(rows, every, groups)
    if group is None:
        group = torch.arange(len(a.item))
    group = group.unique(return_inverse=True)[1]
    return Sides(a, b, Relation.of_rows(a.item, b.item, group))


def look(network: Network, side: int, batch: Batch) -> tuple[Features, Tensor | None]:
    """Rows of one side: their features and, where the network has a space for both, unit vectors (B, W) on the CPU.

    Raises:
        RunError: where vectors are not finite.
    """
    encoder = network.encoders[side]
    key, mask_key = inputs_of(encoder)
    inputs = to_device(batch, network.device)
    features = encoder(inputs[key], inputs.get(mask_key))
    vectors = None
    if network.pair.embed is not None:
        vectors = network.pair.embed[side](features).float().cpu()
        if not vectors.isfinite().all():
            raise RunError(
                f"vectors of {encoder.modality} are not finite: training diverged, or the precision is too low"
            )
    return features, vectors


def matcher(network: Network, a: Features, b: Features, batch_size: int) -> Matcher:
    """The network's `match` of items by their numbers, in batches."""
    assert network.pair.match is not None
    match = network.pair.match

    def logits(left: Tensor, right: Tensor) -> Tensor:
        parts = []
        with evaluating([network.task]), torch.no_grad():
            for i, j in zip(left.split(batch_size), right.split(batch_size), strict=True):
                found = match(_on(_pick(a, i), network.device), _on(_pick(b, j), network.device))
                parts.append(found.float().cpu())
        return torch.cat(parts)

    return logits


def every_pair(match: Matcher, gallery: int) -> Scorer:
    """Scores of a network that has no common space: each query with each item of the gallery."""

    def scores(start: int, stop: int) -> Tensor:
        query = torch.arange(start, stop).repeat_interleave(gallery)
        return match(query, torch.arange(gallery).repeat(stop - start)).view(-1, gallery)

    return scores


def turned(match: Matcher) -> Matcher:
    """The same with `b` asking."""
    return lambda query, item: match(item, query)


def tokenizer_of(encoder: Encoder) -> Tokenizer:
    """Of a text encoder."""
    found = getattr(encoder, "tokenizer", None)
    if not isinstance(found, Tokenizer):
        raise RecipeError(f"{type(encoder).__name__} has no tokenizer, and prompts are text")
    return found


def own_inputs(batch: Mapping[str, Tensor], modality: str) -> Batch:
    """What a side reads of a batch, on the CPU; raises DataError where it is not there."""
    if modality not in batch:
        raise DataError(f"the task reads '{modality}', the batches have: {', '.join(batch) or 'nothing'}")
    return {key: batch[key].cpu() for key in (modality, f"{modality}_mask") if key in batch}


def _on(features: Features, device: torch.device | str) -> Features:
    return features._replace(
        tokens=features.tokens.to(device),
        pooled=features.pooled.to(device),
        valid=None if features.valid is None else features.valid.to(device),
    )


def _pick(features: Features, index: Tensor) -> Features:
    return features._replace(
        tokens=features.tokens[index],
        pooled=features.pooled[index],
        valid=None if features.valid is None else features.valid[index],
    )


def _joined(parts: Sequence[Features]) -> Features:
    masks = [part.valid for part in parts if part.valid is not None]
    return parts[0]._replace(
        tokens=torch.cat([part.tokens for part in parts]),
        pooled=torch.cat([part.pooled for part in parts]),
        valid=torch.cat(masks) if masks else None,
    )
