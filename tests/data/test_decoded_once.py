"""Rows that are read again in a process are not decoded again, and a file that was changed is."""

from __future__ import annotations

import os

import pytest
import torch
from made import png, write_parquet
from PIL import Image

from mmssl.data import decoding
from mmssl.data.columns import Decoder
from mmssl.data.digest import add_cell
from mmssl.data.loader import read
from mmssl.decode_settings import ImageDecode
from mmssl.recipe import Data

ROWS = 6


@pytest.fixture
def decoded(monkeypatch):
    """Calls of the decoder."""
    calls, decode = [], Decoder.__call__
    monkeypatch.setattr(Decoder, "__call__", lambda self, *args: calls.append(args) or decode(self, *args))
    decoding.SHARED.clear()
    yield calls
    decoding.SHARED.clear()


def pictures(source, limit=None):
    (batch,) = read(Data(source=str(source), limit=limit, image=ImageDecode(size=8)), ["image"])
    return batch["image"]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "pictures").mkdir()
    for i in range(ROWS):
        (tmp_path / "pictures" / f"{i}.png").write_bytes(png(40 * i).ljust(100, b"\0"))
    return tmp_path / "pictures"


def test_folders_and_tables_are_decoded_once_a_process(folder, tmp_path, decoded):
    table = tmp_path / "table.parquet"
    write_parquet(table, {"image": [png(40 * i + 9) for i in range(ROWS)]})
    for source in (folder, table):
        decoded.clear()
        first = pictures(source)
        kept = first.clone()
        first.zero_()  # what a reader does to its batch stays there
        assert torch.equal(pictures(source), kept)
        assert torch.equal(pictures(source, limit=1), kept[:1])
        assert len(decoded) == ROWS


def test_a_changed_file_is_decoded_anew(folder, decoded):
    before = pictures(folder)
    (changed,) = folder.glob("2.png")
    state = changed.stat()
    changed.write_bytes(png(255).ljust(100, b"\0"))
    os.utime(changed, ns=(state.st_atime_ns, state.st_mtime_ns + 1))
    assert changed.stat().st_size == state.st_size == 100
    after = pictures(folder)
    assert (after != before).flatten(1).any(1).nonzero().flatten().tolist() == [2]
    assert len(decoded) == ROWS + 1


def test_rows_that_are_shared_take_no_more_memory_than_is_allowed(tmp_path, decoded, monkeypatch):
    several = []
    for i in range(decoding.SOURCES + 1):
        cells = {"image": [png(40 * row + i) for row in range(ROWS)]}
        several.append(write_parquet(tmp_path / f"{i}.parquet", cells))
    allowed = decoding.SOURCES * ROWS * 3 * 8 * 8
    monkeypatch.setattr(decoding, "KEPT_BYTES", allowed)
    for table in (*several, *several[1:]):
        pictures(table)
    assert len(decoded) == len(several) * ROWS
    pictures(several[0])
    assert len(decoded) == (len(several) + 1) * ROWS  # the oldest had to go
    decoded.clear()
    monkeypatch.setattr(decoding, "KEPT_BYTES", allowed - 1)  # each is too large a part
    decoding.SHARED.clear()
    assert torch.equal(pictures(several[0]), pictures(several[0]))
    assert len(decoded) == 2 * ROWS


def test_pictures_in_memory_are_told_apart_by_their_pixels():
    def told(cell):
        found = []
        add_cell(type("Content", (), {"update": staticmethod(found.append)}), cell)
        return b"".join(found)

    red, also, blue = (Image.new("RGB", (2, 2), color) for color in ("red", "red", "blue"))
    assert told(red) == told(also) != told(blue)
    assert told([red]) != told([blue])
