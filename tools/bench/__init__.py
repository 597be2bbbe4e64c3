"""The benchmarks: each measures one promise; README.md has their tables."""
