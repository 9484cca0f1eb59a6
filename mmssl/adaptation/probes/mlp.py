"""A network of one hidden layer on standardized features: what a linear probe cannot read there."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from torch import Tensor, nn

from mmssl.adaptation.probes._trained import HeadLearner
from mmssl.adaptation.probes.base import Setting
from mmssl.adaptation.probes.ridge import standardize
from mmssl.adaptation.targets.base import Target
from mmssl.batch import Batch
from mmssl.ranges import Positive, Weight, Width

FEATURES = "features"


class Mlp(HeadLearner[Tensor]):
    """Linear, GELU, linear; AdamW with a cosine schedule.

    Args:
        hidden: units of the hidden layer.
        lr: candidates for the peak learning rate.
        steps: optimizer steps; few rows are passed through more often.
        batch_rows: rows of a step, at most all of them.
        weight_decay: of AdamW.
    """

    def __init__(
        self,
        *,
        hidden: Width = 512,
        lr: tuple[float, ...] = (3e-4, 1e-3, 3e-3),
        steps: Positive = 300,
        batch_rows: Positive = 64,
        weight_decay: Weight = 0.05,
    ) -> None:
        super().__init__(lr, steps, batch_rows, weight_decay)
        self.hidden = hidden

    def predict(
        self, target: Target, train: Tensor, labels: Tensor, test: Tensor, settings: Sequence[Setting], seed: int
    ) -> Iterator[Tensor]:
        """See `Learner.predict`."""
        x, y = (Vectors(rows.float()) for rows in standardize(train, test))

        def network() -> nn.Module:
            return nn.Sequential(
                nn.Linear(train.shape[1], self.hidden), nn.GELU(), nn.Linear(self.hidden, target.width)
            )

        return self.fit_heads(network, (FEATURES,), target, x, labels, y, settings, seed)


class Vectors:
    """Features float32 (N, D) as rows that the loop reads."""

    def __init__(self, vectors: Tensor) -> None:
        self.vectors = vectors

    def __len__(self) -> int:
        return len(self.vectors)

    def read(self, picks: Iterable[Tensor]) -> Iterator[Batch]:
        """`features` of the rows at each of `picks`."""
        return ({FEATURES: self.vectors[pick]} for pick in picks)
