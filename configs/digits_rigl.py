"""RigL on scikit-learn's digits with an MLP: seconds."""

from configs import base


def get_config():
  config = base.get_config()
  config.steps = 1_000
  config.batch_size = 64
  config.task = {"name": "digits"}
  config.model = {"name": "mlp", "width": 128, "depth": 2}
  rigl = {"name": "rigl", "every": 25, "until": 750, "drop_fraction": 0.3}
  return base.with_sparsity(config, rigl, 0.9)
