"""Pretext tasks for image, text, audio and video: one loop, one adaptation call, numbers you can trust.

    run = mmssl.run("quickstart", out="runs/first")                        # pretrain -> Run
    run = mmssl.load("runs/first")                                         # or a Hub id
    print(mmssl.compare("path/to/files", tasks=["rotation", "simclr"]))    # which task transfers best
    table = mmssl.adapt(run, "toy", label="shape")                         # probe, with a random-initialized encoder's
    encoder = mmssl.encoder("timm/resnet18", modality="image")             # random weights unless pretrained=...
    features = encoder(encoder.read(["a.jpg", "b.png"]))                   # tokens, pooled ...
    task = mmssl.objective("rotation", {"image": encoder})                 # an nn.Module
    mmssl.embed(run, "path/to/files", "features.parquet")                  # features beside the rows' columns
    mmssl.predict("classifier", "path/to/files", "answers.csv")            # of adapt(..., probe="finetune", save=...)
    print(mmssl.check("path/to/files").text())                             # what a source holds, and its traps

Every name is imported when it is first used, so that `import mmssl` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from mmssl.version import __version__

if TYPE_CHECKING:
    from mmssl.adaptation.table import Table
    from mmssl.comparing import compare
    from mmssl.comparison.comparison import Comparison
    from mmssl.data.check import check
    from mmssl.data.checked import Check
    from mmssl.embedding import embed
    from mmssl.encoders import create as encoder
    from mmssl.encoders.base import Encoder, Features, Input
    from mmssl.errors import DataError, MmsslError, RecipeError, RunError
    from mmssl.hub.load import load
    from mmssl.objectives import create as objective
    from mmssl.objectives.base import Chance, Objective, Panel
    from mmssl.predicting import predict
    from mmssl.recipe import Recipe
    from mmssl.run_directory import Run
    from mmssl.runs import run
    from mmssl.transfer import adapt


# Public name -> (module, name there).
_HOMES = {
    "run": ("mmssl.runs", "run"),
    "load": ("mmssl.hub.load", "load"),
    "Run": ("mmssl.run_directory", "Run"),
    "encoder": ("mmssl.encoders", "create"),
    "Encoder": ("mmssl.encoders.base", "Encoder"),
    "Features": ("mmssl.encoders.base", "Features"),
    "Input": ("mmssl.encoders.base", "Input"),
    "objective": ("mmssl.objectives", "create"),
    "Objective": ("mmssl.objectives.base", "Objective"),
    "Chance": ("mmssl.objectives.base", "Chance"),
    "Panel": ("mmssl.objectives.base", "Panel"),
    "adapt": ("mmssl.transfer", "adapt"),
    "Table": ("mmssl.adaptation.table", "Table"),
    "compare": ("mmssl.comparing", "compare"),
    "Comparison": ("mmssl.comparison.comparison", "Comparison"),
    "embed": ("mmssl.embedding", "embed"),
    "predict": ("mmssl.predicting", "predict"),
    "check": ("mmssl.data.check", "check"),
    "Check": ("mmssl.data.checked", "Check"),
    "Recipe": ("mmssl.recipe", "Recipe"),
    "MmsslError": ("mmssl.errors", "MmsslError"),
    "RecipeError": ("mmssl.errors", "RecipeError"),
    "DataError": ("mmssl.errors", "DataError"),
    "RunError": ("mmssl.errors", "RunError"),
}

__all__ = [  # noqa: RUF022 (in the order in which a user meets them)
    "run",
    "load",
    "Run",
    "encoder",
    "Encoder",
    "Features",
    "Input",
    "objective",
    "Objective",
    "Chance",
    "Panel",
    "adapt",
    "Table",
    "compare",
    "Comparison",
    "embed",
    "predict",
    "check",
    "Check",
    "Recipe",
    "MmsslError",
    "RecipeError",
    "DataError",
    "RunError",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'mmssl' has no attribute '{name}'")
    module, there = _HOMES[name]
    value = globals()[name] = getattr(importlib.import_module(module), there)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
