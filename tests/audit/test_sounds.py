"""Sounds without structure: files are what they say, noise tells nothing of speed or pitch, and a tone does."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mmssl import recipe as recipes
from mmssl.audit.clip_rows import Rows
from mmssl.audit.networks import stand_in
from mmssl.audit.nulls import HUM, Arm
from mmssl.audit.own_files import audit_recipe
from mmssl.audit.sounds import (
    HISS,
    OCTAVES,
    PITCH,
    draw_sound,
    measure_sounds,
    sound_kinds,
    sound_rows,
    with_hum,
    write_sounds,
)
from mmssl.media.clip import write_clip
from mmssl.objectives.transformation.sound_speed import SoundSpeed
from mmssl.recipe import Data

SHORT = {"data.audio.seconds": 0.6, "training.workers": 0}


@pytest.mark.parametrize(
    "kind", ["wav pcm_s16le at 22050", "flac flac at 16000", "mp3 mp3 at 44100", "ogg opus at 48000"]
)
def test_sounds_are_written_as_the_users_are(tmp_path, kind):
    given = recipes.load("sound_speed_toy", SHORT)
    written = write_sounds(tmp_path / "noise", given, Arm(HISS, kind), 2, 0)
    assert sound_kinds(written) == {kind: 2}


def test_kinds_of_files_are_counted_with_their_rates(tmp_path):
    samples = np.zeros(8000, np.float32)
    for name, codec, rate in (
        ("a.wav", "pcm_s16le", 16000),
        ("b.wav", "pcm_s16le", 16000),
        ("c.mp3", "libmp3lame", 44100),
    ):
        write_clip(tmp_path / name, None, 0, samples, rate, audio_codec=codec)
    (tmp_path / "broken.wav").write_bytes(b"no sound")
    assert sound_kinds(Data(source=str(tmp_path))) == {"wav pcm_s16le at 16000": 2, "mp3 mp3 at 44100": 1}
    assert sound_kinds(Data(source="toy", limit=4)) == {}


def test_noise_is_as_strong_in_every_octave_or_in_every_hertz():
    octaves, flat = (
        np.mean([np.abs(np.fft.rfft(draw_sound(Arm(null), 1, 16000, row))) ** 2 for row in range(20)], 0)
        for null in (OCTAVES, HISS)
    )
    bands = [slice(250 * 2**i, 500 * 2**i) for i in range(4)]
    strength = [octaves[band].sum() for band in bands]
    assert max(strength) / min(strength) < 1.2
    strength = [flat[band].mean() for band in bands]
    assert max(strength) / min(strength) < 1.2


def test_the_control_has_one_tone_in_the_same_noise():
    given = recipes.load("sound_speed_toy", SHORT)
    silence = {"audio": torch.zeros(2, 16000)}
    hummed = with_hum(Rows(silence, silence), given, 0)
    for part in hummed:
        assert (np.abs(np.fft.rfft(part["audio"].numpy())).argmax(1) == PITCH).all()
    assert not torch.equal(hummed.train["audio"], hummed.test["audio"])
    assert not silence["audio"].any()


class OwnLevel(SoundSpeed):
    """Windows as loud as their speed, as resampling without normalizing leaves them."""

    def inputs_of(self, windows, scored):
        inputs = super().inputs_of(windows, scored)
        level = torch.tensor([float(speed) for speed in self.speeds]).view(1, -1, 1)
        return inputs | {"audio": inputs["audio"] * level**2}


@pytest.mark.long
def test_noise_tells_no_speed_and_a_level_does():
    given, arm = recipes.load("sound_speed_toy", SHORT), Arm(HISS, "wav pcm_s16le at 16000")
    rows = sound_rows(given, arm, 48, 0)
    clean = measure_sounds(stand_in(given), arm, rows, 30)
    leaking = stand_in(given)
    leaking.__class__ = OwnLevel
    assert clean.verdict == "clean", clean
    assert measure_sounds(leaking, arm, rows, 30).verdict == "leaks"
    assert measure_sounds(stand_in(given), Arm(HISS, arm.file, HUM), with_hum(rows, given, 0), 30).verdict == "leaks"


@pytest.mark.long
def test_the_audit_asks_them_in_the_users_files(tmp_path):
    for row in range(6):
        sound = draw_sound(Arm(HISS), 1.0, 16000, row)
        write_clip(tmp_path / f"{row}.flac", None, 0, sound, 16000, audio_codec="flac")
    given = recipes.load("pitch_shift_toy", SHORT | {"data.source": str(tmp_path), "data.audio.seconds": 1.0})
    found = audit_recipe(given, steps=1, rows=64)
    assert found.files == {"flac flac at 16000": 6}
    assert [one.arm.null for one in found.findings] == [HISS, HISS, OCTAVES, OCTAVES]
    assert "white noise, flac flac at 16000, steady tone planted" in str(found)
