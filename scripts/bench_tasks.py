"""Images per second of every image task's training step, against the simplest correct one written by hand.

    python scripts/bench_tasks.py                          every task, on one core
    python scripts/bench_tasks.py rotation simclr --size 96 --batch 64 --device cuda

Both train the same network from the same weights with AdamW on the same bytes, which are on the device already. mmssl
does what its loop does in a step, with everything that it logs. By hand is what a good engineer writes for one task on
one device: see by_hand.py. Heads and decoders are the task's own, so that the two differ in code and not in work;
hidden layers are narrower than published, which leaves an overhead more to show.

The two take turns step by step, on one thread; CPU time there, wall time on a GPU. The ratio is the median over the
rounds with its quartiles, above 1 where mmssl is faster. "Rest" is the same without the transforms: network, loss,
gradient, optimizer. Both losses are means over the same steps; that they agree tells that both do the same.
"""

from __future__ import annotations

import argparse
import copy
import random
import time
from collections.abc import Callable
from typing import Any

import torch
from by_hand import CNN, TASKS, VIT, Hand, Net, dino, masked_autoencoder, trunk
from torch import Tensor

import mmssl
from mmssl.ops.draws import Draws
from mmssl.recipe import Optimizer
from mmssl.training.optim import make_optimizer, set_lr
from mmssl.training.step import ForwardPass, accumulated_backward

WARM_UP = 2
COLUMNS = ("task", "images/s by hand", "mmssl", "ratio", "rest", "ms by hand, transform + rest", "mmssl", "losses", "")


def race(by_hand: Callable[[Any, Net, int], Hand], images: Tensor, rounds: int) -> str:
    """One line of the table."""
    size, device = images.shape[-1], images.device
    network = {**VIT, "img_size": size} if by_hand in (masked_autoencoder, dino) else CNN
    torch.manual_seed(0)
    random.seed(0)
    encoder = mmssl.encoder(modality="image", **network)
    task = mmssl.objective(by_hand.__name__, {"image": encoder}, **TASKS[by_hand]).to(device).train()
    twin = copy.deepcopy(task)
    passes = ForwardPass(task)
    hand = by_hand(twin, trunk(twin.encoders["image"]), size)
    batch = {"image": images, "id": torch.arange(len(images), device=device)}
    optimizer, settings = make_optimizer(task, Optimizer()), Optimizer()
    scales = {name: getattr(p, "lr_scale", 1.0) for name, p in task.named_parameters() if p.requires_grad}
    groups = [
        {"params": [p for name, p in twin.named_parameters() if scales.get(name) == scale], "lr": settings.lr * scale}
        for scale in set(scales.values())
    ]
    plain = torch.optim.AdamW(groups, weight_decay=settings.weight_decay)

    def our_transform(step: int) -> Any:
        return task.transform(batch, Draws(0, step, len(images), device=device))

    def our_rest(inputs: Any, step: int) -> Tensor:
        set_lr(optimizer, settings.lr)
        losses = accumulated_backward(passes, inputs)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            task.after_step((step + 1) / (rounds + WARM_UP))
        return losses["loss"]

    def their_rest(inputs: Any, step: int) -> Tensor:
        loss = hand.loss(*inputs)
        loss.backward()
        plain.step()
        plain.zero_grad()
        hand.after()
        return loss.detach()

    def now() -> float:
        if device.type == "cpu":
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    sides = (our_transform, our_rest), (lambda step: hand.transform(images), their_rest)
    seconds, losses = torch.zeros(rounds + WARM_UP, 2, 2), torch.zeros(rounds + WARM_UP, 2)
    for step in range(rounds + WARM_UP):
        for side in (0, 1) if step % 2 else (1, 0):
            transform, rest = sides[side]
            began = now()
            with torch.no_grad():
                inputs = transform(step)
            between = now()
            losses[step, side] = rest(inputs, step)
            seconds[step, side] = torch.tensor([between - began, now() - between])
    seconds = seconds[WARM_UP:]
    low, ratio, high = (seconds.sum(2)[:, 1] / seconds.sum(2)[:, 0]).quantile(torch.tensor([0.25, 0.5, 0.75])).tolist()
    rest = (seconds[:, 1, 1] / seconds[:, 0, 1]).median().item()
    ours, theirs = (1000 * seconds.median(0).values).tolist()
    speed = [f"{1000 * len(images) / sum(side):.0f}" for side in (theirs, ours)]
    parts = [" + ".join(f"{part:.1f}" for part in side) for side in (theirs, ours)]
    loss = [f"{value:.3f}" for value in losses.mean(0).flip(0).tolist()]
    cells = [by_hand.__name__, *speed, f"**{ratio:.2f}x** ({low:.2f} to {high:.2f})", f"{rest:.2f}x", *parts, *loss]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("tasks", nargs="*", help="all of them where left out")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--size", type=int, default=64, help="of the images, in pixels")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    shape = (options.batch, 3, options.size, options.size)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator).to(options.device)
    print(f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|")
    for by_hand in TASKS:
        if not options.tasks or by_hand.__name__ in options.tasks:
            print(race(by_hand, images, options.rounds), flush=True)


if __name__ == "__main__":
    main()
