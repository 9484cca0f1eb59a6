"""Which pretext task gives the encoder that transfers best? Every image task, one budget, on real emoji; resumable.

    MMSSL_DATA=path/to/data python scripts/compare_tasks.py                    every missing cell, then the tables
    MMSSL_DATA=path/to/data python scripts/compare_tasks.py rotation cnn 0 1   some tasks, networks or seeds
    python scripts/compare_tasks.py --table                                    only the tables, into docs/results.md

Two artists' drawings are pretrained on; the category is then probed on a third artist's drawings of concepts that were
never seen. A cell is one task, one network and one seed, kept in scripts/compare_tasks.json and not run again. All
tasks have the same steps, optimizer and number of pictures through the encoder a step; nothing is tuned for a task.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tables import Cells, fill_cells, read_cells, spread, write_tables

ROOT = Path(__file__).resolve().parent.parent
CELLS = ROOT / "scripts" / "compare_tasks.json"
SEEDS = (0, 1, 2)
STYLES = ("google", "twitter")
UNSEEN = "openmoji"
SIZE = 32
STEPS = 200
PICTURES = 128
NETWORKS: dict[str, dict[str, Any]] = {
    "cnn": {"model": "timm/resnet10t", "channels": [32, 64, 128, 256], "stem_width": 16},
    "vit": {
        "model": "timm/vit_tiny_patch16_224",
        "img_size": SIZE,
        "patch_size": 4,
        "embed_dim": 64,
        "depth": 4,
        "num_heads": 4,
    },
}
RATES = {"cnn": 2e-3, "vit": 1e-3}
# Crops alike for all tasks; views as SimCLR's for pictures of 32 pixels: weaker colors, no blur.
CROP = {"area": [0.2, 1.0]}
VIEWS = {"views": {"strength": 0.5, "blur": 0, "solarize": 0, **CROP}}
HEAD = {"hidden": 512, "width": 128}
# What differs from the published hyper-parameters, pictures of 32 pixels that one row puts through the encoder, and the
# side to which rows are decoded where tiles are cut from a larger picture. Momenta are those of short runs.
TASKS: dict[str, tuple[dict[str, Any], float, int]] = {
    "rotation": ({"views": {**CROP, "flip": 0.0}}, 4, SIZE),
    "jigsaw": ({"tile": 16, "tile_width": 128, "hidden": 512}, 2, 64),
    "relative_position": ({"patch": 16, "grids": 1, "hidden": 512}, 2, 64),
    "autoencoder": ({"views": CROP, "width": 32}, 1, SIZE),
    "autoencoder+denoising": ({"views": CROP, "width": 32, "noise": 0.3}, 1, SIZE),
    "inpainting": ({"overlap": 2, "width": 32, "discriminator_width": 16}, 1, SIZE),
    "colorization": ({"views": CROP, "width": 32}, 1, SIZE),
    "masked_autoencoder": ({"views": CROP, "decoder_depth": 1, "decoder_width": 64, "decoder_heads": 4}, 1, SIZE),
    "masked_autoencoder+simmim": ({"form": "simmim", "block": 8, "views": CROP}, 1, SIZE),
    "simclr": ({**VIEWS, **HEAD}, 2, SIZE),
    "moco": ({**VIEWS, **HEAD, "queue": 4096, "momentum": 0.99}, 2, SIZE),
    "moco+v3": ({**VIEWS, **HEAD, "form": "v3", "momentum": 0.97}, 2, SIZE),
    "byol": ({**VIEWS, **HEAD, "momentum": 0.97}, 2, SIZE),
    "simsiam": ({**VIEWS, "width": 256, "bottleneck": 64}, 2, SIZE),
    "barlow_twins": ({**VIEWS, "width": 512, "hidden": 512}, 2, SIZE),
    "vicreg": ({**VIEWS, "width": 512, "hidden": 512}, 2, SIZE),
    "dino": (
        {
            "views": {"blur": 0, "solarize": 0},
            "local_views": {"blur": 0},
            "local_crops": 4,
            "prototypes": 512,
            "hidden": 256,
            "bottleneck": 64,
            "momentum": 0.97,
        },
        3,
        SIZE,
    ),
    "rotation+jigsaw+colorization": (
        {
            "tasks": {
                "turn": {"name": "rotation", "views": {**CROP, "size": SIZE, "flip": 0.0}},
                "order": {"name": "jigsaw", "tile": 16, "tile_width": 128, "hidden": 512},
                "color": {"name": "colorization", "views": {**CROP, "size": SIZE}, "width": 32},
            }
        },
        7,
        64,
    ),
}
BASELINES = ("random", "pixels", "supervised")


def split_styles(folder: Path) -> None:
    """Parquet files without flags, disjoint by concept: two styles to train on, to test on the third or these two."""
    import datasets

    home = Path(os.environ["MMSSL_DATA"]) / "emoji"
    others = ["validation", "test"]
    for name, wanted, files in (
        ("unseen/train", STYLES, ["train"]),
        ("unseen/test", (UNSEEN,), others),
        ("seen/test", STYLES, others),
    ):
        rows = datasets.load_dataset("parquet", data_files=[str(home / f"{f}.parquet") for f in files], split="train")
        keep = rows.filter(lambda row, wanted=wanted: row["style"] in wanted and row["category"] != "Flags")
        (folder / name).parent.mkdir(exist_ok=True)
        keep.to_parquet(folder / f"{name}.parquet")


def recipe(task: str, network: str, seed: int, folder: str) -> dict[str, Any]:
    """What a cell trains."""
    hyper, pictures, size = TASKS[task]
    return {
        "encoders": {"image": NETWORKS[network]},
        "objective": {"name": "combine" if "tasks" in hyper else task.partition("+")[0], **hyper},
        "data": {"source": f"{folder}/unseen", "image": {"size": size}},
        "training": {
            "steps": STEPS,
            "batch_size": int(PICTURES / pictures),
            "seed": seed,
            "log_every": 10,
            "save_every": STEPS,
            "optimizer": {"lr": RATES[network], "weight_decay": 0.05},
            "schedule": {"warmup": 20},
        },
    }


def measure(task: str, network: str, seed: int, folder: str) -> dict[str, Any]:
    """Numbers of one cell: accuracy of both probes at every depth, and how the pretext task itself went."""
    import torch

    import mmssl
    from mmssl.decode_settings import ImageDecode
    from mmssl.recipe import Data

    torch.set_num_threads(1)
    began = time.perf_counter()
    cell: dict[str, Any] = {}
    from mmssl.encoders import reinitialized

    encoder = reinitialized(mmssl.encoder(modality="image", **NETWORKS[network]), seed)
    data = Data(source=f"{folder}/unseen", image=ImageDecode(size=SIZE))
    artists = data.model_copy(update={"source": f"{folder}/seen", "split": "test"})
    settings = {"label": "category", "groups": "concept", "seed": seed, "seeds": 1, "baseline": False}
    if task == "supervised":
        scores = mmssl.adapt(encoder, data, probe="finetune", steps=STEPS, batch_rows=PICTURES, **settings)
        return {"finetune": scores.score, "minutes": (time.perf_counter() - began) / 60}
    if task == "pixels":
        encoder = pixels()
    elif task != "random":
        with tempfile.TemporaryDirectory() as out:
            run = mmssl.run(recipe(task, network, seed, folder), out=Path(out) / "run", quiet=True)
        encoder = run.encoders["image"].eval()
        last = run.history[-1]
        cell = {key: round(last[key], 4) for key in ("loss", "spread", *run.chance.metrics) if key in last}
        cell |= {"verdict": [asdict(verdict) for verdict in run.verdict], "trained": (time.perf_counter() - began) / 60}
    for probe, options in (("knn", {}), ("logistic", {"c": (1e-3, 1e-2, 0.1)})):
        seen = mmssl.adapt(encoder, data, artists, probe=probe, **settings, **options)
        cell[f"{probe}, artists seen"] = round(seen.score, 4)
        scores = mmssl.adapt(encoder, data, probe=probe, layers=task != "pixels", **settings, **options)
        own = (row for row in scores.rows if row.encoder == "pretrained")
        cell[probe] = {row.part: round(row.metrics["accuracy"], 4) for row in own}
        cell["majority"] = round(scores.row("constant").metrics["accuracy"], 4)
    return cell | {"minutes": (time.perf_counter() - began) / 60}


def pixels() -> Any:
    """An encoder that only shrinks: its features are 16 x 16 colors."""
    import torch
    import torch.nn.functional as F

    from mmssl.encoders.base import Encoder, Features

    class Pixels(Encoder):
        modality, dim = "image", 3 * 16 * 16

        def __init__(self) -> None:
            super().__init__()
            self.one = torch.nn.Parameter(torch.ones(()))

        def forward(self, x: torch.Tensor, valid: torch.Tensor | None = None) -> Features:
            pooled = F.adaptive_avg_pool2d(x * self.one / 255, 16).flatten(1)
            return Features(pooled[:, None], pooled, (1,))

    return Pixels()


def possible(task: str, network: str) -> bool:
    """Masked tasks need tokens that can be left out."""
    return network == "vit" or not task.startswith("masked_autoencoder")


def tables(cells: Cells) -> str:
    """Markdown, one table a network: mean and standard deviation over the seeds, the best task first."""
    blocks = []
    for network in NETWORKS:
        found: dict[str, list[dict[str, Any]]] = {}
        for key, cell in cells.items():
            task, net, _ = key.split()
            if net == network:
                found.setdefault(task, []).append(cell)
        probed = {task: runs for task, runs in found.items() if "knn" in runs[0]}
        if not probed:
            continue
        depths = [d for d in max((runs[0]["logistic"] for runs in probed.values()), key=len) if d != "pooled"]
        lines = [
            f"| {network}: task | kNN | logistic | {' | '.join(f'at {d}' for d in depths)} | "
            "kNN, artists seen | pretext | seeds |",
            "|---" * (len(depths) + 6) + "|",
        ]
        for task, runs in sorted(probed.items(), key=lambda item: -_mean(item[1], "knn", "pooled")):
            row = [_cell(runs, "knn", "pooled"), _cell(runs, "logistic", "pooled")]
            row += [_cell(runs, "logistic", depth) for depth in depths]
            verdicts = " / ".join(dict.fromkeys(word for run in runs for word in _outcomes(run)))
            seen = [100 * run["knn, artists seen"] for run in runs if "knn, artists seen" in run]
            row.append(spread(seen) if seen else "")
            lines.append(f"| {task.replace('_', ' ')} | {' | '.join(row)} | {verdicts} | {len(runs)} |")
        if "supervised" in found:
            values = [100 * run["finetune"] for run in found["supervised"]]
            dash = " | ".join("" for _ in depths)
            lines.append(f"| supervised | | {spread(values)} | {dash} | | | {len(values)} |")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def _outcomes(run: dict[str, Any]) -> list[str]:
    """What became of each pretext task."""
    return [f"{verdict['task']} {verdict['outcome']}".strip() for verdict in run.get("verdict", [])]


def _mean(runs: list[dict[str, Any]], probe: str, depth: str) -> float:
    return statistics.fmean(run[probe].get(depth, 0.0) for run in runs)


def _cell(runs: list[dict[str, Any]], probe: str, depth: str) -> str:
    values = [100 * run[probe][depth] for run in runs if depth in run[probe]]
    return spread(values) if values else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("only", nargs="*", help="tasks, networks or seeds; all where left out")
    parser.add_argument("--table", action="store_true", help="only the tables, into docs/results.md")
    given = parser.parse_args()
    arguments: list[str] = given.only
    known = [*BASELINES, *TASKS, *NETWORKS, *map(str, SEEDS)]
    if unknown := [word for word in arguments if word not in known]:
        parser.error(f"there is no '{unknown[0]}' here; there are {', '.join(known)}")
    if not given.table:
        tasks = [a for a in arguments if a in (*TASKS, *BASELINES)] or [*BASELINES, *TASKS]
        networks = [a for a in arguments if a in NETWORKS] or list(NETWORKS)
        seeds = [int(a) for a in arguments if a.isdigit()] or SEEDS
        wanted = [(t, n, s) for s in seeds for t in tasks for n in networks if possible(t, n)]
        with tempfile.TemporaryDirectory() as folder:
            split_styles(Path(folder))
            fill_cells(CELLS, wanted, measure, folder)
    write_tables("tasks", tables(read_cells(CELLS)))


if __name__ == "__main__":
    main()
