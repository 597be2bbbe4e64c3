"""Turns click-log files into batches."""
