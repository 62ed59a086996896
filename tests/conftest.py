"""Shared fixtures. Without a GPU, Triton kernels run in Triton's interpreter."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType

import gpu_arithmetic
import pytest
import torch
from small_rooms import COUNT, SETTINGS, SIZE

HAS_GPU = torch.cuda.is_available()
torch.backends.cudnn.allow_tf32 = False  # as matrix products have it: references in fp32 are to be exact
if not HAS_GPU:  # before anything imports triton: the choice is made when a kernel is defined
    os.environ.setdefault("TRITON_INTERPRET", "1")
gpu_arithmetic.switch_on_if_wanted()


FULL = "--full"
CHOOSE_THEMSELVES = ("test_contract.py", "test_arguments.py", "test_tracers.py")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(FULL, action="store_true", help="run the tests that take many minutes, too")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", f"full: takes many minutes; runs only with {FULL}")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption(FULL):
        for item in items:
            if item.get_closest_marker("full"):
                item.add_marker(pytest.mark.skip(reason=f"takes many minutes: run it with {FULL}"))


def _caller_with_room() -> Callable[..., object]:
    """A function that calls another one, and has a frame of 160 kB.

    CPython keeps frames in chunks of 16 kB. A loop whose calls cross the end of one makes and drops a chunk
    each time; in the interpreter, whose calls are deep, that doubled the time of some tests. The chunk of
    a frame this large has room for all calls inside.
    """
    names, space = " = ".join(f"name_{index}" for index in range(20_000)), {}
    exec(f"def call(function, /, **arguments):\n    return function(**arguments)\n    {names} = None", space)
    return space["call"]


_call_with_room = _caller_with_room()


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> None:
    pyfuncitem.obj = partial(_call_with_room, pyfuncitem.obj)


@pytest.fixture
def device() -> torch.device:
    """The GPU if there is one, else the CPU."""
    return torch.device("cuda" if HAS_GPU else "cpu")


@pytest.fixture(autouse=True)
def backend_of_the_test(request: pytest.FixtureRequest) -> Iterator[None]:
    """On a CPU, run every test but kernel and contract tests on the reference: the interpreter is slow."""
    from degmix_kernels import use_backend

    path = Path(request.node.path)
    chooses_itself = "kernels" in path.parts or path.name in CHOOSE_THEMSELVES
    with use_backend("auto" if HAS_GPU or chooses_itself else "reference"):
        yield


@pytest.fixture
def no_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out launches, for tests that look at no number: the interpreter is slow."""
    monkeypatch.setattr("degmix_kernels.launch._launch", lambda plan: None)


@pytest.fixture(scope="session")
def rooms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight small rooms on disk, two of them for evaluation; not to be changed."""
    from degmix.data.synthetic import write

    return write(tmp_path_factory.mktemp("data") / "rooms", COUNT, SIZE, workers=1, **SETTINGS)


@pytest.fixture
def spoilt(rooms: Path, tmp_path: Path) -> Path:
    """A copy of the rooms to damage."""
    return Path(shutil.copytree(rooms, tmp_path / "rooms"))


@pytest.fixture(scope="session")
def torchvision() -> ModuleType:
    """torchvision with a working ``deform_conv2d``; CPU-only torch builds may not load its operators."""
    try:
        import torchvision
        import torchvision.ops

        torchvision.ops.deform_conv2d(
            torch.zeros(1, 1, 1, 1), torch.zeros(1, 2, 1, 1), torch.zeros(1, 1, 1, 1)
        )
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        pytest.skip(f"torchvision's operators do not load here: {error}")
    return torchvision


@pytest.fixture(scope="session")
def timm() -> ModuleType:
    """timm, which imports torchvision; that may not load next to a CPU-only torch build."""
    try:
        import timm
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        pytest.skip(f"timm does not load here: {error}")
    return timm
