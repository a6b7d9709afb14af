"""A dense byte-level Transformer on the text of Python's standard library."""

from configs import base


def get_config():
  config = base.get_config()
  config.task = {
    "name": "text",
    "path": "",  # a directory or a file; "" is Python's standard library
    "glob": "*.py",
    "sequence_length": 128,
    "validation_batches": 32,
  }
  config.model = {"name": "transformer", "width": 128, "depth": 4, "heads": 4}
  return config
