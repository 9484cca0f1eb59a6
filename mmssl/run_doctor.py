"""What of a run directory is whole, what can be resumed, and what to do about the rest."""

from __future__ import annotations

import json
import shutil
from functools import cached_property
from pathlib import Path
from typing import Any

from mmssl.build import build_objective
from mmssl.data.loader import Loader
from mmssl.encoders.text import tokenizers_of
from mmssl.errors import MmsslError, RunError
from mmssl.hub.bounds import check_finite, no_larger_than
from mmssl.hub.pull import RECORDS, check_files, check_records, read_recipe
from mmssl.media.text import Tokenizer
from mmssl.objectives.base import Objective
from mmssl.recipe import Recipe
from mmssl.report.page import read_figure
from mmssl.run_directory import machines_of
from mmssl.runs import DATA, check_data
from mmssl.schema import parse_json
from mmssl.training import checkpoint
from mmssl.training.lock import holder
from mmssl.training.optim import make_optimizer
from mmssl.version import __version__

FIGURES = ("preview.png", "history.png")


def examine_run(directory: str | Path, trust: bool = False) -> tuple[str, bool]:
    """A report in plain text, and whether everything that belongs to the run is there and whole.

    Networks are built, and weights, the optimizer's state and the data are read as a resumed run would; nothing is
    written. Each problem is one sentence with the way out.

    Args:
        directory: of the run.
        trust: see `mmssl.load`.

    Raises:
        RunError: where the folder holds no run.
    """
    folder = Path(directory)
    if not (folder / "recipe.yaml").is_file():
        raise RunError(
            f"{folder}: no run: recipe.yaml is missing; bring it back from a copy (without it --resume cannot go on), "
            "or name another folder"
        )
    found = _Folder(folder, trust)
    lines: list[str] = []
    problems: dict[str, str] = {}
    for title in ("recipe", "trained", "weights", "checkpoint", "data", "log", "records", "pictures", "disk"):
        try:
            text = getattr(found, title)()
        except MmsslError as error:
            text = "see below"
            problems[title] = str(error)
        lines.append(f"{title:<12}{text}")
    problems |= found.damaged_records()
    resumed = "not as it is, see below" if {"recipe", "checkpoint", "data"} & problems.keys() else found.resume()
    lines += [f"{'resume':<12}{resumed}", "", *(f"- {problem}" for problem in dict.fromkeys(problems.values()))]
    lines.append("something is missing or damaged" if problems else "everything is whole")
    return "\n".join(lines), not problems


