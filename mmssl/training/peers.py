"""The processes of one run: that all were started alike, and one sentence where one of them is no more."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from accelerate.utils import gather_object

from mmssl.errors import RunError
from mmssl.way_on import way_on


@contextmanager
def ending_together() -> Iterator[None]:
    """One sentence where another process has ended, so that this one cannot go on."""
    try:
        yield
    except RuntimeError as error:
        # gloo raises nothing of its own kind; its errors begin with the place in its source.
        if not dist.is_initialized() or not (isinstance(error, dist.DistError) or "gloo/" in str(error)):
            raise
        raise RunError(
            "another process has ended or is out of reach, and this one ends with it; the reason is what that one "
            f"said, or who killed it; {way_on()}"
        ) from error


def check_alike(seen: Mapping[str, Any], way_out: str) -> None:
    """Raise RunError on every process where one of them sees something else than the first; all have to call it.

    Args:
        seen: name -> what this process sees, of which mappings are compared key by key.
        way_out: what has to be the same for all.
    """
    everyone = [dict(flat(one)) for one in gather_object([dict(seen)])]
    first = everyone[0]
    for rank, other in enumerate(everyone):
        for name in first | other:
            if other.get(name) != first.get(name):
                raise RunError(
                    f"process {rank} has {name} = {other.get(name)}, and process 0 {first.get(name)}; {way_out}"
                )


def flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and value of every leaf."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
