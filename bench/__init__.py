"""Benchmarks and studies: what they measure goes to ``results/``, and from there to ``docs/measurements``."""
