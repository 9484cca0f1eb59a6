"""Recipes made wrong at random, each started in a process of its own: refused in a sentence, or trained with sense.

    python scripts/fuzz_recipes.py                      322 mutants of the toy recipes
    python scripts/fuzz_recipes.py --seed 3 --count 900
    python scripts/fuzz_recipes.py --seed 3 --only 17   one of them, with all that it printed

Keys are misspelled, left out, and given other types, other names, and numbers that are not finite, huge, negative or
zero, up to three at a time, in all sections. What must not be: a traceback or a crash, a sentence of several lines, a
folder left by a start that was refused, a process that takes more than its time or memory, and a run that goes through
although a value makes no sense anywhere (such as NaN), or whose records are not finite. Then the exit status is 1.
"""

from __future__ import annotations

import argparse
import collections
import json
import math
import os
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", MPLBACKEND="agg")

import torch
from forked import Ended, each
from mutations import Mutant, mutant, toy_recipes

import mmssl
import mmssl.audit.verdict
import mmssl.hub.load
import mmssl.report.figures
import mmssl.report.page
import mmssl.runs
from mmssl.errors import MmsslError
from mmssl.registry import components, find

GIB = 2**30
LONGEST = 700
"""Letters in a sentence."""


def start(one: Mutant, folder: Path) -> dict[str, Any]:
    """Run a mutant in this process, which is its own; what came of it."""
    os.chdir(folder)
    out = folder / "run"
    try:
        history = mmssl.run(one.tree, out=out, quiet=True).history
    except MmsslError as error:
        said = str(error)
        left = out.exists() and not (out / "recipe.yaml").exists()
        bad = "folder left" if left else "no sentence" if "\n" in said or not 10 < len(said) <= LONGEST else ""
        return {"kind": bad or "refused", "text": said}
    except BaseException:
        return {"kind": "traceback", "text": traceback.format_exc()}
    odd = [
        f"{key} = {value} at step {record['step']}"
        for record in history
        for key, value in record.items()
        if isinstance(value, float) and not math.isfinite(value)
    ]
    if one.nonsense or odd:
        return {"kind": "senseless", "text": one.nonsense or "; ".join(odd[:3])}
    return {"kind": "ran", "text": ""}


def judge(one: Mutant, ended: Ended, folder: Path) -> dict[str, Any]:
    """What a process that has ended leaves to be said."""
    if ended.late:
        return {"kind": "hang", "text": (folder / "log").read_text("utf-8", "replace")[-3000:]}
    try:
        return dict(json.loads((folder / "result.json").read_text("utf-8")))
    except (OSError, ValueError):
        said = (folder / "log").read_text("utf-8", "replace")[-3000:]
        return {"kind": "crash", "text": f"exit status {ended.status}\n{said}"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=7 * len(toy_recipes()), help="mutants")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, nargs="+", help="numbers of mutants")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument("--seconds", type=float, default=90, help="until a process counts as hanging")
    parser.add_argument("--gib", type=float, default=6, help="memory of a process, in addition to what is imported")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for kind in ("objective", "encoder", "backbone", "probe", "target"):
        for name in components(kind):
            find(kind, name)
    numbers = options.only or list(range(options.count))
    mutants = {number: mutant(options.seed, number) for number in numbers}
    found: dict[int, dict[str, Any]] = {}
    took: dict[int, float] = {}
    with tempfile.TemporaryDirectory() as place:

        def folder(number: int) -> Path:
            (Path(place) / str(number)).mkdir(exist_ok=True)
            return Path(place) / str(number)

        def child(number: int) -> None:
            result = start(mutants[number], folder(number))
            (folder(number) / "result.json").write_text(json.dumps(result), encoding="utf-8")

        limits = options.jobs, int(options.gib * GIB), options.seconds
        for ended in each(numbers, child, lambda number: folder(number) / "log", *limits):
            found[ended.number] = judge(mutants[ended.number], ended, folder(ended.number))
            took[ended.number] = ended.seconds
            if options.only:
                print((folder(ended.number) / "log").read_text("utf-8", "replace"), found[ended.number]["text"])
    return report(mutants, found, took, options.seed)


def report(mutants: dict[int, Mutant], found: dict[int, dict[str, Any]], took: dict[int, float], seed: int) -> int:
    """Print the table and what was found; the exit status."""
    kinds = collections.Counter(result["kind"] for result in found.values())
    bad = [number for number in sorted(found) if found[number]["kind"] not in ("refused", "ran")]
    for number in bad:
        one, result = mutants[number], found[number]
        print(f"\n{result['kind']}: --seed {seed} --only {number}: {one.recipe}: {'; '.join(one.changes)}")
        print("    " + "\n    ".join(result["text"].strip().splitlines()[-6:])[:1500])
    single = [n for n in found if found[n]["kind"] == "refused" and len(mutants[n].changes) == 1]
    named = [n for n in single if _key(mutants[n].changes[0]) in found[n]["text"]]
    print(f"\n{len(found)} mutants of {len({one.recipe for one in mutants.values()})} recipes, seed {seed}")
    for kind in ("refused", "ran", "traceback", "crash", "hang", "senseless", "no sentence", "folder left"):
        print(f"  {kind:<12} {kinds[kind]:>5}")
    print(f"  of {len(single)} with one change that were refused, {len(named)} sentences name its key")
    print(f"  the slowest took {max(took.values()):.0f} s")
    return 1 if bad else 0


def _key(change: str) -> str:
    return change.removeprefix("no ").partition(" ")[0].rpartition(".")[2]


if __name__ == "__main__":
    sys.exit(main())
