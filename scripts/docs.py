"""Make the documentation: pages that follow from the code, next to those of docs/, and Sphinx over all of them.

    python scripts/docs.py                  into build/docs/index.html
    python scripts/docs.py --out FOLDER     elsewhere

A page a task is made of its docstrings, hyper-parameters, recipes and a picture of its puzzle; the API's of the public
names; the first one of the README. A link to a page or a heading that is not there is an error; other sites are not
asked. Pictures are of untrained networks on the toy world, a second each, and are kept in build/pictures until the
library or a recipe changes.
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import json
import re
import shutil
from collections import defaultdict
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from sphinx.cmd.build import main as sphinx

import mmssl
from mmssl import catalog, recipe, runs
from mmssl.build import build
from mmssl.objectives.base import Step
from mmssl.registry import ROOT, components
from mmssl.report.figures import draw_panels
from mmssl.training.loop import whole_data

PROJECT = ROOT.parent
PICTURES = PROJECT / "build" / "pictures"
ROWS = 4  # of a picture
SIZES = ("toy", "folder")  # the smallest first; published scales after them
TOGETHER = "together"


def write_pages(folder: Path) -> None:
    """Everything that Sphinx reads, in `folder`."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(PROJECT / "docs", folder)
    for page in folder.rglob("*.md"):
        page.write_text(relinked(page.read_text("utf-8")), "utf-8")
    for name in ("README", "CONTRIBUTING"):
        text = (PROJECT / f"{name}.md").read_text("utf-8")
        (folder / f"{name.lower()}.md").write_text(relinked(text), "utf-8")
    (folder / "api.md").write_text(api(), "utf-8")
    tasks = folder / "tasks"
    tasks.mkdir()
    (tasks / "index.md").write_text(overview(), "utf-8")
    found = measured((PROJECT / "docs" / "results.md").read_text("utf-8"))
    for name in components("objective"):
        toy, levels = puzzle(name, tasks)
        (tasks / f"{name}.md").write_text(task_page(name, toy, levels, found[name]), "utf-8")


def relinked(text: str) -> str:
    """Links between the README, CONTRIBUTING.md and docs/ as they are where all are in one folder."""
    text = re.sub(r"\]\(((?:\.\./)*?)(?:\.\./)?CONTRIBUTING\.md", r"](\1contributing.md", text)
    return text.replace("](docs/", "](")


def overview() -> str:
    """The page that names all tasks, family by family."""
    families = defaultdict(list)
    for task in components("objective").values():
        families[task.family or TOGETHER].append(task)
    lines = ["# Tasks", "", "`mmssl list` prints this, and `mmssl list rotation` what its page says.", ""]
    for family, tasks in sorted(families.items(), key=lambda item: (item[0] != TOGETHER, item[0]), reverse=True):
        question = (ROOT / "objectives" / family / "__init__.py") if family != TOGETHER else None
        lines += [f"## {family.capitalize()}", ""]
        lines += [question.read_text("utf-8").strip().strip('"'), ""] if question else []
        lines += ["| task | |", "|---|---|"]
        lines += [f"| [{task.name}]({task.name}.md) | {task.summary} |" for task in tasks]
        lines += ["", "```{toctree}", ":hidden:", "", *(task.name for task in tasks), "```", ""]
    return "\n".join(lines)


def task_page(name: str, toy: Path, levels: Mapping[str, float], tables: list[str]) -> str:
    """The page of a task.

    Args:
        name: of the task.
        toy: the recipe of its picture.
        levels: what guessing scores there.
        tables: headings of docs/results.md under which it has rows.
    """
    facts = json.loads(catalog.describe(name, as_json=True))
    summary, _, story = facts["source"].partition("\n\n")
    story = re.sub(r"^(Known traps|Differences)\. ", r"## \1\n\n", story, flags=re.MULTILINE)
    story = re.sub(r"arXiv\s+(\d{4}\.\d{5})", r"[arXiv \1](https://arxiv.org/abs/\1)", story)
    reads = facts["reads"] if isinstance(facts["reads"], str) else ", ".join(f"`{key}`" for key in facts["reads"])
    scored = ", ".join(f"{key} {value:.4g}" for key, value in levels.items())
    lines = [
        f"# {name}",
        "",
        f"*{summary.replace(chr(10), ' ')}*",
        "",
        f"[![{name}: what goes in, the target, and what an untrained network answers]({name}.png)]({name}.png)",
        "",
        f"What goes in, the target, and what an untrained network answers: `mmssl show {toy.stem}`.",
        "",
        story,
        "",
        "## Facts",
        "",
        f"- Reads {reads}.",
        f"- Rows of a batch meet {'nowhere' if facts['meets'] == 'nowhere' else 'in `' + facts['meets'] + '`'}.",
        f"- Chance: {one_line(facts['chance'])} In `{toy.stem}`: {scored}.",
        *(
            ["- Measured: " + ", ".join(f"[{title}](../results.md#{slug(title)})" for title in tables) + "."]
            * bool(tables)
        ),
        "",
        "## Hyper-parameters",
        "",
        *hyper_parameters(facts["hyper_parameters"]),
        "",
        "## Recipes",
        "",
    ]
    for path in recipes_of(name):
        lines += [f"### {path.stem}", "", "```yaml", path.read_text("utf-8").rstrip(), "```", ""]
    return "\n".join(lines)


