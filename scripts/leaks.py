"""Sixteen planted leaks, each with the same task where nothing is planted: a table of docs/results.md.

    python scripts/leaks.py                 all of them, about twelve minutes of one CPU core
    python scripts/leaks.py mask            those whose words hold `mask`; the other lines of the table stay
    python scripts/leaks.py --seeds 3       the clean ones alone, three seeds each: none may be above chance

Each is what a real data set or a real mistake does: a picture that was squashed, a sign in its corner, a turn in the
wrong order, a clip that begins anew at its end. A small network has to answer the task where there is nothing to see,
and has to fail where the leak is not there. `tests/audit/test_leaks.py` holds the audit to it.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from clip_leaks import BeginsAnew, SeeksOneSide, alignment, led_in, on_files, order, speed
from tables import RESULTS, write_tables

from mmssl import recipe as recipes
from mmssl.audit.edges import edges
from mmssl.audit.networks import SmallTextNetwork
from mmssl.audit.nulls import CUE, Arm, planted
from mmssl.audit.shortcuts import Finding, judge, measure_task, small, train
from mmssl.audit.texts import WORDS, Corpus, measure_texts
from mmssl.batch import Batch, count_rows
from mmssl.build import build
from mmssl.data.loader import read
from mmssl.media.clip import write_clip
from mmssl.objectives import create
from mmssl.objectives.base import Objective
from mmssl.objectives.correspondence.temporal_alignment import TemporalAlignment
from mmssl.objectives.transformation.jigsaw import Jigsaw
from mmssl.objectives.transformation.rotation import TURNS, Rotation
from mmssl.ops.augment import draw_crops, resized_crop
from mmssl.ops.draws import Draws, mix_seed
from mmssl.recipe import Data, Recipe

Ask = Callable[[int], Finding]
"""Seed -> what the audit found."""


class Leak(NamedTuple):
    """A leak, and the same task without it.

    Attributes:
        words: what is planted.
        task: that answers it.
        leaking: with it.
        clean: without it.
        without: how, in words.
    """

    words: str
    task: str
    leaking: Ask
    clean: Ask
    without: str


class BlackCorners(Rotation):
    """A 4:3 picture turned in its frame, which leaves black sides, and cropped then."""

    @torch.no_grad()
    def transform(self, batch: Batch, draws: Draws) -> Batch:
        pictures = batch["image"][:, :, (cut := batch["image"].shape[-1] // 8) : -cut]
        tall, wide = pictures.shape[-2:]
        views = []
        for k in range(TURNS):
            turned = pictures.rot90(k, (-2, -1))
            top, left = (max(0, (a - b) // 2) for a, b in zip(turned.shape[-2:], (tall, wide), strict=True))
            turned = turned[:, :, top : top + tall, left : left + wide]
            frame, left = torch.zeros_like(pictures), (wide - turned.shape[-1]) // 2
            frame[..., left : left + turned.shape[-1]] = turned
            boxes = draw_crops(draws, 1, tall, wide)[:, 0]
            views.append(resized_crop(frame, boxes, wide, draws.chance(0.5)))
        turn = torch.arange(TURNS, device=pictures.device).expand(len(pictures), TURNS)
        return {"image": torch.stack(views, 1), "turn": turn}


class ResampledTurns(Rotation):
    """Turns about a pixel in place of the center: each but the first is interpolated half a pixel to the side."""

    @torch.no_grad()
    def transform(self, batch: Batch, draws: Draws) -> Batch:
        inputs = super().transform(batch, draws)
        upright = inputs["image"][:, 0]
        views = [upright]
        for k in range(1, TURNS):
            beside = (upright + upright.roll(1, -1)) / 2
            views.append(beside.rot90(k, (-2, -1)))
        return inputs | {"image": torch.stack(views, 1)}


class NumberedTiles(Jigsaw):
    """Tiles that keep the code of their place in the picture, as position embeddings do that are added too early."""

    @torch.no_grad()
    def transform(self, batch: Batch, draws: Draws) -> Batch:
        inputs = super().transform(batch, draws)
        place = self.orders[inputs["order"]].to(inputs["tiles"].dtype) / (self.grid**2 - 1)
        return inputs | {"tiles": inputs["tiles"] + 0.1 * place[..., None, None, None]}


class FromTheStart(TemporalAlignment):
    """The right sound is that of the file's beginning, where a codec's priming is."""

    @torch.no_grad()
    def transform(self, batch: Batch, draws: Draws) -> Batch:
        inputs = super().transform(batch, draws)
        return inputs | {
            "audio": torch.stack([batch["audio"][:, : inputs["audio"].shape[2]], inputs["audio"][:, 1]], 1)
        }


class WrapsAround(TemporalAlignment):
    """The wrong sound is shifted in a circle, so that the clip's end meets its beginning in it."""

    @torch.no_grad()
    def transform(self, batch: Batch, draws: Draws) -> Batch:
        inputs = super().transform(batch, draws)
        length, whole = inputs["audio"].shape[2], batch["audio"].shape[1]
        start = whole - 1 - draws.integers(length - 2)
        heard = (start[:, None] + torch.arange(length, device=start.device)) % whole
        return inputs | {"audio": torch.stack([inputs["audio"][:, 0], batch["audio"].gather(1, heard)], 1)}


