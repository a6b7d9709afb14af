"""The k-th largest score: against the oracle, and what is compiled."""

import functools

from absl.testing import parameterized
from hypothesis import given
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np

from sparsejax.select import thresholds
from tests import common
from tests.oracles import select as oracle

# Some do not divide by eight, some are counted in bytes (128 and up).
SHAPES = ((), (1,), (2, 3, 4), (1152,), (3, 1280))
FEW_SHAPES = ((7,), (1152,))
KINDS = (
  *[(shape, jnp.float32) for shape in SHAPES],
  *[(shape, jnp.bfloat16) for shape in FEW_SHAPES],
  *[(shape, jnp.float16) for shape in FEW_SHAPES],
)
ROWS = (((3, 5), 1), ((3, 5), -2), ((2, 3, 4), (0, 2)), ((3, 256), (-1,)))


@functools.partial(jax.jit, static_argnames="axis")
def kth_largest(scores, k, axis=None):
  return thresholds.kth_largest(scores, k, axis=axis)


def rows_of(x, axis):
  """The rows that are ranked, [rows, entries], in row-major order."""
  axes = [a % x.ndim for a in np.atleast_1d(axis)]
  rest = [a for a in range(x.ndim) if a not in axes]
  entries = int(np.prod([x.shape[a] for a in axes]))
  return np.transpose(x, (*rest, *sorted(axes))).reshape(-1, entries)


def row_counts(shape, axis):
  """The shape of one number for each row: ranked axes have size 1."""
  axes = [a % len(shape) for a in np.atleast_1d(axis)]
  return tuple(1 if a in axes else d for a, d in enumerate(shape))


