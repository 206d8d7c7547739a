"""One command for everything that only a GPU can show: ``python -m bench.gpu``, or ``make gpu``.

Tests on the device, compute-sanitizer, measured ceilings, each op against them and against torch, the updates, CUDA
graphs, grouped calls, profiles and a search for better tiles, in under nine minutes. Each section is a module with one
function ``run(bench, found, time)`` and can be asked for alone; ``--dry-run`` takes the same path on a CPU with toys.
"""
