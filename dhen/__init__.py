"""DHEN, the Deep and Hierarchical Ensemble Network for click-through-rate prediction (Meta, 2022)."""

__version__ = "0.1.0"
