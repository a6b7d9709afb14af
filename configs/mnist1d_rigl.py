"""RigL on MNIST-1D with an MLP: a minute."""

from configs import base


def get_config():
  config = base.get_config()
  config.steps = 4_000
  config.batch_size = 64
  config.task = {"name": "mnist1d"}
  config.model = {"name": "mlp", "width": 256, "depth": 2}
  rigl = {"name": "rigl", "every": 100, "until": 3_000, "drop_fraction": 0.3}
  return base.with_sparsity(config, rigl, 0.9)
