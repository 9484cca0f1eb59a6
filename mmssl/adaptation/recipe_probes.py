"""The probes that a recipe asks for: during training, quick enough for every few hundred steps, and at its end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mmssl import registry
from mmssl.adaptation.cache import FeatureCache
from mmssl.adaptation.features import POOLED, extract
from mmssl.adaptation.labeled import Question
from mmssl.adaptation.probes import make_probe
from mmssl.adaptation.probes.base import Learner
from mmssl.adaptation.probes.base import Probe as Asked
from mmssl.adaptation.request import Model, Pretrained, Request
from mmssl.adaptation.rows import in_order
from mmssl.adaptation.table import Table
from mmssl.errors import RecipeError, nearest
from mmssl.recipe import Data, Probe, Recipe

ROWS = 5000
"""Of a probe during training where the recipe sets no limit: they are kept decoded in memory."""


def check_probes(recipe: Recipe, where: str) -> None:
    """Raise RecipeError for an unknown probe, target, encoder or hyper-parameter, before anything is trained."""
    if len({spec.every for spec in recipe.every_probe() if spec.every}) > 1:
        raise RecipeError(f"{where}: probes: every is not the same; probes during training are asked at the same steps")
    asked: dict[str, int] = {}
    for number, spec in enumerate(recipe.every_probe()):
        key = f"{where}: probe" if recipe.probe else f"{where}: probes.{number}"
        kind = registry.find("probe", spec.probe, f"{key}.probe")
        for option in spec.options:
            if option not in registry.keywords(kind):
                known = [*type(spec).model_fields, *registry.keywords(kind)]
                raise RecipeError(f"{key}: unknown key '{option}'{nearest(option, known)}")
        make_probe(spec.probe, spec.options, key)
        same = {"every", "layers", "groups", *spec.options}
        first = asked.setdefault(spec.model_dump_json(exclude=same), number)
        if first != number:
            raise RecipeError(
                f"{where}: probes.{number} asks what probes.{first} does, {spec.probe} of '{_column(spec)}', and a "
                "report keeps one; join them, for instance as k: [20, 5]"
            )
        if spec.target is not None:
            registry.find("target", spec.target, f"{key}.target")
        if spec.encoder is not None and spec.encoder not in recipe.encoders:
            raise RecipeError(
                f"{key}.encoder: there is no encoder '{spec.encoder}'{nearest(spec.encoder, recipe.encoders)}"
            )
        if spec.every and not (issubclass(kind, Learner) and kind.frozen and not kind.trains):
            raise RecipeError(f"{key}.every: {spec.probe} is not asked during training; knn, ridge and logistic are")


def check_rows(run: Pretrained, specs: Sequence[Probe]) -> None:
    """Raise DataError or RecipeError for labels that are not there or do not fit, before anything is trained.

    A stream would have to be read to its end; it is not.
    """
    for spec in specs:
        model = Model.of(run, spec.encoder)
        if not run.decoding(model.encoder.modality).streaming:
            make_probe(spec.probe, spec.options).check(model, _request(spec, 0, FeatureCache()))


def probe_at_end(run: Pretrained, spec: Probe, *, seed: int, cache: FeatureCache) -> Table:
    """The table of one probe of a recipe.

    Args:
        run: that has been trained.
        spec: of its recipe.
        seed: the first one.
        cache: where features are kept.
    """
    return make_probe(spec.probe, spec.options).score(Model.of(run, spec.encoder), _request(spec, seed, cache))


def _column(spec: Probe) -> str:
    kind: type[Asked] = registry.find("probe", spec.probe)
    return kind.column if spec.label is None else spec.label


def _request(spec: Probe, seed: int, cache: FeatureCache) -> Request:
    return Request(
        train=spec.data,
        label=_column(spec),
        target=spec.target,
        layers=spec.layers,
        seeds=tuple(range(seed, seed + 3)),
        shots=spec.shots,
        groups=spec.groups,
        limit=spec.limit,
        cache=cache,
    )


def probes_during(run: Pretrained, specs: Sequence[Probe]) -> tuple[Callable[[], dict[str, float]], int] | None:
    """What the loop calls while training goes on, and every how many steps; None where no probe asks for it.

    Several probes are called together, and their numbers carry their names.
    """
    asked = [spec for spec in specs if spec.every]
    if not asked:
        return None
    probes = {}
    for spec in asked:
        model = Model.of(run, spec.encoder)
        name = f"{spec.probe} {_column(spec)}" if len(asked) > 1 else ""
        probes[name] = ProbeDuring(spec, model, run.decoding(model.encoder.modality))

    def scores() -> dict[str, float]:
        return {
            f"{name}/{key}" if name else key: value for name, probe in probes.items() for key, value in probe().items()
        }

    return scores, asked[0].every


class ProbeDuring:
    """A function of no argument: scores of the encoder as it is now.

    It learns from four fifths of the *training* split and scores the fifth that was held out; test rows stay unseen, so
    that no checkpoint is chosen by them. Rows are decoded once, when this is built.

    Args:
        spec: of the recipe; its probe learns from frozen features.
        model: in training; its mode and statistics are left as they are.
        data: how rows are decoded, and where they are unless `spec` says it.
        seed: of both splits, which are the same at every call.
    """

    def __init__(self, spec: Probe, model: Model, data: Data, *, seed: int = 0) -> None:
        self.spec, self.encoder, self.seed = spec, model.encoder, seed
        request = Request(
            train=data if spec.data is None else spec.data,
            label=_column(spec),
            target=spec.target,
            seeds=(seed,),
            shots=spec.shots,
            groups=spec.groups,
            data=data,
            limit=spec.limit or ROWS,
        )
        question = Question.of(model, request, hold_out=True)
        self.target = question.target
        rows = torch.cat([question.train.ids, question.test.ids]).unique()
        self.batches = list(question.train.split.read(in_order(rows.numpy(), request.batch_size)))
        read = torch.cat([batch["id"] for batch in self.batches])
        self.train, self.test = (side[torch.isin(side.ids, read)] for side in (question.train, question.test))
        self.places = [torch.searchsorted(read, side.ids) for side in (self.train, self.test)]

    def __call__(self) -> dict[str, float]:
        """The target's metrics, and that of the constant answer as `<first metric>_constant`."""
        (views,), _ = extract([self.encoder], self.batches)
        x, y = (views[POOLED][places] for places in self.places)
        probe: Any = make_probe(self.spec.probe, self.spec.options)
        setting, _ = probe.choose(self.target, x, self.train.labels, self.seed, self.train.groups)
        answers: Tensor
        (answers,) = probe.predict(self.target, x, self.train.labels, y, [setting], self.seed)
        constant = self.target.constant(self.train.labels).expand(len(self.test), -1)
        main = self.target.metrics[0].name
        level = self.target.score(constant, self.test.labels)[main]
        return self.target.score(answers, self.test.labels) | {f"{main}_constant": level}
