"""The oracle of patterns: by hand, its limits, and the authors' masks.

data/selection_authors.json has what the authors' code gives.
"""

from absl.testing import parameterized
import numpy as np

from tests.oracles import patterns as oracle
from tests.oracles.test_selection_oracle import authors


def same(got, want):
  np.testing.assert_array_equal(np.asarray(got), np.asarray(want))


class BandsTest(parameterized.TestCase):
  def test_causal(self):
    same(oracle.causal(4, 4), np.tri(4, dtype=bool))
    same(oracle.causal(1, 4, offset=3), np.ones((1, 4)))
    same(oracle.causal(2, 5, offset=3), np.tri(5, dtype=bool)[3:])

  def test_window_counts(self):
    counts = oracle.window(9, 9, left=3, right=1).sum(axis=1)
    self.assertEqual(counts.tolist(), [2, 3, 4, 5, 5, 5, 5, 5, 4])

  def test_limits(self):
    n = 7
    dense = oracle.causal(n, n)
    same(oracle.window(n, n, left=n), dense)
    same(oracle.sinks(n, n, first=0, local=n), dense)
    same(oracle.sinks(n, n, first=n, local=1), dense)
    same(oracle.dilated(n, n, left=n), dense)
    same(oracle.strided(n, n, local=1, stride=1), dense)
    same(oracle.diagonals(n, n, range(n)), dense)
    same(oracle.columns(n, n, range(n)), dense)
    same(oracle.sinks(n, n, first=0, local=3), oracle.window(n, n, left=2))
    same(oracle.sinks(n, n, first=0, local=0), np.zeros((n, n)))
    same(oracle.diagonals(n, n, [0]), np.eye(n))

  def test_union_and_intersection(self):
    n = 8
    first = oracle.columns(n, n, range(2))
    local = oracle.window(n, n, left=2)
    same(first | local, oracle.sinks(n, n, first=2, local=3))
    both = oracle.window(n, n, left=4) & oracle.diagonals(n, n, [0, 2, 4, 6])
    same(both, oracle.dilated(n, n, left=2, dilation=2))

  def test_strided_is_local_and_diagonals(self):
    got = oracle.strided(9, 9, local=2, stride=3)
    want = oracle.window(9, 9, left=1) | oracle.diagonals(9, 9, [0, 3, 6])
    same(got, want)

  def test_stripes_do_not_look_ahead(self):
    got = oracle.stripes(5, 5, verticals=[3], slashes=[1, -1])
    self.assertFalse(np.triu(got, 1).any())
    self.assertEqual(np.argwhere(got).tolist(), [
      [1, 0], [2, 1], [3, 2], [3, 3], [4, 3],
    ])  # fmt: skip

  def test_decode_is_the_last_row(self):
    for make in (
      lambda s, o: oracle.window(s, 6, left=2, offset=o),
      lambda s, o: oracle.sinks(s, 6, first=1, local=2, offset=o),
      lambda s, o: oracle.dilated(s, 6, left=2, dilation=2, offset=o),
      lambda s, o: oracle.stripes(s, 6, verticals=[1], slashes=[2], offset=o),
      lambda s, o: oracle.strided(s, 6, local=2, stride=3, offset=o),
    ):
      same(make(1, 5), make(6, 0)[5:])


class BlocksTest(parameterized.TestCase):
  def test_round_trip(self):
    blocks = np.random.default_rng(0).random((3, 4)) < 0.5
    wide = oracle.of_blocks(blocks, 2, 3, 5, 11)
    self.assertEqual(wide.shape, (5, 11))
    want = [np.flatnonzero(row).tolist() for row in blocks]
    self.assertEqual(oracle.to_blocks(wide, 2, 3), want)

  def test_s2_union_is_everything(self):
    for num_heads, stride in ((4, 4), (8, 4), (3, 3)):
      got = oracle.s2(9, num_heads=num_heads, local=1, stride=stride, step=1)
      same(got.any(axis=0), oracle.causal(9, 9))
    # Each head keeps 1 / stride of the blocks that are not local.
    got = oracle.s2(64, num_heads=4, local=2, stride=4)
    remote = got & ~oracle.window(64, 64, left=1)
    share = remote.sum(axis=(1, 2)) / (62 * 63 / 2)
    np.testing.assert_allclose(share, 0.25, atol=0.02)

  def test_s2_limits(self):
    got = oracle.s2(6, num_heads=2, local=6, stride=100)
    same(got, [oracle.causal(6, 6)] * 2)
    same(oracle.s2(6, num_heads=2, local=1, stride=1), got)
    grouped = oracle.s2(8, num_heads=4, kv_heads=2, local=1, stride=4)
    same(grouped[0], grouped[1])
    self.assertTrue((grouped[0] != grouped[2]).any())

  @authors("s2")
  def test_s2_authors(self, case):
    got = oracle.s2(case["blocks"], **case["options"])
    want = [[[x == "#" for x in row] for row in head] for head in case["heads"]]
    same(got, want)

  def test_butterfly(self):
    same(oracle.butterfly(8, max_stride=1), np.eye(8))
    got = oracle.butterfly(16, max_stride=16)
    same(got, got.T)
    same(got.sum(axis=1), [5] * 16)
    # The product of the factors reaches everything.
    reach = np.eye(16, dtype=int)
    for m in range(4):
      factor = np.array([[i == j or i ^ j == 1 << m for j in range(16)]
                         for i in range(16)], int)  # fmt: skip
      self.assertFalse((factor.astype(bool) & ~got).any())
      reach = factor @ reach
    self.assertTrue((reach > 0).all())
    with self.assertRaises(ValueError):
      oracle.butterfly(4, max_stride=3)


