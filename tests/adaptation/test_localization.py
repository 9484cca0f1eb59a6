"""Where a sound comes from: the measures in closed form, and a network that knows next to one that does not."""

from __future__ import annotations

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from sounding_scenes import RATE, SIZE, Heard, scenes

import mmssl
from mmssl.adaptation import heat_maps
from mmssl.adaptation.table import CEILING, MISMATCHED, PRETRAINED, RANDOM
from mmssl.data.columns import CENTER
from mmssl.decode_settings import AudioDecode, ImageDecode, VideoDecode
from mmssl.errors import DataError, RecipeError
from mmssl.media.clip import write_clip
from mmssl.recipe import Data

HOW = Data(source="here", image=ImageDecode(size=SIZE), audio=AudioDecode(rate=RATE, seconds=1.0))


def localized(task, rows, **options):
    options = {"data": HOW, "label": "box", "baseline": False} | options
    return mmssl.adapt(task, rows, probe="localization", **options)


def box(*corners):
    return np.array([corners], dtype=float)


@pytest.mark.parametrize("area", [0.09, 0.25, 0.36, 0.64, 1.0])
def test_both_rules_in_closed_form(area):
    """A square of a share of the picture, in the middle: ceiling, disc, whole picture, pointing."""
    side = area**0.5
    corners = box(0.5 - side / 2, 0.5 - side / 2, 0.5 + side / 2, 0.5 + side / 2)
    truth = heat_maps.draw_boxes(corners)
    share = truth.mean()
    assert share == pytest.approx(area, abs=0.01)
    best = heat_maps.agreement(heat_maps.oracle(corners), truth)
    assert best.equal == 1
    assert best.half == pytest.approx(min(share, 0.5) / max(share, 0.5), abs=1e-3)  # half of the pixels, and no fewer
    assert best.hit == 1
    assert heat_maps.everywhere(truth) == (share, share, share)
    wrong = heat_maps.agreement(-heat_maps.oracle(corners), truth)
    assert wrong.hit == float(area == 1.0)
    assert wrong.equal == pytest.approx(max(0, 2 * share - 1) / min(1, 1.0) if share < 1 else 1.0, abs=1e-2)
    flat = heat_maps.agreement(np.zeros(truth.shape), truth)
    assert flat[:2] == (float(area == 1.0), 0)  # ties decide nothing


def test_measures_equal_the_published_code():
    """Of a smooth map and a box: the lines of Chen et al. 2021, with as many pixels as the box as the other rule."""
    heat = heat_maps.resized(torch.rand(7, 7, generator=torch.Generator().manual_seed(0)))
    truth = heat_maps.draw_boxes(box(0.1, 0.3, 0.6, 0.9))
    found = heat_maps.agreement(heat, truth)
    for value, threshold in (
        (found.half, np.sort(heat.flatten())[int(heat.size / 2)]),
        (found.equal, np.sort(heat.flatten())[heat.size - 1 - int(truth.sum())]),
    ):
        inferred = np.where(heat > threshold, 1, 0)
        inside = np.sum(inferred * truth)
        assert value == inside / (np.sum(truth) + np.sum(inferred * (truth == 0)))
    overlaps = [0.0, 0.2, 0.52, 0.999, 1.0]
    success = [np.mean([one >= 0.05 * i for one in overlaps]) for i in range(21)]
    assert heat_maps.area_under_success(overlaps) == pytest.approx(np.trapezoid(success, dx=0.05))
    assert heat_maps.area_under_success([0.0]) == pytest.approx(0.025)
    assert heat_maps.area_under_success([1.0]) == 1


def test_boxes_are_drawn_together_and_never_vanish():
    assert heat_maps.draw_boxes(np.array([[0, 0, 0.5, 0.5], [0.25, 0.25, 0.75, 0.75]])).mean() == 7 / 16
    assert heat_maps.draw_boxes(box(0.5, 0.5, 0.501, 0.501)).sum() == 1
    assert heat_maps.draw_boxes(box(0.9999, 0.9999, 1, 1)).sum() == 1


@pytest.mark.quick(1)
@pytest.mark.parametrize("options", [{}, {"by": "gradient"}])
@pytest.mark.parametrize("embeds", [True, False])
def test_a_network_that_knows_reaches_the_ceiling_and_needs_its_sound(embeds, options):
    rows = scenes(24)
    table = localized(Heard(embeds=embeds), rows, **options)
    best, own, other = (table.row(name).metrics for name in (CEILING, PRETRAINED, MISMATCHED))
    assert own["pointing"] == best["pointing"] == own["ciou_equal_area"] == best["ciou_equal_area"] == 1
    assert own["ciou_top_half"] == best["ciou_top_half"] == 0  # the squares are a sixteenth of the picture
    assert table.row(CEILING, "8 x 8 places").metrics["ciou_equal_area"] == 1
    assert other["pointing"] < 0.7
    blind = localized(Heard(embeds=False, blind=True), rows).row(PRETRAINED).metrics
    assert blind["ciou_equal_area"] == 0
    whole = table.row("whole picture").metrics
    assert whole["pointing"] == pytest.approx(1 / 16)
    assert whole["ciou_equal_area"] == 0
    assert table.score == 1
    assert table.baseline < 1


@pytest.mark.long
def test_what_is_off_screen_is_told_by_the_confidence():
    rows = scenes(24, off=8)
    for embeds in (True, False):
        table = localized(Heard(embeds=embeds), rows)
        assert table.test_rows == 24
        assert table.counts == {"with a source on screen": 16}
        assert table.row(PRETRAINED).metrics["on_screen_precision"] == 1
        assert table.row("center disc").metrics["on_screen_precision"] == pytest.approx(16 / 24)


