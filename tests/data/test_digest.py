"""A source is told from what it was by its rows and by the sizes of its files, and not by where or when it is."""

from __future__ import annotations

import os
import shutil

import pytest
from made import png, texts, write, write_csv, write_jsonl, write_shards

from mmssl.data.digest import digest
from mmssl.data.sources import open_source
from mmssl.recipe import Data


def told(source, **settings) -> str:
    return digest(open_source(Data(source=str(source), **settings)))


def test_a_picture_that_was_changed_in_place_is_noticed_wherever_it_is(tmp_path):
    for n in range(200):
        write(tmp_path / "photos" / f"{n:03d}.png", png(n))
    before = told(tmp_path / "photos")
    for name in ("000.png", "001.png", "199.png"):  # of which the sample of rows holds the first
        held = (tmp_path / "photos" / name).read_bytes()
        write(tmp_path / "photos" / name, held + b"more")
        assert told(tmp_path / "photos") != before
        write(tmp_path / "photos" / name, held)
    assert told(tmp_path / "photos") == before


def test_the_same_size_and_another_content_is_noticed_in_the_sample(tmp_path):
    for n in range(8):
        write(tmp_path / f"{n}.ppm", b"P6 2 2 255\n" + bytes([n] * 12))
    before = told(tmp_path)
    write(tmp_path / "3.ppm", b"P6 2 2 255\n" + bytes([99] * 12))
    assert told(tmp_path) != before


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["csv", "jsonl", "txt"])
def test_a_line_of_a_table_that_was_changed_in_place_is_noticed(tmp_path, kind, streaming):
    def make(**changed: str) -> None:
        rows = texts(300)
        rows["text"][201] = changed.get("text", "row 201")
        if kind == "txt":
            write(tmp_path / "rows.txt", "\n".join(rows["text"]))
        else:
            {"csv": write_csv, "jsonl": write_jsonl}[kind](tmp_path / f"rows.{kind}", rows)

    make()
    before = told(tmp_path, streaming=streaming)
    make(text="another text")
    assert told(tmp_path, streaming=streaming) != before


def test_a_folder_that_was_moved_or_copied_is_the_same(tmp_path):
    for n in range(6):
        write(tmp_path / "a" / "photos" / f"{n}.png", png(n))
    write_shards(tmp_path / "a" / "shards", shards=2, rows=4)
    before = [told(tmp_path / "a" / name) for name in ("photos", "shards")]
    shutil.copytree(tmp_path / "a", tmp_path / "b", copy_function=shutil.copyfile)
    os.utime(tmp_path / "b" / "photos" / "3.png", (1, 1))
    assert [told(tmp_path / "b" / name) for name in ("photos", "shards")] == before
