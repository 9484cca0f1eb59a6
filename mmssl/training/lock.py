"""One writer a run directory: a lock that names who holds it, and is taken over from the dead."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mmssl.alive import began, is_alive
from mmssl.errors import RunError

LOCK = ".lock"


@contextmanager
def locked(directory: Path, *, instead: str = "choose another --out") -> Iterator[None]:
    """Hold the lock of a run directory, made if it is missing.

    Args:
        directory: to write into.
        instead: what else can be done where another process does.

    Raises:
        RunError: where another process holds it, or nothing can be written there.
    """
    lock = directory / LOCK
    own = {"host": socket.gethostname(), "process": os.getpid(), "began": began(os.getpid()), "since": time.ctime()}
    new = not os.path.exists(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with one_at_a_time(directory):
            _take(lock, own, instead)
    except OSError as error:
        if new:
            with suppress(OSError):
                directory.rmdir()
        raise RunError(f"{directory}: cannot be written: {error.strerror or error}; {instead}") from error
    try:
        yield
    finally:
        if _read(lock) == own:
            lock.unlink(missing_ok=True)


def holder(directory: Path) -> str | None:
    """Who writes a run directory at this moment, in words; None where nobody does."""
    found = _read(directory / LOCK)
    return None if found is None or _gone(found) else _in_words(found)


@contextmanager
def one_at_a_time(directory: Path) -> Iterator[None]:
    """Only one process of this machine at a time is inside, so that what it reads there holds until it has written."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        with suppress(OSError):  # no such locks on this file system
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _take(lock: Path, own: dict[str, Any], instead: str) -> None:
    # Written under a name of its own first, so that nobody reads half of it.
    mine = lock.with_name(f"{LOCK}.{own['host']}.{own['process']}")
    for other in lock.parent.glob(f"{LOCK}.*"):  # of processes that were killed while they took the lock
        owner = other.name.removeprefix(f"{LOCK}.{own['host']}.")
        if owner.isdecimal() and not is_alive(int(owner), began(int(owner))):
            other.unlink(missing_ok=True)
    try:
        mine.write_text(json.dumps(own), encoding="utf-8")
        while True:
            try:
                _name(mine, lock)
                return
            except FileExistsError:
                found = _read(lock)
                if found is not None and not _gone(found):
                    raise RunError(
                        f"{lock.parent}: {_in_words(found)}; wait for it or {instead} (if that "
                        f"machine is gone, delete {lock})"
                    ) from None
                lock.unlink(missing_ok=True)
    finally:
        mine.unlink(missing_ok=True)


def _name(mine: Path, lock: Path) -> None:
    """Give the file its other name; raises FileExistsError where that is taken."""
    try:
        os.link(mine, lock)
    except FileExistsError:
        raise
    except OSError:  # no hard links on this file system
        descriptor = os.open(lock, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        os.write(descriptor, mine.read_bytes())
        os.close(descriptor)


def _read(lock: Path) -> dict[str, Any] | None:
    """Who holds it; None where nobody does, or nobody can tell."""
    if not lock.is_file():  # nor waits for a pipe
        return None
    try:
        found = json.loads(lock.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _in_words(holder: dict[str, Any]) -> str:
    process, host, since = (holder.get(key) for key in ("process", "host", "since"))
    return f"process {process} on {host} has been writing there since {since}"


def _gone(holder: dict[str, Any]) -> bool:
    """Whether the holder was a process of this machine that is no more; a later one may have its number."""
    if holder.get("host") != socket.gethostname():
        return False
    process = holder.get("process")
    if not isinstance(process, int) or process <= 0:
        return True
    return not is_alive(process, str(holder.get("began")))
