"""Which pretext task helps to say what stands where: segmentation and detection of drawn scenes; resumable.

    MMSSL_DATA=path/to/data python scripts/scenes.py                       what is missing, then the table
    MMSSL_DATA=path/to/data python scripts/scenes.py simclr untrained 0    some lines or seeds
    python scripts/scenes.py --table                                       only the table

Networks are pretrained without labels on the pictures of `sprites` and on the 1,000 training scenes of `scenes`, and
learn from 20, 100 or all of these scenes with labels; 300 with other units are asked about. A cell is one line, one
question, one way (frozen or tuned), one number of labels and one seed, which draws the network and the labeled scenes,
the same ones for every line. With a learning rate after them, it is one of the cells on validation scenes by which that
was chosen. Cells are kept in scripts/scenes.json and not run again; the runs are in build/scenes, where each is trained
once.
"""

from __future__ import annotations

import argparse
import functools
import os
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tables import Cells, fill_cells, read_cells, spread, write_tables

ROOT = Path(__file__).resolve().parent.parent
CELLS = ROOT / "scripts" / "scenes.json"
HOME = ROOT / "build" / "scenes"
TASKS = ("simclr", "densecl", "rotation", "autoencoder")
UNTRAINED, ORACLE = "untrained", "true masks on 32 x 32 places"
SEEDS = (0, 1, 2)
LABELS = (20, 100, 1000)
SIZE = 64
CNN = {"model": "timm/resnet10t", "channels": [32, 64, 128, 256], "stem_width": 16}
# As many pictures through the encoder a step: two views of a row, four turns, or the row as it is.
STEPS, SAMPLES = 1200, 64
SAMPLES_A_ROW = {"rotation": 4, "autoencoder": 1}
FIGURE, CLASSES, BOXES = "figure", "mask", "boxes"
HEADS = {FIGURE: "unit or ground, mIoU", CLASSES: "ten classes, mIoU", BOXES: "boxes of units, AP50"}
SCORES = {FIGURE: "mean_iou", CLASSES: "mean_iou", BOXES: "average_precision_50"}
FROZEN, TUNED = "frozen", "tuned"
WAYS: dict[str, dict[str, Any]] = {FROZEN: {"steps": 200}, TUNED: {"steps": 200, "tune": True, "decay": (1.0,)}}
# All boxes are of one class, for there is no column of that name.
PROBES: dict[str, dict[str, Any]] = {
    FIGURE: {"probe": "segmentation"},
    CLASSES: {"probe": "segmentation"},
    BOXES: {"probe": "detection", "classes": "unit", "width": 64},
}
# Learning rates, of which each line chooses one with seed 0 and 100 labels on validation scenes.
RATES = {
    **{(question, FROZEN): (1e-2, 1e-1) for question in (FIGURE, CLASSES)},
    **{(question, TUNED): (1e-3, 3e-3) for question in (FIGURE, CLASSES)},
    **{(BOXES, way): (1e-3,) for way in WAYS},
}
CHOSEN_WITH = 100
# Question, way -> numbers of labels.
ASKED = {
    (FIGURE, FROZEN): LABELS,
    (FIGURE, TUNED): LABELS,
    (CLASSES, FROZEN): (1000,),
    (CLASSES, TUNED): (1000,),
    (BOXES, FROZEN): (100, 1000),
    (BOXES, TUNED): (100, 1000),
}


def pictures() -> str:
    """A file of all pictures that are there without labels: training scenes and drawings of single units."""
    import pyarrow as pa
    from pyarrow import parquet

    file = HOME / "pictures" / "train.parquet"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        files = [Path(os.environ["MMSSL_DATA"], name, "train.parquet") for name in ("sprites", "scenes")]
        tables = [parquet.read_table(str(one), columns=["image"]).replace_schema_metadata() for one in files]
        parquet.write_table(pa.concat_tables(tables), file)
    return str(file.parent)


