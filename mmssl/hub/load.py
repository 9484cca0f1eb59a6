"""A run, read back from its directory or from the Hub."""

from __future__ import annotations

import json
from pathlib import Path

from mmssl import recipe as recipes
from mmssl.build import build_objective
from mmssl.errors import MmsslError, RunError
from mmssl.hub.bounds import no_larger_than
from mmssl.hub.pull import check_folder, download
from mmssl.media.text import Tokenizer
from mmssl.run_directory import Run
from mmssl.training import checkpoint


def load(path: str | Path, *, trust: bool = False) -> Run:
    """Read a run back: a run directory, a folder made by `push --dry-run`, or a name on the Hub.

    Weights come from model.safetensors alone; nothing is unpickled or executed.

    Args:
        path: directory, or Hub id such as `user/model`.
        trust: let the folder name an objective outside the library, whose code is then imported. Wherever it came
            from: a folder does not say who wrote it.

    Raises:
        RunError: for a folder that is missing, truncated or does not fit its recipe.
    """
    directory = Path(path)
    if not directory.is_dir():
        directory = download(str(path))
    check_folder(directory, trust=trust)
    recipe = recipes.load(directory / "recipe.yaml")
    stored = directory / "tokenizers"
    where = directory / "recipe.yaml"
    try:
        tokenizers = {p.name: Tokenizer.load(p) for p in sorted(stored.iterdir())} if stored.is_dir() else {}
        with no_larger_than(directory / checkpoint.WEIGHTS):
            objective = build_objective(recipe, tokenizers, where=str(where), pretrained=False)
    except MmsslError:
        raise
    except Exception as error:  # Libraries raise anything where a folder is damaged.
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise RunError(f"{where}: no network can be built from it and its tokenizers: {reason}") from error
    checkpoint.load_weights(objective, directory / checkpoint.WEIGHTS)
    objective.eval()
    metrics = directory / "metrics.jsonl"
    lines = metrics.read_text(encoding="utf-8").splitlines() if metrics.exists() else []
    history = [json.loads(line) for line in lines if line.endswith("}")]
    step = history[-1]["step"] if history else recipe.training.steps
    return Run(directory, recipe, objective, objective.exported, step, history)
