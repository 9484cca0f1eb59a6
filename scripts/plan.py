"""What a recipe will take on GPUs, before any is rented: memory, samples a second, days, bytes read.

    python scripts/plan.py masked_autoencoder_imagenet simclr_imagenet --gpus 8 --gpu h200
    python scripts/plan.py contrastive_cc12m --gpus 16 --gpu a100-80 --rows 10_968_539 --kb 60

Measured here, on the CPU, on noise of the recipe's shapes: parameters, the optimizer's state after a step, and a row's
share of operations (`torch.utils.flop_counter`, forward and backward) and of activations (tensors that are alive
between the passes), as the difference of two batches in the recipe's precision. With `training.checkpointing` both are
those of blocks that are computed anew. Assumed: which share of the card's peak a step reaches (`--mfu`), and how many
rows and bytes a data set has. Left out: what a caching allocator and NCCL hold, and the time of the optimizer, of
communication and of decoding. Tokenizers of the Hub are stood in for by one of 30,522 words.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from bench_memory import Alive
from tokenizers import Tokenizer as Words
from tokenizers.models import WordLevel
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedTokenizerFast

from mmssl.batch import to_device
from mmssl.build import build_objective
from mmssl.dry_run import noise
from mmssl.media.text import Tokenizer
from mmssl.media.vocabulary import SPECIAL_TOKENS
from mmssl.modules.blocks import learning_blocks, recomputed
from mmssl.objectives.base import Objective
from mmssl.ops.draws import Draws
from mmssl.recipe import Recipe, load
from mmssl.training.optim import make_optimizer

# Dense peak in 10^12 operations a second (half precision on tensor cores, single precision), and memory in 10^9 bytes:
# NVIDIA's data sheets.
GPUS = {
    "h200": (989.0, 67.0, 141.0),
    "h100": (989.0, 67.0, 80.0),
    "a100-80": (312.0, 19.5, 80.0),
    "a100-40": (312.0, 19.5, 40.0),
    "l40s": (362.0, 91.6, 48.0),
    "4090": (165.0, 82.6, 24.0),
}
ROWS = {"ILSVRC/imagenet-1k": 1_281_167}
FEW, MORE = 2, 4
WORDS = 30_522
COLUMNS = ("recipe", "GPUs", "M weights", "GFLOP/row", "GB a GPU", "samples/s", "days", "TB read")


@dataclass(frozen=True)
class Pieces:
    """What was measured of a recipe: of the network as a whole, and of a row."""

    weights: int
    trained: int
    state: int
    """Bytes of the optimizer's state."""
    flops: float
    activations: float
    """Bytes that wait for the backward pass."""


