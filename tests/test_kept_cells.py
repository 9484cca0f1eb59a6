"""Cells that scripts keep: two calls at once lose none."""

from __future__ import annotations

import multiprocessing

import tables


def keep(path, call):
    for number in range(10):
        tables.add_cell(path, f"{call} {number}", {"score": number})


def test_two_calls_that_keep_cells_lose_none(tmp_path):
    path = tmp_path / "cells.json"
    calls = [multiprocessing.get_context("fork").Process(target=keep, args=(path, call)) for call in range(3)]
    for call in calls:
        call.start()
    for call in calls:
        call.join()
    kept = tables.read_cells(path)
    assert kept == {f"{call} {number}": {"score": number} for call in range(3) for number in range(10)}
