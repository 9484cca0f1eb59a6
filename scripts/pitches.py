"""The recorded notes whose pitch is known for sure: what is played agrees with what the sample is called.

    MMSSL_DATA=path/to/data python scripts/pitches.py     writes build/compared/pitches, a parquet file a split

The column `pitch` of the notes is a sound font's root key, which is 60 for most whatever sounds. The name of a sample
tells the note, as in `Flute D5(L)`, and octaves are counted in different ways there. Kept are rows whose period, by
autocorrelation, is that of the named pitch class to half a semitone.
"""

from __future__ import annotations

import math
import os
import re
from pathlib import Path
from typing import Any

import numpy as np

PITCHES = ("C", "C#", "D", "D#", "E", "F", "F#", "G", "G#", "A", "A#", "B")
FOLDER = Path(__file__).resolve().parent.parent / "build" / "compared" / "pitches"
RATE, SECONDS = 16000, 2.5
NAMED = re.compile(r"(?:^|[ _a-z])([A-Ga-g])([#b]?) ?\d0?(?=\(|$|[ _-])")


def named_pitch(sample: str) -> int | None:
    """Semitones above C that the last note in a sample's name is, 0 to 11; None where it names none."""
    if not (found := NAMED.findall(sample)):
        return None
    letter, sign = found[-1]
    return (PITCHES.index(letter.upper()) + {"#": 1, "b": -1, "": 0}[sign]) % 12


def heard_note(sound: np.ndarray, rate: int = RATE) -> float | None:
    """MIDI number of the shortest lag at which half a second, float (S,), is like itself; None where it is at none."""
    heard = sound[rate // 20 :][: rate // 2]
    if len(heard) < rate // 8:
        return None
    window = np.hanning(len(heard))
    likeness, own = (_autocorrelation(x) for x in ((heard - heard.mean()) * window, window))
    likeness = likeness / (likeness[0] + 1e-12) / (own / own[0] + 1e-3)
    low, high = rate // 2500, rate // 40
    lags = np.arange(low, high)
    around = likeness[low - 1 : high + 1]
    peaks = lags[(around[1:-1] > around[:-2]) & (around[1:-1] >= around[2:])]
    if not len(peaks) or likeness[low:high].max() < 0.5:
        return None
    lag = next((lag for lag in peaks if likeness[lag] > 0.85 * likeness[low:high].max()), peaks[0])
    before, at, after = likeness[lag - 1 : lag + 2]
    period = lag + 0.5 * (before - after) / (before - 2 * at + after)
    return 69 + 12 * math.log2(rate / period / 440)


def _autocorrelation(x: np.ndarray) -> np.ndarray:
    return np.fft.irfft(np.abs(np.fft.rfft(x, 2 * len(x))) ** 2)[: len(x)]


def known(row: dict[str, Any]) -> dict[str, Any]:
    """`pitch_class` (C to B) and `note` (MIDI number, 60 is 261.6 Hz) of a row; empty and 0 where it is not known."""
    from mmssl.media.audio import decode_audio

    sound, valid = decode_audio(row["audio"], RATE, SECONDS)
    said, heard = named_pitch(row["sample"]), heard_note(sound[valid].numpy())
    if said is None or heard is None or abs(off := (heard - said + 6) % 12 - 6) > 0.5:
        return {"pitch_class": "", "note": 0}
    return {"pitch_class": PITCHES[said], "note": round(heard - off)}


def write_pitches() -> None:
    """Write the files, unless they are there."""
    import datasets

    for split in ("train", "validation", "test"):
        target = FOLDER / f"{split}.parquet"
        if not target.exists():
            source = Path(os.environ["MMSSL_DATA"]) / "notes" / target.name
            rows = datasets.load_dataset("parquet", data_files=str(source), split="train")
            found = [known(row) for row in rows]
            for key in ("pitch_class", "note"):
                rows = rows.add_column(key, [one[key] for one in found])
            kept = rows.filter(lambda row: row["pitch_class"] != "")
            FOLDER.mkdir(parents=True, exist_ok=True)
            kept.to_parquet(target)
            print(f"{split}: {len(kept)} of {len(rows)} notes")


if __name__ == "__main__":
    write_pitches()
