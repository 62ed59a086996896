"""A process that takes this machine for one with an H100: everything launches, nothing computes.

Tensors have shapes and no memory (``FakeTensorMode``), and what is read of one is zero, or True. Kernels go
through Triton's real runtime, its binder, its compiler for sm_90, its cache and its launchers, down to a
libcuda (``libcuda.c``) that launches nothing. So a rehearsal shows what a machine with a GPU would be asked,
and such a machine finds everything in the cache that is left.

:func:`environment` gives the variables under which every Python process does so from its start.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

HERE = Path(__file__).parent
CAPABILITY = (9, 0)
MEMORY = 80 * 2**30
_modes: list[Callable[[], AbstractContextManager]] = []  # make those in which there are no real tensors
_entered = ExitStack()  # of a process that pretends from its start
EVENT_MS = 0.1  # whatever happens between two events


def environment(work: Path, cache: Path) -> dict[str, str]:
    """The variables; the driver is compiled into ``work``, ``cache`` is Triton's.

    Processes add lines to ``work/launches.jsonl``. Each has the beginning of their ``command``, or the name
    of the test; the ``stage``, which is $DEGMIX_STAGE; and one of these: ``kernel``, whether it was
    ``compiled`` or found, and the ``entries`` of the cache that have it; ``entries`` that have a launcher;
    what Triton ``refused`` to launch, and why.

    Raises:
        RuntimeError: without a C compiler, in one sentence.
    """
    work.mkdir(parents=True, exist_ok=True)
    library = work / "libcuda.so.1"
    options = ("-shared", "-fPIC", "-Wl,-soname,libcuda.so.1")
    command = ["cc", *options, "-o", str(library), str(HERE / "libcuda.c")]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except FileNotFoundError:
        raise RuntimeError("a C compiler is needed (cc): Triton builds its launchers with it") from None
    (work / "sitecustomize.py").write_text("from bench.gpu import pretend\n\npretend.begin()\n")
    return {
        "PYTHONPATH": f"{work}{os.pathsep}{HERE.parents[1]}",
        "LD_LIBRARY_PATH": str(work),
        "TRITON_LIBCUDA_PATH": str(work),
        "TRITON_CACHE_DIR": str(cache),
        "DEGMIX_LAUNCHES": str(work / "launches.jsonl"),
        "PYTEST_PLUGINS": "bench.gpu.pretend",
    }


def begin() -> None:
    """Pretend from here on; what only starts and ends other processes is left alone."""
    if sys.orig_argv[1:3] == ["-m", "bench.gpu.visit"]:
        return
    _inject_fault()
    import torch

    pretend_cuda(torch)
    _pretend_driver()
    _modes.extend(_pretend_tensors(torch))
    if not any(words in " ".join(sys.orig_argv) for words in ("-m pytest", "sys.stdin.readline")):
        for mode in _modes:
            _entered.enter_context(mode())
    from bench.harness import measure

    measure.FEWEST = measure.MOST = measure.WARM_UP = measure.CALLS_IN_A_ROW = 1  # of what takes no time


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol() -> Generator[None, object, object]:
    """Pretend while a test runs, not while tests are collected: parameters may be tensors with values."""
    with ExitStack() as stack:
        for mode in _modes:
            stack.enter_context(mode())
        return (yield)


def _inject_fault() -> None:
    """What goes wrong in a rehearsal: a process whose command has the words crashes, or hangs."""
    command = " ".join(sys.orig_argv[1:])
    for words, fault in json.loads(os.environ.get("DEGMIX_FAULTS", "{}")).items():
        if words in command:
            if fault == "crash":
                os.kill(os.getpid(), signal.SIGSEGV)
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            time.sleep(3600)


def pretend_cuda(torch: Any) -> None:
    """What PyTorch says of the GPU. Generators and autocast of the GPU are those of the CPU."""

    class Silent:
        """An event, a stream, a graph, a profiler or a context."""

        cuda_stream = 0

        def __init__(self, *_: Any, **__: Any) -> None: ...
        def __enter__(self) -> Silent:
            return self

        def __exit__(self, *_: Any) -> None: ...
        def nothing(self, *_: Any) -> None: ...
        def elapsed_time(self, _: Any) -> float:
            return EVENT_MS

        def key_averages(self) -> list[Any]:
            return []

        record = synchronize = wait_stream = replay = nothing

    cuda = torch.cuda
    properties = SimpleNamespace(
        name="pretended H100",
        major=CAPABILITY[0],
        minor=CAPABILITY[1],
        total_memory=MEMORY,
        multi_processor_count=132,
        L2_cache_size=50 * 2**20,
        warp_size=32,
    )
    answers: dict[str, Any] = {
        "is_available": True,
        "is_initialized": True,
        "device_count": 1,
        "current_device": 0,
        "is_current_stream_capturing": False,
        "get_device_name": properties.name,
        "get_device_properties": properties,
        "get_device_capability": CAPABILITY,
        "is_bf16_supported": True,
        "current_stream": Silent(),
        "memory_allocated": 0,
        "max_memory_allocated": 0,
        "mem_get_info": (MEMORY, MEMORY),
        "graph_pool_handle": (0, 0),
        "get_rng_state": torch.get_rng_state(),
        "get_rng_state_all": [],
        "clock_rate": 1980,
    }
    silent = {
        *("init", "_lazy_init", "synchronize", "empty_cache", "reset_peak_memory_stats", "set_stream"),
        *("set_device", "manual_seed", "manual_seed_all", "_sleep", "set_rng_state", "set_rng_state_all"),
    }
    for name, answer in {**answers, **dict.fromkeys(silent)}.items():
        setattr(cuda, name, lambda *_, answer=answer, **__: answer)
    cuda.Event = cuda.Stream = cuda.CUDAGraph = Silent
    cuda.stream = cuda.graph = cuda.device = torch.profiler.profile = Silent
    generator = torch.Generator

    class Generator(generator):
        def __new__(cls, device: Any = "cpu") -> Any:
            return super().__new__(cls, "cpu")

    torch.Generator = Generator
    autocast, enabled, dtype_of = torch.autocast, torch.is_autocast_enabled, torch.get_autocast_dtype

    class Autocast(autocast):
        def __init__(self, device_type: str, *args: Any, **kwargs: Any) -> None:
            super().__init__("cpu", *args, **kwargs)

    torch.autocast = torch.amp.autocast = Autocast
    torch.is_autocast_enabled = lambda _="cuda": enabled("cpu")
    torch.get_autocast_dtype = lambda _: dtype_of("cpu")


def _pretend_driver() -> None:
    """What Triton asks its driver; counts what it finds in its cache."""
    import triton
    from triton import knobs
    from triton.backends.nvidia import driver as nvidia
    from triton.runtime.cache import get_cache_manager

    class Driver(nvidia.CudaDriver):
        def __init__(self) -> None:
            self.utils = nvidia.CudaUtils()
            self.launcher_cls = nvidia.CudaLauncher
            self.get_device_capability = lambda _=0: CAPABILITY
            self.get_current_stream = lambda _: 0
            self.get_current_device = lambda: 0

    build = nvidia.compile_module_from_src

    def build_for_both(src: str, name: str, **options: Any) -> Any:
        """Launchers are named after ``platform.architecture()``, which needs a tool that may be missing."""
        module = build(src=src, name=name, **options)
        file = name + sysconfig.get_config_var("EXT_SUFFIX")
        entries = []
        for linkage in ("ELF", ""):
            key = hashlib.sha256(f"{src}x86_64,Linux,64bit,{linkage}".encode()).hexdigest()
            entry = get_cache_manager(key)
            if entry.get_file(file) is None:
                entry.put(Path(module.__file__).read_bytes(), file, binary=True)
            entries.append(Path(entry.get_file(file)).parent.name)
        _write(entries=entries)
        return module

    nvidia.compile_module_from_src = build_for_both
    triton.runtime.driver.set_active(Driver())

    def listen(*, src: Any, metadata_group: dict[str, str], cache_hit: bool, **_: Any) -> None:
        entries = {Path(path).parent.name for path in metadata_group.values()}
        _write(kernel=src.name, compiled=not cache_hit, entries=sorted(entries))

    knobs.compilation.listener = listen


def _write(**event: Any) -> None:
    """Add a line about what this process has launched, which it may not live to do at its end."""
    command = os.environ.get("PYTEST_CURRENT_TEST") or " ".join(sys.orig_argv[1:])
    about = {"stage": os.environ.get("DEGMIX_STAGE", ""), "command": command[:300]}
    with open(os.environ["DEGMIX_LAUNCHES"], "a") as file:
        file.write(json.dumps(about | event) + "\n")


def _pretend_tensors(torch: Any) -> tuple[Callable[[], AbstractContextManager], ...]:
    """In these no new tensor has memory; what is read of one is zero, or True."""
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
    from torch.overrides import TorchFunctionMode
    from triton.runtime.jit import JITFunction

    from degmix_kernels.tracers import transparent

    aten, gpu, cpu = torch.ops.aten, torch.device("cuda", 0), torch.device("cpu")
    inside = 0  # how deep in PyTorch, which knows that all of this is on the CPU

    def place(value: Any) -> Any:
        is_gpu = isinstance(value, (str, torch.device)) and str(value).startswith("cuda")
        return cpu if is_gpu else value

    class Nothing(FakeTensorMode):
        def dispatch(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal inside
            if func is aten._local_scalar_dense.default:
                dtype = args[0].dtype
                return True if dtype == torch.bool else 0.0 if dtype.is_floating_point else 0
            if func in (aten.equal.default, aten.allclose.default):
                return True
            # A backward pass comes here without the mode below.
            kwargs = {name: place(value) for name, value in (kwargs or {}).items()}
            inside += 1
            try:
                return super().dispatch(func, types, args, kwargs)
            finally:
                inside -= 1

    class OnGpu(TorchFunctionMode):
        """Says of every tensor that it is on the GPU, and leaves it on the CPU."""

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if not inside and func == torch.Tensor.is_cuda.__get__:
                return True
            if func is torch.device:
                return func(*args, **(kwargs or {}))
            if func is torch.Tensor.cuda:
                return args[0].clone()
            kwargs = {name: place(value) for name, value in (kwargs or {}).items()}
            return func(*map(place, args), **kwargs)

    class Pointer:
        """What a launch wants of a tensor."""

        def __init__(self, tensor: Any) -> None:
            self.dtype = tensor.dtype
            self._address = 2**20 + tensor.storage_offset() * tensor.element_size()

        def data_ptr(self) -> int:
            return self._address

    run = JITFunction.run

    def run_on_pointers(self: Any, *args: Any, **kwargs: Any) -> Any:
        kwargs = {
            name: Pointer(each) if isinstance(each, FakeTensor) else each for name, each in kwargs.items()
        }
        try:
            return run(self, *args, **kwargs)
        except Exception as error:
            name = f"{self.fn.__module__}.{self.fn.__name__}"
            _write(refused=f"{name}: {type(error).__name__}: {error}"[:2000])
            raise

    def copied(tensor: Any, memo: dict[int, Any]) -> Any:
        memo[id(tensor)] = copy = tensor.detach().clone().requires_grad_(tensor.requires_grad)
        return copy

    def applied(module: Any, function: Any, recurse: bool = True) -> Any:
        """``Module._apply``, which would exchange what is inside of two tensors."""
        for child in module.children() if recurse else ():
            applied(child, function)
        with torch.no_grad():
            for name, each in module._parameters.items():
                if each is not None:
                    module._parameters[name] = torch.nn.Parameter(function(each), each.requires_grad)
            for name, each in module._buffers.items():
                if each is not None:
                    module._buffers[name] = function(each)
        return module

    torch.autograd.gradcheck = torch.autograd.gradgradcheck = lambda *_, **__: True  # would not end
    FakeTensor.__deepcopy__ = copied
    torch.nn.Module._apply = applied
    where = FakeTensor.device.fget
    FakeTensor.device = property(lambda tensor: where(tensor) if inside else gpu)
    JITFunction.run = run_on_pointers
    nothing, on_gpu = Nothing(allow_non_fake_inputs=True), OnGpu()
    return lambda: transparent(True), lambda: nothing, lambda: on_gpu
