"""Finds the raw rows: which files, in which pieces, and the split of each row."""
