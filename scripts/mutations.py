"""Recipes made wrong at random, for fuzz_recipes.py: which key, which value, and whether it may ever be accepted."""

from __future__ import annotations

import copy
import datetime
import math
import random
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from transformers import AutoConfig

from mmssl import recipe as recipes
from mmssl.modules.views import AudioView, Crop, ImageView
from mmssl.registry import components, find, keywords

Path_ = tuple[Any, ...]
NOT_FINITE = [math.nan, math.inf, -math.inf]
HUGE = [10**400, 10**20, 2**64, 2**63, 2**31, 10**9, 10**7, 10**5, 1e308, 1e30]
SMALL = [0, 1, 1e-300, 0.5, 3, 7]
NEGATIVE = [-1, -0.5, -(10**20), -1e-30]
NAMES = ["", " ", "nowhere", "../../x", "[x", "\x00", "a\nb", "\ud800", "nan", "~", "x" * 5000]
ODD = [
    *(True, False, None, "many", "3", [], {}, [1, 2], [[]], [None], {"a": 1}, {1: 2}, {None: []}),
    *(b"bytes", datetime.date(2020, 1, 1), {"x"}, [math.nan], ["x"] * 100, [0] * 1000),
]
# Defaults of these are any number, so that a negative one is no nonsense.
SIGNED = {"bias", "mean", "std", "extent", "pad_token_id", "bos_token_id", "eos_token_id"}
# Texts and lists that a number may stand for, and the other way around.
LOOSE = {"extent", "k", "seeds", "alpha", "c", "lr", "views", "pick", "steps", "heads", "tokenizer", "pretrained"}
LONG = {"steps", "epochs"}
FAST = {"steps": 2, "log_every": 1, "save_every": 2}


class Mutant(NamedTuple):
    """A recipe, which keys of it were changed to what, and why it has to be refused; empty where it need not be."""

    recipe: str
    tree: dict[str, Any]
    changes: list[str]
    nonsense: str


def toy_recipes() -> list[Path]:
    """Every one of them."""
    return sorted(Path(__file__).parent.parent.glob("recipes/*/*_toy.yaml"))


def mutant(seed: int, number: int) -> Mutant:
    """One of endlessly many: the same for the same numbers."""
    dice = random.Random(f"{seed}/{number}")
    found = toy_recipes()
    path = found[number % len(found)]
    tree = _whole(path)
    if dice.random() < 0.2:
        name = dice.choice(sorted(components("probe")))
        tree["probe"] = {"label": dice.choice(["shape", "position", "colors"]), "probe": name, "limit": 40}
        if name == "finetune":
            tree["probe"] |= {"steps": 1, "limit": 8}  # sounds of the toy world are made anew at every reading
    changes: list[str] = []
    nonsense = ""
    places = list(_places(tree))
    for _ in range(dice.choice([1, 1, 1, 2, 3])):
        place = dice.choice(_groups(places)[dice.choice(sorted(_groups(places)))])
        said, why = _change(tree, place, dice)
        changes.append(said)
        nonsense = nonsense or why
    if isinstance(tree.get("training"), dict | None):
        tree["training"] = {**FAST, **(tree.get("training") or {})}
    return Mutant(path.stem, tree, changes, nonsense)


def _whole(path: Path) -> dict[str, Any]:
    """A recipe of few and short steps, with the defaults that it leaves out."""
    given = yaml.safe_load(path.read_text("utf-8"))
    given["training"] = {**given["training"], **FAST}
    tree = recipes.validate(given, str(path)).model_dump(mode="json")
    for data in [tree["data"]] if "source" in tree["data"] else tree["data"].values():
        data["limit"] = 32
    del tree["probe"], tree["probes"]
    return tree


def _places(tree: dict[str, Any]) -> Iterator[Path_]:
    """Every key of the recipe, those that it has and those that its components know."""
    yield from _below(tree, ())
    for name, arguments in tree["encoders"].items():
        kind = find("encoder", arguments.get("modality", name))
        known = {*keywords(kind), "frozen", "modality", "pretrained", *_configuration(arguments["model"])}
        yield from (("encoders", name, key) for key in sorted(known - {*arguments}))
    yield from _of_task(tree["objective"], ("objective",))
    if probe := tree.get("probe"):
        known = {*keywords(find("probe", probe["probe"])), *recipes.Probe.model_fields}
        yield from (("probe", key) for key in sorted(known - {*probe}))


