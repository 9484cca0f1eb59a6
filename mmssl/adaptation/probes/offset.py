"""By how many milliseconds sound and picture of a clip are apart: the offset at which a task finds them to agree best.

Chung & Zisserman 2016, "Out of Time: Automated Lip Sync in the Wild": windows of the picture are compared with windows
of the sound at every offset of a grid, the scores are averaged over the windows of a clip, and the highest one is the
answer. Nothing is learned. Offsets are known because the probe adds them: the sound of each clip is moved by a number
drawn evenly within the span, before anything is cut, so that every window holds sound of the clip and silence at an end
gives nothing away.

Known traps. Silence, or a picture that stands still, has no answer, and where a sound ends within its row its end would
give the answer away: windows lie where there is sound, and clips without an answer, or without room for a window, are
left out. Others in which nothing happens count. A grid coarser than the step of the
pictures is all that the pictures can tell; one finer takes long and gains nothing. The files' own offsets are errors
here: a set whose files are not in sync cannot be scored.
"""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor

from mmssl.adaptation.metrics import Metric
from mmssl.adaptation.pairs import Network, PairProbe, encode_side, matcher, network_of, reinitialized_tasks
from mmssl.adaptation.placed import need_one_window
from mmssl.adaptation.request import Model, Request
from mmssl.adaptation.rows import SourceSplit, Split
from mmssl.adaptation.table import CHANCE, CONSTANT, PRETRAINED, RANDOM, Row, Table
from mmssl.atomic import write_text
from mmssl.batch import Batch, count_rows
from mmssl.data.columns import find_column
from mmssl.data.stream import StreamSource
from mmssl.encoders.audio import AudioEncoder
from mmssl.errors import DataError, RecipeError, counted
from mmssl.media.cell import plain
from mmssl.modules.mode import evaluating
from mmssl.ops.draws import mix_seed
from mmssl.ops.moments import audible
from mmssl.ranges import AboveZero, Positive, Seconds

WITHIN = Metric("within_a_step", "within a step")
ERROR = Metric("mean_absolute_error_ms", "mean |error| in ms", percent=False)
TOGETHER = 8
"""Clips that are decoded at a time: their windows are many."""
WINDOW = 1.0
"""Seconds of a window where neither probe nor task says it."""


