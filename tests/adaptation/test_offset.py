"""By how much sound and picture are apart: a flash and a click, and a task that compares how bright with how loud."""

from __future__ import annotations

import csv

import datasets
import numpy as np
import pytest
import torch
from torch import Tensor, nn

import mmssl
from mmssl.adaptation.probes.offset import Clip, _paths, _write
from mmssl.adaptation.rows import Reads, SourceSplit
from mmssl.adaptation.table import CHANCE, CONSTANT, PRETRAINED, RANDOM
from mmssl.data.base import MapSource
from mmssl.encoders.base import Encoder, Features
from mmssl.errors import DataError, RecipeError
from mmssl.objectives.base import Objective, Pair
from mmssl.recipe import Data

FPS, RATE, SECONDS = 25, 500, 6


class Bright(Encoder):
    modality, dim = "video", 25

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Features:
        over_time = x.float().mean((2, 3, 4)) * self.one
        return Features(over_time[:, :, None], over_time, (over_time.shape[1], 1, 1))


class Loud(Encoder):
    modality, dim, rate = "audio", 25, RATE

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Features:
        over_time = x.abs().unflatten(1, (-1, RATE // FPS)).mean(2) * self.one
        return Features(over_time[:, None], over_time, (1, over_time.shape[1]))


class InSync(Objective):
    """Compares over time; one that is blind says the same of every pair."""

    def __init__(self, embeds: bool, blind: bool = False, swapped: bool = False) -> None:
        super().__init__({"video": Bright(), "audio": Loud()})
        self.embeds, self.names, self.blind = embeds, ("audio", "video") if swapped else ("video", "audio"), blind
        self.window = 1.0

    def vector(self, features: Features) -> Tensor:
        return nn.functional.normalize(features.pooled - features.pooled.mean(1, keepdim=True), dim=1)

    def match(self, a: Features, b: Features) -> Tensor:
        return (self.vector(a) * self.vector(b)).sum(1) * (0 if self.blind else 1)

    @property
    def pairs(self) -> tuple[Pair, ...]:
        spaces = (self.vector, self.vector) if self.embeds else None
        return (Pair(*self.names, spaces, None if self.embeds else self.match),)


def flashes(rows: int, late: float = 0.0) -> list[dict[str, Tensor]]:
    """Frames that flicker at random, and noise that is as loud as they are bright, `late` seconds later."""
    dice = torch.Generator().manual_seed(0)
    level = torch.randint(0, 256, (rows, FPS * SECONDS), generator=dice)
    video = level[:, :, None, None, None].to(torch.uint8).expand(-1, -1, 3, 2, 2).contiguous()
    audio = (level / 255).repeat_interleave(RATE // FPS, dim=1).roll(round(late * RATE), dims=1)
    return [{"video": video, "audio": audio, "id": torch.arange(rows)}]


def apart(task, rows=None, **options):
    return mmssl.adapt(task, rows or flashes(12), probe="offset", **{"baseline": False, "step": 0.04} | options)


@pytest.mark.parametrize("embeds", [True, False])
@pytest.mark.parametrize("swapped", [True, False])
def test_one_that_knows_finds_what_was_added(embeds, swapped):
    table = apart(InSync(embeds, swapped=swapped))
    found = table.row(PRETRAINED).metrics
    assert found["within_a_step"] == 1
    assert found["mean_absolute_error_ms"] <= 20  # half a step, for offsets lie between them
    constant = table.row(CONSTANT).metrics
    assert constant["within_a_step"] < 0.3
    assert 200 < constant["mean_absolute_error_ms"] < 600  # of an even draw up to 800 ms: 400
    assert table.row(CHANCE).metrics["within_a_step"] == pytest.approx(2 / 41, abs=0.006)
    assert table.row(CHANCE).metrics["mean_absolute_error_ms"] == pytest.approx(1600 / 3, rel=0.3)
    assert apart(InSync(False, blind=True)).row(PRETRAINED).metrics["within_a_step"] < 0.3


def test_what_is_late_is_positive_and_written_for_every_row(tmp_path):
    apart(InSync(True), flashes(3, late=0.24), to=str(tmp_path / "there" / "x.csv"))
    with (tmp_path / "there" / "x.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["offset_ms"] for row in rows] == ["240"] * 3
    assert [row["id"] for row in rows] == ["0", "1", "2"]
    assert all(float(row["lead"]) > 3 for row in rows)


def test_rows_without_an_answer_are_left_out_and_told(tmp_path):
    (batch,) = flashes(6, late=0.24)
    ends = torch.full((6,), RATE * SECONDS)
    ends[3], ends[4] = 5 * RATE, 2 * RATE
    batch["audio_mask"] = torch.arange(RATE * SECONDS) < ends[:, None]
    batch["audio"] = batch["audio"] * batch["audio_mask"]
    batch["audio"][1], batch["video"][2] = 0.0, 7
    table = apart(InSync(True), [batch], to=str(tmp_path / "x.csv"))
    assert table.test_rows == 3
    text = str(table)
    assert "1 clip left out: silent" in text
    assert "1 clip left out: without motion" in text
    assert (
        "1 clip left out: too short (a window of 1 s, moved by twice the span of 0.8 s either way, takes clips of"
        in text
    )
    with (tmp_path / "x.csv").open() as file:
        assert [row["offset_ms"] for row in csv.DictReader(file)] == ["240", "", "", "240", "", "240"]
    batch["audio"][:] = 0
    with pytest.raises(DataError, match=r"5 clips left out: silent; 1 clip left out: too short"):
        apart(InSync(True), [batch])


def test_the_path_of_a_clip_stands_with_its_offset(tmp_path):
    source = ListSource([{"video": {"path": "a, b.mp4", "bytes": b""}}, {"video": "c.mp4"}])
    split = SourceSplit(Data(source="clips"), source, "clips", Reads(("video", "audio"), {}))
    _write(tmp_path / "x.csv", {1: None, 0: np.array([0.0, 2.0])}, _paths(split, [1, 0]), np.array([-0.08, 0.08]))
    written = (tmp_path / "x.csv").read_text()
    assert written == 'id,path,offset_ms,lead\n1,c.mp4,,\n0,"a, b.mp4",80,1.000\n'


class ListSource(MapSource):
    name = "clips"

    def __init__(self, rows):
        self.rows, self.columns = rows, ("video",)

    def __len__(self):
        return len(self.rows)

    def row(self, index):
        return self.rows[index]


def test_windows_are_cut_from_a_sound_that_was_moved():
    row = {"video": torch.arange(50)[:, None], "audio": torch.arange(200.0)}
    clip = Clip(row, np.array([20, 24]), 5, 10.0, 40.0)
    assert clip.seen()["video"][1].flatten().tolist() == list(range(24, 29))
    grid = np.array([-0.5, 0.0, 0.5])
    assert clip.heard(grid, 0)["audio"][:, 0].tolist() == [60, 80, 100, 76, 96, 116]
    assert clip.heard(grid, 20)["audio"][2].tolist() == list(range(80, 100))  # late by half a second: in sync there


@pytest.mark.quick(1)
@pytest.mark.parametrize(
    "form",
    [{"min_shift": 0.5}, {"form": "shift", "offsets": 2}, {"form": "contrast", "moments": 3}],
    ids=["match", "shift", "contrast"],
)
def test_random_weights_stand_in_the_table(form):
    encoders = {
        "video": mmssl.encoder("timm/test_resnet", modality="video"),
        "audio": mmssl.encoder("timm/test_resnet", modality="audio", rate=RATE, n_fft=64, hop=20, mels=16),
    }
    task = mmssl.objective("temporal_alignment", encoders, window=1.0, width=8, **form)
    rows = [{**batch, "video": batch["video"].repeat_interleave(8, 3).repeat_interleave(8, 4)} for batch in flashes(3)]
    table = apart(task, rows, baseline=True, seeds=2, step=0.4, windows=2)
    assert len(table.row(RANDOM).runs["within_a_step"]) == 2
    assert "a window 1 s" in table.notes[0]


def test_one_window_of_a_clip_is_looked_at():
    rows = datasets.Dataset.from_dict({"video": ["a.mp4"], "audio": ["a.mp4"]})
    with pytest.raises(RecipeError, match="offset looks at one window of a sound or clip, and windows = 3; set 1"):
        apart(InSync(True), rows, data=Data(source="here", windows=3))


def test_sentences_where_it_cannot_work():
    with pytest.raises(RecipeError, match=r"span = 0.5 should be a whole number of steps of 0.2 s"):
        apart(InSync(True), span=0.5, step=0.2)
    with pytest.raises(RecipeError, match=r"takes clips of 9 s; these have 6: lower span or window"):
        apart(InSync(True), span=2.0, step=0.4)
