"""``python -m brandla``: the same as ``brandla``."""

from __future__ import annotations

from brandla.cli import main

main()
