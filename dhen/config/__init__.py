"""What a user may say: arguments, and the ds_config that fits a run to its machine."""

import dhen.runtime  # noqa: F401  before DeepSpeed and FBGEMM are imported
