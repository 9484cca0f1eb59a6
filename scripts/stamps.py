"""Do spoken captions find their sentences and pictures? Three modalities of Tux Paint's stamps, one budget; resumable.

    MMSSL_DATA=path/to/data python scripts/stamps.py                    every missing cell, then the table
    MMSSL_DATA=path/to/data python scripts/stamps.py binding_speech 0   some lines or seeds
    python scripts/stamps.py --table                                    only the table, into docs/results.md

A stamp is a picture, a sentence about it in four languages, and each sentence spoken by a person, mostly one a
language. The networks learn from 549 stamps; then 143 others are asked about, of one language at a time, because who
speaks would tell the language. `contrastive` learns from speech and sentences alone. `binding_picture` binds both to
the picture, and never hears a sentence read; `binding_speech` binds picture and sentence to the speech. `after masked`
first fills in hidden parts of the same spectrograms without any sentence. The other lines are the same networks before
their first step, a rule that knows how long a sentence takes to say, and chance. A cell is one line and one seed, kept
in scripts/stamps.json and not run again.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from tables import Cells, fill_cells, read_cells, spread, write_tables

ROOT = Path(__file__).resolve().parent.parent
CELLS = ROOT / "scripts" / "stamps.json"
HOME = ROOT / "build" / "stamps"
SEEDS = (0, 1, 2)
LANGUAGES = ("ca", "es", "fr", "ro")
RATE, SECONDS, SIZE, LENGTH = 16000, 2.56, 32, 48
STEPS, ROWS, WIDTH = 200, 64, 128
KS = (1, 10)
AUDIO = {
    "model": "timm/vit_tiny_patch16_224",
    **{"mels": 64, "img_size": [64, 256], "patch_size": [64, 8], "embed_dim": WIDTH, "depth": 3, "num_heads": 4},
    **{"class_token": False, "global_pool": "avg"},
}
IMAGE = {"model": "timm/resnet10t", "channels": [16, 32, 64, 128], "stem_width": 8}
TEXT = {
    **{"model": "transformers/bert", "tokenizer": "train:500", "hidden_size": WIDTH, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "intermediate_size": 2 * WIDTH},
    **{"hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0},
}
CROP = {"area": [0.5, 1.0]}
BINDING = {"name": "binding", "width": WIDTH, "views": CROP}
TASKS: dict[str, dict[str, Any]] = {
    "contrastive": {"name": "contrastive", "a": "audio", "b": "text", "width": WIDTH},
    "contrastive after masked": {"name": "contrastive", "a": "audio", "b": "text", "width": WIDTH},
    "binding_picture": {**BINDING, "anchor": "image", "others": ["audio", "text"]},
    "binding_speech": {**BINDING, "anchor": "audio", "others": ["image", "text"]},
}
MASKED = {"name": "masked_autoencoder", "encoder": "audio", "mask_ratio": 0.6, "decoder_depth": 1, "norm_pix": True}
PAIRS = (("audio", "text"), ("audio", "image"), ("image", "text"))
SPOKEN = {"audio": "speech", "text": "sentence", "image": "picture"}
UNTRAINED, DURATION, CHANCE = "untrained", "duration alone", "chance"
NAMES = {
    "contrastive": "speech and sentences",
    "contrastive after masked": "speech and sentences, after masked speech",
    "binding_picture": "speech and sentences, each with pictures",
    "binding_speech": "pictures and sentences, each with speech",
    UNTRAINED: "the networks before training",
    DURATION: DURATION,
}


def write_rows() -> None:
    """Rows that are spoken, of the four languages: the training rows, and the others one language a file."""
    import datasets

    if (HOME / f"test_{LANGUAGES[-1]}.parquet").exists():
        return
    HOME.mkdir(parents=True, exist_ok=True)
    for split in ("train", "validation", "test"):
        source = Path(os.environ["MMSSL_DATA"]) / "stamps" / f"{split}.parquet"
        rows = datasets.load_dataset("parquet", data_files=str(source), split="train")
        rows = rows.filter(lambda row: row["audio"] is not None and row["language"] in LANGUAGES)
        rows.to_parquet(HOME / f"{split}.parquet")
        for language in LANGUAGES if split != "train" else ():
            own = rows.filter(lambda row, language=language: row["language"] == language)
            own.to_parquet(HOME / f"{split}_{language}.parquet")


def recipe(task: str, seed: int, steps: int = STEPS) -> dict[str, Any]:
    """What a cell trains."""
    objective = TASKS[task]
    names = [objective["a"], objective["b"]] if "a" in objective else [objective["anchor"], *objective["others"]]
    encoders = {"image": IMAGE, "audio": AUDIO, "text": TEXT}
    return {
        "encoders": {name: encoders[name] for name in encoders if name in names},
        "objective": objective,
        "data": {
            "source": str(HOME / "train.parquet"),
            "start": "first",
            "cache": str(HOME / "decoded"),
            "image": {"size": SIZE},
            "audio": {"rate": RATE, "seconds": SECONDS},
            "text": {"length": LENGTH},
        },
        "training": {
            **{"steps": steps, "batch_size": ROWS, "seed": seed, "log_every": 20, "save_every": steps, "clip": 1.0},
            **{"optimizer": {"lr": 1e-3, "weight_decay": 0.05}, "schedule": {"warmup": 20}},
        },
    }


def measure(line: str, seed: int, split: str = "test", steps: int = STEPS) -> dict[str, Any]:
    """Numbers of one cell: pair -> query -> share of queries that find the right item among the first 1 and 10."""
    import torch

    import mmssl
    from mmssl import recipe as recipes
    from mmssl.build import build

    torch.set_num_threads(1)
    began = time.perf_counter()
    if line == DURATION:
        return by_duration(split)
    spec = recipe("binding_speech" if line == UNTRAINED else line, seed, steps)
    (data,) = recipes.load(spec).sources().values()
    with tempfile.TemporaryDirectory() as out:
        if line == UNTRAINED:
            task, told = build(recipes.load(spec))[0].eval(), {}
        else:
            if "after masked" in line:
                before = {**spec, "encoders": {"audio": AUDIO}, "objective": MASKED}
                mmssl.run(before, out=Path(out) / "masked", quiet=True)
                spec["encoders"]["audio"] = {"model": AUDIO["model"], "pretrained": str(Path(out) / "masked")}
            run = mmssl.run(spec, out=Path(out) / "run", quiet=True)
            task, told = run.objective, {"loss": round(run.history[-1]["loss"], 4)}
    cell: dict[str, Any] = {}
    for a, b in PAIRS:
        if {a, b} <= set(task.encoders):
            first, second = (b, a) if b == spec["objective"].get("anchor") else (a, b)
            asked: dict[str, Any] = {"a": first, "b": second, "ks": KS, "seed": seed, "seeds": 1, "baseline": False}
            tests = [data.model_copy(update={"source": str(HOME / f"{split}_{own}.parquet")}) for own in LANGUAGES]
            found = [mmssl.adapt(task, data, test, probe="retrieval", **asked) for test in tests]
            for encoder, title in (("pretrained", f"{a} {b}"), (CHANCE, f"{a} {b} {CHANCE}")):
                for query, other in ((a, b), (b, a)):
                    rows = [one.row(encoder, f"{query} to {other}").metrics for one in found]
                    cell.setdefault(title, {})[query] = means([[row[f"recall_at_{k}"] for k in KS] for row in rows])
    return {**cell, **told, "minutes": round((time.perf_counter() - began) / 60, 2)}


def by_duration(split: str) -> dict[str, Any]:
    """Rank by how near the length of a sound is to what so many letters take, a straight line of the training rows."""
    import datasets

    from mmssl.media.audio import decode_audio

    def lengths(name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        rows = datasets.load_dataset("parquet", data_files=str(HOME / f"{name}.parquet"), split="train")
        seconds = [float(decode_audio(row["audio"], RATE, 10.0)[1].sum()) / RATE for row in rows]
        return np.log(seconds), np.log([len(row["text"]) for row in rows]), np.array(rows["language"])

    spoken, letters, language = lengths("train")
    found: dict[str, list[list[float]]] = {"audio": [], "text": []}
    for own in LANGUAGES:
        line = np.polyfit(letters[language == own], spoken[language == own], 1)
        heard, read, _ = lengths(f"{split}_{own}")
        apart = np.abs(heard[:, None] - np.polyval(line, read)[None])
        for query, distance in (("audio", apart), ("text", apart.T)):
            rank = (distance <= np.diag(distance)[:, None]).sum(1)  # ties count against the rule
            found[query].append([float((rank <= k).mean()) for k in KS])
    return {"audio text": {query: means(runs) for query, runs in found.items()}}


def means(rows: list[list[float]]) -> list[float]:
    """Of each column."""
    return [round(statistics.fmean(column), 5) for column in zip(*rows, strict=True)]


def table(cells: Cells) -> str:
    """Markdown: a row a line, R@1 and R@10 of both directions of each pair, mean and deviation over the seeds."""
    ways = [(a, b, query) for a, b in PAIRS for query in (a, b)]
    heads = [f"{SPOKEN[query]} to {SPOKEN[b if query == a else a]} R@1, R@10" for a, b, query in ways]
    found = ["| " + " | ".join(["learned from", *heads, "seeds"]) + " |", "|---" * (len(heads) + 2) + "|"]
    lines = [(title, line, "") for line, title in NAMES.items()] + [(CHANCE, UNTRAINED, f" {CHANCE}")]
    for title, line, end in lines:
        runs = [cell for key, cell in cells.items() if key.rpartition(" ")[0] == line]
        columns = [
            ", ".join(spread([100 * run[f"{a} {b}{end}"][query][i] for run in runs]) for i in range(len(KS)))
            if runs and f"{a} {b}{end}" in runs[0]
            else ""
            for a, b, query in ways
        ]
        found += [f"| {title} | {' | '.join(columns)} | {len(runs)} |"] if runs else []
    return "\n".join(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", help=f"lines and seeds; lines are {', '.join(map(repr, NAMES))}")
    parser.add_argument("--table", action="store_true", help="only the table, into docs/results.md")
    parser.add_argument("--workers", type=int, default=1, help="cells side by side, one thread each; 1 by default")
    given = parser.parse_args()
    if unknown := [word for word in given.what if word not in NAMES and not word.isdigit()]:
        parser.error(f"there is no line '{unknown[0]}'; there are {', '.join(NAMES)}")
    if not given.table:
        lines = [word for word in given.what if word in NAMES] or list(NAMES)
        seeds = [int(word) for word in given.what if word.isdigit()] or list(SEEDS)
        write_rows()
        wanted = [(line, seed) for seed in seeds for line in lines if line != DURATION or seed == SEEDS[0]]
        fill_cells(CELLS, wanted, measure, workers=given.workers)
    write_tables("stamps", table(read_cells(CELLS)))


if __name__ == "__main__":
    main()
