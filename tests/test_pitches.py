"""scripts/pitches.py: which note a sample is called, and which one is heard."""

from __future__ import annotations

import io
import wave

import numpy as np
import pitches
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pitches import PITCHES, heard_note, named_pitch


@pytest.mark.parametrize(
    ("name", "pitch"),
    [
        ("Flute D5(L)", "D"),
        ("E's Bassoon A#1(L)", "A#"),
        ("B3 D4", "D"),  # an organ called B3
        ("tromboneBb3", "A#"),
        ("tp_g3", "G"),
        ("Celesta F# 4(L)", "F#"),
        ("808 Kick 1", None),
        ("Cb4", "B"),
    ],
)
def test_the_name_of_a_sample_tells_the_pitch_class(name, pitch):
    found = named_pitch(name)
    assert (None if found is None else PITCHES[found]) == pitch


@pytest.mark.parametrize("note", [40, 57, 69, 84])
def test_the_note_of_a_tone_with_overtones_is_heard(note):
    seconds = np.arange(16000) / 16000
    base = 440 * 2 ** ((note - 69) / 12)
    tone = sum(np.sin(2 * np.pi * base * k * seconds + k) / k for k in range(1, 6))
    assert heard_note(tone) == pytest.approx(note, abs=0.2)


def test_noise_and_clicks_have_no_note():
    noise = np.random.default_rng(0).standard_normal(16000)
    assert heard_note(noise) is None
    assert heard_note(noise[:1000]) is None


def test_rows_whose_note_is_known_keep_their_sound(tmp_path, monkeypatch):
    sound = io.BytesIO()
    with wave.open(sound, "wb") as file:
        file.setparams((1, 2, 16000, 0, "NONE", ""))
        tone = sum(np.sin(2 * np.pi * 440 * k * np.arange(16000) / 16000) / k for k in range(1, 6))
        file.writeframes((8000 * tone).astype("<i2").tobytes())
    rows = [{"audio": {"bytes": sound.getvalue(), "path": None}, "sample": name} for name in ("Flute A4", "Flute C4")]
    (tmp_path / "notes").mkdir()
    for split in ("train", "validation", "test"):
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "notes" / f"{split}.parquet")
    monkeypatch.setenv("MMSSL_DATA", str(tmp_path))
    monkeypatch.setattr(pitches, "FOLDER", tmp_path / "known")
    pitches.write_pitches()
    (found,) = pq.read_table(tmp_path / "known" / "test.parquet").to_pylist()
    assert found["audio"]["bytes"] == sound.getvalue()
    assert (found["sample"], found["pitch_class"], found["note"]) == ("Flute A4", "A", 69)
