"""Readers of raw files: blocks of rows in, columns out."""
