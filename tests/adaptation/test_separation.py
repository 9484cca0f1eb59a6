"""The sound of what is seen, out of a mixture: with an eye that sees which tone sounds, and one that sees nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import mmssl
from mmssl.adaptation.probes.separation import ALONE, UNCHANGED, Clips, Spectrum, _mixtures
from mmssl.adaptation.table import CEILING, PRETRAINED, RANDOM
from mmssl.encoders.base import Encoder, Features
from mmssl.errors import DataError, RecipeError
from mmssl.media.audio import decode_audio
from mmssl.ops.sound_separation import si_sdr, unit_loudness

RATE, SAMPLES = 4000, 2000
TONES = (300, 700, 1200, 1700)
SMALL = {"n_fft": 128, "hop": 32, "width": 8, "levels": 3, "batch_rows": 6}


class Eye(Encoder):
    """Clips -> which of four is bright in each frame; a blind one sees nothing but black."""

    modality, dim = "video", 4

    def __init__(self, blind: bool = False) -> None:
        super().__init__()
        self.one, self.blind = nn.Parameter(torch.ones(())), blind

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Features:
        tokens = (0 if self.blind else 1) * self.one * x.float().mean(2).flatten(2) / 255
        return Features(tokens[:, :, None].flatten(1, 2), tokens.mean(1), (x.shape[1], 1, 1))


def clips(rows: int, seed: int = 0) -> list[dict[str, Tensor]]:
    """Of 2 x 2 pixels one is bright, and a tone of its pitch sounds."""
    dice = np.random.default_rng(seed)
    which = torch.from_numpy(dice.permutation(np.arange(rows) % len(TONES)))
    video = nn.functional.one_hot(which, 4).view(-1, 1, 1, 2, 2).expand(-1, 5, 3, 2, 2) * 255
    phase = torch.from_numpy(dice.uniform(0, 6, rows))[:, None]
    pitch = torch.tensor(TONES)[which][:, None]
    audio = torch.sin(2 * torch.pi * pitch * torch.arange(SAMPLES) / RATE + phase)
    return [{"video": video.to(torch.uint8).contiguous(), "audio": 0.3 * audio.float(), "id": torch.arange(rows)}]


def separated(encoder, rows=32, **options):
    options = {"test": clips(12, 1), "baseline": False, "seeds": 1, "steps": 60, "lr": 5e-3} | SMALL | options
    return mmssl.adapt(encoder, clips(rows), probe="separation", **options)


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sounds")
    return separated(Eye(), sounds=str(folder), examples=2), folder


@pytest.mark.long
def test_one_who_sees_takes_the_sound_out_and_one_who_hears_alone_does_not(seen):
    table, _ = seen
    rows = {row.encoder: row.metrics["si_sdr_improvement"] for row in table.rows}
    assert rows[UNCHANGED] == 0
    assert rows[CEILING] > 10
    assert "intervals" not in str(table)  # dB have none
    assert rows[PRETRAINED] > 6
    assert rows[PRETRAINED] < rows[CEILING]
    assert rows[ALONE] < 2
    assert table.row(UNCHANGED).metrics["si_sdr"] == pytest.approx(0, abs=1.5)  # equally loud
    assert table.margin == pytest.approx(rows[PRETRAINED] - max(rows[ALONE], 0))


@pytest.mark.long
def test_an_encoder_that_sees_nothing_is_no_help():
    assert separated(Eye(blind=True)).row(PRETRAINED).metrics["si_sdr_improvement"] < 2


@pytest.mark.long
def test_sounds_are_written_and_sound_as_they_were_scored(seen):
    _, folder = seen
    names = sorted(path.name for path in folder.iterdir())
    assert names == sorted(
        [f"row {row}{end}" for row in (0, 1) for end in (".png", ", found.wav", ", mixture.wav", ", truth.wav")]
    )
    read = {
        end: decode_audio(folder / f"row 0, {end}.wav", 16_000, SAMPLES / 16_000)[0] for end in ("mixture", "truth")
    }
    truth = clips(12, 1)[0]["audio"][0]
    assert si_sdr(read["truth"], truth) > 40
    assert abs(si_sdr(read["mixture"], truth)) < 6


def test_no_sound_is_mixed_with_itself():
    sounds = torch.eye(7)
    mixed = _mixtures(Clips(torch.arange(7), [torch.zeros(7, 1, 1)], sounds, torch.empty(0))).mixture
    assert (mixed.sum(1) == 2).all()
    assert mixed.max() == 1
    assert (mixed.sum(0) == 2).all()  # each is on the screen once and off it once


def test_what_is_transformed_comes_back_and_is_torchs_own():
    sound = torch.randn(2, 500, generator=torch.Generator().manual_seed(0))
    spectrum = Spectrum(64, 16)
    assert torch.allclose(spectrum.sound(spectrum(sound), 500), sound, atol=1e-5)
    assert spectrum(unit_loudness(sound)).abs().square().mean() < 2
    with pytest.raises(RecipeError, match="hop = 64 should be at most half of n_fft = 64"):
        Spectrum(64, 64)


def test_random_weights_stand_in_the_table_and_silent_rows_are_counted():
    encoder = mmssl.encoder("timm/test_resnet", modality="video")
    rows = clips(11)
    rows[0]["video"] = rows[0]["video"].repeat_interleave(16, 3).repeat_interleave(16, 4)
    rows[0]["audio"][2] = 0
    table = mmssl.adapt(encoder, rows, probe="separation", seeds=2, **{**SMALL, "steps": 2, "batch_rows": 2})
    assert len(table.row(RANDOM).runs["si_sdr"]) == len(table.row(ALONE).runs["si_sdr"]) == 2
    assert table.warnings == ("1 silent row left out",)
    assert table.train_rows + table.test_rows == 10


def test_sentences_where_it_cannot_work():
    with pytest.raises(RecipeError, match="leaves a clip nothing to be mixed with; set 2 or more"):
        separated(Eye(), batch_rows=1)
    with pytest.raises(RecipeError, match="takes an encoder of clips or pictures, and '' reads audio"):
        separated(mmssl.encoder("timm/test_resnet", modality="audio"))
    with pytest.raises(DataError, match="1 clips with sound to learn from"):
        separated(Eye(), rows=1)
    with pytest.raises(RecipeError, match="reads no labels and no depths"):
        separated(Eye(), layers=True)
