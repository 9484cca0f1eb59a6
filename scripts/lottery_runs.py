"""What `kill_lottery.py` runs: toy recipes, the sources that they read, and how they are started."""

from __future__ import annotations

import io
import itertools
import os
import re
import signal
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from PIL import Image

from mmssl.data import ranges
from mmssl.registry import components

RECIPES = Path(__file__).parent.parent / "recipes"
TASKS = (*sorted(components("objective").keys() - {"combine"}), "binding_sources", "siglip2")
"""Every task, and combinations of one source each task, and in stages."""
WHOLE = ("deepcluster", "instance_discrimination")
"""Tasks that go through all rows now and then, or know them by their numbers: they read no stream."""
CHANGES = {"deepcluster": {"every": 3}, "cross_modal_clustering": {"every": 3}}
"""Of a task's settings, so that what it does now and then falls within the few steps."""
STEPS = 8
WORDS = ("red", "blue", "green", "round", "small", "large", "square", "above", "below", "left", "right", "and", "the")


class Run(NamedTuple):
    """One setting: a toy recipe, its source, and how it is started."""

    task: str
    source: str  # see `sources_of`
    processes: int
    workers: int
    real: bool
    sharded: bool

    def tree(self, folder: Path) -> dict[str, Any]:
        """The recipe; `folder` holds what `making` made."""
        tree = toy_recipe(self.task)
        tree["objective"] |= CHANGES.get(self.task, {})
        if self.source == "toy":
            for data in [tree["data"]] if "source" in tree["data"] else tree["data"].values():
                data["limit"] = 32
        else:
            source = f"{(folder / 'address').read_text('utf-8')}/train-{{0..3}}.tar" if self.source == "http" else ""
            tree["data"] |= {"source": source or str(folder / self.source), "max_bad": 0.9}
            tree["data"] |= {"streaming": True, "shuffle_buffer": 16} if self.source in STREAMS else {}
            tree["data"].pop("limit", None)
        training = {"steps": STEPS, "batch_size": 8, "log_every": 2, "save_every": 2, "workers": self.workers}
        tree["training"] = tree["training"] | training | {"sharded": self.sharded}
        return tree


STREAMS = ("stream", "http")


@cache
def _text_of(task: str) -> str:
    return next(RECIPES.glob(f"*/{task}_toy.yaml")).read_text("utf-8")


def toy_recipe(task: str) -> dict[str, Any]:
    """As it is written."""
    tree: dict[str, Any] = yaml.safe_load(_text_of(task))
    return tree


def sources_of(task: str) -> list[str]:
    """What it may read: the toy world; pictures and texts from a folder, a table, and tar files here or on a server."""
    data = toy_recipe(task)["data"]
    reads = {"image", "text", "audio", "video", "columns"} & data.keys()
    if "source" not in data or not reads <= {"image", "text"}:
        return ["toy"]
    return ["toy", *["folder"] * (reads == {"image"}), "table.parquet", *(STREAMS if task not in WHOLE else ())]


@contextmanager
def making(folder: Path) -> Iterator[None]:
    """All sources, and a server of the tar files, whose address is in a file, for as long as it is needed."""
    make_pictures(folder / "folder")
    shards = make_stream(folder / "stream")
    make_table(folder / "table.parquet")
    # Of a process that is forked; whoever tries again would wait for seconds.
    ranges.FIRST_WAIT, datasets.config.STREAMING_READ_RETRY_INTERVAL = 0.05, 0.05
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Failing, shards))
    (folder / "address").write_text(f"http://127.0.0.1:{server.server_port}", encoding="utf-8")
    pid = os.fork()  # a process of its own: those of runs are forked from one without other threads
    if not pid:
        server.serve_forever()
    server.socket.close()
    try:
        yield
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


class Failing(BaseHTTPRequestHandler):
    """Ranges of files below a folder; of seven answers one is an error, and one breaks off."""

    asked = itertools.count()

    def __init__(self, folder: Path, *arguments: Any) -> None:
        self.folder = folder
        super().__init__(*arguments)

    def log_message(self, *arguments: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        number = next(self.asked) % 7
        if number == 3:
            self.send_error(503)
        else:
            self.answer(whole=number != 5)

    def answer(self, whole: bool = True) -> None:
        path = self.folder / self.path.lstrip("/")
        if not path.is_file():
            self.send_error(404)
            return
        content = path.read_bytes()
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        start, stop = (int(asked[1]), int(asked[2] or len(content) - 1) + 1) if asked else (0, len(content))
        part = content[start:stop]
        self.send_response(206 if asked else 200)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(part)))
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{start + len(part) - 1}/{len(content)}")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(part if whole else part[: len(part) // 2])


def make_table(path: Path) -> Path:
    """A table of thirty-two pictures and their texts in groups of eight; two of the pictures are none."""
    dice = np.random.default_rng(2)
    pictures = [_png(dice) if n not in (4, 21) else b"no picture" for n in range(32)]
    texts = [_words(dice) for _ in range(32)]
    columns = {"image": [{"bytes": picture, "path": None} for picture in pictures], "text": texts}
    pq.write_table(pa.table(columns), path, row_group_size=8)
    return path


def _png(dice: np.random.Generator) -> bytes:
    picture = io.BytesIO()
    Image.fromarray(dice.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(picture, "PNG")
    return picture.getvalue()


def _words(dice: np.random.Generator) -> str:
    return " ".join(WORDS[int(i)] for i in dice.integers(0, len(WORDS), 6))


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
                picture, words = _png(dice), _words(dice)
                broken = (shard, n) in ((1, 3), (3, 9))
                contents = {"png": b"no picture" if broken else picture, "txt": words.encode()}
                for kind, content in contents.items():
                    member = tarfile.TarInfo(f"{shard}_{n:02d}.{kind}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return folder
