"""A look at a source tells its splits, columns and traps before anything is trained."""

from __future__ import annotations

import io
import struct
import zlib

import datasets
import numpy as np
import pytest
from made import png, texts, wav, write, write_csv, write_parquet
from PIL import Image
from typer.testing import CliRunner

from mmssl.cli import app
from mmssl.data.check import check
from mmssl.data.columns import find_classes
from mmssl.data.loader import Loader
from mmssl.errors import DataError
from mmssl.media.clip import write_clip
from mmssl.media.image import decode_image
from mmssl.recipe import Data, data_section


def encoded(array, kind="png"):
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, kind)
    return stream.getvalue()


def noise(seed, height=16, width=16):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.long
def test_the_toy_world_has_no_trap():
    found = check("toy", rows=20)
    assert found.splits == {"train": 4096, "validation": 4096, "test": 4096}
    assert {"image", "text", "audio", "video"} <= set(found.facts)
    assert (found.broken, found.traps, found.notes) == ([], [], [])


def test_splits_classes_and_files_left_out(tmp_path):
    for split, rows in (("train", 5), ("val", 2), ("extra", 3)):
        for n in range(rows):
            write(tmp_path / split / "ab"[n % 2] / f"{n}.png", encoded(noise(n)))
    write(tmp_path / "notes.md", "no picture")
    found = check(tmp_path)
    assert found.splits == {"train": 5, "validation": 2, "extra": 3}
    assert found.columns == {"image": "image", "label": "label"}
    assert "2 classes" in found.facts["label"][0]
    assert any(".md" in note for note in found.notes)
    assert check(tmp_path, split="validation").rows == 2
    with pytest.raises(DataError, match="has no split 'test'"):
        check(tmp_path, split="test")


def test_broken_rows_are_named_and_the_sample_is_spread(tmp_path):
    cells = [encoded(noise(n)) if n % 4 else b"no picture" for n in range(40)]
    write_parquet(tmp_path / "train.parquet", {"image": cells})
    found = check(tmp_path, rows=20)
    assert len(found.broken) == 10
    assert "row 36" in found.broken[-1]
    assert "and 5 more" in found.text()


