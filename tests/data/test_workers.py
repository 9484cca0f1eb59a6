"""Workers end with the process that they decode for, however it ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

KILLED = """
import sys
from mmssl.data.loader import Loader
from mmssl.recipe import Data
if __name__ == "__main__":
    loader = Loader({"": Data(source="toy", limit=64)}, ("image",), batch_size=4, seed=0, workers=2)
    batches = loader.batches(0, 10**6)
    next(batches)
    print("reading", flush=True)
    for _ in batches:
        pass
"""


def group_of(leader):
    """Processes of a session that are not gone, by /proc."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                state, _, _, session = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
            except (OSError, ValueError):
                continue
            if int(session) == leader and state != "Z":
                found.append(int(entry.name))
    return found


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="processes are counted in /proc")
def test_no_worker_outlives_a_killed_run(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(KILLED)
    process = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, start_new_session=True)
    try:
        assert process.stdout.readline() == b"reading\n"
        assert len(group_of(process.pid)) >= 3
        process.kill()
        process.wait()
        end = time.monotonic() + 30
        while (left := group_of(process.pid)) and time.monotonic() < end:
            time.sleep(0.2)
        assert not left
    finally:
        for pid in group_of(process.pid):
            os.kill(pid, signal.SIGKILL)
        process.stdout.close()
