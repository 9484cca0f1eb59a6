"""iBOT: to which prototypes does a slowly moving teacher assign the whole, and the patches that the student cannot see?

Zhou, Wei, Wang, Shen, Xie, Yuille & Kong 2021, "iBOT: Image BERT Pre-Training with Online Tokenizer", arXiv 2111.07832.
DINO, see there, whose student sees one of the two large crops of a picture with blocks of patches hidden: the teacher,
which sees them, says of each to which of K prototypes it belongs, and the student tells. Oquab et al. 2023, "DINOv2",
arXiv 2304.07193, is the same with settings of its own: `shared_head: false`, `centering: sinkhorn` (all prototypes are
given as much, over the batch, as in SwAV, with three iterations) and `koleo: 0.1` (large crops of different pictures
are kept apart from their nearest one: Sablayrolles et al. 2018, arXiv 1806.03198, equation 3).

In the published code each large crop is drawn to have hidden patches or none, with the same probability; here it is one
of each row's two, by lot, a tenth to a half of its patches: half of the crops in each batch, as DINOv2's code counts
them. As there, the center of the patches is that of the hidden ones. The nearest other picture is looked for among all
processes, not among those of one.

Known traps. The loss of the patches is a mean over those of a crop, then over *all* large crops: those without hidden
patches count as 0. The teacher sees whole crops. Both temperatures warm up in the first part of the run; that of the
patches ends above that of the crops in the published code (0.07 and 0.04), and in its best settings both end at 0.07.
Everything of DINO holds, too: a loss that stays at its level is collapse to the uniform answer, one near 0 with
`spread` near 0 to one prototype.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from mmssl.batch import Batch
from mmssl.encoders.base import Encoder, Features
from mmssl.errors import RecipeError
from mmssl.modules.pictures import check_patches, cut
from mmssl.modules.prototypes import PrototypeHead
from mmssl.modules.views import Given, encode_views
from mmssl.objectives._concealed import Concealed
from mmssl.objectives.base import Chance, Panel
from mmssl.objectives.invariance.dino import COLOR, DINO
from mmssl.ops.clustering import balanced_assignment
from mmssl.ops.draws import Draws
from mmssl.ops.gather import total
from mmssl.ops.losses import koleo as koleo_loss
from mmssl.ops.masking import SMALLEST_BLOCK, mask_blocks, take
from mmssl.ops.patches import unpatchify
from mmssl.ops.words import as_places
from mmssl.ranges import Count, Ratio, Share, Temperature, Weight, Width

GLOBAL_VIEWS = (
    COLOR | {"area": (0.25, 1.0), "blur": 1.0},
    COLOR | {"area": (0.25, 1.0), "blur": 0.1, "solarize": 0.2},
)
LOCAL_VIEWS = (COLOR | {"area": (0.05, 0.25), "size": 96 / 224, "blur": 0.5},)


class IBOT(DINO):
    """DINO, and the same of the patches that the student cannot see.

    Args:
        encoders: holds the encoder, of images, a transformer whose tokens are patches.
        encoder: its name.
        prototypes: K.
        hidden: width of the head's two hidden layers.
        bottleneck: width of the unit vectors that are compared with the prototypes.
        shared_head: whether one head reads crops and patches.
        local_crops: small crops of each row.
        mask_ratio: smallest and largest share of the patches of one of the large crops that are hidden.
        student_temperature: divides the student's logits.
        teacher_temperature: divides the teacher's of crops, at the first step and after `temperature_warmup`.
        patch_temperature: the same of patches.
        temperature_warmup: share of the run in which both move; 30 epochs of 800 as published.
        centering: what keeps prototypes from taking all: `center`, a moving mean that is subtracted, or `sinkhorn`.
        center_momentum: share of itself that a center keeps in a step.
        momentum: share of itself that the teacher keeps at the first step; rises to 1 along a cosine.
        freeze_last: share of the run in which prototypes do not learn; one epoch of 800 as published.
        patches: weight of the loss of the patches.
        koleo: weight of the distance from the nearest other picture; 0.1 in DINOv2.
        views: what differs from the published large crops: settings of `ImageView`, for both or one each.
        local_views: the same for the small crops.
    """

    large = GLOBAL_VIEWS
    small = LOCAL_VIEWS
    patch_center: Tensor
    patches_seen: Tensor
    patches_count: Tensor

    def __init__(
        self,
        encoders: Mapping[str, Encoder],
        *,
        encoder: str = "image",
        prototypes: Width = 8192,
        hidden: Width = 2048,
        bottleneck: Width = 256,
        shared_head: bool = True,
        local_crops: Count = 10,
        mask_ratio: tuple[Ratio, Ratio] = (0.1, 0.5),
        student_temperature: Temperature = 0.1,
        teacher_temperature: tuple[Temperature, Temperature] = (0.04, 0.07),
        patch_temperature: tuple[Temperature, Temperature] = (0.04, 0.07),
        temperature_warmup: Share = 30 / 800,
        centering: Literal["center", "sinkhorn"] = "center",
        center_momentum: Share = 0.9,
        momentum: Share = 0.996,
        freeze_last: Share = 1 / 800,
        patches: Weight = 1.0,
        koleo: Weight = 0.0,
        views: Given = None,
        local_views: Given = None,
    ) -> None:
        super().__init__(
            encoders,
            encoder=encoder,
            prototypes=prototypes,
            hidden=hidden,
            bottleneck=bottleneck,
            local_crops=local_crops,
            student_temperature=student_temperature,
            teacher_temperature=teacher_temperature,
            temperature_warmup=temperature_warmup,
            center_momentum=center_momentum,
            momentum=momentum,
            freeze_last=freeze_last,
            views=views,
            local_views=local_views,
        )
        network = self.encoder(encoder, "image")
        self.patch = check_patches("ibot", network)
        if mask_ratio[0] > mask_ratio[1]:
            raise RecipeError(f"ibot: mask_ratio = {list(mask_ratio)} should be the smaller share, then the larger one")
        self.mask_ratio, self.patch_temperature, self.centering = mask_ratio, patch_temperature, centering
        self.patch_weight, self.koleo_weight = patches, koleo
        if koleo or centering == "sinkhorn":
            self.meets = "loss"
        self.mask_token = nn.Parameter(torch.zeros(network.width or network.dim))
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        self.patch_head: PrototypeHead | None = None
        if not shared_head:
            self.patch_head = PrototypeHead(network.dim, hidden, bottleneck, prototypes, False)
            self.begin_teaching()
        self.register_buffer("patch_center", torch.zeros(prototypes))
        # The teacher's logits of patches in this step's micro-batches, until their center moves.
        self.register_buffer("patches_seen", torch.zeros(prototypes), persistent=False)
        self.register_buffer("patches_count", torch.zeros(()), persistent=False)

    def _student(self) -> dict[str, nn.Module]:
        own = getattr(self, "patch_head", None)
        return super()._student() | ({} if own is None else {"patch_head": own})

    def chance(self, rows: int) -> Chance:
        """Any of K prototypes, of crops and of the patches of every second one; with `koleo` the data tell."""
        level = math.log(self.prototypes) * (1 + self.patch_weight / 2)
        return Chance(None if self.koleo_weight else level, {"ranking": 0.5})

    @torch.no_grad()
    def transform(self, batch: Batch, draws: Draws) -> Batch:
        """The crops, and which patches the student does not see.

        `views` (B, 2, 3, h, h) and `local` (B, L, 3, l, l); `which` int64 (B,) of the large ones has patches that are
        `hidden` (B, N), of which `places` (B, M), as far as they are `chosen`.
        """
        inputs = super().transform(batch, draws)
        grid = cut("ibot", inputs["views"].shape[-2:], self.patch)
        number = math.prod(grid)
        low, high = self.mask_ratio
        totals = (number * draws.uniform(low=low, high=high)).round().long().clamp(min=1)
        smallest = max(1, round(SMALLEST_BLOCK * number))
        hidden = mask_blocks((grid[0], grid[1]), totals, draws, smallest=smallest)
        # Where no block fits, one patch: there is something to tell in every row.
        single = draws.uniform(number)
        hidden |= ~hidden.any(1, keepdim=True) & (single == single.amax(1, keepdim=True))
        places, chosen = as_places(hidden, max(1, round(number * high)))
        return inputs | {"which": draws.integers(2), "hidden": hidden, "places": places, "chosen": chosen}

    def predict(self, inputs: Batch) -> Batch:
        """As DINO's, of a student that does not see all, and logits (B, M, K) of what is hidden from it.

        These are `told` by the student and `taught` by the teacher; `pooled` (B, 2, D) the student's large crops.
        """
        encoder, views = self.encoder(self.name), inputs["views"]
        both = torch.stack([inputs["hidden"] & (inputs["which"] == i)[:, None] for i in range(2)], dim=1)
        seen = encoder.encode(encoder.embed(views.flatten(0, 1), both.flatten(0, 1), self.mask_token))
        pooled = large = seen.pooled.unflatten(0, (-1, 2))
        if "local" in inputs:
            pooled = torch.cat([large, encode_views(encoder, inputs["local"])], dim=1)
        frozen = self.progress < self.freeze_last
        z, student = self.head(pooled, frozen)
        _, told = (self.patch_head or self.head)(self._hidden(seen, inputs), frozen)
        with torch.no_grad():
            whole = self._taught(views.flatten(0, 1))
            _, teacher = self.teacher["head"](whole.pooled.unflatten(0, (-1, 2)))
            head = self.teacher["head" if self.patch_head is None else "patch_head"]
            _, taught = head(self._hidden(whole, inputs))
        return {
            "student": student,
            "teacher": teacher,
            "z": z[:, :2],
            "pooled": large,
            "told": told,
            "taught": taught,
        }

    def _hidden(self, features: Features, inputs: Batch) -> Tensor:
        """Tokens of both large crops -> those of hidden patches, (B, M, D)."""
        tokens = features.tokens.unflatten(0, (-1, 2))
        return take(tokens[torch.arange(len(tokens), device=tokens.device), inputs["which"]], inputs["places"])

    def _assigned(self, teacher: Tensor) -> Tensor:
        if self.centering == "center":
            return super()._assigned(teacher)
        scores = (teacher / self._warmed(self.teacher_temperature)).flatten(0, 1)
        return balanced_assignment(scores).unflatten(0, teacher.shape[:2])

    def _assigned_patches(self, taught: Tensor, chosen: Tensor) -> Tensor:
        temperature = self._warmed(self.patch_temperature)
        if self.centering == "center":
            return ((taught - self.patch_center) / temperature).log_softmax(-1)
        return balanced_assignment((taught / temperature).flatten(0, 1), chosen.flatten()).view_as(taught)

    def loss(self, outputs: Batch, inputs: Batch) -> dict[str, Tensor]:
        """DINO's, as `crop_loss`, that of the patches, and KoLeo's, of both large crops, each without its weight."""
        losses = super().loss(outputs, inputs)
        taught, chosen = outputs["taught"].detach(), inputs["chosen"]
        if self.training:
            self.patches_seen += (taught * chosen[:, :, None]).sum((0, 1))
            self.patches_count += chosen.sum()
        wanted = self._assigned_patches(taught, chosen)
        answered = (outputs["told"] / self.student_temperature).log_softmax(-1)
        terms = -(wanted.exp() * answered).sum(-1) * chosen
        patch_loss = (terms.sum(1) / chosen.sum(1).clamp(min=1)).mean() / 2  # half of the crops have none
        crop_loss = losses["loss"]
        losses |= {"loss": crop_loss + self.patch_weight * patch_loss, "crop_loss": crop_loss, "patch_loss": patch_loss}
        if self.koleo_weight:
            apart = koleo_loss(outputs["pooled"][:, 0]) + koleo_loss(outputs["pooled"][:, 1])
            losses |= {"loss": losses["loss"] + self.koleo_weight * apart, "koleo": apart}
        return losses

    def after_step(self, progress: float) -> None:
        """As DINO's; the center of the patches moves as well."""
        super().after_step(progress)
        count = total(self.patches_count)
        mean = total(self.patches_seen) / count.clamp(min=1)
        self.patch_center.lerp_(torch.where(count > 0, mean, self.patch_center), 1 - self.center_momentum)
        self.patches_seen.zero_()
        self.patches_count.zero_()

    def concealed(self, inputs: Batch) -> Concealed:
        """The pixels of hidden patches, and what is told of them."""
        return Concealed(lambda inputs: self.predict(inputs)["told"], {"views": self._pixels(inputs)})

    def _pixels(self, inputs: Batch) -> Tensor:
        """Bool like `views`, True where the student does not see them."""
        views, hidden = inputs["views"], inputs["hidden"]
        patches = hidden[:, :, None].expand(-1, -1, views.shape[2] * math.prod(self.patch)).float()
        mask = unpatchify(patches, self.patch, (views.shape[-2], views.shape[-1])) > 0
        return torch.stack([mask & (inputs["which"] == i).view(-1, 1, 1, 1) for i in range(2)], dim=1)

    def preview(self, inputs: Batch, outputs: Batch) -> list[Panel]:
        """As DINO's, with the large crop that the student does not see the whole of, and what it tells of the rest."""
        rows = torch.arange(len(inputs["which"]), device=inputs["which"].device)
        seen = torch.where(self._pixels(inputs), 0.5, inputs["views"])[rows, inputs["which"]]
        wanted, answered = (outputs["taught"] - self.patch_center).argmax(-1), outputs["told"].argmax(-1)
        right = ((wanted == answered) & inputs["chosen"]).sum(1).tolist()
        lines = [
            f"{good} of {count} patches as the teacher"
            for good, count in zip(right, inputs["chosen"].sum(1).tolist(), strict=True)
        ]
        return [*super().preview(inputs, outputs), Panel("student sees", list(seen)), Panel("and tells", lines)]
