"""The matmul oracle against itself, whole arrays, and small sums."""

import dataclasses
import itertools

from absl.testing import parameterized
import numpy as np

from tests.oracles import matmul as oracle

FEATURES = (
  "activation",
  "gate",
  "gather",
  "offset",
  "overfull",
  "row_scale",
  "scatter",
  "transpose",
)
# Every feature alone, every one left out, and a few of what goes together.
CASES = (
  (),
  *[(f,) for f in FEATURES],
  *[tuple(f for f in FEATURES if f != out) for out in FEATURES],
  FEATURES,
  ("activation", "gate"),
  ("gather", "scatter"),
  ("activation", "gate", "row_scale"),
)
EDGES = 9
STEP = 1e-5


def silu(x):
  return x / (1.0 + np.exp(-x))


def silu_slope(x):
  sigmoid = 1.0 / (1.0 + np.exp(-x))
  return sigmoid * (1.0 + x * (1.0 - sigmoid))


def cos_slope(x):
  return -np.sin(x)


ACTIVATIONS = ((silu, silu_slope), (np.cos, cos_slope))


def finite_differences(loss, x):
  """The gradient of loss at x, a function of an array of x's shape."""
  found = np.zeros(x.shape)
  for where in np.ndindex(*x.shape):
    up, down = x.copy(), x.copy()
    up[where] += STEP
    down[where] -= STEP
    found[where] = (loss(up) - loss(down)) / (2 * STEP)
  return found


@dataclasses.dataclass
class Grouped:
  """Arguments of the grouped oracle."""

  arrays: dict  # lhs, rhs, and rhs_gate and row_scale where given
  group_sizes: np.ndarray
  options: dict
  slope: object
  dout: np.ndarray

  def forward(self, **changed):
    arrays = self.arrays | changed
    lhs, rhs = arrays.pop("lhs"), arrays.pop("rhs")
    return oracle.grouped_matmul(
      lhs, rhs, self.group_sizes, **arrays, **self.options
    )

  def gradients(self):
    arrays = dict(self.arrays)
    lhs, rhs = arrays.pop("lhs"), arrays.pop("rhs")
    return oracle.grouped_matmul_gradients(
      self.dout,
      lhs,
      rhs,
      self.group_sizes,
      **arrays,
      **self.options,
      activation_slope=self.slope,
    )


def grouped_case(seed, features, activation=0):
  """9 edges; the second group is empty.

  Without "overfull" the last 2 edges are of no group, and what only they read
  is NaN. Two edges of a group gather from nowhere, two scatter to nowhere,
  and with "offset" the first and the last group have no weights.
  """
  rng = np.random.default_rng(seed)
  k, n = 3, 2
  sizes = [2, 0, 4, 1]
  if "overfull" in features:
    sizes = [2, -2, 4, 9]
  weights = len(sizes)
  options = {}
  if "offset" in features:
    options["group_offset"] = 1
    weights = 2
  rows = EDGES
  if "gather" in features:
    rows = 5
    options["gather"] = np.array([3, 3, -1, 3, 0, 5, 2, 4, 4], np.int32)
  if "scatter" in features:
    options["num_rows"] = 4
    options["scatter"] = np.array([2, 4, 2, 2, -1, 0, 0, 0, 2], np.int32)
  if "transpose" in features:
    options["transpose_rhs"] = True
  slope = None
  if "activation" in features:
    options["activation"], slope = ACTIVATIONS[activation]
  weights_shape = (weights, k, n)
  if "transpose" in features:
    weights_shape = (weights, n, k)
  arrays = dict(
    lhs=rng.normal(size=(rows, k)), rhs=rng.normal(size=weights_shape)
  )
  if "gate" in features:
    arrays["rhs_gate"] = rng.normal(size=weights_shape)
  if "row_scale" in features:
    arrays["row_scale"] = rng.normal(size=EDGES)
  if "overfull" not in features:
    arrays["lhs"][4 if "gather" in features else 7 :] = np.nan
    if "row_scale" in features:
      arrays["row_scale"][7:] = np.nan
  dout = rng.normal(size=(options.get("num_rows", EDGES), n))
  return Grouped(arrays, np.array(sizes, np.int32), options, slope, dout)


