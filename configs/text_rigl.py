"""RigL: magnitude drops, gradient grows; ERK divides the budget."""

from configs import base
from configs import text_dense


def get_config():
  config = text_dense.get_config()
  rigl = {"name": "rigl", "every": 100, "until": 1_500, "drop_fraction": 0.3}
  return base.with_sparsity(config, rigl, 0.9)