class Offset(PairProbe):
    """Offsets are those of the sound: positive where it is late.

    Args:
        a: name of one encoder; that of the first pair of clips and sound that the task compares where left out.
        b: name of the other.
        span: largest offset in seconds, either way.
        step: of the grid, in seconds.
        window: seconds that are seen and heard at once; the task's own where it has a `window`, else 1.
        windows: of a clip, evenly spread.
        to: csv file for the offset of each row as it is, in ms, and its lead: by how much the best score is above the
            mean of all, in their standard deviations; with the path where there is one, and of a row that is left out
            neither number.
    """

    def __init__(
        self,
        *,
        a: str | None = None,
        b: str | None = None,
        span: AboveZero = 0.8,
        step: AboveZero = 0.08,
        window: Seconds | None = None,
        windows: Positive = 4,
        to: str | None = None,
    ) -> None:
        super().__init__(a, b)
        self.steps = round(span / step)
        if self.steps < 1 or abs(self.steps * step - span) > 1e-6:
            raise RecipeError(f"offset: span = {span:g} should be a whole number of steps of {step:g} s")
        self.step, self.window, self.windows, self.to = step, window, windows, to

    def ask(self, model: Model, request: Request) -> Network:
        """See `PairProbe.ask`."""
        network = super().ask(model, request)
        if model.task is not None and self.a is None and self.b is None:
            kinds = {name: encoder.modality for name, encoder in model.task.exported.items()}
            fit = (p for p in model.task.pairs if {kinds.get(p.a), kinds.get(p.b)} == {"video", "audio"})
            if (pair := next(fit, None)) is not None:
                network = network_of(model.task, pair.a, pair.b)
        if set(network.modalities) != {"video", "audio"}:
            found = " and ".join(network.modalities)
            raise RecipeError(f"{self.name} takes clips and their sound, and the task compares {found}")
        return network

    def compare(self, network: Network, model: Model, request: Request) -> Table:
        """The table; see the module."""
        _, test = request.open(model, network.modalities, learns=False)
        assert test is not None  # without test rows the others are
        need_one_window(test, self.name)
        randoms = reinitialized_tasks(network.task, request.seeds) if request.baseline else []
        networks = [network, *(network_of(one, *network.names) for one in randoms)]
        grid = np.arange(-self.steps, self.steps + 1) * self.step
        seconds = self.window or float(getattr(network.task, "window", WINDOW))
        found: list[list[float]] = [[] for _ in networks]
        truth: list[float] = []
        own: dict[int, np.ndarray | None] = {}
        left_out = Counter[str]()
        with evaluating(*(one.task for one in networks)), torch.no_grad():
            for row, clip in self._clips(test, network, seconds):
                if isinstance(clip, str):
                    left_out[clip] += 1
                    own[row] = None
                    continue
                drawn = np.random.default_rng(mix_seed(request.seeds[0], row)).uniform(grid[0], grid[-1])
                late = round(drawn * clip.rate)
                truth.append(late / clip.rate)
                for one, answers in zip(networks, found, strict=True):
                    answers.append(float(grid[_scores(one, clip, grid, late, request.batch_size).argmax()]))
                if self.to is not None:
                    own[row] = _scores(network, clip, grid, 0, request.batch_size)
        reasons = tuple(f"{counted(count, 'clip')} left out: {reason}" for reason, count in left_out.items())
        if not truth:
            raise DataError(f"{test.where}: {'; '.join(reasons) or 'there are no rows'}")
        if self.to is not None:
            _write(Path(self.to), own, _paths(test, own), grid)
        right = np.array(truth)
        rows = [self._row(PRETRAINED, found[:1], right)]
        rows += [self._row(RANDOM, found[1:], right)] if randoms else []
        rows.append(self._row(CONSTANT, [np.zeros(len(right))], right))
        apart = np.abs(grid[:, None] - right)
        guess = {WITHIN.name: float((apart <= self.step + 1e-9).mean()), ERROR.name: 1000 * float(apart.mean())}
        return Table(
            rows=(*rows, Row(CHANCE, "", guess)),
            metrics=(WITHIN, ERROR),
            probe=self.name,
            target="",
            label="",
            encoder=" and ".join(network.names),
            train_rows=0,
            test_rows=len(right),
            counts={"offsets": len(grid), "windows each": self.windows},
            shots=None,
            test=test.where,
            validation="",
            seeds=request.seeds,
            warnings=reasons,
            notes=(
                f"the sound of each clip is moved by up to {grid[-1]:g} s; a step is {1000 * self.step:g} ms, a window "
                f"{seconds:g} s; the constant answer is that they are in sync",
            ),
        )

    def _clips(self, split: Split, network: Network, seconds: float) -> Iterator[tuple[int, Clip | str]]:
        """Number of each row, and what is cut out of it, or why it has no answer."""
        rate = float(cast(AudioEncoder, network.encoders[network.modalities.index("audio")]).rate)
        reach = 2 * self.steps * self.step  # what was moved by the span is looked for over the span
        for batch in split.read(batch_size=TOGETHER):
            frames, samples = batch["video"].shape[1], batch["audio"].shape[1]
            fps = split.spec.video.fps if isinstance(split, SourceSplit) else rate * frames / samples
            number = max(1, round(seconds * fps))
            takes = (
                f"a window of {number / fps:g} s, moved by twice the span of {reach / 2:g} s either way, takes clips"
            )
            takes += f" of {2 * reach + number / fps:g} s"
            length = min(frames / fps, samples / rate)
            if not len(self._starts(length, reach, number, fps)):
                raise RecipeError(f"{self.name}: {takes}; these have {length:g}: lower span or window")
            for place in range(count_rows(batch)):
                row = {key: value[place] for key, value in batch.items() if value.ndim}
                heard = int(row["audio_mask"].sum()) if "audio_mask" in row else samples
                starts = self._starts(min(length, heard / rate), reach, number, fps)
                clip: Clip | str = Clip(row, starts, number, fps, rate)
                if not len(starts):
                    clip = f"too short ({takes})"
                elif not audible(row["audio"]):
                    clip = "silent"
                elif bool((row["video"] == row["video"][:1]).all()):
                    clip = "without motion"
                yield int(row["id"]), clip

    def _starts(self, length: float, reach: float, frames: int, fps: float) -> np.ndarray:
        """The frame at which each window begins in a clip of so many seconds; none where it has no room.

        A sound may end half a frame before its last picture does.
        """
        first = int(np.ceil(reach * fps - 1e-6))
        last = int(np.floor((length - reach) * fps + 0.5)) - frames
        return np.unique(np.linspace(first, last, self.windows).round().astype(int)) if last >= first else np.zeros(0)

    def _row(self, name: str, answers: Sequence[Sequence[float] | np.ndarray], right: np.ndarray) -> Row:
        scores = []
        for found in answers:
            apart = np.abs(np.asarray(found) - right)
            scores.append(
                {WITHIN.name: float((apart <= self.step + 1e-9).mean()), ERROR.name: 1000 * float(apart.mean())}
            )
        return Row.of_seeds(name, "", scores, shares=(WITHIN.name,), trials=len(right))