def whole_arrays(case):
  """The result by matrices of zeros and ones: of groups, rows and results."""
  options = case.options
  arrays = {name: np.nan_to_num(x) for name, x in case.arrays.items()}
  lhs, rhs, rhs_gate = arrays["lhs"], arrays["rhs"], arrays.get("rhs_gate")
  if "transpose_rhs" in options:
    rhs = rhs.transpose(0, 2, 1)
    rhs_gate = None if rhs_gate is None else rhs_gate.transpose(0, 2, 1)
  edge = np.arange(EDGES)
  ends = np.cumsum(np.maximum(case.group_sizes, 0))
  starts = np.concatenate([[0], ends[:-1]])
  member = (starts <= edge[:, None]) & (edge[:, None] < ends)
  offset = options.get("group_offset", 0)
  member = member[:, offset : offset + len(rhs)]
  reads = options.get("gather", edge)[:, None] == np.arange(len(lhs))
  goes = options.get("scatter", edge) == np.arange(len(case.dout))[:, None]
  activation = options.get("activation", lambda x: x)
  x = reads.astype(float) @ lhs
  y = np.einsum("mk,gkn->mgn", x, rhs)
  if rhs_gate is None:
    y = activation(y)
  else:
    y = activation(np.einsum("mk,gkn->mgn", x, rhs_gate)) * y
  y = np.sum(y * member[:, :, None], axis=1)
  if "row_scale" in arrays:
    y = y * arrays["row_scale"][:, None]
  return goes.astype(float) @ y


