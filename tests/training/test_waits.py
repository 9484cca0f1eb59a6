"""A step that does not log asks nothing of the device but what is listed here: on a GPU every question is a wait."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mmssl import recipe
from mmssl.batch import Batch
from mmssl.build import build
from mmssl.registry import ROOT
from mmssl.training.loop import fit

TOYS = sorted((ROOT.parent / "recipes").rglob("*_toy.yaml"))
STEPS = 3
aten = torch.ops.aten
QUESTIONS = {
    *(aten._local_scalar_dense.default, aten.is_nonzero.default, aten.equal.default, aten.nonzero.default),
    *(aten.masked_select.default, aten._unique2.default, aten.unique_dim.default, aten.unique_consecutive.default),
    *(aten.repeat_interleave.Tensor, aten.bincount.default),
    aten.lift_fresh.default,  # torch.tensor: an upload that waits
}
INDEXED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
# The innermost file of ours or of a library -> why it may ask.
WORDS = "only chosen words go through the vocabulary, and how many are chosen depends on the text"
PADDING = "the library looks whether anything is padding, and takes a faster kernel where nothing is"
MAY_ASK = {
    "mmssl/ops/transfers.py": "uploads without waiting, and asks once for all lines",
    "mmssl/ops/tiles.py": "a matrix made on the host",
    "mmssl/ops/losses.py": WORDS,
    "mmssl/objectives/reconstruction/_hidden.py": WORDS,
    "mmssl/objectives/reconstruction/_text_to_text.py": WORDS,
    "mmssl/objectives/reconstruction/captioning.py": WORDS,
    "mmssl/objectives/reconstruction/causal_language.py": WORDS,
    "mmssl/objectives/reconstruction/hubert.py": "only chosen frames are compared, as many as a sound has",
    "mmssl/objectives/reconstruction/masked_language.py": WORDS,
    "mmssl/objectives/reconstruction/replaced_token.py": WORDS,
    "mmssl/encoders/backbones/_transformers_waves.py": "the library chooses what is padding, and sets it to zero",
    "transformers/masking_utils.py": PADDING,
    "transformers/cache_utils.py": "an empty cache of a decoder",
}


class Listener(TorchDispatchMode):
    """Remembers the operations that make a host wait for a GPU, and who called them."""

    def __init__(self) -> None:
        super().__init__()
        self.heard: list[tuple[str, str]] = []

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        asks = operation in QUESTIONS
        if operation in INDEXED:
            asks = any(index is not None and index.dtype == torch.bool for index in args[1])
        if asks:
            self.heard.append((str(operation), _caller()))
        return operation(*args, **(kwargs or {}))


def _caller() -> str:
    """The innermost file that is neither torch's nor this one; the gradient of a line is called by nobody's line."""
    frame = sys._getframe(2)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.name == "step.py" and path.parent.name == "training" and frame.f_code.co_name != "forward":
            return "gradient"
        if "mmssl" in path.parts[-4:] or "transformers" in path.parts[-3:]:
            name = "mmssl" if "mmssl" in path.parts[-4:] else "transformers"
            return "/".join(path.parts[len(path.parts) - 1 - path.parts[::-1].index(name) :])
        frame = frame.f_back
    return "nobody"


class Overheard:
    """A loader after whose second batch a listener listens, until it is asked for the third."""

    steps_per_epoch = 1  # what a task may read of the data before the first step

    def __init__(self, loader: Any) -> None:
        self.loader, self.listener = loader, Listener()

    def batches(self, start: int, stop: int) -> Iterator[Batch]:
        inner = self.loader.batches(start, stop)
        for step in range(start, stop):
            if step == 2:
                self.listener.__exit__(None, None, None)
            batch = next(inner)
            if step == 1:
                self.listener.__enter__()
            yield batch


@pytest.mark.long
@pytest.mark.parametrize("path", TOYS, ids=lambda path: path.stem)
def test_a_step_that_does_not_log_asks_nothing_that_is_not_listed(path):
    torch.manual_seed(0)
    settings = recipe.load(path, {"training.batch_size": 4, "training.steps": STEPS, "training.log_every": 100})
    objective, loader = build(settings)
    overheard = Overheard(loader)
    fit(objective, overheard, settings.training, quiet=True)
    heard = {(operation, caller) for operation, caller in overheard.listener.heard if caller not in MAY_ASK}
    # A choice of words has a gradient that puts them back; nothing else may ask there.
    assert heard <= {("aten.index_put.default", "gradient"), ("aten.index_put_.default", "gradient")}


@pytest.mark.parametrize(
    "question",
    [
        lambda x: x.sum().item(),
        lambda x: x[x > 0],
        lambda x: (x > 0).nonzero(),
        lambda x: torch.tensor([1.0, 2.0]),
        lambda x: bool(x.any()),
    ],
)
def test_a_question_is_heard(question):
    with Listener() as listener:
        question(torch.ones(3))
    assert listener.heard