NOISE = Arm()
HEADS: dict[str, dict[str, Any]] = {
    "rotation": {},
    "jigsaw": {"orders": 4, "tile_width": 64, "hidden": 256},
    "relative_position": {"grids": 1, "hidden": 64},
}


class Size(NamedTuple):
    """Of a small training.

    Attributes:
        pixels: of a picture's side.
        steps: of training.
        batch_size: pictures a step.
        rows: that are trained on, and as many that are tested.
    """

    pixels: int
    steps: int
    batch_size: int
    rows: int


SIZES = {
    "rotation": Size(48, 150, 16, 1024),
    "jigsaw": Size(72, 150, 32, 512),
    "relative_position": Size(72, 150, 16, 512),
}


def image_recipe(task: str, options: dict[str, Any], pixels: int | None = None) -> Recipe:
    """A task with a small head, on pictures of a small size."""
    return recipes.load(
        {
            "encoders": {"image": {"model": "timm/resnet10t"}},
            "objective": {"name": task} | HEADS[task] | options,
            "data": {"source": "toy", "image": {"size": pixels or SIZES[task].pixels}},
        }
    )


def on_images(
    seed: int, task: str, arm: Arm, kind: type[Objective] | None = None, size: Size | None = None, **options: Any
) -> Finding:
    """A task of pictures, or a `kind` of it that leaks, on structure-free pictures."""
    size = size or SIZES[task]
    given = image_recipe(task, options, size.pixels)
    objective = small(given, seed)
    if kind is not None:
        objective.__class__ = kind
    training = {"steps": size.steps, "batch_size": size.batch_size, "rows": size.rows}
    return measure_task(objective, given, arm, **training, seed=seed)


def by_edges(seed: int, rows: int = 256, **cut: int) -> Finding:
    """Tiles put together by hand."""
    bare = {"gray": 0.0, "projection": 0.0, "shift": 0, "standardize": False, "orders": 24}
    return edges(image_recipe("jigsaw", bare | cut), rows=rows, seed=seed)


def on_texts(seed: int, arm: Arm, steps: int = 150, rows: int = 1024) -> Finding:
    """The order of sentences, in texts of words that mean nothing."""
    given = recipes.load("next_sentence_sop_toy", {"training.workers": 0})
    tokenizer = build(given)[0].exported["text"].tokenizer
    torch.manual_seed(seed)
    objective = create("next_sentence", {"text": SmallTextNetwork(tokenizer)}, form="sop")
    corpus = Corpus.of(next(iter(given.sources().values())))
    return measure_texts(objective, given, corpus, arm, steps, 32, rows, seed)


def on_clips(seed: int, kind: type[Objective] | None = None, steps: int = 100, rows: int = 192) -> Finding:
    """Sound and picture of clips of noise, in AVI files, which keep the priming of AAC."""
    torch.manual_seed(seed)
    given = recipes.load("temporal_alignment_toy", {"training.workers": 0})
    objective, _ = build(given)
    if kind is not None:
        objective.__class__ = kind
    decoding = next(iter(given.sources().values()))
    with tempfile.TemporaryDirectory() as folder:
        parts = [_clips(Path(folder) / part, decoding, rows, mix_seed(seed, part)) for part in ("train", "test")]
        train(objective, parts[0], steps=steps, batch_size=16, seed=seed)
        return judge(Arm("clips", "avi"), objective, _clips_unseen(objective, parts[1], seed))


def _clips(folder: Path, decoding: Data, rows: int, seed: int) -> Data:
    """Files of white pictures and brown sound, which jumps where it is cut and joined."""
    folder.mkdir()
    video, audio = decoding.video, decoding.audio
    for row in range(rows):
        rng = np.random.default_rng(mix_seed(seed, row))
        frames = rng.integers(0, 256, (video.frames + 2, video.size, video.size, 3), dtype=np.uint8)
        steps = rng.standard_normal(round((audio.seconds + 0.2) * audio.rate)).astype(np.float32)
        sound = np.cumsum(steps - steps.mean())
        sound = 0.5 * sound / np.abs(sound).max() + 0.02 * rng.standard_normal(len(sound)).astype(np.float32)
        write_clip(folder / f"{row:04d}.avi", frames, video.fps, sound.astype(np.float32), audio.rate)
    return Data(source=str(folder), video=video, audio=audio, start="first")


def _clips_unseen(objective: Objective, data: Data, seed: int) -> Any:
    for step, batch in enumerate(read(data, objective.needs, batch_size=32)):
        yield objective.transform(batch, Draws(seed, step, count_rows(batch), stream="unseen"))


def pictures(task: str, arm: Arm = NOISE, kind: type[Objective] | None = None, **options: Any) -> Ask:
    """`on_images` of any seed."""
    return partial(on_images, task=task, arm=arm, kind=kind, **options)