class KthLargestTest(parameterized.TestCase):
  @given(data=st.data())
  def test_equals_oracle(self, data):
    shape, dtype = data.draw(st.sampled_from(KINDS))
    scores = data.draw(common.score_arrays(shape, dtype))
    k = data.draw(st.integers(0, scores.size))
    got = kth_largest(scores, k)
    self.assertEqual((got.shape, got.dtype), ((), scores.dtype))
    want = oracle.kth_largest([common.float64(scores)], k)
    np.testing.assert_array_equal(common.float64(got), want)

  @parameterized.parameters(*FEW_SHAPES, (), (1,))
  def test_every_k(self, *shape):
    palette = [*common.SPECIAL, *common.PLAIN, 3.0, 4.0, 5.0]
    rng = np.random.default_rng(0)
    scores = rng.choice(palette, shape).astype(np.float32)
    every = sorted({*range(min(9, scores.size) + 1), scores.size})
    for k in every:
      want = oracle.kth_largest([common.float64(scores)], k)
      np.testing.assert_array_equal(kth_largest(scores, k), want)

  @given(data=st.data())
  def test_along_axes(self, data):
    shape, axis = data.draw(st.sampled_from(ROWS))
    scores = data.draw(common.score_arrays(shape))
    rows, kept = rows_of(scores, axis), row_counts(shape, axis)
    counts = st.integers(0, rows.shape[1])
    k = data.draw(st.lists(counts, min_size=len(rows), max_size=len(rows)))
    got = kth_largest(scores, np.reshape(k, kept).astype(np.int32), axis)
    self.assertEqual(got.shape, kept)
    want = [
      oracle.kth_largest([r], n)
      for r, n in zip(common.float64(rows), k, strict=True)
    ]
    np.testing.assert_array_equal(got.ravel(), want)

  @given(data=st.data())
  def test_trees_are_ranked_as_one(self, data):
    shapes = {"a": (3, 4), "b": (), "c": (0, 2), "d": (1152,), "e": (1,)}
    tree = {n: data.draw(common.score_arrays(s)) for n, s in shapes.items()}
    k = data.draw(st.integers(0, sum(x.size for x in tree.values())))
    want = oracle.kth_largest([common.float64(x) for x in tree.values()], k)
    np.testing.assert_array_equal(kth_largest(tree, k), want)

  def test_trees_along_an_axis_are_trees(self):
    tree = {"a": jnp.arange(6.0).reshape(2, 3), "b": [jnp.ones((2, 1))]}
    got = kth_largest(tree, 1, axis=-1)
    np.testing.assert_array_equal(got["a"], [[2.0], [5.0]])
    np.testing.assert_array_equal(got["b"][0], [[1.0], [1.0]])

  def test_leaves_share_the_widest_type(self):
    tree = [jnp.ones(2, jnp.bfloat16), jnp.full(1, 1.001, jnp.float32)]
    got = kth_largest(tree, 1)
    self.assertEqual(got.dtype, jnp.float32)
    self.assertEqual(got, np.float32(1.001))

  @parameterized.parameters((0, 3), (3, 0), (0,))
  def test_empty(self, *shape):
    for k in (0, 5):  # a traced k is clamped to 0
      self.assertEqual(kth_largest(jnp.zeros(shape), k), np.inf)
    rows = kth_largest(jnp.zeros(shape), 0, axis=-1)
    np.testing.assert_array_equal(rows, np.full((*shape[:-1], 1), np.inf))

  def test_traced_k_clamps(self):
    x = jnp.array([3.0, 1.0, 2.0])
    for k, want in ((-(2**31), np.inf), (-1, np.inf), (4, 1.0), (10**9, 1.0)):
      self.assertEqual(kth_largest(x, k), want)
    for k in (np.int8(-3), np.uint32(2**32 - 1), np.uint8(200)):
      self.assertIn(float(kth_largest(x, k)), (np.inf, 1.0))
    for k in (2, np.uint8(2), np.int64(2)):
      self.assertEqual(kth_largest(x, k), 2.0)

  def test_one_program_for_every_k(self):
    f = jax.jit(thresholds.kth_largest)
    for k in range(4):
      f(jnp.arange(3.0), k)
    self.assertEqual(f._cache_size(), 1)

  def test_nan_only_where_no_other_score_is_left(self):
    x = jnp.array([np.nan, -np.inf, np.nan])
    np.testing.assert_array_equal(kth_largest(x, 1), -np.inf)
    for k in (2, 3):
      self.assertTrue(jnp.isnan(kth_largest(x, k)))

  @parameterized.parameters(jnp.float32, jnp.bfloat16, jnp.float16)
  def test_subnormal_scores_are_not_zero(self, dtype):
    tiny = jnp.finfo(dtype).smallest_subnormal
    x = np.array([0.0, 2 * tiny, -tiny, tiny], dtype)
    uint = f"uint{8 * x.dtype.itemsize}"
    for k, want in enumerate(x[[1, 3, 0, 2]], start=1):
      got = np.asarray(kth_largest(x, k))
      self.assertEqual(got.view(uint), want.view(uint))  # not flushed

  @parameterized.parameters(-1, 4, 1.5, 2.0, True)
  def test_static_k_is_refused_by_name(self, k):
    with self.assertRaisesRegex(ValueError, r"^k must be"):
      jax.jit(lambda x: thresholds.kth_largest(x, k))(jnp.zeros(3))
    with self.assertRaisesRegex(ValueError, r"^k must be"):
      jax.jit(lambda x: thresholds.kth_largest(x, k, axis=1))(jnp.zeros((9, 3)))

  def test_one_bad_k_of_many_is_refused(self):
    k = np.array([[1], [4]])
    with self.assertRaisesRegex(ValueError, r"^k must be in \[0, 3\]"):
      thresholds.kth_largest(jnp.zeros((2, 3)), k, axis=1)

  def test_traced_k_must_be_an_integer(self):
    with self.assertRaisesRegex(ValueError, r"^k must be an integer"):
      kth_largest(jnp.zeros(3), 1.5)

  def test_many_k_need_an_axis(self):
    for k in (np.array([1, 2]), jnp.array([1, 2])):
      with self.assertRaisesRegex(ValueError, r"\bk\b"):
        thresholds.kth_largest(jnp.zeros(3), k)
      with self.assertRaisesRegex(ValueError, r"\bk\b"):
        kth_largest(jnp.zeros(3), k)

  @parameterized.parameters(jnp.int32, jnp.bool_, jnp.complex64, jnp.uint8)
  def test_other_types_are_refused(self, dtype):
    with self.assertRaisesRegex(ValueError, r"^scores must be floating"):
      kth_largest(jnp.zeros(3, dtype), 1)

  def test_one_other_type_of_many_is_refused(self):
    tree = [jnp.zeros(3), jnp.zeros(3, jnp.int32)]
    with self.assertRaisesRegex(ValueError, r"^scores must be floating"):
      kth_largest(tree, 1)

  def test_no_scores_are_refused(self):
    with self.assertRaisesRegex(ValueError, r"^scores must have at least one"):
      kth_largest({}, 0)

  @parameterized.parameters(2, -3, ((0, 2),))
  def test_axis_out_of_range(self, axis):
    with self.assertRaisesRegex(ValueError, r"^axis must be in \[-2, 2\)"):
      kth_largest(jnp.zeros((2, 3)), 1, axis=axis)

  def test_an_axis_named_twice(self):
    with self.assertRaisesRegex(ValueError, r"axis"):
      kth_largest(jnp.zeros((2, 3)), 1, axis=(0, -2))

  def test_two_to_the_31_entries_are_refused(self):
    half = jax.ShapeDtypeStruct((2**15, 2**15), jnp.bfloat16)
    run = lambda x: thresholds.kth_largest(x, 1)
    jax.eval_shape(run, half)
    with self.assertRaisesRegex(ValueError, r"^scores must hold fewer than"):
      jax.eval_shape(run, [half, half])

  def test_vmap_is_a_loop(self):
    rng = np.random.default_rng(1)
    x = rng.integers(-3, 3, (4, 2, 7)).astype(np.float32)
    k = np.array([0, 1, 9, 14])
    got = jax.jit(jax.vmap(thresholds.kth_largest))(x, k)
    want = [kth_largest(row, n) for row, n in zip(x, k, strict=True)]
    np.testing.assert_array_equal(got, want)

  def test_carries_no_gradient(self):
    def loss(x):
      return jnp.sum(x * x) * thresholds.kth_largest(x, 2)

    x = jnp.array([1.0, 5.0, 3.0])
    np.testing.assert_array_equal(jax.jit(jax.grad(loss))(x), 2 * 3.0 * x)
    _, out = jax.jvp(lambda x: kth_largest(x, 2), (x,), (x,))
    self.assertEqual(out, 0.0)


