"""The oracle of stored sparse kernels: there and back, by hand, and peers.

data/storage_peers.json has what other packages make of `peer_kernel`.
"""

import json
import pathlib

from absl.testing import parameterized
import ml_dtypes
import numpy as np

from tests.oracles import storage as oracle

PEERS = json.loads(
  (pathlib.Path(__file__).parent / "data/storage_peers.json").read_text()
)
DTYPES = {
  "float32": np.float32,
  "bfloat16": ml_dtypes.bfloat16,
  "float16": np.float16,
}
# -0.0, infinities, the smallest subnormal, NaNs that differ, +0.0.
SPECIAL = {
  "float32": (0x80000000, 0x7F800000, 0xFF800000, 1, 0x7FC00001, 0xFFA01234, 0),
  "bfloat16": (0x8000, 0x7F80, 0xFF80, 1, 0x7FC1, 0xFFA1, 0),
  "float16": (0x8000, 0x7C00, 0xFC00, 1, 0x7E01, 0xFD23, 0),
}
SHAPES = ((12, 5), (24, 3), (8, 1), (0, 4), (4, 0), (0, 0))
NMS = ((1, 2), (2, 4), (1, 4), (4, 4), (2, 3), (3, 6), (1, 1), (5, 12))


def kernel(seed, shape, dtype):
  """w [K, N] of seeded numbers with special ones among them."""
  rng = np.random.default_rng(seed)
  w = rng.standard_normal(shape).astype(DTYPES[dtype])
  bits = oracle.words(w).reshape(-1)
  at = rng.permutation(bits.size)[: bits.size // 2]
  bits[at] = np.resize(np.array(SPECIAL[dtype], bits.dtype), at.size)
  return bits.reshape(shape).view(w.dtype)


def group_mask(seed, shape, n, m, full=False):
  """bool [K, N] of at most n in each m inputs, or of n."""
  rng = np.random.default_rng(seed)
  inputs, outputs = shape
  order = rng.random((inputs // m, m, outputs)).argsort(1).argsort(1)
  kept = n if full else rng.integers(0, n + 1, (inputs // m, 1, outputs))
  return (order < kept).reshape(shape)


def peer_kernel(dtype, mask):
  """w [K, N]: +0.0 where the mask is not, no other zeros, of any sort else."""
  w = kernel(len(mask), mask.shape, dtype)
  bits = oracle.words(w)
  bits[(bits == 0) | (bits == SPECIAL[dtype][0])] = SPECIAL[dtype][1]
  bits[~mask] = 0
  return bits.view(w.dtype)


def peer_mask(kind):
  """[13, 5] of any, [16, 6] of 2:4, [32, 32] of 2:4."""
  if kind == "any":
    mask = np.random.default_rng(0).random((13, 5)) < 0.4
    mask[:, 3] = False
    return mask
  return group_mask(
    1, {"24": (16, 6), "torch": (32, 32)}[kind], 2, 4, full=True
  )


def masked(w, mask):
  """The words of w, 0 where the mask is not."""
  return np.where(mask, oracle.words(w), 0)


class ThereAndBackTest(parameterized.TestCase):
  def same(self, got, w, mask):
    self.assertEqual(got.dtype, w.dtype)
    np.testing.assert_array_equal(oracle.words(got), masked(w, mask))

  @parameterized.product(dtype=tuple(DTYPES), shape=SHAPES)
  def test_any_mask(self, dtype, shape):
    w = kernel(1, shape, dtype)
    rng = np.random.default_rng(2)
    for mask in (
      rng.random(shape) < 0.5,
      np.zeros(shape, bool),
      np.ones(shape, bool),
    ):
      stored = oracle.bitmask(w, mask)
      got, found = oracle.from_bitmask(stored, shape)
      self.same(got, w, mask)
      np.testing.assert_array_equal(found, mask)
      self.assertEqual(stored["compressed"].shape, (mask.sum(),))
      self.assertEqual(stored["bitmask"].shape, (shape[1], -(-shape[0] // 8)))
      for block in ((1, 1), (4, 2), (5, 3)):
        stored = oracle.blocks(w, mask, block)
        self.same(oracle.from_blocks(stored, shape), w, mask)
        self.assertEqual(stored["counts"].sum(), len(stored["values"]))

  @parameterized.product(dtype=tuple(DTYPES), nm=NMS)
  def test_groups(self, dtype, nm):
    n, m = nm
    for shape in SHAPES:
      if shape[0] % m:
        continue
      w = kernel(3, shape, dtype)
      for full in (False, True):
        mask = group_mask(4, shape, n, m, full)
        stored = oracle.nm(w, mask, n, m)
        self.same(oracle.from_nm(stored, shape, n, m), w, mask)
        entries = shape[0] // m * n
        self.assertEqual(stored["values"].shape, (entries, shape[1]))
        bits = entries * int(np.ceil(np.log2(m)))
        self.assertEqual(stored["metadata"].shape, (-(-bits // 8), shape[1]))
        stored = oracle.bitmask_24(w, mask, n, m)
        self.same(oracle.from_bitmask_24(stored, shape), w, mask)
        if full:
          other = oracle.bitmask(w, mask)
          np.testing.assert_array_equal(stored["bitmask"], other["bitmask"])
          np.testing.assert_array_equal(
            oracle.words(stored["compressed"]).ravel(),
            oracle.words(other["compressed"]),
          )

  @parameterized.product(dtype=tuple(DTYPES), shape=SHAPES)
  def test_constant_fan_in(self, dtype, shape):
    w, (inputs, outputs) = kernel(5, shape, dtype), shape
    rng = np.random.default_rng(6)
    for fan_in in {0, min(3, inputs), inputs}:
      for alive in (np.ones(outputs, bool), rng.random(outputs) < 0.5):
        mask = (rng.random(shape).argsort(0).argsort(0) < fan_in) & alive
        stored = oracle.constant_fan_in(w, mask)
        self.same(oracle.from_constant_fan_in(stored, shape), w, mask)
        number = int(mask.any(0).sum())
        # No output has entries: so there are none, and no fan-in.
        size = (fan_in if number else 0, number)
        self.assertEqual(stored["values"].shape, size)
        self.assertEqual(stored["inputs"].dtype, np.uint16)
        self.assertEqual(stored["outputs"] is None, number == outputs)


class ByHandTest(parameterized.TestCase):
  def test_bits_across_bytes(self):
    # 3 of 6: three bits each. 1, 2, 5; 0, 3, 4 from the lowest bit on:
    # 100 010 10 | 1 000 110 0 | 01 and six zeros.
    mask = np.isin(np.arange(12), (1, 2, 5, 6, 9, 10))[:, None]
    w = np.arange(12, dtype=np.float32)[:, None]
    stored = oracle.nm(w, mask, 3, 6)
    self.assertEqual(stored["metadata"].ravel().tolist(), [81, 49, 2])
    self.assertEqual(stored["values"].ravel().tolist(), [1, 2, 5, 6, 9, 10])

  def test_free_positions(self):
    # Nothing: 0 and 1. Position 0: 0 and 1. Position 3: 0 and 3. 1 and 2.
    rows = [[0, 0, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1], [0, 1, 1, 0]]
    mask = np.array(rows, bool).reshape(16, 1)
    w = np.arange(1, 17, dtype=np.float32)[:, None]
    stored = oracle.nm(w, mask, 2, 4)
    self.assertEqual(
      stored["values"].ravel().tolist(), [0, 0, 5, 0, 0, 12, 14, 15]
    )
    # 0 + 1 * 4 in four bits, twice; 0 + 3 * 4, and 1 + 2 * 4.
    self.assertEqual(
      stored["metadata"].ravel().tolist(), [4 + 4 * 16, 12 + 9 * 16]
    )
    stored = oracle.bitmask_24(w, mask)
    self.assertEqual(stored["bitmask"].tolist(), [[3 + 3 * 16, 9 + 6 * 16]])

  def test_lists_of_blocks(self):
    # Of 3 x 3 blocks: column 0 has rows 0 and 2, column 1 none, column 2 row 1.
    mask = np.zeros((5, 6), bool)
    mask[0, 1] = mask[4, 0] = mask[2, 5] = True
    w = np.arange(30, dtype=np.float32).reshape(5, 6)
    stored = oracle.blocks(w, mask, (2, 2))
    self.assertEqual(stored["indices"].tolist(), [[0, 2], [0, 1], [1, 0]])
    self.assertEqual(stored["counts"].tolist(), [2, 0, 1])
    self.assertEqual(
      stored["values"].tolist(),
      [[[0, 1], [0, 0]], [[24, 0], [0, 0]], [[0, 17], [0, 0]]],
    )

  def test_wide_inputs(self):
    for inputs, dtype in ((2**16, np.uint16), (2**16 + 1, np.int32)):
      mask = np.zeros((inputs, 1), bool)
      mask[-1] = True
      stored = oracle.constant_fan_in(np.ones((inputs, 1), np.float32), mask)
      self.assertEqual(stored["inputs"].dtype, dtype)
      self.assertEqual(stored["inputs"].tolist(), [[inputs - 1]])

  def test_what_does_not_fit_is_refused(self):
    w = np.ones((8, 2), np.float32)
    full = np.ones((8, 2), bool)
    for wrong in (
      lambda: oracle.nm(w, full, 2, 4),
      lambda: oracle.bitmask_24(w, full),
      lambda: oracle.nm(w, ~full, 2, 3),
      lambda: oracle.nm(w, ~full, 0, 4),
      lambda: oracle.constant_fan_in(w, np.tri(8, 2, dtype=bool)),
      lambda: oracle.bitmask(w, full[:4]),
      lambda: oracle.bitmask(w, np.ones((8, 2))),
    ):
      with self.assertRaises(ValueError):
        wrong()


class PeersTest(parameterized.TestCase):
  def same(self, stored, theirs, names):
    for name in names:
      got = stored[name]
      if name == "compressed":
        got = oracle.words(got)
      self.assertEqual(got.tolist(), theirs[name], name)

  @parameterized.parameters(*DTYPES)
  def test_sparse_bitmask(self, dtype):
    mask = peer_mask("any")
    stored = oracle.bitmask(peer_kernel(dtype, mask), mask)
    theirs = PEERS["sparse-bitmask"][dtype]
    self.assertEqual(set(theirs), set(stored))
    self.same(stored, theirs, stored)

  @parameterized.parameters(*DTYPES)
  def test_sparse_24_bitmask(self, dtype):
    mask = peer_mask("24")
    stored = oracle.bitmask_24(peer_kernel(dtype, mask), mask)
    theirs = PEERS["sparse-24-bitmask"][dtype]
    self.assertEqual(set(theirs), set(stored))
    self.same(stored, theirs, stored)

  def test_they_decode_kept_zeros(self):
    """What they make of our arrays, where zeros of either sign are kept."""
    mask = group_mask(7, (16, 6), 2, 4)
    w = kernel(8, mask.shape, "float32")
    self.assertTrue((oracle.words(w)[mask] == 0).any())
    self.assertTrue((oracle.words(w)[mask] == 0x80000000).any())
    for name in ("sparse-bitmask", "sparse-24-bitmask"):
      self.assertEqual(PEERS["decoded"][name], masked(w, mask).T.tolist())

  def test_semi_structured(self):
    mask = peer_mask("torch")
    stored = oracle.nm(peer_kernel("float16", mask), mask, 2, 4)
    theirs = PEERS["semi-structured"]
    columns = np.ascontiguousarray(stored["metadata"].T)
    self.assertEqual(columns.view(np.uint16).tolist(), theirs["metadata"])
    # NaN is NaN here: theirs come back quiet.
    values = np.array(theirs["values"], np.uint16).view(np.float16)
    np.testing.assert_array_equal(stored["values"].T, values)
