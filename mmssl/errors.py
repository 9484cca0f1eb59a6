"""Errors that are the user's to mend: one sentence that names the file, key or row and the way out."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

LONGEST = 600


class MmsslError(Exception):
    """Base of all; the command line prints its sentence without a traceback.

    The sentence is one line, and where a value in it is endless, its middle is left out; so are passwords in addresses.
    """

    def __str__(self) -> str:
        text = without_passwords(" ".join(super().__str__().split()))
        return text if len(text) <= LONGEST else f"{text[: LONGEST - 155]} ... {text[-150:]}"


def without_passwords(text: str) -> str:
    """A text in which no address holds `user:password@`."""
    return re.sub(r"(?<=://)[^/\s@]*@", "", text)


class RecipeError(MmsslError):
    """A recipe, or an argument of a component that it names, is not valid."""


class DataError(MmsslError):
    """Data cannot be read, or too much of it cannot."""


class RunError(MmsslError):
    """A run directory or checkpoint is missing, incomplete or of another shape."""


class Interrupted(MmsslError):
    """A run was asked to stop (SIGINT, SIGTERM, SIGUSR1), saved its state and can be resumed."""


def nearest(name: str, known: Iterable[str]) -> str:
    """` (did you mean 'x'?)` for the closest known name, else ` (known: a, b, c)`; empty where nothing is known."""
    choices = sorted(known)
    return _meant(name, choices) or (f" (known: {', '.join(choices)})" if choices else "")


def _meant(name: str, choices: list[str]) -> str:
    close = difflib.get_close_matches(name, choices, n=1, cutoff=0.6)
    return f" (did you mean '{close[0]}'?)" if close else ""


def counted(number: int, one: str, several: str = "") -> str:
    """A number and what it counts: `1 row`, `2 rows`; `several` is for words of which more than an `s` differs."""
    return f"{number:,} {one if number == 1 else several or f'{one}s'}"


def no_column(where: str, name: str, columns: Iterable[str]) -> str:
    """The sentence of a column that a source has not."""
    known = list(columns)
    asked = "; name one with label (--label), or put files into a folder a class" if name == "label" else ""
    return f"{where} has no column '{name}'{_meant(name, sorted(known))}; it has: {', '.join(known)}{asked}"


def in_words(message: str) -> str:
    """Pydantic's sentence in the words of YAML."""
    message = message.removeprefix("Value error, ").replace("valid tuple", "list")
    return re.sub(r"valid dictionary( or instance of \w+)?", "mapping, such as {key: value}", message)
