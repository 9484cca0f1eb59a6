"""Several windows of a clip: those that would be read one by one, in one pass of the file, and averaged by probes."""

import av
import datasets
import numpy as np
import pytest
import torch

import mmssl
from mmssl.adaptation import features
from mmssl.data.loader import Loader, read
from mmssl.decode_settings import AudioDecode, VideoDecode
from mmssl.errors import RecipeError
from mmssl.media.audio import decode_audio
from mmssl.media.clip import decode_clip, write_clip
from mmssl.media.video import decode_video
from mmssl.recipe import Data, data_section

RATE, FPS, SECONDS = 48_000, 25, 9
FORMATS = [
    ("mp4", "libx264", "aac"),
    ("mkv", "libx264", "libopus"),
    ("mkv", "libx264", "flac"),
    ("avi", "mpeg4", "libmp3lame"),
]
AUDIO = AudioDecode(rate=16_000, seconds=1.0)
VIDEO = VideoDecode(size=16, fps=12.5, frames=12)
# Overlapping, next to each other, and further apart than a seek reaches back.
WINDOWS = [0.0, 0.05, 0.2, 0.21, 0.95, 1.0]


def write(path, video: str, audio: str, seed: int = 0) -> None:
    rng = np.random.default_rng(seed)
    noise = (0.1 * rng.normal(size=RATE * SECONDS)).astype(np.float32)
    frames = rng.integers(0, 255, (FPS * SECONDS, 32, 32, 3), dtype=np.uint8)
    write_clip(path, frames, FPS, noise, RATE, audio_codec=audio, video_codec=video)


@pytest.fixture
def opened(monkeypatch) -> list[str]:
    """Containers that were opened."""
    names, really = [], av.open
    monkeypatch.setattr(av, "open", lambda *args, **kwargs: names.append(str(args[0])) or really(*args, **kwargs))
    return names


@pytest.mark.quick(1)
@pytest.mark.parametrize(("suffix", "video", "audio"), FORMATS)
def test_windows_are_those_read_one_by_one_and_the_file_is_opened_once(suffix, video, audio, tmp_path, opened):
    path = tmp_path / f"a.{suffix}"
    write(path, video, audio)
    sounds = [decode_audio(path, 16_000, 1.0, window) for window in WINDOWS]
    pictures = [decode_video(path, 16, 12.5, 12, window) for window in WINDOWS]
    clips = [decode_clip(path, audio=AUDIO, video=VIDEO, window=window) for window in WINDOWS]
    opened.clear()
    packets_are_counted = suffix == "avi" and audio == "libmp3lame"
    once = decode_audio(path, 16_000, 1.0, WINDOWS)
    assert packets_are_counted or len(opened) == 1
    opened.clear()
    assert torch.equal(decode_video(path, 16, 12.5, 12, WINDOWS), torch.stack(pictures))
    assert len(opened) == 1
    for found, expected in zip(once, zip(*sounds, strict=True), strict=True):
        assert torch.equal(found, torch.stack(expected))
    opened.clear()
    together = decode_clip(path, audio=AUDIO, video=VIDEO, window=WINDOWS)
    assert packets_are_counted or len(opened) == 2  # one for the sound and one for the pictures
    for found, expected in zip(together, zip(*clips, strict=True), strict=True):
        assert torch.equal(found, torch.stack(expected))


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> datasets.Dataset:
    folder = tmp_path_factory.mktemp("windows")
    for number in range(6):
        write(folder / f"{number}.mkv", "libx264", "flac", seed=number)
    paths = [str(folder / f"{number}.mkv") for number in range(6)]
    return datasets.Dataset.from_dict({"video": paths, "label": [0, 1] * 3})


def spec_of(rows: datasets.Dataset, folder, **settings) -> Data:
    rows.to_parquet(folder / "rows.parquet")
    settings = {"video": {"size": 16, "fps": 5, "frames": 4}, "audio": {"seconds": 0.5}, **settings}
    return data_section(str(folder / "rows.parquet"), settings)


@pytest.mark.long
def test_windows_reach_from_the_start_to_the_end(rows, tmp_path):
    spec = spec_of(rows, tmp_path)
    (batch,) = read(spec, ["video", "audio"], windows=3)
    assert batch["video"].shape == (6, 3, 4, 3, 16, 16)
    assert batch["audio"].shape == batch["audio_mask"].shape == (6, 3, 8000)
    for number, window in enumerate((0.0, 0.5, 1.0)):
        sound, _, video = decode_clip(rows[2]["video"], audio=spec.audio, video=spec.video, window=window)
        assert torch.equal(batch["video"][2, number], video)
        assert torch.equal(batch["audio"][2, number], sound)


@pytest.mark.long
@pytest.mark.parametrize("modality", [pytest.param("video", marks=pytest.mark.long), "audio"])
def test_features_are_averaged_over_windows(rows, tmp_path, modality):
    torch.manual_seed(0)
    name = {"video": "torchvision/r3d_18", "audio": "timm/test_resnet"}[modality]
    encoder = mmssl.encoder(name, modality=modality)
    (batch,) = read(spec_of(rows, tmp_path), [modality], windows=3)
    found, *_ = features(encoder, [batch])
    each = []
    for number in range(3):
        one = {key: value[:, number] if key != "id" else value for key, value in batch.items()}
        each.append(features(encoder, [one])[0])
    torch.testing.assert_close(found, torch.stack(each).mean(0), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(found, each[1], atol=1e-3)


@pytest.mark.long
@pytest.mark.parametrize(("probe", "options"), [("knn", {}), ("attentive", {"steps": 2}), ("finetune", {"steps": 2})])
def test_probes_take_several_windows(rows, tmp_path, probe, options):
    encoder = mmssl.encoder("timm/test_resnet", modality="audio")
    table = mmssl.adapt(
        encoder, spec_of(rows, tmp_path, windows=2), label="label", probe=probe, seeds=1, baseline=False, **options
    )
    assert table.train_rows + table.test_rows == 6


def test_training_takes_one_window_a_row(rows, tmp_path):
    batch = next(Loader({"": spec_of(rows, tmp_path, windows=4)}, ["video"], batch_size=2, seed=0).batches(0, 1))
    assert batch["video"].shape == (2, 4, 3, 16, 16)


def test_windows_and_a_center_exclude_each_other():
    with pytest.raises(RecipeError, match=r"windows = 4 are spread over a clip, and columns\.center places one"):
        data_section("toy", {"windows": 4, "columns": {"center": "onset"}})
