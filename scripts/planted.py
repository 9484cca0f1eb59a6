"""Runs whose end is known, because it was planted, and the verdicts on them: a table of docs/results.md.

    python scripts/planted.py            all of them, a few minutes of one CPU core
    python scripts/planted.py dino       those whose words hold `dino`, printed alone

Each is a recipe of the toy world with little changed: a method without what keeps it from collapsing, a learning rate
at which nothing moves, answers that have nothing to do with the questions. `tests/audit/test_planted.py` holds the
verdicts to these outcomes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from planted_tasks import (
    Alike,
    Attract,
    Constant,
    Flat,
    Forgetful,
    Forgotten,
    Knowing,
    Leaking,
    Lumped,
    PlacesTogether,
    Pulled,
    PulledTogether,
    RandomTurns,
    StrangePairs,
    Unbalanced,
    Uncentered,
    UncenteredPatches,
    Unsorted,
    Unstopped,
    becomes,
    befriending,
    of_mean_tokens,
    undropped,
    without_predictor,
)
from tables import write_tables

from mmssl import recipe
from mmssl.audit.verdict import Verdict, judge
from mmssl.build import build
from mmssl.objectives.base import Objective
from mmssl.objectives.combine import Combine
from mmssl.training.loop import fit

History = list[dict[str, Any]]


@dataclass(frozen=True)
class Planted:
    """One run.

    Attributes:
        words: what was planted.
        recipe: of the toy world.
        steps: of the run, each of which is recorded.
        outcome: that a verdict is right to find.
        changes: to the recipe.
        plant: done to the task before it is trained.
        task: of a combination, or term of a task with several verdicts, that the outcome is of.
    """

    words: str
    recipe: str
    steps: int
    outcome: str
    changes: dict[str, Any] = field(default_factory=dict)
    plant: Callable[[Objective], None] | None = None
    task: str = ""

    def run(self) -> tuple[History, list[Verdict]]:
        """The records of the run, and the verdicts on it: one where it has one task, or one is asked for."""
        short = {"training.steps": self.steps, "training.log_every": 1, "training.schedule.warmup": 0}
        loaded = recipe.load(self.recipe, short | self.changes)
        torch.manual_seed(0)
        task, loader = build(loaded)
        if self.plant:
            self.plant(task.tasks[self.task] if isinstance(task, Combine) else task)
        history = fit(task, loader, loaded.training, quiet=True)
        rows = loaded.training.batch_size
        verdicts = judge(history, task.chance(rows), rows)
        return history, [verdict for verdict in verdicts if not self.task or verdict.task == self.task]


STILL = {"training.optimizer.lr": 1e-9}
SGD = {"training.optimizer": {"name": "sgd", "lr": 0.05}, "training.batch_size": 32}
CONSTANT = {"training.schedule.name": "constant"}
TEACHER = {"objective.momentum": 0.5}
FAST = {"training.optimizer.lr": 1e-2}
MODERATE = {"training.optimizer.lr": 3e-3}
LARGER = {"training.batch_size": 32}
APART = {"encoders.text.initializer_range": 0.2}
"""At 0.02 a network of one layer says nearly the same of all texts, and dropout tells more than they do."""
HOT = {"objective.teacher_temperature": [1.0, 1.0]}
HOT_PATCHES = HOT | {"objective.patch_temperature": [1.0, 1.0]}
RUNS = [
    Planted("BYOL without predictor", "byol_toy", 30, "collapsed", TEACHER | FAST, without_predictor),
    Planted("SimSiam without stop-gradient", "simsiam_toy", 100, "collapsed", SGD | CONSTANT, becomes(Unstopped)),
    Planted("DINO without centering", "dino_toy", 20, "collapsed", TEACHER | MODERATE, becomes(Uncentered)),
    Planted(
        "DINO, the teacher's temperature above the student's",
        "dino_toy",
        60,
        "collapsed",
        TEACHER | FAST | CONSTANT | HOT,
    ),
    Planted("SimCLR without negatives", "simclr_toy", 30, "collapsed", FAST | LARGER, becomes(Attract)),
    Planted("iBOT without centering", "ibot_toy", 30, "collapsed", TEACHER | MODERATE, becomes(UncenteredPatches)),
    Planted(
        "DINOv2, the teacher's temperatures above the student's, no KoLeo",
        "ibot_dinov2_toy",
        40,
        "collapsed",
        TEACHER | FAST | CONSTANT | HOT_PATCHES | {"objective.koleo": 0.0},
    ),
    Planted(
        "DINOv2 with both",
        "ibot_dinov2_toy",
        100,
        "learned",
        {"training.optimizer.lr": 1e-3, "training.batch_size": 64},
    ),
    Planted(
        "VICReg without variance and covariance",
        "vicreg_toy",
        40,
        "collapsed",
        FAST | CONSTANT | {"objective.variance": 0.0, "objective.covariance": 0.0},
    ),
    Planted("LeJEPA without SIGReg", "lejepa_toy", 40, "collapsed", FAST | CONSTANT | {"objective.sigreg": 0.0}),
    Planted(
        "LeJEPA with it",
        "lejepa_toy",
        100,
        "learned",
        FAST | CONSTANT | {"training.batch_size": 32, "objective.sigreg": 0.1},
    ),
    Planted(
        "NNCLR without negatives and predictor", "nnclr_toy", 100, "collapsed", FAST | LARGER | CONSTANT, befriending
    ),
    Planted("NNCLR, one neighbor for all", "nnclr_toy", 60, "at chance", FAST | LARGER, becomes(Alike)),
    Planted("NNCLR as published", "nnclr_toy", 100, "learned", LARGER),
    Planted("SwAV without Sinkhorn", "swav_toy", 100, "collapsed", FAST | LARGER | CONSTANT, becomes(Unbalanced)),
    Planted(
        "SwAV, assignments that are all alike",
        "swav_toy",
        100,
        "collapsed",
        FAST | LARGER | CONSTANT | {"objective.epsilon": 10.0},
    ),
    Planted("SwAV as published", "swav_toy", 100, "learned", LARGER),
    Planted(
        "data2vec without EMA", "data2vec_text_toy", 40, "collapsed", FAST | CONSTANT | {"objective.momentum": [0, 0]}
    ),
    Planted("data2vec with it", "data2vec_text_toy", 60, "learned", MODERATE | CONSTANT),
    Planted(
        "CAPI without Sinkhorn",
        "capi_toy",
        60,
        "collapsed",
        LARGER | CONSTANT | {"training.optimizer.lr": 3e-2} | TEACHER,
        becomes(Unsorted),
    ),
    Planted(
        "CAPI, assignments that are all alike",
        "capi_toy",
        60,
        "at chance",
        FAST | LARGER | CONSTANT | {"objective.teacher_temperature": 10.0},
    ),
    Planted("CAPI as published", "capi_toy", 100, "learned", LARGER),
    Planted(
        "JEPA without EMA and predictor",
        "jepa_toy",
        60,
        "collapsed",
        FAST | LARGER | CONSTANT | {"objective.momentum": 0.0},
        of_mean_tokens,
    ),
    Planted(
        "JEPA without EMA and stop-gradient", "jepa_toy", 60, "collapsed", FAST | LARGER | CONSTANT, becomes(Leaking)
    ),
    Planted("JEPA as published", "jepa_toy", 60, "learned", FAST | LARGER | CONSTANT),
    Planted("SimCSE without dropout", "simcse_toy", 30, "unmoved", MODERATE | LARGER | CONSTANT | APART, undropped),
    Planted(
        "SimCSE, a temperature of 0.001",
        "simcse_toy",
        60,
        "collapsed",
        FAST | LARGER | CONSTANT | APART | {"objective.temperature": 0.001},
    ),
    Planted("SimCSE as published", "simcse_toy", 60, "learned", MODERATE | LARGER | CONSTANT | APART),
    Planted("DeepCluster, one cluster for all", "deepcluster_toy", 40, "collapsed", FAST | LARGER, becomes(Lumped)),
    Planted("DeepCluster as published", "deepcluster_toy", 200, "learned", LARGER | MODERATE),
    Planted("MoCo without negatives", "moco_toy", 60, "collapsed", FAST | LARGER, becomes(Pulled)),
    Planted("DenseCL without negatives", "densecl_toy", 60, "collapsed", FAST | LARGER, becomes(PulledTogether)),
    Planted("DenseCL, no negatives of places", "densecl_toy", 60, "collapsed", FAST | LARGER, becomes(PlacesTogether)),
    Planted(
        "instance discrimination, one vector for all rows",
        "instance_discrimination_toy",
        60,
        "at chance",
        FAST | LARGER,
        becomes(Forgotten),
    ),
    Planted("instance discrimination as published", "instance_discrimination_toy", 100, "learned", LARGER),
    Planted("SimSiam as published", "simsiam_toy", 100, "learned", SGD),
    Planted(
        "cross-encoder distillation, flat scores of the teacher",
        "cross_encoder_distillation_toy",
        30,
        "at chance",
        MODERATE | LARGER | CONSTANT,
        becomes(Flat),
        "distillation",
    ),
    Planted(
        "cross-encoder distillation, a student that is constant",
        "cross_encoder_distillation_toy",
        30,
        "at chance",
        MODERATE | LARGER | CONSTANT,
        becomes(Constant),
        "distillation",
    ),
    Planted(
        "cross-encoder distillation, a teacher that knows",
        "cross_encoder_distillation_toy",
        100,
        "learned",
        MODERATE | LARGER | CONSTANT,
        becomes(Knowing),
        "distillation",
    ),
    Planted("rotation, learned early", "rotation_toy", 30, "learned", MODERATE),
    Planted(
        "rotation, learned late: a warmup of nine tenths",
        "rotation_toy",
        60,
        "learned",
        MODERATE | CONSTANT | {"training.schedule.warmup": 54},
    ),
    Planted("rotation, forgotten halfway", "rotation_toy", 80, "at chance", MODERATE, becomes(Forgetful)),
    Planted("rotation, targets by lot", "rotation_toy", 40, "at chance", MODERATE, becomes(RandomTurns)),
    Planted("rotation, nothing moves", "rotation_toy", 20, "at chance", STILL),
    Planted("rotation, 4 answers", "rotation_toy", 2, "too few answers to tell", STILL | {"training.batch_size": 2}),
    Planted("rotation, 64 answers", "rotation_toy", 4, "too few answers to tell", STILL),
    Planted("pairs that do not belong together", "contrastive_toy", 40, "at chance", {}, becomes(StrangePairs)),
    Planted("pairs that do", "contrastive_toy", 40, "learned"),
    Planted("SimCLR, nothing moves", "simclr_toy", 20, "unmoved", STILL),
    Planted("MoCo, nothing moves", "moco_toy", 60, "unmoved", STILL | LARGER),
    Planted("BYOL, nothing moves", "byol_toy", 20, "too few answers to tell", STILL),
    Planted("masked autoencoder, nothing moves", "masked_autoencoder_toy", 20, "at chance", STILL),
    Planted("masked language", "masked_language_toy", 60, "learned", FAST),
]


def line(planted: Planted) -> str:
    """A line of the table."""
    history, verdicts = planted.run()
    first, last = history[0], history[-1]
    own = [key.removesuffix("/rank") for key in last if key.startswith("monitor/") and key.endswith("/rank")]
    name = next((name for name in own if name.endswith("embeddings")), own[0])
    moved = [
        f"{first[key]:.3g} → {last[key]:.3g}" if key in first and key in last else ""
        for key in ("loss", f"{name}/rank", "spread" if "spread" in first else f"{name}/spread")
    ]
    found = "; ".join(
        v.outcome + ("" if v.since is None else f" since step {v.since}") + (f" ({v.task})" if v.task else "")
        for v in verdicts
    )
    right = "" if all(v.outcome == planted.outcome for v in verdicts) else f" (planted: {planted.outcome})"
    return f"| {planted.words} | {planted.steps} | {' | '.join(moved)} | {found}{right} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="?", default="", help="only the runs whose words hold these")
    wanted = parser.parse_args().words
    chosen = [one for one in RUNS if wanted.lower() in one.words.lower()]
    lines = ["| planted | steps | loss | effective rank | spread | verdict |", "|---|---|---|---|---|---|"]
    for one in chosen:
        lines.append(line(one))
        print(lines[-1], flush=True)
    if not wanted:
        write_tables("planted", "\n".join(lines))


if __name__ == "__main__":
    main()
