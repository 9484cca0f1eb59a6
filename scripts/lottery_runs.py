"""What `kill_lottery.py` runs: toy recipes, the sources that they read, and how they are started."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from PIL import Image

TASKS = (
    *("rotation", "jigsaw", "simclr", "moco", "byol", "dino", "masked_autoencoder", "contrastive", "matching"),
    *("captioning", "masked_language", "causal_language", "replaced_token", "temporal_alignment"),
    *("instance_discrimination", "deepcluster", "densecl", "lejepa", "data2vec", "ibot", "nnclr", "swav", "simcse"),
    *("cross_encoder_distillation", "hubert", "wav2vec2", "cross_modal_clustering", "next_sentence", "binding_sources"),
    *("capi",),
)
OF_PICTURES = ("rotation", "jigsaw", "simclr", "moco", "byol", "dino", "masked_autoencoder", "densecl", "ibot", "swav")
STREAMED = (*OF_PICTURES, "contrastive", "captioning", "masked_language", "replaced_token", "simcse")
CHANGES = {"deepcluster": {"every": 3}, "cross_modal_clustering": {"every": 3}}
"""Of a task's settings, so that what it does now and then falls within the few steps."""
STEPS = 8
WORDS = ("red", "blue", "green", "round", "small", "large", "square", "above", "below", "left", "right", "and", "the")


class Run(NamedTuple):
    """One setting: a toy recipe, its source, and how it is started."""

    task: str
    source: str  # `toy`, `folder` or `stream`
    processes: int
    workers: int
    real: bool
    sharded: bool

    def tree(self, folder: Path) -> dict[str, Any]:
        """The recipe; `folder` holds what `make_pictures` and `make_stream` made."""
        path = next(Path(__file__).parent.parent.glob(f"recipes/*/{self.task}_toy.yaml"))
        tree: dict[str, Any] = yaml.safe_load(path.read_text("utf-8"))
        tree["objective"] |= CHANGES.get(self.task, {})
        if self.source == "toy":
            for data in [tree["data"]] if "source" in tree["data"] else tree["data"].values():
                data["limit"] = 32
        else:
            tree["data"] |= {"source": str(folder / self.source), "max_bad": 0.9, "streaming": self.source == "stream"}
            tree["data"] |= {"shuffle_buffer": 16} if self.source == "stream" else {}
            tree["data"].pop("limit", None)
        training = {"steps": STEPS, "batch_size": 8, "log_every": 2, "save_every": 2, "workers": self.workers}
        tree["training"] = tree["training"] | training | {"sharded": self.sharded}
        return tree


def sources_of(task: str) -> list[str]:
    """What it may read."""
    return ["toy", *["folder"] * (task in OF_PICTURES), *["stream"] * (task in STREAMED)]


def make_pictures(folder: Path) -> Path:
    """Twenty-two pictures and two files that are none."""
    folder.mkdir()
    dice = np.random.default_rng(0)
    for n in range(24):
        path = folder / f"{n:02d}.png"
        Image.fromarray(dice.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(path)
        if n in (5, 17):
            path.write_bytes(b"no picture")
    return folder


def make_stream(folder: Path) -> Path:
    """Four tar files of sixteen pictures and their texts each; two of the pictures are none."""
    folder.mkdir()
    dice = np.random.default_rng(1)
    for shard in range(4):
        with tarfile.open(folder / f"train-{shard}.tar", "w") as tar:
            for n in range(16):
                picture = io.BytesIO()
                Image.fromarray(dice.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(picture, "PNG")
                words = " ".join(WORDS[int(i)] for i in dice.integers(0, len(WORDS), 6))
                broken = (shard, n) in ((1, 3), (3, 9))
                contents = {"png": b"no picture" if broken else picture.getvalue(), "txt": words.encode()}
                for kind, content in contents.items():
                    member = tarfile.TarInfo(f"{shard}_{n:02d}.{kind}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return folder