def deep(array):
    """A PNG of 16 bits a band, which Pillow does not write."""
    height, width, _ = array.shape
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(b"".join(b"\0" + row.astype(">u2").tobytes() for row in array))),
        (b"IEND", b""),
    ]
    framed = [
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(framed)


TRAPS = {
    "16 bits in each of several bands": [deep(noise(n).astype(np.uint16) * 16) for n in range(8)],
    "an eighth of the range": [encoded((noise(n)[..., 0].astype(np.uint16)) * 16) for n in range(8)],
    "one color all over": [png(n * 20) for n in range(8)],
    "equal to another": [encoded(noise(n // 2)) for n in range(8)],
}


@pytest.mark.parametrize("words", TRAPS)
def test_traps_of_pictures(tmp_path, words):
    write_parquet(tmp_path / "train.parquet", {"image": TRAPS[words]})
    found = check(tmp_path)
    assert [words in trap for trap in found.traps] == [True]


def test_a_range_is_refused_where_half_of_the_bits_are_gone(tmp_path):
    cell = deep(noise(0).astype(np.uint16) * 256)
    assert decode_image(cell, 16).max() > 200
    with pytest.raises(DataError, match=r"16 bits in each of several bands, .* convert it to 8 bits"):
        decode_image(cell, 16, extent=(0, 4095))


def test_a_shape_that_tells_the_class(tmp_path):
    for n in range(6):
        write(tmp_path / "bus" / f"{n}.png", encoded(noise(n, 16, 32)))
        write(tmp_path / "tower" / f"{n}.png", encoded(noise(10 + n, 32, 16)))
    found = check(tmp_path)
    assert "class bus are wider than those of tower" in found.traps[0]
    assert "50% of the area lies outside" in " ".join(found.facts["image"])


def test_shapes_are_those_that_are_shown(tmp_path):
    turned = Image.Exif()
    turned[0x0112] = 6
    for n in range(6):
        (tmp_path / "bus").mkdir(exist_ok=True)
        (tmp_path / "tower").mkdir(exist_ok=True)
        Image.fromarray(noise(n, 16, 32)).save(tmp_path / "bus" / f"{n}.jpg")
        Image.fromarray(noise(n, 16, 32)).save(tmp_path / "tower" / f"{n}.jpg", exif=turned)
    found = check(tmp_path)
    assert "class bus are wider than those of tower" in found.traps[0]
    assert found.facts["image"][0].startswith("16 to 32 x 16 to 32 pixels")


def test_classes_that_differ_in_spelling_alone(tmp_path):
    write_csv(tmp_path / "a.csv", {"text": ["a", "b", "c", "d"], "label": ["cat", " cat", "Cat", "dog"]})
    assert check(tmp_path / "a.csv").traps == ["classes that differ in capitals or spaces alone: ' cat', 'Cat', 'cat'"]


def test_silence_and_clips_that_do_not_move(tmp_path):
    for n in range(6):
        write(tmp_path / "sounds" / f"{n}.wav", wav(0.0 if n < 3 else 0.5, 8000))
    found = check(tmp_path / "sounds")
    assert "3 of 6 sounds" in found.traps[0]
    assert "at most 8000" in found.traps[1]
    (tmp_path / "clips").mkdir()
    for n in range(3):
        frames = np.full((25, 32, 32, 3), 40 * n, np.uint8)
        write_clip(tmp_path / "clips" / f"{n}.mp4", frames, 25, None, 16_000)
    found = check(tmp_path / "clips")
    assert "3 of 3 clips do not move" in " ".join(found.traps)
    assert any("3 of 3 clips have no sound" in note for note in found.notes)


def test_sound_and_pictures_that_are_not_there_together(tmp_path):
    sound = np.sin(np.arange(16_000) / 9).astype(np.float32) / 2
    frames = np.arange(25 * 32 * 32 * 3).reshape(25, 32, 32, 3).astype(np.uint8)
    for n, late in enumerate((0.0, 0.7, 3.0)):
        write_clip(tmp_path / f"{n}.mkv", frames, 25, sound, 16_000, audio_codec="flac", audio_start=late)
    found = check(tmp_path)
    assert [line.split(":")[0] for line in found.broken] == ["clip, row 2"]
    assert "2.mkv': its sound and its pictures do not overlap in time" in found.broken[0]
    assert any("2 of 3 clips have sound or pictures alone for more than 0.5 s" in note for note in found.notes)


def test_texts_that_are_cut_and_cells_read_as_missing(tmp_path):
    columns = texts(9)
    columns["text"][:3] = [" ".join(["word"] * 100 + [str(n)]) for n in range(3)]
    columns["label"] = ["NA", "a", "b"] * 3
    write_csv(tmp_path / "train.csv", columns)
    found = check(tmp_path)
    assert "33% have more words than a row has ids (64)" in found.facts["text"][1]
    assert "3 of 9 empty, or read as missing (NA, None, null)" in found.facts["label"]


def test_labels_are_told_by_name_and_minus_one_for_what_it_is(tmp_path):
    feature = datasets.ClassLabel(names=["cat", "dog"])
    for name, features in (("named", datasets.Features(label=feature)), ("plain", None)):
        rows = datasets.Dataset.from_dict({"label": [0, 1, 1, -1]}, features=features)
        rows.to_parquet(tmp_path / name / "train.parquet")
    named, plain = check(tmp_path / "named"), check(tmp_path / "plain")
    assert named.facts["label"][0] == "2 classes in the sample, the largest (dog) has 67%"
    assert "1 label of the sample with -1, which is taken for no label" in named.notes
    assert plain.facts["label"][0] == "3 classes in the sample, the largest (1) has 50%"
    assert "1 label of the sample with -1, which is a class as any other, for classes have no names" in plain.notes
    write_csv(tmp_path / "train.csv", {"text": ["a", "b", "c"], "label": [1, "", 2]})
    assert "classes with adapt --target classes" in check(tmp_path / "train.csv").facts["label"][0]


def test_labels_that_tell_no_rows_apart_and_those_that_tell_all(tmp_path):
    write_csv(tmp_path / "one.csv", texts(30) | {"label": ["cat"] * 30})
    write_csv(tmp_path / "all.csv", texts(30) | {"label": [f"row {n}" for n in range(30)]})
    write_csv(tmp_path / "few.csv", texts(30) | {"label": [f"kind {n % 29}" for n in range(30)]})
    one, every, few = (check(tmp_path / f"{name}.csv") for name in ("one", "all", "few"))
    assert one.facts["label"] == ["1 class in the sample (cat)"]
    assert any("all 30 labels of the sample are 'cat'" in trap for trap in one.traps)
    assert any("all 30 labels of the sample differ" in trap for trap in every.traps)
    assert not any("labels of the sample" in trap for trap in few.traps)


def test_a_table_of_which_nothing_is_read(tmp_path):
    write_csv(tmp_path / "train.csv", {"file": ["a/0.png"], "note": ["x"]})
    found = check(tmp_path)
    assert "broken" not in found.text()
    assert found.notes == ["column 'file' holds image that nothing is taken from: --set columns.image=file"]
    write_csv(tmp_path / "train.csv", {"caption": ["a"], "number": [1]})
    (note,) = check(tmp_path).notes
    assert note.startswith("no column is read; name what one holds, as in --set columns.image=<column>")


def test_columns_of_other_names_are_pointed_at(tmp_path):
    write_parquet(tmp_path / "train.parquet", {"picture": [encoded(noise(n)) for n in range(3)]})
    found = check(tmp_path)
    assert found.notes == ["column 'picture' holds image that nothing is taken from: --set columns.image=picture"]
    result = CliRunner().invoke(app, ["check", str(tmp_path), "--set", "columns.image=picture"])
    assert "picture (image)" in result.stdout
    assert "16 x 16 pixels" in result.stdout


def test_labels_that_are_no_classes_are_told(tmp_path):
    rows = {"text": ["a", "b", "c"], "label": [1.0, float("nan"), float("inf")]}
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "a.parquet")
    found = check(tmp_path / "a.parquet")
    assert found.traps == ["1 of 2 labels are infinite, which no probe learns from"]
    assert found.facts["label"] == [
        "values from 1 to 1, mean 1; all are whole numbers, classes with adapt --target classes",
        "1 of 3 empty, or read as missing (NA, None, null)",
    ]
    for cells, said in (
        (["a", "", " "], ["1 class in the sample (a)", "2 of 3 empty, or read as missing (NA, None, null)"]),
        ([["a", ""], ["b"], [" "]], ["several a row, 2 different ones in the sample"]),
    ):
        datasets.Dataset.from_dict({"text": ["a", "b", "c"], "label": cells}).to_parquet(tmp_path / "a.parquet")
        assert check(tmp_path / "a.parquet").facts["label"] == said
    for cell, said in (
        ({"a": 1}, "several columns in one, no class"),
        ([{"a": 1}], "several a row, 1 different ones"),
        (b"cat", "bytes: pictures of classes are masks, and names are text"),
    ):
        datasets.Dataset.from_dict({"text": ["a"], "label": [cell]}).to_parquet(tmp_path / "b.parquet")
        assert check(tmp_path / "b.parquet").facts["label"][0].startswith(said)
    with pytest.raises(DataError, match="the column holds dict"):
        find_classes([{"a": 1}])


def test_stereo_that_cancels_itself_is_told_here_and_at_the_start_of_a_run(tmp_path):
    wave = np.sin(np.arange(16_000) / 10).astype(np.float32) / 2
    for number in range(6):
        sides = np.stack([wave, wave if number % 2 else -wave])
        write_clip(tmp_path / f"{number}.wav", None, 25, sides, 16_000, audio_codec="pcm_s16le")
    said = "sounds are lost in the mean of their channels, which cancel each other; data.audio.channel=left hears one"
    assert check(tmp_path).traps == [f"3 of 6 {said}"]
    assert check(tmp_path, audio={"channel": "left"}).traps == []
    spec = Data(source=str(tmp_path))
    assert f"  3 of 6 rows asked: {said}" in Loader({"": spec}, ["audio"], batch_size=2, seed=0).found()
    heard = data_section(str(tmp_path), {"audio": {"channel": "right"}})
    loader = Loader({"": heard}, ["audio"], batch_size=6, seed=0)
    assert not any("lost in the mean" in line for line in loader.found())
    assert next(loader.batches(0, 1))["audio"].square().mean() > 0.05
