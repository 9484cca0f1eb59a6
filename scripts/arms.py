"""What an audit asks each task, in each modality: a table of docs/results.md.

python scripts/arms.py          writes it, in a minute of one CPU core
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

from tables import write_tables

from mmssl import recipe as recipes
from mmssl.audit.arms import NULLS, Asked, asked_of
from mmssl.build import build
from mmssl.catalog import recipe_files
from mmssl.ops.draws import Draws

ROWS = 4


def asked(path: Path) -> Asked:
    """Of the task of a toy recipe."""
    given = recipes.load(path, {"training.batch_size": ROWS, "training.workers": 0})
    objective, loader = build(given)
    objective.eval()
    return asked_of(objective, given, objective.transform(next(loader.batches(0, 1)), Draws(0, 0, ROWS)))


def cells(one: Asked) -> str:
    """Of the table: the data, what gradients ask, why there are no data."""
    null = NULLS[one.null] + ("; edges by hand" if one.edges else "")
    return f"| {null} | {'other rows, what is hidden' if one.hidden else 'other rows'} | {one.why} |"


def table(found: Mapping[str, Asked]) -> str:
    """Markdown, a line for all recipes that are asked the same."""
    alike: dict[str, list[str]] = defaultdict(list)
    for name in sorted(found):
        alike[cells(found[name])].append(f"`{name}`")
    lines = ["| data without structure | by gradients | why none | recipes |", "|---|---|---|---|"]
    return "\n".join([*lines, *(f"{one} {', '.join(names)} |" for one, names in sorted(alike.items()))])


def main() -> None:
    toys = [path for path in recipe_files() if path.stem.endswith("_toy")]
    write_tables("arms", table({path.stem.removesuffix("_toy"): asked(path) for path in toys}))


if __name__ == "__main__":
    main()
