"""Regenerate the results table of the README, cell by cell: what is in scripts/results.json is not run again.

    MMSSL_DATA=path/to/data python scripts/results.py                     everything that is missing, then the table
    MMSSL_DATA=path/to/data python scripts/results.py simclr_emoji 0 1    one recipe, two seeds
    python scripts/results.py --table                                     only the table, into README.md

A cell is one recipe with one seed: pretrain from the recipe, then measure on rows that were not trained on. Each number
stands beside that of the same networks random-initialised with the same seed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from tables import write_tables

ROOT = Path(__file__).resolve().parent.parent
CELLS = ROOT / "scripts" / "results.json"
SEEDS = {
    "simclr_emoji": (0, 1, 2),
    "rotation_emoji": (0, 1, 2),
    "contrastive_emoji": (0, 1, 2),
    "masked_language_wordnet": (0,),
    "temporal_alignment_folder": (0,),
}
CLIPS = {"train": 400, "test": 150}


def measure(name: str, seed: int) -> dict[str, float]:
    """Numbers of one cell; keys that end in `random` or `chance` are what they stand beside."""
    import mmssl
    from mmssl.cli import find_recipe

    with tempfile.TemporaryDirectory() as folder:
        # The final probe is made here, on the same features as every other number.
        changes: dict[str, Any] = {"training.seed": seed, "probe": None}
        if name == "temporal_alignment_folder":
            from mmssl.data.toy import write_clips

            for split, rows in CLIPS.items():
                write_clips(Path(folder) / "clips" / split, rows, split=split)
            changes["data.source"] = str(Path(folder) / "clips")
        began = time.perf_counter()
        run = mmssl.run(find_recipe(Path(name)), set=changes, out=Path(folder) / name, quiet=True)
        minutes = (time.perf_counter() - began) / 60
        if name == "masked_language_wordnet":
            numbers = language(run)
        elif name == "temporal_alignment_folder":
            numbers = alignment(run)
        else:
            numbers = category(run)
            if name == "contrastive_emoji":
                numbers |= emoji_retrieval(run)
    last = {f"pretext {key}": run.history[-1][key] for key in run.chance.metrics if key in run.history[-1]}
    return numbers | last | {"minutes": minutes}


def category(run: Any) -> dict[str, float]:
    """Accuracy of two probes of the category of emoji, on concepts that were not trained on."""
    import mmssl

    numbers: dict[str, float] = {}
    for probe in ("knn", "logistic"):
        scores = mmssl.adapt(
            run.encoders["image"],
            run.recipe.data,
            label="category",
            probe=probe,
            groups="concept",
            seed=run.recipe.training.seed,
            seeds=1,
        )
        by_name = {row.encoder: row.accuracy for row in scores.rows}
        numbers |= {probe: by_name["pretrained"], f"{probe} random": by_name["random"]}
        numbers["majority"] = by_name["constant"]
    return numbers


def emoji_retrieval(run: Any) -> dict[str, float]:
    """Image to text among the distinct names of concepts that were not trained on, and the other way round."""
    import mmssl

    scores = mmssl.adapt(run.objective, run.recipe.data, probe="retrieval", baseline=False)
    there, back = (scores.row("pretrained", query).recall for query in ("image", "text"))
    by_chance = {query: scores.row("chance", query).recall for query in ("image", "text")}
    return {
        "image to text R@1": there[1],
        "image to text R@10": there[10],
        "image to text R@10 chance": by_chance["image"][10],
        "text to image R@10": back[10],
        "text to image R@10 chance": by_chance["text"][10],
        "gallery": scores.items["text"],
    }


def language(run: Any) -> dict[str, float]:
    """Masked loss on unseen definitions beside the unigram model's, and probes of the class of the defined noun."""
    import datasets
    import torch

    import mmssl
    from mmssl.data.loader import read
    from mmssl.ops.draws import Draws

    counts: Counter[int] = Counter()
    for batch in read(run.recipe.data, ("text",), tokenizers=run.tokenizers):
        counts.update(batch["text"][batch["text_mask"]].tolist())
    size = run.tokenizers["text"].vocab_size
    total = sum(counts.values()) + size
    unigram = torch.tensor([math.log((counts[token] + 1) / total) for token in range(size)])
    ours = baseline = tokens = 0.0
    held_out = run.recipe.data.model_copy(update={"split": "test", "limit": 4096})
    for step, batch in enumerate(read(held_out, ("text",), tokenizers=run.tokenizers)):
        with torch.no_grad():
            inputs = run.objective.transform(batch, Draws(0, step, len(batch["id"])))
            loss = run.objective(inputs)["loss"].item()
        count = float(inputs["masked_count"])
        ours += loss * count
        baseline -= unigram[inputs["target"][inputs["chosen"]]].sum().item()
        tokens += count

    numbers: dict[str, float] = {"held-out loss": ours / tokens, "held-out loss unigram": baseline / tokens}
    files = {split: f"{os.environ['MMSSL_DATA']}/wordnet/{split}.parquet" for split in ("train", "test")}
    nouns = datasets.load_dataset("parquet", data_files=files).filter(
        lambda row: row["category"].startswith("noun.") and row["category"] != "noun.Tops"
    )
    train, test = (nouns[split].shuffle(seed=0).select(range(n)) for split, n in (("train", 12000), ("test", 4000)))
    for shots in (10, 100):
        scores = mmssl.adapt(
            run.encoders["text"],
            train,
            test,
            label="category",
            probe="logistic",
            shots=shots,
            data=run.recipe.data,
        )
        by_name = {row.encoder: row.accuracy for row in scores.rows}
        numbers |= {f"noun class, {shots} a class": by_name["pretrained"]}
        numbers |= {f"noun class, {shots} a class random": by_name["random"]}
    return numbers


