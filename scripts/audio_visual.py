"""What the audio-visual tasks are good for: one data set, one budget, the same networks; resumable.

    MMSSL_DATA=path/to/data python scripts/audio_visual.py                             what is missing, then the table
    MMSSL_DATA=path/to/data python scripts/audio_visual.py temporal_alignment 0 1      some tasks or seeds
    python scripts/audio_visual.py --table                                             only the table

Clips are those of `skirmish`: drawn fighters that strike, with recorded sounds, 400 to learn from and 120 of other
fighters to be asked about. A cell is one task, one question and one seed: pretrain, then ask where the sound comes
from, what kind of strike it is, which of two mixed sounds belongs to the picture, or by how much sound and picture are
apart. `random` are the same tasks before their first step. Cells are kept in scripts/audio_visual.json and not run
again; the runs are in build/audio_visual, where each is trained once.
"""

from __future__ import annotations

import argparse
import functools
import statistics
from pathlib import Path
from typing import Any, TypeAlias

from results import EDITS, answers
from tables import Cells, fill_cells, read_cells, spread, write_tables

ROOT = Path(__file__).resolve().parent.parent
CELLS = ROOT / "scripts" / "audio_visual.json"
HOME = ROOT / "build" / "audio_visual"
FIRST, SECOND, THIRD = "temporal_alignment", "contrastive_audio_video", "correspondence"
FRESH = f"{THIRD}, from random weights"
FIRST_RANDOM, SECOND_RANDOM, HAND = f"{FIRST} random", f"{SECOND} random", "by hand"
EVERY = (0, 1, 2)
LEARNED = (FIRST, SECOND, THIRD, FRESH)
SEEDS = {**dict.fromkeys((*LEARNED, FIRST_RANDOM, SECOND_RANDOM), EVERY), HAND: (0,)}
NAMES = {
    FIRST: "temporal alignment",
    SECOND: "contrastive audio-video",
    THIRD: "correspondence, after temporal alignment",
    FRESH: "correspondence, from random weights",
    FIRST_RANDOM: "untrained",
    SECOND_RANDOM: "untrained, compared in the space of contrastive audio-video",
}
STEPS = 200
PLACES = 8
DRAWS = 8  # of each clip, where a task is asked its own question
# 8 x 8 places and 26 moments of two seconds: at a stride of 32 there are 2 x 2 places, and nobody is found in those.
CNN = {"model": "timm/resnet10t", "channels": [16, 32, 64, 64], "stem_width": 8, "output_stride": 8}
ENCODERS = {"video": {**CNN, "difference": True}, "audio": {**CNN, "mels": 32}}
# Around the first strike; no other is so near. Half the seconds of alignment's windows, and twice as many rows a step.
AROUND = {"data.audio.seconds": 0.96, "data.video.frames": 12}
# Strikes of two clips are at different moments of their first two seconds, which is what tells their sounds apart.
PARTS = {
    "around": (SECOND, {}),
    "whole": (FIRST, {}),
    "start": (FIRST, {"data.audio.seconds": 2, "data.video.frames": 25}),
}
SEPARATOR = {"steps": 300, "width": 8, "n_fft": 256, "hop": 128, "lr": 3e-3}
RATIO = "si_sdr_improvement"
SOURCE, OFFSET, SEPARATION = "localization", "offset", "separation"
DAMAGE, RANGE = "first_damage_type", "first_range"
ACTIONS = [f"{label} {sense}" for label in (DAMAGE, RANGE) for sense in ENCODERS]
FRAMES = [f"{label} image" for label in (DAMAGE, RANGE)]
# Of a clip that stands still; where two fighters stand; with sounds of nobody here.
FROZEN = [f"{label} frozen" for label in (DAMAGE, RANGE)]
TUNED = f"{DAMAGE} tuned"
TUNING = {"lr": [1e-3], "decay": [1.0], "steps": 120, "batch_rows": 32}
TWO, OFF, ANSWERS = "two fighters", "off screen", "answers"
COLUMNS = (
    ("source: pointing, %", SOURCE, "pretrained", "pointing"),
    ("source: pointing, another clip's sound, %", SOURCE, "mismatched", "pointing"),
    ("source: cIoU@0.5, equal area, %", SOURCE, "pretrained", "ciou_equal_area"),
    ("damage type, by picture, %", f"{DAMAGE} video", "pretrained pooled", "accuracy"),
    ("damage type, by sound, %", f"{DAMAGE} audio", "pretrained pooled", "accuracy"),
    ("range, by picture, %", f"{RANGE} video", "pretrained pooled", "accuracy"),
    ("range, by sound, %", f"{RANGE} audio", "pretrained pooled", "accuracy"),
    ("separation: SI-SDR improvement, dB", SEPARATION, "pretrained", RATIO),
    ("offset within 80 ms, %", OFFSET, "pretrained", "within_a_step"),
)
MORE = (
    ("source, two fighters: pointing, %", TWO, "pretrained", "pointing"),
    ("source: area under success, equal area, %", SOURCE, "pretrained", "auc_equal_area"),
    ("heard but not seen: AP, %", OFF, "pretrained", "on_screen_precision"),
    ("damage type, frozen frame, %", FROZEN[0], "pretrained pooled", "accuracy"),
    ("range, frozen frame, %", FROZEN[1], "pretrained pooled", "accuracy"),
    ("damage type, tuned, %", TUNED, "pretrained pooled", "accuracy"),
)
TABLES = {"audio_visual": COLUMNS, "audio_visual_more": MORE}
PLACED = (SOURCE, TWO, OFF)
ASKED = {
    FRESH: (ANSWERS,),
    THIRD: (ANSWERS, *PLACED, *ACTIONS, *FROZEN, OFFSET, SEPARATION),
    SECOND: (ANSWERS, *PLACED, *ACTIONS, *FROZEN, OFFSET, SEPARATION),
    FIRST: (ANSWERS, *PLACED, *ACTIONS, *FROZEN, OFFSET, SEPARATION, TUNED),
    FIRST_RANDOM: (*PLACED, *ACTIONS, *FROZEN, OFFSET, SEPARATION, TUNED),
    SECOND_RANDOM: (SOURCE, TWO, OFF, OFFSET),  # of encoders alone, one untrained kind is enough
    HAND: (ANSWERS, SOURCE, *ACTIONS, *FRAMES),
}
# Name of a line -> seeds, and question of a column -> whose cell, of which question, and which line of it.
BASELINES: dict[str, tuple[tuple[int, ...], dict[str, tuple[str, str, str]]]] = {
    "what moves, by hand": ((0,), {SOURCE: (HAND, SOURCE, "what moves")}),
    **{
        line: ((0,), {one: (FIRST_RANDOM, one, line) for one in (SOURCE, TWO)})
        for line in ("mean box", "center disc", "whole picture")
    },
    "raw pictures, raw sound": ((0,), {one: (HAND, one, "pretrained pooled") for one in ACTIONS}),
    "one frame, raw": ((0,), {f"{one} video": (HAND, f"{one} image", "pretrained pooled") for one in (DAMAGE, RANGE)}),
    "sound alone, trained alike": (EVERY, {SEPARATION: (FIRST_RANDOM, SEPARATION, "sound alone, trained alike")}),
    "unchanged mixture": ((0,), {SEPARATION: (FIRST_RANDOM, SEPARATION, "unchanged mixture")}),
    "constant answer": (
        (0,),
        {
            **{one: (FIRST_RANDOM, one, "constant") for one in (*ACTIONS, *FROZEN, TUNED, OFFSET)},
            OFF: (FIRST_RANDOM, OFF, "center disc"),
        },
    ),
    "chance": ((0,), {OFFSET: (FIRST_RANDOM, OFFSET, "chance")}),
    "ceiling": (
        (0,),
        {
            **{one: (FIRST_RANDOM, one, f"ceiling {PLACES} x {PLACES} places") for one in (SOURCE, TWO)},
            SEPARATION: (FIRST_RANDOM, SEPARATION, "ceiling"),
        },
    ),
}
Scores: TypeAlias = "dict[str, dict[str, float]]"


