"""From a raw row to the tensors that the objective needs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from numbers import Real
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from mmssl.batch import MODALITIES, TEXT_PARTS
from mmssl.data.base import Row
from mmssl.data.decoded import DecodedCells
from mmssl.data.files import EXTENSIONS
from mmssl.errors import DataError, RecipeError, nearest
from mmssl.recipe import Data

Classes = Sequence[str] | Sequence[int]

Window = float | Sequence[float]
WINDOWS = {"first": 0.0, "middle": 0.5}
CENTER = "center"
"""Key of `data.columns` that names a column of seconds, which windows of sounds and clips lie around."""


def is_missing(cell: Any) -> bool:
    """Whether a cell holds no label: None, NaN, or text with nothing in it, which is a csv's cell left empty."""
    return cell is None or (isinstance(cell, float) and cell != cell) or (isinstance(cell, str) and not cell.strip())


def as_text(cell: Any) -> Any:
    """A list of sentences as one text with a line for each, which ends a sentence; anything else as it is."""
    several = isinstance(cell, list) and cell and all(isinstance(sentence, str) for sentence in cell)
    return "\n".join(cell) if several else cell


class TextToIds(Protocol):
    """What the decoder needs of a `mmssl.media.text.Tokenizer`."""

    def __call__(self, text: str, length: int) -> tuple[Tensor, Tensor]:
        """Text -> ids int64 (length,), mask bool (length,)."""

    def token_starts(self, text: str) -> list[int]:
        """The character at which each token of a text begins."""

    def divide(self, text: str, length: int, parts: Sequence[str]) -> dict[str, Tensor]:
        """Text -> `text`, `text_mask` and each of `parts`, int64 (length,)."""


def find_column(spec: Data, key: str, columns: Sequence[str]) -> str:
    """The column that holds a batch key.

    It is what `data.columns` says, else the column of that name, else the one column that is named by a file extension
    of that modality, as in webdataset shards (`jpg`, `txt`, `cls`). Sound is in the clip where it has no column.

    Args:
        spec: of the source; its `columns` map keys to columns.
        key: `image`, `text`, `audio`, `video` or `label`.
        columns: names that the source has.

    Raises:
        DataError: naming the columns there are and how to map one.
    """
    named = spec.columns.get(key)
    if named is not None and named in columns:
        return named
    if named is None:
        if key in columns:
            return key
        extensions = {**EXTENSIONS, "text": ("txt",), "label": ("cls",)}
        for kind in (key, "video") if key == "audio" else (key,):
            found = [name for name in columns if name == kind or name.lower() in extensions[kind]]
            if len(found) == 1:
                return found[0]
    wanted = named or key
    raise DataError(
        f"{spec.source} has no column '{wanted}'{nearest(wanted, columns)}; it has: {', '.join(columns)}. "
        f"Name the right one with data.columns.{key}: <column>"
    )


def find_classes(values: Iterable[Any]) -> tuple[str, ...] | tuple[int, ...] | None:
    """The classes in a column of labels, sorted; None where a label is a list, which is taken as it is (multi-hot).

    Raises:
        DataError: for labels that are no names and no whole numbers, or a mixture of both.
    """
    seen: set[Any] = set()
    for value in values:
        if isinstance(value, list):
            return None
        if isinstance(value, dict):
            raise DataError("labels should be names or whole numbers, the column holds dict")
        if not is_missing(value):
            seen.add(value)
    kinds = {int if isinstance(value, bool) else type(value) for value in seen}
    if kinds not in ({str}, {int}):
        found = ", ".join(sorted(kind.__name__ for kind in kinds)) or "nothing"
        raise DataError(f"labels should be names or whole numbers, the column holds {found}")
    return tuple(sorted(seen))