def stand_in(recipe: Recipe) -> dict[str, Tokenizer]:
    """Name of encoder -> a tokenizer of as many words, for those that are trained on the data or come from the Hub."""
    made = {}
    for name, arguments in recipe.encoders.items():
        wish = arguments.get("tokenizer")
        if isinstance(wish, str):
            size = int(wish.partition(":")[2] or 8000) if wish.startswith("train") else WORDS
            words = [*SPECIAL_TOKENS.values(), *(f"w{i}" for i in range(size - len(SPECIAL_TOKENS)))]
            model = WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]")
            made[name] = Tokenizer(PreTrainedTokenizerFast(tokenizer_object=Words(model), **SPECIAL_TOKENS))
    return made


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """The context of a forward pass in a recipe's precision."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision in ("bf16", "fp16"))


def operations(recipe: Recipe, objective: Objective, device: torch.device) -> float:
    """Of a row, forward and backward; attention is taken as the matrix products that it is, which are counted."""
    counted = []
    for rows in (FEW, MORE):
        batch = to_device(noise(recipe, objective, rows), device)
        inputs = objective.transform(batch, Draws(0, 0, rows, device=device))
        half = autocast(recipe.training.precision, device)
        with sdpa_kernel(SDPBackend.MATH), half, FlopCounterMode(display=False) as counter:
            objective(inputs)["loss"].backward()
        objective.zero_grad()
        counted.append(counter.get_total_flops())
    return (counted[1] - counted[0]) / (MORE - FEW)


def activations_of(recipe: Recipe, objective: Objective, rows: int) -> int:
    """Bytes of the activations between the passes of a step of so many rows."""
    inputs = objective.transform(noise(recipe, objective, rows), Draws(0, 0, rows))
    with autocast(recipe.training.precision, torch.device("cpu")), Alive() as alive:
        loss = objective(inputs)["loss"]
        found = alive.bytes
        loss.backward()
    return found


def measure(recipe: Recipe) -> Pieces:
    """Build the network and take two small steps."""
    torch.manual_seed(0)
    objective = build_objective(recipe, stand_in(recipe), where="recipe", pretrained=False).train()
    optimizer = make_optimizer(objective, recipe.training.optimizer)
    with recomputed(learning_blocks(objective) if recipe.training.checkpointing else []):
        flops = operations(recipe, objective, torch.device("cpu"))
        activations = (activations_of(recipe, objective, MORE) - activations_of(recipe, objective, FEW)) / (MORE - FEW)
    optimizer.step()
    state = [
        value for values in optimizer.state.values() for value in values.values() if isinstance(value, torch.Tensor)
    ]
    parameters = list(objective.parameters())
    return Pieces(
        sum(p.numel() for p in parameters),
        sum(p.numel() for p in parameters if p.requires_grad),
        sum(value.nbytes for value in state),
        flops,
        activations,
    )


def plan(
    recipe: Recipe, pieces: Pieces, gpus: int, gpu: str, mfu: float, rows: int | None, kilobytes: float | None
) -> dict[str, float | None]:
    """The figures of a row of the table; None for what nothing tells.

    Args:
        recipe: resolved.
        pieces: of `measure`.
        gpus: how many.
        gpu: one of `GPUS`.
        mfu: share of the card's peak that a step reaches.
        rows: of the data set; only a run in epochs asks for it.
        kilobytes: that a row has where it is stored.
    """
    training = recipe.training
    fast, single, memory = GPUS[gpu]
    peak = (fast if training.precision in ("bf16", "fp16") else single) * 1e12
    own = training.batch_size / gpus / training.accumulate
    held = pieces.weights * 4 + pieces.trained * 4 + pieces.state
    gigabytes = (held / (gpus if training.sharded else 1) + own * pieces.activations) / 1e9
    speed = gpus * peak * mfu / pieces.flops
    if rows is None:
        rows = sum(ROWS.get(data.source, 0) for data in recipe.sources().values()) or None
    seen = training.steps * training.batch_size
    if training.epochs is not None:
        seen = round(training.epochs * rows) if rows else 0
    return {
        "weights": pieces.weights,
        "flops": pieces.flops,
        "gigabytes": gigabytes,
        "fits": gigabytes < memory,
        "speed": speed,
        "days": seen / speed / 86400 if seen else None,
        "terabytes": seen * kilobytes / 1e9 if seen and kilobytes else None,
    }


def line(name: str, gpus: int, gpu: str, found: dict[str, float | None]) -> str:
    def number(key: str, form: str, unit: float = 1.0) -> str:
        value = found[key]
        return "?" if value is None else format(value / unit, form)

    memory = number("gigabytes", ".1f") + ("" if found["fits"] else f" of {GPUS[gpu][2]:.0f}: too much")
    cells = (name, f"{gpus} {gpu}", number("weights", ".1f", 1e6), number("flops", ".1f", 1e9), memory)
    return f"| {' | '.join((*cells, number('speed', ',.0f'), number('days', '.2f'), number('terabytes', '.2f')))} |"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="+")
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--gpu", choices=GPUS, default="h200")
    parser.add_argument("--mfu", type=float, default=0.4, help="share of the card's peak that a step reaches")
    parser.add_argument("--rows", type=int, help="of the data set, for a run in epochs")
    parser.add_argument("--kb", type=float, help="of a row where it is stored")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of the recipes")
    options = parser.parse_args(arguments)
    print(f"assumed: {options.mfu:.0%} of the peak of a step's operations (MFU)\n")
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    for name in options.recipes:
        recipe = load(name, dict(pair.split("=", 1) for pair in options.set))
        found = plan(recipe, measure(recipe), options.gpus, options.gpu, options.mfu, options.rows, options.kb)
        print(line(name, options.gpus, options.gpu, found), flush=True)


if __name__ == "__main__":
    main()
