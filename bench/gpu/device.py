"""What the sections need of a device: a GPU, or the CPU standing in for one, so that a dry run takes the same path."""

from __future__ import annotations

import math
import os
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_leaves

WARM_UP = 3
FEWEST, MOST = 5, 200
# A set of inputs is met again after this many times the size of the L2 cache.
CACHES = 2
MOST_SETS = 64


class Captured(NamedTuple):
    """A recorded call: what it returns, overwritten by each replay."""

    result: Any
    replay: Callable[[], None]


class Device(ABC):
    """A device that calls are checked and timed on."""

    dry: bool
    tensors: torch.device
    cache_bytes: int
    timer: str

    def __init__(self) -> None:
        self._generator = torch.Generator(self.tensors).manual_seed(0)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return standard normal entries, others at every call."""
        return torch.randn(*shape, generator=self._generator, device=self.tensors, dtype=dtype)

    def sets(self, size: int) -> int:
        """Return how many sets of inputs of this many bytes in turn outlast the cache."""
        return max(1, min(MOST_SETS, math.ceil(CACHES * self.cache_bytes / max(size, 1))))

    @abstractmethod
    def synchronize(self) -> None:
        """Wait for the device; raise what went wrong on it."""

    @abstractmethod
    def alternating(self, functions: Mapping[str, Callable[[], Any]], limit: float) -> dict[str, list[float]]:
        """Call all functions in turn for about ``limit`` seconds, and return the seconds of each call."""

    @abstractmethod
    def capture(self, function: Callable[[], Any]) -> Captured:
        """Record a call, to be replayed on the same tensors."""

    @abstractmethod
    def never_waiting(self) -> Any:
        """Make any wait of the host for the device an error, in a ``with`` block."""

    @abstractmethod
    def kernels(self, function: Callable[[], Any]) -> list[dict[str, Any]]:
        """Return the name, count and microseconds of the kernels that a call starts, the longest first."""

    @abstractmethod
    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function under torch.compile."""

    @abstractmethod
    def launch(self, launch: Callable[..., Any], *arguments: Any) -> Any:
        """Call the launch function of an op."""

    @abstractmethod
    def precompile(self, launches: list[Any]) -> str | None:
        """Compile recorded launches, many at a time. Say what went wrong if it did: the first call compiles too."""

    @abstractmethod
    def target(self) -> Any:
        """Return the target that kernels are compiled for."""

    def recorded(self, launch: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Return what the launch function of an op would start."""
        from brandla_kernels._kernels.launch import recording

        with recording(self.target()) as launches:
            launch(*arguments)
        return launches

    def host_seconds(self, function: Callable[[], Any], calls: int) -> float:
        """Return how long the host takes for a call, with the device left to catch up."""
        for _ in range(WARM_UP):
            function()
        self.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            function()
        seconds = (time.perf_counter() - start) / calls
        self.synchronize()
        return seconds


class Gpu(Device):
    """A CUDA or ROCm device: events, graphs and the cache written over before every timed call."""

    dry = False
    timer = "events"

    def __init__(self) -> None:
        self.tensors = torch.device("cuda", torch.cuda.current_device())
        self.cache_bytes = int(torch.cuda.get_device_properties(self.tensors).L2_cache_size)
        self._scratch = torch.empty(CACHES * self.cache_bytes, dtype=torch.int8, device=self.tensors)
        super().__init__()

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def alternating(self, functions: Mapping[str, Callable[[], Any]], limit: float) -> dict[str, list[float]]:
        for _ in range(WARM_UP):
            for function in functions.values():
                function()
        self.synchronize()
        start = time.perf_counter()
        self._round(functions, False)
        self.synchronize()
        rounds = int(min(max(limit / (time.perf_counter() - start), FEWEST), MOST))
        events = [self._round(functions, bool(number % 2)) for number in range(rounds)]
        self.synchronize()
        return {name: [each[name][0].elapsed_time(each[name][1]) / 1e3 for each in events] for name in functions}

    def _round(self, functions: Mapping[str, Callable[[], Any]], backwards: bool) -> dict[str, tuple[Any, Any]]:
        events = {}
        for name in list(functions)[:: -1 if backwards else 1]:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            # Also keeps the device busy while the host queues the call, so that its start is not what is timed.
            self._scratch.fill_(1)
            start.record()
            functions[name]()
            end.record()
            events[name] = (start, end)
        return events

    def capture(self, function: Callable[[], Any]) -> Captured:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                function()
        torch.cuda.current_stream().wait_stream(stream)
        self.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = function()
        return Captured(result, graph.replay)

    @contextmanager
    def never_waiting(self) -> Iterator[None]:
        self.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def kernels(self, function: Callable[[], Any]) -> list[dict[str, Any]]:
        function()
        self.synchronize()
        # With acc_events torch keeps events over several starts; without, it warns of that, though there is but one.
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], acc_events=True) as profiler:
            function()
            self.synchronize()
        return _summed(
            event
            for event in profiler.events()
            if event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False)
        )

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return torch.compile(function, dynamic=False)

    def launch(self, launch: Callable[..., Any], *arguments: Any) -> Any:
        return launch(*arguments)

    def target(self) -> Any:
        from brandla_kernels._kernels.launch import target_of

        return target_of(self._scratch)

    def precompile(self, launches: list[Any]) -> str | None:
        try:
            from triton import AsyncCompileMode

            with ThreadPoolExecutor(os.cpu_count()) as pool, AsyncCompileMode(pool, ignore_errors=True):
                for launch in launches:
                    options = {"num_warps": launch.config.num_warps, "num_stages": launch.config.num_stages}
                    launch.kernel.warmup(**launch.arguments, **launch.config.blocks, **options, grid=launch.grid)
        except Exception as error:
            return f"kernels were compiled one after the other, as they were called: {type(error).__name__}: {error}"
        return None


class Stub(Device):
    """The CPU in place of a GPU: wall clock, calls repeated in place of replayed, launches recorded and not started."""

    dry = True
    timer = "wall clock"
    cache_bytes = 2**11

    def __init__(self) -> None:
        self.tensors = torch.device("cpu")
        super().__init__()

    def synchronize(self) -> None:
        pass

    def alternating(self, functions: Mapping[str, Callable[[], Any]], limit: float) -> dict[str, list[float]]:
        seconds: dict[str, list[float]] = {name: [] for name in functions}
        for _ in range(WARM_UP):
            for name, function in functions.items():
                start = time.perf_counter()
                function()
                seconds[name].append(time.perf_counter() - start)
        return seconds

    def capture(self, function: Callable[[], Any]) -> Captured:
        result = function()

        def replay() -> None:
            for old, new in zip(tree_leaves(result), tree_leaves(function()), strict=True):
                if isinstance(old, Tensor):
                    old.copy_(new)

        return Captured(result, replay)

    @contextmanager
    def never_waiting(self) -> Iterator[None]:
        yield

    def kernels(self, function: Callable[[], Any]) -> list[dict[str, Any]]:
        # With acc_events torch keeps events over several starts; without, it warns of that, though there is but one.
        with profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiler:
            function()
        return _summed(event for event in profiler.events() if event.cpu_parent is None)

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        # Tracing is the part of torch.compile that can fail here; generating code for a CPU would only take long.
        return torch.compile(function, dynamic=False, backend="eager")

    def launch(self, launch: Callable[..., Any], *arguments: Any) -> Any:
        self.recorded(launch, *arguments)

    def target(self) -> Any:
        from brandla_kernels._kernels.ahead import target_named

        return target_named("sm_90")

    def precompile(self, launches: list[Any]) -> str | None:
        return None if launches else "no launch was recorded"


def _summed(events: Any) -> list[dict[str, Any]]:
    counts: Counter[str] = Counter()
    microseconds: Counter[str] = Counter()
    for event in events:
        counts[event.name] += 1
        microseconds[event.name] += event.time_range.elapsed_us()
    return [{"kernel": name, "count": counts[name], "µs": float(time)} for name, time in microseconds.most_common()]


def started(kernels: list[dict[str, Any]]) -> int:
    """Return how many launches a profile counted, copies left out."""
    return sum(each["count"] for each in kernels if not each["kernel"].startswith(("Memcpy", "Memset")))