class Decoder:
    """Decodes the needed modalities of one row.

    Args:
        spec: decode settings and column names.
        needs: batch keys out of `image`, `text`, `text_word`, `text_sentence`, `audio`, `video`.
        columns: names that the source has; without them a key is taken to be in the column that `spec` says.
        tokenizers: one for `text`, where that is needed.
        label: column of the label, or None for none.
        classes: what the label may be, in the order of the class numbers; None takes labels as numbers.
        windows: of a sound or clip, from its start to its end at equal distances, in a dimension after that of rows; of
            1 there is no such dimension, and `spec.start` says where it lies.

    Attributes:
        columns: key -> column.

    Raises:
        DataError: for a column that is not there.
        RecipeError: for a key that is no modality, or text without a tokenizer.
    """

    def __init__(
        self,
        spec: Data,
        needs: Sequence[str],
        *,
        columns: Sequence[str] | None = None,
        tokenizers: Mapping[str, TextToIds] | None = None,
        label: str | None = None,
        classes: Classes | None = None,
        windows: int = 1,
    ) -> None:
        self.spec, self.windows = spec, windows
        for key in spec.columns:
            if key not in (*MODALITIES, "label", CENTER):
                raise RecipeError(f"data.columns: unknown key '{key}'{nearest(key, (*MODALITIES, 'label', CENTER))}")
        for key in needs:
            if key == "fusion":
                raise RecipeError(
                    "a fusion reads what two encoders make of their data and none itself; name one of them"
                )
            if key not in (*MODALITIES, *TEXT_PARTS):
                raise RecipeError(f"a batch has no key '{key}'{nearest(key, (*MODALITIES, *TEXT_PARTS))}")
        self.parts = tuple(key for key in TEXT_PARTS if key in needs)
        needs = tuple(dict.fromkeys("text" if key in TEXT_PARTS else key for key in needs))
        if "text" in needs and "text" not in (tokenizers or {}):
            raise RecipeError("text needs a tokenizer: add a text encoder to the recipe")
        if columns is None:
            columns = [spec.columns.get(key, key) for key in (*needs, *({CENTER} & spec.columns.keys()))]
            columns += [label] if label else []
        self.needs = needs
        both = ("audio", "video") if {"audio", "video"} <= set(needs) else ()
        self._together = (*((both,) if both else ()), *((key,) for key in needs if key not in both))
        self.columns = {key: find_column(spec, key, columns) for key in needs}
        self.tokenizer = (tokenizers or {}).get("text")
        if self.parts and self.tokenizer is not None:
            self.tokenizer.divide("", spec.text.length, self.parts)  # refuses what it cannot do now and not at step 1
        self.center = spec.columns.get(CENTER) if {"audio", "video"} & set(needs) else None
        if self.center is not None and self.center not in columns:
            have = ", ".join(columns)
            raise DataError(
                f"{spec.source} has no column '{self.center}' of seconds{nearest(self.center, columns)}; it has: {have}"
            )
        self.label = label
        if label is not None and label not in columns:
            have = ", ".join(columns)
            raise DataError(
                f"{spec.source} has no column '{label}' for the label{nearest(label, columns)}; it has: {have}"
            )
        self.cache = None if spec.cache is None else DecodedCells(spec.cache, spec.cache_gb)
        self.indices = None if classes is None else {value: index for index, value in enumerate(classes)}

    @property
    def reads(self) -> tuple[str, ...]:
        """Columns that decoding touches, without repetition."""
        return tuple(dict.fromkeys([*self.requires, *([self.center] if self.center else [])]))

    @property
    def requires(self) -> tuple[str, ...]:
        """Those that no row may lack."""
        return tuple(dict.fromkeys([*self.columns.values(), *([self.label] if self.label else [])]))

    @property
    def fixed(self) -> bool:
        """Whether a row decodes to the same tensors every time, for no window in it is drawn."""
        random_text = self.spec.text.start != "first" and "text" in self.needs
        random_window = self.spec.start == "random" and self.windows == 1
        return not random_text and not (random_window and {"audio", "video"} & set(self.needs))

    @property
    def how(self) -> str | None:
        """What decoding depends on besides the row; None where a tokenizer has a part in it, which has no name."""
        if "text" in self.needs:
            return None
        settings = self.spec.model_dump(mode="json", include={"image", "audio", "video", "start"})
        return repr((self.needs, self.columns, self.windows, self.center, self.label, self.indices, settings))

    def __call__(self, row: Row, window: float) -> dict[str, Tensor]:
        """Decode one row.

        Args:
            row: raw, from a source.
            window: in [0, 1): where in a sound, clip or text that is longer than asked for the part taken begins, near
                1 at its end. Sounds and clips use it where `spec.start` is `random` and the row names no center, texts
                where `spec.text.start` is not `first`.

        Returns:
            One row of each key of `mmssl.batch` (no `id`), with `text_mask`, `audio_mask` and, of squeezed pictures,
            `image_aspect`.

        Raises:
            DataError: naming the column that is empty or cannot be decoded.
        """
        row = {column: row[column] for column in self.reads}  # once: the toy world renders a cell whenever it is read
        center = None if self.center is None else _seconds(self.center, row[self.center])
        for column in self.requires:
            if is_missing(row[column]) if column == self.label else row[column] is None:
                raise DataError(f"column '{column}' is empty, or was read as missing (NA, None, null)")
        decoded: dict[str, Tensor] = {}
        timed: Window = WINDOWS.get(self.spec.start, window)
        if self.windows > 1:
            timed = [number / (self.windows - 1) for number in range(self.windows)]
        for keys in self._together:
            if self.cache is None or not self._always_alike(keys, center):
                decoded |= self._decode_together(keys, row, window if "text" in keys else timed, center)
                continue
            how = {key: getattr(self.spec, key).model_dump(mode="json") for key in keys}
            if "image" not in keys:
                how |= {"window": timed, "center": center}
            columns = {key: self.columns[key] for key in keys}
            decode = partial(self._decode_together, keys, row, timed, center)
            decoded |= self.cache(how, {key: row[column] for key, column in columns.items()}, decode)
        if self.label is not None:
            decoded["label"] = self._class(row[self.label])
        return decoded

    def start(self, row: Row, window: float) -> float:
        """Seconds on the clock of a row's sound or clip at which begins what is decoded of it; see `__call__`."""
        from mmssl.media.clip import clip_start

        cells = {key: row[self.columns[key]] for key in ("audio", "video") if key in self.needs}
        center = None if self.center is None else _seconds(self.center, row[self.center])
        return clip_start(
            cells if len(cells) > 1 else next(iter(cells.values())),
            audio=self.spec.audio if "audio" in cells else None,
            video=self.spec.video if "video" in cells else None,
            window=WINDOWS.get(self.spec.start, window),
            center=center,
        )

    def _always_alike(self, keys: Sequence[str], center: float | None) -> bool:
        """Whether what these keys decode to depends on the cells alone; of a text only its tokenizer knows."""
        placed = self.spec.start != "random" or self.windows > 1 or center is not None
        return keys == ("image",) or ("text" not in keys and placed)

    def _decode_together(
        self, keys: Sequence[str], row: Row, window: Window, center: float | None
    ) -> dict[str, Tensor]:
        """What is on one clock, or a key alone."""
        cells = {key: row[self.columns[key]] for key in keys}
        if len(keys) > 1:
            return self._decode_clip(cells, window, center)
        return self._decode(keys[0], cells[keys[0]], window, center)

    def _decode_clip(self, cells: Row, window: Window, center: float | None) -> dict[str, Tensor]:
        """Sound and pictures on one clock."""
        from mmssl.media.clip import decode_clip

        decoded = decode_clip(cells, audio=self.spec.audio, video=self.spec.video, window=window, center=center)
        sound, mask, frames = cast(tuple[Tensor, Tensor, Tensor], decoded)
        return {"audio": sound, "audio_mask": mask, "video": frames}

    def _decode(self, key: str, cell: Any, window: Window, center: float | None) -> dict[str, Tensor]:
        if key == "image":
            from mmssl.media.image import decode_image, decode_squeezed

            how = self.spec.image
            read: dict[str, Any] = {"extent": how.extent, "alpha": how.alpha, "max_pixels": how.max_pixels}
            if how.fit != "squeeze":
                return {"image": decode_image(cell, how.size, how.fit, **read)}
            square, aspect = decode_squeezed(cell, how.size, **read)
            return {"image": square, "image_aspect": torch.tensor(aspect, dtype=torch.float32)}
        if key == "audio":
            from mmssl.media.audio import decode_audio

            heard = self.spec.audio
            sound, mask = decode_audio(cell, heard.rate, heard.seconds, window, center, heard.channel)
            return {"audio": sound, "audio_mask": mask}
        if key == "video":
            from mmssl.media.video import decode_video

            video = self.spec.video
            return {"video": decode_video(cell, video.size, video.fps, video.frames, window, video.fit, center)}
        if self.spec.text.pack and isinstance(cell, Mapping):
            return _packed(cell)
        cell = as_text(cell)
        if not isinstance(cell, str):
            name = self.columns["text"]
            fields = [f"{name}.{field}" for field in cell] if isinstance(cell, Mapping) else []
            way_out = f"; name one of its fields with data.columns.text: {', '.join(fields)}" if fields else ""
            raise DataError(f"column '{name}' should hold text, it holds {type(cell).__name__}{way_out}")
        assert self.tokenizer is not None  # checked when built
        text = self.spec.text
        if text.start != "first":
            from mmssl.media.passage import passage

            assert isinstance(window, float)
            cell = passage(cell, self.tokenizer.token_starts, text.length, text.start, window)
        if self.parts:
            return self.tokenizer.divide(cell, text.length, self.parts)
        ids, mask = self.tokenizer(cell, text.length)
        return {"text": ids, "text_mask": mask}

    def _class(self, value: Any) -> Tensor:
        if self.indices is not None:
            if value not in self.indices:
                known = ", ".join(map(str, list(self.indices)[:20]))
                raise DataError(f"label {value!r} is none of the classes: {known}")
            value = self.indices[value]
        elif not isinstance(value, int | list):
            raise DataError(f"label {value!r} is no class number")
        return torch.tensor(value, dtype=torch.int64)


def _seconds(column: str, cell: Any) -> float | None:
    """Where a window is centered; None for a row that does not say."""
    if cell is None or cell != cell:
        return None
    if isinstance(cell, bool) or not isinstance(cell, Real):
        raise DataError(f"column '{column}' should hold seconds, it holds {type(cell).__name__}")
    return float(cell)


def _packed(cell: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """A row of `mmssl.data.packing`."""
    found = {key: torch.tensor(numbers) for key, numbers in cell.items()}
    return {**found, "text_mask": torch.ones_like(found["text"], dtype=torch.bool)}
