"""One command for everything that only a GPU can show: ``python -m bench.gpu``, or ``make gpu``.

Stages run one after the other, the most valuable facts first, each in processes of its own. They write each finding as
a line of ``gpu.jsonl`` at once. `__main__` lists the stages, and starts and ends the processes. `frame` has the record
and its report. ``--dry-run`` takes the same path on a CPU at toy sizes.
"""
