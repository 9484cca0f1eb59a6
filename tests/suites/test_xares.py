"""An encoder of sounds in X-ARES: frames lie where they sound, at the rate that is stated."""

import io
import json
import math
import tarfile
import wave

import numpy as np
import pytest
import torch

import mmssl
from mmssl.errors import RecipeError
from mmssl.suites.xares import XaresEncoder

RATE = 16_000
WAV2VEC = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "conv_dim": [8] * 7,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
}
AST = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "num_mel_bins": 32,
    "max_length": 256,
}
NETWORKS = {
    "timm/test_resnet": {},
    "timm/test_vit": {"img_size": [64, 128]},
    "transformers/wav2vec2": WAV2VEC,
    "transformers/audio-spectrogram-transformer": AST,
}


@pytest.fixture(scope="module", params=NETWORKS)
def suite(request):
    torch.manual_seed(0)
    return XaresEncoder(mmssl.encoder(request.param, modality="audio", **NETWORKS[request.param]), seconds=1.0)


@pytest.mark.quick(4)
@pytest.mark.parametrize("samples", [300, 16_000, 50_000, 160_000])
def test_frames_are_at_the_stated_rate(suite, samples):
    frames = suite(torch.randn(2, samples) / 10)
    expected = samples / RATE * 1000 / suite.hop_size_in_ms
    assert frames.shape == (2, math.ceil(round(expected, 6)), suite.output_dim)
    assert not frames.requires_grad
    assert suite.sampling_rate == RATE


def test_windows_follow_each_other_and_rows_stay_apart(suite):
    torch.manual_seed(1)
    sound = torch.randn(3, 3 * RATE) / 10
    whole = suite(sound)
    parts = [suite(part) for part in sound.split(RATE, dim=1)]
    assert torch.allclose(whole, torch.cat(parts, dim=1), atol=1e-5)
    assert torch.allclose(whole[1:2], suite(sound[1:2]), atol=1e-5)


def test_a_click_is_heard_in_the_frame_of_its_second():
    torch.manual_seed(0)
    suite = XaresEncoder(mmssl.encoder("transformers/wav2vec2", modality="audio", normalize=False, **WAV2VEC | {
        "num_hidden_layers": 0}), seconds=1.0)  # fmt: skip
    silence = torch.zeros(1, 4 * RATE)
    click = silence.clone()
    click[0, int(2.5 * RATE) : int(2.51 * RATE)] = 0.5
    change = (suite(click) - suite(silence)).norm(dim=2)[0]
    assert abs(change.argmax().item() * suite.hop_size_in_ms - 2500) < 100
    assert change[: int(1900 / suite.hop_size_in_ms)].max() == 0


def test_what_reads_no_sound_is_one_sentence():
    with pytest.raises(RecipeError, match="X-ARES asks encoders of sounds, and this one reads image"):
        XaresEncoder(mmssl.encoder("timm/test_resnet", modality="image"))
    with pytest.raises(RecipeError, match="seconds = 0"):
        XaresEncoder(mmssl.encoder("timm/test_resnet", modality="audio"), seconds=0)


def shard(path, rows):
    """Tones of two pitches as X-ARES packs sounds."""
    with tarfile.open(path, "w") as tar:
        for number in range(rows):
            sound = np.sin(np.arange(RATE) * (0.05 + 0.3 * (number % 2))) * 0.5
            file = io.BytesIO()
            with wave.open(file, "wb") as out:
                out.setparams((1, 2, RATE, 0, "NONE", ""))
                out.writeframes((sound * 32767).astype("<i2").tobytes())
            label = json.dumps({"label": number % 2}).encode()
            for ending, content in (("wav", file.getvalue()), ("json", label)):
                info = tarfile.TarInfo(f"{number:03}.{ending}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


@pytest.mark.long
def test_the_suite_takes_it(tmp_path, monkeypatch):
    def load(file):
        with wave.open(file) as sound:
            return torch.frombuffer(bytearray(sound.readframes(RATE)), dtype=torch.int16)[None] / 32768, RATE

    monkeypatch.setattr("torchaudio.load", load)  # which takes torchcodec and FFmpeg
    pytest.importorskip("xares", reason="xares is not installed: pip install 'mmssl[suites]'")
    from xares.audio_encoder_checker import check_audio_encoder
    from xares.task import TaskConfig, XaresTask

    torch.manual_seed(0)
    suite = XaresEncoder(mmssl.encoder("timm/test_resnet", modality="audio"), seconds=0.5)
    assert check_audio_encoder(suite)
    folder = tmp_path / "tones"
    folder.mkdir()
    for split, rows in (("train", 16), ("valid", 8), ("test", 8)):
        shard(folder / f"{split}-000000.tar", rows)
    (folder / ".audio_tar_ready").touch()
    config = TaskConfig(
        name="tones",
        env_root=tmp_path,
        encoder=suite,
        private=True,
        output_dim=2,
        epochs=40,
        do_knn=False,
        learning_rate=0.02,
        eval_weight=8,
        num_encoder_workers=0,
        torch_num_threads=1,
        label_processor=lambda row: row["label"],
    )
    assert XaresTask(config).run()[0] == (1, 8)  # all of the test's sounds
