"""Every config file makes an experiment."""

import importlib
import json
import pathlib

import pytest

import configs
from experiments import experiment

FILES = sorted(pathlib.Path(configs.__file__).parent.glob("*_*.py"))
# What experiments.dictionary reads is tested beside it.
NAMES = [path.stem for path in FILES if not path.stem.startswith(("__", "sae"))]


@pytest.mark.parametrize("name", NAMES)
def test_a_config_is_complete(name, tmp_path):
  config = importlib.import_module(f"configs.{name}").get_config()
  json.dumps(config.to_dict())
  if config.task.name == "text":
    (tmp_path / "a").write_text("0123456789" * 1000)
    config.task.path = str(tmp_path / "a")
  if "sparsity" in config:
    config.sparsity = 0.75
    assert config.method.sparsity == 0.75
  parts = experiment.make(config)
  assert parts.task.validation
