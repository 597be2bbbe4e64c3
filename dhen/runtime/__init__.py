"""This process and its job: ranks and process groups, set-up before DeepSpeed and FBGEMM are imported, lost ranks."""

from dhen.runtime.environment import prepare_environment

prepare_environment()