SHARDED = (
  ("one_axis", (1024,), jax.P(("x", "y")), None),
  ("three_a_shard", (12,), jax.P("x"), None),
  ("along_lanes", (4, 1024), jax.P(None, ("x", "y")), -1),
  ("along_two", (24, 8, 6), jax.P(None, "x", "y"), (0, 2)),
)


class ShardedTest(parameterized.TestCase):
  def compiled(self, f, *args):
    return jax.jit(f).lower(*args).compile()

  @parameterized.product(case=SHARDED, axis_type=common.AXIS_TYPES)
  def test_nothing_is_gathered(self, case, axis_type):
    _, shape, spec, axis = case
    rng = np.random.default_rng(2)
    x = rng.integers(-9, 9, shape).astype(np.float32)
    k = 3 if axis is None else rng.integers(0, 7, row_counts(shape, axis))
    mesh = common.mesh_of(axis_type)
    with jax.set_mesh(mesh):
      a = common.place(x, mesh, spec)
      run = self.compiled(
        lambda x, k: thresholds.kth_largest(x, k, axis=axis), a, k
      )
      got = run(a, k)
    self.assertEmpty(common.moved(run))
    if axis is None:
      self.assertEqual(common.reduced(run), {1})
      want = oracle.kth_largest([x], k)
    else:
      rows = zip(rows_of(x, axis), k.ravel(), strict=True)
      want = np.reshape([oracle.kth_largest([r], n) for r, n in rows], k.shape)
    np.testing.assert_array_equal(got, want)

  def test_what_is_looked_for_is_seen(self):
    mesh = common.mesh_of(jax.sharding.AxisType.Auto)
    x = common.place(np.arange(64.0, dtype=np.float32), mesh, jax.P("x"))
    self.assertContainsSubset(
      {"all-gather", "sort"}, common.moved(self.compiled(jnp.sort, x))
    )
    sums = self.compiled(lambda x: jnp.sum(x.reshape(8, 8), 0), x)
    self.assertEqual(common.reduced(sums), {8})