def alignment(run: Any) -> dict[str, float]:
    """Pair ranking on unseen clips read back from mp4, and what is left of it without motion and without sound."""
    import torch

    from mmssl.data.loader import read
    from mmssl.ops.draws import Draws

    batches = list(read(run.recipe.data.model_copy(update={"split": "test"}), run.objective.needs, batch_size=16))
    edits = {
        "pair ranking": lambda batch: {},
        "pair ranking, frozen frame": lambda batch: {"video": batch["video"][:, :1].expand_as(batch["video"])},
        "pair ranking, silence": lambda batch: {"audio": torch.zeros_like(batch["audio"])},
    }
    numbers: dict[str, float] = {}
    for name, edit in edits.items():
        ranking = rows = 0.0
        for step, batch in enumerate(batches):
            with torch.no_grad():
                inputs = run.objective.transform({**batch, **edit(batch)}, Draws(0, step, len(batch["id"])))
                losses = run.objective.loss(run.objective.predict(inputs), inputs)
            ranking += losses["ranking"].item() * len(batch["id"])
            rows += len(batch["id"])
        numbers |= {name: ranking / rows, f"{name} chance": 0.5}
    return numbers


def table(cells: dict[str, dict[str, float]]) -> str:
    """Markdown: a row a recipe and number, mean and standard deviation over the seeds, beside its baseline."""
    lines = [
        "| recipe | measured on unseen rows | pretrained | random-initialised, chance or baseline | seeds |",
        "|---|---|---|---|---|",
    ]
    for name, seeds in SEEDS.items():
        runs = [cells[f"{name} {seed}"] for seed in seeds if f"{name} {seed}" in cells]
        for key in runs[0] if runs else ():
            beside = next(
                (f"{key} {word}" for word in ("random", "chance", "unigram") if f"{key} {word}" in runs[0]), ""
            )
            if beside:
                own, other = ([run[k] for run in runs] for k in (key, beside))
                what = f"{key} probe of category" if key in ("knn", "logistic") else key
                unit = "" if "loss" in key else " %"
                lines.append(f"| `{name}` | {what} | {_cell(own, unit)} | {_cell(other, unit)} | {len(runs)} |")
    return "\n".join(lines)


def _cell(values: list[float], unit: str) -> str:
    values = [value * 100 for value in values] if unit else values
    digits = 1 if unit else 3
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 and statistics.stdev(values) > 0 else ""
    return f"{statistics.fmean(values):.{digits}f}{spread}{unit}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", help=f"recipes and seeds; recipes are {', '.join(SEEDS)}")
    parser.add_argument("--table", action="store_true", help="only the table, into README.md")
    given = parser.parse_args()
    if unknown := [word for word in given.what if word not in SEEDS and not word.isdigit()]:
        parser.error(f"there is no cell of '{unknown[0]}'; recipes are {', '.join(SEEDS)}")
    if not given.table:
        names = [word for word in given.what if word in SEEDS] or list(SEEDS)
        chosen = [int(word) for word in given.what if word.isdigit()]
        for name in names:
            for seed in chosen or SEEDS[name]:
                cells = json.loads(CELLS.read_text()) if CELLS.exists() else {}
                if f"{name} {seed}" in cells:
                    continue
                numbers = measure(name, seed)
                cells = json.loads(CELLS.read_text()) if CELLS.exists() else {}
                cells[f"{name} {seed}"] = {key: round(value, 6) for key, value in numbers.items()}
                CELLS.write_text(json.dumps(dict(sorted(cells.items())), indent=1) + "\n")
                print(name, seed, cells[f"{name} {seed}"], flush=True)
    text = table(json.loads(CELLS.read_text()))
    write_tables("results", text)


if __name__ == "__main__":
    main()
