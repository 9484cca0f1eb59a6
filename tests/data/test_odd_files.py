"""Odd cells and names among good ones: a row or a note each, and never the end of a run."""

from __future__ import annotations

import json
import os
import struct

import datasets
import pytest
from made import png, texts, wav, write, write_parquet
from PIL import Image

import mmssl
from mmssl.data.loader import Loader, read
from mmssl.data.sources import open_source
from mmssl.errors import DataError, RecipeError
from mmssl.recipe import AudioDecode, Data

BERT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


def wide_wav(samples: int = 800) -> bytes:
    """A WAV of 64-bit integers, which decoders know and nothing can take."""
    data = bytes(8 * samples)
    form = struct.pack("<HHIIHH", 1, 1, 8000, 64000, 8, 64)
    chunks = b"fmt " + struct.pack("<I", len(form)) + form + b"data" + struct.pack("<I", len(data)) + data
    return b"RIFF" + struct.pack("<I", 4 + len(chunks)) + b"WAVE" + chunks


@pytest.mark.quick(1)
@pytest.mark.parametrize("workers", [0, 1])
def test_a_sound_that_nothing_can_take_is_a_row_that_is_named(tmp_path, workers):
    cells = [wide_wav() if n == 5 else wav(0.1, 8000) for n in range(24)]
    write_parquet(tmp_path / "train.parquet", {"audio": cells})
    spec = Data(source=str(tmp_path), audio=AudioDecode(rate=8000, seconds=0.5), max_bad=0.2)
    errors = tmp_path / "errors.jsonl"
    loader = Loader({"": spec}, ("audio",), batch_size=8, seed=0, workers=workers, directory=errors.parent)
    assert len(list(loader.batches(0, 3))) == 3
    assert [json.loads(line)["id"] for line in errors.read_text().splitlines()] == [5]


def test_a_name_that_is_no_text_is_left_out_and_counted(tmp_path):
    for n in range(3):
        write(tmp_path / f"{n}.png", png(n))
    with open(os.fsencode(tmp_path) + b"/caf\xe9.png", "wb") as file:
        file.write(png(9))
    source = open_source(Data(source=str(tmp_path)))
    assert len(source) == 3
    assert source.notes == ("1 file left out, of a name that is not UTF-8",)


def test_a_transform_of_a_data_set_is_not_used_and_that_is_said():
    data = datasets.Dataset.from_dict(
        {"image": [{"bytes": png(n), "path": None} for n in range(20)], "label": [0, 1] * 10}
    )
    data = data.cast_column("image", datasets.Image()).with_transform(lambda rows: {"pixels": [1] * len(rows["label"])})
    encoder = mmssl.encoder("timm/test_resnet", modality="image")
    table = mmssl.adapt(encoder, data, k=(1,), baseline=False)
    assert table.test_rows == 4
    from mmssl.data.sources import TableSource

    assert "transform" in TableSource(data).notes[0]


def test_a_clip_that_is_cut_short_is_not_called_of_an_unknown_format(tmp_path):
    import numpy as np

    from mmssl.media.clip import write_clip

    write_clip(tmp_path / "a.mp4", np.zeros((10, 32, 32, 3), np.uint8), 25, None, 16_000)
    write_parquet(tmp_path / "train.parquet", {"video": [(tmp_path / "a.mp4").read_bytes()[:700]] * 30})
    with pytest.raises(DataError, match="cut short, damaged, or no sound or video"):
        list(read(Data(source=str(tmp_path)), ("video",)))


@pytest.mark.parametrize(
    ("cells", "size", "error", "message"),
    [
        ([1, 2, 3], "train:100", DataError, "column 'text' holds int and no text, so that no tokenizer"),
        ([None, None], "train:100", DataError, "column 'text' is empty, so that no tokenizer|no row with text"),
        (texts(8)["text"], "train:10000000000", RecipeError, "expected train:SIZE of at most 1000000"),
        (texts(8)["text"], "train:0", RecipeError, "expected train:SIZE of at most 1000000"),
    ],
)
def test_what_a_tokenizer_cannot_be_trained_on(tmp_path, cells, size, error, message):
    write_parquet(tmp_path / "train.parquet", {"text": cells})
    recipe = {
        "encoders": {"text": {"model": "transformers/bert", "tokenizer": size, **BERT}},
        "objective": {"name": "masked_language"},
        "data": {"source": str(tmp_path / "train.parquet")},
        "training": {"steps": 1, "batch_size": 2},
    }
    with pytest.raises(error, match=message):
        mmssl.run(recipe, out=tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_pictures_of_every_kind_in_one_folder(tmp_path):
    for n, kind in enumerate(("png", "jpeg", "webp", "gif", "bmp", "tiff", "avif")):
        Image.new("RGB", (16, 16), (30 * n, 0, 0)).save(tmp_path / f"{n}.{kind}")
    batches = list(read(Data(source=str(tmp_path), max_bad=0), ("image",)))
    assert len(batches[0]["id"]) == 7


@pytest.mark.parametrize("source", ["x" * 5000, "/" + "x" * 5000, "~nobody/pictures", "x" * 300 + "/*.png"])
def test_a_name_that_can_be_none_is_one_sentence(source):
    with pytest.raises(DataError):
        open_source(Data(source=source))


def test_a_pattern_of_endlessly_many_files_is_refused_at_once():
    with pytest.raises(DataError, match=r"\{0..99999999999\} names more than 1,000,000 files"):
        open_source(Data(source="shard-{0..99999999999}.tar"))


def test_texts_that_are_no_rows_are_left_out_or_told(tmp_path):
    files = {f"{split}/{kind}/{i}.txt": f"{kind} {i}" for split in ("train", "test") for kind in "ab" for i in (1, 2)}
    files |= {"train/urls_a.txt": "http://a\nhttp://b", "README.txt": "About it.", "train/b/License.txt": "Free."}
    for name, content in files.items():
        write(tmp_path / name, content)
    source = open_source(Data(source=str(tmp_path)))
    rows = ["a 1", "a 2", "b 1", "b 2"]
    assert sorted(source.values("text")) == [*rows, "http://a", "http://b"]
    assert "left out, for by their names they are about the others: License.txt, README.txt" in source.notes
    pattern = f"{tmp_path}/*/*/*.txt"
    told = "read as rows, though they lie next to the folders of the others: train/urls_a.txt"
    assert f"{told}; {pattern} leaves them out" in source.notes
    (tmp_path / "train/b/License.txt").unlink()
    assert sorted(open_source(Data(source=pattern)).values("text")) == rows


def test_texts_that_lie_as_others_do_are_rows_without_a_word(tmp_path):
    for name in ("a.txt", "b.txt", "more/c.txt"):
        write(tmp_path / name, name)
    source = open_source(Data(source=str(tmp_path)))
    assert list(source.values("text")) == ["a.txt", "b.txt", "more/c.txt"]
    assert not source.notes
    (tmp_path / "alone").mkdir()
    write(tmp_path / "alone" / "readme.txt", "a row")
    assert list(open_source(Data(source=str(tmp_path / "alone"))).values("text")) == ["a row"]