class _Folder:
    """A run directory; each method is one look at it, in words, and raises MmsslError where something is wrong."""

    def __init__(self, folder: Path, trust: bool) -> None:
        self.folder, self.trust = folder, trust
        self.file = folder / checkpoint.WEIGHTS
        self.last = checkpoint.newest(folder)

    @cached_property
    def settings(self) -> Recipe:
        return read_recipe(self.folder, self.trust)

    @cached_property
    def done(self) -> int:
        return checkpoint.read_state(self.last)["step"] if self.last else 0

    @cached_property
    def objective(self) -> Objective:
        """Built of recipe and tokenizers, with random weights; no larger than the weights that are there."""
        check_files(self.folder, "run", ("recipe.yaml",))
        where, stored = self.folder / "recipe.yaml", self.folder / "tokenizers"
        try:
            tokenizers = {p.name: Tokenizer.load(p) for p in sorted(stored.iterdir())} if stored.is_dir() else {}
            with no_larger_than(self.last / checkpoint.WEIGHTS if self.last else self.file):
                return build_objective(self.settings, tokenizers, where=str(where), pretrained=False)
        except MmsslError:
            raise
        except Exception as error:  # libraries raise anything where a folder is damaged
            raise RunError(f"{where}: no network can be built from it and its tokenizers: {error}") from error

    def recipe(self) -> str:
        training = self.settings.training
        return f"{self.settings.objective['name']}, {training.steps:,} steps of {training.batch_size:,} rows"

    def trained(self) -> str:
        check_records(self.folder, ["machines.json"])
        machines = machines_of(self.folder)
        words = [
            f"{m.processes} process(es) on {m.device}" + f", mmssl {m.version}" * bool(m.version) for m in machines
        ]
        others = {machine.version for machine in machines} - {__version__, ""}
        if others:
            words.append(f"and here is {__version__}: only one version promises the same bits")
        if writer := holder(self.folder):
            words.append(f"at this moment {writer}")
        return "; ".join(words) or "not recorded"

    def weights(self) -> str:
        if not self.file.exists():
            if self.last is None:
                return "none yet: no step was saved"
            raise RunError(f"{self.file} is missing; --resume puts that of {self.last.name} in its place")
        saved = None if self.last is None else self.last / checkpoint.WEIGHTS
        own = saved is None or (saved.exists() and self.file.samefile(saved))
        way_out = checkpoint.RESTORE if own else "--resume puts that of the checkpoint in its place"
        return self._read(self.file, way_out)

    def checkpoint(self) -> str:
        if self.last is None and not self.file.exists():
            return "none yet"
        if self.last is None:
            return f"none: --set encoders.NAME.pretrained={self.folder} starts another run from the weights"
        checkpoint.check_bits(self.last)
        self._read(self.last / checkpoint.WEIGHTS, checkpoint.RESTORE)
        optimizer = make_optimizer(self.objective, self.settings.training.optimizer)
        try:
            checkpoint.load_optimizer(self.objective, optimizer, self.last)
            moments = ((key, v) for values in optimizer.state.values() for key, v in values.items())
            check_finite(moments, self.last / checkpoint.OPTIMIZER)
        except RunError as error:
            raise RunError(f"{error}; {checkpoint.RESTORE}") from error
        size = sum(path.stat().st_size for path in self.last.iterdir())
        return f"{self.last.name}, {size / 2**20:,.0f} MiB, weights and optimizer as they were written"

    def _read(self, file: Path, way_out: str) -> str:
        """Load weights; in words."""
        objective = self.objective
        try:
            checkpoint.load_weights(objective, file)
            tensors = checkpoint.tensors(objective)
            check_finite(tensors.items(), file)
        except (RunError, OSError) as error:
            raise RunError(f"{error}; {way_out}") from error
        return f"{len(tensors):,} tensors, {sum(t.numel() for t in tensors.values()):,} numbers, as the recipe has them"

    def data(self) -> str:
        known = self.folder / DATA
        if self.last is None:
            return "not compared: there is nothing to resume"
        try:
            before = parse_json(dict[str, str], known.read_bytes())
        except (OSError, ValueError) as error:
            raise RunError(f"{known} is missing or damaged ({error}); --resume writes it anew") from error
        training = self.settings.training
        loader = Loader(
            self.settings.sources(),
            self.objective.needs,
            batch_size=training.batch_size,
            seed=training.seed,
            tokenizers=tokenizers_of(self.objective.exported),
        )
        digests = loader.digests()
        check_data(self.folder, digests)
        if digests.keys() - before.keys():
            raise RunError(f"{known} does not say what all of the data were; --resume writes it anew")
        return "; ".join(text.partition(",")[0] for text in digests.values()) + ", as when the run began"

    def log(self) -> str:
        path, errors = self.folder / "metrics.jsonl", self.folder / "errors.jsonl"
        if not path.exists():
            if self.done:
                raise RunError(f"{path} is missing; bring it back from a copy, or --resume goes on without the curves")
            return "none yet"
        check_records(self.folder, ["metrics.jsonl"])
        lines = path.read_text(encoding="utf-8").splitlines()
        steps = [json.loads(line)["step"] for line in lines if line.endswith("}")]
        try:
            bad = len([parse_json(dict[str, Any], line) for line in errors.read_bytes().splitlines()])
        except FileNotFoundError:
            bad = 0
        except (OSError, ValueError) as error:
            raise RunError(f"{errors} is damaged: {error}; --resume drops such lines") from error
        if self.done and not steps:
            raise RunError(f"{path} holds no record; bring it back from a copy, or --resume goes on without the curves")
        later = f", those after step {self.done} go when it is resumed" * bool(
            steps and self.last and self.done < steps[-1]
        )
        return f"{len(steps):,} records up to step {steps[-1] if steps else 0:,}{later}" + f"; {bad:,} bad rows" * bool(
            bad
        )

    def records(self) -> str:
        return ", ".join(name for name in RECORDS if (self.folder / name).exists()) or "none"

    def damaged_records(self) -> dict[str, str]:
        """Name of a file -> what is wrong with it."""
        found = {}
        for name in RECORDS:
            try:
                check_records(self.folder, [name])
            except RunError as error:
                found[name] = str(error)
        return found

    def pictures(self) -> str:
        report, figures = self.folder / "report.html", self.folder / "figures"
        if self.done < self.settings.training.steps:
            return "drawn at the end"
        if not report.exists():
            raise RunError(f"{report} is missing; --resume writes it anew")
        if not report.read_bytes().rstrip().endswith(b"</html>"):
            raise RunError(f"{report} is damaged: it has no end; remove it, and --resume writes it anew")
        for name in FIGURES:
            read_figure(figures / name)
        return "report.html and figures"

    def disk(self) -> str:
        needed = sum(path.stat().st_size for path in self.last.iterdir()) if self.last else 0
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise RunError(
                f"{self.folder}: {free / 2**20:,.0f} MiB are free, and the next checkpoint takes "
                f"{needed / 2**20:,.0f}; free some"
            )
        return f"{free / 2**30:,.0f} GiB free" if free >= 2**30 else f"{free / 2**20:,.0f} MiB free"

    def resume(self) -> str:
        training = self.settings.training
        again = f"mmssl run {self.folder / 'recipe.yaml'} --out {self.folder} --resume"
        if self.last is None:
            return f"{again} would start at the first step" + " and overwrite the weights" * self.file.exists()
        if self.done == training.steps:
            return f"finished; {again} --set training.steps={2 * training.steps} would go on"
        processes = training.batch_size // training.accumulate
        return f"{again} goes on after step {self.done:,}, on any number of processes that divides {processes:,}"
