"""Speed, start and memory of SimCLR, BYOL, MAE and DINO, end to end, against lightly and stable-pretraining.

Files in, trained steps out.

    python scripts/bench_peers.py                          small files, and photos cropped to 64 pixels
    python scripts/bench_peers.py --workers 0 2 --rounds 5 --methods simclr
    python scripts/bench_peers.py --workers 0 --pictures small

The first call makes an environment for both in build/peers: `python -m venv`, a .pth file that shows it the packages
of this Python (torch is 6 GB), then `pip install`, of stable-pretraining with the few of its needs that this asks for.
Pictures are scenes of the toy world, written once to build/peers-data. All sides read the same files and train the same
network of timm with the same batch and optimizer. They take turns, each time in a new process; every file is decoded
once, and the first steps are not counted in the speed. lightly's side is the training loop of its documentation:
`LightlyDataset`, `SimCLRTransform` and its like, `DataLoader`, its heads and losses. stable-pretraining's is its
`Module` with its own forward functions or methods, losses, transforms and callbacks, in Lightning's `Trainer` without
logger, checkpoints and bar. mmssl's is `fit`. Of DINO there are two crops and six of half their size, and 2,048
prototypes.

What a run of mmssl measures once, before its first step and after its last, is not counted in the speed either.

What differs: the others cut each view out of the file's pixels, image by image, with Pillow, in the workers. mmssl
decodes each file once to a square of fixed size and cuts the views out of that, on the device. "Same crops" decodes to
the file's own size, so that both cut the same pixels; "decoded small" decodes to the size of the view, which is what
most recipes do and gives small crops less detail. lightly's blur is Pillow's approximation and its MAE crops
bicubically.

The ratio is of CPU seconds of all processes, workers included, so that a busy machine changes little. "In time" is that
of seconds on the clock. Without workers, the time of an image is shown in parts: decoding, augmentation, network with
loss and gradient, optimizer. The time to the first step is that from the start of the process to the end of that step:
imports, data, network, and what mmssl measures before it. Memory is the most that the process that trains held at a
time, as Linux counts it.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import statistics
import subprocess
import sys
import sysconfig
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from bench_peers_sides import (
    DECODER,
    LOCAL_CROPS,
    PROTOTYPES,
    WARM_UP,
    Case,
    Watch,
    cpu_seconds,
    run_lightly,
    run_stable_pretraining,
)

ROOT = Path(__file__).resolve().parent.parent
HOME = ROOT / "build" / "peers"
PEERS = ["lightly==1.6.0"]
# Without what it needs for other things: wandb, minari, pylance, opencv ...
BARE = ["stable-pretraining==0.1.8", "lightning", "loguru", "requests-cache", "url-normalize", "cattrs", "platformdirs"]
BARE += ["kornia", "kornia_rs", "tabulate", "submitit", "prettytable"]
PARTS = "decoding + augmentation + network + optimizer"
SIDES = "lightly, stable-pretraining, mmssl"
COLUMNS = ("method", "pictures", "workers", f"images/s of a core: {SIDES}")
COLUMNS = (*COLUMNS, "over lightly (in time)", "over stable-pretraining (in time)")
COLUMNS = (*COLUMNS, "CPU s to the first step (in time)", "peak MiB", f"lightly, ms: {PARTS}", "mmssl")
# Pixels of the files, of a view, and of what mmssl decodes a file to.
PICTURES = {
    "small": ("32 px", 32, 32, 32),
    "same": ("256 px, same crops", 256, 64, 256),
    "decoded": ("256 px, decoded small", 256, 64, 64),
}


def enter_environment() -> None:
    """Go on in the peers' own environment; makes it where it is missing."""
    python = HOME / "bin" / "python"
    if Path(sys.prefix) == HOME:
        return
    if not (HOME / "ready").exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(HOME)], check=True)
        site = subprocess.run(
            [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
            check=True,
            capture_output=True,
            text=True,
        )
        shown = [sysconfig.get_path("purelib"), str(ROOT)]
        (Path(site.stdout.strip()) / "shown.pth").write_text("\n".join(shown))
        subprocess.run([python, "-m", "pip", "install", "--quiet", *PEERS], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", *BARE], check=True)
        (HOME / "ready").touch()
    os.execv(python, [str(python), *sys.argv])


def pictures(size: int, number: int) -> Path:
    """A folder of scenes: PNG files up to 64 pixels, JPEG files above."""
    from PIL import Image

    from mmssl.data.toy import ToySource

    folder, kind = ROOT / "build" / "peers-data" / str(size), "png" if size <= 64 else "jpg"
    folder.mkdir(parents=True, exist_ok=True)
    source = ToySource(rows=number, size=size)
    for i in range(number):
        path = folder / f"{i:05}.{kind}"
        if not path.exists():
            Image.fromarray(source.row(i)["image"]).save(path, quality=90)
    return folder


def run_mmssl(case: Case, workers: int, watch: Watch) -> None:
    import mmssl
    from mmssl.data.loader import Loader
    from mmssl.decode_settings import ImageDecode
    from mmssl.recipe import Data, Optimizer, Schedule, Training
    from mmssl.training.loop import fit

    network = {**case.network, "model": f"timm/{case.network['model_name']}"}
    del network["model_name"]
    views = {"size": case.view, **({} if case.blur is None else {"blur": case.blur})}
    hyper: dict[str, Any] = {
        "simclr": {"name": "simclr", "temperature": 0.5, "views": views},
        "byol": {"name": "byol", "hidden": 1024, "views": views},
        "mae": {
            "name": "masked_autoencoder",
            **{"views": {"size": case.view}, "norm_pix": False, "decoder_depth": DECODER["depth"]},
            **{"decoder_width": DECODER["embed_dim"], "decoder_heads": DECODER["num_heads"]},
        },
        "dino": {
            **{
                "name": "dino",
                "local_crops": LOCAL_CROPS,
                "views": views,
                "local_views": views | {"size": case.view // 2},
            },
            **PROTOTYPES,
        },
    }[case.method]
    objective = mmssl.objective(encoders={"image": mmssl.encoder(modality="image", **network)}, **hyper)
    objective.transform = watch.wrap("augmentation", objective.transform)
    after_step = objective.after_step

    def stop_after_last(progress: float) -> None:
        after_step(progress)
        if progress == 1.0:
            watch.stop()

    objective.after_step = stop_after_last  # type: ignore[method-assign]
    data = Data(source=str(case.folder), image=ImageDecode(size=case.decode))
    loader = Loader({"": data}, ["image"], batch_size=case.batch, seed=0, workers=workers)

    class Counted:
        steps_per_epoch = None

        def batches(self, start: int, stop: int) -> Iterator[Any]:
            inner = loader.batches(start, stop)
            for step in range(start, stop):
                if step == WARM_UP:
                    watch.start()
                with watch.part("decoding"):
                    batch = next(inner)
                yield batch

    plain = {"name": "sgd", "lr": 0.06, "weight_decay": 0.0, "momentum": 0.0}
    adamw = {"name": "adamw", "lr": 1.5e-4, "weight_decay": 0.01}
    training = Training(
        steps=case.steps,
        batch_size=case.batch,
        optimizer=Optimizer(**(adamw if case.method == "mae" else plain)),
        schedule=Schedule(name="constant"),
    )
    fit(objective, Counted(), training, quiet=True)


RUNS = (run_lightly, run_stable_pretraining, run_mmssl)


def measure(case: Case, side: int, workers: int) -> Watch:
    """One run, in the process that this is called in: a new one."""
    import psutil
    import torch
    from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    watch, entered = Watch(), [0.0]

    def enter(*_: Any) -> None:
        entered[0] = time.process_time()

    def leave(*_: Any) -> None:
        if not watch.first_cpu:
            watch.first_cpu, watch.first_wall = cpu_seconds(), time.time() - psutil.Process().create_time()
        if watch.running:
            watch.parts["optimizer"] += time.process_time() - entered[0]

    register_optimizer_step_pre_hook(enter)
    register_optimizer_step_post_hook(leave)
    with contextlib.redirect_stdout(sys.stderr):  # what stable-pretraining says is no part of the table
        RUNS[side](case, workers, watch)
    # Not getrusage: what it says is at least what the parent held when it started this process.
    watch.peak = int(re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[0]) / 1024
    return watch


def race(case: Case, workers: int, rounds: int) -> list[str]:
    """Cells of the table."""
    images = (case.steps - WARM_UP) * case.batch
    results = []
    for number in range(rounds):
        found = {}
        for turn in range(len(RUNS)):
            side = (number + turn) % len(RUNS)
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
                found[side] = fresh.submit(measure, case, side, workers).result()
        results.append([found[side] for side in range(len(RUNS))])
    sides = list(zip(*results, strict=True))
    over = [
        " ".join(
            form.format(statistics.median(getattr(row[peer], what) / getattr(row[-1], what) for row in results))
            for form, what in (("**{:.2f}x**", "cpu"), ("({:.2f}x)", "wall"))
        )
        for peer in (0, 1)
    ]

    def medians(form: str, what: str) -> list[str]:
        return [form.format(statistics.median(getattr(watch, what) for watch in side)) for side in sides]

    speeds = ", ".join(f"{statistics.median(images / watch.cpu for watch in side):.0f}" for side in sides)
    first = zip(medians("{:.1f}", "first_cpu"), medians("({:.1f})", "first_wall"), strict=True)
    shares = [shown(side, images) if not workers else "" for side in (sides[0], sides[-1])]
    return [speeds, *over, ", ".join(map(" ".join, first)), ", ".join(medians("{:.0f}", "peak")), *shares]


def shown(watches: tuple[Watch, ...], images: int) -> str:
    """Milliseconds an image: decoding, augmentation, network, optimizer."""
    parts = {
        name: statistics.median(w.parts[name] for w in watches) for name in ("decoding", "augmentation", "optimizer")
    }
    total = statistics.median(watch.cpu for watch in watches)
    network = total - sum(parts.values())
    row = (parts["decoding"], parts["augmentation"], network, parts["optimizer"])
    return " + ".join(f"{1000 * part / images:.2f}" for part in row)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--methods", nargs="+", default=["simclr", "byol", "mae", "dino"])
    parser.add_argument("--workers", nargs="+", type=int, default=[0, 2])
    parser.add_argument("--model", default="timm/resnet18", help="of all but MAE")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=8, help="counted ones of a run")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pictures", nargs="+", choices=PICTURES, default=[*PICTURES])
    options = parser.parse_args()
    enter_environment()
    number = options.batch * (options.steps + WARM_UP)
    print(f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|")
    for method in options.methods:
        for name, size, view, decode in (PICTURES[kind] for kind in options.pictures):
            case = Case(method, pictures(size, number), options, view, decode)
            for workers in options.workers:
                cells = race(case, workers, options.rounds)
                print(f"| {method} | {name} | {workers} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
