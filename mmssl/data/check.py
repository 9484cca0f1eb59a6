"""What a source holds, before anything is trained: splits, columns, a sample of rows decoded, and likely traps."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmssl.data.annotated import AnnotatedSource
from mmssl.data.base import MapSource
from mmssl.data.check_labels import look_at_labels, look_at_shapes, named
from mmssl.data.checked import Check
from mmssl.data.columns import as_text, find_column
from mmssl.data.duplicates import across_splits
from mmssl.data.files import KINDS
from mmssl.data.named_files import check_named_files
from mmssl.data.sources import Source, TableSource, open_source
from mmssl.data.together import sound_and_pictures
from mmssl.errors import DataError, counted
from mmssl.media.audio import CANCELING, cancels, open_sound
from mmssl.media.image import Fit, decode_image, is_cut_to_8_bits, open_image, shown_size
from mmssl.media.video import open_pictures
from mmssl.recipe import Data

KEYS = ("image", "video", "audio", "text", "label")
SECONDS = 2.0  # of a sound or clip that are decoded
FAINT = 10 ** (-60 / 20)  # a peak of -60 dB below full scale


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
            held = named(held, opened.class_names(column), found)
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
        look_at_shapes(cells, keys, found)
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
        elif isinstance(cell, Mapping) and not {"bytes", "path"} & cell.keys():
            fields = ", ".join(f"{name}.{field}" for field in cell)
            notes.append(f"column '{name}' holds several values a row, each of which can be named: {fields}")
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
            f"{counted(modes['RGBA'] + modes['LA'], 'picture')} with a fourth band, shown as transparency on white; "
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
        found.notes.append(f"{without} of {len(held)} clips {'has' if without == 1 else 'have'} no sound")
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


_LOOKS = {"image": _images, "audio": _sounds, "video": _clips, "text": _texts, "label": look_at_labels}
