"""Processes that decode: when one dies it is said, and what went wrong elsewhere is not taken for that."""

from __future__ import annotations

import multiprocessing
import os
import time

import pytest
from made import Letters, texts, write_jsonl

from mmssl.data import decoding
from mmssl.data.loader import Loader
from mmssl.decode_settings import TextDecode
from mmssl.errors import DataError
from mmssl.recipe import Data


@pytest.fixture
def rows(tmp_path):
    return Data(source=str(write_jsonl(tmp_path / "rows.jsonl", texts(103))), text=TextDecode(length=8))


class Deadly(Letters):
    def __call__(self, text, length):
        if text == "row 60":
            os._exit(7)
        return super().__call__(text, length)


@pytest.mark.long
def test_the_death_of_a_worker_is_explained(rows):
    loader = Loader({"": rows}, ("text",), batch_size=50, seed=1, tokenizers={"text": Deadly()}, workers=1)
    with pytest.raises(DataError, match=r"a worker process that decodes data died .*fewer training.workers"):
        list(loader.batches(0, 4))


class Reset:
    """Batches of one worker, which has died or has not when the next one is asked for."""

    def __init__(self, dies):
        self._workers = [multiprocessing.get_context("spawn").Process(target=time.sleep, args=(0 if dies else 60,))]
        self._workers[0].start()

    def __iter__(self):
        return self

    def __next__(self):
        raise ConnectionResetError(104, "Connection reset by peer")


@pytest.mark.parametrize("dies", [True, False])
def test_a_batch_that_a_dead_worker_still_held_is_explained(dies, rows, monkeypatch):
    batches = Reset(dies)
    if dies:
        batches._workers[0].join()
    monkeypatch.setattr(decoding.DataLoader, "__iter__", lambda self: batches)
    loader = Loader({"": rows}, ("text",), batch_size=50, seed=1, tokenizers={"text": Letters()})
    error, message = (DataError, "a worker process that decodes data died .*reset") if dies else (OSError, "reset")
    with pytest.raises(error, match=message):
        list(loader.batches(0, 1))
    batches._workers[0].kill()


@pytest.mark.long
@pytest.mark.parametrize("workers", [0, 1])
def test_a_stream_that_breaks_off_is_no_dead_worker(workers):
    def tasks():
        raise ConnectionError("Server Disconnected")
        yield

    with pytest.raises(ConnectionError, match="Server Disconnected"):
        list(decoding.decode(decoding.Rows({}, workers), tasks()))