class GlobalsTest(parameterized.TestCase):
  def test_longformer(self):
    got = oracle.longformer(9, left=1, right=1, global_tokens=[4])
    same(got, got.T)
    self.assertTrue(got[4].all() and got[:, 4].all())
    self.assertEqual(got[0].nonzero()[0].tolist(), [0, 1, 4])
    same(oracle.longformer(9, left=9, right=9), np.ones((9, 9)))
    got = oracle.longformer(
      9, left=2, right=2, global_tokens=[4], dilation=2, is_causal=True
    )
    self.assertEqual(got[8].nonzero()[0].tolist(), [4, 6, 8])
    self.assertEqual(got[7].nonzero()[0].tolist(), [3, 4, 5, 7])
    self.assertEqual(got[4].nonzero()[0].tolist(), [0, 1, 2, 3, 4])

  def test_bigbird(self):
    n = 10
    random = [oracle.bigbird_candidates(i, n)[:2] for i in range(n)]
    got = oracle.bigbird(n, random=random)
    for i in range(1, n - 1):
      # Two global, three in the window, two random; less where they meet.
      near = {0, n - 1, i - 1, i, i + 1}
      self.assertEqual(got[i].sum(), len(near) + len(random[i]))
    same(got[0], np.ones(n))
    same(got[:, -1], np.ones(n))
    every = [range(n)] * n
    same(oracle.bigbird(n, random=every), np.ones((n, n)))

  @authors("longformer")
  def test_longformer_authors(self, case):
    options = {key: x for key, x in case.items() if key != "rows"}
    want = [[x == "#" for x in row] for row in case["rows"]]
    same(oracle.longformer(**options), want)

  @authors("bigbird")
  def test_bigbird_authors(self, case):
    # Their draw is theirs; what is not drawn and what may be, is checked.
    rows = np.array([[x == "#" for x in row] for row in case["rows"]])
    n = len(rows)
    fixed = oracle.bigbird(n, random=[[]] * n)
    drawn = [np.flatnonzero(row).tolist() for row in rows & ~fixed]
    same(oracle.bigbird(n, random=drawn), rows)
    for i in range(1, n - 1):
      self.assertContainsSubset(drawn[i], oracle.bigbird_candidates(i, n))
      self.assertLen(drawn[i], case["random_blocks"])


class NeighborhoodTest(parameterized.TestCase):
  def test_one_axis_without_stride(self):
    got = oracle.neighborhood((9,), window=5)
    same(got.sum(axis=1), [5] * 9)
    inner = oracle.window(9, 9, left=2, right=2)
    same(got[2:7], inner[2:7])
    same(got[0], got[2])
    same(got[8], got[6])

  def test_limits(self):
    same(oracle.neighborhood((3, 4), window=(3, 4)), np.ones((12, 12)))
    same(oracle.neighborhood((6,), window=1), np.eye(6))
    # Stride = window: attention within blocks.
    same(
      oracle.neighborhood((6,), window=3, stride=3),
      np.kron(np.eye(2), np.ones((3, 3))),
    )
    same(
      oracle.neighborhood((7,), window=7, is_causal=True), oracle.causal(7, 7)
    )
    same(
      oracle.neighborhood((7,), window=3, is_causal=True),
      oracle.window(7, 7, left=2),
    )

  def test_axes_multiply(self):
    rows = oracle.neighborhood((4,), window=3)
    cols = oracle.neighborhood((5,), window=2, stride=2)
    deep = oracle.neighborhood((3,), window=2, is_causal=True)
    got = oracle.neighborhood(
      (4, 5, 3), window=(3, 2, 2), stride=(1, 2, 1),
      is_causal=(False, False, True),
    )  # fmt: skip
    same(got, np.kron(np.kron(rows, cols), deep))

  def test_dilation_splits_the_axis(self):
    got = oracle.neighborhood((8,), window=3, dilation=2)
    even = oracle.neighborhood((4,), window=3)
    same(got[::2, ::2], even)
    same(got[1::2, 1::2], even)
    self.assertFalse(got[::2, 1::2].any())

  def test_wrong(self):
    for options in (
      dict(window=2, stride=3),
      dict(window=0),
      dict(window=(2, 2)),
      dict(window=2, dilation=0),
    ):
      with self.assertRaises(ValueError):
        oracle.neighborhood((4,), **options)

  @authors("natten")
  def test_authors(self, case):
    got = oracle.neighborhood(case["shape"], **case["options"])
    want = [[x == "#" for x in row] for row in case["rows"]]
    same(got, want)