def changes(task: str, seed: int) -> dict[str, Any]:
    """What a cell's recipe has in place of that of the same name."""
    changed: dict[str, Any] = {"training.steps": STEPS, "training.seed": seed, "data.cache": str(HOME / "decoded")}
    for name, encoder in ENCODERS.items():
        start = {"model": CNN["model"], "pretrained": str(HOME / f"{FIRST} {seed}")}
        changed[f"encoders.{name}"] = start if task == THIRD else encoder
    return changed if task == FIRST else changed | AROUND


@functools.cache
def network(name: str, seed: int) -> Any:
    """The task of a line, trained unless it is one before its first step; a run that is there is not trained again."""
    import mmssl
    from mmssl import recipe
    from mmssl.build import build

    task = name.partition(",")[0].removesuffix(" random")
    if name in (FIRST_RANDOM, SECOND_RANDOM):
        return build(recipe.load(f"{task}_skirmish", changes(task, seed)))[0].eval()
    if name == THIRD:
        network(FIRST, seed)
    out = HOME / f"{name} {seed}"
    return mmssl.run(f"{task}_skirmish", set=changes(name, seed), out=out, resume=True, quiet=True).objective


@functools.cache
def decoded(split: str, part: str) -> list[dict[str, Any]]:
    """Batches of a part of all clips, with the box, and numbers for the classes, of their first strike."""
    import torch

    from mmssl import recipe
    from mmssl.data.loader import read
    from mmssl.data.sources import open_source

    task, asked = PARTS[part]
    spec = recipe.load(f"{task}_skirmish", {**changes(task, 0), **asked, "data.split": split}).data
    table, learned = (open_source(spec.model_copy(update={"split": rows})) for rows in (split, "train"))
    known = {"box": torch.tensor(list(table.values("first_box")))}
    known["units"] = torch.tensor([len(one) for one in table.values("units")])
    for label in (DAMAGE, RANGE):
        names = sorted(set(learned.values(label)) - {""})
        known[label] = torch.tensor([names.index(one) if one else -1 for one in table.values(label)])
    return [
        {**batch, **{key: values[batch["id"]] for key, values in known.items()}}
        for batch in read(spec, ("audio", "video"), batch_size=40)
    ]


