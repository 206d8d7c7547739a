"""Benchmarks and studies. Their measurements go to ``results/``, and from there to ``docs/measurements``."""
