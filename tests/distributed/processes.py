"""Run a function in several processes that form a gloo group on the loopback interface.

Processes are forked from a server that has imported torch, so the first launch costs seconds and the others a tenth of
one. They meet in a file, not at a port. Nothing outlives a call: after ``timeout`` seconds what still runs is killed.
"""

from __future__ import annotations

import faulthandler
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import connection, get_context
from pathlib import Path
from typing import Any, NamedTuple

_context = get_context("forkserver")
# The first DTensor imports torch._dynamo, and the oracles scipy.linalg: once here, in place of once a process.
_context.set_forkserver_preload(["torch.distributed.tensor", "torch._dynamo", "scipy.linalg", "brandla"])


class Outcome(NamedTuple):
    """How one rank ended: with a result, or with the reason why there is none."""

    result: Any
    failure: str | None


def run(function: Callable[..., Any], world_size: int, *args: Any, **limits: float) -> list[Any]:
    """Return what ``function(*args)`` returns on each rank, a process with one thread and a group around it.

    The function is one of a module under ``tests``; it, its arguments and results have to pickle, which a DTensor does
    not. ``timeout`` seconds are for all of it, ``group_timeout`` for one collective. Raises RuntimeError if a
    rank raised, died, or was still running at the end.
    """
    outcomes = launch(function, world_size, *args, **limits)
    failures = [f"rank {rank}: {outcome.failure}" for rank, outcome in enumerate(outcomes) if outcome.failure]
    if failures:
        raise RuntimeError("\n".join([f"{len(failures)} of {world_size} ranks failed", *failures]))
    return [outcome.result for outcome in outcomes]


def launch(
    function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 60.0, group_timeout: float = 20.0
) -> list[Outcome]:
    """`run`, for tests in which a rank is meant to fail: return how each rank ended."""
    call = pickle.dumps((function, args))
    deadline = time.monotonic() + timeout
    with tempfile.TemporaryDirectory() as folder:
        ends, processes = [], []
        try:
            for rank in range(world_size):
                receiver, sender = _context.Pipe(duplex=False)
                group = {"rank": rank, "world_size": world_size, "timeout": timedelta(seconds=group_timeout)}
                process = _context.Process(target=_rank, args=(call, sender, folder, group, timeout), daemon=True)
                process.start()
                sender.close()
                ends.append(receiver)
                processes.append(process)
            return [_outcome(*pair, deadline) for pair in zip(ends, processes, strict=True)]
        finally:
            for process in processes:
                process.kill()
                process.join()
            for end in ends:
                end.close()


def _outcome(end: connection.Connection, process: Any, deadline: float) -> Outcome:
    """Wait for one rank. The answers of the others meanwhile lie in their pipes or keep them waiting to write."""
    if not end.poll(max(0.0, deadline - time.monotonic())):
        return Outcome(None, "still running at the time limit")
    try:
        return Outcome(*pickle.loads(end.recv_bytes()))
    except EOFError:
        process.join()
        return Outcome(None, f"died with exit code {process.exitcode}")


def _rank(call: bytes, sender: connection.Connection, folder: str, group: dict[str, Any], timeout: float) -> None:
    # What still runs a second before its end says where it is.
    faulthandler.dump_traceback_later(max(timeout - 1, 0.1))
    try:
        answer = pickle.dumps(Outcome(_in_group(call, folder, group), None))
    except BaseException:
        answer = pickle.dumps(Outcome(None, traceback.format_exc()))
    faulthandler.cancel_dump_traceback_later()
    sender.send_bytes(answer)


def _in_group(call: bytes, folder: str, group: dict[str, Any]) -> Any:
    import torch
    from torch import distributed

    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = distributed.FileStore(str(Path(folder) / "store"), group["world_size"])
    distributed.init_process_group("gloo", store=store, **group)
    try:
        function, args = pickle.loads(call)
        return function(*args)
    finally:
        distributed.destroy_process_group()


def refusal(call: Callable[[], object]) -> str:
    """Return the error that a call raises, in words; nothing if it goes through."""
    try:
        call()
    except (RuntimeError, TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return ""
