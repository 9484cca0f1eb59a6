"""What the loop costs over a bare PyTorch loop: same model, data in memory, same batch, alternating runs.

    python scripts/bench_loop.py            on the CPU or the first GPU
    python scripts/bench_loop.py --rounds 9 --steps 60

Prints the median time of a step in both and the median ratio of neighboring runs; the bare loop does what anybody
would write: transform, forward, backward, step.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator

import torch

import mmssl
from mmssl.batch import Batch
from mmssl.ops.draws import Draws
from mmssl.recipe import Training
from mmssl.training.loop import fit
from mmssl.training.optim import make_optimizer


class Memory:
    def __init__(self, batch: Batch) -> None:
        self.batch = batch

    def batches(self, start: int, stop: int) -> Iterator[Batch]:
        for _ in range(start, stop):
            yield self.batch


def task() -> torch.nn.Module:
    torch.manual_seed(0)
    encoder = mmssl.encoder("timm/test_resnet", modality="image")
    return mmssl.objective("rotation", {"image": encoder})


def bare(batch: Batch, training: Training, device: str) -> float:
    objective = task().to(device).train()
    optimizer = make_optimizer(objective, training.optimizer)
    began = time.perf_counter()
    for step in range(training.steps):
        moved = {key: value.to(device) for key, value in batch.items()}
        with torch.no_grad():
            inputs = objective.transform(moved, Draws(0, step, len(batch["id"]), device=device))
        loss = objective(inputs)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    loss.item()
    return (time.perf_counter() - began) / training.steps


def looped(batch: Batch, training: Training) -> float:
    objective = task()
    began = time.perf_counter()
    fit(objective, Memory(batch), training, quiet=True)
    return (time.perf_counter() - began) / training.steps


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=32)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    image = torch.randint(0, 256, (options.batch, 3, options.size, options.size), dtype=torch.uint8)
    batch = {"image": image, "id": torch.arange(options.batch)}
    training = Training(steps=options.steps, batch_size=options.batch, log_every=10)
    bare(batch, training, device), looped(batch, training)
    pairs = [(bare(batch, training, device), looped(batch, training)) for _ in range(options.rounds)]
    ratio = statistics.median(loop / plain for plain, loop in pairs)
    plain, loop = (statistics.median(times) * 1000 for times in zip(*pairs, strict=True))
    print(f"{device}: bare loop {plain:.2f} ms a step, mmssl {loop:.2f} ms, overhead {ratio - 1:+.1%}")


if __name__ == "__main__":
    main()
