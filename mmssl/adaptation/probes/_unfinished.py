"""Trainings of a call that may be killed: the same call, made again, goes on from there and ends in the same bits."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mmssl.adaptation.cache import digest_of, digest_of_rows
from mmssl.adaptation.probes._trained import Readout
from mmssl.adaptation.probes.base import Learner, RawRows
from mmssl.adaptation.rows import Split
from mmssl.atomic import replacing, write_text
from mmssl.data.digest import digest_of_tensors
from mmssl.errors import RunError
from mmssl.objectives.base import Objective
from mmssl.ops.gather import process_share, wait_for_everyone
from mmssl.training import checkpoint
from mmssl.training.lock import locked

RESULT, OUTCOME, SCORES = "result.safetensors", "result", "scores.json"
HEAD, WHOLE = "head", "whole"
"""Parts of a training."""
TOGETHER = 256
"""Rows whose labels are read at a time."""


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

    @contextmanager
    def alone(self) -> Iterator[None]:
        """No other call makes this training at the same time.

        Raises:
            RunError: where another one does.
        """
        if process_share()[0] > 0:
            yield
            return
        try:
            with locked(self.directory, instead="adapt a copy of the run"):
                yield
        finally:
            with suppress(OSError):  # what the same call goes on with
                self.directory.rmdir()

    def part(self, name: str) -> Path:
        """The directory of one run of the loop."""
        return self.directory / name

    def result(self) -> Tensor | None:
        """What came out; None where it has not ended."""
        try:
            return load_file(self.directory / RESULT)[OUTCOME]
        except (OSError, SafetensorError, KeyError):
            return None

    def load(self, network: nn.Module) -> None:
        """Copy the weights that were kept with the result."""
        checkpoint.load_weights(network, self.directory / checkpoint.WEIGHTS)

    def end(self, result: Tensor, network: nn.Module | None = None) -> None:
        """Keep what came out and the network's weights where they are given, and no checkpoint any more."""
        if process_share()[0] == 0:
            self._end(result, network)
        wait_for_everyone()  # all have to agree on what has ended

    def _end(self, result: Tensor, network: nn.Module | None) -> None:
        if network is not None:
            self._write(checkpoint.WEIGHTS, checkpoint.tensors(network))
        self._write(RESULT, {OUTCOME: result})
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
            write_text(self.directory / SCORES, json.dumps(scores))


R = TypeVar("R", bound=RawRows)
T = TypeVar("T", bound=Objective)


class Trained(NamedTuple):
    """What one training made.

    Attributes:
        objective: encoder and head.
        split: where its rows were.
    """

    objective: Objective
    split: Split


class ResumableLearner(Learner[R]):
    """Trains networks that can be saved, and goes on with them after it was killed.

    Attributes:
        trained: what `predict` trained last with one setting.
        unfinished: where trainings are kept, so that the same call goes on after it was killed; None keeps none.
    """

    frozen: ClassVar[bool] = False
    trains: ClassVar[bool] = True
    trained: Trained | None = None
    unfinished: Unfinished | None = None

    def place(self, rows: RawRows, labels: Readout, others: RawRows, seed: int, *depends: Any) -> Place | None:
        """Where a training is kept; None where it is not, as of the rows of a stream.

        Args:
            rows: that are learned from.
            labels: of them, as the loss reads them.
            others: that are answered for.
            seed: of whatever is random.
            depends: on what else it depends; what JSON can hold.
        """
        if self.unfinished is None:
            return None
        content = [digest_of_rows(some.split, some.ids.numpy()) for some in (rows, others)]
        if None in content:
            return None
        content += [digest_of_tensors({"labels": labels[part]}) for part in torch.arange(len(rows)).split(TOGETHER)]
        said = json.dumps([self.name, seed, *depends, *content], sort_keys=True)
        return self.unfinished.place(said, digest_of(rows.encoder))

    def finish(
        self,
        place: Place | None,
        train: Callable[[], T],
        untrained: Callable[[], T],
        result: Callable[[T], Tensor],
        *,
        last: bool,
    ) -> tuple[T | None, Tensor]:
        """A network and what came out, of a training that ended already or ends now.

        Args:
            place: of the training.
            train: the training, from the last checkpoint at `place`.
            untrained: the same network, with random weights.
            result: of a network, such as its answers.
            last: whether the network is asked for; it is None otherwise.

        Raises:
            RunError: where another call makes this training at the same time.
        """
        if place is None:
            objective = train()
            return objective if last else None, result(objective)
        with place.alone():
            ended = place.result()
            if ended is None:
                objective = train()
                ended = result(objective)
                place.end(ended, objective if last else None)
                return objective if last else None, ended
            if not last:
                return None, ended
            objective = untrained()
            place.load(objective)
            return objective, ended