class GroupedTest(parameterized.TestCase):
  @parameterized.product(features=CASES, activation=(0, 1))
  def test_equals_whole_arrays(self, features, activation):
    case = grouped_case(len(features), features, activation)
    got = case.forward()
    np.testing.assert_allclose(got, whole_arrays(case), atol=1e-12)
    self.assertTrue(np.any(got))

  @parameterized.product(features=CASES, activation=(0, 1))
  def test_gradients_equal_finite_differences(self, features, activation):
    case = grouped_case(len(features), features, activation)
    got = case.gradients()
    self.assertEqual(list(got), ["lhs", "rhs", "rhs_gate", "row_scale"])
    for name, grad in got.items():
      if name not in case.arrays:
        self.assertIsNone(grad)
        continue

      def loss(x, name=name):
        return np.sum(case.dout * case.forward(**{name: x}))

      want = finite_differences(loss, case.arrays[name])
      np.testing.assert_allclose(grad, want, atol=1e-8, err_msg=name)
      self.assertTrue(np.any(grad), name)

  @parameterized.parameters(*CASES)
  def test_an_empty_group_has_no_gradient(self, *features):
    case = grouped_case(0, features)
    got = case.gradients()
    empty = 1 - case.options.get("group_offset", 0)
    for name in ("rhs", "rhs_gate"):
      if name in case.arrays:
        np.testing.assert_array_equal(got[name][empty], 0.0)
        case.arrays[name][empty] = np.nan
    after = case.gradients()
    for name in case.arrays:
      np.testing.assert_array_equal(after[name], got[name])

  def test_by_hand(self):
    # Edge 0 has weights (2, 0), edges 1 and 2 (1, 3), edge 3 is of no group.
    lhs = np.array([[1.0], [10.0], [100.0], [np.inf]])
    rhs = np.array([[[2.0, 0.0]], [[5.0, 5.0]], [[1.0, 3.0]]])
    sizes = [1, 0, 2]
    got = oracle.grouped_matmul(lhs, rhs, sizes)
    np.testing.assert_array_equal(got, [[2, 0], [10, 30], [100, 300], [0, 0]])
    # Gate 3, so 3 * x * up, and a scale; edges 0 and 2 are added.
    options = dict(
      rhs_gate=np.full((3, 1, 2), 3.0),
      row_scale=[1.0, 2.0, 0.1, np.nan],
      scatter=[1, 3, 1, 1],
      num_rows=3,
    )
    got = oracle.grouped_matmul(lhs, rhs, sizes, **options)
    np.testing.assert_allclose(got, [[0, 0], [6 + 3000, 9000], [0, 0]])
    dout = np.array([[7.0, 7.0], [1.0, 10.0], [7.0, 7.0]])
    got = oracle.grouped_matmul_gradients(dout, lhs, rhs, sizes, **options)
    # Edge 1 is dropped. Edge 0: 6 x^2 and 0; edge 2: 3 x^2 and 9 x^2.
    np.testing.assert_allclose(
      got["row_scale"], [6, 0, 30_000 + 10 * 90_000, 0]
    )
    np.testing.assert_allclose(
      got["lhs"], [[12], [0], [0.1 * (600 + 10 * 1800)], [0]]
    )
    np.testing.assert_allclose(
      got["rhs"], [[[3, 30]], [[0, 0]], [[3000, 30_000]]]
    )
    np.testing.assert_allclose(
      got["rhs_gate"], [[[2, 0]], [[0, 0]], [[1000, 30_000]]]
    )

  def test_gather_by_hand(self):
    # Row 1 twice, then rows that are not there, which are rows of zeros.
    options = dict(gather=[1, 1, -1, 2, 0], activation=np.cos)
    lhs, rhs = np.array([[np.nan], [np.pi]]), np.array([[[1.0]]])
    got = oracle.grouped_matmul(lhs, rhs, [4], **options)
    np.testing.assert_allclose(got, [[-1], [-1], [1], [1], [0]])
    options |= dict(activation=np.sin, activation_slope=np.cos)
    dout = np.array([[1.0], [2.0], [4.0], [8.0], [16.0]])
    got = oracle.grouped_matmul_gradients(dout, lhs, rhs, [4], **options)
    np.testing.assert_allclose(got["lhs"], [[0], [-3]])
    np.testing.assert_allclose(got["rhs"], [[[-3 * np.pi]]])

  @parameterized.parameters(
    ([2, 0, 1], 3, [0, 0, 2]),
    ([2, 0, 1], 2, [0, 0]),
    ([1, 5, 3], 3, [0, 1, 1]),
    ([-1, 1, -5], 3, [1, None, None]),
    ([2**31 - 1, 2**31 - 1], 2, [0, 0]),
    ([3], 0, []),
    ([], 2, [None, None]),
  )
  def test_edge_groups(self, sizes, m, want):
    sizes = np.array(sizes, np.int32)
    self.assertEqual(oracle.edge_groups(sizes, m), want)

  @parameterized.parameters(*CASES)
  def test_parts_of_the_weights_add_up(self, *features):
    case = grouped_case(0, tuple(f for f in features if f != "offset"))
    want, grads = case.forward(), case.gradients()
    total, sums = 0.0, dict(lhs=0.0, row_scale=0.0)
    whole = dict(case.arrays)
    for first, last in ((0, 1), (1, 3), (3, 4)):
      case.options["group_offset"] = np.int32(first)
      for name in ("rhs", "rhs_gate"):
        if name in whole:
          case.arrays[name] = whole[name][first:last]
      total = total + case.forward()
      part = case.gradients()
      for name in whole:
        if name in sums:
          sums[name] = sums[name] + part[name]
        else:
          np.testing.assert_array_equal(part[name], grads[name][first:last])
    np.testing.assert_allclose(total, want, atol=1e-12)
    for name, x in sums.items():
      if name in whole:
        np.testing.assert_allclose(x, grads[name], atol=1e-12)

  @parameterized.parameters(-2, -1, 1, 2, 5)
  def test_offset_by_hand(self, offset):
    # Edge i is of group i; the weights 10 and 20 are those of two groups.
    lhs, rhs = np.ones((4, 1)), np.array([[[10.0]], [[20.0]]])
    got = oracle.grouped_matmul(lhs, rhs, [1] * 4, group_offset=offset)
    want = {
      -2: [0, 0, 0, 0],
      -1: [20, 0, 0, 0],
      1: [0, 10, 20, 0],
      2: [0, 0, 10, 20],
      5: [0, 0, 0, 0],
    }
    np.testing.assert_array_equal(got.ravel(), want[offset])

  @parameterized.product(m=(0, 1), k=(0, 1), n=(0, 1), g=(0, 1))
  def test_small_sizes(self, m, k, n, g):
    lhs, rhs = np.full((m, k), 2.0), np.full((g, k, n), 3.0)
    options = dict(activation=np.cos)
    got = oracle.grouped_matmul(lhs, rhs, [1] * g, **options)
    want = np.cos(6.0 * k) if g else 0.0
    np.testing.assert_allclose(got, np.full((m, n), want))
    options["activation_slope"] = cos_slope
    got = oracle.grouped_matmul_gradients(got, lhs, rhs, [1] * g, **options)
    self.assertEqual(got["lhs"].shape, (m, k))
    self.assertEqual(got["rhs"].shape, (g, k, n))

  def test_what_is_dropped_has_no_gradient(self):
    case = grouped_case(0, ("row_scale", "scatter"))
    want = case.gradients()
    case.arrays["lhs"][1] = np.inf
    case.arrays["row_scale"][4] = np.nan
    got = case.gradients()
    for name in case.arrays:
      np.testing.assert_array_equal(got[name], want[name])
    np.testing.assert_array_equal(got["lhs"][[1, 4, 7, 8]], 0.0)
    np.testing.assert_array_equal(got["row_scale"][[1, 4, 7, 8]], 0.0)

  def test_rejects_what_does_not_fit(self):
    lhs, rhs, one = np.ones((2, 3)), np.ones((1, 3, 4)), [2]
    for sizes, options in (
      ([1, 1], {}),
      (one, dict(transpose_rhs=True)),
      (one, dict(rhs_gate=np.ones((1, 4, 3)))),
      (one, dict(row_scale=np.ones(3))),
      (one, dict(scatter=[0, 0])),
      (one, dict(num_rows=2)),
      (one, dict(scatter=[0], num_rows=2)),
    ):
      with self.assertRaises(ValueError):
        oracle.grouped_matmul(lhs, rhs, sizes, **options)
    with self.assertRaises(ValueError):
      oracle.grouped_matmul_gradients(
        np.ones((2, 4)), lhs, rhs, one, activation=silu
      )


