"""Bytes of a file at a path or an address, a range at a time.

Where a server fails the run waits, says so, and asks again.
"""

from __future__ import annotations

import io
import logging
import time
from collections.abc import Callable
from typing import Any, TypeVar

from mmssl.errors import DataError, without_passwords
from mmssl.way_on import way_on

TRIES = 8
FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0
"""Seconds between tries, doubled from one to the next: two minutes in all."""
SILENCE = 60.0
"""Seconds without a byte after which an answer is given up."""

T = TypeVar("T")
log = logging.getLogger(__name__)


class Ranges(io.RawIOBase):
    """A file for reading and seeking; a read takes the bytes asked for and none ahead.

    Args:
        file: path, or address of any file system that fsspec knows.
        at: where reading begins, in bytes.
        end: where the file is taken to end; None for its own end.

    Raises:
        OSError: where there is no such file.
        DataError: where a server fails `TRIES` times in a row, or answers with whole files only.
    """

    def __init__(self, file: str, at: int = 0, end: int | None = None) -> None:
        self.file, self._at, self._size = file, at, -1 if end is None else end
        self._local = open(file, "rb") if "://" not in file else None  # noqa: SIM115 - closed with this one

    def close(self) -> None:
        """Close the file."""
        if self._local is not None:
            self._local.close()
        super().close()

    def readable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """True."""
        return True

    def tell(self) -> int:
        """Where the next read begins."""
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """See `io.IOBase`."""
        self._at = offset + (0, self._at, self.size if whence == io.SEEK_END else 0)[whence]
        return self._at

    @property
    def size(self) -> int:
        """In bytes."""
        if self._size < 0:
            self._size = _size(self.file) if self._local is None else self._local.seek(0, io.SEEK_END)
        return self._size

    def readinto(self, buffer: Any) -> int:
        """See `io.RawIOBase`."""
        content = self._bytes(self._at, min(self._at + len(buffer), self.size))
        buffer[: len(content)] = content
        self._at += len(content)
        return len(content)

    def _bytes(self, start: int, stop: int) -> bytes:
        if start >= stop:
            return b""
        if self._local is None:
            return fetch(self.file, start, stop)
        self._local.seek(start)
        return self._local.read(stop - start)


def reach(file: str) -> None:
    """Ask for a file at an address without reading it, waiting for a server that fails.

    Raises:
        OSError: where the server refuses, with what it answers.
        DataError: where it fails `TRIES` times in a row.
    """
    files, path = _opened(file)
    _patiently(file, lambda: files.info(path))


def fetch(file: str, start: int | None = None, stop: int | None = None) -> bytes:
    """Bytes `start` to `stop - 1` of a file at an address, or all; see `Ranges`."""
    from fsspec.asyn import AsyncFileSystem

    files, path = _opened(file)

    def ask() -> bytes:
        if isinstance(files, AsyncFileSystem):
            content: bytes = files.cat_file(path, start=start, end=stop)
        else:
            with files.open(path, "rb", cache_type="none") as opened:
                opened.seek(start or 0)
                content = opened.read(-1 if stop is None else stop - (start or 0))
        if start is not None and stop is not None and len(content) != stop - start:
            if len(content) > stop - start:
                raise DataError(f"{file}: the server answers with whole files, not with parts of them; download it")
            raise ConnectionError(f"the answer broke off after {len(content):,} of {stop - start:,} bytes")
        return content

    return _patiently(file, ask)


def _size(file: str) -> int:
    files, path = _opened(file)
    size = _patiently(file, lambda: files.size(path))
    if size is None:
        raise DataError(
            f"{file}: the server does not say how large it is, so that no part can be asked for; download it"
        )
    return int(size)


def _opened(file: str) -> tuple[Any, str]:
    """File system and path."""
    from datasets.utils.file_utils import _prepare_path_and_storage_options
    from fsspec.core import url_to_fs

    address, options = _prepare_path_and_storage_options(file)
    if address.startswith(("http://", "https://")):
        from aiohttp import ClientTimeout

        patience = ClientTimeout(total=None, sock_connect=SILENCE, sock_read=SILENCE)
        options = {**(options or {}), "client_kwargs": {"timeout": patience}}
    files, path = url_to_fs(address, **(options or {}))
    return files, path


def _patiently(file: str, ask: Callable[[], T]) -> T:
    for attempt in range(1, TRIES + 1):
        try:
            return ask()
        except Exception as error:
            wait_after(file, error, attempt)
    raise AssertionError("the last try returns or raises")


def wait_after(file: str, caught: Exception, attempt: int) -> None:
    """Wait for a server that has failed, and say so.

    Args:
        file: that it was asked for.
        caught: what was raised, and is raised anew where it will not go right the next time.
        attempt: how often it has failed, 1 for once.

    Raises:
        OSError: where the server refuses, with what it answers.
        DataError: where that was the last attempt of `TRIES`.
    """
    # fsspec says of everything that goes wrong that the file is not found, and why in the cause.
    hidden = isinstance(caught, FileNotFoundError) and isinstance(caught.__cause__, Exception)
    error = caught.__cause__ if hidden else caught
    if type(error).__name__ == "TooManyRedirects":  # of any of the libraries that ask; none says it in words
        raise OSError(
            f"{file}: the server refers from one address to the next without end; give that of the file itself"
        ) from error
    status = _status(error)
    if not _passes(error, status):
        if status is None:
            raise caught
        said = f"{status} {getattr(error, 'message', '')}".strip()
        raise OSError(f"{file}: the server answers {said}") from error
    reason = " ".join(str(error).split()) or type(error).__name__
    if attempt == TRIES:
        raise DataError(
            f"{file}: the server failed {TRIES} times in a row ({reason}); {way_on()} when it answers"
        ) from error
    wait = min(FIRST_WAIT * 2 ** (attempt - 1), LONGEST_WAIT)
    told = without_passwords(f"{file}: {reason}")
    log.warning("%s; waiting %g s before try %d of %d", told, wait, attempt + 1, TRIES)
    time.sleep(wait)


def _status(error: BaseException | None) -> int | None:
    """What a server has answered; None where it has not."""
    status = getattr(error, "status", None) or getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def _passes(error: BaseException | None, status: int | None) -> bool:
    """Whether what went wrong may go right the next time."""
    if status is not None:
        return status in (408, 429) or status >= 500
    if isinstance(error, FileNotFoundError | PermissionError | DataError):
        return False
    from aiohttp import ClientError
    from datasets.utils.file_utils import CONNECTION_ERRORS_TO_RETRY

    return isinstance(error, (OSError, ClientError, *CONNECTION_ERRORS_TO_RETRY))
