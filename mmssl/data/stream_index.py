"""What is known of the files of a stream, kept beside the run: how many rows, and where reading can begin.

It is found by looking through files once, and learned of others by reading them. It says nothing that reading would
not tell again, so that nothing is lost where it is.
"""

from __future__ import annotations

import json
import os
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path
from threading import Lock
from typing import Any

from mmssl.atomic import append_lines

EVERY = 100
"""Rows between two places that are learned."""


@dataclass
class Known:
    """Of one file, or of the rows that one reader packs.

    Attributes:
        rows: how many it has; None until its end was seen.
        places: row and place at which reading can begin, ascending; see `mmssl.data.stream_files`. The list is never
            changed, only put in the place of another one.
        found: whether looking through the file told, and not reading it.
    """

    rows: int | None = None
    places: list[tuple[int, int]] = field(default_factory=lambda: [(0, 0)])
    found: bool = False


def before(places: Sequence[tuple[int, int]], row: int) -> int:
    """Number of the last place that is not after a row."""
    return bisect_right(places, row, key=itemgetter(0)) - 1


class Index:
    """What is known, by the name of a file.

    Args:
        path: of a file of JSON lines, to which any process of the run adds; None keeps it in memory.
        reads: what rows are: names of source and columns.
    """

    def __init__(self, path: Path | None, reads: Sequence[str]) -> None:
        self.path, self.reads = path, list(reads)
        self._known: dict[str, Known] = {}
        self._states: dict[str, str] = {}
        self._learning = Lock()
        for record in _records(path):
            if record.get("reads") == self.reads and record.get("state") == self._state(record["file"]):
                known = self[record["file"]]
                if "places" in record:
                    known.places, known.found = [(row, place) for row, place in record["places"]], True
                elif "place" in record:
                    self._insert(known, record["row"], record["place"])
                known.rows = record.get("rows", known.rows)

    def __getitem__(self, file: str) -> Known:
        return self._known.setdefault(file, Known())

    def keep(self, file: str, rows: int, places: list[tuple[int, int]]) -> None:
        """Take down what looking through a file told."""
        self._known[file] = Known(rows, places, found=True)
        self._add(file, rows=rows, places=places)

    def learn(self, file: str, row: int, place: int) -> None:
        """Take down where a row begins, if no other place is near."""
        with self._learning:
            if self._insert(self[file], row, place):
                self._add(file, row=row, place=place)

    def end(self, file: str, rows: int) -> None:
        """Take down how many rows there are."""
        known = self[file]
        if known.rows is None:
            known.rows = rows
            self._add(file, rows=rows)

    def _insert(self, known: Known, row: int, place: int) -> bool:
        at = before(known.places, row) + 1
        near = row - known.places[at - 1][0] < EVERY or (at < len(known.places) and known.places[at][0] - row < EVERY)
        if not near:
            known.places = [*known.places[:at], (row, place), *known.places[at:]]
        return not near

    def _add(self, file: str, **told: object) -> None:
        if self.path is not None:
            record = {"file": file, "state": self._state(file), "reads": self.reads, **told}
            append_lines(self.path, [json.dumps(record)])

    def _state(self, file: str) -> str:
        """Size and time of change of a file on this machine, to tell it from another one of its name."""
        if file not in self._states:
            try:
                status = os.stat(file)
                self._states[file] = f"{status.st_size} {status.st_mtime_ns}"
            except (OSError, ValueError):
                self._states[file] = ""
        return self._states[file]


def _records(path: Path | None) -> list[dict[str, Any]]:
    """Whole lines of the file."""
    if path is None or not path.exists():
        return []
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue  # a process was killed while it wrote
        if isinstance(record, dict) and isinstance(record.get("file"), str):
            found.append(record)
    return found
