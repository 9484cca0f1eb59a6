"""Which tasks of a combination train at a step: stages, and one source at a time."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import accumulate
from typing import Any, Literal

from mmssl.errors import RecipeError
from mmssl.ops.draws import mix_seed

Stage = tuple[int, int | None]


def read_stage(given: Any, where: str) -> Stage:
    """The steps of a task, `[start, stop]`, the last one not among them; null for the end of the run."""
    two = isinstance(given, list | tuple) and len(given) == 2
    start, stop = given if two else (None, None)
    whole = all(isinstance(n, int) and not isinstance(n, bool) for n in (start, stop) if n is not None)
    if not two or not whole or start is None or start < 0 or (stop is not None and stop <= start):
        raise RecipeError(
            f"{where}: steps = {given!r} should be the first step and the one after the last, such as [0, 1000], "
            "with null for the end of the run"
        )
    return start, stop


class Mixing:
    """Stages and groups of tasks.

    Args:
        stages: task -> first step and the one after its last.
        groups: task -> what it is picked with: its source, or itself where there is one source.
        pick: `all`, `one` group a step, or group -> how often it is picked, in proportion.

    Attributes:
        takes_turns: whether there is a step at which a task does not train.

    Raises:
        RecipeError: where at some step no task would train, or a group has no odds.
    """

    def __init__(
        self,
        stages: Mapping[str, Stage],
        groups: Mapping[str, str],
        pick: Literal["all", "one"] | Mapping[str, float],
    ) -> None:
        self.stages, self.groups, self.pick = dict(stages), dict(groups), pick
        names = list(dict.fromkeys(groups.values()))
        if isinstance(pick, str):
            self.odds = dict.fromkeys(names, 1.0)
        else:
            if sorted(pick) != sorted(names) or not all(
                isinstance(odds, int | float) and not isinstance(odds, bool) and 0 < odds < math.inf
                for odds in pick.values()
            ):
                raise RecipeError(
                    f"combine: pick = {dict(pick)} should give a number above 0 to each of {', '.join(names)}"
                )
            self.odds = {name: float(pick[name]) for name in names}
        self.takes_turns = any(stage != (0, None) for stage in stages.values()) or (pick != "all" and len(names) > 1)
        idle = 0
        for start, stop in sorted(stages.values(), key=lambda stage: stage[0]):
            if start > idle:
                break
            if stop is None:
                return
            idle = max(idle, stop)
        raise RecipeError(f"combine: no task is trained at step {idle}; steps: [{idle}, null] makes one go on")

    def runs(self, task: str, step: int) -> bool:
        """Whether `step` is among those of the task's stage."""
        start, stop = self.stages[task]
        return start <= step and (stop is None or step < stop)

    def active(self, seed: int, step: int) -> list[str]:
        """The tasks that train at `step`; a function of both arguments, and so the same on every process."""
        due = [name for name in self.stages if self.runs(name, step)]
        if self.pick == "all":
            return due
        names = list(dict.fromkeys(self.groups[name] for name in due))
        bounds = list(accumulate(self.odds[name] for name in names))
        dice = mix_seed(seed, step, "pick") / 2**63 * bounds[-1]
        picked = next((name for name, bound in zip(names, bounds, strict=True) if dice < bound), names[-1])
        return [name for name in due if self.groups[name] == picked]
