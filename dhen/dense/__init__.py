"""The dense part spread over ranks: hybrid sharding, checkpointing, offload (paper 3.2)."""
