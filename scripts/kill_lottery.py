"""Runs that are killed at random moments and resumed until they end: what they leave equals an undisturbed run.

    python scripts/kill_lottery.py                     300 kills
    python scripts/kill_lottery.py --kills 60 --seed 3 --tasks simclr hubert
    python scripts/kill_lottery.py --disk              a disk that refuses, in place of kills

Every task at toy size, rows decoded in the main process or by two workers, on one and two processes, there with whole
weights and with sharded ones, from the toy world, from a folder and a parquet table in which two pictures are broken,
and streamed from tar files with the same, here or on a server that fails now and then. SIGKILL falls at a random
moment, or before or after a random system call that makes a file, flushes, renames or links it: in the middle of a
save, or of a record. Processes are forked from one that has imported everything; every seventh run is started by
`python -m mmssl` or torchrun.

With `--disk` such a call fails in place of the kill, or from a random moment on no file may grow beyond a random size.
A run has to survive that, or to end with one sentence, and goes on once there is room.

Compared with the undisturbed run, bit for bit: the weights and the optimizer's state; all that metrics.jsonl holds but
times; errors.jsonl. And soon after each end no process of the run is left. The exit status is 1 where
anything differs.
"""

from __future__ import annotations

import argparse
import collections
import errno
import faulthandler
import json
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", MPLBACKEND="agg", CUDA_VISIBLE_DEVICES="")

import torch
import yaml
from lottery_runs import STREAMS, TASKS, Run, making, sources_of
from safetensors.torch import load_file

import mmssl
import mmssl.audit.verdict
import mmssl.report.figures
import mmssl.report.page
import mmssl.runs
from mmssl.errors import MmsslError
from mmssl.registry import components, find
from mmssl.training import checkpoint

MARK = "MMSSL_LOTTERY"
CALLS = ("fsync", "rename", "replace", "link", "unlink", "mkdir")
TIMES = {"samples_per_second", "data_wait", "peak_memory_gib", "eta"}
SECONDS = 60.0
"""In which all processes of a killed run have to be gone."""
END = 120.0
"""Seconds in which a run ends by itself; the launcher takes its time to stop the others."""
SAID = 3
"""Exit status of a process that ended with one sentence."""


class Fate(NamedTuple):
    """How a start ends: SIGKILL after so many seconds, or at a call; neither for one that is left alone.

    With `room`, nobody is killed: from then on no file may have more bytes than that, or the call fails.
    """

    seconds: float | None = None
    call: int | None = None
    before: bool = True
    rank: int | None = None  # None for all
    room: int | None = None


def start(run: Run, tree: Path, out: Path, fate: Fate, mark: str) -> list[subprocess.Popen[bytes] | int]:
    """Start it and wait until it was killed or has ended; True where it ended well."""
    environment = {**os.environ, MARK: mark, "PYTHONFAULTHANDLER": "1"}
    if run.real:
        command = [sys.executable, "-m"]
        if run.processes > 1:
            command += ["torch.distributed.run", "--standalone", f"--nproc_per_node={run.processes}", "-m"]
        command += ["mmssl", "run", str(tree), "--out", str(out), "--resume"]
        with (out.parent / "log").open("ab") as log:
            return [subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)]
    port = free_port()
    return [fork(run, rank, port, tree, out, fate, mark) for rank in range(run.processes)]


