"""Embedding tables, model-parallel over all ranks (paper 3.1, figure 4)."""
