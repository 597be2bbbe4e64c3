"""This process in its job: who it is, what must be true before DeepSpeed and FBGEMM are imported, who is lost."""

from dhen.runtime.environment import prepare_environment

prepare_environment()
