"""Does a second task help pictures find their names? Three tasks on pairs, one budget, real emoji; resumable.

    MMSSL_DATA=path/to/data python scripts/compare_pairs.py                    every missing cell, then the table
    MMSSL_DATA=path/to/data python scripts/compare_pairs.py contrastive 0 1    some tasks or seeds
    python scripts/compare_pairs.py --table                                    only the table, into docs/results.md

Two artists' drawings and their names are trained on. Retrieval is then asked for among concepts that were never seen,
drawn by these two artists and by a third one. A cell is one task and one seed, kept in scripts/compare_pairs.json and
not run again. All have the same towers, optimizer and pairs a step, and steps; nothing is tuned for a task. The others
are the same towers random-initialized, the linear maps of pixels and words that are learned from the same pairs, and
chance. The contrastive task is trained with a quarter and a half of the concepts, and with half and twice the steps, as
well: what would it take to find more than linear maps?
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tables import Cells, fill_cells, read_cells, spread, write_tables

ROOT = Path(__file__).resolve().parent.parent
CELLS = ROOT / "scripts" / "compare_pairs.json"
SEEDS = (0, 1, 2)
STYLES = ("google", "twitter")
UNSEEN = "openmoji"
TESTS = {"seen": "artists trained on", "unseen": "an artist never seen"}
SIZE, LENGTH = 32, 16
STEPS, PAIRS, WIDTH = 500, 128, 128
KS = (1, 5, 10)
RERANK = 16
LAYER = {"hidden_size": WIDTH, "num_attention_heads": 4, "intermediate_size": 256}
NO_DROPOUT = {"hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0}
TOWERS = {
    "image": {
        "model": "timm/vit_tiny_patch16_224",
        "img_size": SIZE,
        "patch_size": 8,
        "embed_dim": WIDTH,
        "depth": 3,
        "num_heads": 4,
        "class_token": False,
        "global_pool": "avg",
    },
    "text": {
        "model": "transformers/bert",
        "tokenizer": "train:3000",
        "num_hidden_layers": 2,
        **LAYER,
        **NO_DROPOUT,
    },
}
# Wider than the usual 0.02, at which so narrow a layer hardly looks at the other side.
BOTH = {"reads": ["image", "text"], "num_hidden_layers": 1, "initializer_range": 0.05, **LAYER, **NO_DROPOUT}
CROSS = {"model": "transformers/bert", **BOTH}
JOINT = {"model": "transformers/flava", **BOTH}
CROP = {"area": [0.5, 1.0]}
# What a cell trains: the fusion, and the task. Matching holds the contrastive term itself.
TASKS: dict[str, tuple[dict[str, Any] | None, dict[str, Any]]] = {
    "contrastive": (None, {"name": "contrastive", "width": WIDTH, "views": CROP}),
    "contrastive+matching": (CROSS, {"name": "matching", "width": WIDTH, "views": CROP}),
    "contrastive+masked_pair": (
        JOINT,
        {
            "name": "combine",
            "tasks": {
                "pair": {"name": "contrastive", "width": WIDTH, "views": CROP},
                "hidden": {"name": "masked_pair", "codes": 256, "views": CROP},
            },
        },
    ),
}
# The same task with other budgets: the share of the concepts that it learns from, and its steps.
BUDGETS = {
    "contrastive quarter": (0.25, 500),
    "contrastive half": (0.5, 500),
    "contrastive short": (1.0, 250),
    "contrastive": (1.0, 500),
    "contrastive long": (1.0, 1000),
}
ALL = dict.fromkeys([*TASKS, *BUDGETS])
BASELINES = {"random": "random-initialized towers", "raw": "linear maps of pixels and words", "chance": "chance"}


def split_styles(folder: Path) -> None:
    """Parquet files without flags, disjoint by concept: two styles to train on; to test, these two or the third.

    Of the training rows also a half and a quarter of the concepts, drawn once, the quarter from the half.
    """
    import datasets
    import numpy as np

    home = Path(os.environ["MMSSL_DATA"]) / "emoji"
    for name, styles, files in (
        ("train", STYLES, ["train"]),
        ("seen", STYLES, ["validation", "test"]),
        ("unseen", (UNSEEN,), ["validation", "test"]),
    ):
        rows = datasets.load_dataset("parquet", data_files=[str(home / f"{f}.parquet") for f in files], split="train")
        keep = rows.filter(lambda row, styles=styles: row["style"] in styles and row["category"] != "Flags")
        keep.to_parquet(folder / f"{name}.parquet")
        if name == "train":
            order = np.random.default_rng(0).permutation(sorted(set(keep["concept"])))
            for share in {share for share, _ in BUDGETS.values()} - {1.0}:
                some = set(order[: round(share * len(order))].tolist())
                part = keep.filter(lambda row, some=some: row["concept"] in some)
                part.to_parquet(folder / f"train-{share:g}.parquet")


def recipe(task: str, seed: int, folder: str) -> dict[str, Any]:
    """What a cell trains."""
    share, steps = BUDGETS.get(task, (1.0, STEPS))
    fusion, objective = TASKS["contrastive" if task in BUDGETS else task]
    rows = "train" if share == 1 else f"train-{share:g}"
    return {
        "encoders": TOWERS if fusion is None else {**TOWERS, "fusion": fusion},
        "objective": objective,
        "data": {"source": f"{folder}/{rows}.parquet", "image": {"size": SIZE}, "text": {"length": LENGTH}},
        "training": {
            "steps": steps,
            "batch_size": PAIRS,
            "seed": seed,
            "log_every": 10,
            "save_every": steps,
            "clip": 1.0,
            "optimizer": {"lr": 1e-3, "weight_decay": 0.05},
            "schedule": {"warmup": 20},
        },
    }


def measure(task: str, seed: int, folder: str) -> dict[str, Any]:
    """Numbers of one cell: retrieval on both tests, and how training itself went."""
    import torch

    import mmssl

    torch.set_num_threads(1)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as out:
        run = mmssl.run(recipe(task, seed, folder), out=Path(out) / "run", quiet=True)
    cell: dict[str, Any] = {"trained": round((time.perf_counter() - began) / 60, 2)}
    (data,) = run.recipe.sources().values()
    for test in TESTS:
        asked = data.model_copy(update={"source": f"{folder}/{test}.parquet"})
        # The linear maps do not depend on the seed, nor random weights on the task: once will do.
        baseline = task in BUDGETS
        scores = mmssl.adapt(
            run, data, asked, probe="retrieval", rerank=RERANK, seed=seed, seeds=1, baseline=baseline, ks=KS
        )
        cell[test] = {
            "items": {name: scores.counts[f"{name} items"] for name in ("image", "text")},
            "parts": scores.counts["parts that share nothing"],
            "rows": [
                [
                    row.encoder,
                    row.part.partition(" ")[0],
                    {k: round(row.metrics[f"recall_at_{k}"], 4) for k in KS},
                    row.metrics["median_rank"],
                ]
                for row in scores.rows
            ],
        }
    verdicts = [asdict(verdict) for verdict in run.verdict]
    return cell | {"verdict": verdicts, "minutes": round((time.perf_counter() - began) / 60, 2)}


def table(cells: Cells) -> str:
    """Markdown, one table a test: recall both ways, mean and standard deviation over the seeds."""
    blocks = []
    for test, title in TESTS.items():
        first = next(iter(cells.values()))[test]
        items = ", ".join(f"{number} {name}s" for name, number in first["items"].items())
        lines = [
            f"| {title} ({items}) | image to text R@1 | R@5 | R@10 | text to image R@1 | R@5 | R@10 | seeds |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for name, encoder, task in _lines():
            runs = [cell for key, cell in cells.items() if key.rpartition(" ")[0] == task]
            found = [_recalls(cell[test]["rows"], encoder) for cell in runs]
            found = [recalls for recalls in found if recalls]
            if found:
                columns = [spread([100 * recalls[i] for recalls in found]) for i in range(6)]
                lines.append(f"| {name} | {' | '.join(columns)} | {len(found)} |")
        blocks.append("\n".join(lines))
    return "\n\n".join([*blocks, curve(cells)])


def curve(cells: Cells) -> str:
    """Markdown: what more pairs and more steps bring, next to linear maps of the same pairs."""
    lines = [
        "| trained with | image to text R@10 | linear maps | text to image R@10 | linear maps | seeds |",
        "|---|---|---|---|---|---|",
    ]
    for task, (share, steps) in BUDGETS.items():
        runs = [cell["seen"]["rows"] for key, cell in cells.items() if key.rpartition(" ")[0] == task]
        if runs:
            found = [[_recalls(rows, encoder) for rows in runs] for encoder in ("pretrained", "raw")]
            told = [spread([100 * recalls[i] for recalls in of if recalls]) for i in (2, 5) for of in found]
            lines.append(f"| {share:.0%} of the concepts, {steps} steps | {' | '.join(told)} | {len(runs)} |")
    return "\n".join(lines)


def _lines() -> list[tuple[str, str, str]]:
    """Name of a line, the encoder and the task whose cells hold it."""
    lines = []
    for task in TASKS:
        name = task.replace("+", " + ").replace("_", " ")
        lines += [(name, "pretrained", task), (f"{name}, best {RERANK} re-ranked", "re-ranked", task)]
    return lines + [(name, encoder, "contrastive") for encoder, name in BASELINES.items()]


def _recalls(rows: list[list[Any]], encoder: str) -> list[float]:
    """Of image to text, then of text to image; empty where the table has no such line."""
    by_query = {query: recall for name, query, recall, _ in rows if name == encoder}
    return [by_query[query][k] for query in ("image", "text") for k in ("1", "5", "10")] if by_query else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", help=f"tasks and seeds; tasks are {', '.join(ALL)}")
    parser.add_argument("--table", action="store_true", help="only the table, into docs/results.md")
    parser.add_argument("--workers", type=int, default=2, help="cells side by side, one thread each; 2 by default")
    given = parser.parse_args()
    if unknown := [word for word in given.what if word not in ALL and not word.isdigit()]:
        parser.error(f"there is no task '{unknown[0]}' here; there are {', '.join(ALL)}")
    if not given.table:
        tasks = [word for word in given.what if word in ALL] or list(ALL)
        seeds = [int(word) for word in given.what if word.isdigit()] or SEEDS
        with tempfile.TemporaryDirectory() as folder:
            split_styles(Path(folder))
            wanted = [(task, seed) for seed in seeds for task in tasks]
            fill_cells(CELLS, wanted, measure, folder, workers=given.workers)
    write_tables("pairs", table(read_cells(CELLS)))


if __name__ == "__main__":
    main()
