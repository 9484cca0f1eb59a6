"""Decoded cells on disk: the second epoch opens nothing and has the same bits, whatever was killed, damaged or full."""

from __future__ import annotations

import os
import time
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from made import Letters, png, wav, write_parquet

from mmssl.data import decoded, decoding
from mmssl.data.columns import CENTER, Decoder
from mmssl.data.decoded import DecodedCells
from mmssl.data.loader import Loader
from mmssl.decode_settings import AudioDecode, ImageDecode, VideoDecode
from mmssl.errors import RecipeError, RunError
from mmssl.media.clip import write_clip
from mmssl.recipe import Data

HOW = Data(
    source="here",
    start="first",
    image=ImageDecode(size=8),
    audio=AudioDecode(rate=8000, seconds=0.5),
    video=VideoDecode(size=16, fps=10, frames=5),
)
CLIP = {"video": "clip", "audio": "clip"}


def clip(path: Path, seed: int = 0) -> Path:
    """A second of noise."""
    dice = np.random.default_rng(seed)
    frames = dice.integers(0, 256, (10, 16, 16, 3)).astype(np.uint8)
    write_clip(path, frames, 10, dice.uniform(-0.9, 0.9, 8000).astype(np.float32), 8000)
    return path


def how(folder: Path, **changes) -> Data:
    return HOW.model_copy(update={"cache": str(folder), **changes})


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) and a[key].dtype == b[key].dtype for key in a)


@pytest.fixture
def closed(monkeypatch):
    """A function after whose call no container and no picture can be opened."""

    def close():
        def refused(*args, **kwargs):
            raise AssertionError("opened")

        monkeypatch.setattr(av, "open", refused)
        monkeypatch.setattr("mmssl.media.image.decode_image", refused)

    return close


def epochs(data: Data) -> list[dict[str, torch.Tensor]]:
    loader = Loader({"": data}, ("video", "audio"), batch_size=3, seed=1)
    return list(loader.batches(0, 4))


def test_the_second_epoch_opens_nothing_and_has_the_same_bits(tmp_path, monkeypatch, closed):
    monkeypatch.setattr(decoding, "KEPT_BYTES", 0)  # nor is anything kept in memory
    (tmp_path / "clips").mkdir()
    for number in range(6):
        clip(tmp_path / "clips" / f"{number}.mp4", number)
    data = how(tmp_path / "cache", source=str(tmp_path / "clips"))
    first = epochs(data)
    assert len(files(tmp_path / "cache")) == 6
    closed()
    assert all(same(a, b) for a, b in zip(first, epochs(data), strict=True))


def test_of_what_was_decoded_sounds_are_rounded_and_nothing_else(tmp_path):
    row = {"clip": str(clip(tmp_path / "a.mp4")), "image": png(77)}
    columns = CLIP | {"image": "image"}
    plain = Decoder(HOW.model_copy(update={"columns": columns}), ["image", "audio", "video"])(row, 0.0)
    kept = Decoder(how(tmp_path / "cache", columns=columns), ["image", "audio", "video"])(row, 0.0)
    assert kept.keys() == plain.keys()
    assert 0 < (kept["audio"] - plain["audio"]).abs().max() <= 0.5001 / 32767
    assert same(kept | {"audio": plain["audio"]}, plain)


def test_what_differs_in_anything_that_counts_is_decoded_anew(tmp_path):
    folder, path = tmp_path / "cache", clip(tmp_path / "a.mp4")
    row = {"clip": str(path), CENTER: 0.5}

    def number(row=row, needs=("audio", "video"), **changes):
        Decoder(how(folder, columns=CLIP, **changes), needs)(row, 0.0)
        return len(files(folder))

    assert number() == number() == 1
    assert number(start="middle") == 2
    assert number(audio=AudioDecode(rate=4000, seconds=0.5)) == 3
    assert number(video=VideoDecode(size=8, fps=10, frames=5)) == 4
    assert number(needs=("audio",)) == 5
    assert number(image=ImageDecode(size=4)) == 5  # no picture is wanted
    os.utime(path, ns=(0, 0))
    assert number() == 6
    for name in ("elsewhere.mp4", "renamed.mp4"):
        assert number({"clip": {"bytes": path.read_bytes(), "path": name}}) == 7
    centered = how(folder, columns=CLIP | {CENTER: CENTER}, start="random")
    for center, expected in ((0.5, 8), (0.6, 9), (0.5, 9)):
        Decoder(centered, ["audio", "video"])(row | {CENTER: center}, 0.3)
        assert len(files(folder)) == expected


