"""The dense part spread over ranks: hybrid sharding, checkpointing, offload (paper 3.2)."""

import dhen.runtime  # noqa: F401  before DeepSpeed and FBGEMM are imported
