"""Tasks without what keeps them from collapsing, or whose answers have nothing to do with the questions."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmssl.batch import Batch
from mmssl.encoders.base import Features
from mmssl.objectives.base import Objective
from mmssl.objectives.correspondence.contrastive import Contrastive
from mmssl.objectives.correspondence.cross_encoder_distillation import CrossEncoderDistillation
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
from mmssl.objectives.reconstruction.jepa import JEPA
from mmssl.objectives.transformation.rotation import Rotation
from mmssl.ops.draws import Draws


class Flowing(Tensor):
    """Outputs whose gradient nothing stops."""

    def detach(self) -> Tensor:
        return self


class Unstopped(SimSiam):
    """SimSiam without stop-gradient."""

    def loss(self, outputs: Batch, inputs: Batch) -> dict[str, Tensor]:
        losses = super().loss({**outputs, "z": outputs["z"].as_subclass(Flowing)}, inputs)
        return {key: value.as_subclass(Tensor) for key, value in losses.items()}


class Leaking(JEPA):
    """JEPA without a teacher, whose targets are the encoder's own, and without stop-gradient."""

    def targets(self, inputs: Batch) -> Tensor:
        return self.told(self.encoder(self.name), inputs).as_subclass(Flowing)

    def drawn_together(self, inputs: Batch) -> dict[str, Tensor]:
        return {key: value.as_subclass(Tensor) for key, value in super().drawn_together(inputs).items()}

    def loss(self, outputs: Batch, inputs: Batch) -> dict[str, Tensor]:
        return {key: value.as_subclass(Tensor) for key, value in super().loss(outputs, inputs).items()}


class MeanToken(nn.Module):
    """In place of a predictor: the mean of what was read, wherever it is asked."""

    def forward(self, features: Features, seen: Tensor, hidden: Tensor, grid: tuple[int, ...]) -> Tensor:
        return features.tokens.mean(1, keepdim=True).expand(-1, hidden.shape[1], -1)


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


class Flat(CrossEncoderDistillation):
    """Cross-encoder distillation whose teacher says the same of all candidates."""

    def _scores(self, outputs: Batch, items: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        taught, said, there = super()._scores(outputs, items)
        return torch.zeros_like(taught), said, there


class Knowing(CrossEncoderDistillation):
    """Cross-encoder distillation whose teacher knows a row's own partner."""

    def _scores(self, outputs: Batch, items: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        taught, said, there = super()._scores(outputs, items)
        return F.one_hot(taught.new_zeros(len(taught), dtype=torch.long), taught.shape[1]) * 3.0, said, there


class Constant(CrossEncoderDistillation):
    """Cross-encoder distillation whose student has one vector for everything."""

    def embed(self, key: str, features: Features) -> Tensor:
        z = super().embed(key, features)
        return z * 0 + z.shape[1] ** -0.5


def becomes(kind: type[Objective]) -> Callable[[Objective], None]:
    return lambda task: setattr(task, "__class__", kind)


def without_predictor(task: Objective) -> None:
    task.prediction = nn.Identity()


def befriending(task: Objective) -> None:
    becomes(Befriend)(task)
    without_predictor(task)


def of_mean_tokens(task: Objective) -> None:
    task.predictor = MeanToken()


def undropped(task: Objective) -> None:
    for module in task.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