@dataclass(frozen=True)
class Clip:
    """A row and where its windows are.

    Attributes:
        row: a row of a batch.
        starts: frame at which each window of the picture begins.
        frames: of a window.
        fps: of the pictures, in 1/s.
        rate: of the sound, in Hz.
    """

    row: Batch
    starts: np.ndarray
    frames: int
    fps: float
    rate: float

    def seen(self) -> Batch:
        """The windows of the picture."""
        return {"video": torch.stack([self.row["video"][start : start + self.frames] for start in self.starts])}

    def heard(self, grid: np.ndarray, late: int) -> Batch:
        """Of each window the sound at each offset, of a clip whose sound is `late` samples late."""
        length = round(self.frames / self.fps * self.rate)
        starts = (self.starts[:, None] / self.fps + grid) * self.rate - late
        index = torch.from_numpy(starts.round().astype(np.int64).reshape(-1, 1) + np.arange(length))
        index = index.clamp(0, len(self.row["audio"]) - 1)  # a sample, by rounding
        return {key: self.row[key][index] for key in ("audio", "audio_mask") if key in self.row}


def _scores(network: Network, clip: Clip, grid: np.ndarray, late: int, batch_size: int) -> np.ndarray:
    """Of each offset, the mean over the windows, float64 (G,)."""
    sound = network.modalities.index("audio")
    seen, seen_vectors = encode_side(network, 1 - sound, clip.seen())
    heard = clip.heard(grid, late)
    window = torch.arange(len(clip.starts)).repeat_interleave(len(grid))
    parts: list[Tensor] = []
    for index in torch.arange(len(window)).split(batch_size):
        features, vectors = encode_side(network, sound, {key: value[index] for key, value in heard.items()})
        if network.pair.match is not None:
            sides = (features, seen) if sound == 0 else (seen, features)
            items = (torch.arange(len(index)), window[index])
            parts.append(matcher(network, *sides, batch_size)(*(items if sound == 0 else items[::-1])))
        else:
            assert vectors is not None  # a pair has either
            assert seen_vectors is not None
            parts.append((vectors * seen_vectors[window[index]]).sum(1))
    scores: np.ndarray = torch.cat(parts).double().view(-1, len(grid)).mean(0).numpy()
    return scores


def _paths(split: Split, rows: Iterable[int]) -> dict[int, str]:
    """Row -> the path of its clip, where that has one."""
    if not isinstance(split, SourceSplit) or isinstance(split.source, StreamSource):
        return {}
    column = find_column(split.spec, "video", split.source.columns)
    clips = split.source.select([column])
    found = {row: plain(clips.row(row)[column]) for row in rows}
    return {row: path for row, path in found.items() if isinstance(path, str)}


def _write(path: Path, found: Mapping[int, np.ndarray | None], paths: Mapping[int, str], grid: np.ndarray) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["id", *(["path"] if paths else []), "offset_ms", "lead"])
    for row, scores in found.items():
        answer = ["", ""]
        if scores is not None:
            lead = (scores.max() - scores.mean()) / max(float(scores.std()), 1e-12)
            answer = [f"{1000 * grid[scores.argmax()]:.0f}", f"{lead:.3f}"]
        writer.writerow([row, *([paths.get(row, "")] if paths else []), *answer])
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text.getvalue())
