"""What the lottery of kills runs: every task, and sources that break in a known way."""

from __future__ import annotations

import http.client
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from lottery_runs import STREAMS, TASKS, Run, making, sources_of, toy_recipe

from mmssl.data.base import MapSource
from mmssl.data.sources import open_source
from mmssl.recipe import Data
from mmssl.registry import components


def test_every_task_is_in_it_with_every_source_that_it_can_read() -> None:
    assert components("objective").keys() - {"combine"} <= set(TASKS)
    assert all(toy_recipe(task)["training"] for task in TASKS)
    assert sources_of("rotation") == ["toy", "folder", "table.parquet", *STREAMS]
    assert sources_of("masked_language") == ["toy", "table.parquet", *STREAMS]
    assert sources_of("deepcluster") == ["toy", "folder", "table.parquet"]
    assert sources_of("wav2vec2") == sources_of("binding_sources") == ["toy"]


def test_a_table_a_folder_and_a_server_that_fails_now_and_then(tmp_path: Path) -> None:
    with making(tmp_path):
        for source, rows in (("folder", 24), ("table.parquet", 32)):
            tree = Run("rotation", source, 1, 0, False, False).tree(tmp_path)
            opened = open_source(Data.model_validate(tree["data"]))
            assert isinstance(opened, MapSource)
            assert len(opened) == rows
        tree = Run("rotation", "http", 1, 0, False, False).tree(tmp_path)
        assert tree["data"]["streaming"]
        address = tree["data"]["source"].replace("{0..3}", "2")
        content = (tmp_path / "stream" / "train-2.tar").read_bytes()
        answers = []
        for _ in range(14):
            request = urllib.request.Request(address, headers={"Range": "bytes=512-1023"})
            try:
                answers.append(urllib.request.urlopen(request).read() == content[512:1024])
            except (urllib.error.HTTPError, http.client.IncompleteRead):
                answers.append(False)
        assert answers.count(False) == 4
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(address)
