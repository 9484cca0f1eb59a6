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
from tables import write_tables
from torch import Tensor, nn

from mmssl import recipe
from mmssl.audit.verdict import Verdict, judge
from mmssl.batch import Batch
from mmssl.build import build
from mmssl.objectives.base import Objective
from mmssl.objectives.correspondence.contrastive import Contrastive
from mmssl.objectives.invariance.deepcluster import DeepCluster
from mmssl.objectives.invariance.densecl import DenseCL
from mmssl.objectives.invariance.dino import DINO
from mmssl.objectives.invariance.ibot import IBOT
from mmssl.objectives.invariance.instance_discrimination import InstanceDiscrimination
from mmssl.objectives.invariance.moco import MoCo
from mmssl.objectives.invariance.nnclr import NNCLR
from mmssl.objectives.invariance.simclr import SimCLR
from mmssl.objectives.invariance.simsiam import SimSiam
from mmssl.objectives.invariance.swav import SwAV
from mmssl.objectives.reconstruction.capi import CAPI
from mmssl.objectives.transformation.rotation import Rotation
from mmssl.ops.draws import Draws
from mmssl.training.loop import fit

History = list[dict[str, Any]]


class Flowing(Tensor):
    """Outputs whose gradient nothing stops."""

    def detach(self) -> Tensor:
        return self


class Unstopped(SimSiam):
    """SimSiam without stop-gradient."""

    def loss(self, outputs: Batch, inputs: Batch) -> dict[str, Tensor]:
        losses = super().loss({**outputs, "z": outputs["z"].as_subclass(Flowing)}, inputs)
        return {key: value.as_subclass(Tensor) for key, value in losses.items()}


class Uncentered(DINO):
    """DINO without centering."""

    def after_step(self, progress: float) -> None:
        super().after_step(progress)
        self.center.zero_()


class UncenteredPatches(IBOT):
    """iBOT without centering, of crops or of patches."""

    def after_step(self, progress: float) -> None:
        super().after_step(progress)
        self.center.zero_()
        self.patch_center.zero_()


class Attract(SimCLR):
    """SimCLR without negatives: all pictures become one point."""

    def loss(self, outputs: Batch, inputs: Batch) -> dict[str, Tensor]:
        first, second = outputs["z"].unbind(1)
        return super().loss(outputs, inputs) | {"loss": -(first * second).sum(1).mean()}


class Befriend(NNCLR):
    """NNCLR without negatives."""

    def loss(self, outputs: Batch, inputs: Batch) -> dict[str, Tensor]:
        z, p = outputs["z"], outputs["p"].flip(1)
        found = torch.stack([self.queue.rows[self.neighbors(view)] for view in z.detach().unbind(1)], dim=1)
        return super().loss(outputs, inputs) | {"loss": -(found * p).sum(2).mean()}


class Alike(NNCLR):
    """NNCLR whose queue holds one vector many times, which is everybody's neighbor."""

    def after_step(self, progress: float) -> None:
        super().after_step(progress)
        self.queue.rows.copy_(self.queue.rows[:1].clone().expand_as(self.queue.rows))


class Pulled(MoCo):
    """MoCo without negatives."""

    def loss(self, outputs: Batch, inputs: Batch) -> dict[str, Tensor]:
        pull = -(outputs["q"] * outputs["k"].detach()).sum(2).mean()
        return super().loss(outputs, inputs) | {"loss": pull}


class PulledTogether(DenseCL):
    """DenseCL without negatives: images and places become one point."""

    def loss(self, outputs: Batch, inputs: Batch) -> dict[str, Tensor]:
        return super().loss(outputs, inputs) | {
            "loss": self.distance(outputs) - (outputs["q"] * outputs["k"]).sum(2).mean()
        }

    def distance(self, outputs: Batch) -> Tensor:
        return -(outputs["dense_q"] * outputs["dense_k"]).sum(2).mean()


class PlacesTogether(PulledTogether):
    """DenseCL in which places alone have no negatives."""

    def loss(self, outputs: Batch, inputs: Batch) -> dict[str, Tensor]:
        losses = DenseCL.loss(self, outputs, inputs)
        of_images = losses["loss"] - self.dense * losses["loss_dense"]
        return losses | {"loss": of_images + 10 * self.distance(outputs)}


class Lumped(DeepCluster):
    """DeepCluster whose copy says the same of all rows, so that one cluster has them all."""

    def _copied(self, inputs: Batch) -> Tensor:
        return torch.ones_like(super()._copied(inputs)) / self.codebook.centers.shape[1] ** 0.5


class Forgotten(InstanceDiscrimination):
    """Instance discrimination whose bank holds one vector for all rows."""

    def after_step(self, progress: float) -> None:
        super().after_step(progress)
        self.bank.copy_(self.bank[:1].clone().expand_as(self.bank))


class Unbalanced(SwAV):
    """SwAV without Sinkhorn: prototypes take what is nearest to them."""

    def balanced(self, scores: Tensor, counted: Tensor) -> Tensor:
        return (scores / self.epsilon).softmax(-1)


class Unsorted(CAPI):
    """CAPI without Sinkhorn: clusters take what is nearest to them."""

    def assigned(self, logits: Tensor) -> Tensor:
        return (logits / self.teacher_temperature).softmax(-1)


class RandomTurns(Rotation):
    """Rotation whose targets are drawn by lot."""

    def transform(self, batch: Batch, draws: Draws) -> Batch:
        inputs = super().transform(batch, draws)
        turn = inputs["turn"]
        return inputs | {"turn": (draws.uniform(turn.shape[1]) * 4).long().to(turn.device)}


class Forgetful(Rotation):
    """Rotation whose head is emptied after each step of the second half of the run."""

    def after_step(self, progress: float) -> None:
        if progress >= 0.5:
            for parameter in self.head.parameters():
                parameter.data.zero_()


class StrangePairs(Contrastive):
    """Contrastive pairs whose texts are shuffled anew in every step."""

    def transform(self, batch: Batch, draws: Draws) -> Batch:
        inputs = super().transform(batch, draws)
        order = draws.uniform().argsort()
        return inputs | {key: value[order] for key, value in inputs.items() if key in ("b", "b_valid")}


def becomes(kind: type[Objective]) -> Callable[[Objective], None]:
    return lambda task: setattr(task, "__class__", kind)


def without_predictor(task: Objective) -> None:
    task.prediction = nn.Identity()


def befriending(task: Objective) -> None:
    becomes(Befriend)(task)
    without_predictor(task)


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
    """

    words: str
    recipe: str
    steps: int
    outcome: str
    changes: dict[str, Any] = field(default_factory=dict)
    plant: Callable[[Objective], None] | None = None

    def run(self) -> tuple[History, list[Verdict]]:
        """The records of the run, and a verdict a task."""
        short = {"training.steps": self.steps, "training.log_every": 1, "training.schedule.warmup": 0}
        loaded = recipe.load(self.recipe, short | self.changes)
        torch.manual_seed(0)
        task, loader = build(loaded)
        if self.plant:
            self.plant(task)
        history = fit(task, loader, loaded.training, quiet=True)
        rows = loaded.training.batch_size
        return history, judge(history, task.chance(rows), rows)


STILL = {"training.optimizer.lr": 1e-9}
SGD = {"training.optimizer": {"name": "sgd", "lr": 0.05}, "training.batch_size": 32}
CONSTANT = {"training.schedule.name": "constant"}
TEACHER = {"objective.momentum": 0.5}
FAST = {"training.optimizer.lr": 1e-2}
MODERATE = {"training.optimizer.lr": 3e-3}
LARGER = {"training.batch_size": 32}
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
