"""The command line: ``brandla info`` and ``brandla demo``. What it needs comes with the ``demo`` extra."""

from __future__ import annotations

import importlib.util
import io
import sys

NEEDED = ("matplotlib", "numpy", "pandas", "rich", "sklearn", "typer")


def main() -> None:
    """Run the command line, or say in one line how to get what it needs."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        print(f"brandla: {', '.join(missing)} not installed; in a clone: pip install '.[demo]'", file=sys.stderr)
        raise SystemExit(1)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # The tables hold signs such as ≤, which not every terminal has.
        sys.stdout.reconfigure(errors="replace")
    from brandla.demo.commands import app

    app()
