"""Two sides of the same rows, as the networks that a task has learned to compare them with see them.

An item that is in several rows, such as a picture with five captions, is encoded once and is once in the
gallery: equal inputs are one item. What is right follows from the rows, or from a column of groups.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmssl.adaptation.canonical_correlation import raw_features
from mmssl.adaptation.features import encode, inputs_of
from mmssl.adaptation.probes.base import Probe
from mmssl.adaptation.ranks import Matcher, Relation, Scorer
from mmssl.adaptation.request import Model, Request
from mmssl.adaptation.rows import Split, in_order
from mmssl.adaptation.table import Table
from mmssl.batch import Batch, count_rows, to_device
from mmssl.encoders.base import Encoder, Features
from mmssl.errors import DataError, RecipeError, RunError
from mmssl.media.text import Tokenizer
from mmssl.modules.mode import evaluating
from mmssl.objectives import reinitialized
from mmssl.objectives.base import Objective, Pair


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
    def names(self) -> tuple[str, str]:
        """Of both encoders."""
        return self.pair.a, self.pair.b

    @property
    def modalities(self) -> tuple[str, str]:
        """Of both encoders."""
        return self.encoders[0].modality, self.encoders[1].modality


class PairProbe(Probe):
    """Compares two sides of rows as a task does; learns nothing.

    Args:
        a: name of one encoder; that of the first pair that the task compares where left out.
        b: name of the other.
    """

    def __init__(self, a: str | None, b: str | None) -> None:
        self.a, self.b = a, b

    def ask(self, model: Model, request: Request) -> Network:
        """What the task compares pairs with.

        Raises:
            RecipeError: where it compares none, or the request is no pair's.
        """
        name = self.name
        if model.task is None:
            raise RecipeError(f"{name} compares two encoders in the space of their task; give the task: run.objective")
        if model.chosen:
            raise RecipeError(f"{name} compares two encoders: name them as a and b in place of one encoder")
        if request.layers or request.shots or request.target:
            raise RecipeError(f"{name} learns nothing and looks at no depths; leave layers, shots and target out")
        return network_of(model.task, self.a, self.b)

    def check(self, model: Model, request: Request) -> None:
        """See `Probe`."""
        self.ask(model, request)

    def score(self, model: Model, request: Request) -> Table:
        """See `Probe`."""
        return self.compare(self.ask(model, request), model, request)

    def compare(self, network: Network, model: Model, request: Request) -> Table:
        """The table of a network and its baselines."""
        raise TypeError(f"{type(self).__name__} compares nothing")


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


def reinitialized_tasks(task: Objective, seeds: Iterable[int]) -> list[Objective]:
    """The task with new random weights, on its device; raises RecipeError where it cannot be made again."""
    device = next(task.parameters()).device
    try:
        return [reinitialized(task, seed).to(device) for seed in seeds]
    except TypeError as error:
        raise RecipeError(f"{error}; or leave the random-initialized baseline out (baseline=False)") from error


@dataclass
class Items:
    """Distinct items of one side.

    Attributes:
        item: of each row, int64 (R,).
        vectors: of each network, float32 (items, W); none for a network without a common space.
        features: of each network, where they are kept for its `match`.
        raw: float32 (items, D), or token ids; see `raw_features`.
    """

    item: Tensor
    vectors: list[Tensor | None]
    features: list[Features | None]
    raw: Tensor

    def __len__(self) -> int:
        return len(self.raw)


@dataclass
class PairedItems:
    """Both sides of all rows.

    Attributes:
        a, b: the sides.
        relation: which items belong together.
    """

    a: Items
    b: Items
    relation: Relation


class _ItemsSoFar:
    """Items of one side while rows come in, with what `networks` networks make of them."""

    def __init__(self, networks: int) -> None:
        self.number: dict[bytes, int] = {}
        self.item: list[int] = []
        self.vectors: list[list[Tensor]] = [[] for _ in range(networks)]
        self.features: list[list[Features]] = [[] for _ in range(networks)]
        self.raw: list[Tensor] = []

    def add(self, batch: Batch) -> Tensor:
        """Positions of the rows that were not seen before; every row gets the number of its item."""
        positions = []
        for position in range(count_rows(batch)):
            content = hashlib.blake2b(b"".join(v[position].contiguous().numpy().tobytes() for v in batch.values()))
            seen = len(self.number)
            number = self.number.setdefault(content.digest(), seen)
            if number == seen:
                positions.append(position)
            self.item.append(number)
        return torch.tensor(positions, dtype=torch.int64)

    def all(self) -> Items:
        return Items(
            item=torch.tensor(self.item),
            vectors=[torch.cat(parts) if parts else None for parts in self.vectors],
            features=[_concatenated(parts) if parts else None for parts in self.features],
            raw=torch.cat(self.raw),
        )


def read_pairs(
    networks: Sequence[Network],
    modalities: tuple[str, str],
    split: Split,
    *,
    groups: str | None = None,
    keep: Sequence[bool] = (),
    batch_size: int = 256,
) -> PairedItems:
    """Every distinct item of both sides once through each network.

    Args:
        networks: that see the same modalities; none for raw inputs alone.
        modalities: of both sides.
        split: rows to read.
        groups: column or key of what belongs together; else the sides of one row do.
        keep: for each network, whether to keep its features for `match`: tokens of all items, in memory.
        batch_size: rows that are read at a time.

    Raises:
        DataError: where there is no row.
        RunError: where vectors are not finite.
    """
    sides = [_ItemsSoFar(len(networks)) for _ in modalities]
    group = None if groups is None else split.groups(groups)
    # Groups number the rows of a stream by their places among all of them.
    picks = None if group is None else in_order(split.present(len(group)), batch_size)
    ids = []
    with evaluating(*(network.task for network in networks)), torch.no_grad():
        for batch in split.read(picks, batch_size):
            for index, (modality, side) in enumerate(zip(modalities, sides, strict=True)):
                own = own_inputs(batch, modality)
                new = side.add(own)
                if len(new):
                    own = {key: value[new] for key, value in own.items()}
                    side.raw.append(raw_features(modality, own[modality], own.get(f"{modality}_mask")))
                    for number, network in enumerate(networks):
                        features, vectors = encode_side(network, index, own)
                        if vectors is not None:
                            side.vectors[number].append(vectors)
                        if keep[number]:
                            side.features[number].append(_moved(features, "cpu"))
            ids.append(batch["id"])
    if not ids:
        raise DataError(f"{split.where}: there are no rows that can be decoded")
    a, b = (side.all() for side in sides)
    group = torch.arange(len(a.item)) if group is None else group[torch.cat(ids)]
    return PairedItems(a, b, Relation.of_rows(a.item, b.item, group.unique(return_inverse=True)[1]))


def encode_side(network: Network, side: int, batch: Batch) -> tuple[Features, Tensor | None]:
    """Rows of one side: their features and, where the network has a space for both, unit vectors (B, W) on the CPU.

    Raises:
        RunError: where vectors are not finite.
    """
    encoder = network.encoders[side]
    key, valid_key = inputs_of(encoder)
    inputs = to_device(batch, network.device)
    features = encode(encoder, inputs[key], inputs.get(valid_key))
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
        with evaluating(network.task), torch.no_grad():
            for i, j in zip(left.split(batch_size), right.split(batch_size), strict=True):
                found = match(_moved(_selected(a, i), network.device), _moved(_selected(b, j), network.device))
                parts.append(found.float().cpu())
        return torch.cat(parts)

    return logits


def every_pair(match: Matcher, gallery: int) -> Scorer:
    """Scores of a network that has no common space: each query with each item of the gallery."""

    def scores(start: int, stop: int) -> Tensor:
        query = torch.arange(start, stop).repeat_interleave(gallery)
        return match(query, torch.arange(gallery).repeat(stop - start)).view(-1, gallery)

    return scores


def transposed(match: Matcher) -> Matcher:
    """The same with `b` asking."""
    return lambda query, item: match(item, query)


def tokenizer_of(encoder: Encoder) -> Tokenizer:
    """Of a text encoder."""
    found = getattr(encoder, "tokenizer", None)
    if not isinstance(found, Tokenizer):
        raise RecipeError(f"{type(encoder).__name__} has no tokenizer, and prompts are text")
    return found


def own_inputs(batch: Mapping[str, Tensor], modality: str) -> Batch:
    """What a side reads of a batch, on the CPU."""
    return {key: batch[key].cpu() for key in (modality, f"{modality}_mask") if key in batch}


def _moved(features: Features, device: torch.device | str) -> Features:
    return features._replace(
        tokens=features.tokens.to(device),
        pooled=features.pooled.to(device),
        valid=None if features.valid is None else features.valid.to(device),
    )


def _selected(features: Features, index: Tensor) -> Features:
    return features._replace(
        tokens=features.tokens[index],
        pooled=features.pooled[index],
        valid=None if features.valid is None else features.valid[index],
    )


def _concatenated(parts: Sequence[Features]) -> Features:
    valid = [part.valid for part in parts if part.valid is not None]
    return parts[0]._replace(
        tokens=torch.cat([part.tokens for part in parts]),
        pooled=torch.cat([part.pooled for part in parts]),
        valid=torch.cat(valid) if valid else None,
    )
