"""The sections of ``docs/measurements.md`` about growth, rooflines, functions and ops, from their result files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from bench.benches.peers import IN_FLOAT64, in_threads
from bench.frame.figures import spelled
from bench.frame.pages import PICTURES, table
from bench.frame.pictures import THEMES
from bench.scaling import METHODS

Row = dict[str, Any]


def picture(name: str, machine: str, words: str) -> str:
    """Return a picture in the variant that suits the reader's page."""
    lines = [f"![{words}]({PICTURES}/{machine}/{name}-{theme.name}.png#only-{theme.name})" for theme in THEMES]
    return "\n".join(lines) + "\n"


def interrupted(study: Row) -> str:
    """Return a warning where a run was stopped."""
    return "The run was interrupted: pieces are missing.\n" if study["facts"].get("interrupted") else ""


# ---------------------------------------------------------------------------------------------------------------------
# Growth
# ---------------------------------------------------------------------------------------------------------------------

GROWTH = """### Growth with n, r and k

`make study-scaling`. float32; updates at the steady state of an i^−½ stream; dense methods on a matrix with eigenvalues
1/i, handed to them for nothing; solves have k right-hand sides. Every result was checked against float64 before it was
timed. Memory is what is held between calls and the peak of a call on top. An exponent is the slope of log time, or
log memory, in log size by least squares, with Student's 95 % interval, misfit included: over all sizes, and over the
larger half of them, where what does not grow (calls, the core of order r + k) weighs less.
"""
LIMIT = 1.1


def growth(study: Row, machine: str) -> Iterator[str]:
    """Yield pictures, verdict and tables of the scaling study."""
    yield GROWTH + interrupted(study)
    yield picture("scaling", machine, "Time and memory against n, r and k")
    yield growth_verdict(study["exponents"])
    headings = ["grows", "method", "quantity", "all sizes", "exponent", "larger half", "exponent"]
    yield table(headings, exponent_rows(study["exponents"]))
    yield "#### Times and memory\n"
    headings = ["n, r, k", "method", "ms", "× the GEMMs of an update", "held, MB", "peak on top, MB"]
    yield table(headings, map(growth_row, study["rows"]))


def growth_verdict(fits: Sequence[Row]) -> str:
    """Say whether the time of updates and applications grew linearly, and how the others grew, with the sizes."""
    lines = []
    for power, window in ((1, "all"), (1, "larger half"), (2, "larger half"), (3, "larger half")):
        of_time = [fit for fit in fits if (fit["axis"], fit["quantity"], fit["window"]) == ("n", "time", window)]
        own = [fit for fit in of_time if fit["method"] in METHODS and METHODS[fit["method"]].time == power]
        if own:
            found = "; ".join(f"`{fit['method']}` {in_words(fit['exponent'])}, n {between(fit)}" for fit in own)
            lines.append(f"- said to be {power}, over {window_words(window)}: {found}.{to_reach(power, own)}")
    return "\n".join(["Exponents of time in n:\n", *lines, ""]) if lines else ""


def to_reach(power: int, fits: Sequence[Row]) -> str:
    """Return the target of what is to grow linearly, and whether all of it reached it."""
    if power != 1:
        return ""
    met = all(fit["exponent"][0] <= LIMIT for fit in fits)
    return f" To reach: {LIMIT} at most, {'met' if met else '**missed**'}."


def window_words(window: str) -> str:
    """Return the sizes of a fit in words."""
    return "all sizes" if window == "all" else "the larger half of the sizes"


def between(fit: Row) -> str:
    """Return the sizes that a fit is over."""
    return f"{fit['sizes'][0]} … {fit['sizes'][-1]}"


def in_words(interval: Sequence[float | None]) -> str:
    """Return an exponent with its interval, where there is one."""
    value, low, high = interval
    return f"{value:.2f}" if low is None or high is None else f"{value:.2f} ({low:.2f} to {high:.2f})"


def exponent_rows(fits: Sequence[Row]) -> Iterator[list[str]]:
    """Yield a row for each method and quantity, with both fits."""
    keyed = {(fit["axis"], fit["method"], fit["quantity"], fit["window"]): fit for fit in fits}
    for axis, method, quantity, window in keyed:
        if window == "all":
            cells = [keyed.get((axis, method, quantity, each)) for each in ("all", "larger half")]
            fitted = [
                text for fit in cells for text in ((between(fit), in_words(fit["exponent"])) if fit else ("", ""))
            ]
            yield [axis, f"`{method}`" if "_" in method else method, quantity, *fitted]


def growth_row(row: Row) -> list[str]:
    """Return a row of times and memory."""
    seconds, over = row["seconds"][0], row["over_reference"]
    ratio = f"{spelled(over[0])} ({spelled(over[1])} to {spelled(over[2])})"
    megabytes = [spelled(row[part] / 1e6) for part in ("held_bytes", "peak_bytes")]
    return [f"{row['n']}, {row['r']}, {row['k']}", row["method"], spelled(1e3 * seconds), ratio, *megabytes]


# ---------------------------------------------------------------------------------------------------------------------
# Rooflines
# ---------------------------------------------------------------------------------------------------------------------

