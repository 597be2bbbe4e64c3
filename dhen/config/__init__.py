"""What a user can set: the arguments of a run, and the ds_config that fits it to a machine."""

import dhen.runtime  # noqa: F401  must be imported before DeepSpeed and FBGEMM