def hyper_parameters(facts: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Lines of Markdown: name, type, default, meaning."""
    yield "`objective` of a recipe takes, besides `name`:" if facts else "None."
    yield ""
    for name, one in facts.items():
        default = "required" if one["required"] else f"`{one['default']!r}`"
        yield f"- `{name}` (`{one['type']}`, {default}){': ' if one['meaning'] else ''}{one['meaning']}"


def recipes_of(name: str) -> list[Path]:
    """Those of a task, the smallest first."""
    own = [path for path, task in tasks_of_recipes().items() if task == name]
    size = {end: rank for rank, end in enumerate(SIZES)}
    return sorted(own, key=lambda path: (size.get(path.stem.rpartition("_")[2], len(SIZES)), len(path.stem), path.stem))


@cache
def tasks_of_recipes() -> dict[Path, str]:
    """Recipe -> its task."""
    return {path: recipe.load(path).objective["name"] for path in catalog.recipe_files()}


def measured(results: str) -> dict[str, list[str]]:
    """Task -> headings of docs/results.md under which a cell of a table begins with it, or with a recipe of it."""
    known = sorted(components("objective"), key=len, reverse=True)
    found: dict[str, list[str]] = defaultdict(list)
    heading = ""
    for line in results.splitlines():
        if line.startswith("#"):
            heading = line.strip("# ")
        elif line.startswith("|"):
            for cell in line.split("|"):
                words = cell.strip(" `").replace(" ", "_")
                name = next((name for name in known if re.match(rf"{name}(?![a-z])", words)), None)
                if name and heading not in found[name]:
                    found[name].append(heading)
    return found


def puzzle(name: str, folder: Path) -> tuple[Path, dict[str, float]]:
    """Draw NAME.png into `folder`; the recipe that it is of, and what guessing scores there."""
    toy = recipes_of(name)[0]
    kept = PICTURES / library()
    picture, chance = kept / f"{name}.png", kept / f"{name}.json"
    if not chance.exists():
        resolved = recipe.load(toy)
        objective, loader = build(resolved, where=str(toy))
        objective.before_step(Step(0, data=lambda: whole_data(loader, "cpu")))
        draw_panels(runs.preview(objective, loader, rows=ROWS), picture, rows=ROWS)
        chance.write_text(json.dumps(objective.chance(resolved.training.batch_size).levels), "utf-8")
    shutil.copyfile(picture, folder / picture.name)
    return toy, json.loads(chance.read_text("utf-8"))


def library() -> str:
    """A name for the library and its recipes as they are."""
    digest = hashlib.sha256()
    for path in [*sorted(ROOT.rglob("*.py")), *catalog.recipe_files()]:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def api() -> str:
    """The page of the public names."""
    lines = ["# API", "", "```{eval-rst}", ".. currentmodule:: mmssl", ""]
    for name in mmssl.__all__:
        value = getattr(mmssl, name)
        if inspect.isclass(value):
            kind = "exception" if issubclass(value, Exception) else "class"
            lines += [f".. auto{kind}:: {name}", "   :members:", ""]
        elif callable(value):
            lines += [f".. autofunction:: {name}", ""]
    return "\n".join([*lines, "```", ""])


def one_line(text: str) -> str:
    """Without line breaks."""
    return " ".join(text.split())


def slug(title: str) -> str:
    """The anchor of a heading."""
    return re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")


def to_html(pages: Path, out: Path) -> int:
    """Sphinx's exit code; 1 where there is anything to complain of."""
    return sphinx(["-b", "html", "-n", "-W", "--keep-going", "-q", "-d", f"{out}-cache", str(pages), str(out)])


def main() -> int:
    parser = argparse.ArgumentParser(description="Make the documentation.")
    parser.add_argument("--out", type=Path, default=PROJECT / "build" / "docs", help="folder to write to")
    out = parser.parse_args().out
    pages = out.with_name(f"{out.name}-pages")
    write_pages(pages)
    code = to_html(pages, out)
    print(out / "index.html" if code == 0 else f"{out}: not whole, see above")
    return code


if __name__ == "__main__":
    raise SystemExit(main())