class KeysTest(parameterized.TestCase):
  @parameterized.parameters(jnp.float32, jnp.bfloat16, jnp.float16)
  def test_keys_are_in_the_order_of_scores(self, dtype):
    top = jnp.finfo(dtype).max
    values = [np.nan, -np.inf, -top, -1.5, -1.0, 0.0, 0.5, 1.0, top, np.inf]
    scores = jnp.asarray(values, dtype)
    keys = np.asarray(jax.jit(thresholds.ordered_keys)(scores))
    self.assertEqual(keys.dtype.itemsize, scores.dtype.itemsize)
    self.assertTrue(np.all(keys[1:] > keys[:-1]))
    back = thresholds._scores_of(keys, dtype)
    np.testing.assert_array_equal(common.float64(back), common.float64(scores))

  @parameterized.parameters(jnp.float32, jnp.bfloat16, jnp.float16)
  def test_equal_scores_have_equal_keys(self, dtype):
    bits = jnp.finfo(dtype).bits
    ones = np.array([-1], f"int{bits}").view(dtype)  # the NaN of all ones
    scores = jnp.asarray([0.0, -0.0, np.nan, -np.nan, ones[0]], dtype)
    keys = jax.jit(thresholds.ordered_keys)(scores)
    self.assertEqual(keys[0], keys[1])
    np.testing.assert_array_equal(keys[2:], [1, 1, 1])

  def test_no_score_has_the_keys_of_never_and_always(self):
    every = jnp.arange(2**16, dtype=jnp.uint16)
    for dtype in (jnp.bfloat16, jnp.float16):
      scores = jax.lax.bitcast_convert_type(every, dtype)
      keys = np.asarray(jax.jit(thresholds.ordered_keys)(scores))
      self.assertGreater(keys.min(), 0)
      self.assertLess(keys.max(), 2**16 - 1)
    at = jnp.array([True, False])
    keys = jnp.full(2, 7, jnp.uint16)
    self.assertEqual(thresholds.never(keys, at).tolist(), [0, 7])
    self.assertEqual(thresholds.always(keys, at).tolist(), [2**16 - 1, 7])

  def test_fewer_keys_than_wanted(self):
    keys = thresholds.never(
      jnp.arange(1, 6, dtype=jnp.uint32), jnp.arange(5) < 3
    )
    got = jax.jit(lambda x, k: thresholds.kth_key([x], k))
    self.assertEqual([got(keys, k).item() for k in (1, 2, 3, 5)], [5, 4, 0, 0])

  @parameterized.parameters(
    ((1152,), None),
    ((1024, 3), None),
    ((3, 1280), (1,)),
    ((256, 128), (0, 1)),
    ((256, 128), (1,)),
    ((5, 7), (0,)),
    ((2, 128, 3), (0, 1)),
    ((0, 128), None),
    ((), None),
  )
  def test_count(self, shape, axis):
    rng = np.random.default_rng(3)
    run = jax.jit(lambda x: thresholds.count([x], axis))
    for flags in (rng.random(shape) < 0.3, np.ones(shape, bool)):
      want = np.sum(flags, axis, keepdims=axis is not None)
      got = run(flags)
      self.assertEqual((got.shape, got.dtype), (want.shape, jnp.int32))
      np.testing.assert_array_equal(got, want)

  def test_count_of_many(self):
    flags = [jnp.ones((3, 4), bool), jnp.ones((), bool), jnp.zeros(128, bool)]
    self.assertEqual(jax.jit(thresholds.count)(flags), 13)
    self.assertEqual(thresholds.count([]), 0)

  def test_descend(self):
    @jax.jit
    def run(n):
      return thresholds.descend(lambda t: t <= n, jnp.zeros_like(n))

    n = np.array([0, 1, 2, 77, 2**15, 2**16 - 1], np.uint16)
    np.testing.assert_array_equal(run(n), n)
