"""Disks that are full: what was there stays whole, and one sentence says so."""

from __future__ import annotations

import errno
import json
import resource
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_faults import recipe

import mmssl
from mmssl.adaptation.probes.finetune import Finetune
from mmssl.atomic import write_text
from mmssl.comparison.plan import PLAN
from mmssl.errors import RunError
from mmssl.hub.export import fill
from mmssl.objectives.base import Chance, Panel
from mmssl.recipe import Training
from mmssl.report.figures import draw_panels
from mmssl.training import checkpoint
from mmssl.training.history import History
from mmssl.training.launch import make_accelerator
from mmssl.training.lock import locked
from mmssl.training.progress import Reporter


@contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """No file grows beyond so many bytes inside, as on a disk that fills up."""
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_is_named_and_leaves_no_half_files(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("before")
    with files_up_to(2048), pytest.raises(OSError, match=r"too large: '.*a\.json'"):
        write_text(tmp_path / "a.json", "x" * 5000)
    with files_up_to(2048), pytest.raises(RunError, match=r"cls: cannot be written: Error while serializing"):
        fill(tmp_path / "cls", lambda folder: save_file({"a": torch.zeros(5000)}, folder / "a.safetensors"), (), "x")
    panel = Panel("a", [torch.rand(3, 64, 64)])
    for name in ("a.png", "a.svg"):
        with files_up_to(2048), pytest.raises(OSError, match="too large"):
            draw_panels([panel], tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    assert (tmp_path / "a.json").read_text() == "before"


@pytest.mark.long
def test_a_disk_that_is_full_in_the_midst_of_a_run_is_one_sentence_and_it_goes_on_to_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mmssl.run(recipe(log_every=1), out=tmp_path / "whole", quiet=True)
    out = tmp_path / "full"
    log = Reporter.log

    def fills_up(self: Reporter, record: dict[str, Any]) -> None:
        if record["step"] == 5:
            with files_up_to((out / "metrics.jsonl").stat().st_size + 20):
                log(self, record)
        log(self, record)

    monkeypatch.setattr(Reporter, "log", fills_up)
    with pytest.raises(
        RunError, match=r"metrics\.jsonl cannot be written: File too large; make room, and then go on with --resume"
    ):
        mmssl.run(recipe(log_every=1), out=out, quiet=True)
    assert not (out / "metrics.jsonl").read_text().endswith("\n")  # half of a line
    monkeypatch.undo()
    mmssl.run(recipe(log_every=1), out=out, resume=True, quiet=True)
    files = [load_file(one / "model.safetensors") for one in (tmp_path / "whole", out)]
    assert all(torch.equal(value, files[1][name]) for name, value in files[0].items())
    steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert steps == [*range(7)]


def test_a_call_without_resume_says_that_the_same_call_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = torch.nn.Linear(30, 30)
    optimizer = torch.optim.SGD(network.parameters())

    def fills_up(out: Path, **_: Any) -> None:
        with files_up_to(2048):
            checkpoint.save(out / "runs" / "a-0", network, optimizer, {"step": 1}, True)

    (tmp_path / PLAN).write_text("{}")
    monkeypatch.setattr("mmssl.comparing.fill", fills_up)
    with pytest.raises(RunError, match=r"free space, and then the same call goes on$"):
        mmssl.compare(out=tmp_path)
    with pytest.raises(RunError, match=r"free space, and then go on with --resume$"):
        fills_up(tmp_path)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("mmssl.comparing.fill", full)
    monkeypatch.setattr(Finetune, "score", full)
    says = r"a file cannot be written: No space left on device; make room, and then the same call goes on$"
    with pytest.raises(RunError, match=says):
        mmssl.compare(out=tmp_path)
    encoder = mmssl.encoder("timm/resnet10t", modality="image", channels=[8, 8, 8, 8])
    with pytest.raises(RunError, match=says):
        mmssl.adapt(encoder, "toy", probe="finetune", save=tmp_path / "tuned")


def test_a_lock_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    for folder in (tmp_path / "new", tmp_path):
        with files_up_to(0), pytest.raises(RunError, match="cannot be written: File too large"), locked(folder):
            pass
    with pytest.raises(RunError, match="cannot be written: File name too long"):
        mmssl.run(recipe(), out=tmp_path / ("a" * 300), quiet=True)
    assert not list(tmp_path.iterdir())


def test_what_the_thread_of_tensorboard_cannot_write_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[threading.ExceptHookArgs] = []
    monkeypatch.setattr(threading, "excepthook", told.append)
    monkeypatch.setattr(Reporter, "log", lambda *_: None)  # of metrics.jsonl
    accelerator = make_accelerator(Training(steps=9, batch_size=4), tmp_path, False)

    def log_on(history: History) -> None:
        for step in range(500):
            history.log({"step": step, "loss": 1.0})
            time.sleep(0.01)

    history = History(accelerator, tmp_path, 9, 0, Chance(1.0), True)
    with pytest.raises(OSError, match="too large"), history, files_up_to(8):
        log_on(history)
    assert not told
    assert threading.excepthook == told.append


def test_weights_may_be_read_by_whoever_may_read_other_files(tmp_path: Path) -> None:
    def write(folder: Path) -> None:
        save_file({"a": torch.zeros(3)}, folder / "a.safetensors")
        (folder / "README.md").write_text("x")

    fill(tmp_path / "exported", write, (), "x")
    modes = {path.stat().st_mode for path in (tmp_path / "exported").iterdir()}
    assert len(modes) == 1, modes