def _of_task(given: Mapping[str, Any], place: Path_) -> Iterator[Path_]:
    known = keywords(find("objective", given["name"]))
    yield from ((*place, key) for key in sorted({*known} - {*given}))
    if "views" in known:
        kinds = (Crop, ImageView, AudioView)
        yield from ((*place, "views", key) for key in sorted({f.name for kind in kinds for f in fields(kind)}))
    for name, task in given.get("tasks", {}).items():
        yield from _of_task(task, (*place, "tasks", name))


def _configuration(model: str) -> set[str]:
    """Names that the network's constructor may know."""
    library, _, name = model.partition("/")
    if library == "transformers" and name in ("bert", "gpt2", "t5", "bart", "electra", "roberta"):
        return {*AutoConfig.for_model(name).to_dict()}
    return {*("depth", "num_heads", "embed_dim", "patch_size", "img_size", "mlp_ratio", "drop_rate", "in_chans")}


def _below(tree: Any, place: Path_) -> Iterator[Path_]:
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield (*place, key)
        yield from _below(value, (*place, key))


def _groups(places: list[Path_]) -> dict[str, list[Path_]]:
    """By section, so that each is as likely as the others."""
    found: dict[str, list[Path_]] = {}
    for place in places:
        found.setdefault(str(place[0]), []).append(place)
    return found


def _change(tree: dict[str, Any], place: Path_, dice: random.Random) -> tuple[str, str]:
    """Change one key in place; what was done, and why that is nonsense wherever it is."""
    node: Any = tree
    *parents, key = place
    gone = f"{_dotted(place)} is gone", ""  # with what an earlier change put above it
    try:
        for parent in parents:
            if isinstance(node, dict) and node.get(parent) is None:
                node[parent] = {}
            node = node[parent]
        before = node.get(key) if isinstance(node, dict) else node[key]
    except (TypeError, KeyError, IndexError):
        return gone
    if not isinstance(node, dict | list):
        return gone
    roll = dice.random()
    if isinstance(node, dict) and roll < 0.05 and key in node:
        del node[key]
        return f"no {_dotted(place)}", ""
    if isinstance(node, dict) and roll < 0.12:
        wrong = dice.choice([f"{key}s", f"{key}_", "nonsense", "", 3, None, "a.b"])
        fits = place[0] == "encoders" or any(p in ("columns", "tasks") for p in place) or len(place) == 2
        node[wrong] = dice.choice([1, "x", copy.deepcopy(node.get(key))])
        return f"{_dotted((*parents, wrong))} = {node[wrong]!r:.60}", "" if fits else "an unknown key"
    kinds = [NOT_FINITE, HUGE, SMALL, NEGATIVE, ODD, ODD]
    if isinstance(before, str) or before is None:
        kinds += [NAMES] * (4 if isinstance(before, str) else 1)
    value = copy.deepcopy(dice.choice(dice.choice(kinds)))
    if key in LONG and isinstance(value, int | float) and 50 < value < math.inf:
        value = 10**20  # more than there may be, and not only long
    node[key] = value
    return f"{_dotted(place)} = {value!r:.60}", _why_not(key, before, value)


def _why_not(key: Any, before: Any, value: Any) -> str:
    """Why this value makes no sense in place of that one, wherever it is; empty where it may."""
    if isinstance(value, bytes | datetime.date | set):
        return "nothing that JSON knows"
    if isinstance(value, float) and not math.isfinite(value):
        return "not finite"
    if isinstance(value, list) and any(isinstance(v, float) and not math.isfinite(v) for v in value):
        return "not finite"
    if key in LOOSE or value is None:
        return ""
    number = isinstance(before, int | float) and not isinstance(before, bool)
    if number and (isinstance(value, bool | list | dict) or (isinstance(value, str) and value != "3")):
        return "no number"
    if number and key not in SIGNED and isinstance(value, int | float) and value < 0:
        return "negative"
    if isinstance(before, str) and not isinstance(value, str):
        return "no text"
    if isinstance(before, dict) and not isinstance(value, dict):
        return "no section"
    if isinstance(before, bool) and not isinstance(value, bool) and value not in (0, 1):
        return "neither true nor false"
    return ""


def _dotted(place: Path_) -> str:
    return ".".join(map(str, place))
