"""The pruning experiment: its text, its figures, and a run on a small model."""

import functools
import json

from flax import nnx
import numpy as np
import pytest
import tokenizers

from experiments import prune
from experiments.models import bert
from experiments.models import pretrained
from experiments.tasks import docstrings
from sparsejax import select

TEXT = '''
def {name}(x, *, of=1):
  """Gives the {name} of x, and of nothing else than x.

  More words."""
'''


@pytest.fixture
def files(tmp_path):
  names = ("mean", "sum", "median", "range", "mode", "variance", "product")
  for name in names:
    (tmp_path / f"of_{name}.py").write_text(TEXT.format(name=name))
  (tmp_path / "twice.py").write_text(TEXT.format(name="mean"))
  (tmp_path / "broken.py").write_text("def f(:")
  (tmp_path / "private.py").write_text(TEXT.format(name="_hidden"))
  return tmp_path


def test_pairs(files):
  pairs = docstrings.load(files)
  assert len(pairs.docstrings) == len(set(pairs.docstrings)) == 7
  assert pairs.signatures[0] == "of_mean: def mean(x, *, of=1)"
  assert (
    pairs.docstrings[0] == "Gives the mean of x, and of nothing else than x."
  )
  assert pairs.source == docstrings.load(files).source
  with pytest.raises(ValueError, match="no Python file"):
    docstrings.load(files / "nowhere")


def test_the_standard_library_has_pairs():
  pairs = docstrings.load()
  assert len(pairs.docstrings) > 1000
  assert "standard library" in pairs.source


def test_no_pair_calibrates_and_evaluates(files):
  pairs = docstrings.load(files)
  split = functools.partial(docstrings.split, pairs, evaluation=3)
  first, held = split(calibration=4, seed=0)
  second, again = split(calibration=4, seed=1)
  np.testing.assert_array_equal(held, again)
  assert sorted([*first, *held]) == sorted([*second, *held]) == list(range(7))
  assert list(first) != list(second)
  with pytest.raises(ValueError, match="7 pairs"):
    split(calibration=5, seed=0)


def test_retrieval():
  texts = np.eye(4)
  assert prune.retrieval(texts, texts) == 1
  assert prune.retrieval(texts[[1, 0, 2, 3]], texts) == 0.5


@pytest.fixture
def small(monkeypatch):
  config = bert.Config(
    vocab_size=32,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=32,
    max_position_embeddings=16,
  )
  words = [
    "gives",
    "the",
    "of",
    "x",
    "and",
    "nothing",
    "else",
    "than",
    "mean",
    "sum",
    "def",
  ]
  vocabulary = {word: i for i, word in enumerate(["[UNK]", *words])}
  tokenizer = tokenizers.Tokenizer(
    tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]")
  )
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  model = bert.Bert(config, rngs=nnx.Rngs(0))
  found = pretrained.Pretrained(model, tokenizer, config)
  monkeypatch.setattr(pretrained, "load", lambda source: found)
  return model


def test_a_run_on_a_small_model(small, files, monkeypatch, tmp_path):
  pairs = docstrings.load(files)
  monkeypatch.setattr(docstrings, "load", lambda: pairs)
  before = nnx.to_pure_dict(nnx.state(small))
  found = prune.measure(
    "small", ["magnitude", "sparsegpt"], [0.5], "unstructured", 2, 4, 3, 8
  )
  after = nnx.to_pure_dict(nnx.state(small))
  np.testing.assert_array_equal(
    before["blocks"][0]["up"]["kernel"], after["blocks"][0]["up"]["kernel"]
  )
  assert [row["method"] for row in found["rows"]] == (
    ["magnitude"] * 2 + ["sparsegpt"] * 2
  )
  for row in found["rows"]:
    assert 0 < row["error"] < 1 and 0 < row["fidelity"] <= 1
  lines = prune.table(found).splitlines()
  assert "at most 8 tokens" in lines[0] and pairs.source in lines[0]
  assert all(row["calibration"] in lines[3] for row in found["rows"][:2])
  json.dumps(found)
  prune.draw(found, tmp_path / "prune.png")
  assert (tmp_path / "prune.png").stat().st_size > 1000


def test_all_kept_is_the_dense_model(small):
  batch = (np.arange(24).reshape(2, 12) % 32, np.ones((2, 12), bool))
  method = functools.partial(
    prune.METHODS["wanda"], density=1.0, structure=None
  )
  pruned, error = prune.prune_in_order(small, [batch], method)
  assert error == 0
  np.testing.assert_array_equal(
    prune.embed(pruned, [batch]), prune.embed(small, [batch])
  )


def test_structures_hold(small):
  batch = (np.arange(24).reshape(2, 12) % 32, np.ones((2, 12), bool))
  method = functools.partial(
    prune.METHODS["dsnot"], density=None, structure=select.NM(2, 4)
  )
  pruned, _ = prune.prune_in_order(small, [batch], method)
  kernel = np.asarray(pruned.blocks[1].down.kernel[...])
  assert ((kernel != 0).reshape(-1, 4, 16).sum(1) == 2).all()
