"""Recipes for a user's own data, on rows that such data has and the toy world has not.

Sounds of ten samples and of silence, pictures without color, texts of one word, clips that stand still or end before
their window. Recipes are found by their names and run with all settings of their tasks.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made import write, write_parquet
from PIL import Image
from recipe_files import FILES

from mmssl import recipe
from mmssl.build import build, counted
from mmssl.media.clip import write_clip
from mmssl.training.loop import fit

OWN = [path for path in FILES if re.search(r"_(folder|files|pairs)$", path.stem)]
RATE, FPS, BATCH = 16_000, 12.5, 4
WAVES = {"conv_dim": [32] * 7, "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 64}
TEXTS = [
    *("cat", "a", "12 % …", "É"),
    "A ball rolls down the hill. It hits a wall.",
    "Two dogs bark at the moon. " * 40,
    "the sound of rain on a roof, and of somebody who runs",
    "She sings. He plays the piano. They stop. Nobody claps.",
]


def pictures(dice: np.random.Generator) -> list[bytes]:
    """Awkward ones first, as everywhere here: of one color, of two gray values, of few pixels, with nothing in it."""
    noise = [dice.integers(0, 256, (64, 64 + 8 * i, 3), np.uint8) for i in range(4)]
    made = [
        Image.new("L", (64, 64), 0),
        Image.fromarray(dice.integers(0, 2, (50, 70), np.uint8) * 255).convert("1"),
        Image.fromarray(dice.integers(0, 256, (3, 5, 3), np.uint8)),
        Image.new("RGBA", (80, 40), (0, 0, 0, 0)),
        *map(Image.fromarray, noise),
    ]
    files = [io.BytesIO() for _ in made]
    for image, file in zip(made, files, strict=True):
        image.save(file, "PNG")
    return [file.getvalue() for file in files]


def sounds(dice: np.random.Generator) -> list[np.ndarray]:
    """Silence, ten samples, a constant and a clipped tone; then noise of several lengths."""
    tone = np.sign(np.sin(np.arange(RATE // 4) / 5))
    usual = [0.2 * dice.standard_normal(round(seconds * RATE)) for seconds in (0.5, 2.0, 5.0, 7.0)]
    return [np.zeros(2 * RATE), tone[:10] / 2, np.full(RATE, 0.5), tone, *usual]


def clips(dice: np.random.Generator) -> list[tuple[np.ndarray, np.ndarray]]:
    """Without movement or sound, of one frame, shorter than any window; then moving noise."""
    picture = dice.integers(0, 256, (48, 48, 3), np.uint8)
    lengths = [80, 80, 1, 5, 60, 80, 80, 90]
    frames = [np.stack([np.roll(picture, (i > 0) * 3 * t, 1) for t in range(n)]) for i, n in enumerate(lengths)]
    heard = [(i > 1) * 0.2 * dice.standard_normal(round(n / FPS * RATE)) for i, n in enumerate(lengths)]
    return list(zip(frames, heard, strict=True))


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `images`, `sounds`, `clips`, `texts`, and all of it as one table."""
    folder, dice = tmp_path_factory.mktemp("rows"), np.random.default_rng(0)
    for name in ("sounds", "clips"):
        (folder / name).mkdir()
    for i, image in enumerate(pictures(dice)):
        write(folder / "images" / f"{i}.png", image)
    for i, sound in enumerate(sounds(dice)):
        write_clip(folder / "sounds" / f"{i}.wav", None, FPS, sound, RATE, audio_codec="pcm_s16le")
    for i, (frames, sound) in enumerate(clips(dice)):
        write_clip(folder / "clips" / f"{i}.mp4", frames, FPS, sound, RATE)
    write(folder / "texts" / "texts.txt", "\n".join(TEXTS))
    files = {"image": "images", "audio": "sounds", "video": "clips"}
    columns = {key: [path.read_bytes() for path in sorted((folder / of).iterdir())] for key, of in files.items()}
    write_parquet(folder / "table.parquet", {**columns, "text": TEXTS})
    return folder


def settings(path: Path, rows: Path) -> dict[str, Any]:
    """What has to differ: the rows, few steps, networks of waveforms that are narrow, and weights from nowhere."""
    plain = recipe.load(path)
    found: dict[str, Any] = {"steps": 2, "batch_size": BATCH, "workers": 0, "precision": "fp32", "log_every": 1}
    found = {f"training.{key}": value for key, value in (found | {"schedule.warmup": 0}).items()}
    for name, data in plain.sources().items():
        source = "table.parquet" if data.source.endswith(".parquet") else data.source
        found[f"data.{name}.source" if name else "data.source"] = str(rows / source)
    for name, encoder in plain.encoders.items():
        found |= {f"encoders.{name}.{key}": value for key, value in WAVES.items() if "conv_dim" in encoder}
    return found | dict(_from_the_start(plain.objective, "objective"))


def _from_the_start(tree: dict[str, Any], key: str) -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _from_the_start(value, f"{key}.{name}")
        elif name in ("pretrained", "steps"):
            yield f"{key}.{name}", {"pretrained": False, "steps": [0, None]}[name]


@pytest.mark.slow
@pytest.mark.filterwarnings("error::UserWarning", "error::RuntimeWarning")
@pytest.mark.parametrize("limit", [None, BATCH], ids=["some", "all"])
@pytest.mark.parametrize("path", OWN, ids=lambda path: path.stem)
def test_two_steps_on_awkward_rows_are_finite_and_teach_every_weight(path, limit, rows):
    """Of batches in which some rows are awkward, and in which all are, so that a task may leave all of them out."""
    sources = [key.removesuffix(".source") for key in settings(path, rows) if key.endswith(".source")]
    resolved = counted(recipe.load(path, settings(path, rows) | {f"{key}.limit": limit for key in sources}))
    objective, loader = build(resolved)
    weights = {weight: name for name, weight in objective.named_parameters() if weight.requires_grad}
    taught: dict[str, bool] = {}
    for weight in weights:
        weight.register_post_accumulate_grad_hook(
            lambda weight: taught.update(
                {weights[weight]: taught.get(weights[weight], True) and bool(weight.grad.isfinite().all())}
            )
        )
    history = fit(objective, loader, resolved.training, quiet=True)
    assert "same_rows/loss" in history[-1]
    assert [
        (record["step"], key)
        for record in history
        for key, value in record.items()
        if isinstance(value, float) and not math.isfinite(value)
    ] == []
    assert [name for name in weights.values() if not taught.get(name)] == []
