"""Measurements that can be repeated: ``python benchmarks/run_all.py`` writes their tables into docs/benchmarks.md."""
