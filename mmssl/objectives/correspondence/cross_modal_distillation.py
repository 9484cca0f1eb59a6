"""Cross-modal distillation: what would a classifier of pictures say of the picture that goes with this sound?

Aytar, Vondrick & Torralba 2016, "SoundNet: Learning Sound Representations from Unlabeled Video", arXiv 1610.09001: the
class probabilities that visual networks give to a clip are what a network of its sound learns, by the Kullback-Leibler
divergence, one head a teacher. Teachers are classifiers that somebody trained, of ImageNet and of Places in the paper,
or one of your own; they are frozen. Of a clip the probabilities of all its frames are averaged.

Known traps. A teacher's average answer is far from uniform, and a student that has learned no more than that looks
good: `relative_error` (chance 1) is the divergence over that of the average, which is counted before the first step. A
teacher that is unsure of everything teaches nothing, whatever the loss.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from mmssl.batch import Batch
from mmssl.encoders.base import Encoder
from mmssl.errors import RecipeError
from mmssl.modules.classifier import PictureClassifier
from mmssl.modules.side import Side
from mmssl.modules.views import Crop
from mmssl.objectives.base import Chance, Objective, Panel, Step
from mmssl.ops.color import as_floats
from mmssl.ops.draws import Draws
from mmssl.ops.gather import average, process_share
from mmssl.ops.losses import divergence
from mmssl.ranges import Positive

VIEWS: dict[str, Any] = {}


class CrossModalDistillation(Objective):
    """Predict the class probabilities of visual teachers from the other modality.

    Args:
        encoders: holds the student.
        teachers: name -> `{model: timm/NAME, pretrained: true}`, or `{folder: PATH}` that `mmssl adapt --probe finetune
            --save PATH` wrote.
        student: name of the encoder that learns.
        source: what teachers see, the row's `video` or its `image`.
        counted: rows over which a teacher's average answer is taken.
        views: of what the teachers see: how it is cropped, see `Crop`.
    """

    def __init__(
        self,
        encoders: Mapping[str, Encoder],
        *,
        teachers: dict[str, dict[str, Any]],
        student: str = "audio",
        source: Literal["video", "image"] = "video",
        counted: Positive = 1024,
        views: dict[str, Any] = VIEWS,
    ) -> None:
        super().__init__(encoders)
        if not teachers or not all(name.isidentifier() for name in teachers):
            raise RecipeError(
                "cross_modal_distillation: teachers should hold a name and a classifier, or several, for instance "
                "{imagenet: {model: timm/resnet50, pretrained: true}}"
            )
        self.side = Side("a", student, self.encoder(student), Crop())
        if self.side.modality == source:
            raise RecipeError(f"cross_modal_distillation: the student '{student}' reads {source} as its teachers do")
        self.needs = (source, self.side.modality)
        self.source, self.counted, self.crop = source, counted, Crop.of(VIEWS, views)
        built: dict[str, PictureClassifier] = {}
        for name, given in teachers.items():
            try:
                built[name] = PictureClassifier(given)
            except RecipeError as error:
                raise RecipeError(f"cross_modal_distillation: teachers.{name}: {error}") from error
        self.teachers = nn.ModuleDict(built)
        self.heads = nn.ModuleDict({n: nn.Linear(self.side.encoder.dim, net.classes) for n, net in built.items()})
        for name, net in built.items():
            self.register_buffer(f"prior_{name}", torch.full((net.classes,), 1 / net.classes))
        self.divisors = tuple(f"{name}/prior_error" for name in built)

    def chance(self, rows: int) -> Chance:
        """The teacher's average answer."""
        return Chance(None, {f"{name}/relative_error": 1.0 for name in self.heads})

    @torch.no_grad()
    def before_step(self, step: Step) -> None:
        """Before the first, fetch the teachers' weights and count their average answers.

        Raises:
            RecipeError: where each process holds a part of every weight.
        """
        if step.number:
            return
        if step.sharded:
            raise RecipeError(
                "cross_modal_distillation asks whole teachers, and these are sharded; set training.sharded=false"
            )
        for net in self.teachers.values():
            cast(PictureClassifier, net).load()
        sums = {name: torch.zeros_like(self.get_buffer(f"prior_{name}")) for name in self.heads}
        rows, (share, shares) = 0, process_share()
        for number, batch in enumerate(step.data()):
            seen = batch[self.source]
            draws = Draws(0, number, len(seen), share=share, shares=shares, device=seen.device, stream="prior")
            for name, answers in self.ask(batch, draws).items():
                sums[name] += answers.sum(0)
            rows += len(seen)
            if rows * shares >= self.counted:
                break
        for name, total in sums.items():
            self.get_buffer(f"prior_{name}").copy_(average(total / rows))

    def ask(self, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        """Probabilities (B, K) of each teacher, over the frames of a clip on average."""
        seen = self.crop(batch[self.source], draws, batch.get(f"{self.source}_aspect"))
        frames = seen[:, None] if self.source == "image" else seen
        answers = {name: net(frames.flatten(0, 1)) for name, net in self.teachers.items()}
        return {name: found.unflatten(0, frames.shape[:2]).mean(1) for name, found in answers.items()}

    @torch.no_grad()
    def transform(self, batch: Batch, draws: Draws) -> Batch:
        """`a`, what the student reads, `seen`, the picture or clip, and of each teacher `NAME/posterior` (B, K)."""
        inputs = self.side.read(batch, draws) | {"seen": batch[self.source]}
        for name, posterior in self.ask(batch, draws).items():
            inputs[f"{name}/posterior"] = posterior
            inputs[f"{name}/prior_error"] = divergence(posterior, self.get_buffer(f"prior_{name}").log()).sum()
        return inputs

    def predict(self, inputs: Batch) -> Batch:
        """Logits (B, K) for each teacher."""
        pooled = self.side.features(inputs).pooled
        return {name: head(pooled) for name, head in self.heads.items()}

    def loss(self, outputs: Batch, inputs: Batch) -> dict[str, Tensor]:
        """The sum of the divergences, and each one's ratio to that of the teacher's average answer."""
        losses: list[Tensor] = []
        logs: dict[str, Tensor] = {}
        for name, logits in outputs.items():
            error, prior = divergence(inputs[f"{name}/posterior"], logits.log_softmax(1)), inputs[f"{name}/prior_error"]
            losses.append(error.mean())
            logs[f"{name}/relative_error"] = error.detach().sum() / torch.where(prior > 0, prior, 1)
        return {"loss": torch.stack(losses).sum(), **logs}

    def preview(self, inputs: Batch, outputs: Batch) -> list[Panel]:
        """What the teachers see, what the student hears, and the likeliest class of both, by its number."""
        panels = [
            Panel(self.source, list(as_floats(inputs["seen"]))),
            Panel(self.side.name, self.side.cells(inputs), scale=self.side.scale(inputs)),
        ]
        for name, logits in outputs.items():
            posterior = inputs[f"{name}/posterior"]
            (sure, best), (chance, said) = posterior.max(1), logits.softmax(1).max(1)
            taught = [f"class {int(i)}: {float(p):.0%}" for i, p in zip(best, sure, strict=True)]
            found = [f"class {int(i)}: {float(p):.0%}" for i, p in zip(said, chance, strict=True)]
            panels += [Panel(f"{name} says", taught), Panel("prediction", found, (best == said).tolist())]
        return panels
