"""SR-STE: two of every four weights, which stay dense underneath."""

from configs import text_dense


def get_config():
  config = text_dense.get_config()
  config.method = {"name": "sr_ste", "n": 2, "m": 4, "decay": 2e-4}
  return config
