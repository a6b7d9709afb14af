"""BDWP: two masks of one weight, each along the axis that is summed over."""

import functools
import re

from flax import linen as nn
from flax import nnx
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sparsejax import weights
from tests import common
from tests.oracles import methods_rest as oracle
from tests.weights.problem import jit
from tests.weights.problem import numbers


@functools.partial(jit, static_argnums=(3, 4))
def call(x, w, dy, n, m):
  f = functools.partial(weights.bidirectional_matmul, n=n, m=m)
  y, pull = jax.vjp(f, x, w)
  return y, *pull(dy)


def problem(lead=(3, 2), k=12, n=8, dtype=np.float32):
  return (
    jnp.asarray(numbers(*lead, k, seed=1), dtype),
    jnp.asarray(numbers(k, n, seed=2), dtype),
    jnp.asarray(numbers(*lead, n, seed=3), dtype),
  )


@pytest.mark.parametrize(
  ("n", "m", "lead", "dtype"),
  [
    (2, 4, (3, 2), np.float32),
    (1, 4, (), np.float32),
    (0, 2, (5,), np.float32),
    (1, 1, (0,), np.float32),
    (2, 4, (5,), jnp.bfloat16),
  ],
)
def test_each_direction_has_its_mask(n, m, lead, dtype):
  x, w, dy = problem(lead, dtype=dtype)
  got = call(x, w, dy, n, m)
  x64, w64, dy64 = map(common.float64, (x, w, dy))
  rows = x64.reshape(-1, 12), w64, dy64.reshape(-1, 8)
  y = oracle.bdwp_forward(*rows[:2], n, m)
  dx, dw = oracle.bdwp_gradients(*rows, n, m)
  want = y.reshape(dy.shape), dx.reshape(x.shape), dw
  # One rounding of the result in bf16; sums of 12 products in f32.
  tol = 2.0**-7 if dtype == jnp.bfloat16 else 1e-5
  for a, b in zip(got, want, strict=True):
    assert a.dtype == dtype
    np.testing.assert_allclose(common.float64(a), b, tol, tol)


def test_of_equal_weights_the_first_is_kept():
  w = jnp.ones((4, 4))
  y, dx, _ = call(jnp.arange(1.0, 5), w, jnp.arange(1.0, 5), 1, 2)
  assert y.tolist() == [4.0] * 4  # inputs 0 and 2: 1 + 3
  assert dx.tolist() == [4.0] * 4


def dense(x, w, dy):
  y, pull = jax.vjp(jnp.matmul, x, w)
  return y, *pull(dy)


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_n_equal_m_is_the_dense_product_to_the_bit(dtype):
  x, w, dy = problem(dtype=dtype)
  w = w.at[0, 0].set(jnp.nan)  # hidden by no mask
  for a, b in zip(call(x, w, dy, 4, 4), jit(dense)(x, w, dy), strict=True):
    np.testing.assert_array_equal(common.float64(a), common.float64(b))


def test_vmap_over_weights():
  x, w, dy = (jnp.stack([a, 2 - a]) for a in problem((3,)))
  plain = call.__wrapped__
  got = jit(jax.vmap(lambda *args: plain(*args, 2, 4)))(x, w, dy)
  for i in range(2):
    for a, b in zip(got, call(x[i], w[i], dy[i], 2, 4), strict=True):
      np.testing.assert_allclose(a[i], b, 1e-5, 1e-5)


def test_second_order():
  """The gradient by x is linear in dy and in the kept weights."""
  x, w, dy = problem((3,))

  def slope(w, dy):
    _, pull = jax.vjp(lambda x: weights.bidirectional_matmul(x, w, 2, 4), x)
    return (pull(dy)[0] ** 2).sum()

  back = np.where(oracle.bdwp_masks(w, 2, 4)[1], w, 0)
  want = 2 * common.float64(dy) @ back.T @ back
  got = jit(jax.grad(slope, 1))(w, dy)
  np.testing.assert_allclose(got, want, 1e-4, 1e-4)


@pytest.mark.parametrize("axis_type", common.AXIS_TYPES, ids=str)
def test_sharded(axis_type):
  mesh = common.mesh_of(axis_type)
  x, w, dy = problem((8,), k=16)
  spec = lambda *names: jax.P(*names)
  args = [
    common.place(x, mesh, spec("x", None)),
    common.place(w, mesh, spec(None, "y")),
    common.place(dy, mesh, spec("x", "y")),
  ]
  with jax.set_mesh(mesh):
    got = call(*args, 2, 4)
  for a, b in zip(got, call(x, w, dy, 2, 4), strict=True):
    np.testing.assert_allclose(a, b, 1e-5, 1e-5)


DOT = weights.BidirectionalDot(2, 4)


