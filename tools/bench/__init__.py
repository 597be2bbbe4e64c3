"""The benchmarks. README.md has their results.

Run one from the repository's folder, as `python tools/bench/plan.py` or as `python -m tools.bench.plan`. Ranks start by
path. So each benchmark's first line puts the repository on the path, where a run by path does not look by itself.
"""
