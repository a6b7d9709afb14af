"""MiniLM, read once, and a directory of a tiny Llama that a test may spoil."""

import json
import shutil

from flax import nnx
import pytest

from experiments.models import pretrained
from tests.models import problem


@pytest.fixture(scope="session")
def minilm() -> pretrained.Pretrained:
  return pretrained.load("minilm")


@pytest.fixture(scope="session")
def minilm_hidden(minilm):
  """(tokens, valid, types) -> hidden states, compiled once for a shape."""
  run = nnx.jit(lambda model, *inputs: model(*inputs))
  return lambda tokens, valid, types=None: run(
    minilm.model, tokens, valid, types
  )


@pytest.fixture(scope="session")
def reference():
  """(name) -> the numbers of transformers that make_reference.py wrote."""
  return lambda name: json.loads(
    (problem.DATA / f"{name}.json").read_text(encoding="utf-8")
  )


@pytest.fixture
def llama_directory(tmp_path) -> problem.Directory:
  path = tmp_path / "llama"
  # Without the modes, which a checkout may have made read-only.
  shutil.copytree(problem.DATA / "llama", path, copy_function=shutil.copyfile)
  return problem.Directory(path)
