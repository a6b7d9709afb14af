"""Signatures and docstrings: which pairs there are, and how they are split."""

import functools

import numpy as np
import pytest

from experiments.tasks import docstrings

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
  # A signature that a pair has already, with other words.
  again = TEXT.format(name="sum").replace("nothing", "not much")
  with (tmp_path / "of_sum.py").open("a") as file:
    file.write(again)
  return tmp_path


def test_pairs(files):
  pairs = docstrings.load(files)
  assert len(pairs.docstrings) == len(set(pairs.docstrings)) == 7
  assert len(set(pairs.signatures)) == 7
  assert pairs.signatures[0] == "of_mean: def mean(x, *, of=1)"
  assert (
    pairs.docstrings[0] == "Gives the mean of x, and of nothing else than x."
  )
  assert not any("not much" in text for text in pairs.docstrings)
  assert pairs.source == docstrings.load(files).source
  with pytest.raises(ValueError, match="no Python file"):
    docstrings.load(files / "nowhere")


def test_the_standard_library_has_pairs():
  pairs = docstrings.load()
  assert len(pairs.docstrings) == len(set(pairs.signatures)) > 1000
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
