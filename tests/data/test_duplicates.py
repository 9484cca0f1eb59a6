"""What two splits share is found: equal rows, and pictures that were saved anew."""

from __future__ import annotations

import io
import os

import datasets
import numpy as np
import pytest
from PIL import Image

import mmssl
from mmssl.data.duplicates import across_splits
from mmssl.data.sources import open_source
from mmssl.data.toy import ToySource
from mmssl.recipe import Data


def picture(seed: int) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((48, 48), Image.Resampling.BICUBIC)


@pytest.fixture
def folder(tmp_path):
    for split, seeds in {"train": range(20), "test": range(20, 30)}.items():
        (tmp_path / split).mkdir()
        for seed in seeds:
            picture(seed).save(tmp_path / split / f"{seed:02}.png")
    return tmp_path


def shared(folder) -> list[str]:
    return across_splits(
        {split: open_source(Data(source=str(folder), split=split)) for split in ("train", "test")}, "image", images=True
    )


def test_every_cell_is_read_once(monkeypatch):
    read, cell = [], ToySource.cell
    monkeypatch.setattr(
        ToySource, "cell", lambda source, *args: read.append((source.split, *args[1:])) or cell(source, *args)
    )
    assert across_splits({split: ToySource(split, 5) for split in ("train", "test")}, "image", images=True) == []
    assert sorted(read) == [(split, i, "image") for split in ("test", "train") for i in range(5)]


def test_clean_splits_share_nothing(folder):
    assert shared(folder) == []


def test_an_equal_file_is_found_under_another_name(folder):
    (folder / "test" / "99.png").write_bytes((folder / "train" / "07.png").read_bytes())
    assert shared(folder) == ["test shares 1 of 11 rows with train: image of row 10 is that of row 7"]


@pytest.mark.parametrize("change", ["saved", "scaled", "lit"])
def test_a_picture_that_was_saved_scaled_or_lit_anew_is_found(folder, change):
    own, kept = picture(3), io.BytesIO()
    if change == "scaled":
        own = own.resize((64, 64), Image.Resampling.LANCZOS)
    if change == "lit":
        own = own.point(lambda value: 0.8 * value + 20)
    own.save(kept, "jpeg", quality=75)
    (folder / "test" / "99.jpg").write_bytes(kept.getvalue())
    assert shared(folder) == [
        "test shares 1 of 11 rows with train but for how they are saved, scaled or lit: row 10 looks like row 3"
    ]


def test_flat_pictures_are_nobodys_copies(folder):
    for split, level in (("train", 200), ("test", 201)):
        Image.new("RGB", (48, 48), (level,) * 3).save(folder / split / "flat.png")
    assert shared(folder) == []


def test_check_says_so_of_pictures_and_texts(folder, tmp_path_factory):
    (folder / "test" / "99.png").write_bytes((folder / "train" / "07.png").read_bytes())
    assert "test shares 1 of 11 rows with train: image of row 10 is that of row 7" in mmssl.check(folder).traps
    texts = tmp_path_factory.mktemp("texts")
    (texts / "train.csv").write_text("text\none thing\nanother thing\n")
    (texts / "test.csv").write_text("text\nanother thing\na third one\n")
    assert mmssl.check(texts).traps == ["test shares 1 of 2 rows with train: text of row 0 is that of row 1"]


def test_a_pipe_among_paths_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    for split in ("train", "test"):
        datasets.Dataset.from_dict({"image": ["a.png"]}).to_parquet(tmp_path / f"{split}.parquet")
    assert shared(tmp_path) == ["test shares 1 of 1 rows with train: image of row 0 is that of row 0"]
