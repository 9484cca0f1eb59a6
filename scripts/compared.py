"""Tables of docs/results.md that `mmssl compare` makes: which pretext task, on each of these data sets.

    MMSSL_DATA=path/to/data python scripts/compared.py fashion_cnn        goes on where it was; then the table
    MMSSL_DATA=path/to/data python scripts/compared.py fashion_cnn --tasks simclr,rotation
    python scripts/compared.py --table                                    only the tables that build/compared holds
    python scripts/compared.py --list                                     the calls, as a command line has them

Runs, cells, pages and tables of a comparison are in build/compared/NAME; a task that is named later becomes a line.
"""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path
from typing import Any

from tables import RESULTS, write_tables

ROOT = Path(__file__).resolve().parent.parent
HOME = ROOT / "build" / "compared"
CNN = {"model": "timm/resnet10t", "channels": [32, 64, 128, 256], "stem_width": 16}
FASHION = {"data": "$MMSSL_DATA/fashion", "label": "category", "size": 28, "budget": "steps=400", "audit": False}
COMPARISONS: dict[str, dict[str, Any]] = {
    "fashion_cnn": {**FASHION, "encoder": CNN},
    "fashion_vit": {
        **FASHION,
        "encoder": {
            "model": "timm/vit_tiny_patch16_224",
            **{"img_size": 28, "patch_size": 4, "embed_dim": 96, "depth": 4, "num_heads": 4},
        },
    },
    "emoji_cnn": {
        **{"data": "$MMSSL_DATA/emoji", "label": "category", "groups": "concept"},
        **{"size": 32, "budget": "steps=800", "encoder": CNN},
    },
    **{
        f"toy_{factor}": {"data": "toy", "label": factor, "size": 32, "budget": "steps=800", "encoder": CNN}
        for factor in ("shape", "color")
    },
}


def command(name: str) -> str:
    """The comparison as `mmssl compare` is called."""
    words = ["mmssl", "compare"]
    for key, value in COMPARISONS[name].items():
        if value is False:
            words.append(f"--no-{key}")
        else:
            words += [f"--{key}", value if isinstance(value, str) else json.dumps(value)]
    return " ".join(word if word.startswith("$") else shlex.quote(word) for word in words)


def write(name: str) -> None:
    """The table between the marks of its name."""
    import mmssl
    from mmssl.comparison.page import depth_curves

    if f"<!-- {name} -->" in RESULTS.read_text(encoding="utf-8") and (HOME / name).exists():
        found = mmssl.Comparison.read(HOME / name)
        notes = "\n".join(f"- {note}" for note in found.notes())
        depth_curves(found).savefig(RESULTS.parent / f"{name}_depths.png", dpi=120)
        drawn = f"![{found.main} by depth, shallow on the left]({name}_depths.png)"
        write_tables(name, f"{found.markdown()}\n\n{found.sentence.partition(' Next:')[0]}\n\n{notes}\n\n{drawn}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(COMPARISONS))
    parser.add_argument("--tasks", help="as of mmssl compare; all that fit where left out")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--table", action="store_true", help="only the tables")
    parser.add_argument("--list", action="store_true", help="only the calls")
    given = parser.parse_args()
    if unknown := [name for name in given.names if name not in COMPARISONS]:
        parser.error(f"there is no comparison '{unknown[0]}'; there are {', '.join(COMPARISONS)}")
    for name in given.names or COMPARISONS:
        if given.list:
            print(f"{name}: {command(name)}")
            continue
        if not given.table:
            import mmssl

            tasks = given.tasks.split(",") if given.tasks else None
            mmssl.compare(**COMPARISONS[name], tasks=tasks, out=HOME / name, jobs=given.jobs)
        write(name)


if __name__ == "__main__":
    main()
