"""Regenerate the results table of docs/results.md, cell by cell: what is in scripts/results.json is not run again.

    MMSSL_DATA=path/to/data python scripts/results.py                     everything that is missing, then the table
    MMSSL_DATA=path/to/data python scripts/results.py simclr_emoji 0 1    one recipe, two seeds
    python scripts/results.py --table                                     only the table, into docs/results.md

A cell is one recipe with one seed: pretrain from the recipe, then measure on rows that were not trained on. Each number
is shown with that of the same networks random-initialized with the same seed, and where there is one a seed, with the
difference of the two.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tables import Cells, fill_cells, read_cells, spread, write_tables

ROOT = Path(__file__).resolve().parent.parent
CELLS = ROOT / "scripts" / "results.json"
SEEDS = {
    "simclr_emoji": (0, 1, 2),
    "rotation_emoji": (0, 1, 2),
    "contrastive_emoji": (0, 1, 2),
    "rotation_fashion": (0, 1, 2),
    "simclr_fashion": (0, 1, 2),
    "temporal_alignment_folder": (0,),
    "temporal_alignment_skirmish": (0, 1, 2),
    "temporal_alignment_shift_skirmish": (0, 1, 2),
    "contrastive_audio_video_skirmish": (0, 1, 2),
}
CLIPS = {"train": 400, "test": 150}
# What is taken away from clips. Silence is the last bit of 16, as noise: tasks leave out rows whose sounds are equal.
EDITS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "": lambda batch: {},
    "frozen frame": lambda batch: {"video": batch["video"][:, :1].expand_as(batch["video"])},
    "another clip's picture": lambda batch: {"video": batch["video"].roll(1, dims=0)},
    "silence": lambda batch: {"audio": batch["audio"].new_empty(batch["audio"].shape).normal_() / 2**15},
    "untrained network": lambda batch: {},
}
# Labels a class that a probe of clothes learns from, and how many lists of them: the same for every recipe and seed.
SHOTS, LISTS = (10, 100), 3


def measure(name: str, seed: int) -> dict[str, float]:
    """Numbers of one cell; keys that end in `random` or `chance` are what they are compared with."""
    import mmssl

    with tempfile.TemporaryDirectory() as folder:
        # The final probe is made here, on the same features as every other number.
        changes: dict[str, Any] = {"training.seed": seed, "probe": None}
        if name == "temporal_alignment_folder":
            from mmssl.data.toy import write_clips

            for split, rows in CLIPS.items():
                write_clips(Path(folder) / "clips" / split, rows, split=split)
            changes["data.source"] = str(Path(folder) / "clips")
        began = time.perf_counter()
        run = mmssl.run(name, set=changes, out=Path(folder) / name, quiet=True)
        minutes = (time.perf_counter() - began) / 60
        if name.startswith("temporal_alignment"):
            numbers = alignment(run)
        elif name.endswith("_fashion"):
            numbers = few_labels(run)
        elif name == "contrastive_audio_video_skirmish":
            numbers = retrieval(run, ("audio", "video"))
        else:
            numbers = category(run)
            if name == "contrastive_emoji":
                numbers |= retrieval(run, ("image", "text"))
    last = {f"pretext {key}": run.history[-1][key] for key in run.chance.metrics if key in run.history[-1]}
    return {key: round(value, 6) for key, value in (numbers | last | {"minutes": minutes}).items()}


def category(run: Any) -> dict[str, float]:
    """Accuracy of two probes of the category of emoji, on concepts that were not trained on."""
    import mmssl

    numbers: dict[str, float] = {}
    for probe in ("knn", "logistic"):
        table = mmssl.adapt(
            run,
            encoder="image",
            label="category",
            probe=probe,
            groups="concept",
            seed=run.recipe.training.seed,
            seeds=1,
        )
        by_name = {row.encoder: row.metrics["accuracy"] for row in table.rows}
        numbers |= {probe: by_name["pretrained"], f"{probe} random": by_name["random"]}
        numbers["majority"] = by_name["constant"]
    return numbers


def few_labels(run: Any) -> dict[str, float]:
    """Accuracy of a probe of the kind of clothes that learns from few labels, mean over fixed lists of them.

    It reads the last features, of the network and of the one that it was before training.
    """
    import mmssl
    from mmssl.encoders import reinitialized

    encoder = run.encoders["image"]
    start = reinitialized(encoder, run.recipe.training.seed)
    numbers: dict[str, float] = {}
    for shots in SHOTS:
        for key, one in {"": encoder, " random": start}.items():
            table = mmssl.adapt(
                one, run.recipe.data, label="category", probe="logistic", shots=shots, seeds=LISTS, baseline=False
            )
            numbers[f"{shots} labels a class{key}"] = table.score
            numbers["majority"] = table.row("constant").metrics["accuracy"]
    return numbers


def retrieval(run: Any, sides: tuple[str, str]) -> dict[str, float]:
    """Each side of rows that were not trained on among the other sides that differ, and the other way round."""
    import mmssl

    table = mmssl.adapt(run, probe="retrieval")
    numbers: dict[str, float] = {}
    for query, found in (sides, sides[::-1]):
        way = f"{query} to {found}"
        kinds = ("pretrained", "random", "chance")
        metrics, random, chance = (table.row(encoder, way).metrics for encoder in kinds)
        if query == sides[0]:
            numbers[f"{way} R@1"] = metrics["recall_at_1"]
        numbers |= {f"{way} R@10": metrics["recall_at_10"], f"{way} R@10 random": random["recall_at_10"]}
        numbers[f"{way} R@10 chance"] = chance["recall_at_10"]
    return numbers | {"gallery": table.counts[f"{sides[1]} items"]}


def alignment(run: Any) -> dict[str, float]:
    """Right answers on unseen clips read back from mp4; without motion, of another clip, without sound, untrained."""
    from mmssl.audit.shortcuts import accuracy_of
    from mmssl.build import build
    from mmssl.data.loader import read

    batches = list(read(run.recipe.data.model_copy(update={"split": "test"}), run.objective.needs, batch_size=16))
    metric, chance = accuracy_of(run.objective)
    asked = "pair ranking" if metric == "ranking" else "right offset"
    found = answers(run.objective, build(run.recipe)[0].eval(), batches, metric)
    named = {f"{asked}, {edit}" if edit else asked: right for edit, right in found.items()}
    return {key: value for name, right in named.items() for key, value in ((name, right), (f"{name} chance", chance))}


def answers(task: Any, untrained: Any, batches: list[dict[str, Any]], metric: str, draws: int = 1) -> dict[str, float]:
    """What is taken away, "" for nothing -> share of right answers about clips; of both tasks in their present mode.

    Args:
        task: that learned.
        untrained: the same before its first step.
        batches: of clips that were not trained on.
        metric: entry of the losses that counts right answers.
        draws: how often each clip is asked about, with other windows.
    """
    import torch

    from mmssl.ops.draws import Draws

    numbers: dict[str, float] = {}
    for name, edit in EDITS.items():
        asked = untrained if "untrained" in name else task
        right = rows = 0.0
        for step, batch in enumerate(batches * draws):
            with torch.no_grad():
                inputs = asked.transform({**batch, **edit(batch)}, Draws(0, step, len(batch["id"])))
                losses = asked.loss(asked.predict(inputs), inputs)
            right += losses[metric].item() * len(batch["id"])
            rows += len(batch["id"])
        numbers[name] = right / rows
    return numbers


def table(cells: Cells) -> str:
    """Markdown: a row a recipe and number, mean and standard deviation over the seeds, with its baseline."""
    lines = [
        "| recipe | measured on unseen rows | pretrained | random-initialized or chance | difference | seeds |",
        "|---|---|---|---|---|---|",
    ]
    for name, seeds in SEEDS.items():
        runs = [cells[f"{name} {seed}"] for seed in seeds if f"{name} {seed}" in cells]
        for key in runs[0] if runs else ():
            baseline = next((f"{key} {word}" for word in ("random", "chance") if f"{key} {word}" in runs[0]), "")
            if baseline:
                own, other = ([100 * run[k] for run in runs] for k in (key, baseline))
                gain = spread([a - b for a, b in zip(own, other, strict=True)])
                columns = [f"{spread(own)} %", f"{spread(other)} %", gain if gain[0] == "-" else f"+{gain}"]
                lines.append(f"| `{name}` | {asked(key)} | {' | '.join(columns)} | {len(runs)} |")
    return "\n".join(lines)


def asked(key: str) -> str:
    """What a number of a cell is, in the words of the table."""
    if key in ("knn", "logistic"):
        return f"{key} probe of category"
    return f"logistic probe of category, {key}" if key.endswith("labels a class") else key


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", help=f"recipes and seeds; recipes are {', '.join(SEEDS)}")
    parser.add_argument("--table", action="store_true", help="only the table, into docs/results.md")
    given = parser.parse_args()
    if unknown := [word for word in given.what if word not in SEEDS and not word.isdigit()]:
        parser.error(f"there is no cell of '{unknown[0]}'; recipes are {', '.join(SEEDS)}")
    if not given.table:
        names = [word for word in given.what if word in SEEDS] or list(SEEDS)
        chosen = [int(word) for word in given.what if word.isdigit()]
        fill_cells(CELLS, [(name, seed) for name in names for seed in chosen or SEEDS[name]], measure, workers=1)
    write_tables("results", table(read_cells(CELLS)))


if __name__ == "__main__":
    main()
