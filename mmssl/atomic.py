"""Files that are whole or absent, whenever the process or the machine stops."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mmssl.errors import RunError
from mmssl.way_on import way_on

REFUSALS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}
"""Of a disk that is full or broken, where a write names no file."""
_MASK = os.umask(0o077)
os.umask(_MASK)  # there is no other way to ask


def temporary_name(path: Path) -> Path:
    """Where `path` is written before it gets its name: next to it, so that the renaming is one step."""
    return path.with_name(f".writing_{path.name}")


def write_text(path: Path, text: str) -> None:
    """Write a file under another name, flush it to the disk, then put it in the place of what was there."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Where to write a file that is put in the place of `path` once it is whole, and removed where it is not.

    Raises:
        OSError: naming the file, which a write to a full disk does not.
    """
    temporary = temporary_name(path)
    try:
        yield temporary
        flush([temporary])
        temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno and error.filename is None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    flush([path.parent])


def flush(paths: Iterable[Path]) -> None:
    """Have the disk hold what was written to these files, and the names in these folders.

    Files may be read by whoever may read other new ones: safetensors writes for its owner alone.
    """
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            if stat.S_IMODE(os.fstat(descriptor).st_mode) == 0o600:
                with suppress(OSError):  # no such modes on this file system
                    os.fchmod(descriptor, 0o666 & ~_MASK)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def append_lines(path: Path, lines: Iterable[str]) -> None:
    """Append whole lines in one write, so that those of several processes never mix.

    Raises:
        OSError: naming the file, whose last line may then be a part of one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    content = "".join(f"{line}\n" for line in lines).encode()
    try:
        while content:  # a disk that fills up takes a part of it before it refuses
            content = content[os.write(descriptor, content) :]
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        os.close(descriptor)


@contextmanager
def writing(directory: Path, instead: str = "choose another --out") -> Iterator[None]:
    """One sentence for a directory that can no longer be written.

    Args:
        directory: of the files that are written inside.
        instead: what to do where it may not be written at all.

    Raises:
        RunError: in place of an OSError of a file in it, or of a disk that is full or broken.
    """
    try:
        yield
    except OSError as error:
        refused = error.errno in REFUSALS
        name = None if error.filename is None else Path(os.fsdecode(error.filename))
        if not refused if name is None else directory.absolute() not in name.absolute().parents:
            raise
        reason = error.strerror or str(error)
        way_out = f"make room, and then {way_on()}" if refused else instead
        raise RunError(f"{directory}: {name or 'a file'} cannot be written: {reason}; {way_out}") from error
