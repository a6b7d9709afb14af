"""Gradual magnitude pruning: dense at first, sparse by three quarters."""

from configs import base
from configs import text_dense


def get_config():
  config = text_dense.get_config()
  gradual = {
    "name": "gradual_magnitude",
    "begin": 0,
    "until": 1_500,
    "every": 100,
  }
  return base.with_sparsity(config, gradual, 0.9)