def test_it_is_hashable_and_equal_by_value():
  assert {DOT: 1}[weights.BidirectionalDot(2, 4)] == 1
  assert weights.BidirectionalDot(1, 4) != DOT


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
def test_flax_layers(dtype):
  """nnx.Linear and linen.Dense: their kernels train as the function's."""
  x, w, dy = problem()
  layer = nnx.Linear(12, 8, dtype=dtype, dot_general=DOT, rngs=nnx.Rngs(0))
  linen = nn.Dense(8, dtype=dtype, dot_general=DOT)
  params = {"kernel": w, "bias": layer.bias[...]}

  def with_nnx(x, w):
    graph, state = nnx.split(layer)
    pure = nnx.to_pure_dict(state) | {"kernel": w}
    nnx.replace_by_pure_dict(state, pure)
    return nnx.merge(graph, state)(x)

  def with_linen(x, w):
    return linen.apply({"params": params | {"kernel": w}}, x)

  to = dtype or jnp.float32
  tol = 2.0**-6 if dtype else 1e-6  # bf16 sums of six, each rounded, or not
  y, dx, dw = call(x.astype(to), w.astype(to), dy.astype(to), 2, 4)
  for f in with_nnx, with_linen:
    got, pull = jax.vjp(f, x, w)
    assert got.dtype == to
    wide = [common.float64(a) for a in (got, *pull(dy.astype(to)))]
    for a, b in zip(wide, (y, dx, dw), strict=True):
      np.testing.assert_allclose(a, common.float64(b), tol, tol)


def test_preferred_element_type_reaches_the_product():
  x, w, _ = problem(dtype=jnp.bfloat16)
  dims = (((2,), (0,)), ((), ()))
  y = DOT(x, w, dims, preferred_element_type=jnp.float32)
  assert y.dtype == jnp.float32


@pytest.mark.parametrize(
  ("f", "message"),
  [
    (
      lambda x, w: DOT(x, w, (((1,), (0,)), ((), ()))),
      "dimension_numbers must be of the last axis of x",
    ),
    (
      lambda x, w: DOT(x, w.T, (((2,), (1,)), ((), ()))),
      "dimension_numbers must be of the last axis of x",
    ),
    (
      lambda x, w: DOT(x, x, (((2,), (2,)), ((0,), (0,)))),
      "dimension_numbers must be of the last axis of x",
    ),
    (
      lambda x, w: weights.bidirectional_matmul(x, w, 3, 5),
      "m must divide axis 0",
    ),
    (
      lambda x, w: weights.bidirectional_matmul(x, w, 3, 6),
      "m must divide axis 1",
    ),
    (
      lambda x, w: weights.bidirectional_matmul(x, w, 5, 4),
      "n must be an integer in [0, m]",
    ),
    (
      lambda x, w: weights.bidirectional_matmul(x, w.T, 2, 4),
      "x must be [..., inputs] and w [inputs, outputs]",
    ),
    (
      lambda x, w: weights.bidirectional_matmul(x.astype("bfloat16"), w, 2, 4),
      "x and w must have one floating dtype",
    ),
  ],
)
def test_bad_calls(f, message):
  x, w, _ = problem()
  with pytest.raises(ValueError, match=re.escape(message)):
    f(x, w)


@pytest.mark.slow
def test_training_at_2_8_stays_near_dense():
  """The 95% interval of the gap in test accuracy, over paired seeds.

  Eight classes of four Gaussian clusters each, in 32 dimensions, and a hidden
  layer of 256. Both arms have the same start and data.
  """
  width, seeds, steps = 256, 6, 400

  def accuracy(key, n):
    keys = jax.random.split(key, 5)
    normal = lambda k, *shape: jax.random.normal(k, shape) / shape[0] ** 0.5
    params = dict(a=normal(keys[0], 32, width), b=normal(keys[1], width, 8))
    params["bias"] = jnp.zeros(width)
    centers = 1.2 * jax.random.normal(keys[2], (32, 32))
    tx = optax.adam(optax.cosine_decay_schedule(0.005, steps))
    matmul = functools.partial(weights.bidirectional_matmul, n=n, m=8)

    def batch(key, size):
      which = jax.random.randint(key, (size,), 0, 32)
      noise = jax.random.normal(jax.random.fold_in(key, 1), (size, 32))
      return centers[which] + noise, which % 8

    def apply(params, x):
      hidden = jax.nn.relu(matmul(x, params["a"]) + params["bias"])
      return matmul(hidden, params["b"])

    def loss(params, x, y):
      logits = apply(params, x)
      return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    def step(i, now):
      params, state = now
      x, y = batch(jax.random.fold_in(keys[3], i), 64)
      updates, state = tx.update(jax.grad(loss)(params, x, y), state, params)
      return optax.apply_updates(params, updates), state

    params, _ = lax.fori_loop(0, steps, step, (params, tx.init(params)))
    x, y = batch(keys[4], 2048)
    return (apply(params, x).argmax(-1) == y).mean()

  keys = jax.random.split(jax.random.key(0), seeds)
  sparse, dense = (
    np.asarray(jax.jit(jax.vmap(functools.partial(accuracy, n=n)))(keys))
    for n in (2, 8)
  )
  gap = dense - sparse
  half = 2.571 * gap.std(ddof=1) / seeds**0.5  # Student's t of 5, 95%
  assert dense.mean() > 0.98
  assert gap.mean() + half < 0.015, (gap.mean(), half)
