"""The class of every word: one logistic regression on the token that each word begins with.

Devlin et al. 2019, "BERT", arXiv 1810.04805, give the tag of a word to its first piece, which has seen the others. The
encoder stays as it is, and the regression is solved as `logistic` solves it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from mmssl.adaptation.features import depths_of
from mmssl.adaptation.labeled import Question
from mmssl.adaptation.placed import word_places
from mmssl.adaptation.probes.base import Setting, View
from mmssl.adaptation.probes.logistic import Logistic
from mmssl.adaptation.request import Model, Request
from mmssl.adaptation.rows import Split, in_order
from mmssl.adaptation.targets.classes import Classes
from mmssl.encoders.base import Encoder
from mmssl.errors import DataError, RecipeError, RunError
from mmssl.modules.mode import evaluating


class WordRows:
    """Rows of words, any number each.

    Args:
        vectors: of all words, float32 (all, D).
        starts: where each row's begin there, int64 (rows + 1,).
        rows: that these are, int64 (N,).
    """

    def __init__(self, vectors: Tensor, starts: Tensor, rows: Tensor) -> None:
        self.vectors, self.starts, self.rows = vectors, starts, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Tensor) -> WordRows:
        return WordRows(self.vectors, self.starts, self.rows[index])

    def flat(self) -> Tensor:
        """The words of one row after another, (words, D)."""
        spans = zip(self.starts[self.rows].tolist(), self.starts[self.rows + 1].tolist(), strict=True)
        return torch.cat([self.vectors[start:stop] for start, stop in spans])


class Tagging(Logistic):
    """scikit-learn's LogisticRegression on the standardized first tokens of the words of all training rows.

    Args:
        c: candidates for C, the inverse of the penalty on the sum of the words' losses.
        max_iter: of L-BFGS.
    """

    frozen: ClassVar[bool] = False  # there is more than a vector a row
    learns = ("tags",)
    hold_outs = 1

    def __init__(self, *, c: tuple[float, ...] = (1e-3, 0.1, 10.0), max_iter: int = 1000) -> None:
        super().__init__(c=c, max_iter=max_iter)

    @property
    def tells_depths(self) -> bool:
        """The encoder stays as it is."""
        return True

    def ask(self, model: Model, request: Request) -> Question:
        """See `Learner.ask`."""
        if model.encoder.modality != "text":
            raise RecipeError(f"{self.name} reads texts, and encoder '{model.name}' reads {model.encoder.modality}")
        return super().ask(model, request)

    def predict(  # type: ignore[override]
        self, target: Any, train: WordRows, labels: Tensor, test: WordRows, settings: Sequence[Setting], seed: int
    ) -> Iterator[Tensor]:
        """See `Learner.predict`; answers are (M, W, C)."""
        truth = target.classes(labels)[target.words(labels)]
        known = truth >= 0
        x, y = train.flat()[known], test.flat()
        lengths = test.starts[test.rows + 1] - test.starts[test.rows]
        there = torch.arange(int(lengths.max())) < lengths[:, None]
        for found in super().predict(Classes(target.names), x, truth[known], y, settings, seed):
            answers = found.new_zeros(*there.shape, target.width)
            answers[there] = found
            yield answers

    def _read(
        self, encoders: Sequence[Encoder], split: Split, ids: Tensor, request: Request
    ) -> tuple[list[View], Tensor]:
        """See `Learner`; the first token of every word."""
        parts: list[dict[str, list[Tensor]]] = [{} for _ in encoders]
        read: list[Tensor] = []
        numbers: list[int] = []
        with evaluating(*encoders), torch.no_grad():
            for batch in split.read(in_order(ids.numpy(), request.batch_size)):
                read.append(batch["id"])
                places = [word_places(split, int(row)) for row in batch["id"]]
                places = [own[own >= 0] for own in places]
                numbers += map(len, places)
                rows = torch.arange(len(places)).repeat_interleave(torch.tensor([len(own) for own in places]))
                for encoder, lists in zip(encoders, parts, strict=True):
                    for depth, features in depths_of(encoder, batch, request.layers).items():
                        device = features.tokens.device
                        words = features.tokens[rows.to(device), torch.cat(places).to(device)]
                        lists.setdefault(depth, []).append(words.float().cpu())
        if not read:
            raise DataError(f"{split.where}: no row can be decoded")
        starts = torch.cat([torch.zeros(1, dtype=torch.int64), torch.tensor(numbers).cumsum(0)])
        found: list[View] = []
        for lists in parts:
            vectors = {depth: torch.cat(some) for depth, some in lists.items()}
            if not all(x.isfinite().all() for x in vectors.values()):
                raise RunError("features are not finite: training diverged, or the encoder's precision is too low")
            found.append({depth: WordRows(x, starts, torch.arange(len(numbers))) for depth, x in vectors.items()})
        return found, torch.cat(read)
