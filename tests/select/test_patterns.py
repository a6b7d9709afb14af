"""Static patterns: against the oracles, and what they promise."""

from absl.testing import parameterized
from hypothesis import given
from hypothesis import strategies as st
import numpy as np

from sparsejax.select import patterns
from tests.oracles import select as oracle


class ButterflyTest(parameterized.TestCase):
  @given(
    blocks=st.integers(1, 12),
    block=st.integers(1, 3),
    power=st.integers(0, 3),
    wide=st.integers(1, 3),
    tall=st.booleans(),
  )
  def test_equals_oracle(self, blocks, block, power, wide, tall):
    shape = (blocks * block, wide * blocks * block)
    # The oracle's stride, the paper's, is twice the largest i xor j.
    plain = oracle.flat_block_butterfly_mask(blocks, 2 * 2**power)
    stretched = oracle.stretch_mask(plain, (blocks, wide * blocks))
    want = np.kron(stretched, np.ones((block, block), bool))
    if tall:
      shape, want = shape[::-1], want.T
    got = patterns.flat_block_butterfly(shape, block, 2**power)
    self.assertEqual((got.shape, got.dtype), (shape, bool))
    np.testing.assert_array_equal(got, want)

  @parameterized.parameters(1, 2, 8, 16)
  def test_all_strides(self, n):
    got = patterns.flat_block_butterfly((n, n), 1)
    want = oracle.flat_block_butterfly_mask(n, n)
    np.testing.assert_array_equal(got, want)
    self.assertEqual(got.sum(), n * (1 + n.bit_length() - 1))

  def test_every_block_row_and_column_is_live(self):
    got = patterns.flat_block_butterfly((6 * 4, 12 * 4), 4)
    self.assertTrue(got.any(0).all() and got.any(1).all())

  @parameterized.parameters(
    ((6, 8), 4, None, "^block must divide"),
    ((8, 6), 4, None, "^block must divide"),
    ((8, 8), 0, None, "^block must divide"),
    ((8,), 4, None, "^block must divide"),
    ((2, 8, 8), 4, None, "^block must divide"),
    ((8, 8), 4, 0, "^max_stride must be"),
    ((8, 8), 4, 3, "^max_stride must be"),
    ((8, 8), 4, -2, "^max_stride must be"),
    ((8, 12), 4, None, "^shape must have"),
  )
  def test_bad_settings(self, shape, block, max_stride, message):
    with self.assertRaisesRegex(ValueError, message):
      patterns.flat_block_butterfly(shape, block, max_stride)


class RandomGraphTest(parameterized.TestCase):
  @given(
    inputs=st.integers(0, 9),
    outputs=st.integers(0, 9),
    seed=st.integers(0, 2**32 - 1),
    data=st.data(),
  )
  def test_degree(self, inputs, outputs, seed, data):
    degree = data.draw(st.integers(0, inputs))
    got = patterns.random_graph((inputs, outputs), degree, seed)
    self.assertEqual((got.shape, got.dtype), ((inputs, outputs), bool))
    np.testing.assert_array_equal(got.sum(0), np.full(outputs, degree))
    again = patterns.random_graph((inputs, outputs), degree, seed)
    np.testing.assert_array_equal(got, again)

  def test_draws_are_spread_evenly(self):
    got = patterns.random_graph((20, 4000), 5, seed=0)
    np.testing.assert_allclose(got.mean(1), 0.25, atol=0.03)

  def test_seeds_differ(self):
    a, b = (patterns.random_graph((20, 20), 5, seed) for seed in (0, 1))
    self.assertFalse(np.array_equal(a, b))

  @parameterized.parameters(-1, 9)
  def test_bad_degree(self, degree):
    with self.assertRaisesRegex(ValueError, r"^degree must be in \[0, 8\]"):
      patterns.random_graph((8, 3), degree, seed=0)
