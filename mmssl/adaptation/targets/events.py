"""What happens when: lists of events with start, end and class, in seconds of the file.

A frame has a class where an event of it touches the frame, and a segment of one second likewise (Mesaros et al. 2016,
"Metrics for Polyphonic Sound Event Detection", Applied Sciences 6(6)). Frames are as long for every encoder.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmssl.adaptation.metrics import FRAME_PRECISION, SEGMENT_F1, mean_average_precision
from mmssl.adaptation.placed import InPicture, Placed
from mmssl.errors import DataError

FRAMES = 10
"""In a second, where nobody says another number."""
ONLY = "event"
"""The class of all events where none is named."""


class Event(NamedTuple):
    """One of a row, in seconds from the start of what is read."""

    start: float
    end: float
    name: Any


class Events(InPicture):
    """Answers are chances, float (M, F, C): of each class in each frame of what is read, or (M, 1, C) for all alike.

    Average precision is that of each class over all frames of all rows, averaged over the classes; F1 counts segments
    and classes together, with a segment found where the chance of one of its frames is above one half. Frames beyond
    the end of a file have no event.

    Args:
        cells: of all rows.
        start: key of an event's first second.
        end: key of its last one; without it an event is a moment.
        length: key of its seconds, in place of `end`.
        classes: key of its class; all are of one where there is no such key.
        frames: in a second, a whole number.
    """

    metrics = (FRAME_PRECISION, SEGMENT_F1)

    def __init__(
        self,
        cells: Sequence[Placed],
        start: str = "start",
        end: str = "end",
        length: str | None = None,
        classes: str = "label",
        frames: int = FRAMES,
    ) -> None:
        super().__init__(cells)
        self.start, self.end, self.length, self.classes, self.rate = start, end, length, classes, frames
        self._read: dict[int, list[Event]] = {}
        self.seconds = 0.0
        self._keys: set[str] = set()

    @classmethod
    def recognizes(cls, cells: Sequence[Any]) -> bool:
        """Lists of mappings with `start`, of which some may be empty."""
        lists = all(isinstance(cell, list) for cell in cells)
        events = [event for cell in cells if isinstance(cell, list) for event in cell]
        return lists and bool(events) and all(isinstance(one, Mapping) and "start" in one for one in events)

    def asked(self, *, start: str, end: str, length: str | None, classes: str, frames: int) -> Events:
        """The same cells, with other arguments."""
        return Events(self.cells, start, end, length, classes, frames)

    @property
    def number(self) -> int:
        """Of frames, F."""
        return max(1, round(self.seconds * self.rate))

    def events(self, labels: Tensor) -> list[list[Event]]:
        """Of rows, int64 (N,): those that what is read of a row touches or not, from its start.

        Raises:
            DataError: for a cell that holds none.
        """
        for number in labels.tolist():
            if number not in self._read:
                place = self.cells[number]
                cell, begin, self.seconds = place.read_timed()
                try:
                    self._read[number] = [self._event(one, begin) for one in _listed(cell)]
                except (TypeError, ValueError, KeyError) as error:
                    raise DataError(f"{place.where}: {error}") from error
        return [self._read[number] for number in labels.tolist()]

    def _event(self, given: Any, begin: float) -> Event:
        if not isinstance(given, Mapping):
            raise TypeError(f"an event should be a mapping with '{self.start}', found {given!r}")
        if self.start not in given:
            raise ValueError(f"an event has no key '{self.start}'; it has: {', '.join(given)}; name it with start")
        self._keys |= given.keys()
        start = float(given[self.start])
        end = start + float(given[self.length]) if self.length else float(given.get(self.end, start))
        if not (math.isfinite(start) and start <= end < math.inf):
            raise ValueError(f"an event should not end before it begins, found {start:g} to {end:g} s")
        return Event(start - begin, end - begin, given.get(self.classes, ONLY))

    def look(self, labels: Tensor, truth: Tensor) -> list[str]:
        """Events that can be read, and some in what is read of the training rows; the classes are those of all rows."""
        rows = [*self.events(labels), *self.events(truth)]
        names = {event.name for row in rows for event in row}
        if len({type(name) for name in names}) > 1:
            raise DataError("classes of events are names in some rows and numbers in others")
        self.names, self.width = tuple(sorted(names)), len(names)
        if not names or not self.frames(labels).any():
            raise DataError(f"{self.cells[int(labels[0])].where}: none of the {len(labels)} training rows has an event")
        told = []
        if self.length is None and self.end not in self._keys:
            told.append(f"no event has the key '{self.end}', so that each is one moment; the option end names one")
        if self.classes not in self._keys:
            told.append(f"no event has the key '{self.classes}', so that all are of one class; classes names one")
        return told

    def frames(self, labels: Tensor) -> Tensor:
        """Which classes each frame has, bool (N, F, C)."""
        rows = self.events(labels)
        found = torch.zeros(len(rows), self.number, self.width, dtype=torch.bool)
        for row, events in zip(found, rows, strict=True):
            for event in events:
                first = math.floor(event.start * self.rate + 1e-6)
                last = max(first + 1, math.ceil(event.end * self.rate - 1e-6))
                row[max(0, first) : max(0, last), self.names.index(event.name)] = True
        return found

    def constant(self, labels: Tensor) -> Tensor:
        """The share of frames that have each class, float (1, C)."""
        return self.frames(labels).double().mean((0, 1))[None]

    def counts(self, labels: Tensor) -> dict[str, int]:
        """Numbers of events and classes."""
        rows = self.events(labels)
        return {"events": sum(map(len, rows)), "classes": len({event.name for row in rows for event in row})}

    def score(self, answers: Tensor, labels: Tensor) -> dict[str, float]:
        """Mean average precision of frames, and F1 of segments."""
        truth = self.frames(labels)
        answers = answers.expand(*truth.shape)
        found, there = (self._segments(values) for values in (answers > 0.5, truth))
        both, either = int((found & there).sum()), int(found.sum() + there.sum())
        return {
            FRAME_PRECISION.name: mean_average_precision(answers.flatten(0, 1), truth.flatten(0, 1)),
            SEGMENT_F1.name: 2 * both / either if either else 0.0,
        }

    def _segments(self, frames: Tensor) -> Tensor:
        """Bool (N, F, C) -> (N, seconds, C), the last second perhaps cut short."""
        missing = -frames.shape[1] % self.rate
        padded = torch.nn.functional.pad(frames, (0, 0, 0, missing))
        return padded.unflatten(1, (-1, self.rate)).any(2)


def _listed(cell: Any) -> list[Any]:
    """A list, also where it is written as JSON."""
    found = json.loads(cell) if isinstance(cell, str) else cell
    if not isinstance(found, list):
        raise TypeError(f"events are a list, found {type(found).__name__}")
    return found