def test_the_mean_box_is_that_of_the_training_rows():
    rows = scenes(4).remove_columns("box")
    corners = [[0.0, 0.0, 0.5, 1.0]] * 4
    test = rows.add_column("box", corners)
    same = localized(Heard(), rows.add_column("box", corners), test=test).row("mean box").metrics
    assert same["pointing"] == 1
    other = localized(Heard(), rows.add_column("box", [[0.5, 0.0, 1.0, 1.0]] * 4), test=test).row("mean box").metrics
    assert other["pointing"] == other["ciou_equal_area"] == 0


def test_boxes_stand_where_the_encoder_sees_them():
    """A wide picture, of which the crop shows the middle: pixels and shares agree, and what is cut off is said."""
    wide = np.zeros((SIZE, 2 * SIZE, 3), np.uint8)
    wide[8:16, 24:32, 0] = 255
    boxes = [[24, 8, 32, 16], [0, 8, 8, 16]]
    loud = {"array": np.full(RATE, 0.25, np.float32), "sampling_rate": RATE}
    shown = {"image": [Image.fromarray(wide)] * 2, "audio": [loud] * 2}
    pixels = datasets.Dataset.from_dict({**shown, "box": boxes})
    shares = datasets.Dataset.from_dict({**shown, "box": (np.array(boxes) / [64, 32, 64, 32]).tolist()})
    for rows in (pixels, shares):
        table = localized(Heard(), rows)
        assert table.row(PRETRAINED).metrics["ciou_equal_area"] == 1
        assert table.test_rows == 1
        assert "1 row with less than a quarter of a box" in table.warnings[0]


def test_of_a_clip_the_frames_around_the_event_are_read(tmp_path):
    """A red square is on the left in the first half of the clip and on the right in the second."""
    frames = np.zeros((40, SIZE, SIZE, 3), np.uint8)
    frames[:20, 8:24, :16, 0] = 255
    frames[20:, 8:24, 16:, 0] = 255
    write_clip(tmp_path / "a.mp4", frames, 10, np.full(32_000, 0.25, np.float32), 8000)
    how = Data(
        source="here",
        audio=AudioDecode(rate=RATE, seconds=0.5),
        video=VideoDecode(size=SIZE, fps=10, frames=5),
        columns={"video": "clip", "audio": "clip", CENTER: "onset"},
    )
    rows = datasets.Dataset.from_dict(
        {
            "clip": [str(tmp_path / "a.mp4")] * 2,
            "onset": [1.0, 3.0],
            "box": [[0, 0.25, 0.5, 0.75], [0.5, 0.25, 1, 0.75]],
        }
    )
    task = Heard("video")
    assert localized(task, rows, data=how).row(PRETRAINED).metrics["ciou_equal_area"] == 1
    swapped = rows.remove_columns("onset").add_column("onset", [3.0, 1.0])
    assert localized(task, swapped, data=how).row(PRETRAINED).metrics["ciou_equal_area"] == 0


@pytest.mark.parametrize("form", ["match", "shift", "contrast"])
def test_alignment_has_a_map_in_each_form(form, tmp_path):
    write_clip(tmp_path / "a.mp4", np.zeros((10, SIZE, SIZE, 3), np.uint8), 10, np.full(8000, 0.25, np.float32), 8000)
    rows = datasets.Dataset.from_dict({"clip": [str(tmp_path / "a.mp4")] * 2, "box": [[0, 0.25, 0.5, 0.75]] * 2})
    columns = {"video": "clip", "audio": "clip"}
    how = HOW.model_copy(update={"columns": columns, "video": VideoDecode(size=SIZE, fps=10, frames=10)})
    encoders = {
        "video": mmssl.encoder("timm/test_resnet", modality="video"),
        "audio": mmssl.encoder("timm/test_resnet", modality="audio", rate=RATE, n_fft=64, hop=40, mels=16),
    }
    task = mmssl.objective("temporal_alignment", encoders, form=form, window=0.5, width=8)
    assert localized(task, rows, data=how).test_rows == 2


def test_random_weights_stand_in_the_table():
    encoders = {
        "image": mmssl.encoder("timm/test_resnet", modality="image"),
        "audio": mmssl.encoder("timm/test_resnet", modality="audio", rate=RATE, n_fft=64, hop=40, mels=16),
    }
    task = mmssl.objective("contrastive", encoders, a="image", b="audio", width=8)
    table = localized(task, scenes(6), baseline=True, seeds=2)
    assert len(table.row(RANDOM).runs["pointing"]) == 2
    assert [row.part for row in table.rows if row.encoder == CEILING] == ["", "1 x 1 places"]
    assert table.baseline < table.row(CEILING).metrics["ciou_equal_area"]


def test_boxes_that_a_csv_holds_as_text_are_read():
    rows = scenes(4)
    written = [None if box is None else str(list(box)) for box in rows["box"]]
    told = [localized(Heard(), given) for given in (rows, rows.remove_columns("box").add_column("box", written))]
    assert told[0].row(CEILING).metrics == told[1].row(CEILING).metrics


def test_sentences_where_it_cannot_work():
    rows = scenes(4)
    with pytest.raises(RecipeError, match="no space for both sides; use by=gradient"):
        localized(Heard(embeds=False), rows, by="similarity")
    bad = rows.remove_columns("box").add_column("box", [[0.5, 0.5, 0.1, 0.9]] * 4)
    with pytest.raises(DataError, match="row 0: a box is \\[left, top, right, bottom\\]"):
        localized(Heard(), bad)
    with pytest.raises(DataError, match="no row has a box"):
        localized(Heard(), rows.remove_columns("box").add_column("box", [None] * 4))
    with pytest.raises(DataError, match="'abc' is no box"):
        localized(Heard(), rows.remove_columns("box").add_column("box", ["abc"] * 4))
