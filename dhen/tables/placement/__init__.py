"""Decides which rank holds which part of each table (paper 3.1)."""