@functools.cache
def network(line: str, seed: int) -> Any:
    """The encoder of a line, trained unless it is the one before its first step; each run is trained once."""
    import torch

    import mmssl

    if line == ORACLE:
        return oracle()
    if line == UNTRAINED:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return mmssl.encoder(modality="image", **CNN)
    changed = {
        "encoders.image": CNN,
        "data.source": pictures(),
        "data.image.size": SIZE,
        "data.cache": str(HOME / "decoded"),
        "training.steps": STEPS,
        "training.batch_size": SAMPLES // SAMPLES_A_ROW.get(line, 2),
        "training.workers": 0,
        "training.seed": seed,
    }
    out = HOME / f"{line} {seed}"
    return mmssl.run(f"{line}_folder", set=changed, out=out, resume=True, quiet=True).encoders["image"]


def described(split: str) -> Any:
    """Scenes as they are read where boxes are asked for, which batches do not hold."""
    from mmssl.recipe import Data

    return Data(source="$MMSSL_DATA/scenes", split=split, image={"size": SIZE})


@functools.cache
def scenes(split: str) -> list[dict[str, Any]]:
    """Pictures, and class numbers of their pixels at the size that networks see; `figure` is 1 where a unit stands."""
    import torch

    from mmssl.data.loader import read
    from mmssl.data.sources import open_source
    from mmssl.media.mask import Frame, decode_mask

    spec = described(split)
    cells = open_source(spec).values("mask")
    mask = torch.stack([decode_mask(cell, Frame(160, 160, SIZE, "crop")) for cell in cells])
    known = {"mask": mask, "figure": (mask > 0).to(mask.dtype)}
    return [
        {"image": batch["image"], **{key: values[batch["id"]] for key, values in known.items()}}
        for batch in read(spec, ("image",), batch_size=50)
    ]


def measure(line: str, question: str, way: str, labels: int, seed: int, rate: float | None = None) -> dict[str, Any]:
    """Scores of one cell, and that of the constant answer; on validation scenes where a learning rate is given."""
    import torch

    import mmssl

    torch.set_num_threads(1)
    splits = ("train", "test" if rate is None else "validation")
    train, test = (described(split) if question == BOXES else scenes(split) for split in splits)
    if line == ORACLE:
        train, test = painted(train), painted(test)
    options = WAYS[way] | PROBES[question] | {"lr": (rate or chosen(read_cells(CELLS), line, question, way),)}
    one: dict[str, Any] = {"shots": labels, "seed": seed, "seeds": 1, "baseline": False}
    found = mmssl.adapt(network(line, seed), train, test, label=question, **one, **options)
    scores = found.rows[0].metrics | {"constant": found.row("constant").metrics[SCORES[question]]}
    return {key: round(value, 5) for key, value in scores.items()}


def choices(line: str, asked: Iterable[tuple[str, str]] = tuple(ASKED)) -> list[tuple[Any, ...]]:
    """Cells by which learning rates are chosen; a tuned network has one for both questions."""
    rates = {one: RATES[one] for one in asked if len(RATES[one]) > 1 and one != (CLASSES, TUNED)}
    return [(line, *one, CHOSEN_WITH, 0, rate) for one, some in rates.items() for rate in some]


def chosen(cells: Cells, line: str, question: str, way: str) -> float:
    """The learning rate of the best score on validation scenes."""
    rates = RATES[question, way]
    if line == ORACLE or len(rates) == 1:
        return max(rates)
    asked = FIGURE if way == TUNED else question
    return max(rates, key=lambda rate: cells[f"{line} {asked} {way} {CHOSEN_WITH} 0 {rate}"][SCORES[asked]])


