"""Benchmarks: seeded workloads, run side by side with other software. `python -m benchmark.engines`."""
