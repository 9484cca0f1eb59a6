"""What happens when: frames and segments as scikit-learn scores them, and an ear that hears beeps."""

from __future__ import annotations

import json

import datasets
import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, f1_score
from torch import Tensor, nn

import mmssl
from mmssl.adaptation.placed import Placed
from mmssl.adaptation.probes.frames import Frames, over_time
from mmssl.adaptation.rows import Reads, open_rows
from mmssl.adaptation.table import CONSTANT, PRETRAINED, RANDOM
from mmssl.adaptation.targets import find_target
from mmssl.adaptation.targets.events import Events
from mmssl.decode_settings import AudioDecode
from mmssl.encoders.base import Encoder, Features
from mmssl.errors import DataError, RecipeError
from mmssl.recipe import Data

RATE, SECONDS = 400, 4.0
TONES = {"low": 20, "high": 90}
HOW = Data(source="here", audio=AudioDecode(rate=RATE, seconds=SECONDS), start="first")


def beeps(rows: int, seed: int, **columns: list) -> datasets.Dataset:
    """Sounds of 6 s with tones of two pitches, which may sound together."""
    dice = np.random.default_rng(seed)
    sounds, events = [], []
    time = np.arange(6 * RATE) / RATE
    for _ in range(rows):
        sound, own = np.zeros(len(time), np.float32), []
        for name, hertz in TONES.items():
            for _ in range(dice.integers(1, 3)):
                start, length = dice.uniform(0, 5), dice.uniform(0.2, 0.8)
                sound[(time >= start) & (time < start + length)] += (
                    0.3 * np.sin(2 * np.pi * hertz * time)[(time >= start) & (time < start + length)]
                )
                own.append({"start": start, "end": start + length, "label": name})
        sounds.append({"array": sound, "sampling_rate": RATE})
        events.append(own)
    return datasets.Dataset.from_dict({"audio": sounds, "events": events, **columns})