ROOFLINES = """### Ops and the machine's ceilings

`make study-roofline`. The least time of an op is that of its bytes at the speed of a large copy, or of its products at
that of a large product, whichever is more; a symmetric result counts one triangle. Both speeds were measured in the
same run. Inputs outlast the cache. Every op was checked before it was timed against its torch form in float64, which
the tests hold to the formula; where that form is what runs, the error is 0.
"""
UNITS = {"copy": "GB/s, read + write"}


def rooflines(study: Row, machine: str) -> Iterator[str]:
    """Yield pictures and tables of the roofline study."""
    yield ROOFLINES + interrupted(study)
    yield picture("roofline", machine, "Part of the measured ceilings that each op reaches")
    yield table(["ceiling", "measured", "size"], map(ceiling_row, study["ceilings"]))
    headings = ["op", "case", "by", "µs", "GFLOP/s", "GB/s", "of the ceiling", "bound by", "error"]
    yield table(headings, map(roofline_row, study["rows"]))


def ceiling_row(row: Row) -> list[str]:
    """Return a row of the ceilings."""
    unit = UNITS.get(row["ceiling"], "GFLOP/s")
    value, low, high = (spelled(each / 1e9) for each in row["per_second"])
    size = f"{row['size'] / 2**20:g} MiB" if row["ceiling"] == "copy" else f"order {row['size']}"
    return [f"{row['ceiling']}, {row['when']}", f"{value} {unit} ({low} to {high})", size]


def roofline_row(row: Row) -> list[str]:
    """Return a row of the ops."""
    seconds = row["seconds"][0]
    rates = [spelled(row[amount] / seconds / 1e9) for amount in ("flops", "bytes")]
    part = "{:.2f} ({:.2f} to {:.2f})".format(*row["of_ceiling"])
    name, by, error = f"`{row['op']}`", row["by"], f"{row['error']:.0e}"
    return [name, row["case"], by, spelled(1e6 * seconds), *rates, part, row["bound_by"], error]


# ---------------------------------------------------------------------------------------------------------------------
# Functions and ops
# ---------------------------------------------------------------------------------------------------------------------

FUNCTIONS = """### Every public function, beside others

`make bench-functions`. Each result was checked against float64 before it was timed. Peers decompose, or solve with, the
dense matrix, which is handed to them for nothing. `grouped` takes four factors, of n, n/2, n/4 and n/4 rows. "Of the
floor" is the least time of the products and bytes that brandla's method cannot do without, at the ceilings of the
same run, over the time. The error is relative: ‖X − X̂‖_F/‖X‖_F of a decomposition, what truncation leaves included,
and the residual of a solve. "Off its form" is ‖UᵀU − I‖₂, or ‖S − FᵀF‖₂/‖FᵀF‖₂ of a root.
"""
OPS = """### Every op

`make bench-functions`. On inputs that stay in a CPU's cache where they fit it. The error is that against the torch form
in float64: 0 where that form is what runs.
"""


def cases(study: Row, name: str) -> Iterator[str]:
    """Yield one table a function."""
    yield (FUNCTIONS if name == "functions" else OPS) + interrupted(study)
    rows = study["rows"]
    yield from peers_of_numpy(rows)
    headings = ["by", "ms", "95 % interval", "× brandla", "of the floor", "error", "off its form, ε"]
    for function in dict.fromkeys(row["function"] for row in rows):
        yield f"#### `{function}`\n" if " " not in function else f"#### {function}\n"
        own = [row for row in rows if row["function"] == function]
        yield table(["case", *headings], case_rows(own))
    if study["refused"]:
        yield "#### Not timed\n\nWhat others failed at, or did not get right.\n"
        yield table(["case", "by", "why"], ([row["group"], row["by"], row["reason"]] for row in study["refused"]))


def peers_of_numpy(rows: Sequence[Row]) -> Iterator[str]:
    """Yield how many threads NumPy's peers had, where the file says so, and which do not compute in float32."""
    if any(row.get("blas_threads") for row in rows):
        yield "Peers on NumPy have one BLAS thread or as many as torch, whichever is quicker; the row says which.\n"
    doubled = [by for by in IN_FLOAT64 if any(row["by"] == by and row["dtype"] == "float32" for row in rows)]
    if doubled:
        yield f"In float64 even where the case is in float32: {', '.join(doubled)}.\n"


def whom(row: Row) -> str:
    """Return who computed a row, with the number of threads where it was chosen."""
    return f"{row['by']} ({in_threads(row['blas_threads'])})" if row.get("blas_threads") else str(row["by"])


def case_rows(rows: Sequence[Row]) -> Iterator[list[str]]:
    """Yield the rows of a function, each beside the library's own time in its group."""
    own = {row["group"]: row["seconds"][0] for row in rows if row["by"] == "brandla"}
    for row in rows:
        seconds, low, high = (spelled(1e3 * each) for each in row["seconds"])
        ratio = spelled(row["seconds"][0] / own[row["group"]])
        orthogonality = "" if row["orthogonality"] is None else spelled(row["orthogonality"])
        part = f"{row['of_ceiling'][0]:.2g}"
        yield [row["shape"], whom(row), seconds, f"{low} to {high}", ratio, part, f"{row['error']:.1e}", orthogonality]
