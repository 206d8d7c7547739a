"""One command for everything that only a GPU can show: ``python -m bench.gpu``, or ``make gpu``.

Stages run one after the other, the most valuable facts first, each in processes of its own, and write what they find
line by line into ``gpu.jsonl``. `__main__` lists them, and starts and ends the processes, and `frame` is the record and
its report. ``--dry-run`` takes the same path on a CPU with toys.
"""
