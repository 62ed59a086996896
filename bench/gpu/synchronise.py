"""pytest plugin for a GPU: an asynchronous error belongs to the test that made it, and takes no other along.

    DEGMIX_CRASHES=crashes.txt python -m pytest -p bench.gpu.synchronise -n 8 ...

A kernel that accesses memory it may not lets the host run on. The error appears in a later call, often of
another test, and every call after it fails, too: the process has lost the GPU. With this plugin the host
waits for the GPU after every test, and again after its fixtures are gone. If waiting fails, the test and the
first line of the error are added to a file, and the process is given up. Under pytest-xdist the worker ends
at once; xdist then reports the test as failed and starts another worker. Without xdist the test fails and the
session ends.

Where more than half of the tests failed, pytest ends with :data:`bench.gpu.visits.MOST_ARE_WRONG`.
"""

from __future__ import annotations

import os
from collections.abc import Generator
from pathlib import Path

import pytest
import torch

from bench.gpu.visits import MOST_ARE_WRONG

CRASHES = "DEGMIX_CRASHES"  # environment variable: the file, crashes.txt if it is not set
LOST = 70  # exit code of a worker

crashes = pytest.StashKey[Path]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[crashes] = Path(os.environ.get(CRASHES, "crashes.txt")).absolute()  # tests may change folder


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None]:
    try:
        return (yield)
    finally:
        wait(item)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_teardown(item: pytest.Item) -> Generator[None]:
    try:
        return (yield)
    finally:
        wait(item)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if not hasattr(session.config, "workerinput") and session.testsfailed > session.testscollected / 2:
        session.exitstatus = MOST_ARE_WRONG


def wait(item: pytest.Item) -> None:
    """Wait for the GPU; give the process up if the GPU is lost.

    Raises:
        RuntimeError: what PyTorch says, if it is lost and this is no worker.
    """
    if item.session.shouldfail or not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        reason = str(error).strip().partition("\n")[0]
        with item.config.stash[crashes].open("a", encoding="utf-8") as file:
            file.write(f"{item.nodeid}: {reason}\n")
        if hasattr(item.config, "workerinput"):  # which pytest-xdist gives its workers
            os._exit(LOST)
        item.session.shouldfail = f"the GPU is lost: {reason}"
        raise
