"""The shortcut audit: files are what they say, planted artifacts are found, and the library's own tasks are clean."""

from __future__ import annotations

import io
import os
from typing import Any

import numpy as np
import pytest
from leaks import BlackCorners
from PIL import Image, JpegImagePlugin

from mmssl import recipe
from mmssl.audit.nulls import ARTIFACTS, FILES, NULLS, Arm, encode, write
from mmssl.audit.shortcuts import (
    Finding,
    accuracy_of,
    audit,
    control_of,
    measure,
    measure_task,
    small,
    table,
    with_control,
)
from mmssl.build import build
from mmssl.errors import RecipeError
from mmssl.media.image import decode_image
from mmssl.recipe import Recipe

TEXTURE = np.random.default_rng(5).integers(0, 256, (24, 24, 3), dtype=np.uint8)


def rotation(size: int = 24, **hyper: Any) -> Recipe:
    return task(size, name="rotation", **hyper)


def task(size: int, fit: str = "crop", encoder: str = "image", **objective: Any) -> Recipe:
    data = {"source": "toy", "image": {"size": size, "fit": fit}}
    return recipe.load({"encoders": {encoder: {"model": "timm/resnet18"}}, "objective": objective, "data": data})


def opened(arm: Arm, row: int = 0, size: int = 24) -> Image.Image:
    return Image.open(io.BytesIO(encode(arm, size, 0, row, TEXTURE)))


@pytest.mark.parametrize("file", FILES)
def test_files_are_what_they_say(file):
    image = opened(Arm(file=file, scale=2))
    assert image.height == 48
    kind, _, sampling = file.partition(" ")
    if kind == "jpeg":
        assert image.format == "JPEG"
        # Pillow's numbers of the three ways to store color.
        assert JpegImagePlugin.get_sampling(image) == {"4:4:4": 0, "4:2:2": 1, "4:2:0": 2}[sampling]
    else:
        assert image.format == ("GIF" if kind == "dithered" else "PNG")
        assert image.mode == {"palette": "P", "dithered": "P", "alpha": "RGBA"}.get(kind, "RGB")
    if file == "any width":
        widths = {opened(Arm(file=file), row).width for row in range(40)}
        assert min(widths) >= 24
        assert max(widths) <= 48
        assert {width % 2 for width in widths} == {0, 1}
    else:
        assert image.width == 64
    assert decode_image(encode(Arm(file=file), 24, 0, 0), 24).shape == (3, 24, 24)


def test_files_are_a_function_of_seed_and_row(tmp_path):
    write(tmp_path / "files", Arm(file="jpeg 4:2:0"), 3, 24, seed=7)
    assert [file.name for file in sorted((tmp_path / "files").iterdir())] == [f"00000{i}.jpg" for i in range(3)]
    stored = [(tmp_path / "files" / f"00000{i}.jpg").read_bytes() for i in range(3)]
    assert stored == [encode(Arm(file="jpeg 4:2:0"), 24, 7, row) for row in range(3)]
    assert len({*stored, encode(Arm(file="jpeg 4:2:0"), 24, 8, 0)}) == 4


@pytest.mark.quick(2)
@pytest.mark.parametrize("null", ["white", "blurred", "natural", "phases"])
def test_no_direction_and_no_border_of_a_null_is_special(null):
    stripes = np.zeros((24, 24, 3), np.uint8)
    stripes[::4] = 255  # a texture with a direction
    pictures = np.stack([NULLS[null](np.random.default_rng(i), 24, 32, stripes)[:, 4:28] for i in range(400)])
    assert pictures.min() >= 0
    assert pictures.max() <= 1
    deviations = pictures - pictures.mean((1, 2), keepdims=True)

    def alike(a: np.ndarray, b: np.ndarray) -> float:
        return float((a * b).mean() / (deviations**2).mean())

    down, across = alike(deviations[:, 1:], deviations[:, :-1]), alike(deviations[:, :, 1:], deviations[:, :, :-1])
    assert down == pytest.approx(across, abs=0.05)
    # Opposite borders: neighbors on a torus, far apart here.
    ends = alike(deviations[:, 0], deviations[:, -1]), alike(deviations[:, :, 0], deviations[:, :, -1])
    assert ends[0] == pytest.approx(ends[1], abs=0.05)
    assert max(ends) < 0.1


def test_channels_of_noise_go_together_as_in_photographs():
    noise = NULLS["white"](np.random.default_rng(0), 96, 96, None).reshape(-1, 3)
    assert np.corrcoef(noise.T)[np.triu_indices(3, 1)] == pytest.approx(0.8, abs=0.02)


def test_constant_pictures_are_constant():
    pixels = np.asarray(opened(Arm("constant")))
    assert (pixels == pixels[0, 0]).all()