def measure(name: str, question: str, seed: int) -> Scores:
    """Numbers of one cell: line of the table of `mmssl.adapt` -> metric -> score."""
    import torch

    import mmssl

    torch.set_num_threads(1)
    one: dict[str, Any] = {"seed": seed, "seeds": 1, "baseline": False}
    around = [decoded(split, "around") for split in ("train", "test")]
    if name == HAND and question == SOURCE:
        return {"what moves": what_moves(around[1])}
    if question == ANSWERS:
        return answered(name, seed)
    label, _, sense = question.partition(" ")
    if name == HAND:
        return lines(mmssl.adapt(raw_input(sense), *map(pictured, around), label=label, probe="logistic", **one))
    task = network(name, seed)
    if question == SOURCE:
        found = mmssl.adapt(task, *around, label="box", probe="localization", **one)
    elif question == TWO:
        two = [{key: values[batch["units"] == 2] for key, values in batch.items()} for batch in around[1]]
        found = mmssl.adapt(task, around[0], two, label="box", probe="localization", **one)
    elif question == OFF:
        found = mmssl.adapt(task, around[0], heard_only(around[1]), label="box", probe="localization", **one)
    elif question in FROZEN:
        still = [[batch | EDITS["frozen frame"](batch) for batch in part] for part in around]
        found = mmssl.adapt(task, *still, label=label, encoder="video", probe="logistic", **one)
    elif question == TUNED:
        found = mmssl.adapt(task, *around, label=label, encoder="video", probe="finetune", **TUNING, **one)
    elif question == OFFSET:
        whole = decoded("test", "whole")
        window = {} if name.startswith(FIRST) else {"window": AROUND["data.audio.seconds"]}
        found = mmssl.adapt(task, whole, whole, probe="offset", **window, **one)
    elif question == SEPARATION:
        start = [slower(decoded(split, "start")) for split in ("train", "test")]
        found = mmssl.adapt(task, *start, probe="separation", **SEPARATOR, **one)
    else:
        found = mmssl.adapt(task, *around, label=label, encoder=sense, probe="logistic", **one)
    return lines(found)


