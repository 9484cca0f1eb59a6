"""One cell: a line of the table with one seed, trained where it has to be, and then asked."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmssl import recipe as recipes
from mmssl.adaptation.cache import FeatureCache
from mmssl.adaptation.labeled import Question
from mmssl.adaptation.probes import make_probe
from mmssl.adaptation.probes.base import Answers, Learner
from mmssl.adaptation.probes.finetune import Finetune
from mmssl.adaptation.request import Model, Request
from mmssl.adaptation.table import CONSTANT, PRETRAINED, Table
from mmssl.adaptation.targets.base import HELD_OUT
from mmssl.adaptation.targets.classes import Classes
from mmssl.audit.own_files import audit_recipe, line_of
from mmssl.build import build
from mmssl.comparison.monitors import Answered, look
from mmssl.comparison.plan import NAMED, RATE, RAW, SUPERVISED, UNTRAINED, Plan
from mmssl.comparison.raw import RawInput
from mmssl.encoders import create, reinitialized
from mmssl.encoders.base import Encoder
from mmssl.errors import RecipeError, counted
from mmssl.hub.load import load
from mmssl.run_directory import Run
from mmssl.runs import run as train
from mmssl.shots import shots_in_words
from mmssl.training.progress import peak_memory

KNN = "knn"
FINETUNE_STEPS = 100


@dataclass(frozen=True)
class Cell:
    """A line and a seed; with a factor of the learning rate, a quarter of the budget to choose it by; or an audit.

    Attributes:
        line: of the table.
        seed: of weights, order and every draw.
        rate: factor; None for the whole budget.
        audit: whether the task is asked where there is nothing to see, in place of training it.
    """

    line: str
    seed: int
    rate: float | None = None
    audit: bool = False

    @property
    def name(self) -> str:
        """Of its folder."""
        line = self.line.replace(" ", "_")
        if self.audit:
            return f"{line}-audit"
        return f"{line}-{self.seed}" if self.rate is None else f"{line}-rate-x{self.rate:g}"

    @property
    def whole(self) -> bool:
        """Whether it is one of a line's seeds."""
        return self.rate is None and not self.audit


def measure(
    plan: Plan, cell: Cell, factor: float, out: Path, say: Callable[[str], None] = lambda text: None
) -> tuple[dict[str, Any], Answered]:
    """Train and ask.

    Args:
        plan: of the comparison.
        cell: what is asked for.
        factor: of the recipe's learning rate.
        out: the comparison's folder, where runs are kept.
        say: is called with a line for each part of an audit, which takes minutes.

    Returns:
        What JSON can hold: `scores` (measure -> depth -> metric of the test rows), `validation` (likewise, of held-out
        training rows), `cost`, `monitors`, `verdict`; and the right answers.

    Raises:
        RunError: where training diverged.
    """
    began = time.perf_counter()
    if cell.audit:
        return _audited(plan, cell.line, say), {}
    encoder, found = _encoder(plan, cell, factor, out)
    if torch.accelerator.is_available():
        encoder.to(torch.accelerator.current_accelerator())
    answered: Answered = {}
    with tempfile.TemporaryDirectory() as folder:
        cache = FeatureCache(Path(folder))
        if cell.rate is not None:
            table = _ask(plan, encoder, cell, KNN, None, cache, {}, KNN)
            best = max(row.metrics[table.main.name] for row in table.rows if row.encoder == PRETRAINED)
            return {"validation": best, **found}, {}
        if plan.label is not None:
            asked: list[tuple[str, str, int | str | None]] = [(KNN, KNN, None)]
            asked += [(f"{plan.probe}, {shots_in_words(k)}", plan.probe, k) for k in plan.shots]
            asked += [] if plan.shots else [(plan.probe, plan.probe, None)]
            found |= {"scores": {}, "validation": {}, "constant": {}, "settings": {}, "drawn": {}}
            for title, probe, shots in asked:
                table = _ask(plan, encoder, cell, probe, shots, cache, answered, title)
                _keep(found, title, table)
            if plan.finetune and cell.line != RAW:
                shots = plan.shots[0] if plan.shots else 10
                title = f"fine-tuned, {shots_in_words(shots)}"
                _keep(found, title, _ask(plan, encoder, cell, "finetune", shots, cache, answered, title))
        question = Question.of(Model.of(encoder), request_of(plan, cell)) if plan.label is not None else None
        first = cell.seed == (0 if cell.line in plan.runs else plan.seeds[0])
        found["monitors"] = look(plan, encoder, answered, question=question, cache=cache, first=first)
    found["minutes"] = (time.perf_counter() - began) / 60
    return found, answered


