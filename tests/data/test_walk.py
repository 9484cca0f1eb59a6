"""Folders of very many files are listed, and told by their names, without asking the disk or a name over and over."""

from __future__ import annotations

import os
from pathlib import Path, PurePath

import pytest
from made import png, write

from mmssl.data.sources import open_source
from mmssl.data.walk import walk
from mmssl.recipe import Data

FILES = 60


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(FILES):
        write(tmp_path / f"class_{number % 3}" / f"{number:03d}.png", png(number))
    return tmp_path


def test_regular_files_are_known_by_their_folder_s_listing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    stat = os.stat

    def counted(path: str | Path, *args: object, **kwargs: object) -> os.stat_result:
        asked.append(str(path))
        return stat(path, *args, **kwargs)

    monkeypatch.setattr(os, "stat", counted)
    files, notes = walk(folder)
    assert len(files) == FILES
    assert not notes
    assert files == sorted(files)
    assert len(asked) == 4  # the folders alone


def test_names_with_characters_below_the_slash_are_ordered_as_paths_are(tmp_path: Path) -> None:
    for name in ("a/2.png", "a-b/1.png", "a.png", "b/a/1.png", "b-.png"):
        write(tmp_path / name, png(1))
    files, _ = walk(tmp_path)
    assert files == sorted(files)


def test_pictures_alone_are_gone_through_few_times(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = Data.model_validate({"source": str(folder), "image": {"size": 8}})
    open_source(spec)
    taken = 0
    stem = PurePath.stem.fget
    assert stem is not None

    def counted(path: PurePath) -> str:
        nonlocal taken
        taken += 1
        return stem(path)

    monkeypatch.setattr(PurePath, "stem", property(counted))
    assert len(open_source(spec)) == FILES  # type: ignore[arg-type]
    assert taken <= 3 * FILES
