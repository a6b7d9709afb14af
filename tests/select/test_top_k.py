"""Masks of the k largest: exactly a stable argsort's choice."""

import functools

from absl.testing import parameterized
from hypothesis import given
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np

from sparsejax.select import thresholds
from sparsejax.select import top_k
from tests import common
from tests.oracles import select as oracle

SHAPES = ((), (1,), (2, 3, 4), (1152,), (3, 1280))
FEW_SHAPES = ((7,), (1152,))
KINDS = (
  *[(shape, jnp.float32) for shape in SHAPES],
  *[(shape, jnp.bfloat16) for shape in FEW_SHAPES],
  *[(shape, jnp.float16) for shape in FEW_SHAPES],
)
ROWS = (((3, 5), 1), ((3, 5), -2), ((2, 3, 4), (0, 2)), ((3, 256), (-1,)))


@functools.partial(jax.jit, static_argnames="axis")
def top_k_mask(scores, k, axis=None):
  return top_k.top_k_mask(scores, k, axis=axis)


def oracle_rows(scores, k, axis):
  """The oracle along `axis`; k has the kept-dims shape."""
  axes = [a % scores.ndim for a in np.atleast_1d(axis)]
  rest = [d for a, d in enumerate(scores.shape) if a not in axes]
  want = np.zeros(scores.shape, bool)
  for at in np.ndindex(*rest):
    index, other = [], iter(at)
    for a in range(scores.ndim):
      index.append(slice(None) if a in axes else next(other))
    row = common.float64(scores[tuple(index)])
    n = int(k[tuple(0 if isinstance(i, slice) else i for i in index)])
    want[tuple(index)] = oracle.top_k_mask([row], n)[0]
  return want


def row_counts(shape, axis):
  """The shape of one number for each row: ranked axes have size 1."""
  axes = [a % len(shape) for a in np.atleast_1d(axis)]
  return tuple(1 if a in axes else d for a, d in enumerate(shape))


