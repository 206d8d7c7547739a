"""Every public function and every op over sizes and dtypes, beside other ways to the same result.

A function has other libraries beside it; an op, on a GPU, its torch form. Each case first checks its result against
float64, and does not time a wrong one. If a peer's or ``torch.compile``'s result is wrong, the run goes on and the
result file says so. ``--full`` takes larger sizes, and times slow peers at all of them.
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

from bench.benches.peers import REST, best_threads
from bench.benches.problems import Judgement
from bench.benches.tasks import BRANDLA, GROUPED, ONE_BY_ONE, OURS, OWN, TASKS, TORCH_FORM, Shape, Task, check, group_of
from bench.benches.timing import TIMER, Interval, median_interval
from bench.frame.figures import Study, duration, formatted
from bench.frame.pages import in_sentence
from bench.frame.pictures import Bars
from bench.gpu import cases
from bench.gpu.cases import cloned
from bench.gpu.device import Ceilings, Device, Floor, Work, device_of, measure_ceilings, size_of
from bench.studies import roofline
from brandla.demo.frame import Row, jsonable
from brandla_kernels import OPS

pytestmark = pytest.mark.benchmark(timer=TIMER)

FLOAT64, BFLOAT16 = torch.float64, torch.bfloat16
SMALL = Shape(1024, 64, 32)
USUAL = (SMALL, SMALL._replace(dtype=FLOAT64), SMALL._replace(data=BFLOAT16), Shape(4096, 128, 64))
FULL = (*USUAL, *(Shape(n, 256, 256) for n in (4096, 8192, 16384)))
TOY = (Shape(96, 8, 4), Shape(96, 8, 4, FLOAT64), Shape(96, 8, 4, data=BFLOAT16))
MOST_SLOW = 1024  # the largest n for slow peers, which decompose a whole matrix or iterate to full precision
PARTS = (1, 2, 4, 4)  # the factors of a group have the largest n over these numbers
COMPILED = "torch.compile of the torch form"
SECONDS, FEWEST, MOST = 0.25, 3, 100  # seconds of timing for each case, and the fewest and the most calls
# Order of the product that is timed before and after each case, and seconds for it: two runs are compared by it. A rest
# comes before it, as threads of one BLAS library spin for a while after a call.
REFERENCE, REFERENCE_SECONDS = 512, 0.01
# Calls whose result was checked, on copies of the inputs that no cache holds; and whether NumPy computes the result.
Checked = tuple[list[Callable[[], Any]], Work, Judgement, bool | None]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    quick, full = (metafunc.config.getoption(name) for name in ("quick", "full"))
    kind = "cuda" if torch.cuda.is_available() and not quick else "cpu"
    if metafunc.function is test_op:
        by = [BRANDLA, TORCH_FORM, COMPILED] if kind == "cuda" else [BRANDLA]
        sizes = cases.TOY if quick else cases.FULL if full else roofline.USUAL
        ops = list(itertools.product(cases.cases(sizes), by))
        return metafunc.parametrize(("op_case", "by"), ops, ids=[f"{op.op}-{who}-{op.name}" for op, who in ops])
    functions = []
    for group, names in (("", TASKS), ("grouped.", filter(TASKS.__contains__, GROUPED))):
        for name, shape in itertools.product(names, TOY if quick else FULL if full else USUAL):
            if shape.data is None or TASKS[name].takes_half:
                by = TASKS[name].implementations(shape, kind, shape.n if full else MOST_SLOW)
                by = [*(who for who in by if who in OWN), ONE_BY_ONE] if group else by
                functions.extend((group + name, who, shape) for who in by)
    return metafunc.parametrize(("name", "by", "shape"), functions, ids=str)


@lru_cache(maxsize=1)
def task_of(name: str, shape: Shape, device: Device) -> Task:
    """Return the task of a function; a grouped function has factors of several n."""
    if name in TASKS:
        return TASKS[name].task(shape, device)
    # Some tasks have n / 2 columns, which have to hold the rank and the new columns.
    least = 2 * (shape.r + shape.k)
    shapes = [shape._replace(n=max(shape.n // part, least)) for part in PARTS]
    return group_of(name.removeprefix("grouped."), shapes, device)


def test_function(name, by, shape, device, timed) -> None:
    def checked() -> Checked:
        task = task_of(name, shape, device)
        call = task.call(by)
        judged = check(f"{by}, {name} {shape}", call)
        count = device.sets(size_of(call.arguments)) if device.tensors.type == "cuda" else 1
        return [partial(call.function, *cloned(call.arguments)) for _ in range(count)], task.work, judged, call.on_numpy

    timed(name, by, shape, checked)


def test_op(op_case, by, device, timed) -> None:
    def checked() -> Checked:
        op = OPS[op_case.op]
        call = {BRANDLA: op, TORCH_FORM: cases.torch_form_of(op)}.get(by) or torch.compile(op.torch_form, dynamic=False)
        error, _ = cases.check(op_case, device, call)
        on_gpu = device.tensors.type == "cuda"
        inputs = cases.inputs(op_case, device) if on_gpu else [cases.operands(op_case, device)]
        judged = Judgement(error, cases.error_allowed(op_case))
        return [partial(call, *arguments) for arguments in inputs], cases.work(op_case), judged, None

    data = None if op_case.data == op_case.dtype else op_case.data
    timed(op_case.op, by, Shape(op_case.n, op_case.r, op_case.k, op_case.dtype, data), checked)


# The name of its result file.
test_op.study = "ops"


# --- How a case is timed and recorded


@pytest.fixture(scope="module")
def device(quick) -> Device:
    return device_of(quick)


@pytest.fixture(scope="module")
def ceilings(device) -> Ceilings:
    sizes = cases.TOY if device.dry else cases.FULL if device.tensors.type == "cuda" else roofline.USUAL
    return measure_ceilings(device, sizes)


@pytest.fixture(scope="module")
def reference(device) -> Callable[[], list[float]]:
    """Return a function that times a square product after a rest: pytest-benchmark times one function a case."""
    left, right = (device.normal(REFERENCE, REFERENCE) for _ in range(2))

    def times() -> list[float]:
        time.sleep(0.0 if device.dry else REST)
        return device.alternating({"it": lambda: left @ right}, REFERENCE_SECONDS)["it"]

    return times


@pytest.fixture
def timed(benchmark, quick, study, ceilings, reference) -> Callable[[str, str, Shape, Callable[[], Checked]], None]:
    """Return a function that times the calls that another function returns, and keeps the row.

    With several copies of the inputs, a round is one call on each copy, queued between two readings of the timer.
    """

    def time_case(function: str, by: str, shape: Shape, checked: Callable[[], Checked]) -> None:
        benchmark.group = f"{function} {shape}"
        sizes = {"n": shape.n, "r": shape.r, "k": shape.k, "dtype": str(shape.dtype).removeprefix("torch.")}
        about = {"group": benchmark.group, "by": by, "function": function, "shape": str(shape), **sizes}
        with tolerated(study, about):
            calls, work, judged, on_numpy = checked()
            with best_threads(calls[0]) if on_numpy else nullcontext() as threads:
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
                study.cases.append(row | timing_row(benchmark.stats.stats.data, around, floor))
                benchmark.extra_info["of_ceiling"] = study.cases[-1]["of_ceiling"].value

    return time_case


@contextmanager
def tolerated(study: Study, about: Row) -> Iterator[None]:
    """Record the error of a peer and go on; an error of ours is raised."""
    try:
        yield
    except Exception as error:
        if about["by"] in OURS:
            raise
        first_line = str(error).strip().partition("\n")[0].replace("|", "/")
        reason = f"{type(error).__name__}: {first_line}"[:160]
        study.refused.append(about | {"reason": reason})
        pytest.skip(f"not timed: {reason}")


def timing_row(times: list[float], around: list[float], floor: Floor) -> Row:
    """Return the median time in seconds, the floor's part of it, and its ratio to the reference product's median."""
    seconds, reference = median_interval(times), median_interval(around)
    over = Interval(*(bound / reference.value for bound in seconds))
    row = {"seconds": seconds, "of_ceiling": floor.part_of(seconds), "over_reference": over, "rounds": len(times)}
    return row | {"reference": reference, "reference_rounds": len(around)}


# --- The page: functions beside the quickest of the others

ROWS = 10
COLUMNS = ["function", "shape", "by", "n", "seconds", "error"]


class Functions(NamedTuple):
    """The page of the functions whose names begin with one of ``names``."""

    names: tuple[str, ...]

    def beside(self, content: Row) -> pd.DataFrame:
        """Return the float32 cases of the functions: brandla's, then the quickest of the others.

        Each function is at the largest size that others were timed at too. All share ten rows; each has two at least.
        """
        rows = pd.DataFrame(content.get("rows", []), columns=None if content.get("rows") else COLUMNS)
        rows = rows[rows["function"].str.startswith(self.names) & rows["shape"].str.endswith("fp32")]
        rows = rows.assign(time=rows["seconds"].str[0], other=rows["by"] != BRANDLA, over=float("nan"))
        functions = []
        for _, cases_of in rows.groupby("function", sort=False):
            shared = cases_of["shape"].duplicated(keep=False)
            largest = cases_of[shared | ~shared.any()].sort_values("n", kind="stable")["shape"].iloc[-1]
            at_largest = cases_of[cases_of["shape"] == largest].sort_values(["other", "time"], kind="stable")
            if not at_largest["other"].iloc[0]:
                functions.append(at_largest.assign(over=at_largest["time"] / at_largest["time"].iloc[0]))
        return pd.concat([table.head(max(2, ROWS // len(functions))) for table in functions] or [rows.head(0)])

    def answer(self, content: Row) -> str:
        rows = self.beside(content)
        quickest = rows[rows["other"]].groupby("function", sort=False).first()
        if quickest.empty:
            return ""
        first, rest = quickest.iloc[0], quickest.iloc[1:]
        took = duration(rows[~rows["other"]].set_index("function").loc[first.name, "time"])
        others = in_sentence([f"`{name}`" for name in rest.index])
        beyond = (
            f"For {others}, the fastest other takes {in_sentence(rest['over'].map(formatted).tolist())} times as long."
        )
        return (
            f"`{first.name}` takes {took} at {first['shape']}, and the fastest other, {first['by']}, takes"
            f" {formatted(first['over'])} times as long. {beyond if len(rest) else 'Nothing else was compared.'}"
        )

    def table(self, content: Row) -> pd.DataFrame:
        rows = self.beside(content)
        columns = {
            "function": "`" + rows["function"] + "`",
            "by": rows["by"],
            "ms": (1e3 * rows["time"]).map(formatted),
            "× brandla": rows["over"].map(formatted),
            "error": rows["error"].map("{:.2g}".format),
            "case": rows["shape"],
        }
        return pd.DataFrame(columns)

    def chart(self, content: Row) -> Bars:
        rows = self.beside(content)
        labels = rows["function"].where(~rows["other"], rows["function"] + ": " + rows["by"])
        values = pd.Series((1e3 * rows["time"]).to_numpy(float), labels).head(ROWS)
        below, others = in_sentence(list(rows["shape"].unique())), set(labels[rows["other"]])
        return Bars("Time beside the quickest others", below, values, others, " ms")
