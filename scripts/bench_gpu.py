"""What published tasks reach on one card: one table, in a few minutes and without a network.

    python scripts/bench_gpu.py                        on the first GPU
    python scripts/bench_gpu.py --cpu --tiny           small networks, to see that every row runs
    python scripts/bench_gpu.py --rows clip mae --minutes 2

Each row trains a network of published size in bf16, with a fused optimizer and convolutions with their channels last,
on noise of the shapes that its recipe decodes. `mmssl` is the loop in the middle of a long run, records of every tenth
step included; `bare loop` is transform, forward, backward and step of the same objective; both see the same batches in
memory and take turns. `reference` is other people's code on batches of the same shapes: open_clip's own
`train_one_epoch`, on pictures that are floats already, and transformers' models for pretraining in a bare loop, without
any augmentation.

MFU counts what the forward and backward pass of a row asks of the matrix units (`torch.utils.flop_counter`), over the
card's dense peak in the table of `plan.py`. Data-wait is the share of the time at which the loop waited for a batch of
mmssl's own loader, of toy rows that are decoded once and kept: what it takes to put batches together and to carry them.

What is not installed is named, and done without. Each row has its share of the minutes; a row that fails, or does not
fit, says so, and the table is printed with what is there.
"""

from __future__ import annotations

import argparse
import gc
import os
import signal
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from types import FrameType
from typing import Any

import torch
from bench_gpu_rows import Row, has, pictures, rows
from bench_loop import WARM_UP, Enough, Timed, bare, in_memory, looped
from plan import GPUS, operations, stand_in

from mmssl.batch import Batch
from mmssl.build import build_objective
from mmssl.data.decoding import cores_to_spare
from mmssl.data.loader import Loader
from mmssl.dry_run import noise
from mmssl.encoders.text import tokenizers_of
from mmssl.objectives.base import Objective
from mmssl.recipe import Recipe, load

POOL = 3
"""Different batches in memory."""
COLUMNS = ("row", "batch", "samples/s", "bare loop", "overhead", "reference", "over it", "MFU", "peak GiB", "data-wait")
OVERHEAD, DATA_WAIT = 0.01, 0.02


@dataclass
class Found:
    """What was measured of a row; what is missing was not."""

    batch: int
    plain: list[float] = field(default_factory=list)
    """Seconds a step."""
    loop: list[float] = field(default_factory=list)
    other: list[float] = field(default_factory=list)
    operations: float | None = None
    """Of a row."""
    gigabytes: float = 0.0
    data_wait: float | None = None
    note: str = ""

    def cells(self, peak: float | None, row: Row) -> list[str]:
        """Of the table, after the name."""

        def speed(times: Sequence[float]) -> str:
            return f"{self.batch / statistics.median(times):,.0f}" if times else "-"

        mfu, faster = self.mfu(peak), self.faster
        return [
            *(str(self.batch), speed(self.loop), speed(self.plain)),
            "-" if self.overhead is None else f"{self.overhead:+.1%}",
            f"{speed(self.other)} {row.reference[0]}" if row.reference and self.other else "-",
            "-" if faster is None else f"{faster:.2f}x",
            "-" if mfu is None else f"{mfu:.1%}",
            f"{self.gigabytes:.1f}" if self.gigabytes else "-",
            "-" if self.data_wait is None else f"{self.data_wait:.1%}",
        ]

    @property
    def overhead(self) -> float | None:
        """Of the loop, as a share of the bare one's time; the median of neighbors."""
        pairs = list(zip(self.loop, self.plain, strict=False))
        return statistics.median(loop / plain for loop, plain in pairs) - 1 if pairs else None

    @property
    def faster(self) -> float | None:
        """The reference's time over the loop's."""
        pairs = list(zip(self.other, self.loop, strict=False))
        return statistics.median(other / loop for other, loop in pairs) if pairs else None

    def mfu(self, peak: float | None) -> float | None:
        """Share of the card's peak, in operations a second."""
        if peak is None or self.operations is None or not self.loop:
            return None
        return self.operations * self.batch / statistics.median(self.loop) / peak

    def verdicts(self, peak: float | None, row: Row) -> list[str]:
        """The goals, met or missed."""
        goals = [
            ("MFU", self.mfu(peak), row.mfu, True, ".1%"),
            ("over the reference", self.faster, row.faster, True, ".2f"),
            ("overhead", self.overhead, OVERHEAD, False, ".1%"),
            ("data-wait", self.data_wait, DATA_WAIT, False, ".1%"),
        ]
        found = []
        for what, value, goal, least, form in goals:
            if goal is None:
                continue
            wish = f"{'at least' if least else 'below'} {goal:{form}}"
            if value is None:
                found.append(f"{what} {wish}: not measured")
            else:
                met = value >= goal if least else value < goal
                found.append(f"{what} {value:{form}}, {wish}: {'met' if met else 'MISSED'}")
        return found


def recipe_of(row: Row, tiny: bool, batch: int) -> Recipe:
    """The recipe of a row; a small one has its own sections in place of the others, key by key."""
    tree: dict[str, Any] = {key: dict(value) for key, value in row.recipe.items()}
    for section, value in (row.tiny if tiny else {}).items():
        tree[section] = tree[section] | dict(value) if section == "data" else dict(value)
    tree["data"] |= {"source": "toy", "limit": row.kept}
    tree["training"] = {"precision": "bf16", "batch_size": batch, "schedule": {"name": "constant"}} | tree["training"]
    return load(tree)