def answered(name: str, seed: int) -> Scores:
    """The task's own question about each unseen clip, eight times: what is taken away -> share of right answers."""
    import torch

    from mmssl import recipe
    from mmssl.audit.shortcuts import accuracy_of
    from mmssl.build import build

    torch.manual_seed(0)
    task = FIRST if name == HAND else name
    batches = decoded("test", "whole" if task == FIRST else "around")
    start = recipe.load(f"{task.partition(',')[0]}_skirmish", changes(FRESH if task == THIRD else task, seed))
    untrained = build(start)[0].eval()
    metric, chance = accuracy_of(untrained, matched=len(batches[0]["id"]))
    if name == HAND:
        found = {"": by_rule(untrained, batches)}
    else:
        found = answers(network(name, seed), untrained, batches, metric, DRAWS)
    return {edit: {"right": round(right, 5)} for edit, right in {**found, "chance": chance}.items()}


def by_rule(task: Any, batches: list[dict[str, Any]]) -> float:
    """Of the pairs of `temporal_alignment`: the sound that is loud where the picture changes is the right one.

    Changes are absolute differences of a frame to the one before, of the 8 x 8 pixels where they are largest; loudness
    is that of a frame in dB; both are correlated. Of 90 such rules (means, roots and logarithms; onsets in place of
    loudness; up to two frames of delay) it is the best on the validation clips.
    """
    import torch.nn.functional as F

    from mmssl.ops.draws import Draws

    right = []
    for step, batch in enumerate(batches * DRAWS):
        inputs = task.transform(batch, Draws(0, step, len(batch["id"])))
        changes = F.avg_pool2d(inputs["video"].float().diff(dim=1).abs().mean(2), 8).flatten(2).amax(2)
        power = inputs["audio"].unflatten(2, (inputs["video"].shape[1], -1)).square().mean(3)
        loudness = 10 * (power + 1e-8).log10()[..., 1:]
        own, other = F.cosine_similarity(centered(changes)[:, None], centered(loudness), dim=2).unbind(1)
        right += ((own > other).float() + (own == other).float() / 2).tolist()
    return statistics.fmean(right)


def centered(values: Any) -> Any:
    """Without the mean of the last dimension."""
    return values - values.mean(-1, keepdim=True)


def lines(table: Any) -> Scores:
    """Of a table of `mmssl.adapt`."""
    return {
        f"{row.encoder} {row.part}".strip(): {key: round(value, 5) for key, value in row.metrics.items()}
        for row in table.rows
    }


