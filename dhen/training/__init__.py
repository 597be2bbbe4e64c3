"""Training: the loop, metrics, progress reports, checkpoints and export."""
