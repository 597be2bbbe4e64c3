"""The dense part across ranks: hybrid sharding, activation checkpointing and activation offload (paper 3.2)."""

import dhen.runtime  # noqa: F401  must be imported before DeepSpeed and FBGEMM
