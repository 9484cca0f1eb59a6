"""Five tasks on clips where there is nothing to see or to hear, through files: cells of `scripts/shortcuts.py`."""

from __future__ import annotations

from functools import lru_cache

import pytest
import shortcuts
import torch
from shortcuts import CLIP_ARMS, CLIP_TASKS, HEARS, NOTHING, SEEDS, ClipCell, clip_cells, clip_table, run_clips

from mmssl.audit.clip_rows import MOVING, MUTE, POSITION, STILL, SWAPPED
from mmssl.audit.nulls import CLOCK, Arm

ASKED = [cell for cell in clip_cells() if cell.seed == 0 and not cell.arm.is_control]


def numbers(accuracy: float, chance: float) -> dict[str, float | str]:
    return {"accuracy": accuracy, "chance": chance, "verdict": "clean"}


def test_every_arm_has_its_control_and_tasks_without_sound_are_not_asked_about_it():
    cells = set(clip_cells())
    assert len(cells) == 2 * SEEDS * len(ASKED)
    assert {ClipCell(one.task, Arm(one.arm.null, one.arm.file, CLOCK), one.seed) for one in cells} <= cells
    assert {cell.task for cell in ASKED if cell.arm.null in (MUTE, SWAPPED)} == set(HEARS)
    assert {cell.task for cell in ASKED if cell.arm.null == POSITION} == set(CLIP_TASKS)


def test_the_table_tells_what_is_above_chance_and_what_could_not_be_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(shortcuts, "CELLS", tmp_path / "cells.json")
    seen = {("clip_order", True): 0.9, ("clip_order", False): 0.4, ("arrow_of_time", True): 0.5}
    for words, task in ((words, task) for words in CLIP_ARMS for task in ("clip_order", "arrow_of_time")):
        arm = CLIP_ARMS[words]
        for planted in (True, False):
            cell = numbers(seen.get((task, planted), 0.5), {"clip_order": 1 / 6, "arrow_of_time": 0.5}[task])
            cell = {"verdict": NOTHING} if arm.null == STILL else cell
            key = ClipCell(task, Arm(arm.null, arm.file, CLOCK if planted else "none"), 0).key
            shortcuts.add_cell(shortcuts.CELLS, key, cell)
    lines = clip_table().splitlines()
    assert lines[0].split(" | ")[3:] == [
        "`clip_order` (16.7 %)",
        "`playback_speed` (0.0 %)",
        "`arrow_of_time` (50.0 %) |",
    ]
    assert lines[2].endswith("|  |  | **40.0 %** (90.0 %) |  | 50.0 % (no power) (50.0 %) |")
    assert lines[4].endswith("|  |  | asks nothing |  | asks nothing |")


@pytest.mark.long
def test_every_arm_has_rows_that_a_task_reads(monkeypatch):
    monkeypatch.setattr(shortcuts, "CLIP_ROWS", 16)
    monkeypatch.setattr(shortcuts, "CLIP_STEPS", 1)
    monkeypatch.setattr(shortcuts, "clips_of", lru_cache(shortcuts.clips_of.__wrapped__))
    found = [run_clips(ClipCell("correspondence", arm, 0)) for arm in CLIP_ARMS.values()]
    # In silence no row has another sound.
    assert [one and one.arm for one in found] == [None if arm.null == MUTE else arm for arm in CLIP_ARMS.values()]
    moving, swap = (shortcuts.clips_of(CLIP_ARMS[words], 0) for words in (next(iter(CLIP_ARMS)), list(CLIP_ARMS)[-1]))
    assert swap.train is moving.train
    assert not torch.equal(swap.test["video"], moving.test["video"])


def test_what_is_done_about_a_leak_is_a_cell_next_to_that_where_nothing_is():
    assert {(one.task, one.arm.null) for one in ASKED if one.remedy} == {
        ("clip_order", STILL),
        ("playback_speed", MOVING),
        ("playback_speed", POSITION),
    }
    assert all(one._replace(remedy="") in ASKED for one in ASKED)
    assert len({one.key for one in clip_cells()}) == len(clip_cells())


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("cell", ASKED, ids=lambda cell: f"{cell.task}, {cell.arm.null}, {cell.arm.file}{cell.remedy}")
def test_a_task_is_at_chance_where_the_clock_is_found(cell: ClipCell):
    finding = run_clips(cell)
    control = run_clips(cell._replace(arm=Arm(cell.arm.null, cell.arm.file, CLOCK)))
    if finding is None:
        assert cell.arm.null == (MUTE if cell.task in HEARS else STILL)
        return
    assert control is not None
    # 128 pairs are too few for this one, and a color that changes by itself hides a clock of brightness.
    blind = (cell.task, cell.arm.null) == ("correspondence", SWAPPED) or "jitter" in cell.remedy
    assert blind or control.verdict == "leaks", control
    # With `equal_span`, slow clips begin later in their span: where a clip begins tells its pace, as documented.
    known = (cell.task, cell.arm.null, cell.remedy) == ("playback_speed", POSITION, "")
    assert (finding.verdict == "leaks") == known, finding