BARE = {"color": "none", "coarse": 0.0, "standardize": False}
UPRIGHT = pictures("rotation")
LEAKS = [
    Leak("aspect squash", "rotation", pictures("rotation", planted("squash")), UPRIGHT, "not squashed"),
    Leak("black corners", "rotation", pictures("rotation", kind=BlackCorners), UPRIGHT, "crop, then turn"),
    Leak(
        "watermark",
        "rotation",
        pictures("rotation", planted("watermark")),
        pictures("rotation", planted("watermark"), views={"margin": 0.2}),
        "`views.margin: 0.2`",
    ),
    Leak(
        "4:2:2",
        "rotation",
        pictures("rotation", planted("resaved 4:2:2")),
        pictures("rotation", Arm(file="jpeg 4:2:2", scale=2)),
        "decoded from the JPEG files",
    ),
    Leak(
        "resampled rotation",
        "rotation",
        pictures("rotation", kind=ResampledTurns),
        UPRIGHT,
        "pixels moved, not mixed",
    ),
    Leak(
        "chromatic aberration",
        "relative_position",
        pictures("relative_position", planted("red-blue shift"), **BARE),
        pictures("relative_position", planted("red-blue shift")),
        "`color: drop`",
    ),
    Leak(
        "vignetting",
        "jigsaw",
        pictures("jigsaw", planted("vignetting")),
        pictures("jigsaw", planted("vignetting"), flat_field=True),
        "`flat_field: true`",
    ),
    Leak(
        "tile edges, by hand",
        "jigsaw",
        partial(by_edges, tile=24, gap=0),
        partial(by_edges, tile=16, gap=8),
        "`gap: 8`",
    ),
    Leak("codec priming", "temporal_alignment", partial(on_clips, kind=FromTheStart), on_clips, "starts anywhere"),
    Leak("clip wrap-around", "temporal_alignment", partial(on_clips, kind=WrapsAround), on_clips, "no wrap"),
    Leak(
        "position id left in",
        "jigsaw",
        pictures("jigsaw", Arm("constant"), kind=NumberedTiles),
        pictures("jigsaw", Arm("constant")),
        "no id",
    ),
    Leak(
        "topic cue",
        "next_sentence",
        partial(on_texts, arm=Arm("words", "jsonl", CUE)),
        partial(on_texts, arm=WORDS),
        "words in random order",
    ),
    Leak(
        "frames that begin anew",
        "playback_speed",
        partial(on_files, given=speed(), kind=BeginsAnew),
        partial(on_files, given=speed()),
        "no clip reaches the end",
    ),
    Leak(
        "seek of one side of a pair",
        "temporal_alignment",
        partial(on_files, given=alignment(), steps=100, rows=128, kind=SeeksOneSide, sought=True),
        partial(on_files, given=alignment(), steps=100, rows=128, kind=SeeksOneSide, sought=False),
        "decoded from the beginning",
    ),
    Leak(
        "black lead-in of a pair",
        "temporal_alignment",
        partial(on_files, given=alignment(), steps=100, rows=128, write=led_in),
        partial(on_files, given=alignment(), steps=100, rows=128),
        "no lead-in",
    ),
    Leak(
        "black lead-in of an order",
        "clip_order",
        partial(on_files, given=order(), write=led_in),
        partial(on_files, given=order()),
        "no lead-in",
    ),
]


def numbers(finding: Finding) -> str:
    text = f"{finding.accuracy:.1%} ({finding.low:.1%} to {finding.high:.1%})".replace("%", " %")
    return f"**{text}**" if finding.verdict == "leaks" else text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="?", default="", help="only the leaks whose words hold these")
    parser.add_argument("--seeds", type=int, default=0, help="only the clean ones, with so many seeds")
    given = parser.parse_args()
    chosen = [leak for leak in LEAKS if given.words.lower() in leak.words.lower()]
    if given.seeds:
        for clean, leak in {leak.clean: leak for leak in reversed(chosen)}.items():
            found = ", ".join(numbers(clean(seed)) for seed in range(given.seeds))
            print(f"{leak.task}, {leak.without}: {found}", flush=True)
        return
    lines = kept()
    for leak in chosen:
        leaking, clean = leak.leaking(0), leak.clean(0)
        chance = f"{leaking.chance:.1%}".replace("%", " %")
        lines[leak.words] = (
            f"| {leak.words} | `{leak.task}` | {chance} | {numbers(leaking)} | {numbers(clean)} | {leak.without} |"
        )
        print(lines[leak.words], flush=True)
    head = ["| planted | task | chance | with it | without it | how |", "|---|---|---|---|---|---|"]
    write_tables("leaks", "\n".join([*head, *(lines[leak.words] for leak in LEAKS if leak.words in lines)]))


def kept() -> dict[str, str]:
    """Words -> line of the table that is there."""
    there = RESULTS.read_text("utf-8").partition("<!-- leaks -->")[2].partition("<!-- /leaks -->")[0].splitlines()
    return {line.split("|")[1].strip(): line for line in there if line.startswith("|")}


if __name__ == "__main__":
    main()
