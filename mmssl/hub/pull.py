"""From the Hub to a local folder, and what is checked of a folder before anything in it is built.

A folder that someone else wrote is data. Read are a recipe (plain YAML), weights (safetensors) and tokenizers (JSON);
nothing is unpickled, imported or fetched because the folder says so.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from mmssl import recipe as recipes
from mmssl.adaptation.table import Table
from mmssl.encoders.backbones.base import library_of
from mmssl.errors import RunError
from mmssl.hub.bounds import check_numbers
from mmssl.recipe import Recipe
from mmssl.registry import components
from mmssl.run_directory import AUDIT, MACHINES, Audited, Machine
from mmssl.schema import parse_json

WEIGHTS = "model.safetensors"
RECORDS = ("metrics.jsonl", "probes.json", AUDIT, MACHINES)
TOKENIZER_FILES = {
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "open_clip_tokenizer.json",
}
LARGEST_RECIPE = 1 << 20
LARGEST_TOKENIZER = 1 << 27
LARGEST_RECORD = 1 << 28
MOST_FILES = 10_000
DEEPEST = 20
KINDS = {"recipe.yaml": "run", "classifier.json": "classifier"}
WRITERS = {
    "run": "name a folder that mmssl run wrote (mmssl doctor FOLDER says what is left of one)",
    "classifier": "mmssl adapt RUN --probe finetune --save FOLDER writes a whole one",
}
WAY_OUT = "load it with trust=True if you trust its author"


def download(name: str, token: str | None = None, needed: str = "recipe.yaml") -> Path:
    """Fetch a published run or classifier into the Hub cache: what loading reads, and the pictures; nothing else.

    Args:
        name: `user/name`, or `user/name@revision` with a branch, a tag or a commit: a commit is for good what it was.
            The endpoint is that of `HF_ENDPOINT`.
        token: for private repositories; the stored one where left out.
        needed: the file that says what it is.

    Returns:
        The local folder, not yet checked: see `check_folder`.

    Raises:
        RunError: where there is no such repository or revision, no access or no network.
    """
    from huggingface_hub import snapshot_download

    from mmssl.hub.client import explain

    wanted = [
        needed,
        WEIGHTS,
        *RECORDS,
        "figures/*.png",
        *(f"tokenizers/*/{name}" for name in sorted(TOKENIZER_FILES)),
    ]
    repo, _, revision = name.partition("@")
    with explain(f"there is no folder '{name}', and it cannot be downloaded from the Hub"):
        folder = Path(snapshot_download(repo, revision=revision or None, token=token, allow_patterns=wanted))
    if not (folder / needed).exists():
        raise RunError(f"'{name}' on the Hub is not an mmssl {KINDS[needed]}: it has no {needed}")
    return folder


def check_folder(folder: str | Path, trust: bool = False) -> Recipe:
    """Validate a run directory, before anything is built from it.

    The tensors' names and shapes are compared with the model's when they are loaded
    (`mmssl.training.checkpoint.load_weights`).

    Args:
        folder: a run directory, or what `download` returned.
        trust: the folder is the user's own. Otherwise its recipe may name only what is inside the library, and only
            arguments that make no library read other files.

    Returns:
        The recipe.

    Raises:
        RunError: naming what is missing, damaged or not allowed.
        RecipeError: where the recipe is not valid.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise RunError(f"{folder}: no such run directory")
    check_files(folder, "run", ("recipe.yaml", WEIGHTS), RECORDS)
    recipe = read_recipe(folder, trust=trust)
    check_numbers(recipe.encoders, recipe.objective, folder / WEIGHTS, folder / "recipe.yaml")
    check_records(folder)
    return recipe


def read_recipe(folder: Path, trust: bool) -> Recipe:
    """The recipe of a run directory; arguments and errors as for `check_folder`."""
    path = folder / "recipe.yaml"
    recipe = recipes.validate(_read_tree(path), str(path))
    if not trust:
        _check_names(recipe, path)
    return recipe


def check_files(folder: Path, what: str, needed: Sequence[str], others: Sequence[str] = ()) -> None:
    """Check the files that loading reads: all there, regular, inside of the folder, and tokenizers plain JSON.

    Args:
        folder: of a run or a classifier.
        what: it is, for errors.
        needed: names of files.
        others: that may be missing.

    Raises:
        RunError: naming the file.
    """
    for number, path in enumerate(_files(folder, what, needed, others)):
        if number >= MOST_FILES:
            raise RunError(f"{folder}: more than {MOST_FILES:,} files, which no {what} has")
        _stays_inside(path, folder)
        if not path.is_dir() and not path.is_file():
            raise RunError(f"{path}: is no regular file; remove it")
    for path in (folder / "tokenizers").rglob("*"):
        if not path.is_dir():
            _check_tokenizer(path, folder)


def _files(folder: Path, what: str, needed: Sequence[str], others: Sequence[str]) -> Iterator[Path]:
    for name in needed:
        if not (folder / name).is_file():
            raise RunError(f"{folder}: not a whole {what}: {name} is missing; {WRITERS[what]}")
        yield folder / name
    yield from (folder / name for name in others if os.path.lexists(folder / name))
    for name in ("tokenizers", "figures"):
        yield from (folder / name).rglob("*")


def _stays_inside(path: Path, folder: Path) -> None:
    root = folder.resolve()
    if root.parent.name == "snapshots":
        # In the Hub cache the files of a snapshot are links into `blobs` next to it.
        root = root.parent.parent
    if not path.resolve().is_relative_to(root):
        raise RunError(f"{path}: is a link that leaves the folder; replace it by the file itself")


