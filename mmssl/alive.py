"""Whether another process lives, and to end with it: one that was killed and that nobody has buried yet does not."""

from __future__ import annotations

import os
import threading
import time
from functools import cache
from pathlib import Path


def began(process: int) -> str:
    """When a process started, in ticks since the machine did; empty where /proc does not tell."""
    fields = _stat(process)
    return fields[19] if len(fields) > 19 else ""


def is_alive(process: int, since: str) -> bool:
    """Whether it lives and is the one that began then; a later one may have its number.

    Args:
        process: its number on this machine.
        since: what `began` said of it.
    """
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    fields = _stat(process)
    return began(process) == since and fields[:1] not in (["Z"], ["X"])


def end_with(process: int, since: str) -> None:
    """Have this process end within a second or two of another one, even if that was killed; see `is_alive`."""
    threading.Thread(target=_watch, args=(process, since), daemon=True).start()


@cache
def end_with_launcher() -> None:
    """Have a process that torchrun or accelerate launch started end with it; does nothing elsewhere.

    They stop their processes where they can; one that is killed leaves them, and they would go on training unseen.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with(os.getppid(), began(os.getppid()))


def _watch(process: int, since: str) -> None:
    while is_alive(process, since):
        time.sleep(1)
    os._exit(1)  # the main thread may hang in a queue or a collective call


def _stat(process: int) -> list[str]:
    try:
        return Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return []
