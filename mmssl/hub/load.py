"""A run, read back from its directory or from the Hub."""

from __future__ import annotations

import json
from pathlib import Path

from mmssl.build import build_stored
from mmssl.errors import MmsslError, RunError
from mmssl.hub.bounds import no_larger_than
from mmssl.hub.pull import WEIGHTS, check_folder, download
from mmssl.run_directory import Run


def load(path: str | Path, *, trust: bool = False) -> Run:
    """Read a run back: a run directory, a folder made by `push --dry-run`, or a name on the Hub.

    Weights come from model.safetensors alone; nothing is unpickled or executed.

    Args:
        path: directory, or name on the Hub such as `user/model`, or of one state of it: `user/model@COMMIT`.
        trust: let the folder name an objective outside the library, whose code is then imported. Wherever it came
            from: a folder does not say who wrote it.

    Raises:
        RunError: for a folder that is missing, truncated or does not fit its recipe.
    """
    directory = Path(path)
    if not directory.is_dir():
        directory = download(str(path))
    check_folder(directory, trust=trust)
    where = directory / "recipe.yaml"
    try:
        with no_larger_than(directory / WEIGHTS):
            recipe, objective = build_stored(directory)
    except MmsslError:
        raise
    except Exception as error:  # Libraries raise anything where a folder is damaged.
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise RunError(f"{where}: no network can be built from it and its tokenizers: {reason}") from error
    metrics = directory / "metrics.jsonl"
    lines = metrics.read_text(encoding="utf-8").splitlines() if metrics.exists() else []
    history = [json.loads(line) for line in lines if line.endswith("}")]
    step = history[-1]["step"] if history else recipe.training.steps
    return Run(directory, recipe, objective, objective.exported, step, history)
