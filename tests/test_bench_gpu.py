"""scripts/bench_gpu.py: every row runs with small networks, also where packages are missing; its figures by hand."""

from __future__ import annotations

import os
import subprocess
import sys

import bench_gpu
import pytest
import torch
from bench_loop import Timed, in_memory

from mmssl.batch import Batch
from mmssl.registry import ROOT

SMALL = ["--cpu", "--tiny", "--steps", "1", "--rounds", "1", "--workers", "0", "--strict"]


@pytest.mark.long
def test_every_row_runs_with_small_networks(capsys: pytest.CaptureFixture[str]) -> None:
    bench_gpu.main(SMALL)
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(table) == 2 + len(bench_gpu.rows())
    for line in table[2:]:
        cells = dict(zip(bench_gpu.COLUMNS, line.strip("| ").split(" | "), strict=True))
        assert float(cells["samples/s"].replace(",", "")) > 0
        assert float(cells["data-wait"].rstrip("%")) >= 0


@pytest.mark.long
def test_without_timm_open_clip_datasets_and_av_the_rest_runs() -> None:
    program = (
        "import sys; sys.modules.update(dict.fromkeys(['timm', 'open_clip', 'datasets', 'av']));"
        "import bench_gpu; bench_gpu.main(sys.argv[1:])"
    )
    rest = ["--rows", "clip", "mae", "wav2vec2"]
    paths = os.pathsep.join([str(ROOT.parent), str(ROOT.parent / "scripts")])
    environment = {**os.environ, "PYTHONPATH": paths}
    done = subprocess.run(
        [sys.executable, "-c", program, *SMALL, *rest], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "done without: timm, open_clip, datasets, av" in done.stdout
    assert done.stdout.count("needs timm") == 4  # two rows, while they run and in the table
    assert "CLIP ViT-B/32: done" in done.stdout


def test_a_share_of_the_peak_and_an_overhead_are_what_they_say() -> None:
    found = bench_gpu.Found(batch=10, plain=[1.0, 2.0, 1.0], loop=[1.1, 2.1, 1.1], other=[2.2, 4.2, 2.2], operations=55)
    assert found.mfu(1000.0) == pytest.approx(55 * 10 / 1.1 / 1000)
    assert found.overhead == pytest.approx(0.1)
    assert found.faster == pytest.approx(2.0)
    row = next(iter(bench_gpu.rows().values()))
    missed = [line.rpartition(" ")[2] for line in found.verdicts(1000.0, row)]
    assert missed == ["met", "met", "MISSED", "measured"]


def test_a_row_that_fails_or_never_ends_leaves_the_others_their_time() -> None:
    def fails(*given: object) -> None:
        raise ValueError("no such card\nand more")

    row = bench_gpu.rows()["SimCLR ResNet-50"]
    options = bench_gpu.argparse.Namespace(tiny=True, strict=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench_gpu, "measure", fails)
        assert bench_gpu.measured("x", row, options, torch.device("cpu"), 5.0).note == "ValueError: no such card"
        patch.setattr(bench_gpu, "measure", lambda *given: bench_gpu.time.sleep(60))
        assert bench_gpu.measured("x", row, options, torch.device("cpu"), 0.1).note.startswith("TimeoutError")


def test_timed_steps_end_at_their_number_or_at_the_deadline() -> None:
    batches: list[Batch] = [{"id": torch.arange(2)}]
    for deadline, done in ((float("inf"), 4), (0.0, 1)):
        timed = Timed(in_memory(batches), 4, torch.device("cpu"), deadline)
        with pytest.raises(bench_gpu.Enough):
            for _ in timed.batches(0, 100):
                pass
        assert timed.done == done
