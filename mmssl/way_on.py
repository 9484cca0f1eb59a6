"""How what was stopped is gone on with, for the end of a sentence: whoever trains does not know who called."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

RESUMED = "go on with --resume"
REPEATED = "the same call goes on"
_way: ContextVar[str] = ContextVar("way", default=RESUMED)


def way_on() -> str:
    """`go on with --resume`, or inside of `repeated` that the same call does."""
    return _way.get()


@contextmanager
def repeated() -> Iterator[None]:
    """Inside, what is stopped goes on when the same call is made again: there is no `--resume` to give."""
    before = _way.set(REPEATED)
    try:
        yield
    finally:
        _way.reset(before)
