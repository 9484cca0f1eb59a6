"""k nearest neighbors by cosine, weighted by exp(similarity / temperature)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated

import torch
from annotated_types import Gt
from pydantic import AllowInfNan
from torch import Tensor
from torch.nn import functional as F

from mmssl.adaptation.probes.base import Learner, Setting
from mmssl.adaptation.targets.base import Target
from mmssl.ranges import Positive

CHUNK = 1024
Temperature = Annotated[float, Gt(0), AllowInfNan(True)]


class Knn(Learner[Tensor]):
    """The answer is the weighted mean over the k nearest rows (Wu et al. 2018, section 3.4; Caron et al. 2021).

    Args:
        k: candidates for the number of neighbors; those above the number of rows stand for all rows.
        temperature: of the weights; `inf` gives each neighbor one vote.
    """

    hold_outs = 10

    def __init__(self, *, k: tuple[Positive, ...] = (200, 50, 20, 10, 5, 1), temperature: Temperature = 0.07) -> None:
        super().__init__()
        self.k, self.temperature = k, temperature

    def settings(self) -> Sequence[Setting]:
        """Numbers of neighbors, the largest first."""
        return [{"k": k} for k in sorted(self.k, reverse=True)]

    def predict(
        self, target: Target, train: Tensor, labels: Tensor, test: Tensor, settings: Sequence[Setting], seed: int
    ) -> Iterator[Tensor]:
        """See `Learner.predict`."""
        train, matrix = F.normalize(train, dim=1), target.matrix(labels)
        sizes = [min(int(setting["k"]), len(train)) for setting in settings]
        answers: list[list[Tensor]] = [[] for _ in settings]
        for part in F.normalize(test, dim=1).split(CHUNK):
            similarity, nearest = (part @ train.T).topk(max(sizes), dim=1)
            # Relative to the nearest, so that a low temperature does not overflow.
            weight = ((similarity - similarity[:, :1]) / self.temperature).exp()
            for answer, k in zip(answers, sizes, strict=True):
                own = weight[:, :k].contiguous()
                total = F.embedding_bag(nearest[:, :k], matrix, per_sample_weights=own, mode="sum")
                answer.append(total / own.sum(1, keepdim=True))
        yield from (torch.cat(answer) for answer in answers)
