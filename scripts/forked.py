"""Processes forked from one that has imported everything, each with a limit of memory and time; for fuzz_recipes.py."""

from __future__ import annotations

import faulthandler
import os
import resource
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple


class Ended(NamedTuple):
    """A child that is no more: its number, exit status (negative: signal), seconds, and whether its time ran out."""

    number: int
    status: int
    seconds: float
    late: bool


def each(
    numbers: list[int], child: Callable[[int], None], log: Callable[[int], Path], jobs: int, memory: int, seconds: float
) -> Iterator[Ended]:
    """`child(number)` in a process of its own for every number, a few at a time, as they end.

    Args:
        numbers: of the children.
        child: what each does; its output goes to its log, and so does the stack of one that is late.
        log: number -> file.
        jobs: children at a time.
        memory: bytes of address space that a child may take in addition to what it has when it begins.
        seconds: until a child is ended, together with every process that it started.
    """
    waiting, running = list(reversed(numbers)), dict[int, tuple[int, float]]()
    while waiting or running:
        while waiting and len(running) < jobs:
            number = waiting.pop()
            pid = os.fork()
            if pid == 0:
                _live(child, number, log(number), memory)
            running[pid] = number, time.monotonic()
        time.sleep(0.01)
        for pid, (number, began) in list(running.items()):
            found, status = os.waitpid(pid, os.WNOHANG)
            took = time.monotonic() - began
            late = not found and took > seconds
            if late:
                os.kill(pid, signal.SIGUSR1)  # its stack
                time.sleep(0.3)
            if late or found:
                with suppress(ProcessLookupError):
                    os.killpg(pid, signal.SIGKILL)
                if late:
                    _, status = os.waitpid(pid, 0)
                del running[pid]
                yield Ended(number, os.waitstatus_to_exitcode(status), took, late)


def _live(child: Callable[[int], None], number: int, log: Path, memory: int) -> None:
    """The life of a child, which never returns."""
    status = 1
    try:
        os.setsid()
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        faulthandler.enable()
        faulthandler.register(signal.SIGUSR1)
        pages = int(Path("/proc/self/statm").read_text("utf-8").split()[0])
        limit = pages * resource.getpagesize() + memory
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        child(number)
        status = 0
    finally:
        os._exit(status)