def measure(row: Row, found: Found, options: argparse.Namespace, device: torch.device, deadline: float) -> None:
    """Fill `found`, the most wanted figures first."""
    recipe = recipe_of(row, options.tiny, found.batch)
    torch.manual_seed(0)
    words = stand_in(recipe)
    objective = build_objective(recipe, words, where="recipe", pretrained=False)
    objective.to(device).train()
    pool = batches(recipe, objective)
    theirs = pool
    if row.reference and row.reference[0] == "open_clip":  # whose workers hand out floats; one is as large as the pool
        theirs = [pinned({"image": pictures(pool[0]), "text": pool[0]["text"]})]
    left = deadline - time.perf_counter()

    def timed(share: float, own: Sequence[Batch]) -> Timed:
        return Timed(in_memory(own), options.steps, device, time.perf_counter() + share * left)

    def freely() -> None:
        gc.collect()
        torch.cuda.empty_cache()

    for number in range(options.rounds):
        share = 0.7 / (3 * options.rounds)
        runs = [partial(bare, objective), partial(looped, objective)]
        for kind, run in list(enumerate(runs))[:: -1 if number % 2 else 1]:
            taken = run(timed(share, pool), recipe.training)
            (found.loop if kind else found.plain).append(taken.step)
            if kind:
                found.gigabytes = max(found.gigabytes, taken.gigabytes)
            objective.zero_grad()
            freely()
        if row.reference is not None:
            taken = timed(share, theirs)
            with suppress(Enough):
                row.reference[1](recipe, taken)
            found.other.append(taken.step)
            freely()
    found.operations = operations(recipe, objective, device)
    loader = Loader(
        recipe.sources(),
        objective.needs,
        batch_size=found.batch,
        seed=0,
        tokenizers=tokenizers_of(objective.exported),
        workers=options.workers,
    )
    taken = looped(objective, Timed(loader.batches, options.steps, device, deadline), recipe.training)
    found.data_wait = taken.data_wait


def batches(recipe: Recipe, objective: Objective) -> list[Batch]:
    """A few batches of noise."""
    whole = noise(recipe, objective, recipe.training.batch_size)
    return [pinned({key: value.roll(number, 0) for key, value in whole.items()}) for number in range(POOL)]


def pinned(batch: Batch) -> Batch:
    """In memory from which a card, where there is one, reads by itself."""
    return {key: value.pin_memory() if torch.cuda.is_available() else value for key, value in batch.items()}


def peak_of(device: torch.device) -> tuple[str, float | None]:
    """The card's name, and its dense peak of half precision in operations a second where it is known."""
    if device.type != "cuda":
        return "CPU", None
    name = torch.cuda.get_device_name(device)
    known = (gpu for gpu in GPUS if all(part in name.lower() for part in gpu.split("-")))
    gpu = next(known, None)
    return name, None if gpu is None else GPUS[gpu][0] * 1e12


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """TimeoutError for what hangs."""

    def end(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"not done in {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def measured(name: str, row: Row, options: argparse.Namespace, device: torch.device, seconds: float) -> Found:
    """A row within its time; what went wrong is a note."""
    ends = time.perf_counter() + seconds
    batch = 8 if options.tiny else row.batch
    missing = [package for package in row.asks if not has(package)]
    if missing:
        return Found(batch, note=f"needs {', '.join(missing)}")
    while True:
        found = Found(batch)
        try:
            with limited(max(1.0, 1.3 * (ends - time.perf_counter()))):
                measure(row, found, options, device, ends)
            return found
        except torch.OutOfMemoryError:
            found.note, batch = "out of memory", batch // 2
        except Exception as error:  # the table is printed with what is there
            found.note = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
            if options.strict:
                raise
            return found
        gc.collect()
        torch.cuda.empty_cache()
        if not batch:
            return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", action="store_true", help="although there may be a GPU")
    parser.add_argument("--tiny", action="store_true", help="small networks")
    parser.add_argument("--rows", nargs="+", default=[], help="those whose name has one of these in it")
    parser.add_argument("--minutes", type=float, default=4.5, help="of all rows together")
    parser.add_argument("--steps", type=int, default=30, help="timed in each run, unless time ends")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--workers", type=int, default=cores_to_spare())
    parser.add_argument("--strict", action="store_true", help="end with the error of a row that fails")
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() and not options.cpu else "cpu")
    name, peak = peak_of(device)
    absent = [package for package in ("timm", "open_clip", "datasets", "av") if not has(package)]
    print(f"{name}, torch {torch.__version__}, {options.workers} of {os.cpu_count()} cores decode")
    print(f"not installed, and done without: {', '.join(absent) or 'nothing'}")
    if peak is None:
        print("the peak of this device is not in the table of plan.py: no MFU")
    wanted = [part.lower() for part in options.rows] or [""]
    chosen = {name: row for name, row in rows().items() if any(part in name.lower() for part in wanted)}
    ends = time.perf_counter() + 60 * options.minutes
    results: dict[str, Found] = {}
    for number, (name, row) in enumerate(chosen.items()):
        seconds = (ends - time.perf_counter()) / (len(chosen) - number)
        results[name] = measured(name, row, options, device, max(1.0, seconds))
        print(f"{name}: {results[name].note or 'done'}, {ends - time.perf_counter():.0f} s left", flush=True)
    print(f"\n| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|")
    for name, found in results.items():
        print(f"| {name} | {' | '.join(found.cells(peak, chosen[name]))} | {found.note}".rstrip())
    print(f"\nsamples and steps: medians of {options.rounds} rounds of up to {options.steps} after {WARM_UP} others")
    for name, found in results.items():
        print(f"{name}: {'; '.join(found.verdicts(peak, chosen[name]))}")


if __name__ == "__main__":
    main()
