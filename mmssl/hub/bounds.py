"""A network that is built from somebody's recipe is no larger than the weights that came with it.

A line of a recipe, such as ten million layers, would keep a machine busy for minutes before the weights are found not
to fit. So the weights file is asked first how many tensors and numbers it holds, and building stops where a network
goes far beyond that.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)

from mmssl.errors import RunError

LARGEST_HEADER = 1 << 24
MOST_TENSORS = 100_000
# Libraries build classifiers, second towers and decoders that an encoder then leaves out.
SPARE_TENSORS, SPARE_NUMBERS = 5_000, 1 << 28
# No whole number of an encoder's arguments is larger than this, unless the weights are.
LARGEST_NUMBER = 1 << 21
TIMES = ("steps", "every")
DEPTH, SPARE_LAYERS = re.compile(r"(\w+_)?layers|depths?"), 100


def count_weights(path: Path) -> tuple[int, int]:
    """Number of tensors in a safetensors file, and of numbers in all of them.

    Raises:
        RunError: where it is none, is cut, or names more tensors than any network has.
    """
    try:
        with path.open("rb") as file:
            head = file.read(8)
            length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        if LARGEST_HEADER < length <= path.stat().st_size:
            raise RunError(f"{path}: names of {length:,} bytes, more than any network has; it is not read")
        # Opening validates the header: its length, every dtype, shape and offset, and that the file holds them all.
        with safe_open(path, framework="pt") as opened:
            tensors = len(opened.keys())
    except (SafetensorError, OSError, ValueError) as error:
        raise RunError(f"{path}: not a whole safetensors file: {error}") from error
    if not tensors:
        raise RunError(f"{path}: holds no tensors")
    if tensors > MOST_TENSORS:
        raise RunError(f"{path}: {tensors:,} tensors, more than any network has; it is not read")
    with path.open("rb") as file:
        file.seek(8)
        header: dict[str, Any] = json.loads(file.read(length))
    sizes = (entry["shape"] for name, entry in header.items() if name != "__metadata__")
    return tensors, sum(_product(shape) for shape in sizes)


def check_numbers(
    encoders: Mapping[str, Mapping[str, Any]], objective: Mapping[str, Any], weights: Path, where: Path
) -> None:
    """Raise RunError where a recipe gives an encoder or its task a number that no network of these weights can have."""
    tensors, numbers = count_weights(weights)
    for name, arguments in {
        **{f"encoders.{name}": own for name, own in encoders.items()},
        "objective": objective,
    }.items():
        for key, value in _numbers(arguments):
            if key in TIMES:
                continue
            # Libraries make lists as long as a network is deep before they make its first layer.
            most = tensors + SPARE_LAYERS if DEPTH.fullmatch(key) else max(LARGEST_NUMBER, numbers)
            if abs(value) > most:
                raise RunError(
                    f"{where}: {name}: {key} = {value} is more than {weights.name} has weights for ({most:,})"
                )


@contextmanager
def no_larger_than(weights: Path) -> Iterator[None]:
    """Inside, a network of far more tensors or numbers than a file holds is refused while it is built.

    Raises:
        RunError: saying how much the file holds.
    """
    tensors, numbers = count_weights(weights)
    most_tensors, most_numbers = 8 * tensors + SPARE_TENSORS, 4 * numbers + SPARE_NUMBERS
    seen = [0, 0]

    def count(module: nn.Module, name: str, value: Tensor | None) -> None:
        if value is None:
            return
        seen[0] += 1
        seen[1] += value.numel()
        if seen[0] > most_tensors or seen[1] > most_numbers:
            raise RunError(
                f"{weights}: holds {tensors:,} tensors of {numbers:,} numbers, and the recipe names a far larger "
                "network; it is not built"
            )

    hooks = [register_module_parameter_registration_hook(count), register_module_buffer_registration_hook(count)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def check_finite(tensors: Iterable[tuple[str, Tensor]], where: Path) -> None:
    """Raise RunError naming the first tensor that holds NaN or infinity."""
    for name, value in tensors:
        if value.is_floating_point() and not value.isfinite().all():
            raise RunError(f"{where}: {name} is not finite, for training diverged; such weights are handed to nobody")


def _product(shape: list[int]) -> int:
    number = 1
    for extent in shape:
        number *= extent
    return number


def _numbers(tree: Any, key: str = "") -> Iterator[tuple[str, int]]:
    """Every whole number of a tree with the key that it stands under."""
    if isinstance(tree, Mapping):
        for inner, value in tree.items():
            yield from _numbers(value, str(inner))
    elif isinstance(tree, list):
        for value in tree:
            yield from _numbers(value, key)
    elif isinstance(tree, int) and not isinstance(tree, bool):
        yield key, tree
