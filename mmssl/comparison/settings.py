"""A comparison in a file: the arguments of `mmssl.compare` as YAML, in which tasks are recipes with changes."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_type_hints

from pydantic import create_model

from mmssl.comparison.tasks import Task
from mmssl.recipe import Data
from mmssl.schema import Section, fill, read_yaml

FILES = (".yaml", ".yml")
SHAPE = "a comparison is a mapping with keys such as data, label, tasks and budget"


def is_settings(given: object) -> bool:
    """Whether this names a file that `read_settings` reads; no rows and no run have such a name."""
    return isinstance(given, str | Path) and Path(given).suffix in FILES


def read_settings(path: str | Path, call: Callable[..., Any]) -> dict[str, Any]:
    """The arguments that a file holds, and no others.

    Args:
        path: YAML; `data` may be a section, as of a recipe, and each of `tasks` a name, a path or a section (`Task`).
            Recipes are looked for where the call is made, and then next to the file.
        call: whose parameters its keys are.

    Raises:
        RecipeError: one sentence with the file, the key, what was expected and the nearest valid name.
    """
    tree, where = read_yaml(Path(path), SHAPE), str(path)
    if isinstance(tree.get("data"), dict):
        tree["data"] = fill(Data, tree["data"], f"{where}: data")
    if isinstance(tree.get("tasks"), list):
        tree["tasks"] = [_task(one, Path(path), number) for number, one in enumerate(tree["tasks"])]
    kinds, parameters = get_type_hints(call), inspect.signature(call).parameters
    fields: dict[str, Any] = {name: (kinds[name], parameter.default) for name, parameter in parameters.items()}
    known = fill(create_model("Settings", __base__=Section, **fields), tree, where)
    return {key: getattr(known, key) for key in parameters if key in tree}


def _task(given: Any, path: Path, number: int) -> Any:
    """A section where it is written as one, or as a name; what is neither is refused with the other keys."""
    if not isinstance(given, str | dict):
        return given
    task = fill(Task, {"recipe": given} if isinstance(given, str) else given, f"{path}: tasks.{number}")
    beside = path.parent / task.recipe
    if not Path(task.recipe).is_file() and beside.is_file():
        task = task.model_copy(update={"recipe": str(beside)})
    return task