def _keep(found: dict[str, Any], title: str, table: Table) -> None:
    main = table.main
    rows = [row for row in table.rows if row.encoder == PRETRAINED]
    found["scores"][title] = {row.part: row.metrics[main.name] for row in rows}
    found["validation"][title] = {row.part: row.validation for row in rows}
    found["settings"][title] = {row.part: row.setting for row in rows}
    found["constant"][title] = table.row(CONSTANT).metrics[main.name]
    found["metric"] = {"name": main.name, "title": main.title, "percent": main.percent}
    found["drawn"][title] = list(table.drawn)
    found["rows"] = {**found.get("rows", {}), title: [table.train_rows, table.test_rows]}
    found["test"] = table.test
    found["warnings"] = sorted({*found.get("warnings", []), *table.warnings})


def _ask(
    plan: Plan,
    encoder: Encoder,
    cell: Cell,
    probe: str,
    shots: int | str | None,
    cache: FeatureCache,
    answered: Answered,
    title: str,
) -> Table:
    def listen(given: Answers) -> None:
        if isinstance(given.target, Classes):
            answered[f"{title}|{given.depth}"] = given.answers.argmax(1).to(torch.int32).numpy()
            answered["truth"] = given.test.labels.to(torch.int32).numpy()
            answered["names"] = np.array([str(name) for name in given.target.names])
        if given.test.groups is not None:
            answered["group"] = given.test.groups.numpy()

    frozen = probe != "finetune"
    options: dict[str, Any] = {} if frozen else {"lr": (1e-3,), "decay": (1.0,), "steps": FINETUNE_STEPS}
    request = request_of(
        plan,
        cell,
        shots=shots,
        layers=frozen and cell.line != RAW,
        cache=cache,
        listen=listen,
        hold_out=cell.rate is not None,
    )
    return make_probe(probe, options).score(Model.of(encoder), request)


def check_labels(plan: Plan) -> Plan:
    """Read the labels before anything is trained; the plan, asked from the fewest labels to the most.

    Raises:
        DataError: for a column that is not there, or labels that do not fit.
        RecipeError: where a probe cannot learn them.
    """
    if plan.label is None:
        return plan
    model, request = Model.of(untrained_encoder(plan, plan.seeds[0])), request_of(plan, Cell(UNTRAINED, plan.seeds[0]))
    for probe in dict.fromkeys((KNN, plan.probe)):
        make_probe(probe, {}).check(model, request)
    question, learner = Question.of(model, request), make_probe(plan.probe, {})
    rows: dict[int | str, int] = {}
    for k in plan.shots:
        some = question.train[question.target.draw_shots(question.train.labels, k, plan.seeds[0])]
        held = question.target.hold_out(some.labels, HELD_OUT, plan.seeds[0], some.groups)
        if isinstance(learner, Learner) and learner.chooses and not held.any():
            raise RecipeError(
                f"shots = {k}: of {counted(len(some), 'row')} no class has two, and {plan.probe} chooses its settings "
                "on rows that it does not learn from; take more"
            )
        rows[k] = len(some)
    return replace(plan, shots=tuple(sorted(rows, key=lambda k: (rows[k], float(str(k).rstrip("%"))))))


def request_of(plan: Plan, cell: Cell, **others: Any) -> Request:
    """What probes are asked for a cell."""
    assert plan.label is not None  # without labels nothing is asked
    return Request(
        train=plan.rows,
        test=plan.test,
        label=plan.label,
        target=plan.target,
        baseline=False,
        seeds=(cell.seed,),
        groups=plan.groups,
        data=plan.rows,
        limit=plan.limit,
        split_seed=plan.seeds[0],  # all lines and seeds are tested on the same rows
        **others,
    )


