"""The benchmarks that pytest-benchmark runs: speed and memory of the library beside its floors and its peers."""
