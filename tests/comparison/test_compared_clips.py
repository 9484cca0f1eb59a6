"""A comparison of tasks on clips with sound: which ones, of which encoder, and read how."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import mmssl
from mmssl import recipe as recipes
from mmssl.audit.clip_rows import MOVING
from mmssl.audit.nulls import CLOCK, Arm
from mmssl.audit.own_files import Audit
from mmssl.audit.shortcuts import Finding
from mmssl.build import build
from mmssl.comparison.measure import Cell, measure
from mmssl.comparison.plan import Plan, make_plan
from mmssl.comparison.plan_of_runs import plan_of_runs
from mmssl.comparison.tasks import common_decoding, found_tasks
from mmssl.data.toy import write_clips
from mmssl.errors import DataError, RecipeError
from mmssl.media.clip import write_clip
from mmssl.recipe import Data

CLIPS = ("video", "audio")
PAIRS = {"temporal_alignment", "contrastive_audio_video", "correspondence_video"}


def test_of_clips_what_is_seen_is_compared_and_pairs_are_among_the_tasks():
    found = found_tasks(None, CLIPS, None, None, "clips")
    assert found.modality == "video"
    assert {*PAIRS, "clip_order", "playback_speed", "simclr_video", "masked_autoencoder_video"} <= set(found.recipes)
    assert not {"simclr", "rotation", "simclr_audio", "cpc"} & set(found.recipes)


def test_the_sound_of_clips_is_compared_where_it_is_asked_for():
    found = found_tasks(None, CLIPS, "audio", None, "clips")
    assert found.modality == "audio"
    assert {*PAIRS, "simclr_audio", "cpc", "wav2vec2"} <= set(found.recipes)
    assert "simclr_video" not in found.recipes


@pytest.mark.parametrize("modality", CLIPS)
def test_a_task_of_several_kinds_is_found_by_its_own_name(modality):
    found = found_tasks(["simclr", "temporal_alignment"], CLIPS, modality, None, "clips")
    assert (found.modality, list(found.recipes)) == (modality, [f"simclr_{modality}", "temporal_alignment"])


def test_what_does_not_fit_is_named():
    with pytest.raises(RecipeError, match="jigsaw reads image, and clips has video, audio"):
        found_tasks(["jigsaw"], CLIPS, None, None, "clips")
    with pytest.raises(RecipeError, match=r"no kind of encoder in common.*cpc reads audio; clip_order reads video"):
        found_tasks(["cpc", "clip_order"], CLIPS, None, None, "clips")
    with pytest.raises(RecipeError, match="modality = image: clips has video, audio"):
        found_tasks(None, CLIPS, "image", None, "clips")


def test_probes_read_what_most_tasks_do_and_what_the_encoder_is_built_for():
    tasks = ("clip_order_folder", "temporal_alignment_folder", "simclr_video_folder", "byol_video_folder")
    sources = [recipes.load(name).sources()[""] for name in tasks]
    read = common_decoding(sources, "video")
    assert (read.video.frames, read.video.fps, read.video.size) == (8, 6.25, 48)
    assert common_decoding(sources[:2], "video").video.frames == 25  # of equals the shortest
    network = {"model": "transformers/videomae", "num_frames": 8, "image_size": 48, "patch_size": 8, "hidden_size": 48}
    small = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    fixed = mmssl.encoder(**network, **small, modality="video")
    assert common_decoding([sources[0], sources[0], sources[2]], "video", fixed).video.frames == 8


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    for number, path in enumerate(write_clips(folder / "flat", 24)):
        (folder / "classes" / "ab"[number % 2]).mkdir(parents=True, exist_ok=True)
        path.rename(folder / "classes" / "ab"[number % 2] / path.name)
    return str(folder / "classes")


@pytest.mark.long
def test_clips_in_class_folders_end_in_the_same_table_and_page(clips, tmp_path):
    few = {"budget": "steps=2", "batch": 8, "seeds": 1, "rates": [1.0], "encoder": "timm/test_resnet", "shots": [3]}
    tasks = ["contrastive_audio_video", "simclr", "clip_order"]
    rows = Data(source=clips, windows=2)
    found = mmssl.compare(rows, tasks=tasks, out=tmp_path / "out", audit=False, quiet=True, **few)
    trained = ["contrastive_audio_video", "simclr_video", "clip_order"]
    assert list(found.cells) == [*trained, "untrained", "raw input", "supervised"]
    assert found.plan.samples == {"contrastive_audio_video": 1, "simclr_video": 2, "clip_order": 1.5}
    assert "probes read 2 windows of 8 frames, 4 a second, of each row for every line" in str(found)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Nearest neighbors" in page
    assert "middle frame of a clip" in page
    began = [build(recipes.load(tree))[0].encoder("video").state_dict() for tree in found.plan.tasks.values()]
    assert all(torch.equal(value, began[1][name]) for name, value in began[0].items())
    runs = [cells[0]["run"] for line, cells in found.cells.items() if line in found.plan.tasks]
    again = plan_of_runs(runs, None, label="label")
    assert (again.modality, again.rows.video) == ("video", found.plan.rows.video)


@pytest.mark.long
def test_of_clips_without_sound_pairs_are_left_out(tmp_path):
    noise = np.random.default_rng(0)
    (tmp_path / "clips").mkdir()
    for number in range(16):
        frames = noise.integers(0, 256, (100, 48, 64, 3), dtype=np.uint8)
        write_clip(tmp_path / "clips" / f"{number}.mp4", frames, 25, None, 16000)
    given = Data(source=str(tmp_path / "clips"))
    plan = make_plan(given, budget="steps=1", batch=8, encoder="timm/test_resnet")
    assert {"clip_order", "simclr_video"} <= set(plan.tasks)
    assert not PAIRS & set(plan.tasks)
    assert sum("is left out" in note for note in plan.notes) >= len(PAIRS)
    with pytest.raises(DataError):
        make_plan(given, budget="steps=1", batch=8, tasks=["temporal_alignment"])


@pytest.mark.long
def test_a_task_that_the_common_encoder_cannot_do_names_the_way_out(clips):
    few = {"budget": "steps=1", "tasks": ["simclr_video", "arrow_of_time"]}
    blind = r"sees each frame alone.*one encoder, here timm/test_resnet: name another \(--encoder\), or leave arrow_of"
    with pytest.raises(RecipeError, match=blind):
        make_plan(Data(source=clips), encoder="timm/test_resnet", batch=8, **few)
    sees = {"model": "timm/test_resnet", "difference": True}
    plan = make_plan(Data(source=clips), encoder=sees, batch=8, **few)
    assert list(plan.tasks) == few["tasks"]
    # A row is two clips of either task, of 8 frames each, of which probes read one.
    with pytest.raises(RecipeError, match=r"24 usable rows, and a step of \w+ takes 50; lower batch \(--batch\) to 48"):
        make_plan(Data(source=clips), encoder=sees, batch=100, **few)


def test_an_audit_says_what_it_found_in_each_arm_as_soon_as_it_did(monkeypatch, tmp_path):
    arms = [Finding(Arm(MOVING, "h264", what), 0.9, 0.25, 0.8, 0.95, 8.0, "leaks") for what in (CLOCK, "none")]

    def asked(recipe, report):
        for arm in arms:
            report(arm)
        return Audit("rotation", findings=arms)

    monkeypatch.setattr("mmssl.comparison.measure.audit_recipe", asked)
    tree = recipes.load("rotation_video_folder").model_dump(mode="json", exclude_none=True)
    plan, said = Plan(data={"source": "clips"}, label=None, modality="video", tasks={"rotation_video": tree}), []
    found, _ = measure(plan, Cell("rotation_video", 0, audit=True), 1.0, tmp_path, said.append)
    assert found["audit"]["verdict"] == "leaks"
    assert said[0] == "  audit of rotation video begins"
    assert said[1].startswith(f"  audit of rotation video: {MOVING}, h264, {CLOCK} planted: control found, 90.0% right")
    assert said[2].startswith(f"  audit of rotation video: {MOVING}, h264: leaks, 90.0% right")
