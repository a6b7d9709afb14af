"""The dense model that a byte takes as many operations in as in text_moe."""

from configs import text_moe


def get_config():
  config = text_moe.get_config()
  config.model = {"name": "transformer", "width": 64, "depth": 2, "heads": 4}
  return config
