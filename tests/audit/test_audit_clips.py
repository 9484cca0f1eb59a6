"""Clips without structure: nothing in them has an order or belongs together, and what is planted in them is found."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from mmssl import recipe as recipes
from mmssl.audit.clip_rows import (
    MOVING,
    MUTE,
    POSITION,
    RECODED,
    STILL,
    SWAPPED,
    TO,
    Kept,
    Rows,
    blank,
    clip_kinds,
    draw_noise,
    muted,
    noise_rows,
    swapped,
    swapped_rows,
    with_clock,
    write_noise,
)
from mmssl.audit.clips import (
    PositionAlone,
    audit_clips,
    measure_clips,
    rows_of,
)
from mmssl.audit.networks import SmallClipNetwork, SmallSoundNetwork, stand_in
from mmssl.audit.nulls import CLOCK, Arm
from mmssl.audit.own_files import Audit
from mmssl.audit.shortcuts import Finding, judge
from mmssl.cli import app
from mmssl.data.toy import write_clips
from mmssl.errors import RecipeError
from mmssl.media.clip import write_clip
from mmssl.objectives.base import Objective
from mmssl.ops.draws import Draws
from mmssl.recipe import Data, Recipe

TINY = {"data.video.size": 16, "data.video.frames": 10, "objective.frames": 2, "objective.gap": 1}
KIND = "mp4 h264+aac"


def tiny(name: str = "clip_order_folder", **others: object) -> Recipe:
    settings = TINY if name == "clip_order_folder" else {"data.video.size": 16}
    return recipes.load(name, {**settings, **others})


def test_container_and_codecs_of_files_are_counted(tmp_path):
    write_clips(tmp_path, 2, seconds=0.5)
    frames, sound = np.zeros((10, 32, 32, 3), np.uint8), np.zeros(16000, np.float32)
    write_clip(tmp_path / "c.avi", frames, 25, sound, 16000, video_codec="mpeg4", audio_codec="libmp3lame")
    (tmp_path / "broken.mp4").write_bytes(b"no clip")
    assert clip_kinds(Data(source=str(tmp_path))) == {"mp4 h264+aac": 2, "avi mpeg4+mp3": 1}
    assert clip_kinds(Data(source="toy", limit=4)) == {}


def test_frames_of_moving_noise_are_strangers_and_those_of_still_noise_are_one():
    data = tiny().sources()[""]
    frames, samples = draw_noise(Arm(MOVING, KIND), data, 0)
    flat = frames.reshape(len(frames), -1).astype(float)
    assert np.abs(np.corrcoef(flat)[np.triu_indices(len(flat), 1)]).max() < 0.2
    assert abs(np.polyfit(np.arange(len(flat)), flat.mean(1), 1)[0]) < 0.2
    still, _ = draw_noise(Arm(STILL, KIND), data, 0)
    assert (still == still[0]).all()
    assert still[0].std() > 10
    assert samples.std() == pytest.approx(0.1, rel=0.05)
    assert np.array_equal(frames, draw_noise(Arm(MOVING, KIND), data, 0)[0])


def test_the_clock_is_seen_and_heard_from_another_level_in_each_clip():
    gray = {"video": torch.full((4, 10, 3, 16, 16), 128, dtype=torch.uint8), "audio": torch.zeros(4, 16000)}
    begins = []
    for part in with_clock(Rows(gray, gray), 16000, 0):
        for clip, samples in zip(part["video"].numpy(), part["audio"].numpy(), strict=True):
            bright = clip.reshape(10, -1).mean(1)
            loud = np.square(samples.reshape(10, -1)).mean(1)
            assert np.corrcoef(bright, np.arange(10))[0, 1] > 0.9
            assert loud[-1] > loud[0]
            begins.append(bright[0])
    assert np.ptp(begins) > 3
    assert len(set(begins)) == 8
    assert (gray["video"] == 128).all()


def test_silence_has_the_same_pictures():
    rows = {"video": torch.ones(2, 3), "audio": torch.ones(2, 5)}
    test = muted(Rows(rows, rows)).test
    assert test["video"] is rows["video"]
    assert not test["audio"].any()


@pytest.mark.parametrize(("count", "pairs"), [(2, 2), (4, 4), (4, 12), (5, 8)])
def test_no_swapped_clip_has_its_own_sound(count, pairs):
    own = {key: torch.arange(count) for key in ("video", "audio", "audio_mask")}
    made = swapped(own, pairs)
    assert len(set(zip(made["video"].tolist(), made["audio"].tolist(), strict=True))) == pairs
    assert (made["video"] != made["audio"]).all()
    assert torch.equal(made["audio"], made["audio_mask"])


def test_noise_is_read_as_the_recipe_reads_and_kept_in_no_cache(tmp_path):
    recipe = tiny(**{"data.start": "first", "data.cache": str(tmp_path / "cache"), "data.columns": {"video": "mine"}})
    read = write_noise(tmp_path / "noise", recipe, Arm(MOVING, "avi mpeg4+mp3"), 2, 0)
    assert clip_kinds(read) == {"avi mpeg4+mp3": 2}
    assert (read.start, read.video, read.cache) == ("first", recipe.sources()[""].video, None)


@pytest.mark.long
@pytest.mark.parametrize("task", ["contrastive_audio_video_folder", "correspondence_folder"])
def test_pairs_that_are_matched_across_rows_have_an_arm_as_well(task):
    settings = {"data.video.size": 16, "data.audio.seconds": 2, "data.video.fps": 4, "data.video.frames": 8}
    recipe, arm = recipes.load(task, settings), Arm(MOVING, KIND)
    found = measure_clips(recipe, arm, noise_rows(recipe, arm, 16, 8, 0), 1, 8, 0)
    assert found.chance == {"contrastive_audio_video_folder": 1 / 8, "correspondence_folder": 1 / 2}[task]


def test_an_arm_that_leaks_names_what_mends_it_and_its_control_does_not():
    leaking = [Finding(Arm(MOVING, KIND, what), 0.9, 0.5, 0.8, 0.95, 8.0, "leaks") for what in (CLOCK, "none")]
    control, arm = str(Audit("clip_order", findings=leaking)).splitlines()[1:3]
    assert "control found" in control
    assert "->" not in control
    assert "-> video.fps lower than the files'" in arm


def test_the_last_line_says_how_much_more_than_chance_is_left_open_and_which_arms_say_little():
    seen = Finding(Arm(MOVING, KIND), 0.52, 0.5, 0.4, 0.63, 0.4, "clean")
    blind = Finding(Arm(MUTE, KIND), 0.5, 0.5, 0.45, 0.55, 0.0, "no power")
    told = Audit("clip_order", findings=[seen, replace(blind, verdict="clean")]).sentence
    assert "at chance in all 2 arms (at most 63.0% right, chance 50.0%)" in told
    told = Audit("clip_order", findings=[seen, blind]).sentence
    assert f"the control was not either in 1 of 2 arms (silence, {KIND}), which says little" in told
    assert told.endswith("mmssl audit with more --steps or --rows")
    told = Audit("clip_order", findings=[seen, replace(blind, arm=Arm(SWAPPED, KIND))]).sentence
    assert told.endswith("mmssl audit with more --steps or --rows or clips of your own")


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
        judge(Arm(STILL, KIND), stand_in(tiny()), [])


@pytest.mark.long
def test_the_clock_is_found_and_noise_is_not():
    arm = Arm(MOVING, KIND)
    rows = noise_rows(tiny(), arm, 128, 16, 0, sound=False)
    found = [measure_clips(tiny(), arm, given, 100, 16, 0) for given in (with_clock(rows, 16000, 0), rows)]
    assert [one.verdict for one in found] == ["leaks", "clean"]


@pytest.mark.long
def test_of_few_clips_there_are_more_pairs_to_train_on_than_rows(tmp_path):
    write_clips(tmp_path, 12, size=16)
    rows = swapped_rows(tiny("temporal_alignment_folder", **{"data.source": str(tmp_path)}), 6)
    assert (len(rows.train["video"]), len(rows.test["video"])) == (24, 6)


@pytest.mark.long
def test_without_training_no_arm_is_clean(tmp_path):
    write_clips(tmp_path, 8, size=16)
    recipe = tiny("temporal_alignment_folder", **{"data.source": str(tmp_path)})
    found, notes = audit_clips(recipe, {KIND: 8}, steps=1, batch_size=8, rows=16)
    assert notes == []
    kinds = (MOVING, STILL, MUTE, SWAPPED, POSITION, RECODED)
    assert [one.arm.null for one in found] == [null for null in kinds for _ in range(2)]
    assert [one.arm.is_control for one in found] == [True, False] * len(kinds)
    assert found[-1].arm.file == f"{KIND}{TO}avi mpeg4+aac"
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


def alone(task: Objective) -> Objective:
    task.__class__ = type("PositionAlone", (PositionAlone, type(task)), {})
    return task


def noise(rows: int, frames: int, samples: int = 16000) -> dict[str, torch.Tensor]:
    video = torch.randint(256, (rows, frames, 3, 16, 16), dtype=torch.uint8)
    return {"video": video, "audio": 0.1 * torch.randn(rows, samples)}


@pytest.mark.parametrize(
    "name", ["temporal_alignment_toy", "correspondence_toy", "playback_speed_toy", "clip_order_toy"]
)
def test_of_position_alone_nothing_of_a_clip_is_left(name):
    torch.manual_seed(0)
    recipe = recipes.load(name)
    settings, task = recipe.sources()[""], alone(stand_in(recipe))
    samples = round(settings.audio.rate * settings.video.frames / settings.video.fps)
    one, two = (task.transform(noise(16, settings.video.frames, samples), Draws(0, 0, 16)) for _ in range(2))
    for key in one:
        assert torch.equal(one[key], two[key]), key
    start = one["start"].float()
    if "audio" in one:
        loud = one["audio"].square().mean(-1).sqrt()
        torch.testing.assert_close(loud, (loud.max() / start.max() * start).expand_as(loud), rtol=1e-3, atol=1e-4)
        seen = one.get("visual", one.get("video"))
        assert (seen == 0.5).all()
    else:
        first = start.flatten(1).amin(1) if start.ndim > 1 else start
        bright = one.get("clips", one.get("video")).flatten(1)
        assert torch.equal(bright, (first / settings.video.frames)[:, None].expand_as(bright))
        assert len(bright.unique()) > 1


def test_a_task_that_does_not_say_where_it_cuts_has_no_arm_of_position():
    task = alone(stand_in(recipes.load("rotation_video_folder")))
    with pytest.raises(RecipeError, match="does not say where in a clip it cuts"):
        task.transform(noise(2, 16), Draws(0, 0, 2))


def test_a_codec_swap_tests_the_same_noise_in_other_files():
    recipe = tiny(**{"data.start": "first"})  # tracks of other codecs end elsewhere, and so does the middle lie
    moving = noise_rows(recipe, Arm(MOVING, KIND), 4, 4, 0)
    swap = rows_of(recipe, Arm(RECODED, f"{KIND}{TO}avi mjpeg+pcm_s16le"), moving, 4, 4, 0, sound=True)
    assert swap.train is moving.train
    for key in ("video", "audio"):
        as_is, other = moving.test[key].float().flatten(), swap.test[key].float().flatten()
        assert not torch.equal(as_is, other)
    pictures = [rows.test["video"].float().flatten() for rows in (moving, swap)]
    assert torch.corrcoef(torch.stack(pictures))[0, 1] > 0.5


@pytest.mark.long
def test_a_place_that_tells_the_answer_is_found_by_position_alone():
    torch.manual_seed(0)
    rows = Rows(noise(192, 16), noise(192, 16))
    found = {}
    for equal_span in (True, False):  # where spans are equal, slow clips begin later in theirs
        recipe = tiny("playback_speed_toy", **{"objective.equal_span": equal_span})
        found[equal_span] = measure_clips(recipe, Arm(POSITION, KIND), rows, 100, 16, 0).verdict
    assert found == {True: "leaks", False: "clean"}


def test_gray_in_silence_is_whole_rows():
    rows = {
        "video": torch.ones(2, 3, dtype=torch.uint8),
        "audio": torch.ones(2, 5),
        "audio_mask": torch.zeros(2, 5) > 0,
    }
    made = blank(Rows(rows, rows)).train
    assert (made["video"] == 128).all()
    assert not made["audio"].any()
    assert made["audio_mask"].all()