def _read_tree(path: Path) -> dict[str, Any]:
    if path.stat().st_size > LARGEST_RECIPE:
        raise RunError(f"{path}: larger than {LARGEST_RECIPE >> 20} MiB, which no recipe is")
    try:
        text = path.read_text(encoding="utf-8")
        depth = 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            # A few lines of aliases of aliases expand to more than any memory; deep nesting overflows the stack.
            if isinstance(event, yaml.AliasEvent):
                raise RunError(f"{path}: YAML aliases are not allowed in a saved recipe; write the value out")
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > DEEPEST:
                raise RunError(f"{path}: nested deeper than {DEEPEST} levels, which no recipe is")
        tree = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, ValueError) as error:
        raise RunError(f"{path}: not a readable recipe: {_line(error)}") from error
    if not isinstance(tree, dict):
        raise RunError(f"{path}: not a recipe: expected a mapping, found {type(tree).__name__}")
    return tree


def check_records(folder: Path, names: Sequence[str] = RECORDS) -> None:
    """Raise RunError for the first of these records that is there and damaged."""
    checks: dict[str, Callable[[str], Any]] = {
        "metrics.jsonl": _check_metrics,
        "probes.json": _check_probes,
        AUDIT: partial(parse_json, Audited),
        MACHINES: partial(parse_json, list[Machine]),
    }
    for name in names:
        path = folder / name
        if not path.exists():
            continue
        if path.stat().st_size > LARGEST_RECORD:
            raise RunError(f"{path}: larger than {LARGEST_RECORD >> 20} MiB, which no run's is")
        try:
            checks[name](path.read_text(encoding="utf-8"))
        except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
            raise RunError(f"{path} is damaged: {_line(error)}; without it the run can be loaded") from error


def _check_metrics(text: str) -> None:
    for line in text.splitlines():
        if not line.endswith("}"):
            continue  # a run that was killed may leave its last line unfinished
        record = json.loads(line)
        if type(record.get("step")) is not int:
            raise ValueError(f"step = {record.get('step')!r} should be a whole number")
        odd = [f"{key} = {value!r}" for key, value in record.items() if not isinstance(value, int | float)]
        if odd:
            raise ValueError(f"{odd[0]} should be a number")


def _check_probes(text: str) -> None:
    tables = json.loads(text)
    if not isinstance(tables, list):
        raise ValueError(f"expected a list of tables, found {type(tables).__name__}")
    for tree in tables:
        Table.from_json(tree)


def _check_names(recipe: Recipe, path: Path) -> None:
    """Only components of the library, and no argument that reads files or runs code."""
    known = components("objective")
    for name in _objective_names(recipe.objective):
        if name not in known:
            raise RunError(f"{path}: objective '{name}' is not part of mmssl and may run any code; {WAY_OUT}")
    check_arguments(recipe.encoders, path)


def check_arguments(encoders: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Raise RunError for an encoder outside the library, or an argument of one that reads files or runs code.

    Args:
        encoders: name -> arguments of `mmssl.encoder`; the name is the modality unless they name one.
        path: the file that holds them.
    """
    for encoder, arguments in encoders.items():
        where = f"{path}: encoders.{encoder}"
        modality = arguments.get("modality", encoder)
        if modality not in components("encoder"):
            raise RunError(f"{where}: '{modality}' is not an encoder of mmssl and may run any code; {WAY_OUT}")
        library, _, model = arguments["model"].partition("/")
        refused = library_of(arguments["model"]).refused
        own = {key: value for key, value in arguments.items() if key not in ("model", "pretrained", "tokenizer")}
        for key, value in _leaves(encoder, {"model": model, **own}):
            # No argument that shapes a network is a path, an address or the name of a repository.
            if key in refused or (isinstance(value, str) and re.search(r"[/\\:@]", value)):
                raise RunError(f"{where}: {key} = {value!r} may make {library} read other files or run code; {WAY_OUT}")


def _objective_names(objective: Mapping[str, Any]) -> Iterator[str]:
    """The name of the objective and of those it combines."""
    for key, value in objective.items():
        if key == "name" and isinstance(value, str):
            yield value
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, Mapping):
                yield from _objective_names(item)


def _leaves(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Every value of a tree with its key."""
    yield key, value
    if isinstance(value, Mapping):
        for inner, item in value.items():
            yield from _leaves(inner, item)
    elif isinstance(value, list):
        for item in value:
            yield from _leaves(key, item)


def _check_tokenizer(path: Path, folder: Path) -> None:
    if path.name not in TOKENIZER_FILES or path.parent.parent != folder / "tokenizers":
        known = ", ".join(sorted(TOKENIZER_FILES))
        raise RunError(f"{path}: not a tokenizer file; expected tokenizers/<encoder>/ with only {known}")
    if path.stat().st_size > LARGEST_TOKENIZER:
        raise RunError(f"{path}: larger than {LARGEST_TOKENIZER >> 20} MiB, which no tokenizer is")
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(f"{path}: not valid JSON: {_line(error)}") from error
    if not isinstance(tree, dict):
        raise RunError(f"{path}: expected a JSON object, found {type(tree).__name__}")
    if "auto_map" in tree:
        raise RunError(f"{path}: 'auto_map' would run code that is not part of transformers; remove it")
    name = tree.get("name")
    if path.name == "open_clip_tokenizer.json" and not (isinstance(name, str) and re.fullmatch(r"[\w.-]+", name)):
        raise RunError(f"{path}: name = {name!r} is not a model of open_clip")


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())
