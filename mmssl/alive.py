"""Whether another process lives: one that was killed and that nobody has buried yet does not."""

from __future__ import annotations

import os
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


def _stat(process: int) -> list[str]:
    try:
        return Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return []
