"""Clips without structure: nothing in them has an order or belongs together, and what is planted in them is found."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from mmssl import recipe as recipes
from mmssl.audit.clips import (
    MOVING,
    MUTE,
    STILL,
    SWAPPED,
    Kept,
    OwnClips,
    SmallClipNetwork,
    SmallSoundNetwork,
    audit_clips,
    clip_kinds,
    draw_clip,
    measure_clips,
    small_clips,
    write_arm,
)
from mmssl.audit.nulls import CLOCK, Arm
from mmssl.audit.own_files import Audit
from mmssl.audit.shortcuts import Finding, judge
from mmssl.cli import app
from mmssl.data.toy import write_clips
from mmssl.errors import RecipeError
from mmssl.media.clip import write_clip
from mmssl.recipe import Data, Recipe

TINY = {"data.video.size": 16, "data.video.frames": 10, "objective.frames": 2, "objective.gap": 1}
KIND = "mp4 h264+aac"


def tiny(name: str = "clip_order_folder", **others: object) -> Recipe:
    settings = TINY if name == "clip_order_folder" else {"data.video.size": 16}
    return recipes.load(name, {**settings, **others})


@pytest.fixture(scope="module")
def own() -> OwnClips:
    """Four clips that tell by brightness and loudness which one they are."""
    level = np.arange(4)
    video = np.broadcast_to((50 * level).astype(np.uint8)[:, None, None, None, None], (4, 12, 3, 16, 16))
    return OwnClips(video, np.broadcast_to((level / 10).astype(np.float32)[:, None], (4, 16000)))


def test_container_and_codecs_of_files_are_counted(tmp_path):
    write_clips(tmp_path, 2, seconds=0.5)
    frames, sound = np.zeros((10, 32, 32, 3), np.uint8), np.zeros(16000, np.float32)
    write_clip(tmp_path / "c.avi", frames, 25, sound, 16000, video_codec="mpeg4", audio_codec="libmp3lame")
    (tmp_path / "broken.mp4").write_bytes(b"no clip")
    assert clip_kinds(Data(source=str(tmp_path))) == {"mp4 h264+aac": 2, "avi mpeg4+mp3": 1}
    assert clip_kinds(Data(source="toy", limit=4)) == {}


def test_frames_of_moving_noise_are_strangers_and_those_of_still_noise_are_one():
    data = tiny().sources()[""]
    frames, samples = draw_clip(Arm(MOVING, KIND), data, 0)
    flat = frames.reshape(len(frames), -1).astype(float)
    assert np.abs(np.corrcoef(flat)[np.triu_indices(len(flat), 1)]).max() < 0.2
    assert abs(np.polyfit(np.arange(len(flat)), flat.mean(1), 1)[0]) < 0.2
    still, _ = draw_clip(Arm(STILL, KIND), data, 0)
    assert (still == still[0]).all()
    assert still[0].std() > 10
    assert not draw_clip(Arm(MUTE, KIND), data, 0)[1].any()
    assert samples.std() == pytest.approx(0.1, rel=0.05)
    assert np.array_equal(frames, draw_clip(Arm(MOVING, KIND), data, 0)[0])


@pytest.mark.parametrize("null", [MOVING, STILL, MUTE])
def test_the_clock_is_seen_and_heard_from_another_level_in_each_clip(null):
    data = tiny().sources()[""]
    begins = []
    for seed in range(4):
        frames, samples = draw_clip(Arm(null, KIND, CLOCK), data, seed)
        bright = frames.reshape(len(frames), -1).mean(1)
        loud = np.square(samples.reshape(10, -1)).mean(1)
        assert np.corrcoef(bright, np.arange(len(bright)))[0, 1] > 0.9
        assert loud[-1] > loud[0]
        begins.append(bright[0])
    assert np.ptp(begins) > 3


def test_no_swapped_clip_has_its_own_sound(own):
    data = tiny().sources()[""]
    pairs = []
    for row in range(12):
        frames, samples = draw_clip(Arm(SWAPPED, KIND), data, 0, row, own)
        pairs.append((round(frames.mean() / 50), round(float(samples.mean()) * 10)))
    assert len(set(pairs)) == 12
    assert all(seen != heard for seen, heard in pairs)


def test_noise_is_read_as_the_recipe_reads_and_kept_in_no_cache(tmp_path):
    recipe = tiny(**{"data.start": "first", "data.cache": str(tmp_path / "cache"), "data.columns": {"video": "mine"}})
    read = write_arm(tmp_path / "noise", recipe, Arm(MOVING, "avi mpeg4+mp3"), 2, 0)
    assert clip_kinds(read) == {"avi mpeg4+mp3": 2}
    assert (read.start, read.video, read.cache) == ("first", recipe.sources()[""].video, None)


@pytest.mark.long
@pytest.mark.parametrize("task", ["contrastive_audio_video_folder", "correspondence_folder"])
def test_pairs_that_are_matched_across_rows_have_an_arm_as_well(task):
    settings = {"data.video.size": 16, "data.audio.seconds": 2, "data.video.fps": 4, "data.video.frames": 8}
    found = measure_clips(recipes.load(task, settings), Arm(MOVING, KIND), 1, 8, 16, 0)
    assert found.chance == {"contrastive_audio_video_folder": 1 / 8, "correspondence_folder": 1 / 2}[task]


def test_an_arm_that_leaks_names_what_mends_it_and_its_control_does_not():
    leaking = [Finding(Arm(MOVING, KIND, what), 0.9, 0.5, 0.8, 0.95, 8.0, "leaks") for what in (CLOCK, "none")]
    control, arm = str(Audit("clip_order", findings=leaking)).splitlines()[1:3]
    assert "control found" in control
    assert "->" not in control
    assert "-> video.fps lower than the files'" in arm


def test_small_networks_know_order_and_loudness():
    torch.manual_seed(0)
    clips, seen = torch.rand(3, 5, 3, 16, 16), SmallClipNetwork().eval()
    features = seen(clips)
    assert features.tokens.shape == (3, 5, seen.dim)
    assert features.grid == (5, 1, 1)
    assert not torch.allclose(features.pooled, seen(clips.flip(1)).pooled, atol=1e-3)
    sound, heard = 0.1 * torch.randn(3, 16000), SmallSoundNetwork(16000).eval()
    features = heard(sound)
    assert features.tokens.shape == (3, features.grid[1], heard.dim)
    assert not torch.allclose(features.pooled, heard(2 * sound).pooled, atol=1e-3)


def test_kept_rows_come_in_other_company_at_every_step():
    kept = Kept({"id": torch.arange(10)}, 4, seed=0)
    batches = [batch["id"] for batch in kept.batches(0, 50)]
    assert all(len(batch.unique()) == 4 for batch in batches)
    assert len(torch.cat(batches).unique()) == 10
    assert torch.equal(batches[7], next(iter(kept.batches(7, 8)))["id"])


def test_nothing_asked_is_no_clean_arm():
    with pytest.raises(RecipeError, match="still noise is nothing that the task asks about"):
        judge(Arm(STILL, KIND), small_clips(tiny(), 0), [])


@pytest.mark.long
def test_the_clock_is_found_and_noise_is_not():
    found = [measure_clips(tiny(), Arm(MOVING, KIND, what), 100, 16, 128, 0) for what in (CLOCK, "none")]
    assert [one.verdict for one in found] == ["leaks", "clean"]


@pytest.mark.long
def test_without_training_no_arm_is_clean(tmp_path):
    write_clips(tmp_path, 8, size=16)
    recipe = tiny("temporal_alignment_folder", **{"data.source": str(tmp_path)})
    found, notes = audit_clips(recipe, {KIND: 8}, steps=1, batch_size=8, rows=16)
    assert notes == []
    assert [one.arm.null for one in found] == [null for null in (MOVING, STILL, MUTE, SWAPPED) for _ in range(2)]
    assert [one.arm.is_control for one in found] == [True, False] * 4
    assert "clean" not in {one.verdict for one in found if not one.arm.is_control}


@pytest.mark.long
def test_the_command_names_the_files_and_says_what_it_could_not_see(tmp_path):
    write_clips(tmp_path, 6, size=16, seconds=1.2)
    settings = [f"--set={key}={value}" for key, value in TINY.items()]
    arguments = ["audit", "clip_order_folder", "--data", str(tmp_path), "--steps", "1", "--rows", "64", *settings]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert lines[1].split(maxsplit=1) == ["files", "mp4 h264+aac 6"]
    assert any("control not found" in line and "moving noise, mp4 h264+aac, clock planted" in line for line in lines)
    assert lines[-1].startswith("clip_order: nothing was found, and the control was not either")