class TopKMaskTest(parameterized.TestCase):
  @given(data=st.data())
  def test_equals_oracle(self, data):
    shape, dtype = data.draw(st.sampled_from(KINDS))
    scores = data.draw(common.score_arrays(shape, dtype))
    k = data.draw(st.integers(0, scores.size))
    got = top_k_mask(scores, k)
    self.assertEqual(got.dtype, bool)
    (want,) = oracle.top_k_mask([common.float64(scores)], k)
    np.testing.assert_array_equal(got, want)

  @parameterized.parameters(*SHAPES)
  def test_few_and_all(self, *shape):
    palette = [*common.SPECIAL, *common.PLAIN]
    rng = np.random.default_rng(0)
    scores = rng.choice(palette, shape).astype(np.float32)
    size = scores.size
    for k in {0, 1, size // 2, size - 1, size}:
      (want,) = oracle.top_k_mask([common.float64(scores)], k)
      np.testing.assert_array_equal(top_k_mask(scores, k), want)

  @parameterized.parameters(0.0, np.nan, -np.inf, np.inf, 1.0)
  def test_ties_go_to_the_lowest_index(self, value):
    for shape in ((2, 3, 4), (1152,)):
      scores = np.full(shape, value, np.float32)
      scores.flat[1::2] *= -1 if value == 0 else 1  # both zeros are one score
      for k in (0, 1, 5, scores.size):
        got = np.asarray(top_k_mask(scores, k)).ravel()
        np.testing.assert_array_equal(got, np.arange(scores.size) < k)

  def test_is_a_stable_argsort(self):
    rng = np.random.default_rng(4)
    scores = rng.integers(-5, 5, (3, 1280)).astype(np.float32)
    order = np.argsort(-scores.ravel(), stable=True)
    for k in (1, 100, 3000):
      want = np.zeros(scores.size, bool)
      want[order[:k]] = True
      got = np.asarray(top_k_mask(scores, k)).ravel()
      np.testing.assert_array_equal(got, want)

  @given(data=st.data())
  def test_along_axes(self, data):
    shape, axis = data.draw(st.sampled_from(ROWS))
    scores = data.draw(common.score_arrays(shape))
    kept = row_counts(shape, axis)
    rows = int(np.prod(kept))
    counts = st.integers(0, scores.size // rows)
    k = data.draw(st.lists(counts, min_size=rows, max_size=rows))
    k = np.reshape(k, kept).astype(np.int32)
    got = top_k_mask(scores, k, axis)
    np.testing.assert_array_equal(got, oracle_rows(scores, k, axis))

  @parameterized.parameters(*ROWS, ((2, 3, 4), ()), ((7,), 0))
  def test_one_k_for_all_rows(self, shape, axis):
    rng = np.random.default_rng(5)
    scores = rng.integers(-2, 3, shape).astype(np.float32)
    kept = row_counts(shape, axis)
    want = oracle_rows(scores, np.full(kept, 1), axis)
    run = jax.jit(lambda x: top_k.top_k_mask(x, 1, axis=axis))  # static
    np.testing.assert_array_equal(run(scores), want)

  @given(data=st.data())
  def test_trees_are_ranked_as_one(self, data):
    shapes = {"a": (3, 4), "b": (), "c": (0, 2), "d": (1152,), "e": (1,)}
    tree = {n: data.draw(common.score_arrays(s)) for n, s in shapes.items()}
    k = data.draw(st.integers(0, sum(x.size for x in tree.values())))
    want = oracle.top_k_mask([common.float64(x) for x in tree.values()], k)
    got = top_k_mask(tree, k)
    self.assertEqual(list(got), list(tree))
    for g, w in zip(got.values(), want, strict=True):
      np.testing.assert_array_equal(g, w)

  def test_trees_along_an_axis_are_ranked_leaf_by_leaf(self):
    tree = {"a": jnp.array([[1.0, 2.0]]), "b": jnp.array([[9.0], [7.0]])}
    got = top_k_mask(tree, 1, axis=1)
    self.assertEqual(got["a"].tolist(), [[False, True]])
    self.assertEqual(got["b"].tolist(), [[True], [True]])

  def test_python_scalars_are_leaves(self):
    got = top_k_mask([3.0, 4.0, jnp.array([3.5, 9.0])], 2)
    self.assertEqual(
      [np.asarray(x).tolist() for x in got], [False, True, [False, True]]
    )

  @parameterized.parameters((0, 3), (3, 0), (0,))
  def test_empty(self, *shape):
    for k in (0, 2):
      self.assertEqual(top_k_mask(jnp.zeros(shape), k).shape, shape)
      got = top_k_mask(jnp.zeros(shape), k, axis=-1)
      self.assertEqual((got.shape, got.dtype), (shape, bool))

  def test_traced_k_clamps(self):
    x = jnp.array([3.0, np.nan, 2.0])
    for k in (-(2**31), -1, 0, np.int8(-7)):
      self.assertFalse(np.any(top_k_mask(x, k)))
    for k in (3, 4, 2**31 - 1, np.uint32(2**32 - 1)):
      self.assertTrue(np.all(top_k_mask(x, k)))

  @parameterized.parameters(jnp.float32, jnp.bfloat16, jnp.float16)
  def test_subnormal_scores_are_not_zero(self, dtype):
    tiny = jnp.finfo(dtype).smallest_subnormal
    x = np.array([0.0, -tiny, tiny, 2 * tiny], dtype)
    want = [[], [3], [2, 3], [0, 2, 3], [0, 1, 2, 3]]
    for k, chosen in enumerate(want):
      got = np.asarray(top_k_mask(x, k))
      np.testing.assert_array_equal(np.flatnonzero(got), chosen)

  @parameterized.parameters(-1, 4, 1.5, 2.0, True)
  def test_static_k_is_refused_by_name(self, k):
    with self.assertRaisesRegex(ValueError, r"^k must be"):
      jax.jit(lambda x: top_k.top_k_mask(x, k))(jnp.zeros(3))
    with self.assertRaisesRegex(ValueError, r"^k must be"):
      jax.jit(lambda x: top_k.top_k_mask(x, k, axis=1))(jnp.zeros((9, 3)))

  def test_traced_k_must_be_an_integer(self):
    with self.assertRaisesRegex(ValueError, r"^k must be an integer"):
      top_k_mask(jnp.zeros(3), 1.5)

  def test_many_k_need_an_axis(self):
    with self.assertRaisesRegex(ValueError, r"\bk\b"):
      top_k_mask(jnp.zeros(3), np.array([1, 2]))

  def test_k_that_does_not_fit_the_rows(self):
    with self.assertRaises((ValueError, TypeError)):
      top_k_mask(jnp.zeros((2, 4)), np.ones((3, 1), np.int32), axis=1)

  @parameterized.parameters(jnp.int32, jnp.bool_, jnp.complex64)
  def test_other_types_are_refused(self, dtype):
    for scores in (jnp.zeros(3, dtype), [jnp.zeros(3), jnp.zeros(3, dtype)]):
      with self.assertRaisesRegex(ValueError, r"^scores must be floating"):
        top_k_mask(scores, 1)

  @parameterized.parameters(2, -3, ((0, 2),))
  def test_axis_out_of_range(self, axis):
    with self.assertRaisesRegex(ValueError, r"^axis must be in \[-2, 2\)"):
      top_k_mask(jnp.zeros((2, 3)), 1, axis=axis)

  def test_vmap_is_a_loop(self):
    rng = np.random.default_rng(6)
    x = rng.integers(-3, 3, (4, 2, 7)).astype(np.float32)
    k = np.array([0, 1, 9, 14])
    got = jax.jit(jax.vmap(top_k.top_k_mask))(x, k)
    want = [top_k_mask(row, n) for row, n in zip(x, k, strict=True)]
    np.testing.assert_array_equal(got, want)
    across = jax.jit(jax.vmap(top_k.top_k_mask, (1, None)))(x[:, 0], 2)
    want = [top_k_mask(column, 2) for column in x[:, 0].T]
    np.testing.assert_array_equal(across, want)

  def test_is_a_constant_to_gradients(self):
    def loss(x):
      return jnp.sum(jnp.where(top_k.top_k_mask(x, 2), x**2, 0))

    x = jnp.array([1.0, 5.0, 3.0, -4.0])
    want = [0.0, 10.0, 6.0, 0.0]
    np.testing.assert_array_equal(jax.jit(jax.grad(loss))(x), want)
    np.testing.assert_array_equal(jax.jacfwd(loss)(x), want)

  def test_product_with_a_cast_mask(self):
    def loss(x):
      return jnp.sum(x * top_k.top_k_mask(jnp.abs(x), 1).astype(x.dtype))

    got = jax.jit(jax.grad(loss))(jnp.array([1.0, -5.0]))
    np.testing.assert_array_equal(got, [0.0, 1.0])

  def test_never_is_not_selected_and_always_is(self):
    @jax.jit
    def run(keys, k):
      (mask,) = top_k.top_k_keys([keys], k)
      return mask

    keys = thresholds.ordered_keys(jnp.array([np.nan, np.inf, 2.0, np.inf]))
    keys = thresholds.never(keys, jnp.array([False, True, False, False]))
    keys = thresholds.always(keys, jnp.array([True, False, False, False]))
    for k, want in ((1, [0]), (2, [0, 3]), (3, [0, 2, 3]), (4, [0, 2, 3])):
      np.testing.assert_array_equal(np.flatnonzero(run(keys, k)), want)


SHARDED = (
  ("one_axis", (1024,), jax.P(("x", "y")), None),
  ("one_a_device", (8,), jax.P(("x", "y")), None),
  ("three_a_shard", (12,), jax.P("x"), None),
  ("bytes", (1024, 6), jax.P("x", "y"), None),
  ("17_a_shard", (136, 2), jax.P(("x", "y")), None),
  ("along_3_a_shard", (12, 4), jax.P("x", "y"), 0),
  ("along_bytes", (1024, 4), jax.P("x", "y"), 0),
  ("along_lanes", (4, 1024), jax.P(None, ("x", "y")), -1),
)


class ShardedTest(parameterized.TestCase):
  @parameterized.product(case=SHARDED, axis_type=common.AXIS_TYPES)
  def test_nothing_is_gathered(self, case, axis_type):
    _, shape, spec, axis = case
    rng = np.random.default_rng(7)
    x = rng.integers(-3, 3, shape).astype(np.float32)
    if axis is None:
      k = x.size // 3
      want = np.asarray(oracle.top_k_mask([x], k)[0])
    else:
      k = rng.integers(0, 5, row_counts(shape, axis))
      want = oracle_rows(x, k, axis)
    mesh = common.mesh_of(axis_type)
    run = jax.jit(lambda x, k: top_k.top_k_mask(x, k, axis=axis))
    with jax.set_mesh(mesh):
      a = common.place(x, mesh, spec)
      compiled = run.lower(a, k).compile()
      got = compiled(a, k)
    self.assertEmpty(common.moved(compiled))
    if axis is None:
      self.assertEqual(common.reduced(compiled), {1})
    self.assertTrue(got.sharding.is_equivalent_to(a.sharding, a.ndim))
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(got, top_k_mask(x, k, axis))

  @parameterized.parameters(*common.AXIS_TYPES)
  def test_trees(self, axis_type):
    rng = np.random.default_rng(8)
    shapes = {"a": (1024, 6), "b": (12,), "c": ()}
    specs = {"a": jax.P("x", "y"), "b": jax.P("x"), "c": jax.P()}
    tree = {
      n: np.asarray(rng.integers(-3, 3, s), np.float32)
      for n, s in shapes.items()
    }
    mesh = common.mesh_of(axis_type)
    with jax.set_mesh(mesh):
      placed = {n: common.place(x, mesh, specs[n]) for n, x in tree.items()}
      compiled = jax.jit(top_k.top_k_mask).lower(placed, 99).compile()
      got = compiled(placed, 99)
    self.assertEmpty(common.moved(compiled))
    self.assertEqual(common.reduced(compiled), {1})
    for n, want in top_k_mask(tree, 99).items():
      sharding = placed[n].sharding
      self.assertTrue(got[n].sharding.is_equivalent_to(sharding, want.ndim))
      np.testing.assert_array_equal(got[n], want)

  def test_one_explicit_axis_of_two(self):
    types = common.AXIS_TYPES[::-1]
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=types)
    x = np.arange(36.0, dtype=np.float32).reshape(12, 3)
    with jax.set_mesh(mesh):
      got = top_k_mask(common.place(x, mesh, jax.P("x")), 5)
      self.assertEqual(jax.typeof(got).sharding.spec, jax.P("x", None))
    np.testing.assert_array_equal(got, x >= 31)

  @parameterized.product(spec=(jax.P(None, "x"), jax.P("x")), axis=(-1, 0))
  def test_rows_outside_of_jit(self, spec, axis):
    mesh = common.mesh_of(common.AXIS_TYPES[1])
    x = np.random.default_rng(0).integers(0, 3, (8, 8)).astype(np.float32)
    with jax.set_mesh(mesh):
      got = top_k.top_k_mask(common.place(x, mesh, spec), 3, axis=axis)
    np.testing.assert_array_equal(got, top_k_mask(x, 3, axis))