def slower(batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """With the sound at 8 kHz, which is taken apart in half the time."""
    import torchaudio

    resample = torchaudio.functional.resample
    return [{"video": batch["video"], "audio": resample(batch["audio"], 16000, 8000)} for batch in batches]


def pictured(batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """With the middle frame as a picture."""
    return [{**batch, "image": batch["video"][:, batch["video"].shape[1] // 2]} for batch in batches]


def heard_only(batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """And every clip once more, with the sound of the next one, whose source is not in the picture."""
    import torch

    rows = sum(len(batch["id"]) for batch in batches)
    nowhere = torch.full_like(batches[0]["box"], torch.nan)
    return batches + [
        batch | {"audio": batch["audio"].roll(1, dims=0), "box": nowhere[: len(batch["id"])], "id": batch["id"] + rows}
        for batch in batches
    ]


def raw_input(sense: str) -> Any:
    """An encoder that learns nothing."""
    from mmssl.comparison.raw import RawInput

    return RawInput(sense)


def what_moves(batches: list[dict[str, Any]]) -> dict[str, float]:
    """Where a picture changes most, whoever is heard, on as many places as the networks have."""
    import torch
    import torch.nn.functional as F

    from mmssl.adaptation.heat_maps import HALF, agreement, area_under_success, draw_boxes, resized

    found = []
    for batch in batches:
        change = F.adaptive_avg_pool2d(batch["video"].float().diff(dim=1).abs().mean((1, 2))[:, None], PLACES)[:, 0]
        truth = (draw_boxes(box[None].numpy()) for box in torch.as_tensor(batch["box"]))
        found += [agreement(resized(heat), box) for heat, box in zip(change, truth, strict=True)]
    return {
        "pointing": statistics.fmean(one.hit for one in found),
        "ciou_equal_area": statistics.fmean(one.equal >= HALF for one in found),
        "auc_equal_area": area_under_success([one.equal for one in found]),
    }


def table(cells: Cells, columns: tuple[tuple[str, str, str, str], ...]) -> str:
    """Markdown: a row a task or baseline, mean and standard deviation over the seeds, in brackets over untrained."""
    heads = [title for title, *_ in columns]
    found = ["| " + " | ".join(["learned by", *heads, "seeds"]) + " |", "|---" * (len(heads) + 2) + "|"]
    for name, title in NAMES.items():
        asked = {question for _, question, *_ in columns} & set(ASKED[name])
        kept = [s for s in SEEDS[name] if asked and all(f"{name} {question} {s}" in cells for question in asked)]
        if not kept:
            continue
        values = []
        for _, question, line, metric in columns:
            digits = 2 if metric == RATIO else 1
            own = [_value(cells, (name, question, line), seed, metric) for seed in kept]
            before = SECOND_RANDOM if name == SECOND and question in ASKED[SECOND_RANDOM] else FIRST_RANDOM
            first = [_value(cells, (before, question, line), seed, metric) for seed in kept]
            gains = [a - b for a, b in zip(own, first, strict=True) if a is not None and b is not None]
            gain = f"{'+' * (statistics.fmean(gains) >= 0)}{spread(gains, digits)}" if gains else ""
            values.append("" if None in own else spread(own, digits) + f" ({gain})" * ("random" not in name))
        found.append(f"| {title} | {' | '.join(values)} | {len(kept)} |")
    for title, (seeds, where) in BASELINES.items():
        values = []
        for _, question, _, metric in columns:
            own = [_value(cells, where[question], seed, metric) for seed in seeds] if question in where else [None]
            values.append("" if None in own else spread(own, 2 if metric == RATIO else 1))
        if any(values):
            found.append(f"| {title} | {' | '.join(values)} | {len(seeds)} |")
    return "\n".join(found)


def table_of_answers(cells: Cells) -> str:
    """Markdown: a row a task, right answers about unseen clips, and what is left where something is taken away."""
    found = [f"| {' | '.join(['task', 'right answers, %', *list(EDITS)[1:], 'chance', 'seeds'])} |"]
    found.append("|---" * (len(EDITS) + 3) + "|")
    for name, title in {**NAMES, HAND: "temporal alignment, by hand: changes against loudness"}.items():
        own = [cells[key] for seed in SEEDS[name] if (key := f"{name} {ANSWERS} {seed}") in cells]
        if own:
            edits = [[100 * one[edit]["right"] for one in own if edit in one] for edit in (*EDITS, "chance")]
            values = [spread(edit) if edit else "" for edit in edits]
            found.append(f"| {title} | {' | '.join(values)} | {len(own)} |")
    return "\n".join(found)


def _value(cells: Cells, where: tuple[str, str, str], seed: int, metric: str) -> float | None:
    """In percent, or in dB; None where it was not asked."""
    name, question, line = where
    value = cells.get(f"{name} {question} {seed}", {}).get(line, {}).get(metric)
    return value if value is None or metric == RATIO else 100 * value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", help=f"tasks and seeds; tasks are {', '.join(map(repr, SEEDS))}")
    parser.add_argument("--table", action="store_true", help="only the table, into docs/results.md")
    given = parser.parse_args()
    if unknown := [word for word in given.what if word not in SEEDS and not word.isdigit()]:
        parser.error(f"there is no task '{unknown[0]}' here; there are {', '.join(SEEDS)}")
    if not given.table:
        tasks = [word for word in given.what if word in SEEDS] or list(SEEDS)
        seeds = [int(word) for word in given.what if word.isdigit()] or sorted(set().union(*SEEDS.values()))
        wanted = [(task, asked, s) for s in seeds for task in tasks if s in SEEDS[task] for asked in ASKED[task]]
        fill_cells(CELLS, wanted, measure, workers=1)
    cells = read_cells(CELLS)
    write_tables("audio_visual_answers", table_of_answers(cells))
    for name, columns in TABLES.items():
        write_tables(name, table(cells, columns))


if __name__ == "__main__":
    main()