def test_what_is_drawn_anew_is_not_kept(tmp_path):
    row = {"clip": str(clip(tmp_path / "a.mp4")), "image": png(3), "text": "abc"}
    data = how(tmp_path / "cache", columns=CLIP, start="random")
    decoder = Decoder(data, ["image", "text", "audio", "video"], tokenizers={"text": Letters()})
    one, other = decoder(row, 0.0), decoder(row, 0.9)
    assert not torch.equal(one["audio"], other["audio"])
    assert len(files(tmp_path / "cache")) == 1  # the picture


def test_damage_is_noticed_and_repaired(tmp_path):
    row, data = {"clip": wav(0.5)}, how(tmp_path / "cache", columns=CLIP)
    first = Decoder(data, ["audio"])(row, 0.0)
    (path,) = files(tmp_path / "cache")
    whole = path.read_bytes()
    for damaged in (b"", whole[:100], whole[:-7], whole[:-1] + bytes([whole[-1] ^ 1])):
        path.write_bytes(damaged)
        assert same(Decoder(data, ["audio"])(row, 0.0), first)
        (repaired,) = files(tmp_path / "cache")
        assert repaired.stat().st_size == len(whole)
        assert decoded._load(repaired) is not None


def test_a_killed_writer_leaves_nothing_half_written(tmp_path, monkeypatch):
    row, data = {"clip": wav(0.5)}, how(tmp_path / "cache", columns=CLIP)

    def dies(tensors, path, metadata):
        path.write_bytes(b"half")
        raise KeyboardInterrupt  # nothing of the writer is run from here on, as after a kill

    with monkeypatch.context() as patched:
        patched.setattr(decoded, "save_file", dies)
        with pytest.raises(KeyboardInterrupt):
            Decoder(data, ["audio"])(row, 0.0)
    (left,) = files(tmp_path / "cache")
    assert left.name.startswith(".writing_")
    os.utime(left, (time.time() - 4000,) * 2)
    Decoder(data, ["audio"])(row, 0.0)
    (kept,) = files(tmp_path / "cache")
    assert kept.suffix == ".safetensors"


def test_no_more_is_written_than_is_allowed(tmp_path):
    folder, allowed = tmp_path / "cache", 40_000  # a sound is 8 kB and its mask 4
    data = how(folder, columns=CLIP, cache_gb=allowed / 1e9)
    for value in range(6):
        decoder = Decoder(data, ["audio"])
        assert decoder({"clip": wav(value / 10)}, 0.0)["audio"][0] == pytest.approx(value / 10, abs=1e-3)
    assert sum(path.stat().st_size for path in files(folder)) <= allowed
    assert len(files(folder)) == 3


def _decode(rank: int, folder: str) -> None:
    decoder = Decoder(how(Path(folder) / "cache", columns=CLIP), ["audio"])
    results = [decoder({"clip": wav(value / 50)}, 0.0)["audio"] for value in range(40)]
    torch.save(results, f"{folder}/{rank}.pt")


@pytest.mark.long
def test_several_processes_share_a_folder(tmp_path, processes):
    processes(_decode, (str(tmp_path),), 4)
    assert len(files(tmp_path / "cache")) == 40
    assert all(path.suffix == ".safetensors" for path in files(tmp_path / "cache"))
    one, *others = (torch.load(tmp_path / f"{rank}.pt") for rank in range(4))
    assert all(torch.equal(a, b) for other in others for a, b in zip(one, other, strict=True))


def test_a_place_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(RecipeError, match=r"data.cache: no folder can be made at .*file"):
        DecodedCells(tmp_path / "file", 1.0)
    monkeypatch.setenv("FAST_DISK", str(tmp_path))
    cells = DecodedCells("$FAST_DISK/kept", 1.0)
    assert cells.folder == tmp_path / "kept"

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(decoded, "save_file", full)
    with pytest.raises(RunError, match=r"data.cache: .*cannot be written: .*No space left on device; make room"):
        cells({}, {}, lambda: {"image": torch.zeros(1)})


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.long)])
def test_a_disk_that_refuses_ends_a_run_with_one_sentence(tmp_path, workers):
    path = clip(tmp_path / "clip.mkv")
    write_parquet(tmp_path / "train.parquet", {"clip": [str(path)] * 9})
    for number in range(256):  # no folder can be made where these are
        (tmp_path / "kept").mkdir(exist_ok=True)
        (tmp_path / "kept" / f"{number:02x}").write_text("")
    data = how(tmp_path / "kept", source=str(tmp_path / "train.parquet"), columns=CLIP)
    loader = Loader({"": data}, ("video", "audio"), batch_size=3, seed=1, workers=workers)
    with pytest.raises(RunError) as refused:
        next(loader.batches(0, 1))
    assert str(refused.value).startswith("data.cache: ")
    assert str(refused.value).endswith("; make room, or leave data.cache out")
    assert "Traceback" not in str(refused.value)


def test_probes_decode_anew(tmp_path):
    assert how(tmp_path).for_probes.cache is None
