"""What a recipe will take on GPUs, before any is rented: memory, samples a second, days, bytes read.

    python scripts/plan.py masked_autoencoder_imagenet simclr_imagenet --gpus 8 --gpu h200
    python scripts/plan.py contrastive_cc12m --gpus 16 --gpu a100-80 --rows 10_968_539 --kb 60
    python scripts/plan.py --published                 the table of docs/results.md, going on where it was stopped

Measured here, on the CPU, on noise of the recipe's shapes: parameters, the optimizer's state after a step, and a row's
share of operations (`torch.utils.flop_counter`, forward and backward) and of activations (tensors that are alive
between the passes), as the difference of two batches in the recipe's precision. What would take long, as products of
matrices and first weights do, is taken for zeros of its shape, which is all that counts. With `training.checkpointing`
both are those of blocks that are computed anew. Assumed: which share of the card's peak a step reaches (`--mfu`), and
how many rows and bytes a data set has. Left out: what a caching allocator and NCCL hold, and the time of the optimizer,
of communication and of decoding. Tokenizers of the Hub are stood in for by one of 30,522 words.
"""

from __future__ import annotations

import argparse
import hashlib
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from bench_memory import Alive
from tables import add_cell, read_cells, write_tables
from tokenizers import Tokenizer as Words
from tokenizers.models import WordLevel
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedTokenizerFast

from mmssl import catalog
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
PUBLISHED = re.compile(
    r"_(imagenet|cc12m|wikipedia|audioset|audiocaps|finevideo|librispeech|webvid|kinetics|ucf101|c4)$"
)
KEPT = Path(__file__).with_suffix(".json")
_aten = torch.ops.aten
PRODUCTS = {
    *(_aten.mm, _aten.addmm, _aten.bmm, _aten.baddbmm, _aten.convolution, _aten.convolution_backward),
    *(
        _aten._scaled_dot_product_flash_attention_for_cpu,
        _aten._scaled_dot_product_flash_attention_for_cpu_backward,
    ),
}
OTHERS = {
    *(_aten.add, _aten.sub, _aten.mul, _aten.div, _aten.clone, _aten._to_copy, _aten.cat, _aten.sum, _aten.mean),
    *(_aten.gelu, _aten.gelu_backward, _aten.relu, _aten.silu, _aten.silu_backward, _aten.threshold_backward),
    *(_aten.native_layer_norm, _aten.native_layer_norm_backward, _aten.pow, _aten.where, _aten.tanh),
    *(_aten.native_batch_norm, _aten.native_batch_norm_backward, _aten.grid_sampler_2d, _aten._softmax),
    *(_aten._softmax_backward_data, _aten._log_softmax, _aten._log_softmax_backward_data, _aten.sigmoid, _aten.exp),
}
LARGE = 2**16
"""Numbers in a result of `OTHERS` from which on it is taken for zeros; what is smaller may decide what is done next."""
WEIGHTS = {_aten.normal_, _aten.uniform_, _aten.erfinv_}
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


class Shapes(TorchDispatchMode):
    """Operations that take long give zeros of the shapes that they would have, and first weights are zeros."""

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kind, kwargs = operation.overloadpacket, kwargs or {}
        if kind in WEIGHTS:
            return args[0].zero_()
        fresh = not any(one.alias_info for one in operation._schema.returns)
        large = kind in OTHERS and any(_is_large(one) for one in tree_leaves(args))
        if not fresh or not (kind in PRODUCTS or large):
            return operation(*args, **kwargs)
        without = {key: value for key, value in kwargs.items() if key != "device"}
        shapes = operation(*tree_map(_to_meta, args), **tree_map(_to_meta, without))
        if any(isinstance(one, torch.Tensor) and not one.is_floating_point() for one in tree_leaves(shapes)):
            return operation(*args, **kwargs)
        return tree_map(lambda one: torch.zeros_like(one, device="cpu") if _is_tensor(one) else one, shapes)


def _is_tensor(thing: Any) -> bool:
    return isinstance(thing, torch.Tensor)


def _is_large(thing: Any) -> bool:
    return _is_tensor(thing) and thing.numel() >= LARGE


def _to_meta(thing: Any) -> Any:
    return thing.to("meta") if _is_tensor(thing) else thing


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
    with Shapes():
        objective = build_objective(recipe, stand_in(recipe), where="recipe", pretrained=False).train()
        with recomputed(learning_blocks(objective) if recipe.training.checkpointing else []):
            flops = operations(recipe, objective, torch.device("cpu"))
            held = [activations_of(recipe, objective, rows) for rows in (FEW, MORE)]
    learned = [p.grad is not None for p in objective.parameters()]
    objective.to("meta")
    for parameter, has in zip(objective.parameters(), learned, strict=True):
        parameter.grad = torch.empty_like(parameter) if has else None
    optimizer = make_optimizer(objective, recipe.training.optimizer)
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
        (held[1] - held[0]) / (MORE - FEW),
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


def write_published(names: Sequence[str], mfu: float) -> None:
    """Measure published recipes that were not yet, all or those of these names; the table is of all that ever were."""
    lines = [f"| {' | '.join(COLUMNS)} |", f"|{'---|' * len(COLUMNS)}"]
    for path in sorted(catalog.recipe_files(), key=lambda path: path.stem):
        if not PUBLISHED.search(path.stem):
            continue
        recipe = load(path.stem)
        # Anew where the recipe has changed.
        name = f"{path.stem}, {hashlib.blake2b(path.read_bytes(), digest_size=4).hexdigest()}"
        if name not in read_cells(KEPT) and (not names or path.stem in names):
            add_cell(KEPT, name, asdict(measure(recipe)))
        if cell := read_cells(KEPT).get(name):
            gpus = gpus_of(catalog.head(path))
            lines.append(line(path.stem, gpus, "h200", plan(recipe, Pieces(**cell), gpus, "h200", mfu, None, None)))
            print(lines[-1], flush=True)
    write_tables("plan", "\n".join(lines))


def gpus_of(head: Sequence[str]) -> int:
    """How many the head of a recipe says that it is for."""
    found = re.search(r"hardware:\s+(\d+) GPU", "\n".join(head))
    return int(found[1]) if found else 1


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*")
    parser.add_argument("--published", action="store_true", help="into docs/results.md; all, where none is named")
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--gpu", choices=GPUS, default="h200")
    parser.add_argument("--mfu", type=float, default=0.4, help="share of the card's peak that a step reaches")
    parser.add_argument("--rows", type=int, help="of the data set, for a run in epochs")
    parser.add_argument("--kb", type=float, help="of a row where it is stored")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of the recipes")
    options = parser.parse_args(arguments)
    if options.published:
        write_published(options.recipes, options.mfu)
        return
    print(f"assumed: {options.mfu:.0%} of the peak of a step's operations (MFU)\n")
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    for name in options.recipes:
        recipe = load(name, dict(pair.split("=", 1) for pair in options.set))
        found = plan(recipe, measure(recipe), options.gpus, options.gpu, options.mfu, options.rows, options.kb)
        print(line(name, options.gpus, options.gpu, found), flush=True)


if __name__ == "__main__":
    main()
