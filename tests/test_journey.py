"""The README's walk from a folder of pictures to a classifier that plain timm reads."""

import subprocess
import sys

import pytest
from journey import commands

from mmssl.registry import ROOT

SCRIPT = ROOT.parent / "scripts" / "journey.py"


def test_the_walk_leads_from_a_comparison_to_a_card():
    found = commands()
    marks = ["mmssl compare", "--probe finetune", "mmssl predict", "export classifier", "--dry-run card"]
    places = [next(i for i, call in enumerate(found) if mark in call) for mark in marks]
    assert places == sorted(places)
    assert all(call.startswith("mmssl ") and "#" not in call for call in found)


@pytest.mark.slow
def test_every_command_of_it_runs(tmp_path):
    done = subprocess.run(
        [sys.executable, SCRIPT, "--out", tmp_path / "walk"], capture_output=True, text=True, timeout=3600
    )
    assert done.returncode == 0, done.stderr
    assert "plain timm gives the answers and probabilities of 16 pictures" in done.stdout
    assert (tmp_path / "walk" / "card" / "README.md").exists()