def fork(run: Run, rank: int, port: int, tree: Path, out: Path, fate: Fate, mark: str) -> int:
    """One process of a run, as its launcher would start it."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        os.setsid()
        log = os.open(out.parent / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        faulthandler.enable()
        os.environ[MARK] = mark
        sys.modules["__main__"] = ModuleType("__main__")  # else each worker imports this file
        if run.processes > 1:
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": run.processes, "LOCAL_WORLD_SIZE": run.processes}
            os.environ.update({key: str(value) for key, value in place.items()})
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        left = end_at_call(fate.call if fate.rank in (None, rank) else None, fate.before, fate.room is not None)
        mmssl.run(tree, out=out, resume=True, quiet=True)
        make_room(os.getpid())
        if rank == 0:
            (out.parent / "calls").write_text(str(-left[0]), encoding="utf-8")
        status = 0
    except BaseException as error:
        make_room(os.getpid())
        if isinstance(error, MmsslError) and "\n" not in str(error):
            status = SAID
        traceback.print_exc()
    finally:
        with suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def make_room(pid: int, size: int | None = None) -> None:
    """No file of a process may have more than so many bytes; None for as many as it likes."""
    most = resource.prlimit(pid, resource.RLIMIT_FSIZE)[1]
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (most if size is None else size, most))


def end_at_call(number: int | None, before: bool, refused: bool) -> list[int]:
    """Have this process killed by itself before or after its call of that number, among those that change files.

    Args:
        number: of the call; None for none.
        before: whether it dies before the call.
        refused: that call fails, and nobody is killed.

    Returns:
        A count of one: the calls that are left until then; where there is no number, minus those that were made.
    """
    left = [number or 0]

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def counting(*arguments: Any, **keywords: Any) -> Any:
            left[0] -= 1
            if left[0] == 0 and number and refused:
                raise OSError(
                    errno.ENOSPC, os.strerror(errno.ENOSPC), *(a for a in arguments[:1] if isinstance(a, Path))
                )
            if left[0] == 0 and before and number:
                os.kill(os.getpid(), signal.SIGKILL)
            result = call(*arguments, **keywords)
            if left[0] == 0 and number:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return counting

    for name in CALLS:
        if refused and name == "unlink":  # a full disk lets files go
            continue
        setattr(os, name, counted(getattr(os, name)))
    return left


def see_through(run: Run, begun: list[Any], fate: Fate, out: Path) -> tuple[bool, bool]:
    """Wait for the end of all processes, killing as it was drawn; whether it was killed, and whether all ended well."""
    began = time.monotonic()
    pending = {(one.pid if run.real else one): rank for rank, one in enumerate(begun)}
    statuses: dict[int, int] = {}
    killed, asked, late = False, None, False
    while pending:
        time.sleep(0.005)
        now = time.monotonic() - began
        if fate.seconds is not None and not killed and now > fate.seconds:
            if fate.room is None:
                killed = True
                strike(run, list(pending), fate)
            else:
                for pid in pending:
                    make_room(pid, fate.room)
                fate = fate._replace(seconds=None)
        for pid in list(pending):
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                statuses[pid] = os.waitstatus_to_exitcode(status)
                del pending[pid]
        failed = [status for status in statuses.values() if status]
        if failed and pending and asked is None:
            asked = now  # a launcher ends the others
            for pid in pending:
                os.kill(pid, signal.SIGTERM)
        if now > END and not late:
            late = True
            for pid in pending:  # says where it is, and ends
                os.kill(pid, signal.SIGABRT)
            time.sleep(1)
        elif (asked is not None and now > asked + 20) or late:
            for pid in pending:
                os.kill(pid, signal.SIGKILL)
    if run.real:
        for one in begun:
            one.returncode = statuses[one.pid]
    if late:
        where = (out.parent / "log").read_text("utf-8")[-6000:]
        raise RuntimeError(f"{run}: not ended after {END:g} seconds: it hangs, or the machine is busy\n{where}")
    said = statuses and fate.room is not None and SAID in statuses.values()
    died = killed or said or -signal.SIGKILL in statuses.values()
    if not died and any(statuses.values()):
        raise RuntimeError(f"{run}: exit status {statuses}\n{(out.parent / 'log').read_text('utf-8')[-3000:]}")
    return died, not any(statuses.values())


def strike(run: Run, pids: list[int], fate: Fate) -> None:
    """SIGKILL for a run's processes, or for one of them."""
    if run.real and run.processes > 1:  # the launcher's children
        children = Path(f"/proc/{pids[0]}/task/{pids[0]}/children").read_text("utf-8").split()
        pids = [int(child) for child in children] or pids
    for rank, pid in enumerate(pids):
        if fate.rank in (None, rank):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def left_over(mark: str) -> list[int]:
    """Processes that live and were started by a run with this mark."""
    found, wanted = [], f"{MARK}={mark}".encode()
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, IndexError):
            marked = wanted in (entry / "environ").read_bytes().split(b"\0")
            if marked and (entry / "stat").read_text("utf-8").rpartition(")")[2].split()[0] != "Z":
                found.append(int(entry.name))
    return found


def wait_until_gone(mark: str) -> tuple[float, list[int]]:
    """Seconds until no process of a run is left, and those that still are after `SECONDS`, which are then ended."""
    began = time.monotonic()
    while (left := left_over(mark)) and time.monotonic() - began < SECONDS:
        time.sleep(0.05)
    took = time.monotonic() - began
    for pid in left:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return took, left


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def traces(out: Path) -> dict[str, Any]:
    """What a finished run left, as far as it can be compared."""
    last = checkpoint.newest(out)
    assert last is not None
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text("utf-8").splitlines()]
    errors = out / "errors.jsonl"
    lines = errors.read_text("utf-8").splitlines() if errors.exists() else []
    files = [path for path in out.rglob("*") if path.is_file() and "tensorboard" not in path.parts]
    return {
        "weights": load_file(out / checkpoint.WEIGHTS),
        "optimizer": load_file(last / "optimizer.safetensors"),
        "state": checkpoint.read_state(last),
        "metrics.jsonl": [{key: value for key, value in record.items() if key not in TIMES} for record in records],
        "errors.jsonl": sorted(lines),
        "files": sorted(str(path.relative_to(out)) for path in files),
    }


