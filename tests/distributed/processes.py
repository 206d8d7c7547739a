"""Run a function in several processes that form a gloo group on the loopback interface.

Processes are forked from a server that has imported torch. So the first launch costs seconds, and later ones a tenth of
a second. The processes meet in a file, not at a port. Those that still run after ``timeout`` seconds are killed.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import pickle
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from torch.distributed.tensor import DTensor
from torch.multiprocessing import start_processes
from torch.utils._pytree import tree_map

# The first DTensor imports torch._dynamo, and the oracles scipy.linalg. Preloading imports them only once.
PRELOADED = ["torch.distributed.tensor", "torch._dynamo", "scipy.linalg", "brandla"]
multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOADED)


def run(
    function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 60.0, group_timeout: float = 20.0
) -> list[Any]:
    """Return the results of ``function(*args)`` on all ranks, which are processes with one thread in one group.

    The function must be in a module under ``tests``. The function, its arguments and its results must pickle, which a
    DTensor does not. ``timeout`` seconds are for the whole call, ``group_timeout`` for one collective. A rank that
    exits without a result has None. Raises if a rank raised, or was still running at the end.
    """
    deadline = time.monotonic() + timeout
    with tempfile.TemporaryDirectory() as folder:
        given = pickle.dumps((function, args)), world_size, Path(folder), timeout, group_timeout
        ranks = start_processes(_rank, given, world_size, join=False, daemon=True, start_method="forkserver")
        try:
            while not ranks.join(max(0.0, deadline - time.monotonic())):
                if time.monotonic() >= deadline:
                    raise RuntimeError("a rank is still running at the time limit")
        finally:
            for process in ranks.processes:
                process.kill()
                process.join()
        answers = [Path(folder) / f"{rank}" for rank in range(world_size)]
        return [pickle.loads(answer.read_bytes()) if answer.exists() else None for answer in answers]


def _rank(rank: int, call: bytes, world_size: int, folder: Path, timeout: float, group_timeout: float) -> None:
    # A rank that still runs a second before the timeout prints its stack.
    faulthandler.dump_traceback_later(max(timeout - 1, 0.1))
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = distributed.FileStore(str(folder / "store"), world_size)
    group = {"rank": rank, "world_size": world_size, "timeout": timedelta(seconds=group_timeout)}
    distributed.init_process_group("gloo", store=store, **group)
    try:
        function, args = pickle.loads(call)
        (folder / f"{rank}").write_bytes(pickle.dumps(function(*args)))
    finally:
        distributed.destroy_process_group()
        faulthandler.cancel_dump_traceback_later()


def whole(tree: Any) -> Any:
    """Return the tree with every DTensor gathered."""
    return tree_map(lambda part: part.full_tensor() if isinstance(part, DTensor) else part, tree)


def refusal(call: Callable[[], object]) -> str:
    """Return the type and message of the error that a call raises; an empty string if it raises none."""
    try:
        call()
    except (RuntimeError, TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return ""
