"""Decoded cells kept on disk, so that a second epoch, or the next run, opens no container.

A file is found by what its tensors depend on: what is in the cells, or path, size and time of change of the files that
they name, how they are decoded, and by which versions. It is written under another name and then renamed, so that any
number of processes may share a folder and one that is killed leaves no half of a file behind; what does not read back
as it was written is decoded anew. Sounds are kept as 16-bit integers, and come so rounded from the first epoch on: all
epochs are equal.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mmssl.data.digest import add_cell, digest_of_tensors
from mmssl.errors import RecipeError, RunError
from mmssl.media.cell import sentence
from mmssl.version import __version__

DECODERS = ("av", "pillow")

FULL_SCALE = 2**15 - 1
UNFINISHED = ".writing_"
ABANDONED = 3600.0
"""Seconds after which a file that is still unfinished is one of a process that was killed."""
LOOKS = 100
"""The folder is measured anew whenever this process has written the hundredth part of what is allowed."""


class DecodedCells:
    """A folder of decoded cells; see the module.

    Args:
        folder: made where it is not there; `$NAME` is read from the environment.
        gigabytes: what it may take, in 10^9 bytes. Each process measures the folder from time to time, so that it may
            be larger by a hundredth for each. Nothing is removed to make room: of rows that come in turn, as in
            epochs, those that were put out would be those that come next.

    Raises:
        RecipeError: where no folder can be made there.
    """

    def __init__(self, folder: str | Path, gigabytes: float) -> None:
        self.folder, self.allowed = Path(os.path.expandvars(folder)).expanduser(), gigabytes * 1e9
        self._versions = [__version__, *map(version, DECODERS)]
        self._taken = 0
        self._written: float = math.inf  # measured when something is to be written
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RecipeError(f"data.cache: no folder can be made at {self.folder}: {error.strerror}") from error
        if not os.access(self.folder, os.W_OK):
            raise RecipeError(f"data.cache: {self.folder} may not be written; name another folder")

    def __call__(
        self, how: Mapping[str, Any], cells: Mapping[str, Any], decode: Callable[[], dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        """What `decode` makes of the cells, sounds rounded to 16 bits.

        Args:
            how: they are decoded, as JSON has it.
            cells: key of a batch -> raw cell.
            decode: called where nothing is kept.
        """
        content = hashlib.blake2b(json.dumps([self._versions, how], sort_keys=True).encode(), digest_size=20)
        for key, cell in cells.items():
            content.update(key.encode())
            add_cell(content, cell)
        name = content.hexdigest()
        path = self.folder / name[:2] / f"{name}.safetensors"
        found = _load(path)
        if found is None:
            found = {key: _packed(key, value) for key, value in decode().items()}
            self._save(path, found)
        return {key: _unpacked(key, value) for key, value in found.items()}

    def _save(self, path: Path, tensors: dict[str, Tensor]) -> None:
        """Write a file where there is room for it."""
        size = sum(value.nbytes for value in tensors.values())
        if self._written > self.allowed / LOOKS:
            self._taken, self._written = self._measured(), 0
        if self._taken + self._written + size > self.allowed:
            return
        temporary = path.with_name(f"{UNFINISHED}{uuid.uuid4().hex}")
        metadata = {"names": json.dumps(list(tensors)), "content": digest_of_tensors(tensors)}
        try:
            path.parent.mkdir(exist_ok=True)
            save_file(tensors, temporary, metadata)
            temporary.replace(path)
        except (OSError, SafetensorError) as error:
            with suppress(OSError):
                temporary.unlink()
            raise RunError(
                f"data.cache: {path} cannot be written: {sentence(error)}; make room, or leave data.cache out"
            ) from error
        self._written += size

    def _measured(self) -> int:
        """Bytes in the folder, after what was abandoned there is gone."""
        taken = 0
        for path in self.folder.glob("*/*"):
            try:
                state = path.stat()
                if path.name.startswith(UNFINISHED) and time.time() - state.st_mtime > ABANDONED:
                    path.unlink()
                else:
                    taken += state.st_size
            except FileNotFoundError:  # another process has renamed or removed it
                continue
        return taken


def _load(path: Path) -> dict[str, Tensor] | None:
    """What was saved, None where it is not there or damaged."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            # Not as a view of the file, which may go.
            tensors = {name: file.get_tensor(name).clone() for name in json.loads(metadata["names"])}
    except (OSError, SafetensorError, KeyError, ValueError):
        return None
    return tensors if metadata.get("content") == digest_of_tensors(tensors) else None


def _packed(key: str, value: Tensor) -> Tensor:
    """A sound in [-1, 1] as 16-bit integers, everything else as it is."""
    return (value * FULL_SCALE).round().to(torch.int16) if key == "audio" else value.contiguous()


def _unpacked(key: str, value: Tensor) -> Tensor:
    return value.to(torch.float32) / FULL_SCALE if key == "audio" else value
