"""The README's walk from a folder of pictures to a classifier, its commands as they stand, in an empty folder, timed.

    python scripts/journey.py                     pictures of the toy world, drawn for it
    python scripts/journey.py path/to/labeled     class folders of your own; copied

`photos` are the pictures without labels and `labeled` the same in class folders. Every command of "Your own files" that
names one of both, or what came out of them, is called in the order of the page; then plain timm reads what was
exported, and has to give the answers and probabilities that `mmssl predict` wrote. Ends with the seconds of each, wall
clock and processor.
"""

from __future__ import annotations

import argparse
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
PICTURES = 480
OURS = re.compile(r"\b(photos|labeled|compared|classifier)\b")
READ_BACK = """
import csv, json, os, pathlib, re
import mmssl
rows = list(csv.DictReader(open("answers.csv")))[:16]
pictures = mmssl.load("runs/photos").encoders["image"].read([row["image"] for row in rows]).x
os.chdir("exported_classifier")
(program,) = re.findall(r"```python\\n(.*?)```", pathlib.Path("README.md").read_text(), re.DOTALL)
assert "mmssl" not in program
names, classes = {}, json.loads(pathlib.Path("names.json").read_text())
exec(program, names)
chances, picks = names["outputs"](pictures).softmax(1).max(1)
for row, chance, pick in zip(rows, chances.tolist(), picks.tolist(), strict=True):
    assert classes[pick] == row["answer"] and abs(chance - float(row["probability"])) < 1e-3, (row, chance)
print(f"plain timm gives the answers and probabilities of {len(rows)} pictures")
"""


def commands() -> list[str]:
    """Of the README, those that need pictures alone."""
    text = (PROJECT / "README.md").read_text(encoding="utf-8")
    part = text.partition("## Your own files")[2].partition("\n## ")[0]
    lines = "\n".join(re.findall(r"```bash\n(.*?)```", part, re.DOTALL)).splitlines()
    lines = [line.partition(" #")[0].strip() for line in lines]
    return [line for line in lines if line.startswith("mmssl ") and OURS.search(line)]


def write_pictures(folder: Path, given: Path | None) -> None:
    """Class folders in `labeled`, and all of it without labels in `photos`."""
    if given is not None:
        shutil.copytree(given, folder / "labeled")
    else:
        draw_pictures(folder / "labeled")
    (folder / "photos").mkdir()
    for i, path in enumerate(sorted(path for path in (folder / "labeled").rglob("*") if path.is_file())):
        shutil.copy(path, folder / "photos" / f"{i:05d}{path.suffix}")


def draw_pictures(folder: Path) -> None:
    """Of the toy world, a class a shape."""
    from PIL import Image

    from mmssl.data.sources import open_source
    from mmssl.recipe import Data

    table = open_source(Data(source="toy", limit=PICTURES))
    for i in range(len(table)):
        row = table.row(i)
        path = folder / str(row["shape"]) / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(row["image"]).save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("labeled", nargs="?", type=Path, help="class folders of pictures; drawn by default")
    parser.add_argument("--out", type=Path, help="folder to work in, not there yet; a temporary one by default")
    given = parser.parse_args()
    times = []
    with nullcontext(given.out) if given.out else tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_pictures(folder, given.labeled)
        environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
        for command in [*commands(), ""]:
            call = command.split() if command else [sys.executable, "-c", READ_BACK]
            print(f"$ {command or 'python  # plain timm'}", flush=True)
            start, used = time.monotonic(), cpu_seconds()
            subprocess.run(call, cwd=folder, env=environment, check=True)
            times.append((time.monotonic() - start, cpu_seconds() - used, command or "plain timm"))
    for seconds, cpu, command in [*times, (sum(t for t, _, _ in times), sum(c for _, c, _ in times), "all")]:
        print(f"{seconds:7.1f} s {cpu:7.1f} CPU s  {command}")


def cpu_seconds() -> float:
    """Of the commands that ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()