@dataclasses.dataclass
class Blocks:
  """A block-sparse matrix."""

  values: np.ndarray
  indices: np.ndarray
  counts: np.ndarray
  shape: tuple

  @property
  def lists(self):
    return self.indices, self.counts, self.shape


def random_blocks(seed, shape, block, unused):
  """The second block column is empty; what is never read is NaN."""
  rng = np.random.default_rng(seed)
  block_rows, block_cols = -(-shape[0] // block[0]), -(-shape[1] // block[1])
  counts = rng.integers(1, block_rows + 1, block_cols, np.int32)
  counts[1:2] = 0
  # What follows the listed block rows is out of range.
  indices = np.full((block_cols, block_rows + 1), 99, np.int32)
  for j, count in enumerate(counts):
    indices[j, :count] = rng.choice(block_rows, count, replace=False)
  values = rng.normal(size=(counts.sum() + unused, *block))
  values[counts.sum() :] = np.nan
  p = 0
  for j, count in enumerate(counts):
    for i in indices[j, :count]:
      values[p, max(shape[0] - i * block[0], 0) :] = np.nan
      values[p, :, max(shape[1] - j * block[1], 0) :] = np.nan
      p += 1
  return Blocks(values, indices, counts, shape)


def entry(blocks, row, col):
  """The place in values of one entry of the matrix; None where there is none.

  The blocks of a column are looked for, instead of being put in their place.
  """
  _, bk, bn = blocks.values.shape
  j = col // bn
  listed = blocks.indices[j, : blocks.counts[j]].tolist()
  if row // bk not in listed:
    return None
  p = int(np.sum(blocks.counts[:j])) + listed.index(row // bk)
  return p, row % bk, col % bn


# (K, N), the block, unused values, the leading axes of x.
BLOCK_CASES = (
  ((4, 6), (2, 2), 0, (3,)),
  ((5, 7), (2, 3), 0, (3,)),
  ((5, 7), (2, 3), 2, (2, 2)),
  ((5, 4), (3, 4), 1, ()),
  ((3, 5), (4, 2), 1, (1, 2, 1)),
  ((3, 5), (1, 8), 1, (2,)),
  ((4, 4), (1, 1), 3, (2,)),
  ((4, 5), (2, 2), 1, (0,)),
  ((1, 1), (3, 2), 0, (2,)),
)


class BlockSparseTest(parameterized.TestCase):
  @parameterized.parameters(*itertools.product(BLOCK_CASES, range(3)))
  def test_equals_the_dense_matrix(self, case, seed):
    shape, block, unused, leading = case
    blocks = random_blocks(seed, shape, block, unused)
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(*leading, shape[0]))
    y = rng.normal(size=(*leading, shape[1]))
    flat_x, flat_y = x.reshape(-1, shape[0]), y.reshape(-1, shape[1])
    matrix = np.zeros(shape)
    sampled = np.zeros(blocks.values.shape)
    for where in np.ndindex(*shape):
      place = entry(blocks, *where)
      if place is not None:
        matrix[where] = blocks.values[place]
        sampled[place] = (flat_x.T @ flat_y)[where]
    np.testing.assert_array_equal(
      oracle.dense(blocks.values, *blocks.lists), matrix
    )
    got = oracle.block_sparse_matmul(x, blocks.values, *blocks.lists)
    np.testing.assert_allclose(got, x @ matrix, atol=1e-12)
    got = oracle.sampled_matmul(
      x, y, blocks.indices, blocks.counts, block, len(blocks.values)
    )
    np.testing.assert_allclose(got, sampled, atol=1e-12)
    # The gradients are these two products, of the transpose and sampled.
    dx, dvalues = oracle.block_sparse_matmul_gradients(
      y, x, blocks.values, *blocks.lists
    )
    np.testing.assert_allclose(dx, y @ matrix.T, atol=1e-12)
    np.testing.assert_allclose(dvalues, sampled, atol=1e-12)

  @parameterized.parameters(*BLOCK_CASES)
  def test_gradients_equal_finite_differences(
    self, shape, block, unused, leading
  ):
    blocks = random_blocks(0, shape, block, unused)
    rng = np.random.default_rng(1)
    x = rng.normal(size=(*leading, shape[0]))
    dout = rng.normal(size=(*leading, shape[1]))

    def loss(x, values):
      got = oracle.block_sparse_matmul(x, values, *blocks.lists)
      return np.sum(dout * got)

    dx, dvalues = oracle.block_sparse_matmul_gradients(
      dout, x, blocks.values, *blocks.lists
    )
    want = finite_differences(lambda v: loss(v, blocks.values), x)
    np.testing.assert_allclose(dx, want, atol=1e-8)
    want = finite_differences(lambda v: loss(x, v), blocks.values)
    np.testing.assert_allclose(dvalues, want, atol=1e-8)
    np.testing.assert_array_equal(dvalues[np.isnan(blocks.values)], 0.0)

  def test_by_hand(self):
    # Blocks of 2 x 2 in 3 x 5: the lower and the upper one of column 0, none
    # of column 1, the lower one of column 2, of which one entry is inside.
    nan = np.nan
    values = np.array(
      [
        [[1.0, 2.0], [nan, nan]],
        [[3.0, 4.0], [5.0, 6.0]],
        [[7.0, nan], [nan, nan]],
        [[nan, nan], [nan, nan]],
      ]
    )
    lists = [[1, 0], [0, 0], [1, 0]], [2, 0, 1], (3, 5)
    np.testing.assert_array_equal(
      oracle.dense(values, *lists),
      [[3, 4, 0, 0, 0], [5, 6, 0, 0, 0], [1, 2, 0, 0, 7]],
    )
    x = np.array([1.0, 10.0, 100.0])
    got = oracle.block_sparse_matmul(x, values, *lists)
    np.testing.assert_array_equal(got, [153, 264, 0, 0, 700])
    y = np.array([1.0, 2.0, 3.0, 4.0, 5.0])
    dx, dvalues = oracle.block_sparse_matmul_gradients(y, x, values, *lists)
    np.testing.assert_array_equal(dx, [11, 17, 40])
    want = [
      [[100, 200], [0, 0]],
      [[1, 2], [10, 20]],
      [[500, 0], [0, 0]],
      [[0, 0], [0, 0]],
    ]
    np.testing.assert_array_equal(dvalues, want)
    got = oracle.sampled_matmul(x, y, *lists[:2], (2, 2), 4)
    np.testing.assert_array_equal(got, want)

  def test_only_listed_blocks_are_multiplied(self):
    lists = [[0], [1], [0]], [1, 1, 0], (2, 3)
    values = np.array([[[2.0]], [[3.0]]])
    x, dout = np.array([np.nan, 1.0]), np.array([1.0, 1.0, np.inf])
    got = oracle.block_sparse_matmul(x, values, *lists)
    np.testing.assert_array_equal(got, [np.nan, 3.0, 0.0])
    dx, dvalues = oracle.block_sparse_matmul_gradients(dout, x, values, *lists)
    np.testing.assert_array_equal(dx, [2.0, 3.0])
    np.testing.assert_array_equal(dvalues.ravel(), [np.nan, 1.0])

  @parameterized.product(rows=(0, 1), big_k=(0, 1), big_n=(0, 1))
  def test_small_sizes(self, rows, big_k, big_n):
    indices = np.zeros((big_n, 1), int)
    counts = np.full(big_n, big_k)
    values = np.full((big_k * big_n, 1, 1), 3.0)
    x, y = np.full((rows, big_k), 2.0), np.ones((rows, big_n))
    shape = big_k, big_n
    got = oracle.block_sparse_matmul(x, values, indices, counts, shape)
    np.testing.assert_array_equal(got, np.full((rows, big_n), 6.0 * big_k))
    got = oracle.sampled_matmul(x, y, indices, counts, (1, 1), len(values))
    np.testing.assert_array_equal(got, np.full(values.shape, 2.0 * rows))

  def test_rejects_what_does_not_fit(self):
    values = np.ones((1, 2, 2))
    for indices, counts, shape in (
      ([[2]], [1], (4, 2)),  # no such block row
      ([[-1]], [1], (4, 2)),
      ([[0]], [2], (4, 2)),  # more than the lists hold
      ([[0]], [-1], (4, 2)),
      ([[0, 1]], [2], (4, 2)),  # more than there are values
      ([[0]], [1], (4, 4)),  # a block column without a list
    ):
      with self.assertRaises(ValueError):
        oracle.dense(values, indices, counts, shape)
