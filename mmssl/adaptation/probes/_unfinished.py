"""Trainings of a call that may be killed: the same call, made again, goes on from there and ends in the same bits."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mmssl.atomic import replacing, write_text
from mmssl.errors import RunError
from mmssl.ops.gather import process_share, wait_for_everyone
from mmssl.training import checkpoint

RESULT, SCORES = "result.safetensors", "scores.json"


class Unfinished:
    """A folder with a place for each training of a call.

    Args:
        folder: made when the first is written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._used: list[Place] = []

    def place(self, *depends: str) -> Place:
        """That of the training which depends on these."""
        name = hashlib.blake2b("\n".join(depends).encode(), digest_size=16).hexdigest()
        self._used.append(Place(self.folder / name))
        return self._used[-1]

    def clear(self) -> None:
        """Remove the trainings of this call, and the folder where no other call has any in it."""
        for place in self._used:
            shutil.rmtree(place.directory, ignore_errors=True)
        if self.folder.is_dir() and not any(self.folder.iterdir()):
            self.folder.rmdir()


class Place:
    """Where one training is kept: checkpoints while it goes on, then what came out.

    Args:
        directory: of its own.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def part(self, name: str) -> Path:
        """The directory of one run of the loop."""
        return self.directory / name

    def result(self) -> dict[str, Tensor] | None:
        """What came out; None where it has not ended."""
        try:
            return load_file(self.directory / RESULT)
        except (OSError, SafetensorError):
            return None

    def load(self, network: nn.Module) -> None:
        """Copy the weights that were kept with the result."""
        checkpoint.load_weights(network, self.directory / checkpoint.WEIGHTS)

    def end(self, result: Mapping[str, Tensor], network: nn.Module | None = None) -> None:
        """Keep what came out and the network's weights where they are given, and no checkpoint any more."""
        if process_share()[0] == 0:
            self._end(result, network)
        wait_for_everyone()  # all have to agree on what has ended

    def _end(self, result: Mapping[str, Tensor], network: nn.Module | None) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        if network is not None:
            self._write(checkpoint.WEIGHTS, checkpoint.tensors(network))
        self._write(RESULT, result)
        for part in self.directory.iterdir():
            if part.is_dir():
                shutil.rmtree(part, ignore_errors=True)

    def _write(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        path = self.directory / name
        try:
            with replacing(path) as temporary:
                save_file({key: value.detach().cpu().contiguous() for key, value in tensors.items()}, temporary)
        except (OSError, SafetensorError) as error:
            raise RunError(f"{path}: cannot be written: {error}") from error

    def scores(self, part: str, every: int) -> list[float]:
        """Those of evaluations before the last whole checkpoint of a part, one every so many steps."""
        last = checkpoint.newest(self.part(part))
        path = self.directory / SCORES
        if last is None or not path.is_file():
            return []
        found: list[float] = json.loads(path.read_text(encoding="utf-8"))
        return found[: checkpoint.read_state(last)["step"] // every]

    def keep_scores(self, scores: list[float]) -> None:
        """Write those of evaluations so far."""
        if process_share()[0] == 0:
            self.directory.mkdir(parents=True, exist_ok=True)
            write_text(self.directory / SCORES, json.dumps(scores))
