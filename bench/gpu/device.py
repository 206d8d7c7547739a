"""The device that calls are checked and timed on, and its ceilings: a GPU, a CPU, or a CPU in place of a GPU."""

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from bench.benches import timing

WARM_UP = 3
MOST = 200
CACHES = 2  # sets of inputs take turns, and together are this many times the size of the last cache
MOST_SETS = 64
CACHE = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
USUAL_CACHE = 32 * 2**20  # the size of the last cache, if the system does not tell it
Function: TypeAlias = Callable[[], Any]
Samples: TypeAlias = dict[str, list[float]]


class Stub:
    """The CPU in place of a GPU: wall-clock times, repeated calls for replays, launches recorded but not started."""

    dry = True
    tensors = torch.device("cpu")
    cache_bytes = 2**11
    # The untimed calls before all others, and the fewest timed ones: a dense decomposition takes seconds on a CPU.
    warm_up, fewest = 0, 3
    # Takes the calls, the number of timed turns, and the number of untimed ones before them.
    timed = staticmethod(timing.alternating)

    def __init__(self) -> None:
        self._generator = torch.Generator(self.tensors).manual_seed(0)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, generator=self._generator, device=self.tensors, dtype=dtype)

    def sets(self, size: int) -> int:
        """Return how many sets of inputs, each of this many bytes, outlast the cache."""
        return max(1, min(MOST_SETS, math.ceil(CACHES * self.cache_bytes / max(size, 1))))

    def synchronize(self) -> None:
        """Wait for the device; raise what went wrong on it."""

    def alternating(self, functions: Mapping[str, Function], limit: float) -> Samples:
        """Call all functions in turn for about ``limit`` seconds; return the seconds of each call."""
        self.timed(functions, 0, self.warm_up)
        start = time.perf_counter()
        self.timed(functions, 1, 0)
        rounds = limit / (time.perf_counter() - start)
        return self.timed(functions, int(min(max(rounds, self.fewest), MOST)), 0 if rounds < self.fewest else 2)

    def capture(self, function: Function) -> tuple[Any, Callable[[], None]]:
        """Record a call. Return its result, and a replay on the same tensors that overwrites the result."""
        result = function()

        def replay() -> None:
            for old, new in zip(tensors_in(result), tensors_in(function()), strict=True):
                old.copy_(new)

        return result, replay

    def never_waiting(self) -> AbstractContextManager[None]:
        """Return a context in which it is an error if the host waits for the device."""
        return nullcontext()

    def target(self) -> Any:
        from brandla_kernels._kernels.ahead import target_named

        return target_named("sm_90")

    def recorded(self, launch: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Return the launches that an op's launch function would start."""
        from brandla_kernels._kernels.launch import recording

        with recording(self.target()) as launches:
            launch(*arguments)
        return launches

    def precompile(self, launches: Sequence[Any]) -> str | None:
        """Compile recorded launches, many at a time. Return the problem if there is one: a first call compiles too."""
        return None if launches else "no launch was recorded"


class Cpu(Stub):
    """The CPU as a device to measure: inputs outlast its cache, and a replay is the call itself."""

    dry = False

    def __init__(self) -> None:
        super().__init__()
        size = CACHE.read_text(encoding="ascii").strip() if CACHE.exists() else ""
        self.cache_bytes = 2**10 * int(size.removesuffix("K")) if size else USUAL_CACHE

    def capture(self, function: Function) -> tuple[Any, Function]:
        return function(), function


class Gpu(Stub):
    """A CUDA or ROCm device: times by events, replays by graphs, and a cold cache before every timed call."""

    dry = False
    warm_up, fewest = WARM_UP, 5

    def __init__(self) -> None:
        self.tensors = torch.device("cuda", torch.cuda.current_device())
        self.cache_bytes = int(torch.cuda.get_device_properties(self.tensors).L2_cache_size)
        self._scratch = torch.empty(CACHES * self.cache_bytes, dtype=torch.int8, device=self.tensors)
        super().__init__()

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def timed(self, functions: Mapping[str, Function], repeats: int, warm_up: int) -> Samples:
        for name in timing.turns(list(functions), warm_up):
            functions[name]()
        events: dict[str, list[Any]] = {name: [] for name in functions}
        for name in timing.turns(list(functions), repeats):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            # Empties the cache, and keeps the device busy while the host queues the call, so the start is not timed.
            self._scratch.fill_(1)
            start.record()
            functions[name]()
            end.record()
            events[name].append((start, end))
        self.synchronize()
        return {name: [start.elapsed_time(end) / 1e3 for start, end in pairs] for name, pairs in events.items()}

    def capture(self, function: Function) -> tuple[Any, Function]:
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
        return result, graph.replay

    @contextmanager
    def never_waiting(self) -> Iterator[None]:
        self.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def target(self) -> Any:
        from brandla_kernels._kernels.launch import target_of

        return target_of(self._scratch)

    def precompile(self, launches: Sequence[Any]) -> str | None:
        try:
            from triton import AsyncCompileMode

            with ThreadPoolExecutor(os.cpu_count()) as pool, AsyncCompileMode(pool, ignore_errors=True):
                for launch in launches:
                    config = launch.config
                    # With other options, such as the limit of registers, this would compile another kernel.
                    launch.kernel.warmup(**launch.arguments, **config.blocks, **config.options, grid=launch.grid)
        except Exception as error:
            return f"kernels were compiled one after the other, as they were called: {type(error).__name__}: {error}"
        return None


Device: TypeAlias = Stub


def device_of(quick: bool) -> Device:
    """Return the GPU if torch sees one, else the CPU; for a short run a CPU that only goes through the motions."""
    if quick:
        return Stub()
    return Gpu() if torch.cuda.is_available() else Cpu()


def tensors_in(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def size_of(arguments: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors_in(arguments))


# --- Times


def graph_times(
    device: Device, calls: Mapping[str, Function], inputs: Sequence[Sequence[Any]], limit: float
) -> tuple[Samples, str]:
    """Return the seconds of calls without the host's share, and how they were measured.

    A graph of one call for each set of inputs is replayed. A call that cannot be captured is made from the host.
    """
    functions, stopped = {}, []
    for name, call in calls.items():
        functions[name] = all_sets = lambda call=call: [call(*arguments) for arguments in inputs]
        try:
            functions[name] = device.capture(all_sets)[1]
        except RuntimeError as error:
            device.synchronize()
            stopped.append(f"{name} by events, as {type(error).__name__} stopped the capture")
    samples = device.alternating(functions, limit)
    divided = {name: [second / len(inputs) for second in samples[name]] for name in functions}
    return divided, "; ".join(stopped) or "graph replay"


# --- Ceilings: a large copy and large products in torch, in the same run


class Work(NamedTuple):
    """Flops in each precision, and bytes."""

    float32: int = 0
    bf16: int = 0
    float64: int = 0
    bytes: int = 0


def per_second(amount: float, time: timing.Interval) -> timing.Interval:
    return timing.Interval(*(amount / seconds for seconds in (time.value, time.high, time.low)))


class Floor(NamedTuple):
    """The least time for some work, and the ceiling that sets this time."""

    seconds: float
    bound_by: str

    def part_of(self, time: timing.Interval) -> timing.Interval:
        return per_second(self.seconds, time)


class Ceilings(NamedTuple):
    """Bytes per second of a copy (read and written), and flops per second of products."""

    copy: timing.Interval
    float32: timing.Interval
    tf32: timing.Interval
    bf16: timing.Interval
    float64: timing.Interval

    @property
    def accurate(self) -> float:
        """Flops per second of products with float32 accuracy: by torch's own, or by three TF32 products for each."""
        return max(self.float32.value, self.tf32.value / 3)

    def floor(self, work: Work) -> Floor:
        """Return the least time for some work, and the ceiling that sets this time; products and copies may overlap."""
        products = {
            "float32 products": work.float32 / self.accurate,
            "bf16 products": work.bf16 / self.bf16.value,
            "float64 products": work.float64 / self.float64.value,
        }
        moved, computed = work.bytes / self.copy.value, sum(products.values())
        return Floor(moved, "copy") if moved >= computed else Floor(computed, max(products, key=products.__getitem__))


def measure_ceilings(device: Device, sizes: Any) -> Ceilings:
    """Measure all ceilings at the sizes of `cases`, on random data: a product of zeros is faster."""

    def rate(amount: int, call: Function) -> timing.Interval:
        return per_second(amount, timing.median_interval(device.alternating({"it": call}, 2 * sizes.seconds)["it"]))

    source = device.normal(sizes.copy // 4)
    target = torch.empty_like(source)
    rates = {"copy": rate(2 * sizes.copy, lambda: target.copy_(source))}
    kinds = {"float32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "float64": torch.float64}
    before = torch.get_float32_matmul_precision()
    for name, dtype in kinds.items():
        # A CPU without bf16 instructions takes a hundred times as long as for a float32 product.
        order = sizes.product // (8 if name == "bf16" and device.tensors.type == "cpu" else 1)
        left, right = (device.normal(order, order, dtype=dtype) for _ in range(2))
        torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
        try:
            rates[name] = rate(2 * order**3, lambda left=left, right=right: left @ right)
        finally:
            torch.set_float32_matmul_precision(before)
    return Ceilings(**rates)
