"""A learned query that attends over all tokens, and a linear head: what pooling may have averaged away.

Chen et al. 2024, "Context Autoencoder for Self-Supervised Representation Learning", arXiv 2202.03026, and Bardes
et al. 2024 (V-JEPA), arXiv 2404.08471: masked tasks train no pooled vector, so that a linear probe of one
understates them. One layer of cross-attention, no residual branch, no further block.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmssl.adaptation.probes._trained import HeadLearner
from mmssl.adaptation.probes.base import Setting, View
from mmssl.adaptation.request import Request
from mmssl.adaptation.rows import Split
from mmssl.adaptation.targets.base import Target
from mmssl.adaptation.tokens import TOKENS, TOKENS_MASK, TokenRows
from mmssl.encoders.base import Encoder
from mmssl.ranges import Positive, Weight

HEAD_WIDTH = 64  # of an attention head, at least


class Attentive(HeadLearner[TokenRows]):
    """Frozen tokens of the last layer, or of every depth with `layers`; AdamW with a cosine schedule.

    Tokens are on disk while the probe runs. Another call finds them where those of a network take 256 MiB at most; they
    are some hundred times what is pooled.

    Args:
        lr: candidates for the peak learning rate.
        steps: optimizer steps; few rows are passed through more often.
        batch_rows: rows of a step, at most all of them.
        weight_decay: of AdamW.
    """

    def __init__(
        self,
        *,
        lr: tuple[float, ...] = (3e-4, 1e-3, 3e-3),
        steps: Positive = 300,
        batch_rows: Positive = 64,
        weight_decay: Weight = 0.05,
    ) -> None:
        super().__init__(lr, steps, batch_rows, weight_decay)

    def predict(
        self, target: Target, train: TokenRows, labels: Tensor, test: TokenRows, settings: Sequence[Setting], seed: int
    ) -> Iterator[Tensor]:
        """See `Learner.predict`."""
        inputs = (TOKENS, TOKENS_MASK)

        def network() -> nn.Module:
            return AttentiveHead(train.dim, target.width)

        return self.fit_heads(network, inputs, target, train, labels, test, settings, seed)

    def _read(
        self, encoders: Sequence[Encoder], split: Split, ids: Tensor, request: Request
    ) -> tuple[list[View], Tensor]:
        """See `Learner`; tokens in place of vectors."""
        views, read = request.cache.tokens(
            encoders, split, ids.numpy(), layers=request.layers, batch_size=request.batch_size
        )
        return [dict(view) for view in views], read


class AttentiveHead(nn.Module):
    """Tokens (B, N, dim) -> outputs (B, width).

    Args:
        dim: of a token.
        width: of the outputs.
    """

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        heads = next(count for count in range(max(1, dim // HEAD_WIDTH), 0, -1) if dim % count == 0)
        self.query = nn.Parameter(nn.init.trunc_normal_(torch.empty(dim), std=0.02))
        self.attention = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.head = nn.Linear(dim, width)

    def forward(self, tokens: Tensor, valid: Tensor | None = None) -> Tensor:
        """See the class; `valid` bool (B, N) is False where a token is padding."""
        query = self.query.expand(len(tokens), 1, -1)
        padding = None if valid is None else ~valid
        pooled, _ = self.attention(query, tokens, tokens, key_padding_mask=padding, need_weights=False)
        return self.head(F.layer_norm(pooled[:, 0], pooled.shape[-1:]))