class Bands(Encoder):
    """Loudness of each pitch in each tenth of a second; one that is deaf hears the clock alone."""

    modality, dim = "audio", 2

    def __init__(self, deaf: bool = False, slow: int = 1) -> None:
        super().__init__()
        self.one, self.deaf, self.slow = nn.Parameter(torch.ones(())), deaf, slow

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Features:
        frames = x.unflatten(1, (-1, RATE // 10 * self.slow))
        power = torch.fft.rfft(frames).abs()[:, :, [hertz * self.slow // 10 for hertz in TONES.values()]]
        if self.deaf:
            power = torch.arange(power.shape[1]).float()[None, :, None].expand_as(power).contiguous()
        tokens = power * self.one
        return Features(tokens, tokens.mean(1), (1, tokens.shape[1]))

    def layers(self, x: Tensor, valid: Tensor | None = None) -> dict[str, Features]:
        return {"first": self(x, valid)}


def heard(encoder=None, rows=None, **options):
    options = {"test": beeps(12, 1), "data": HOW, "label": "events", "baseline": False} | options
    return mmssl.adapt(encoder or Bands(), rows or beeps(16, 0), probe="frames", **options)


def target_of(rows, how=HOW, **options) -> tuple[Events, Tensor]:
    split = open_rows(rows, Reads(("audio",), {}), how, None, None, "train")
    cells = [Placed(split, row, "events") for row in range(len(rows))]
    target = Events(cells, **options)
    labels = target.encode(cells)
    target.look(labels, labels)
    return target, labels


def test_an_ear_that_hears_finds_the_events_and_a_deaf_one_does_not():
    table, deaf = heard(layers=True, c=[1.0]), heard(Bands(deaf=True))
    found = table.row(PRETRAINED).metrics
    assert found["frame_average_precision"] > 0.97
    assert found["segment_f1"] > 0.95
    assert table.row(PRETRAINED, "first").metrics == found
    constant = table.row(CONSTANT).metrics
    assert deaf.row(PRETRAINED).metrics["frame_average_precision"] < constant["frame_average_precision"] + 0.15
    assert table.counts["classes"] == 2


def test_scores_equal_scikit_learns_on_flattened_frames():
    target, labels = target_of(beeps(5, 0))
    truth = target.frames(labels)
    assert truth.shape == (5, 40, 2)
    answers = torch.rand(5, 40, 2, generator=torch.Generator().manual_seed(0)).double()
    found = target.score(answers, labels)
    flat, right = answers.flatten(0, 1).numpy(), truth.flatten(0, 1).numpy()
    assert found["frame_average_precision"] == pytest.approx(average_precision_score(right, flat, average="macro"))
    segments = [(values.unflatten(1, (4, 10)).amax(2) > 0.5).flatten().numpy() for values in (answers, truth.float())]
    assert found["segment_f1"] == pytest.approx(f1_score(segments[1], segments[0]))
    assert target.score(truth.double(), labels) == {"frame_average_precision": 1.0, "segment_f1": 1.0}
    share = target.constant(labels)
    assert share.flatten().tolist() == pytest.approx(right.mean(0).tolist())
    assert target.score(share, labels)["frame_average_precision"] == pytest.approx(right.mean(0).mean())


def test_answers_equal_scikit_learns_regression_on_the_frames():
    rows = beeps(6, 0)
    target, labels = target_of(rows)
    x = torch.randn(6, 40, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    (answers,) = Frames().predict(target, x, labels, x, [{"C": 1.0}], 0)
    flat, truth = x.flatten(0, 1).numpy(), target.frames(labels).flatten(0, 1).numpy()
    flat = (flat - flat.mean(0)) / flat.std(0)
    for place in range(2):
        other = LogisticRegression(C=1.0, tol=1e-10, max_iter=1000).fit(flat, truth[:, place])
        assert answers.flatten(0, 1)[:, place].numpy() == pytest.approx(other.predict_proba(flat)[:, 1], abs=1e-4)


def test_events_stand_where_the_window_begins():
    """Of six seconds four are read, from the beginning, the middle, or around a second that a column names."""
    rows = beeps(1, 0).remove_columns("events").add_column("events", [[{"start": 3.0, "end": 3.15, "label": "x"}]])
    for how, first in (
        (HOW, 30),
        (HOW.model_copy(update={"start": "middle"}), 20),
        (HOW.model_copy(update={"columns": {"center": "at"}}), 17),
    ):
        target, labels = target_of(rows.add_column("at", [3.3]), how)
        frames = target.frames(labels)[0, :, 0].nonzero().flatten().tolist()
        assert frames == [first, first + 1]  # a frame that is touched counts


def test_keys_json_lengths_and_moments():
    rows = beeps(1, 0).remove_columns("events")
    written = json.dumps([{"time": 1.0, "seconds": 0.3, "what": "a"}, {"time": 2.0, "seconds": 9, "what": "b"}])
    target, labels = target_of(
        rows.add_column("events", [written]), start="time", length="seconds", classes="what", frames=5
    )
    frames = target.frames(labels)[0]
    assert frames.shape == (20, 2)
    assert frames[:, 0].nonzero().flatten().tolist() == [5, 6]
    assert frames[:, 1].nonzero().flatten().tolist() == list(range(10, 20))
    target = target.asked(start="time", end="end", length=None, classes="kind", frames=10)
    told = target.look(labels, labels)
    assert target.frames(labels)[0, :, 0].nonzero().flatten().tolist() == [10, 20]
    assert "no event has the key 'end', so that each is one moment" in told[0]
    assert "no event has the key 'kind', so that all are of one class" in told[1]


class Filled(Bands):
    """It fills sounds up with silence to one and a half of their length, as some networks of spectrograms do."""

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Features:
        return super().forward(nn.functional.pad(x, (0, x.shape[1] // 2)), valid)

    def span(self, x: Tensor, fps: float | None = None) -> float:
        return 1.5 * x.shape[1] / RATE


def test_what_a_network_fills_up_is_no_part_of_the_window():
    assert heard(Filled()).row(PRETRAINED).metrics == heard().row(PRETRAINED).metrics
    tokens = torch.arange(12.0).view(1, 12, 1)
    found = over_time(Features(tokens, tokens[:, 0], (1, 12)), "audio", 4, 0.75)
    torch.testing.assert_close(found[0, :, 0], torch.tensor([6.0, 26.0, 46.0, 66.0]) / 9)  # 2.25 moments each
    fewer = over_time(Features(tokens, tokens[:, 0], (1, 12)), "audio", 12, 0.5)
    torch.testing.assert_close(fewer[0, 2:, 0], torch.arange(10) / 2 + 0.75)


def test_frames_are_as_long_for_every_encoder():
    tokens = torch.arange(24.0).view(1, 24, 1)
    sound = over_time(Features(tokens, tokens[:, 0], (2, 12)), "audio", 4)  # bands, then frames
    assert sound[0, :, 0].tolist() == [7, 10, 13, 16]
    clip = over_time(Features(tokens, tokens[:, 0], (4, 2, 3)), "video", 4)
    assert clip[0, :, 0].tolist() == [2.5, 8.5, 14.5, 20.5]
    assert over_time(Features(tokens, tokens[:, 0], (4, 2, 3)), "video", 8)[0, 3:5, 0].tolist() == [10, 13]
    slow = heard(Bands(slow=5)).row(PRETRAINED).metrics["frame_average_precision"]
    assert slow < heard().row(PRETRAINED).metrics["frame_average_precision"]
    with pytest.raises(RecipeError, match="those of audio have a grid \\(24,\\)"):
        over_time(Features(tokens, tokens[:, 0], (24,)), "audio", 4)


def test_what_they_are_is_seen_in_the_cells():
    assert find_target([[], [{"start": 0.0, "end": 1.0}]], None, "x") is Events
    assert find_target([["a"], ["b"]], None, "x") is not Events


def test_random_weights_stand_in_the_table():
    encoder = mmssl.encoder("timm/test_resnet", modality="audio", rate=RATE, n_fft=64, hop=20, mels=16)
    table = heard(encoder, beeps(6, 0), baseline=True, seeds=2, test=beeps(4, 1), shots=4)
    assert len(table.row(RANDOM).runs["segment_f1"]) == 2


def test_sentences_where_it_cannot_work():
    rows = beeps(6, 0)
    with pytest.raises(DataError, match=r"no key 'begin'; it has: .*; name it with start"):
        heard(rows=rows, start="begin")
    bad = rows.remove_columns("events").add_column("events", [[{"start": 2.0, "end": 1.0}]] * 6)
    with pytest.raises(DataError, match="row 0: an event should not end before it begins, found 2 to 1 s"):
        heard(rows=bad, test=bad.select([0]))
    late = rows.remove_columns("events").add_column("events", [[{"start": 5.0, "end": 6.0, "label": "x"}]] * 6)
    with pytest.raises(DataError, match="none of the 6 training rows has an event"):
        heard(rows=late, test=late.select([0]))
    with pytest.raises(RecipeError, match="frames reads sounds or clips, and '' reads image"):
        heard(mmssl.encoder("timm/test_resnet", modality="image"))
