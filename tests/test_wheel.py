"""What `pip install` brings is the whole library: recipes by name and templates, without a checkout at hand."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from mmssl import catalog
from mmssl.registry import ROOT

PROJECT = ROOT.parent
PIP = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")
SMALL = {"training.steps": 2, "training.schedule.warmup": 0, "training.log_every": 1, "probe.limit": 40}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    # Nothing is downloaded: the environment that runs the tests has all that builds it.
    subprocess.run([*PIP, "wheel", "--no-deps", "--no-build-isolation", "-w", folder, PROJECT], check=True, timeout=300)
    return next(folder.glob("mmssl-*.whl"))


@pytest.mark.long
def test_the_wheel_holds_every_file_of_the_package_and_every_recipe(wheel):
    with zipfile.ZipFile(wheel) as opened:
        inside = {name for name in opened.namelist() if ".dist-info/" not in name}
    package = {str(path.relative_to(PROJECT)) for path in ROOT.rglob("*") if path.is_file() and path.suffix != ".pyc"}
    assert inside == package | {f"mmssl/{path.relative_to(PROJECT)}" for path in catalog.recipe_files()}


@pytest.mark.long
def test_a_recipe_runs_by_name_where_only_the_wheel_is_installed(wheel, tmp_path):
    site, empty = tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    subprocess.run([*PIP, "install", "--no-deps", "--no-index", "--target", site, wheel], check=True, timeout=300)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"PYTHONPATH": str(site), "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}

    changes = [word for key, value in SMALL.items() for word in ("--set", f"{key}={value}")]
    program = (
        "import runpy, sys\n"
        f"sys.argv[1:] = ['run', 'quickstart', '--out', 'by_command', *{changes!r}]\n"
        "try:\n    runpy.run_module('mmssl', run_name='__main__', alter_sys=True)\n"
        "except SystemExit as end:\n    assert not end.code\n"
        "import mmssl, mmssl.recipe\n"
        f"run = mmssl.run('quickstart', {SMALL!r}, quiet=True)\n"
        "print(mmssl.__file__, run.directory, run.step, len(run.history))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=empty, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    said = done.stdout.split()[-4:]
    assert said == [str(site / "mmssl" / "__init__.py"), "runs/quickstart", "2", "3"]
    first, second = (empty / name / "model.safetensors" for name in ("by_command", "runs/quickstart"))
    assert first.read_bytes() == second.read_bytes()
