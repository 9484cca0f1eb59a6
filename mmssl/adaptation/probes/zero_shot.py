"""Classes by their names alone: the class whose prompts lie nearest to a row, in the space that the task trained.

Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision", arXiv 2103.00020, section
3.1.4: a class is the normalized mean of the normalized vectors of its prompts, one a template. Nothing is learned.
Top-1 and top-5, ties counting against the model, and the mean over the classes; beside the same networks with random
weights, the largest class and chance.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy import sparse
from torch import Tensor

from mmssl.adaptation.features import collect, evaluating
from mmssl.adaptation.pairs import Asked, Network, PairProbe, fresh_tasks, look, network_of, own_inputs, tokenizer_of
from mmssl.adaptation.ranks import Relation, Scorer, by_vectors, rank
from mmssl.adaptation.rows import Opened, labels_of, values_of
from mmssl.adaptation.scores import CHANCE, CONSTANT, PRETRAINED, RANDOM, Row, Scores, balanced_accuracy, wilson
from mmssl.batch import Batch
from mmssl.data.columns import find_classes
from mmssl.errors import DataError, RecipeError, nearest
from mmssl.objectives.base import Objective
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
        self.templates = (templates,) if isinstance(templates, str) else templates
        for template in self.templates:
            if "{}" not in template:
                raise RecipeError(f"zero_shot: the template '{template}' has no {{}} for the name of the class")
        if not self.templates:
            raise RecipeError("zero_shot: templates is empty; '{}' gives the bare names")
        self.classes, self.a, self.b = classes, a, b

    def score(self, task: Objective, asked: Asked) -> Scores:
        """The table; see the module."""
        network = network_of(task, self.a, self.b)
        if "text" not in network.modalities:
            raise RecipeError(
                f"zero_shot reads the names of classes, and neither {network.pair.a} nor {network.pair.b} reads text"
            )
        if network.pair.embed is None:
            raise RecipeError(f"zero_shot needs a space for both, and {type(task).__name__} has none; contrastive has")
        text = network.modalities.index("text") if network.modalities[1] != "text" else 1
        _, wanted = asked.open()
        values, names = self._find_classes(wanted, asked.label)
        more = {"label": asked.label, "classes": values} if wanted else {}
        rows = asked.test_rows(wanted, task, (network.modalities[1 - text],), **more)
        randoms = fresh_tasks(task, asked.seeds) if asked.baseline else []
        networks = [network, *(network_of(one, network.pair.a, network.pair.b) for one in randoms)]
        length = (wanted.spec if wanted else asked.data or Data(source="")).text.length
        weights = [class_vectors(one, text, names, self.templates, length) for one in networks]
        vectors, rest = _embed(networks, 1 - text, rows.batches)
        truth = labels_of(rows, rest)
        if int(truth.max()) >= len(names):
            raise DataError(f"{rows.where}: class number {int(truth.max())} has no name; there are {len(names)} names")
        found = [_ranks(by_vectors(v, w), truth, len(names)) for v, w in zip(vectors, weights, strict=True)]
        count = truth.bincount(minlength=len(names))
        table = [_row(PRETRAINED, found[:1], truth), *([_row(RANDOM, found[1:], truth)] if randoms else [])]
        # The classes by size, whatever the row shows.
        constant = -count.argsort(descending=True, stable=True).argsort().float().expand(len(truth), -1)
        table.append(_row(CONSTANT, [_ranks(lambda start, stop: constant[start:stop], truth, len(names))], truth))
        chance = 1 / len(names)
        exact = Row(CHANCE, "", chance, None, chance, (chance, chance), {}, (chance,), min(1.0, TOP / len(names)))
        return Scores(
            rows=(*table, exact),
            probe="zero_shot",
            label=asked.label,
            train_rows=0,
            test_rows=len(truth),
            classes=len(names),
            shots=None,
            test=rows.where,
            validation="nothing: there is nothing to choose",
            seeds=asked.seeds,
        )

    def _find_classes(self, opened: Opened | None, label: str) -> tuple[list[Any], list[str]]:
        """What the labels of the classes are, and their names, in the same order."""
        given: Sequence[str] | None = None if isinstance(self.classes, str) else self.classes
        column = None
        if isinstance(self.classes, str):
            if Path(self.classes).is_file():
                lines = Path(self.classes).read_text(encoding="utf-8").splitlines()
                given = [line.strip() for line in lines if line.strip()]
            elif opened is not None and self.classes in opened.source.columns:
                column = self.classes
            else:
                close = nearest(self.classes, opened.source.columns) if opened else ""
                raise DataError(f"zero_shot: classes = '{self.classes}' is neither a file nor a column{close}")
        if given is not None:
            _check_names(given)
        if opened is None:
            if given is None:
                raise DataError("zero_shot: batches do not name their classes; give classes, in the order of numbers")
            return list(range(len(given))), list(given)
        cells = values_of(opened, label)
        if column is not None:
            of = dict(zip(cells, values_of(opened, column), strict=True))
            for cell, name in zip(cells, values_of(opened, column), strict=True):
                if of[cell] != name:
                    raise DataError(
                        f"zero_shot: column '{column}' names the class {cell!r} both '{name}' and '{of[cell]}'"
                    )
            kinds = [kind for kind in find_classes(cells) or () if kind is not None]
            _check_names([str(of[kind]) for kind in kinds])
            return kinds, [str(of[kind]) for kind in kinds]
        classes = find_classes(cells)
        if classes is None:
            raise DataError(f"column '{label}' holds lists: zero_shot tells one class a row")
        numbers = isinstance(classes[0], int)
        if given is None and numbers:
            raise DataError(f"column '{label}' holds numbers; name them with classes: a list, a file or a column")
        names = list(given) if given is not None else [str(name) for name in classes]
        return list(range(len(names))) if numbers else list(names), names


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
    with evaluating([network.task]), torch.no_grad():
        for start in range(0, len(prompts), BATCH):
            ids, masks = zip(*(tokenizer(prompt, length) for prompt in prompts[start : start + BATCH]), strict=True)
            _, vectors = look(network, text, {"text": torch.stack(ids), "text_mask": torch.stack(masks)})
            assert vectors is not None  # zero_shot asked for the space
            parts.append(vectors)
    each = torch.cat(parts).unflatten(0, (len(names), len(templates)))
    return F.normalize(each.mean(1), dim=1)


def _embed(networks: Sequence[Network], side: int, batches: Iterable[Batch]) -> tuple[list[Tensor], Batch]:
    """Every row through each network, and the labels."""
    parts: list[list[Tensor]] = [[] for _ in networks]
    rest: list[Batch] = []
    with evaluating(network.task for network in networks), torch.no_grad():
        for batch in batches:
            own = own_inputs(batch, networks[0].modalities[side])
            for found, network in zip(parts, networks, strict=True):
                _, vectors = look(network, side, own)
                assert vectors is not None  # as above
                found.append(vectors)
            rest.append({key: value for key, value in batch.items() if key in ("label", "id")})
    return [torch.cat(found) for found in parts], collect(rest)


def _ranks(score: Scorer, truth: Tensor, classes: int) -> Tensor:
    one = np.ones(len(truth), dtype=np.float32)
    right = sparse.csr_matrix((one, (np.arange(len(truth)), truth.numpy())), shape=(len(truth), classes))
    return rank(score, Relation(right, sparse.identity(classes, dtype=np.float32, format="csr"))).rank


def _row(encoder: str, ranks: Sequence[Tensor], truth: Tensor) -> Row:
    runs = tuple((found == 1).double().mean().item() for found in ranks)
    accuracy = statistics.fmean(runs)
    return Row(
        encoder=encoder,
        layer="",
        accuracy=accuracy,
        spread=statistics.stdev(runs) if len(runs) > 1 else None,
        balanced=statistics.fmean(balanced_accuracy(found == 1, truth) for found in ranks),
        interval=wilson(accuracy, len(truth)),
        setting={},
        runs=runs,
        top5=statistics.fmean((found <= TOP).double().mean().item() for found in ranks),
    )


def _check_names(names: Sequence[str]) -> None:
    if len(names) < 2:
        raise DataError(f"zero_shot: {len(names)} names of classes, and it takes two to choose from")
    twice = next((name for name in names if list(names).count(name) > 1), None)
    if twice is not None:
        raise DataError(f"zero_shot: two classes have the name '{twice}'")
