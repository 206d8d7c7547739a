"""Every public function and every op over sizes and dtypes, beside what else gives the same result.

Of a function these are other libraries; of an op, on a GPU, its torch form. Each case checks its result against float64
first and does not time a wrong one: where that is a peer's, or what ``torch.compile`` made, the run goes on and the
result file says so. ``--full`` takes larger sizes, and lets what is slow there take part in all of them.
"""

import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import lru_cache, partial
from typing import Any, NamedTuple

import pandas as pd
import pytest
import torch

from bench.benches.peers import REST, at_best
from bench.benches.problems import Judgement
from bench.benches.tasks import BRANDLA, GROUPED, ONE_BY_ONE, OURS, OWN, TASKS, TORCH_FORM, Shape, Task, check, together
from bench.benches.timing import TIMER, Interval, of_median
from bench.frame.figures import Study, duration, spelled
from bench.frame.pages import listed
from bench.frame.pictures import Bars
from bench.gpu import cases
from bench.gpu.cases import fresh
from bench.gpu.device import Ceilings, Device, Floor, Work, device_of, measure, size_of
from bench.studies import roofline
from brandla.demo.frame import jsonable
from brandla_kernels import OPS

pytestmark = pytest.mark.benchmark(timer=TIMER)

FLOAT64, BFLOAT16 = torch.float64, torch.bfloat16
SMALL = Shape(1024, 64, 32)
USUAL = (SMALL, SMALL._replace(dtype=FLOAT64), SMALL._replace(data=BFLOAT16), Shape(4096, 128, 64))
FULL = (*USUAL, *(Shape(n, 256, 256) for n in (4096, 8192, 16384)))
TOY = (Shape(96, 8, 4), Shape(96, 8, 4, FLOAT64), Shape(96, 8, 4, data=BFLOAT16))
# The largest n at which what decomposes a whole matrix, or iterates to full precision, has a part.
MOST_SLOW = 1024
# Factors of a group, by their part of the largest n.
PARTS = (1, 2, 4, 4)
COMPILED = "torch.compile of the torch form"
# Seconds that a case is timed for, and how often it is called at least and at most.
SECONDS, FEWEST, MOST = 0.25, 3, 100
# Order of the product that is timed before and after each case, and the seconds it may take: what two runs have in
# common. Before it there is a rest, as threads of one BLAS library spin for a while after a call.
REFERENCE, REFERENCE_SECONDS = 512, 0.01
Row = dict[str, Any]
# Calls on copies of the inputs, so that no cache holds them, whose result was checked; and whether NumPy computes it.
Right = tuple[list[Callable[[], Any]], Work, Judgement, bool | None]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    quick, full = (metafunc.config.getoption(name) for name in ("quick", "full"))
    kind = "cuda" if torch.cuda.is_available() and not quick else "cpu"
    if metafunc.function is test_op:
        by = [BRANDLA, TORCH_FORM, COMPILED] if kind == "cuda" else [BRANDLA]
        sizes = cases.TOY if quick else cases.FULL if full else roofline.USUAL
        ops = list(itertools.product(cases.cases(sizes), by))
        return metafunc.parametrize(("op_case", "by"), ops, ids=[f"{op.op}-{one}-{op.name}" for op, one in ops])
    found = []
    for group, names in (("", TASKS), ("grouped.", filter(TASKS.__contains__, GROUPED))):
        for name, shape in itertools.product(names, TOY if quick else FULL if full else USUAL):
            if shape.data is None or TASKS[name].takes_half:
                those = TASKS[name].implementations(shape, kind, shape.n if full else MOST_SLOW)
                those = [*(one for one in those if one in OWN), ONE_BY_ONE] if group else those
                found.extend((group + name, by, shape) for by in those)
    return metafunc.parametrize(("name", "by", "shape"), found, ids=str)