def test_artifacts_are_of_the_stated_strength():
    ramp = np.broadcast_to(np.linspace(0.2, 0.8, 81, dtype=np.float32)[:, None, None], (81, 81, 3))
    green = ARTIFACTS["green shift"](ramp)
    assert green[0, 40] - 0.5 == pytest.approx([-0.3, -0.3 / 1.05, -0.3], abs=1e-4)
    lens = ARTIFACTS["red-blue shift"](ramp)
    assert lens[60, 40] - 0.5 == pytest.approx([0.15 / 1.04, 0.15 / 1.02, 0.15], abs=2e-4)
    flat = np.full((81, 81, 3), 0.8, np.float32)
    wide = ARTIFACTS["vignetting"](np.full((61, 81, 3), 0.8, np.float32))
    assert wide[0, 0, 0] == pytest.approx(0.4, abs=0.02)
    assert wide[30, 70, 0] == pytest.approx(wide[60, 40, 0], abs=1e-4)  # the same distance from the center
    dark = ARTIFACTS["vignetting"](flat)
    assert dark[40, 40, 0] == pytest.approx(0.8, abs=1e-3)
    assert dark[0, 0, 0] == pytest.approx(0.4, abs=0.01)
    marked = np.argwhere((ARTIFACTS["watermark"](np.zeros((72, 96, 3), np.float32)) == 1).all(-1))
    assert marked.min(0).tolist() == [72 - 14, 84 - 10]
    assert marked.max(0).tolist() == [72 - 3, 84 - 3]
    squashed = ARTIFACTS["squash"](np.broadcast_to(np.linspace(0, 1, 96)[None, :, None], (72, 96, 3)))
    assert squashed.shape == (72, 72, 3)


def test_a_picture_of_the_right_height_keeps_its_pixels():
    arm = Arm(file="any width")
    for row in range(12):
        pixels, decoded = np.asarray(opened(arm, row)), decode_image(encode(arm, 24, 0, row), 24).permute(1, 2, 0)
        left = (pixels.shape[1] - 24) // 2
        assert np.array_equal(decoded, pixels[:, left : left + 24])


@pytest.mark.long
def test_a_planted_mark_is_found_and_constant_pictures_tell_nothing():
    findings = audit(
        rotation(views={"area": None, "flip": 0.0}),
        [Arm("constant", artifact="watermark"), Arm("constant")],
        steps=30,
        rows=96,
    )
    control, marked, plain = findings
    assert control.arm == control_of(plain.arm)
    assert control.verdict == marked.verdict == "leaks"
    assert marked.accuracy > 0.97
    assert plain.accuracy == pytest.approx(0.25)
    assert (plain.verdict, plain.z) == ("clean", pytest.approx(0))
    lines = table(findings).splitlines()
    assert len(lines) == 5
    assert lines[4].startswith("| constant | png | none | 25.0% |")


@pytest.mark.long
def test_turning_before_cropping_is_found():
    given = rotation(32)
    wrong = small(given, seed=0)
    wrong.__class__ = BlackCorners
    finding = measure_task(wrong, given, Arm(), steps=100, batch_size=16, rows=512, seed=0)
    assert finding.verdict == "leaks"
    assert finding.accuracy > 0.3
    assert 0.25 < finding.low < finding.accuracy < finding.high


def test_a_measurement_repeats():
    assert measure(rotation(32), Arm("constant"), steps=3, rows=32) == measure(
        rotation(32), Arm("constant"), steps=3, rows=32
    )


def test_clean_means_that_the_control_was_found():
    def finding(low: float) -> Finding:
        return Finding(Arm(), low + 0.02, 0.25, low, low + 0.04, 1.0, "leaks" if low > 0.25 else "clean")

    assert with_control(finding(0.23), finding(0.6)).verdict == "clean"
    assert with_control(finding(0.23), finding(0.24)).verdict == "no power"
    assert with_control(finding(0.3), finding(0.24)).verdict == "leaks"


@pytest.mark.parametrize(
    ("hyper", "message"),
    [
        ({"name": "simclr"}, "SimCLR compares rows"),
        ({"name": "masked_language", "encoder": "text"}, "one source of images"),
        ({"name": "autoencoder"}, "Autoencoder logs no accuracy"),
    ],
)
def test_refuses_what_predicts_nothing_of_an_image(hyper, message):
    with pytest.raises(RecipeError, match=message):
        measure(task(32, **hyper), Arm())


def test_of_pairs_it_is_asked_which_scores_higher():
    assert accuracy_of(build(recipe.load("temporal_alignment_toy"))[0]) == ("ranking", 0.5)
    assert accuracy_of(build(recipe.load("rotation_toy"))[0]) == ("accuracy", 0.25)


TASKS: dict[str, dict[str, Any]] = {
    "rotation": {"name": "rotation"},
    "jigsaw": {"name": "jigsaw", "orders": 24, "tile_width": 64, "hidden": 256},
    "relative_position": {"name": "relative_position", "grids": 1, "hidden": 64},
}


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("name", TASKS)
def test_the_librarys_tasks_are_at_chance_on_noise_from_every_kind_of_file(name, file):
    audited = task(48 if name == "rotation" else 96, **TASKS[name])
    (control, finding) = audit(audited, [Arm(file=file)], batch_size=32 if name == "jigsaw" else 16)
    assert control.verdict == "leaks"
    assert finding.verdict == "clean", finding


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.skipif("MMSSL_DATA" not in os.environ, reason="needs real pictures: set MMSSL_DATA")
def test_rotation_is_at_chance_on_real_pictures_with_random_phases():
    tree = task(48, name="rotation").model_dump(exclude_none=True)
    tree["data"] |= {"source": "$MMSSL_DATA/stamps"}
    control, finding = audit(recipe.load(tree), [Arm("phases", "jpeg 4:2:0")])
    assert control.verdict == "leaks"
    assert finding.verdict == "clean", finding
