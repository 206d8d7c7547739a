"""How a case of the functions and ops is timed, what is kept of it, and what the cases say."""

import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pandas as pd
import pytest

from bench.benches.peers import REST
from bench.benches.tasks import BRANDLA, OURS
from bench.benches.timing import Interval, of_median
from bench.frame.figures import Study, duration, spelled
from bench.frame.pages import listed
from bench.frame.pictures import Bars
from bench.gpu.device import Ceilings, Device, Floor, Work
from brandla.demo.frame import plain

# Seconds that a case is timed for, and how often it is called at least and at most.
SECONDS, FEWEST, MOST = 0.25, 3, 100
# Order of the product that is timed before and after each case, and the seconds it may take: what two runs have in
# common. Before it there is a rest, as threads of one BLAS library spin for a while after a call.
REFERENCE, REFERENCE_SECONDS = 512, 0.01
# Facts of the machine that pytest-benchmark's own record of a case has too.
FACTS = ("cpu", "cores", "threads", "versions", "commit", "modified", "date", "gpu")
# Characters of a reason.
LONGEST = 160
Row = dict[str, Any]


class Run(NamedTuple):
    """What all cases of a run have in common: the machine, its ceilings, and the times of a product on it now."""

    quick: bool
    machine: Row
    ceilings: Ceilings
    reference: Callable[[], list[float]]


def reference_on(device: Device) -> Callable[[], list[float]]:
    """Return a function that times a square product, after a rest.

    The device times it: pytest-benchmark has one function a case, and that is what the case is about.
    """
    left, right = (device.normal(REFERENCE, REFERENCE) for _ in range(2))

    def times() -> list[float]:
        time.sleep(0.0 if device.dry else REST)
        return device.alternating({"it": lambda: left @ right}, REFERENCE_SECONDS)["it"]

    return times


@contextmanager
def opened(benchmark: Any, run: Run, study: Study, group: str, by: str, **about: Any) -> Iterator[Callable[..., None]]:
    """Open a case: there a result is checked, and timed by the function that is yielded.

    Whatever goes wrong with a peer there is kept, with its reason, and the run goes on; what is ours fails.
    """
    benchmark.group, about = group, {"group": group, "by": by, **about}

    def time_calls(copies: list[Callable[[], Any]], work: Work, **judged: Any) -> None:
        """Time calls on copies of the inputs in turn, so that no cache holds them.

        With more than one copy a round is a call on each, queued one after the other, between two looks at the timer.
        The call was checked before, and so is warm.
        """
        start = time.perf_counter()
        copies[0]()
        wanted = SECONDS / len(copies) / (time.perf_counter() - start)
        rounds = 2 if run.quick else int(min(max(wanted, FEWEST), MOST))
        in_turn = itertools.cycle(copies)
        call = lambda: next(in_turn)()  # noqa: PLW0108 (the call that comes next is what is timed)
        around = run.reference()
        benchmark.pedantic(call, rounds=rounds, iterations=len(copies), warmup_rounds=1 if wanted > FEWEST else 0)
        around += run.reference()
        floor, flops = run.ceilings.floor(work), work.float32 + work.float64 + work.bf16
        row = about | judged | {"flops": flops, "bytes": work.bytes, "bound_by": floor.bound_by}
        benchmark.extra_info.update(plain(row | {key: run.machine.get(key) for key in FACTS}))
        if benchmark.stats:
            study.cases.append(row | row_of(benchmark.stats.stats.data, around, floor))
            benchmark.extra_info["of_ceiling"] = study.cases[-1]["of_ceiling"].value

    try:
        yield time_calls
    except Exception as error:
        if by in OURS:
            raise
        said = str(error).strip().partition("\n")[0].replace("|", "/")
        reason = f"{type(error).__name__}: {said}"[:LONGEST]
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
        shared = rows.groupby(["function", "shape"])["by"].transform("nunique") > 1
        rows = rows.assign(time=rows["seconds"].str[0], shared=shared, other=rows["by"] != BRANDLA)
        largest = rows.sort_values(["shared", "n"], kind="stable").groupby("function")["shape"].transform("last")
        rows = rows[rows["shape"] == largest.reindex(rows.index)]
        order = {name: at for at, name in enumerate(rows["function"].unique())}
        ours = rows["time"].where(~rows["other"]).groupby(rows["function"]).transform("first")
        rows = rows.assign(over=rows["time"] / ours, order=rows["function"].map(order)).dropna(subset="over")
        rows = rows.sort_values(["order", "other", "time"], kind="stable")
        return rows.groupby("function", sort=False).head(max(2, ROWS // max(1, rows["function"].nunique())))

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
            "ms": [spelled(1e3 * time) for time in rows["time"]],
            "× brandla": [spelled(over) for over in rows["over"]],
            "error": [f"{error:.2g}" for error in rows["error"]],
            "case": rows["shape"],
        }
        return pd.DataFrame(columns)

    def chart(self, content: Row) -> Bars:
        rows = self.beside(content)
        labels = rows["function"].where(~rows["other"], rows["function"] + ": " + rows["by"])
        values = pd.Series((1e3 * rows["time"]).to_numpy(float), labels).head(ROWS)
        return Bars(
            "Time beside the quickest others",
            listed(list(rows["shape"].unique())),
            values,
            set(labels[rows["other"]]),
            " ms",
        )
