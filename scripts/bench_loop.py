"""What the loop costs over a bare PyTorch loop: same task, same batch in memory, runs in turn.

    python scripts/bench_loop.py            on the CPU or the first GPU
    python scripts/bench_loop.py --rounds 9 --steps 60 --model torchvision/resnet18

Prints the median time of a step in both, seconds of this process on a CPU and of the clock on a GPU, and the median
ratio of neighboring runs. The bare loop does what anybody would write: transform, forward, backward, step. Both are
timed in the middle of a run: records of every tenth step count, and what a run measures before its first step, after
its last, and at its tenths does not.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress

import torch
from plan import autocast

import mmssl
from mmssl.batch import Batch, count_rows, to_device
from mmssl.objectives.base import Objective
from mmssl.ops.draws import Draws
from mmssl.recipe import Training
from mmssl.training.loop import fit
from mmssl.training.optim import make_optimizer

WARM_UP = 5
ENDLESS = 10**9
"""Steps of the run of which a few are taken: its tenths are far away."""

Feed = Callable[[int, int], Iterator[Batch]]


class Enough(Exception):
    """The steps to be timed are done."""


class Timed:
    """Hands out batches, times the steps after the first ones, and then ends the run.

    Args:
        feed: what makes the batches of the steps from one number to another.
        steps: to be timed.
        device: that is waited for when the clock is read.
        deadline: of `time.perf_counter`, at which fewer steps will do.

    Attributes:
        done: steps timed.
        seconds: that they took: of the clock on a GPU, of this process on a CPU, which others may use as well.
        data_wait: share of the clock's time at which a batch was waited for.
        gigabytes: 2**30 bytes, the most that a GPU held; 0 on a CPU.
    """

    def __init__(self, feed: Feed, steps: int, device: torch.device, deadline: float = float("inf")) -> None:
        self.feed, self.steps, self.device, self.deadline = feed, steps, device, deadline
        self.done, self.seconds, self.data_wait, self.gigabytes = 0, 0.0, 0.0, 0.0

    def batches(self, start: int, stop: int) -> Iterator[Batch]:
        """See `mmssl.training.loop.Loader`."""
        inner, waited, began = self.feed(start, stop), 0.0, (0.0, 0.0)
        for step in range(start, stop):
            late = time.perf_counter() > self.deadline
            if step == WARM_UP:
                began, waited = self._now(), 0.0
                if self.device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats(self.device)
            elif step == WARM_UP + self.steps or (late and step > WARM_UP):
                clock, cpu = (now - before for now, before in zip(self._now(), began, strict=True))
                self.done, self.data_wait = step - WARM_UP, waited / clock
                self.seconds = clock if self.device.type == "cuda" else cpu
                if self.device.type == "cuda":
                    self.gigabytes = torch.cuda.max_memory_allocated(self.device) / 2**30
                raise Enough
            asked = time.perf_counter()
            batch = next(inner)
            waited += time.perf_counter() - asked
            yield batch

    def _now(self) -> tuple[float, float]:
        """Seconds of the clock and of this process, when the device has done all that it was told."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter(), time.process_time()

    @property
    def step(self) -> float:
        """Seconds of a step."""
        return self.seconds / self.done


def in_memory(batches: Sequence[Batch]) -> Feed:
    """The same few batches again and again."""
    return lambda start, stop: (batches[step % len(batches)] for step in range(start, stop))


def bare(objective: Objective, timed: Timed, training: Training) -> Timed:
    """Train without the loop."""
    device = timed.device
    objective.to(device).train()
    optimizer = make_optimizer(objective, training.optimizer)
    with suppress(Enough):
        for step, batch in enumerate(timed.batches(0, ENDLESS)):
            moved = to_device(batch, device)
            with torch.no_grad():
                inputs = objective.transform(moved, Draws(0, step, count_rows(batch), device=device))
            with autocast(training.precision, device):
                loss = objective(inputs)["loss"]
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return timed


def looped(objective: Objective, timed: Timed, training: Training) -> Timed:
    """Train with the loop, in the middle of a long run."""
    with suppress(Enough):
        fit(objective, timed, training.model_copy(update={"steps": ENDLESS}), quiet=True)
    return timed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--model", default="timm/test_resnet")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=32)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    image = torch.randint(0, 256, (options.batch, 3, options.size, options.size), dtype=torch.uint8)
    feed = in_memory([{"image": image, "id": torch.arange(options.batch)}])
    training = Training(batch_size=options.batch)
    torch.manual_seed(0)
    objective = mmssl.objective("rotation", {"image": mmssl.encoder(options.model, modality="image")})
    pairs = []
    for number in range(options.rounds):
        order = (bare, looped) if number % 2 else (looped, bare)
        times = {run: run(objective, Timed(feed, options.steps, device), training).step for run in order}
        pairs.append((times[bare], times[looped]))
    ratio = statistics.median(loop / plain for plain, loop in pairs)
    plain, loop = (statistics.median(times) * 1000 for times in zip(*pairs, strict=True))
    print(f"{device}: bare loop {plain:.2f} ms a step, mmssl {loop:.2f} ms, overhead {ratio - 1:+.1%}")


if __name__ == "__main__":
    main()