def _encoder(plan: Plan, cell: Cell, factor: float, out: Path) -> tuple[Encoder, dict[str, Any]]:
    """The encoder of a line, and what training it gave to say."""
    if cell.line in plan.tasks:
        run = _train(plan, cell, factor, out)
        return _of_run(run, plan), _told(run, plan, cell)
    if cell.line in plan.runs:
        run = load(plan.runs[cell.line][cell.seed])
        return _of_run(run, plan), _told(run, plan, cell)
    if cell.line == NAMED:
        assert plan.pretrained is not None  # else there is no such line
        return create(**{"modality": plan.modality, "pretrained": True, **plan.pretrained}).eval(), {}
    untrained = untrained_encoder(plan, cell.seed)
    if cell.line == UNTRAINED:
        return untrained, {}
    if cell.line == RAW:
        rate = plan.rows.audio.rate
        return RawInput(plan.modality, rate=rate, tokenizer=getattr(untrained, "tokenizer", None)).eval(), {}
    assert cell.line == SUPERVISED, cell.line
    began = time.perf_counter()
    encoder = _supervised(plan, untrained, cell, factor)
    samples = plan.batch * _steps(plan.steps, cell)
    cost = {"seconds": time.perf_counter() - began, "samples": samples, "memory_gib": peak_memory()}
    return encoder, {"cost": cost, "lr": RATE * factor}


def _audited(plan: Plan, line: str, say: Callable[[str], None]) -> dict[str, Any]:
    """What the audit of a task, or of the first run of a line, has to say."""
    recipe = recipes.load(plan.tasks[line]) if line in plan.tasks else load(plan.runs[line][0]).recipe
    title = line.replace("_", " ")
    say(f"  audit of {title} begins")
    found = audit_recipe(recipe, report=lambda finding: say(f"  audit of {title}: {line_of(finding)}"))
    return {"audit": {"verdict": found.verdict, "sentence": found.sentence, "text": str(found)}}


def _steps(whole: int, cell: Cell) -> int:
    return whole if cell.rate is None else max(1, whole // 4)


def _train(plan: Plan, cell: Cell, factor: float, out: Path) -> Run:
    tree = plan.tasks[cell.line]
    training = dict(tree["training"])
    steps = _steps(training["steps"], cell)
    optimizer = dict(training.get("optimizer", {}))
    optimizer["lr"] = optimizer.get("lr", RATE) * factor
    training |= {"steps": steps, "seed": cell.seed, "optimizer": optimizer, "schedule": {"warmup": steps // 20}}
    return train(tree | {"training": training}, out=out / "runs" / cell.name, resume=True, quiet=True)


def _of_run(run: Run, plan: Plan) -> Encoder:
    return next(encoder for encoder in run.encoders.values() if encoder.modality == plan.modality).eval()


def _told(run: Run, plan: Plan, cell: Cell) -> dict[str, Any]:
    """What the run's records say."""
    training = run.recipe.training
    speeds = [record["samples_per_second"] for record in run.history if record.get("samples_per_second")]
    memory = [record["peak_memory_gib"] for record in run.history if record.get("peak_memory_gib")]
    cost = {
        "seconds": training.steps * training.batch_size / float(np.median(speeds)) if speeds else 0.0,
        **({"memory_gib": max(memory)} if memory else {}),
    }
    if cell.line in plan.samples:  # of a run that was there it may not be known how often the encoder sees a row
        cost["samples"] = plan.samples[cell.line] * training.batch_size * training.steps
    keep = ("step", "loss", *run.chance.metrics)
    curve = [{key: record[key] for key in record if key in keep or key.endswith("/loss")} for record in run.history]
    return {
        "cost": cost,
        "lr": training.optimizer.lr,
        "verdict": [asdict(verdict) for verdict in run.verdict],
        "chance": run.chance.levels,
        "curve": curve,
        "run": str(run.directory),
    }


def untrained_encoder(plan: Plan, seed: int) -> Encoder:
    """The network as a task of this seed finds it."""
    if not plan.tasks:
        return reinitialized(_of_run(load(plan.like or next(iter(plan.runs.values()))[0]), plan), seed)
    tree = next(iter(plan.tasks.values()))
    recipe = recipes.load(tree | {"training": tree["training"] | {"seed": seed, "workers": 0}})
    objective, _ = build(recipe)
    encoders = [objective.encoder(name) for name in objective.encoders]
    return next(encoder for encoder in encoders if encoder.modality == plan.modality).eval()


def _supervised(plan: Plan, encoder: Encoder, cell: Cell, factor: float) -> Encoder:
    """The network trained on the labels of the rows that probes learn from, with as many steps as a task."""
    finetune = Finetune(steps=_steps(plan.steps, cell), batch_rows=plan.batch)
    request = request_of(plan, cell, hold_out=cell.rate is not None)
    target, rows, labels = finetune.training_rows(Model.of(encoder), request)
    trained = finetune.train(target, rows, labels, {"lr": RATE * factor, "decay": 1.0}, cell.seed)
    return trained.encoder(encoder.modality).eval()