def differences(a: Any, b: Any, place: str = "") -> list[str]:
    """What is not the same, bit for bit: the first place of each kind of trace."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return [] if torch.equal(a, b) else [f"{place} differs"]
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        found = [differences(a[key], b[key], f"{place} {key}".strip()) for key in a]
        return [one for some in found for one in (some if not place else some[:1])][: None if not place else 1]
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return next((some for some in (differences(x, y, place) for x, y in zip(a, b, strict=True)) if some), [])
    if isinstance(a, list) and isinstance(b, list):
        return [f"{place}: {[x for x in a if x not in b]} / {[y for y in b if y not in a]}, {len(a)} / {len(b)}"[:600]]
    return [] if a == b else [f"{place}: {a} / {b}"[:600]]


def draw(dice: random.Random, run: Run, seconds: float, calls: int, disk: bool) -> Fate:
    """When and whom SIGKILL hits: more often early, so that one run is killed many times before it ends."""
    early = dice.random()
    if disk:
        room = int(2 ** dice.uniform(0, 21))  # from a byte to more than any weights have
        if dice.random() < 0.4:
            return Fate(seconds=early * dice.uniform(0, seconds), room=room)
        return Fate(call=dice.randint(1, 1 + int(early * calls)), rank=0, room=room)
    if run.real or dice.random() < 0.4:
        imports = 3.0 * run.real
        rank = dice.choice([None, *range(run.processes)]) if run.processes > 1 else None
        return Fate(seconds=imports + early * dice.uniform(0, seconds), rank=rank)
    rank = dice.choice([None, 0]) if run.processes > 1 else None  # the others change few files
    return Fate(call=dice.randint(1, 1 + int(early * calls)), before=dice.random() < 0.5, rank=rank)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--disk", action="store_true", help="writes fail, and nobody is killed")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS, metavar="TASK")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for kind in ("objective", "encoder", "backbone"):
        for name in components(kind):
            find(kind, name)
    dice = random.Random(options.seed)
    tally: collections.Counter[str] = collections.Counter()
    wrong: list[str] = []
    tasks: set[str] = set()
    slowest, number, told = 0.0, 0, 0
    expected: dict[Run, tuple[dict[str, Any], float, int]] = {}
    with tempfile.TemporaryDirectory() as place, making(Path(place)):

        def prepare(run: Run, name: str) -> tuple[Path, Path]:
            folder = Path(place) / name
            folder.mkdir()
            (folder / "recipe.yaml").write_text(yaml.safe_dump(run.tree(Path(place))), encoding="utf-8")
            return folder / "recipe.yaml", folder / "run"

        while tally["kills"] < options.kills:
            task = options.tasks[number % len(options.tasks)]
            processes, real = dice.choice([1, 1, 1, 2]), number % 7 == 6 and not options.disk
            sharded = processes > 1 and dice.random() < 0.5
            run = Run(task, dice.choice(sources_of(task)), processes, dice.choice([0, 0, 0, 2]), real, sharded)
            alone = run._replace(workers=0, real=False)
            if alone not in expected:
                tree, out = prepare(alone, f"alone{number}")
                began = time.monotonic()
                see_through(alone, start(alone, tree, out, Fate(), "alone"), Fate(), out)
                took = time.monotonic() - began
                expected[alone] = traces(out), took, int((out.parent / "calls").read_text("utf-8"))
            right, seconds, calls = expected[alone]
            tree, out = prepare(run, f"{number}")
            ended, kills, most = False, 0, 4 if run.real else 20
            while not ended:
                fate = Fate()
                if kills < most:
                    fate = draw(dice, run, seconds * (2 if run.workers else 1), calls, options.disk)
                mark = f"{options.seed}.{number}.{kills}.{os.getpid()}"
                saving = len(list(out.glob("state/.writing_*")))
                try:
                    died, ended = see_through(run, start(run, tree, out, fate, mark), fate, out)
                except RuntimeError as error:
                    wrong.append(f"{run}, after {kills} kills: {error}")
                    break
                took, left = wait_until_gone(mark)
                slowest = max(slowest, took)
                if left:
                    wrong.append(f"{run}: {len(left)} processes live {SECONDS:.0f} s after its end")
                kills += died
                tally["kills"] += died
                tally["inside a save"] += died and len(list(out.glob("state/.writing_*"))) > saving
                two, broken, stream = run.processes - 1, run.source != "toy", run.source in STREAMS
                kinds = {"workers": run.workers, "two": two, "sharded": run.sharded, "real": run.real}
                kinds |= {"broken": broken, "stream": stream, "http": run.source == "http"}
                for what, has in kinds.items():
                    tally[what] += bool(died and has)
            else:
                wrong += [f"{run}, after {kills} kills: {one}" for one in differences(right, traces(out))]
            for one in wrong[told:]:
                print(one, file=sys.stderr)
            told = len(wrong)
            tally["runs"] += 1
            tasks.add(task)
            number += 1
            print(f"{tally['kills']:>4} kills, {tally['runs']} runs: {run}", file=sys.stderr, flush=True)
    what = "failed writes" if options.disk else "kills"
    print(f"{tally['kills']} {what} of {tally['runs']} runs of {len(tasks)} tasks, seed {options.seed}")
    print(
        f"  {tally['workers']} with two workers, {tally['two']} on two processes, {tally['sharded']} of these sharded,"
    )
    print(f"  {tally['real']} of those that were started by python -m mmssl or torchrun,")
    print(f"  {tally['broken']} with broken files, {tally['stream']} of them streamed, {tally['http']} from a server")
    print(f"  {tally['inside a save']} left a checkpoint half-written")
    print(f"  processes of a killed run were gone after {slowest:.1f} s at most")
    print(f"  {len(wrong)} differences from the undisturbed runs")
    print("\n".join(wrong))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
