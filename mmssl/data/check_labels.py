"""What a sample of labels holds, and what may be meant otherwise; for `mmssl.data.check`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mmssl.data.columns import is_missing
from mmssl.data.features import name_of
from mmssl.errors import DataError, counted
from mmssl.media.image import open_image, shown_size

if TYPE_CHECKING:
    from mmssl.data.checked import Check
    from mmssl.recipe import Data

UNIQUE = 20  # labels that all differ before they are taken for names of rows
ASPECT = 1.2  # ratio of the mean aspects of two classes from which a squashed picture tells them apart


def named(held: Sequence[tuple[int, Any]], names: Sequence[str] | None, found: Check) -> list[tuple[int, Any]]:
    """Labels, classes by their names where the source has names; None for what is no label."""
    unknown = sum(cell in (-1, "-1") for _, cell in held)
    if unknown:
        meant = "a class as any other, for classes have no names" if names is None else "taken for no label"
        found.notes.append(f"{counted(unknown, 'label')} of the sample with -1, which is {meant}")
    held = held if names is None else [(number, name_of(cell, names)) for number, cell in held]
    return [(number, None if is_missing(cell) else cell) for number, cell in held]


def look_at_labels(held: Sequence[tuple[int, Any]], spec: Data, found: Check) -> list[str]:
    """What they are and how many differ; traps are added to `found`."""
    values = [cell for _, cell in held]
    if any(isinstance(value, list) for value in values):
        items = [item for value in values if isinstance(value, list) for item in value if not is_missing(item)]
        counts = Counter(str(item) if isinstance(item, list | dict) else item for item in items)
        return [f"several a row, {len(counts)} different ones in the sample"]
    if any(isinstance(value, float) for value in values):
        numbers = np.array([float(value) for value in values])
        endless = int(np.isinf(numbers).sum())
        if endless:
            found.traps.append(f"{endless} of {len(values)} labels are infinite, which no probe learns from")
            numbers = numbers[np.isfinite(numbers)]
        if not len(numbers):
            return ["none is a finite number"]
        whole = "; all are whole numbers, classes with adapt --target classes" if (numbers % 1 == 0).all() else ""
        return [f"values from {numbers.min():g} to {numbers.max():g}, mean {numbers.mean():g}{whole}"]
    if not values:
        return ["none"]
    if any(isinstance(value, dict) for value in values):
        return ["several columns in one, no class"]
    if any(isinstance(value, bytes) for value in values):
        return ["bytes: pictures of classes are masks, and names are text"]
    counts = Counter(values)
    spelled: dict[str, list[str]] = {}
    for one in filter(lambda value: isinstance(value, str), counts):
        spelled.setdefault(" ".join(one.casefold().split()), []).append(one)
    alike = [repr(one) for several in spelled.values() if len(several) > 1 for one in sorted(several)]
    if alike:
        found.traps.append(f"classes that differ in capitals or spaces alone: {', '.join(alike[:6])}")
    name, most = counts.most_common(1)[0]
    if len(counts) == 1:
        found.traps.append(f"all {len(values)} labels of the sample are {name!r}, which leaves a probe nothing to tell")
        return [f"1 class in the sample ({name})"]
    if len(counts) == len(values) >= UNIQUE:
        found.traps.append(f"all {len(values)} labels of the sample differ, as names of rows do and classes do not")
    return [f"{len(counts)} classes in the sample, the largest ({name}) has {most / len(values):.0%}"]


def look_at_shapes(cells: Sequence[tuple[int, Mapping[str, Any]]], keys: Mapping[str, str], found: Check) -> None:
    """Whether the shape of a picture tells its class, which a squashed picture would carry."""
    aspects: dict[Any, list[float]] = {}
    for _, row in cells:
        label, cell = row[keys["label"]], row[keys["image"]]
        if cell is None or is_missing(label) or isinstance(label, list | float):
            continue
        try:
            width, height = shown_size(open_image(cell)[0])
        except DataError:
            continue  # counted among the broken rows
        aspects.setdefault(label, []).append(width / height)
    means = {label: float(np.mean(own)) for label, own in aspects.items() if len(own) >= 5}
    if len(means) > 1 and max(means.values()) > ASPECT * min(means.values()):
        wide, tall = max(means, key=means.__getitem__), min(means, key=means.__getitem__)
        found.traps.append(
            f"pictures of class {wide} are wider than those of {tall} (width over height {means[wide]:.2f} and "
            f"{means[tall]:.2f}): padding or squashing would tell them apart"
        )
