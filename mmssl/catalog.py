"""What there is: objectives, encoders, probes and recipes. Read from the files, not imported."""

from __future__ import annotations

import inspect
import json
import os
from collections import defaultdict
from pathlib import Path
from typing import Any

from mmssl.errors import RecipeError, nearest
from mmssl.registry import ROOT, components, find, keywords

KINDS = ("objective", "encoder", "probe", "target")
LIBRARIES = {
    "image": "timm, torchvision, open_clip, transformers",
    "text": "transformers, open_clip",
    "audio": "spectrograms: timm, torchvision, open_clip, transformers; waveforms: transformers",
    "video": "torchvision, transformers; framewise: all image networks",
    "fusion": "transformers/flava, transformers/bert, timm",
}


def recipe_files() -> list[Path]:
    """The recipes that come along: in the package where it is installed, next to it in a checkout."""
    inside = ROOT / "recipes"
    return sorted((inside if inside.is_dir() else ROOT.parent / "recipes").rglob("*.yaml"))


def find_recipe(path: str | Path) -> Path:
    """`path`, or the recipe of that name among those that come along.

    Raises:
        RecipeError: naming the nearest.
    """
    path = Path(path)
    if os.path.isfile(path):
        return path
    known = {recipe.stem: recipe for recipe in recipe_files()}
    if path.stem in known and len(path.parts) == 1:
        return known[path.stem]
    close = nearest(path.stem, known)
    raise RecipeError(f"{path}: there is no such recipe" + (close if "mean" in close else "; `mmssl list` names some"))


def head(path: Path) -> list[str]:
    """The comment at the head of a recipe, line by line."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("# ").rstrip())
    return lines


def everything() -> dict[str, Any]:
    """Kind -> name -> summary (and family, for objectives)."""
    found: dict[str, Any] = {}
    for kind in KINDS:
        found[f"{kind}s"] = {
            c.name: {"family": c.family, "summary": c.summary} if c.family else {"summary": c.summary}
            for c in components(kind).values()
        }
    found["recipes"] = {p.stem: {"path": str(p), "summary": next(iter(head(p)), "")} for p in recipe_files()}
    return found


def table() -> str:
    """`everything` as text."""
    families: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for c in components("objective").values():
        families[c.family or "together"].append((c.name, c.summary))
    sections = [(f"objectives: {family}", rows) for family, rows in families.items()]
    encoders = [(name, LIBRARIES.get(name, "")) for name in components("encoder") if name in LIBRARIES]
    sections.append(("encoders, as library/name", encoders))
    sections += [(f"{kind}s", [(c.name, c.summary) for c in components(kind).values()]) for kind in ("probe", "target")]
    sections.append(("recipes", [(p.stem, next(iter(head(p)), "")) for p in recipe_files()]))
    width = max(len(name) for _, rows in sections for name, _ in rows) + 2
    lines = []
    for title, rows in sections:
        lines += [title, *(f"  {name:<{width}}{summary}".rstrip() for name, summary in rows), ""]
    return "\n".join([*lines, "mmssl list NAME tells all about one"])


def describe(name: str, *, as_json: bool = False) -> str:
    """All about one component or recipe; imports the module of a component, and only that.

    Raises:
        RecipeError: for an unknown name.
    """
    for kind in KINDS:
        if name in components(kind):
            facts = _facts(kind, name)
            return json.dumps(facts, indent=1) if as_json else _text(facts)
    for path in recipe_files():
        if path.stem == name:
            text = path.read_text(encoding="utf-8")
            return json.dumps({"path": str(path), "recipe": text}, indent=1) if as_json else f"{path}\n\n{text}"
    known = [n for kind in KINDS for n in components(kind)] + [p.stem for p in recipe_files()]
    close = nearest(name, known)
    hint = close if "mean" in close else "; `mmssl list` names them all"
    raise RecipeError(f"there is no objective, encoder, probe or recipe named '{name}'{hint}")


def _facts(kind: str, name: str) -> dict[str, Any]:
    component = find(kind, name)
    module = inspect.getmodule(component)
    meanings = _meanings(inspect.getdoc(component) or "")
    hyper = {
        parameter.name: {
            "type": str(parameter.annotation),  # as it is written: annotations are not evaluated
            "default": None if parameter.default is inspect.Parameter.empty else parameter.default,
            "required": parameter.default is inspect.Parameter.empty,
            "meaning": meanings.get(parameter.name, ""),
        }
        for parameter in keywords(component).values()
    }
    facts: dict[str, Any] = {
        "kind": kind,
        "name": name,
        "source": inspect.getdoc(module) if module else "",
        "hyper_parameters": hyper,
    }
    if kind == "objective":
        facts["chance"] = inspect.getdoc(component.chance)  # type: ignore[attr-defined]
        facts["reads"] = list(component.needs) or "what its encoders read"  # type: ignore[attr-defined]
        facts["meets"] = str(component.meets)  # type: ignore[attr-defined]
    return facts


def _meanings(doc: str) -> dict[str, str]:
    """The Args section of a Google docstring: name -> text."""
    meanings: dict[str, str] = {}
    inside, current = False, ""
    for line in doc.splitlines():
        if line.strip() == "Args:":
            inside = True
        elif inside and line and not line.startswith(" "):
            break
        elif inside and line.startswith("    ") and not line.startswith("     ") and ":" in line:
            current, _, text = line.strip().partition(":")
            for one in current.split(","):
                meanings[one.strip()] = text.strip()
        elif inside and current and line.strip():
            for one in current.split(","):
                meanings[one.strip()] += " " + line.strip()
    return meanings


def _text(facts: dict[str, Any]) -> str:
    lines = [f"{facts['name']} ({facts['kind']})", "", facts["source"] or "", ""]
    for key in ("reads", "chance"):
        if key in facts:
            value = facts[key]
            lines.append(f"{key}: {', '.join(value) if isinstance(value, list) else value}")
    if "meets" in facts:
        lines.append(f"rows meet: {facts['meets']}")
    lines += ["", "hyper-parameters" if facts["hyper_parameters"] else "no hyper-parameters"]
    for name, h in facts["hyper_parameters"].items():
        default = "required" if h["required"] else f"= {h['default']!r}"
        lines.append(f"  {name}: {h['type']} {default}")
        if h["meaning"]:
            lines.append(f"      {h['meaning']}")
    return "\n".join(lines)