def oracle() -> Any:
    """An encoder that is shown class numbers, and says which share of each of 32 x 32 places is of which class."""
    import torch
    from torch import nn
    from torch.nn import functional as F

    from mmssl.encoders.base import Encoder, Features, at_depth

    class Oracle(Encoder):
        modality, dim = "image", 10

        def __init__(self) -> None:
            super().__init__()
            self.spec, self.place = {"model": "oracle", "modality": "image"}, nn.Parameter(torch.empty(0))

        def layers(self, x: torch.Tensor, valid: torch.Tensor | None = None) -> dict[str, Features]:
            hot = F.one_hot(x[:, 0].long(), self.dim).movedim(3, 1).float()
            shares = F.avg_pool2d(hot, SIZE // 32)
            return {"places": at_depth(shares.flatten(2).transpose(1, 2), tuple(shares.shape[2:]))}

    return Oracle()


def painted(batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """With class numbers as the picture."""
    return [{**batch, "image": batch[CLASSES][:, None].expand(-1, 3, -1, -1)} for batch in batches]


def table(cells: Cells) -> str:
    """Markdown: a row a line and way, mean and deviation over the seeds, in brackets over the untrained network.

    What has not been asked of every seed yet is left out.
    """
    asked = [(question, way, n) for (question, way), counts in ASKED.items() for n in counts]
    columns = list(dict.fromkeys((q, n) for q, way, n in asked if _scores(cells, UNTRAINED, q, way, n)))
    heads = [f"{HEADS[question]}, {labels:,} labels" for question, labels in columns]
    rows = ["| " + " | ".join(["network", *heads]) + " |", "|---" * (len(heads) + 1) + "|"]
    for way in WAYS:
        for line in (UNTRAINED, *TASKS):
            found = []
            for question, labels in columns:
                own, first = (_scores(cells, one, question, way, labels) for one in (line, UNTRAINED))
                gains = [a - b for a, b in zip(own, first, strict=False)] if line != UNTRAINED else []
                gain = f" ({statistics.fmean(gains):+.1f} ± {statistics.stdev(gains):.1f})" if gains else ""
                found.append(spread(own) + gain if own else "")
            name = "from scratch" if (line, way) == (UNTRAINED, TUNED) else f"{line}, {way}"
            if any(found):
                rows.append(f"| {name} | {' | '.join(found)} |")
    for name, line, key in ((ORACLE, ORACLE, ""), ("constant answer", UNTRAINED, "constant")):
        known = [_scores(cells, line, question, FROZEN, labels, [0], key) for question, labels in columns]
        rows.append(f"| {name} | {' | '.join(spread(one) if one else '' for one in known)} |")
    return "\n".join(rows)


def _scores(
    cells: Cells, line: str, question: str, way: str, labels: int, seeds: Sequence[int] = SEEDS, key: str = ""
) -> list[float]:
    """In percent, of each seed; none where one is missing."""
    names = [f"{line} {question} {way} {labels} {seed}" for seed in seeds]
    return [100 * cells[name][key or SCORES[question]] for name in names] if all(n in cells for n in names) else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words = (UNTRAINED, *TASKS, *HEADS, *WAYS)
    parser.add_argument("what", nargs="*", help=f"lines, questions, ways, seeds, out of {', '.join(words)} and numbers")
    parser.add_argument("--table", action="store_true", help="only the table, into docs/results.md")
    given = parser.parse_args()
    if unknown := [word for word in given.what if word not in words and not word.isdigit()]:
        parser.error(f"there is no '{unknown[0]}' here; there are {', '.join(words)}")
    if not given.table:
        lines = [word for word in given.what if word in (UNTRAINED, *TASKS)] or [UNTRAINED, *TASKS]
        questions = [word for word in given.what if word in HEADS] or list(HEADS)
        ways = [word for word in given.what if word in WAYS] or list(WAYS)
        seeds = [int(word) for word in given.what if word.isdigit()] or SEEDS
        pairs = [(question, way) for question, way in ASKED if question in questions and way in ways]
        asked = [(*one, labels) for one in pairs for labels in ASKED[one]]
        fill_cells(CELLS, [one for line in lines for one in choices(line, pairs)], measure, workers=1)
        wanted: list[tuple[Any, ...]] = [(ORACLE, q, way, n, 0) for q, way, n in asked if way == FROZEN and q != BOXES]
        wanted += [(line, *one, seed) for one in asked for seed in seeds for line in lines]
        fill_cells(CELLS, wanted, measure, workers=1)
    write_tables("scenes", table(read_cells(CELLS)))


if __name__ == "__main__":
    main()
