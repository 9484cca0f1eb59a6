"""What a run is once it has ended: its directory, and what was read from it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from mmssl.atomic import write_text
from mmssl.encoders.base import Encoder
from mmssl.encoders.text import tokenizers_of
from mmssl.errors import RunError
from mmssl.media.text import Tokenizer
from mmssl.objectives.base import Chance, Objective
from mmssl.recipe import Data, Recipe
from mmssl.schema import parse_json

if TYPE_CHECKING:
    from mmssl.audit.verdict import Verdict

PROBES = "probes.json"
AUDIT = "audit.json"
MACHINES = "machines.json"
T = TypeVar("T")
FEATURES = "features"
"""Folder in which features of probed rows are kept."""
UNFINISHED = "unfinished"
"""Folder in which fine-tuning keeps its checkpoints until its table is there."""


@dataclass(frozen=True)
class Audited:
    """What an audit said.

    Attributes:
        verdict: `leaks`, `at chance` ...
        text: every arm, and the closing sentence.
    """

    verdict: str
    text: str


@dataclass(frozen=True)
class Machine:
    """What a part of a training ran on.

    Attributes:
        device: the name of the GPU, or `CPU`.
        processes: how many there were.
        version: of this library; empty where it was not written down.
    """

    device: str
    processes: int
    version: str = ""


@dataclass
class Run:
    """A finished or loaded run.

    Attributes:
        directory: holds recipe.yaml, model.safetensors, metrics.jsonl, report.html and figures/.
        recipe: resolved.
        objective: with its heads.
        encoders: name -> encoder with the trained weights, the teacher's where the task says so.
        step: optimizer steps that made the weights.
        history: the records of metrics.jsonl.
    """

    directory: Path
    recipe: Recipe
    objective: Objective
    encoders: dict[str, Encoder]
    step: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)

    @property
    def chance(self) -> Chance:
        """The level of guessing at the recipe's batch size."""
        return self.objective.chance(self.recipe.training.batch_size)

    @property
    def verdict(self) -> list[Verdict]:
        """Learned, at chance since step s, or collapsed, with the number that decided it; one for each task."""
        from mmssl.audit.verdict import judge  # its distributions take a second to import

        return judge(self.history, self.chance, self.recipe.training.batch_size)

    def decoding(self, *modalities: str) -> Data:
        """The first source from which the task takes all of these modalities: how rows of them are decoded.

        For one modality it is as its encoder reads it, which may see a part of what the task sees.
        """
        own = (one.decoding for one in self.objective.exported.values() if (one.modality,) == modalities)
        return next(filter(None, own), None) or self.recipe.decoding(self.objective.needs, *modalities)

    @property
    def probes(self) -> list[dict[str, Any]]:
        """The tables of probes.json, in the order in which they were asked for.

        Those of weights from which the run has gone on since say so among their warnings.

        Raises:
            RunError: where it cannot be read.
        """
        return [self._dated(table) for table in self._tables()]

    def _dated(self, table: dict[str, Any]) -> dict[str, Any]:
        step = table.pop("step", self.step)
        if step == self.step:
            return table
        earlier = f"of the weights at step {step}; the run has gone on to step {self.step} since"
        return table | {"warnings": [*table.get("warnings", ()), earlier]}

    def _tables(self) -> list[dict[str, Any]]:
        path = self.directory / PROBES
        try:
            found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
            if not isinstance(found, list) or not all(isinstance(table, dict) for table in found):
                raise ValueError("expected a list of tables")
        except (OSError, ValueError, RecursionError) as error:
            raise RunError(f"{path} is damaged: {error}; remove it, and probe again") from error
        return found

    @property
    def audit(self) -> Audited | None:
        """What the last `mmssl audit` of the run said; None where there was none.

        Raises:
            RunError: where it cannot be read.
        """
        return _record(self.directory / AUDIT, Audited)

    @property
    def machines(self) -> list[Machine]:
        """Where it was trained, in order; empty where that is not known.

        Raises:
            RunError: where it cannot be read.
        """
        return machines_of(self.directory)

    def add_probe(self, table: Mapping[str, Any]) -> None:
        """Write a table of `mmssl.adapt` into probes.json, in the place of the one that answers the same question."""
        new = {**table, "step": self.step}
        tables = {_question(one): one for one in self._tables()} | {_question(new): new}
        write_text(self.directory / PROBES, json.dumps(list(tables.values()), indent=1))

    @property
    def tokenizers(self) -> dict[str, Tokenizer]:
        """Modality -> tokenizer, for those encoders that have one."""
        return tokenizers_of(self.encoders)


def _question(table: Mapping[str, Any]) -> tuple[str, ...]:
    keys = ("probe", "target", "label", "encoder", "shots", "test", "train_rows")
    return tuple(str(table.get(key)) for key in keys)


def keep_audit(directory: Path, audited: Audited) -> None:
    """Write audit.json of a run."""
    write_text(directory / AUDIT, json.dumps(asdict(audited), indent=1))


def machines_of(directory: Path) -> list[Machine]:
    """`Run.machines`, of a folder whose network is not built; arguments and errors as there."""
    return _record(directory / MACHINES, list[Machine]) or []


def keep_machine(directory: Path, machine: Machine) -> None:
    """Add to machines.json of a run, unless it is what the training was on before."""
    before = machines_of(directory)
    if before[-1:] != [machine]:
        write_text(directory / MACHINES, json.dumps([asdict(one) for one in (*before, machine)], indent=1))


def _record(path: Path, kind: type[T]) -> T | None:
    try:
        return parse_json(kind, path.read_bytes()) if path.exists() else None
    except (OSError, ValueError) as error:
        raise RunError(f"{path} is damaged: {error}; remove it") from error
