"""Finds the minimum set of memory techniques for a depth and a machine (paper 3.1)."""
