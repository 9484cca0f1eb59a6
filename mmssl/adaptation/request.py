"""What is asked of a probe: the network, the rows, and how they are divided; the arguments of `mmssl.adapt`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, Self

from mmssl.adaptation.cache import FeatureCache
from mmssl.adaptation.rows import Reads, Split, open_splits
from mmssl.encoders.base import Encoder
from mmssl.encoders.text import tokenizers_of
from mmssl.errors import DataError, RecipeError, nearest
from mmssl.objectives.base import Objective
from mmssl.recipe import Data
from mmssl.shots import read_shots


class Pretrained(Protocol):
    """What adaptation reads of a run."""

    objective: Objective
    encoders: dict[str, Encoder]

    def decoding(self, *modalities: str) -> Data:
        """How rows of these modalities are decoded, and where they were trained on."""
        ...


@dataclass(frozen=True)
class Model:
    """What is adapted.

    Attributes:
        encoders: by name; the name of an encoder without a task is empty.
        name: of the one whose features are probed.
        chosen: whether the caller named it.
        task: whose encoders they are; None for an encoder alone.
        run: where they come from; None for a network in memory.
    """

    encoders: Mapping[str, Encoder]
    name: str
    chosen: bool = False
    task: Objective | None = None
    run: Pretrained | None = None

    @classmethod
    def of(cls, given: Encoder | Objective | Pretrained, encoder: str | None = None) -> Self:
        """From an encoder, a task or a run.

        Raises:
            RecipeError: where it has no encoder of that name.
        """
        if isinstance(given, Encoder):
            if encoder is not None:
                raise RecipeError(f"encoder = '{encoder}' is given, and so is the encoder itself; leave the name out")
            return cls({"": given}, "")
        encoders = given.exported if isinstance(given, Objective) else given.encoders
        name = next(iter(encoders)) if encoder is None else encoder
        if name not in encoders:
            raise RecipeError(f"there is no encoder '{name}'{nearest(name, encoders)}")
        if isinstance(given, Objective):
            return cls(encoders, name, encoder is not None, given)
        return cls(encoders, name, encoder is not None, given.objective, given)

    @property
    def encoder(self) -> Encoder:
        """The one whose features are probed."""
        return self.encoders[self.name]

    def reads(self, needs: Sequence[str], workers: int) -> Reads:
        """What is read of a row, by those of the encoders that read it."""
        return Reads(tuple(dict.fromkeys(needs)), tokenizers_of(self.encoders), workers)


@dataclass(frozen=True)
class Request:
    """The arguments of `mmssl.adapt`, which says what they are.

    Attributes:
        seeds: consecutive numbers.
        cache: where features are kept.
        split_seed: of test rows that are held out of the training rows; the first of `seeds` where None.
        hold_out: score a held-out fifth of the training rows, and look at no test row.
        listen: is called with the `Answers` that the scores of a learner's table are made of.
    """

    train: Any = None
    test: Any = None
    label: str = "label"
    target: str | None = None
    layers: bool = False
    baseline: bool = True
    seeds: tuple[int, ...] = (0, 1, 2)
    shots: int | str | None = None
    groups: str | None = None
    data: Data | None = None
    columns: Mapping[str, str] | None = None
    limit: int | None = None
    max_bad: float | None = None
    batch_size: int = 256
    workers: int = 0
    cache: FeatureCache = field(default_factory=FeatureCache)
    split_seed: int | None = None
    hold_out: bool = False
    listen: Callable[[Any], None] | None = None

    def __post_init__(self) -> None:
        for name, value in {"seeds": len(self.seeds), "limit": self.limit}.items():
            if value is not None and value < 1:
                raise RecipeError(f"{name} = {value}: expected at least 1")
        if self.shots is not None:
            try:
                object.__setattr__(self, "shots", read_shots(self.shots))
            except ValueError as error:
                raise RecipeError(f"shots = {self.shots!r} {error}") from None
        if self.max_bad is not None and not 0 <= self.max_bad <= 1:
            raise RecipeError(f"max_bad = {self.max_bad}: expected a share from 0 to 1")

    def open(self, model: Model, needs: Sequence[str], *, learns: bool) -> tuple[Split | None, Split | None]:
        """Training and test rows; see `open_splits`.

        Args:
            model: whose run says how rows are decoded, where nobody else does.
            needs: modalities that are read.
            learns: whether the probe needs training rows.

        Raises:
            DataError: for a source that is not there, or none.
        """
        data, train = self.data, self.train
        if model.run is not None and data is None:
            data = model.run.decoding(*dict.fromkeys(needs))
        if train is None:
            if model.run is None:
                raise DataError("there are no rows: give a source, a data set or batches")
            train = model.run.decoding(*dict.fromkeys(needs))
        return open_splits(
            train,
            self.test,
            model.reads(needs, self.workers),
            learns=learns,
            data=data,
            columns=self.columns,
            limit=self.limit,
            max_bad=self.max_bad,
        )
