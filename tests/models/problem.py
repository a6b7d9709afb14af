"""Small configs, and a model's directory that a test may spoil."""

import json
import pathlib

from safetensors import numpy as safetensors

DATA = pathlib.Path(__file__).resolve().parent / "data"

# What a config.json must say.
BERT = {
  "vocab_size": 32,
  "hidden_size": 16,
  "num_hidden_layers": 2,
  "num_attention_heads": 2,
  "intermediate_size": 24,
}
LLAMA = {
  "vocab_size": 64,
  "hidden_size": 32,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
  "intermediate_size": 48,
}


class Directory:
  """A model's directory, and ways to change what its files hold."""

  def __init__(self, path: pathlib.Path):
    self.path = path
    self.config = path / "config.json"
    self.weights = path / "model.safetensors"
    self.index = path / "model.safetensors.index.json"
    self.tokenizer = path / "tokenizer.json"

  def set(self, **fields) -> None:
    """Changes fields of the config; None stays, as null."""
    config = json.loads(self.config.read_text()) | fields
    self.config.write_text(json.dumps(config))

  def tensors(self):
    return safetensors.load_file(self.weights)

  def save(self, tensors) -> None:
    safetensors.save_file(tensors, self.weights)

  def shard(self, into: int = 2) -> list[pathlib.Path]:
    """Splits the weights into files and an index, and returns the files."""
    tensors = self.tensors()
    self.weights.unlink()
    names, files = sorted(tensors), []
    weight_map = {}
    for i in range(into):
      files.append(self.path / f"model-{i + 1:05}-of-{into:05}.safetensors")
      part = {name: tensors[name] for name in names[i::into]}
      safetensors.save_file(part, files[-1])
      weight_map |= dict.fromkeys(part, files[-1].name)
    self.index.write_text(json.dumps({"weight_map": weight_map}))
    return files
