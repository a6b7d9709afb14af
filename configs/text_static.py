"""A random mask that never changes."""

from configs import base
from configs import text_dense


def get_config():
  config = text_dense.get_config()
  return base.with_sparsity(config, {"name": "static"}, 0.9)
