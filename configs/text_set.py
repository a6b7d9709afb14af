"""SET: magnitude drops, chance grows."""

from configs import base
from configs import text_dense


def get_config():
  config = text_dense.get_config()
  set_ = {"name": "set_", "every": 100, "until": 1_500, "drop_fraction": 0.3}
  return base.with_sparsity(config, set_, 0.9)
