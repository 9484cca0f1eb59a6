"""Classes by their names alone: the class whose prompts lie nearest to a row, in the space that the task trained.

Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision", arXiv 2103.00020, section
3.1.4: a class is the normalized mean of the normalized vectors of its prompts, one a template. Nothing is learned.
Top-1 and top-5, ties counting against the model, and the mean over the classes; compared with the same networks with
random weights, the largest class and chance.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy import sparse
from torch import Tensor

from mmssl.adaptation.metrics import ACCURACY, BALANCED_ACCURACY, TOP5_ACCURACY, balanced_accuracy
from mmssl.adaptation.pairs import (
    Network,
    PairProbe,
    encode_side,
    network_of,
    own_inputs,
    reinitialized_tasks,
    tokenizer_of,
)
from mmssl.adaptation.ranks import Relation, Scorer, by_vectors, rank
from mmssl.adaptation.request import Model, Request
from mmssl.adaptation.rows import BatchSplit, SourceSplit, Split, in_order
from mmssl.adaptation.table import CHANCE, CONSTANT, PRETRAINED, RANDOM, Row, Table
from mmssl.adaptation.targets.classes import Classes
from mmssl.batch import Batch
from mmssl.errors import DataError, RecipeError, counted, nearest
from mmssl.modules.mode import evaluating
from mmssl.recipe import Data

TOP = 5
BATCH = 256


class ZeroShot(PairProbe):
    """Names in, classes out.

    Args:
        classes: names of the classes in the order of their numbers, or a file with one name a line, or a column that
            names the class of each row; the values of the label's column where left out.
        templates: of the prompts, in which {} stands for the name.
        a: name of one encoder; that of the first pair that the task compares where left out. One of both reads text.
        b: name of the other.
    """

    def __init__(
        self,
        *,
        classes: tuple[str, ...] | str | None = None,
        templates: tuple[str, ...] | str = ("a photo of a {}.",),
        a: str | None = None,
        b: str | None = None,
    ) -> None:
        super().__init__(a, b)
        self.templates = (templates,) if isinstance(templates, str) else templates
        for template in self.templates:
            if "{}" not in template:
                raise RecipeError(f"zero_shot: the template '{template}' has no {{}} for the name of the class")
        if not self.templates:
            raise RecipeError("zero_shot: templates is empty; '{}' gives the bare names")
        self.classes = classes

    def compare(self, network: Network, model: Model, request: Request) -> Table:
        """The table; see the module."""
        if "text" not in network.modalities:
            raise RecipeError(
                f"zero_shot reads the names of classes, and neither {network.pair.a} nor {network.pair.b} reads text"
            )
        if network.pair.embed is None:
            raise RecipeError(
                f"zero_shot needs a space for both, and {type(network.task).__name__} has none; contrastive has"
            )
        text = network.modalities.index("text") if network.modalities[1] != "text" else 1
        _, test = request.open(model, (network.modalities[1 - text],), learns=False)
        assert test is not None  # without test rows the others are
        cells = test.cells(request.label)
        target, names = self._find_classes(test, request.label, cells)
        rows = np.array([row for row in test.present(len(cells)) if cells[row] is not None], dtype=np.int64)
        randoms = reinitialized_tasks(network.task, request.seeds) if request.baseline else []
        networks = [network, *(network_of(one, *network.names) for one in randoms)]
        length = (test.spec if isinstance(test, SourceSplit) else request.data or Data(source="")).text.length
        weights = [class_vectors(one, text, names, self.templates, length) for one in networks]
        vectors, read = _encode(networks, 1 - text, test.read(in_order(rows, request.batch_size)))
        labels = target.encode([cells[row] for row in read.tolist()])
        found = [_ranks(by_vectors(v, w), labels, len(names)) for v, w in zip(vectors, weights, strict=True)]
        count = labels.bincount(minlength=len(names))
        table = [_row(PRETRAINED, found[:1], labels), *([_row(RANDOM, found[1:], labels)] if randoms else [])]
        # The classes by size, whatever the row shows.
        constant = -count.argsort(descending=True, stable=True).argsort().float().expand(len(labels), -1)
        table.append(_row(CONSTANT, [_ranks(lambda start, stop: constant[start:stop], labels, len(names))], labels))
        chance = 1 / len(names)
        guess = {ACCURACY.name: chance, BALANCED_ACCURACY.name: chance, TOP5_ACCURACY.name: min(1.0, TOP / len(names))}
        missing = len(cells) - sum(cell is not None for cell in cells)
        return Table(
            rows=(*table, Row(CHANCE, "", guess)),
            metrics=(ACCURACY, BALANCED_ACCURACY, TOP5_ACCURACY),
            probe=self.name,
            target=target.name,
            label=request.label,
            encoder=" and ".join(network.names),
            train_rows=0,
            test_rows=len(labels),
            counts={"classes": len(names)},
            shots=None,
            test=test.where,
            validation="",
            seeds=request.seeds,
            warnings=(f"{counted(missing, 'row')} without '{request.label}' left out",) if missing else (),
        )

    def _find_classes(self, test: Split, label: str, cells: Sequence[Any]) -> tuple[Classes, list[str]]:
        """What the labels of the classes are, and their names, in the same order."""
        given: Sequence[str] | None = None if isinstance(self.classes, str) else self.classes
        column = None
        source = test.source if isinstance(test, SourceSplit) else None
        if isinstance(self.classes, str):
            if Path(self.classes).is_file():
                lines = Path(self.classes).read_text(encoding="utf-8").splitlines()
                given = [line.strip() for line in lines if line.strip()]
            elif source is not None and self.classes in source.columns:
                column = self.classes
            else:
                close = nearest(self.classes, source.columns) if source else ""
                raise DataError(f"zero_shot: classes = '{self.classes}' is neither a file nor a column{close}")
        if given is not None:
            _check_names(given)
        if isinstance(test, BatchSplit):
            if given is None:
                raise DataError("zero_shot: batches do not name their classes; give classes, in the order of numbers")
            largest = max((cell for cell in cells if isinstance(cell, int)), default=-1)
            if largest >= len(given):
                raise DataError(f"{test.where}: class number {largest} has no name; there are {len(given)} names")
            return Classes(range(len(given))), list(given)
        known = [cell for cell in cells if cell is not None]
        if any(isinstance(cell, list | float) for cell in known):
            raise DataError(f"column '{label}' holds lists or real numbers: zero_shot tells one class a row")
        classes = Classes.of(known)
        if column is not None:
            named: dict[Any, str] = {}
            for cell, name in zip(cells, test.cells(column), strict=True):
                if cell is not None and name is not None and named.setdefault(cell, name) != name:
                    raise DataError(
                        f"zero_shot: column '{column}' names the class {cell!r} both '{named[cell]}' and '{name}'"
                    )
            unnamed = next((kind for kind in classes.names if kind not in named), None)
            if unnamed is not None:
                raise DataError(f"zero_shot: column '{column}' has no name for the class {unnamed!r}")
            names = [str(named[kind]) for kind in classes.names]
            _check_names(names)
            return classes, names
        numbers = isinstance(classes.names[0], int)
        if given is None and numbers and source is not None:
            given = source.class_names(label)
        if given is None and numbers:
            raise DataError(f"column '{label}' holds numbers; name them with classes: a list, a file or a column")
        names = list(given) if given is not None else [str(name) for name in classes.names]
        target = Classes(range(len(names)) if numbers else names)
        for name in classes.names:
            if name not in target.names:
                known_names = ", ".join(map(str, target.names[:20]))
                raise DataError(f"label {name!r} in column '{label}' is none of the classes: {known_names}")
        return target, names


def class_vectors(network: Network, text: int, names: Sequence[str], templates: Sequence[str], length: int) -> Tensor:
    """Unit vectors of the classes, float32 (C, W): the mean over the templates of unit vectors, normalized.

    Args:
        network: with a space for both sides.
        text: which side reads the prompts, 0 or 1.
        names: of the classes.
        templates: in which {} stands for the name.
        length: number of token ids of a prompt.
    """
    tokenizer = tokenizer_of(network.encoders[text])
    prompts = [template.replace("{}", name) for name in names for template in templates]
    parts = []
    with evaluating(network.task), torch.no_grad():
        for start in range(0, len(prompts), BATCH):
            ids, valid = zip(*(tokenizer(prompt, length) for prompt in prompts[start : start + BATCH]), strict=True)
            _, vectors = encode_side(network, text, {"text": torch.stack(ids), "text_mask": torch.stack(valid)})
            assert vectors is not None  # zero_shot asked for the space
            parts.append(vectors)
    each = torch.cat(parts).unflatten(0, (len(names), len(templates)))
    return F.normalize(each.mean(1), dim=1)


def _encode(networks: Sequence[Network], side: int, batches: Iterable[Batch]) -> tuple[list[Tensor], Tensor]:
    """Every row through each network, and the numbers of the rows."""
    parts: list[list[Tensor]] = [[] for _ in networks]
    ids: list[Tensor] = []
    with evaluating(*(network.task for network in networks)), torch.no_grad():
        for batch in batches:
            own = own_inputs(batch, networks[0].modalities[side])
            for found, network in zip(parts, networks, strict=True):
                _, vectors = encode_side(network, side, own)
                assert vectors is not None  # as above
                found.append(vectors)
            ids.append(batch["id"])
    if not ids:
        raise DataError("there are no rows that can be decoded")
    return [torch.cat(found) for found in parts], torch.cat(ids)


def _ranks(score: Scorer, labels: Tensor, classes: int) -> Tensor:
    one = np.ones(len(labels), dtype=np.float32)
    right = sparse.csr_matrix((one, (np.arange(len(labels)), labels.numpy())), shape=(len(labels), classes))
    return rank(score, Relation(right, sparse.identity(classes, dtype=np.float32, format="csr"))).rank


def _row(encoder: str, ranks: Sequence[Tensor], labels: Tensor) -> Row:
    scores = [
        {
            ACCURACY.name: (found == 1).double().mean().item(),
            BALANCED_ACCURACY.name: balanced_accuracy(found == 1, labels),
            TOP5_ACCURACY.name: (found <= TOP).double().mean().item(),
        }
        for found in ranks
    ]
    return Row.of_seeds(encoder, "", scores, shares=(ACCURACY.name, TOP5_ACCURACY.name), trials=len(labels))


def _check_names(names: Sequence[str]) -> None:
    if len(names) < 2:
        raise DataError(f"zero_shot: {len(names)} names of classes, and it takes two to choose from")
    twice = next((name for name in names if list(names).count(name) > 1), None)
    if twice is not None:
        raise DataError(f"zero_shot: two classes have the name '{twice}'")
