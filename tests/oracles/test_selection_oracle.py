"""What the oracles of selectors share, by hand.

data/selection_authors.json has what the authors' code gives for inputs drawn
by `normal`, and where their conventions differ.
"""

import json
import math
import pathlib

from absl.testing import parameterized
import numpy as np

from tests.oracles import selection as oracle

AUTHORS = json.loads(
  (pathlib.Path(__file__).parent / "data/selection_authors.json").read_text()
)["results"]
exact = lambda got, want: np.testing.assert_allclose(got, want, atol=1e-13)


def normal(seed, *shape):
  draw = np.random.default_rng(seed).standard_normal(shape)
  return draw.astype(np.float32).astype(np.float64)


def authors(name):
  """A test for each of the cases of `name` in the file."""
  return parameterized.parameters(*[(x,) for x in AUTHORS[name]])


class ChoosingTest(parameterized.TestCase):
  def test_top_is_a_stable_sort(self):
    rng = np.random.default_rng(0)
    for _ in range(50):
      x = rng.integers(0, 4, 9).astype(float)
      k = int(rng.integers(0, 11))
      want = np.argsort(-x, kind="stable")[:k]
      self.assertEqual(oracle.top(dict(enumerate(x)), k), sorted(want.tolist()))

  def test_forced(self):
    scores = dict(enumerate([5.0, 4.0, 3.0, 2.0]))
    self.assertEqual(oracle.top(scores, 2, [3]), [0, 3])
    self.assertEqual(oracle.top(scores, 1, [2, 3]), [2, 3])
    self.assertEqual(oracle.top(scores, 9, [3]), [0, 1, 2, 3])
    # What is no candidate is not forced.
    self.assertEqual(oracle.top(scores, 1, [7]), [0])
    self.assertEqual(oracle.prefix(scores, 0.4, [3]), [0, 3])

  def test_prefix_is_the_smallest(self):
    rng = np.random.default_rng(1)
    for _ in range(50):
      x = rng.random(7)
      share = float(rng.random())
      kept = oracle.prefix(dict(enumerate(x)), share)
      mass = sorted(x[kept])
      self.assertGreaterEqual(sum(mass) / x.sum(), share - 1e-12)
      self.assertLess(sum(mass[1:]) / x.sum(), share)
      self.assertLen(kept, len(oracle.top(dict(enumerate(x)), len(kept))))

  def test_prefix_is_exact(self):
    tenths = {i: 0.1 for i in range(10)}
    for n in range(11):
      self.assertLen(oracle.prefix(tenths, n / 10), n)
    self.assertEqual(oracle.prefix({0: 1.0, 5: 0.0}, 1.0), [0, 5])
    self.assertEqual(oracle.prefix({}, 0.5), [])


class ReadingTest(parameterized.TestCase):
  def test_attend_is_softmax(self):
    q, k, v = normal(0, 5, 4, 3), normal(1, 5, 2, 3), normal(2, 5, 2, 6)
    out, lse = oracle.dense(q, k, v)
    z = np.einsum("shd,thd->hst", q, np.repeat(k, 2, axis=1)) / math.sqrt(3)
    z = np.where(np.tri(5, dtype=bool), z, -np.inf)
    p = np.exp(z)
    exact(lse.T, np.log(p.sum(axis=-1)))
    p /= p.sum(axis=-1, keepdims=True)
    exact(out, np.einsum("hst,thd->shd", p, np.repeat(v, 2, axis=1)))
    exact(oracle.probabilities(q, k), p)

  def test_nothing(self):
    out, lse = oracle.attend(*[np.ones((1, 1, 2))] * 3, [[[]]])
    exact(out, 0)
    self.assertEqual(lse.item(), -math.inf)

  def test_lists(self):
    tiles = oracle.read_tiles([[[0], [0, 1]]], 2, 3, 3, 5)
    self.assertEqual(tiles, [[[0], [0, 1], [0, 1, 2]]])
    rows = oracle.read_blocks([[[0], [1]]], 2, 5, group=2, offset=2)
    self.assertEqual(rows, [[[0, 1], [2, 3]]] * 2)

  def test_means_of_a_short_block(self):
    x = normal(0, 7, 2)
    exact(oracle.means(x, 3)[2], x[6])
    with self.assertRaises(ValueError):
      oracle.group_size(np.ones((1, 3, 1)), np.ones((1, 2, 1)))
