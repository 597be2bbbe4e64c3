"""Embedding tables, model-parallel over all ranks (paper 3.1, figure 4)."""

import dhen.runtime  # noqa: F401  must be imported before DeepSpeed and FBGEMM
from dhen.runtime.environment import check_fbgemm

check_fbgemm()