@lru_cache(maxsize=1)
def task_of(name: str, shape: Shape, device: Device) -> Task:
    """Return a task; of a grouped function one over factors of several n."""
    if name in TASKS:
        return TASKS[name].task(shape, device)
    # Half as many columns as rows have to hold the rank and what is new.
    least = 2 * (shape.r + shape.k)
    shapes = [shape._replace(n=max(shape.n // part, least)) for part in PARTS]
    return together(name.removeprefix("grouped."), shapes, device)


def test_function(name, by, shape, device, timed) -> None:
    def right() -> Right:
        task = task_of(name, shape, device)
        call = task.call(by)
        judged = check(f"{by}, {name} {shape}", call)
        count = device.sets(size_of(call.arguments)) if device.tensors.type == "cuda" else 1
        return [partial(call.function, *fresh(call.arguments)) for _ in range(count)], task.work, judged, call.on_numpy

    timed(name, by, shape, right)


def test_op(op_case, by, device, timed) -> None:
    def right() -> Right:
        op = OPS[op_case.op]
        call = {BRANDLA: op, TORCH_FORM: cases.forced(op)}.get(by) or torch.compile(op.torch_form, dynamic=False)
        error, _ = cases.check(op_case, device, call)
        on_gpu = device.tensors.type == "cuda"
        inputs = cases.inputs(op_case, device) if on_gpu else [cases.operands(op_case, device)]
        judged = Judgement(error, cases.allowed(op_case))
        return [partial(call, *one) for one in inputs], cases.work(op_case), judged, None

    data = None if op_case.data == op_case.dtype else op_case.data
    timed(op_case.op, by, Shape(op_case.n, op_case.r, op_case.k, op_case.dtype, data), right)


# The name of its result file.
test_op.study = "ops"


# --- How a case is timed, and what is kept of it


@pytest.fixture(scope="module")
def device(quick) -> Device:
    return device_of(quick)


@pytest.fixture(scope="module")
def ceilings(device) -> Ceilings:
    sizes = cases.TOY if device.dry else cases.FULL if device.tensors.type == "cuda" else roofline.USUAL
    return measure(device, sizes)


@pytest.fixture(scope="module")
def reference(device) -> Callable[[], list[float]]:
    """Return what times a square product after a rest, by the device: pytest-benchmark has one function a case."""
    left, right = (device.normal(REFERENCE, REFERENCE) for _ in range(2))

    def times() -> list[float]:
        time.sleep(0.0 if device.dry else REST)
        return device.alternating({"it": lambda: left @ right}, REFERENCE_SECONDS)["it"]

    return times


@pytest.fixture
def timed(benchmark, quick, study, ceilings, reference) -> Callable[[str, str, Shape, Callable[[], Right]], None]:
    """Return a function that times what another one returns, and keeps the row.

    With more than one copy a round is a call on each, queued one after the other, between two looks at the timer.
    """

    def kept(function: str, by: str, shape: Shape, right: Callable[[], Right]) -> None:
        benchmark.group = f"{function} {shape}"
        sizes = {"n": shape.n, "r": shape.r, "k": shape.k, "dtype": str(shape.dtype).removeprefix("torch.")}
        about = {"group": benchmark.group, "by": by, "function": function, "shape": str(shape), **sizes}
        with tolerated(study, about):
            calls, work, judged, on_numpy = right()
            with at_best(calls[0]) if on_numpy else nullcontext() as threads:
                start = time.perf_counter()
                calls[0]()
                wanted = SECONDS / len(calls) / (time.perf_counter() - start)
                rounds = 2 if quick else int(min(max(wanted, FEWEST), MOST))
                in_turn = itertools.cycle(calls)
                call = lambda: next(in_turn)()  # noqa: PLW0108 (the call that comes next is what is timed)
                around, warm_up = reference(), 1 if wanted > FEWEST else 0
                benchmark.pedantic(call, rounds=rounds, iterations=len(calls), warmup_rounds=warm_up)
                around += reference()
            floor, flops = ceilings.floor(work), work.float32 + work.float64 + work.bf16
            row = about | {"error": judged.error, "orthogonality": judged.orthogonality}
            row |= {"blas_threads": threads} if on_numpy is not None else {}
            row |= {"flops": flops, "bytes": work.bytes, "bound_by": floor.bound_by}
            benchmark.extra_info.update(jsonable(row))
            if benchmark.stats:
                study.cases.append(row | row_of(benchmark.stats.stats.data, around, floor))
                benchmark.extra_info["of_ceiling"] = study.cases[-1]["of_ceiling"].value

    return kept


@contextmanager
def tolerated(study: Study, about: Row) -> Iterator[None]:
    """Keep whatever goes wrong with a peer, with its reason, and go on; what is ours fails."""
    try:
        yield
    except Exception as error:
        if about["by"] in OURS:
            raise
        said = str(error).strip().partition("\n")[0].replace("|", "/")
        reason = f"{type(error).__name__}: {said}"[:160]
        study.refused.append(about | {"reason": reason})
        pytest.skip(f"not timed: {reason}")


def row_of(times: list[float], around: list[float], floor: Floor) -> Row:
    """Return the median of times in seconds, the part that the floor is of it, and it over the product's median."""
    seconds, reference = of_median(times), of_median(around)
    over = Interval(*(each / reference.value for each in seconds))
    row = {"seconds": seconds, "of_ceiling": floor.part_of(seconds), "over_reference": over, "rounds": len(times)}
    return row | {"reference": reference, "reference_rounds": len(around)}


# --- The page: functions beside the quickest of the others

ROWS = 10
COLUMNS = ["function", "shape", "by", "n", "seconds", "error"]


class Functions(NamedTuple):
    """The page of functions whose names begin so."""

    names: tuple[str, ...]

    def beside(self, content: Row) -> pd.DataFrame:
        """Return the float32 cases of functions whose names begin so: brandla's, then the quickest of the others.

        Each is at its largest size that others have too. Of ten rows every function has its part, and two at least.
        """
        rows = pd.DataFrame(content.get("rows", []), columns=None if content.get("rows") else COLUMNS)
        rows = rows[rows["function"].str.startswith(self.names) & rows["shape"].str.endswith("fp32")]
        rows = rows.assign(time=rows["seconds"].str[0], other=rows["by"] != BRANDLA, over=float("nan"))
        found = []
        for _, every in rows.groupby("function", sort=False):
            shared = every["shape"].duplicated(keep=False)
            largest = every[shared | ~shared.any()].sort_values("n", kind="stable")["shape"].iloc[-1]
            own = every[every["shape"] == largest].sort_values(["other", "time"], kind="stable")
            if not own["other"].iloc[0]:
                found.append(own.assign(over=own["time"] / own["time"].iloc[0]))
        return pd.concat([own.head(max(2, ROWS // len(found))) for own in found] or [rows.head(0)])

    def answer(self, content: Row) -> str:
        rows = self.beside(content)
        quickest = rows[rows["other"]].groupby("function", sort=False).first()
        if quickest.empty:
            return ""
        first, rest = quickest.iloc[0], quickest.iloc[1:]
        took = duration(rows[~rows["other"]].set_index("function").loc[first.name, "time"])
        others = listed([f"`{name}`" for name in rest.index])
        beyond = f"For {others}, the fastest other takes {listed(rest['over'].map(spelled).tolist())} times as long."
        return (
            f"`{first.name}` takes {took} at {first['shape']}, and the fastest other, {first['by']}, takes"
            f" {spelled(first['over'])} times as long. {beyond if len(rest) else 'Nothing else was compared.'}"
        )

    def table(self, content: Row) -> pd.DataFrame:
        rows = self.beside(content)
        columns = {
            "function": "`" + rows["function"] + "`",
            "by": rows["by"],
            "ms": (1e3 * rows["time"]).map(spelled),
            "× brandla": rows["over"].map(spelled),
            "error": rows["error"].map("{:.2g}".format),
            "case": rows["shape"],
        }
        return pd.DataFrame(columns)

    def chart(self, content: Row) -> Bars:
        rows = self.beside(content)
        labels = rows["function"].where(~rows["other"], rows["function"] + ": " + rows["by"])
        values = pd.Series((1e3 * rows["time"]).to_numpy(float), labels).head(ROWS)
        below, others = listed(list(rows["shape"].unique())), set(labels[rows["other"]])
        return Bars("Time beside the quickest others", below, values, others, " ms")
