"""What tests of all rooms share."""

import multiprocessing
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.context import BaseContext
from typing import Any

import pytest

# One thread a worker of pytest-xdist: the networks are tiny, and threads of several workers would fight for the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# The compiler is what DistributedDataParallel imports once it is called.
PRELOADED = ["torch.distributed", "torch._dynamo", "mmssl.objectives.combine", "mmssl.runs"]


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses
def pytest_collection_modifyitems(items: Sequence[pytest.Item]) -> None:
    """Of a test that is `quick(n)`, mark what comes after the first n cases `long`."""
    seen: Counter[str] = Counter()
    for item in items:
        if quick := item.get_closest_marker("quick"):
            test = item.nodeid.partition("[")[0]
            seen[test] += 1
            if seen[test] > quick.args[0]:
                item.add_marker(pytest.mark.long)


@pytest.fixture(scope="session")
def forkserver() -> BaseContext:
    """Its `Process` is forked from a server that imports once what would take each of them seconds."""
    multiprocessing.set_forkserver_preload(PRELOADED)
    return multiprocessing.get_context("forkserver")


@pytest.fixture(scope="session")
def processes(forkserver: BaseContext) -> Callable[..., None]:
    """`processes(function, arguments, count)`: `function(rank, *arguments)` on so many processes, until all have ended.

    They are forked from the server of `forkserver`.
    """
    from torch.multiprocessing import start_processes

    def start(function: Callable[..., None], arguments: tuple[Any, ...], count: int) -> None:
        start_processes(function, arguments, nprocs=count, start_method="forkserver")

    return start


@pytest.fixture
def double() -> Iterator[None]:
    """Double precision wherever nothing else is asked for: what should be equal is, to ten digits."""
    import torch

    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
