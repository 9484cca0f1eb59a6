"""Several tasks at once over shared encoders, each with its weight and its data source.

The loss is the weighted sum; everything that a task reads, makes and logs carries its name: `turn/accuracy`. Each task
draws random numbers of its own, so that adding one leaves what the others see unchanged.

An encoder that two tasks hand the same tensor to, such as the caption of a pair, runs once (see `one_pass`). Images are
such a tensor where no task crops them by itself: `views` crops them once for all.

Tasks may take turns: in stages (`steps`), as where masked modeling comes first and contrastive pairs second, or one
source a step (`pick`), as in FLAVA. A task whose turn it is not makes no inputs and runs no network; parameters that no
task trained at a step stay as they are, untouched by momentum and weight decay. In evaluation mode all tasks take part.
What a task does along a run (a teacher's momentum, a temperature) it does along its own stage, and a teacher begins as
what its student is by then: so self-distillation may join for the last fifth of a run, as in SigLIP 2.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from mmssl.batch import Batch, prefixed, sub_batch
from mmssl.encoders.base import Encoder, one_pass
from mmssl.errors import RecipeError
from mmssl.modules.views import Crop
from mmssl.objectives import create
from mmssl.objectives._mixing import Mixing, Stage, read_stage
from mmssl.objectives.base import Chance, Objective, Pair, Panel, Shared, Step
from mmssl.ops.conflicts import COSINE, SHARE, compare
from mmssl.ops.draws import Draws
from mmssl.ranges import Count

TAKEN = (COSINE, SHARE, "probe")
VIEWS: dict[str, Any] = {}


class Combine(Objective):
    """A weighted sum of tasks.

    Args:
        encoders: shared by all tasks.
        tasks: name -> `{name: <task>, weight: 1.0, data: <source>, <hyper-parameter>: ...}`. `data` is left out where
            the recipe has one source; rows of all sources have the same global batch size. With `steps: [start, stop]`
            a task trains from the one to before the other, null for the end. With `heads: <task>` its modules that have
            the names of that task's modules are those: one codebook and one classifier for images alone and in pairs.
        pick: `all` tasks train at each step, or those of `one` source, drawn anew with equal odds; or name of source
            -> its odds. Where the recipe has one source, one task is picked.
        views: one crop of images (see `Crop`) before any task's own augmentation; none by default. Tasks that look for
            equal images then find none.
        conflicts: steps between measurements of the cosine of each two tasks' gradients on the encoders that they
            share, and of each one's share of the gradient; 0 for never. A measurement takes about as long as a step
            and holds one gradient of the encoders a task.
    """

    def __init__(
        self,
        encoders: Mapping[str, Encoder],
        *,
        tasks: dict[str, dict[str, Any]],
        pick: Literal["all", "one"] | dict[str, float] = "all",
        views: dict[str, Any] = VIEWS,
        conflicts: Count = 0,
    ) -> None:
        super().__init__(encoders)
        if conflicts and len(tasks) == 1:
            raise RecipeError("combine: conflicts are between two tasks, and there is one; set conflicts to 0")
        self.conflicts = conflicts
        if not tasks:
            raise RecipeError("combine needs at least one task, for instance tasks: {turn: {name: rotation}}")
        built: dict[str, Objective] = {}
        self.weights: dict[str, float] = {}
        self.sources: dict[str, str] = {}
        stages: dict[str, Stage] = {}
        shared = Shared(encoders)
        for name, given in tasks.items():
            hyper = dict(given)
            where = f"tasks.{name}"
            if not name.isidentifier():
                raise RecipeError(f"{where}: a task is named by letters, digits and _, its results by `{name}/loss`")
            if name in TAKEN or hasattr(nn.ModuleDict, name):
                raise RecipeError(f"{where}: '{name}' has another meaning in records or modules; choose another name")
            kind, weight, source = hyper.pop("name", None), hyper.pop("weight", 1.0), hyper.pop("data", "")
            if not isinstance(kind, str):
                raise RecipeError(f"{where}: needs a name, for instance {{name: rotation}}")
            if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf:
                raise RecipeError(f"{where}: weight = {weight!r} should be a number above 0")
            if not isinstance(source, str):
                raise RecipeError(f"{where}: data = {source!r} should be the name of a source of the recipe")
            stages[name] = read_stage(hyper.pop("steps", (0, None)), where)
            lender = hyper.pop("heads", None)
            try:
                task = create(kind, shared, **hyper)
            except (RecipeError, ValueError) as error:
                raise RecipeError(f"{where}: {error}") from error
            if lender is not None:
                if lender not in built:
                    raise RecipeError(f"{where}: heads = {lender!r} should be a task above this one")
                if stages[name][0] < stages[lender][0]:
                    raise RecipeError(f"{where}: heads: {lender} begins later, and its heads are not ready before")
                _lend(built[lender], task, where)
            built[name], self.weights[name], self.sources[name] = task, float(weight), source
        self.tasks = nn.ModuleDict(built)
        groups = self.sources if any(self.sources.values()) else {name: name for name in built}
        self.mixing = Mixing(stages, groups, pick)
        self.takes_turns = self.mixing.takes_turns
        self.local_norms = any(task.local_norms for task in built.values())
        self._active, self._step = list(built), 0
        self.crop = Crop.of(VIEWS, views)
        if self.crop != Crop() and not any("image" in task.needs for task in built.values()):
            raise RecipeError("combine: views crop images, and no task reads any")
        self.divisors = tuple(f"{name}/{key}" for name, task in built.items() for key in task.divisors)
        meets = {task.meets for task in built.values()}
        self.meets = "loss" if "loss" in meets else "transform" if "transform" in meets else "nowhere"
        self.needs = tuple(
            dict.fromkeys(
                f"{self.sources[name]}/{key}" if self.sources[name] else key
                for name, task in built.items()
                for key in task.needs
            )
        )

    def _each(self, inputs: Batch | None = None) -> list[tuple[str, Objective]]:
        """The tasks, or those that have inputs."""
        names = None if inputs is None else {key.partition("/")[0] for key in inputs}
        return [(name, cast(Objective, task)) for name, task in self.tasks.items() if names is None or name in names]

    @property
    def pairs(self) -> tuple[Pair, ...]:
        """Every task's own."""
        return tuple(pair for _, task in self._each() for pair in task.pairs)

    def drawn_together(self, inputs: Batch) -> dict[str, Tensor]:
        """Every task's own, under its name."""
        return {
            f"{name}/{key}": value
            for name, task in self._each(inputs)
            for key, value in task.drawn_together(sub_batch(inputs, name)).items()
        }

    def chance(self, rows: int) -> Chance:
        """The weighted sum, which has no level where tasks take turns; each task's own levels under its name."""
        total: float | None = None if self.takes_turns else 0.0
        metrics: dict[str, float] = {}
        filled: dict[str, int] = {}
        for name, task in self._each():
            own = task.chance(rows)
            total = None if total is None or own.loss is None else total + self.weights[name] * own.loss
            metrics |= {f"{name}/{key}": value for key, value in own.levels.items()}
            filled |= {f"{name}/{key}": steps for key, steps in own.filled.items()}
        return Chance(total, metrics, filled)

    @torch.no_grad()
    def transform(self, batch: Batch, draws: Draws) -> Batch:
        """Each task's inputs from its source, as `task/key`; in training of those whose turn it is at this step."""
        if self.crop != Crop():
            images = [need for need in self.needs if need.rpartition("/")[2] == "image"]
            cut = {key: self.crop(batch[key], draws, batch.get(f"{key}_aspect")) for key in images}
            batch = batch | cut
            for key in images:
                batch.pop(f"{key}_aspect", None)
        inputs: Batch = {}
        self._step = draws.step
        self._active = self.mixing.active(draws.seed, draws.step) if self.training else list(self.tasks)
        for name, task in self._each():
            if name not in self._active:
                continue
            rows = sub_batch(batch, self.sources[name]) if self.sources[name] else batch
            inputs |= prefixed(name, task.transform(rows, draws.named(name)))
        return inputs

    def predict(self, inputs: Batch) -> Batch:
        """Each task's outputs, as `task/key`."""
        outputs: Batch = {}
        with one_pass(self.encoder(name) for name in self.encoders):
            for name, task in self._each(inputs):
                outputs |= prefixed(name, task.predict(sub_batch(inputs, name)))
        return outputs

    def loss(self, outputs: Batch, inputs: Batch) -> dict[str, Tensor]:
        """The weighted sum, and each task's own entries as `task/key`."""
        logs: dict[str, Tensor] = {}
        terms = []
        for name, task in self._each(inputs):
            losses = task.loss(sub_batch(outputs, name), sub_batch(inputs, name))
            terms.append(self.weights[name] * losses["loss"])
            logs |= prefixed(name, losses)
        return {"loss": torch.stack(terms).sum(), **logs}

    def scored(self, inputs: Batch) -> dict[str, Tensor]:
        """See the base class: of each task, whose steps are those of all."""
        found = {name: task.scored(sub_batch(inputs, name)) for name, task in self._each(inputs)}
        return {name: own[""] for name, own in found.items() if own}

    def before_step(self, step: Step) -> None:
        """Each task's own from its first step to its last, on the rows of its source; conflicts where they are due.

        Those are of the tasks' gradients on shared encoders: cosines `conflict/<a>_<b>`, and `gradient_share/<task>`.
        """
        for name, task in self._each():
            if self.mixing.runs(name, step.number):
                task.before_step(self._narrowed(step, name))
        if self.conflicts:
            step.need_whole_weights("objective.conflicts")
            if (step.number + 1) % self.conflicts == 0:
                gradients = {name: self._gradient(step, name) for name, _ in self._each(step.inputs)}
                step.log(compare(gradients) if len(gradients) > 1 else {})

    def _narrowed(self, step: Step, name: str) -> Step:
        """The step as this task sees it."""
        source = self.sources[name]

        def data() -> Iterator[Batch]:
            return (sub_batch(batch, source) if source else batch for batch in step.data())

        return replace(
            step,
            number=step.number - self.mixing.stages[name][0],
            data=data,
            prepare=lambda: sub_batch(step.inputs, name),
            log=lambda numbers: step.log(prefixed(name, numbers)),
        )

    def _gradient(self, step: Step, name: str) -> dict[str, Tensor]:
        """Of this task's weighted loss, on the encoders."""
        found = step.gradients(cast(Objective, self.tasks[name]), sub_batch(step.inputs, name))
        return {key: self.weights[name] * value for key, value in found.items() if key.startswith("encoders.")}

    def after_step(self, progress: float) -> None:
        """Each task's own, of those that trained; `progress` is that of its stage."""
        for name, task in self._each():
            if name in self._active:
                task.after_step(self._progress(name, progress))

    def _progress(self, name: str, progress: float) -> float:
        """Of the run -> of the task's own stage, after the step that was transformed."""
        start, stop = self.mixing.stages[name]
        done = self._step + 1
        end = round(done / progress)
        if stop is not None:
            end = min(end, stop)
        return (done - start) / (end - start)

    def preview(self, inputs: Batch, outputs: Batch) -> list[Panel]:
        """Each task's columns, next to each other."""
        return [
            panel._replace(title=f"{name}: {panel.title}")
            for name, task in self._each(inputs)
            for panel in task.preview(sub_batch(inputs, name), sub_batch(outputs, name))
        ]


def _lend(lender: Objective, task: Objective, where: str) -> None:
    """Put the lender's modules in place of those of the same name."""
    names = [n for n, _ in task.named_children() if n != "encoders" and n in dict(lender.named_children())]
    if not names:
        raise RecipeError(f"{where}: heads: the two tasks have no modules of the same name")
    for name in names:
        own, other = task.get_submodule(name), lender.get_submodule(name)
        if {k: v.shape for k, v in own.state_dict().items()} != {k: v.shape for k, v in other.state_dict().items()}:
            raise RecipeError(f"{where}: heads: '{name}' has another size in the other task")
        setattr(task, name, other)
