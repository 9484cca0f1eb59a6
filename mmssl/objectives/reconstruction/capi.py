"""CAPI: to which clusters of its own patches would a slowly moving teacher assign the hidden ones of this picture?

Darcet, Baldassarre, Oquab, Mairal & Bojanowski 2025, "Cluster and Predict Latent Patches for Improved Masked Image
Modeling", arXiv 2502.08769; settings are those of the published code (facebookresearch/capi). A teacher, a moving
average of the encoder, reads the whole picture, and a linear layer sorts its patches into K clusters. That layer
learns by itself: what it says of a patch should be the assignment that Sinkhorn-Knopp makes of it. The encoder reads
one block of patches, a third of the picture, which is rolled around its edges; a predictor, in which mask tokens at the
places of some hidden patches attend to what the encoder says and to nothing else, tells their assignments.

Known traps. Sinkhorn balances the clusters at each place of the picture by itself, over the batch. Over all places at
once, clusters that say where a patch is are balanced as well, and then tell nothing of what it shows. The layer reads
the teacher without gradient, and has no slow copy of itself. All patches train it, those that are predicted train the
student, and class tokens and registers are in neither loss. Assignments are sharper than answers: they come from logits
over 0.06, not over 0.12. The published code clips no gradient.

`prediction_loss` is at ln K where the answer is the same for all rows, which is the best that an answer can be that
knows the place alone. Where the teacher says the same of all rows, so do the assignments, and it is at ln K, too:
`spread`, that of what the teacher says at one place, then is 0. A `perplexity` that falls to 1 or 2 of K says that few
clusters are left for all patches, which is easy to tell.

Differs from the published code. Theirs turns queries and keys by their places (RoPE), in encoder and predictor; here
the encoder has the positions of its library, and the predictor adds sines and cosines to mask tokens and to what it
reads. Their predictor reads the encoder's registers as well, for which the pooled vector stands here, so that pooling
is trained. The layer has the optimizer of the run, with a rate of its own, in place of one that decays weights less.
Patches are embedded at a fifth of the rate and norms decay by a tenth there, and the predictor drops paths.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmssl.batch import Batch
from mmssl.encoders.base import Encoder, Features
from mmssl.errors import RecipeError
from mmssl.modules.decoders import check_decoder
from mmssl.modules.pictures import check_patches, cut, read_picture
from mmssl.modules.views import Crop
from mmssl.objectives._concealed import Concealed
from mmssl.objectives._taught import Taught
from mmssl.objectives.base import Chance, Panel
from mmssl.ops.clustering import balanced_assignment
from mmssl.ops.draws import Draws
from mmssl.ops.gather import average
from mmssl.ops.losses import spread
from mmssl.ops.masking import choose_places, take
from mmssl.ops.patches import unpatchify
from mmssl.ops.words import as_places
from mmssl.ranges import BelowOne, Part, Positive, Ratio, Share, Temperature, Weight, Width

VIEWS = {"area": (0.6, 1.0), "flip": 0.5}
ASPECT = 0.5  # smallest height / width of the block that is read
FALL = 0.8  # of a cosine's half period, in which the teacher's pace falls
EPS = 1e-5  # of the predictor's norms


class CAPI(Taught):
    """Predict a momentum teacher's clusters of hidden patches.

    Args:
        encoders: holds the encoder, of images, a transformer whose tokens are patches.
        encoder: its name.
        prototypes: K, the number of clusters.
        mask_ratio: share of the patches that the student does not see.
        predicted: share of these that it tells.
        student_temperature: divides the student's logits.
        clustering_temperature: divides the clustering's, where it learns.
        teacher_temperature: divides them before they are balanced.
        iterations: of Sinkhorn-Knopp.
        clustering_lr: learning rate of the clustering over that of the rest.
        momentum: share of itself that the teacher keeps where it moves fastest: 1 less the published learning rate, and
            so at every step.
        momentum_warmup: share of the run in which it falls there from 1, along a line; it then rises along a cosine.
        views: how images are cropped, see `Crop`.
        predictor_depth: blocks of the predictor.
        predictor_width: their width.
        predictor_heads: their attention heads.
    """

    needs = ("image",)
    meets = "loss"

    def __init__(
        self,
        encoders: Mapping[str, Encoder],
        *,
        encoder: str = "image",
        prototypes: Width = 16384,
        mask_ratio: Ratio = 0.65,
        predicted: Part = 0.05,
        student_temperature: Temperature = 0.12,
        clustering_temperature: Temperature = 0.12,
        teacher_temperature: Temperature = 0.06,
        iterations: Positive = 3,
        clustering_lr: Weight = 0.5,
        momentum: Share = 0.999,
        momentum_warmup: BelowOne = 0.1,
        views: dict[str, Any] = VIEWS,
        predictor_depth: Positive = 12,
        predictor_width: Width = 1024,
        predictor_heads: Positive = 16,
    ) -> None:
        super().__init__(encoders)
        network = self.encoder(encoder, "image")
        check_decoder("capi", predictor_width, predictor_heads, "predictor")
        self.name, self.patch, self.crop = encoder, check_patches("capi", network), Crop.of(VIEWS, views)
        self.prototypes, self.mask_ratio, self.predicted = prototypes, mask_ratio, predicted
        self.student_temperature, self.clustering_temperature = student_temperature, clustering_temperature
        self.teacher_temperature, self.iterations = teacher_temperature, iterations
        self.momentum, self.momentum_warmup = momentum, momentum_warmup
        self.predictor = Predictor(network.dim, predictor_depth, predictor_width, predictor_heads)
        self.head = Directions(predictor_width, prototypes)
        self.clustering = nn.Linear(network.dim, prototypes)
        nn.init.normal_(self.clustering.weight)
        nn.init.zeros_(self.clustering.bias)
        for parameter in self.clustering.parameters():
            parameter.lr_scale = clustering_lr  # type: ignore[attr-defined]
        self.begin_teaching()

    def chance(self, rows: int) -> Chance:
        """Any of K clusters, told and assigned."""
        level = math.log(self.prototypes)
        return Chance(2 * level, {"prediction_loss": level})

    @torch.no_grad()
    def transform(self, batch: Batch, draws: Draws) -> Batch:
        """`image` (B, 3, H, W) -> `image` (B, 3, h, w) in [0, 1], and places of patches.

        `seen` int64 (B, S) is the block that the student reads, and `hidden` (B, M) what it tells of the rest.

        Raises:
            RecipeError: for pictures of one patch.
        """
        picture, pixels, _ = read_picture(self.encoder(self.name), batch, draws, self.crop)
        grid = cast(tuple[int, int], cut("capi", pixels.shape[2:], self.patch))
        number = math.prod(grid)
        if number < 2:
            raise RecipeError("capi: of one patch none can be hidden; take larger pictures or smaller patches")
        hidden = max(1, int(number * self.mask_ratio))
        visible = visible_blocks(grid, number - hidden, draws)
        told = max(1, int(hidden * self.predicted))
        places, _ = choose_places(~visible, visible.new_full((len(visible),), told, dtype=torch.long), told, draws)
        return {"image": picture, "seen": as_places(visible, number - hidden)[0], "hidden": places}

    def predict(self, inputs: Batch) -> Batch:
        """Logits (B, M, K) that are `told` of hidden patches, and those of the clustering, `sorted` (B, N, K), of all.

        `taught` (B, N, D) are the teacher's patches at unit length.
        """
        encoder, picture = self.encoder(self.name), inputs["image"]
        grid = (picture.shape[-2] // self.patch[0], picture.shape[-1] // self.patch[1])
        features = encoder.encode(take(encoder.embed(picture), inputs["seen"]))
        told = self.head(self.predictor(features, inputs["seen"], inputs["hidden"], grid))
        weight = self.clustering.weight
        with torch.no_grad():
            taught = F.normalize(self._taught(picture).tokens.to(weight.dtype), dim=-1)
        with torch.autocast(picture.device.type, enabled=False):
            return {"told": told, "sorted": self.clustering(taught), "taught": taught}

    def assigned(self, logits: Tensor) -> Tensor:
        """Shares of the clusters that are balanced at each place, of the clustering's logits (B, N, K)."""
        return balanced_assignment(logits / self.teacher_temperature, iterations=self.iterations).exp()

    def loss(self, outputs: Batch, inputs: Batch) -> dict[str, Tensor]:
        """Cross-entropies of what is told of hidden patches, and of the clustering; no parameter is in both.

        Also the entropy of an assignment, that of their mean as `perplexity`, and `spread`, see above.
        """
        shares = self.assigned(outputs["sorted"])
        wanted, mean = take(shares, inputs["hidden"]), average(shares.mean((0, 1)))
        prediction = _cross_entropy(wanted, outputs["told"] / self.student_temperature)
        clustering = _cross_entropy(shares, outputs["sorted"] / self.clustering_temperature)
        return {
            "loss": prediction + clustering,
            "prediction_loss": prediction,
            "clustering_loss": clustering,
            "target_entropy": -torch.xlogy(wanted, wanted).sum(-1).mean(),
            "perplexity": (-torch.xlogy(mean, mean).sum()).exp(),
            # All places of a row as one vector: at each place rows are compared with each other alone.
            "spread": spread(outputs["taught"].flatten(1)),
        }

    def after_step(self, progress: float) -> None:
        """The teacher follows."""
        warmup = self.momentum_warmup
        if progress < warmup:
            pace = progress / warmup
        else:
            pace = (1 + math.cos(math.pi * FALL * (progress - warmup) / (1 - warmup))) / 2
        self.teacher.follow(self._student(), 1 - (1 - self.momentum) * pace)

    def concealed(self, inputs: Batch) -> Concealed:
        """The pixels that the student does not see, and what it tells."""
        return Concealed(lambda inputs: self.predict(inputs)["told"], {"image": self._unseen(inputs)})

    def _unseen(self, inputs: Batch) -> Tensor:
        """Bool like the picture."""
        picture, seen = inputs["image"], inputs["seen"]
        area = math.prod(self.patch)
        patches = picture.new_ones(len(picture), picture[0, 0].numel() // area, picture.shape[1] * area)
        patches = patches.scatter(1, seen[:, :, None].expand(-1, -1, patches.shape[2]), 0.0)
        return unpatchify(patches, self.patch, (picture.shape[-2], picture.shape[-1])) > 0

    def preview(self, inputs: Batch, outputs: Batch) -> list[Panel]:
        """The picture, a map of its patches' clusters, what the student sees, and what it tells."""
        picture, clusters = inputs["image"], self.assigned(outputs["sorted"]).argmax(-1)
        told = outputs["told"].argmax(-1) == clusters.gather(1, inputs["hidden"])
        numbers = (clusters / max(1, self.prototypes - 1))[:, :, None].expand(-1, -1, math.prod(self.patch))
        maps = unpatchify(numbers, self.patch, (picture.shape[-2], picture.shape[-1]))
        return [
            Panel("original", list(picture)),
            Panel("teacher's clusters", list(maps[:, 0])),
            Panel("student sees", list(torch.where(self._unseen(inputs), 0.5, picture))),
            Panel("and tells", [f"{row} of {told.shape[1]} patches as the teacher" for row in told.sum(1).tolist()]),
        ]


class Predictor(nn.Module):
    """Mask tokens that attend to what the encoder says of visible patches, and not to each other.

    Args:
        dim: width of the features.
        depth: number of blocks.
        width: of the blocks.
        heads: of their attention.
    """

    def __init__(self, dim: int, depth: int, width: int, heads: int) -> None:
        super().__init__()
        self.embed = nn.Linear(dim, width)
        self.mask_token = nn.Parameter(torch.zeros(width))
        self.blocks = nn.ModuleList(CrossBlock(width, heads) for _ in range(depth))
        nn.init.normal_(self.mask_token, std=0.02)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)

    def forward(self, features: Features, seen: Tensor, hidden: Tensor, grid: tuple[int, int]) -> Tensor:
        """Features of the patches at `seen` (B, S) of a grid -> what is predicted at `hidden` (B, M), (B, M, width)."""
        from timm.layers.pos_embed_sincos import build_sincos2d_pos_embed

        tokens, pooled = self.embed(features.tokens), self.embed(features.pooled)[:, None]
        positions = build_sincos2d_pos_embed(
            list(grid), tokens.shape[2], interleave_sin_cos=True, device=tokens.device, dtype=tokens.dtype
        )
        context = torch.cat([pooled, tokens + positions[seen]], dim=1)
        x = self.mask_token.to(tokens.dtype) + positions[hidden]
        for block in self.blocks:
            x = block(x, context)
        return x


