"""What a source holds, before anything is trained: splits, columns, a sample of rows decoded, and likely traps."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mmssl.data.annotated import AnnotatedSource
from mmssl.data.base import MapSource
from mmssl.data.columns import as_text, find_column, is_missing
from mmssl.data.duplicates import across_splits
from mmssl.data.features import name_of
from mmssl.data.files import KINDS
from mmssl.data.named_files import check_named_files
from mmssl.data.sources import Source, TableSource, open_source
from mmssl.data.together import sound_and_pictures
from mmssl.errors import DataError
from mmssl.media.audio import CANCELING, cancels, open_sound
from mmssl.media.image import Fit, decode_image, is_cut_to_8_bits, open_image, shown_size
from mmssl.media.video import open_pictures
from mmssl.recipe import Data

KEYS = ("image", "video", "audio", "text", "label")
SHOWN = 5  # broken rows that are told
UNIQUE = 20  # labels that all differ before they are taken for names of rows
SECONDS = 2.0  # of a sound or clip that are decoded
FAINT = 10 ** (-60 / 20)  # a peak of -60 dB below full scale
ASPECT = 1.2  # ratio of the mean aspects of two classes from which a squashed picture tells them apart


@dataclass
class Check:
    """What was found.

    Attributes:
        source: as it was named.
        splits: name -> rows; None where only reading all of it would tell.
        columns: name -> the batch key that it feeds, or an empty string.
        rows: number of rows of the sample.
        facts: key -> what the sample has of it, a line each.
        broken: rows of the sample that cannot be decoded, with the reason.
        traps: what may make a number wrong or a task too easy, a sentence each.
        notes: what was read differently from what a user may think.
    """

    source: str
    splits: dict[str, int | None]
    columns: dict[str, str]
    rows: int = 0
    facts: dict[str, list[str]] = field(default_factory=dict)
    broken: list[str] = field(default_factory=list)
    traps: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def text(self) -> str:
        """The whole as lines of text."""
        sizes = (f"{name} {'?' if rows is None else f'{rows:,}'}" for name, rows in self.splits.items())
        used = (f"{name} ({key})" if key else name for name, key in self.columns.items())
        lines = [self.source, f"  rows      {', '.join(sizes)}", f"  columns   {', '.join(used)}"]
        lines += [
            f"  {key if n == 0 else '':<9} {line}" for key, own in self.facts.items() for n, line in enumerate(own)
        ]
        more = [f"and {len(self.broken) - SHOWN} more"] if len(self.broken) > SHOWN else []
        broken = [*self.broken[:SHOWN], *more] or ([f"none of {self.rows} rows"] if self.facts else [])
        for title, own in (("broken", broken), ("note", self.notes), ("trap", self.traps)):
            lines += [f"  {title:<9} {line}" for line in own]
        return "\n".join(lines)


def check(source: str | Path | Data, *, split: str | None = None, rows: int = 200, **settings: Any) -> Check:
    """Read a sample of a source.

    Args:
        source: anything that a recipe's `data.source` may be, or a recipe's data section.
        split: whose rows are sampled; `train`, or the first there is.
        rows: size of the sample, spread over the split.
        **settings: other keys of a data section, such as `columns`.

    Raises:
        DataError: where nothing can be opened.
    """
    spec = source if isinstance(source, Data) else Data(source=str(source), **settings)
    opened, every = _open_all(spec, split)
    splits = {name: len(one) if isinstance(one, MapSource) else None for name, one in every.items()}
    found = Check(spec.source, splits, _columns(spec, opened), notes=list(opened.notes))
    if isinstance(opened, TableSource):
        media = [name for name, key in found.columns.items() if {"image", "audio", "video"} & set(key.split(", "))]
        try:
            check_named_files(opened, media)
        except DataError as error:
            found.traps.append(str(error))
    fed = {key: name for name, keys in found.columns.items() for key in keys.split(", ") if key}
    keys = {key: fed[key] for key in KEYS if key in fed}
    cells = list(_sample(opened.select(list(dict.fromkeys(keys.values()))), rows))
    found.rows = len(cells)
    for key, column in keys.items():
        held = [(number, row[column]) for number, row in cells]
        if key == "label":
            held = _named(held, opened.class_names(column), found)
        missing = sum(cell is None for _, cell in held)
        held = [(number, cell) for number, cell in held if cell is not None]
        lines = _LOOKS[key](held, spec, found)
        if missing:
            lines.append(f"{missing} of {len(cells)} empty, or read as missing (NA, None, null)")
        found.facts[key] = lines
    if "audio" in keys and "video" in keys:
        apart, alone = sound_and_pictures([(number, row[keys["audio"]], row[keys["video"]]) for number, row in cells])
        found.broken += apart
        found.notes += alone
    if "image" in keys and "label" in keys:
        _aspects(cells, keys, found)
    whole = {name: one for name, one in every.items() if isinstance(one, MapSource)}
    for key in [key for key in ("image", "text") if key in keys][:1]:
        found.traps += across_splits(whole, keys[key], images=key == "image")
    spare = [name for name, key in found.columns.items() if not key and not isinstance(opened, AnnotatedSource)]
    for _, row in _sample(opened.select(spare), 1) if spare else ():
        hints = _hints({name: row[name] for name in spare})
        if not keys and not hints:
            hints = ["no column is read; name what one holds, as in --set columns.image=<column>, text, audio, label"]
        found.notes += hints
    return found


def _hints(row: Mapping[str, Any]) -> list[str]:
    """How to use columns of media that no batch key is taken from."""
    notes = []
    for name, cell in row.items():
        named = isinstance(cell, str) and Path(cell).suffix.lower() in KINDS
        if not named and not isinstance(cell, bytes | Mapping):
            continue
        kinds = [
            key
            for key, opens in (("image", open_image), ("video", open_pictures), ("audio", open_sound))
            if (KINDS[Path(cell).suffix.lower()] == key if named else _fits(opens, cell))
        ]
        if kinds:
            ways = " ".join(f"--set columns.{key}={name}" for key in kinds)
            notes.append(f"column '{name}' holds {' and '.join(kinds)} that nothing is taken from: {ways}")
    return notes


def _fits(opens: Callable[[Any], Any], cell: Any) -> bool:
    try:
        opens(cell)
    except DataError:
        return False
    return True


def _open_all(spec: Data, split: str | None) -> tuple[Source, dict[str, Source]]:
    """The source of the split to be sampled, and of each that there is."""
    first = _open_some(spec, [split] if split else [spec.split, "train", "validation", "test"])
    known = ("train", "validation", "test")
    names = sorted(first.splits, key=lambda name: known.index(name) if name in known else len(known))
    return first, {
        name: open_source(spec.model_copy(update={"split": name})) if first.splits else first
        for name in names or (split or spec.split,)
    }


def _open_some(spec: Data, names: Sequence[str]) -> Source:
    """The first of these splits that there is."""
    *others, last = dict.fromkeys(names)
    for name in others:
        try:
            return open_source(spec.model_copy(update={"split": name}))
        except DataError as error:
            if "has no split" not in str(error):
                raise
    return open_source(spec.model_copy(update={"split": last}))


def _columns(spec: Data, source: Source) -> dict[str, str]:
    feeds: dict[str, list[str]] = {name: [] for name in source.columns}
    for key in KEYS:
        try:
            feeds[find_column(spec, key, source.columns)].append(key)
        except DataError:
            if key in spec.columns:
                raise  # it was asked for by name
    return {name: ", ".join(keys) for name, keys in feeds.items()}


def _sample(source: Source, rows: int) -> Iterator[tuple[int, Mapping[str, Any]]]:
    if isinstance(source, MapSource):
        size = len(source)
        for number in dict.fromkeys(i * size // rows for i in range(min(rows, size))) if rows < size else range(size):
            yield number, source.row(number)
    else:
        yield from zip(range(rows), source.rows(), strict=False)


def _images(held: Sequence[tuple[int, Any]], spec: Data, found: Check) -> list[str]:
    sides, modes, digests, narrow, flat, dark = [], Counter[str](), Counter[bytes](), 0, 0, 0
    how = spec.image
    fit: Fit = "pad" if how.fit == "pad" else "crop"
    for number, cell in held:
        try:
            pixels = decode_image(cell, 64, fit, extent=how.extent, alpha=how.alpha, max_pixels=how.max_pixels)
            image, _ = open_image(cell, how.extent)
            modes[image.mode] += 1
            if image.mode[0] == "I" and how.extent is None:
                values = np.asarray(image)
                narrow += int(values.max()) - int(values.min()) < 65_536 / 8
            elif is_cut_to_8_bits(image):
                dark += int(pixels.max()) - int(pixels.min()) < 256 / 8
            sides.append(shown_size(image))  # which loads a PNG, and with it forgets how it was stored
        except DataError as error:
            found.broken.append(f"image, row {number}: {error}")
            continue
        flat += int(pixels.max()) - int(pixels.min()) < 8
        digests[hashlib.blake2b(pixels.numpy().tobytes(), digest_size=16).digest()] += 1
    if not sides:
        return ["none can be decoded"]
    width, height = np.array(sides).T
    if narrow:
        found.traps.append(
            f"{narrow} of {len(sides)} pictures of 16 bits use less than an eighth of the range; "
            "data.image.extent=[low, high] says what is black and white"
        )
    if dark:
        found.traps.append(
            f"{dark} of {len(sides)} pictures store 16 bits in each of several bands, of which the upper 8 are read, "
            "and use less than an eighth of the range; scale them to 8 bits"
        )
    if flat > len(sides) / 20:
        found.traps.append(f"{flat} of {len(sides)} pictures are of one color all over")
    twice = sum(count - 1 for count in digests.values())
    if twice:
        found.traps.append(f"{twice} of {len(sides)} pictures are equal to another one of the sample")
    if modes["RGBA"] or modes["LA"]:
        found.notes.append(
            f"{modes['RGBA'] + modes['LA']} pictures have a fourth band, shown as transparency on white; "
            "data.image.alpha=ignore leaves it out"
        )
    shapes = f"{width.min()} to {width.max()} x {height.min()} to {height.max()}"
    if width.min() == width.max() and height.min() == height.max():
        shapes = f"{width[0]} x {height[0]}"
    kinds = ", ".join(f"{mode} {count}" for mode, count in modes.most_common())
    aspect = np.exp(np.abs(np.log(width / height)))
    lines = [f"{shapes} pixels, modes {kinds}"]
    if aspect.max() > 1.02 and how.fit == "crop":
        lost = 1 - np.mean(1 / aspect)
        lines.append(
            f"{lost:.0%} of the area lies outside of the central square that is decoded; fit: squeeze keeps it for "
            "random crops, and fit: pad on a white square"
        )
    return lines


def _sounds(held: Sequence[tuple[int, Any]], spec: Data, found: Check) -> list[str]:
    seconds, rates, faint, without, canceled = [], Counter[int](), 0, 0, 0
    for number, cell in held:
        try:
            with open_sound(cell, spec.audio.channel) as sound:
                wave, _ = sound.read(sound.start, sound.source_rate, min(SECONDS, max(0.1, sound.end - sound.start)))
                seconds.append(sound.end - sound.start)
                rates[sound.source_rate] += 1
            lost = spec.audio.channel == "mean" and cancels(cell, SECONDS)
            canceled += lost
            faint += not lost and float(wave.abs().max()) < FAINT
        except DataError as error:
            if "has no audio track" in str(error):
                without += 1
            else:
                found.broken.append(f"audio, row {number}: {error}")
    if without:
        found.notes.append(f"{without} of {len(held)} clips have no sound")
    if not seconds:
        return ["none can be decoded"]
    if faint > len(seconds) / 20:
        found.traps.append(f"{faint} of {len(seconds)} sounds begin with {SECONDS:g} s of silence (below -60 dB)")
    if canceled:
        found.traps.append(f"{canceled} of {len(seconds)} {CANCELING}")
    kinds = ", ".join(f"{rate} Hz {count}" for rate, count in rates.most_common(4))
    low, middle, high = np.quantile(seconds, [0, 0.5, 1])
    lines = [f"{low:.2f} to {high:.2f} s, median {middle:.2f} s; {kinds}"]
    if low < spec.audio.seconds < high:
        share = np.mean(np.array(seconds) < spec.audio.seconds)
        lines.append(f"{share:.0%} are shorter than the {spec.audio.seconds:g} s of a row, and padded")
    if max(rates) < spec.audio.rate:
        found.traps.append(
            f"rows have {spec.audio.rate} samples a second, the files at most {max(rates)}: bands above are empty"
        )
    return lines


def _clips(held: Sequence[tuple[int, Any]], spec: Data, found: Check) -> list[str]:
    seconds, still = [], 0
    for number, cell in held:
        try:
            with open_pictures(cell) as pictures:
                frames = pictures.read(pictures.start, 32, 8, 8)
                seconds.append(pictures.end - pictures.start)
                still += bool((frames == frames[:1]).all())
        except DataError as error:
            found.broken.append(f"video, row {number}: {error}")
    if not seconds:
        return ["none can be decoded"]
    if still > len(seconds) / 20:
        found.traps.append(f"{still} of {len(seconds)} clips do not move in their first second")
    low, middle, high = np.quantile(seconds, [0, 0.5, 1])
    return [f"{low:.2f} to {high:.2f} s, median {middle:.2f} s"]


def _texts(held: Sequence[tuple[int, Any]], spec: Data, found: Check) -> list[str]:
    held = [(number, as_text(cell)) for number, cell in held]
    texts = [cell for _, cell in held if isinstance(cell, str)]
    found.broken += [
        f"text, row {n}: {type(cell).__name__} is no text" for n, cell in held if not isinstance(cell, str)
    ]
    if not texts:
        return ["none is text"]
    words = np.array([len(text.split()) for text in texts])
    twice = len(texts) - len(set(texts))
    if twice:
        found.traps.append(f"{twice} of {len(texts)} texts are equal to another one of the sample")
    cut = np.mean(words > spec.text.length)
    lines = [f"{words.min()} to {words.max()} words, median {int(np.median(words))}"]
    if cut and spec.text.start == "first" and not spec.text.pack:
        lines.append(
            f"{cut:.0%} have more words than a row has ids ({spec.text.length}), and their ends are never read; "
            "data.text.start=random or data.text.pack=true read them"
        )
    return lines


def _named(held: Sequence[tuple[int, Any]], names: Sequence[str] | None, found: Check) -> list[tuple[int, Any]]:
    """Labels, classes by their names where the source has names; None for what is no label."""
    unknown = sum(cell in (-1, "-1") for _, cell in held)
    if unknown:
        meant = "a class as any other, for classes have no names" if names is None else "taken for no label"
        found.notes.append(f"{unknown} labels of the sample are -1, which is {meant}")
    held = held if names is None else [(number, name_of(cell, names)) for number, cell in held]
    return [(number, None if is_missing(cell) else cell) for number, cell in held]


def _labels(held: Sequence[tuple[int, Any]], spec: Data, found: Check) -> list[str]:
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


_LOOKS = {"image": _images, "audio": _sounds, "video": _clips, "text": _texts, "label": _labels}


def _aspects(cells: Sequence[tuple[int, Mapping[str, Any]]], keys: Mapping[str, str], found: Check) -> None:
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
