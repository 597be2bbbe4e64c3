"""How the model is spread over ranks (paper section 3)."""

from dhen.parallel.environment import prepare_environment

prepare_environment()