class CrossBlock(nn.Module):
    """Attention to a context and a feed-forward network, each added to what comes in, without biases.

    Args:
        width: of both sides.
        heads: of the attention.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm, self.mlp_norm = nn.RMSNorm(width, eps=EPS), nn.RMSNorm(width, eps=EPS)
        self.attention = nn.MultiheadAttention(width, heads, bias=False, batch_first=True)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width, bias=False), nn.GELU(), nn.Linear(4 * width, width, bias=False)
        )

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """(B, M, width) and (B, S, width) -> (B, M, width)."""
        x = x + self.attention(self.norm(x), context, context, need_weights=False)[0]
        return x + self.mlp(self.mlp_norm(x))


class Directions(nn.Module):
    """The cosine with each of K prototypes, times a length that each learns; a norm before it would say nothing.

    Args:
        width: of what it reads.
        prototypes: K.
    """

    def __init__(self, width: int, prototypes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(prototypes, width))
        self.length = nn.Parameter(torch.ones(prototypes))
        nn.init.trunc_normal_(self.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """(B, M, width) -> logits (B, M, K)."""
        with torch.autocast(x.device.type, enabled=False):  # in half precision, divided by 0.12, they are coarse
            cosine = F.linear(F.normalize(x.to(self.weight.dtype), dim=-1), F.normalize(self.weight, dim=-1))
            return cosine * self.length


def visible_blocks(grid: tuple[int, int], number: int, draws: Draws) -> Tensor:
    """One rectangle a row, less what of its last line is too much, rolled around the edges: what is *not* hidden.

    The log of height / width is uniform, as far as the rectangle fits.

    Args:
        grid: height and width.
        number: places inside, exactly.
        draws: source of randomness.

    Returns:
        bool (B, h * w), True inside; every place as often as any other.
    """
    height, width = grid
    limit = -math.log(ASPECT)
    ratio = draws.uniform(low=-limit, high=limit).exp()
    wide = (number / ratio).sqrt().ceil().clamp(math.ceil(number / height), width).long()[:, None, None]
    down = (torch.arange(height, device=ratio.device) - draws.integers(height)[:, None]) % height
    across = (torch.arange(width, device=ratio.device) - draws.integers(width)[:, None]) % width
    inside = (across[:, None] < wide) & (down[:, :, None] * wide + across[:, None] < number)
    return inside.flatten(1)


def _cross_entropy(shares: Tensor, logits: Tensor) -> Tensor:
    """Mean over rows and places of (B, N, K)."""
    return -(shares * logits.log_softmax(-1)).sum(-1).mean()
