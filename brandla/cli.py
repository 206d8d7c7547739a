"""The command line. ``brandla info`` needs torch alone; ``brandla demo`` needs the ``demo`` extra."""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import sys
from collections.abc import Sequence

import brandla

NEEDED_BY_DEMO = ("matplotlib", "numpy", "pandas", "rich", "sklearn", "typer")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command. By default, ``arguments`` are those of the process."""
    parser = argparse.ArgumentParser(
        prog="brandla", description="Streaming low-rank linear algebra, and K-FAC on top of it.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"brandla {brandla.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="command", dest="command")
    info_parser = commands.add_parser("info", help="print versions, devices, and which backend each op takes and why")
    info_parser.add_argument("--json", action="store_true", help="print the same as JSON")
    # The demo parses its own options, --help among them.
    commands.add_parser("demo", help="track a real layer's input factor, then train with K-FAC", add_help=False)
    options, rest = parser.parse_known_args(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # The tables contain signs such as ≤, which not every terminal can show.
        sys.stdout.reconfigure(errors="replace")
    if options.command == "demo":
        missing = [name for name in NEEDED_BY_DEMO if importlib.util.find_spec(name) is None]
        if missing:
            sys.exit(f"brandla demo: {', '.join(missing)} not installed: pip install 'brandla[demo]'")
        from brandla.demo.commands import app

        app(rest, prog_name="brandla demo")
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    elif options.command == "info":
        from brandla.demo import info

        print(json.dumps(info.facts(), indent=2, ensure_ascii=False) if options.json else info.as_text())
    else:
        parser.print_help()
