"""Gathered rows against loops and dense products, at any density."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax import activations
from sparsejax.activations import ffn
from tests import common
from tests.activations import pieces
from tests.oracles import activations as oracle

WIDTH, NEURONS, OUT = 5, 19, 3
KERNEL = pieces.draw(0, NEURONS, OUT)
UP = pieces.draw(1, NEURONS, WIDTH)
X = pieces.draw(2, 2, WIDTH)
DENSE = {
  "gate": pieces.draw(3, WIDTH, NEURONS),
  "up": UP.T.copy(),
  "down": KERNEL,
}
ROWS = {"gate": DENSE["gate"], "up_rows": UP, "down": KERNEL}
# Nothing, fewer and more than eight rows (what a step adds), and all.
COUNTS = (0, 1, 8, 11, NEURONS)


def sparse(count, tokens=2, seed=4):
  """Values of which `count` neurons are not zero, in one token or another."""
  rng = np.random.default_rng(seed)
  a = np.zeros((tokens, NEURONS), np.float32)
  for j in rng.permutation(NEURONS)[:count]:
    a[rng.integers(tokens), j] = rng.standard_normal()
  return a


@functools.partial(pieces.jit, static_argnums=2)
def product(a, kernel, capacity):
  return activations.sparse_matmul(a, kernel, capacity=capacity)


@functools.partial(pieces.jit, static_argnums=4)
def glu(a, x, up, down, capacity):
  return activations.sparse_glu(a, x, up, down, capacity=capacity)


@pytest.mark.parametrize("capacity", [0, 10, 99])
def test_a_product_is_right_at_any_density(capacity):
  for count in COUNTS:
    a = sparse(count)
    pieces.close(product(a, KERNEL, capacity), oracle.matmul(a, KERNEL))
    hidden = a * oracle.matmul(X, UP.T)
    want = oracle.matmul(hidden, KERNEL)
    pieces.close(glu(a, X, UP, KERNEL, capacity), want)


def test_rows_that_are_not_needed_are_not_read():
  a = sparse(8)
  unused = ~(a != 0).any(0)[:, None]
  kernel, up = np.where(unused, np.nan, KERNEL), np.where(unused, np.nan, UP)
  pieces.close(product(a, kernel, 10), oracle.matmul(a, KERNEL))
  hidden = a * oracle.matmul(X, UP.T)
  got = glu(a, X, up, kernel, 10)
  pieces.close(got, oracle.matmul(hidden, KERNEL))
  # Beyond the capacity everything is.
  assert np.isnan(product(a, kernel, 7)).any()


@pytest.mark.parametrize("count", COUNTS)
def test_other_platforms_take_rows_at_once(count):
  @pieces.jit
  def run(a, x, up, kernel):
    ids, found = ffn._listed((a != 0).any(0))
    short = ids[:12] if count < 12 else ids
    gated = ffn._taken_gated(a.T[ids], x, up, kernel, short, found)
    return ids, ffn._taken(a.T[ids], kernel, short, found), gated

  a = sparse(count)
  used = (a != 0).any(0)[:, None]
  kernel, up = np.where(used, KERNEL, np.nan), np.where(used, UP, np.nan)
  ids, y, gated = run(a, X, up, kernel)
  np.testing.assert_array_equal(ids[:count], np.flatnonzero(used))
  assert not ids[count:].any()
  pieces.close(y, oracle.matmul(a, KERNEL))
  pieces.close(gated, oracle.matmul(a * oracle.matmul(X, UP.T), KERNEL))


def test_many_rows_go_in_several_parts():
  neurons = 2 * ffn.COPIED + 7
  a, up = np.zeros((1, neurons), np.float32), pieces.draw(5, neurons, 2)
  a[0, ::2] = pieces.draw(6, len(a[0, ::2]))
  x, down = pieces.draw(7, 1, 2), pieces.draw(8, neurons, 2)
  want = (a * common.float64(x @ up.T)) @ down
  pieces.close(glu(a, x, up, down, neurons), want)


def test_derivatives_are_those_of_the_product():
  a, cotangent = sparse(8), pieces.draw(9, 2, OUT)

  def both(f):
    def run(*arrays):
      _, back = jax.vjp(f, *arrays)
      return back(cotangent), jax.jvp(f, arrays, arrays)[1]

    return pieces.jit(run)

  got = both(lambda *args: activations.sparse_matmul(*args, capacity=10))
  want = both(lambda a, kernel: a @ kernel)
  jax.tree.map(pieces.close, got(a, KERNEL), want(a, KERNEL))
  got = both(lambda *args: activations.sparse_glu(*args, capacity=10))
  want = both(lambda a, x, up, down: (a * (x @ up.T)) @ down)
  arrays = a, X, UP, KERNEL
  jax.tree.map(pieces.close, got(*arrays), want(*arrays))


def test_vmap():
  a = np.stack([sparse(count) for count in (0, 3, NEURONS)])
  f = lambda a: activations.sparse_matmul(a, KERNEL, capacity=10)
  pieces.close(pieces.jit(jax.vmap(f))(a), common.float64(a) @ KERNEL)
  whole = f(jnp.asarray(a))
  assert whole.shape == (3, 2, OUT)
  pieces.close(whole, common.float64(a) @ KERNEL)


@pytest.mark.parametrize("neurons,tokens", [(0, 2), (NEURONS, 0)])
def test_nothing(neurons, tokens):
  a, x = np.zeros((tokens, neurons), np.float32), pieces.draw(2, tokens, WIDTH)
  y = product(a, KERNEL[:neurons], 3)
  assert y.shape == (tokens, OUT) and not y.any()
  y = glu(a, x, UP[:neurons], KERNEL[:neurons], 3)
  assert y.shape == (tokens, OUT) and not y.any()


def test_bf16_is_accumulated_in_f32():
  a = jnp.asarray(sparse(NEURONS), jnp.bfloat16)
  kernel = jnp.asarray(KERNEL, jnp.bfloat16)
  got = product(a, kernel, 99)
  assert got.dtype == jnp.bfloat16
  want = common.float64(a) @ common.float64(kernel)
  pieces.close(got, want, 2**-7)  # bf16 has eight bits


def layer(f):
  """With gathered rows, and with dense products."""
  return pieces.jit(lambda *args: (f(*args, capacity=9), f(*args)))


def test_thresholded_gates_equal_a_loop():
  limits = np.abs(pieces.draw(10, NEURONS))
  run = layer(
    lambda x, limit, **options: activations.sparse_ffn(
      x,
      ROWS,
      lambda s: activations.keep_above(jax.nn.silu(s), limit),
      **options,
    )
  )
  for limit in (0.0, 0.5, limits, 99.0):
    want = oracle.cats_mlp(X, DENSE["gate"], DENSE["up"], KERNEL, limit)
    for got in run(X, limit):
      pieces.close(got, want, 1e-4)  # outputs of size 10


@pytest.mark.parametrize("k", [0, 4, NEURONS])
def test_top_k_layer_equals_a_loop(k):
  params = {"up": DENSE["up"], "down": KERNEL}
  run = layer(
    lambda x, **options: activations.sparse_ffn(
      x, params, lambda s: activations.top_k(jax.nn.relu(s), k), **options
    )
  )
  zeros = np.zeros(NEURONS), np.zeros(OUT)
  want = oracle.top_k_ffn(X, DENSE["up"], zeros[0], KERNEL, zeros[1], k)
  for got in run(X):
    pieces.close(got, want, 1e-4)


def test_thresholded_inputs_equal_a_loop():
  run = layer(
    lambda x, limits, **options: activations.threshold_ffn(
      x, DENSE, jax.nn.silu, limits, **options
    )
  )
  for values in (0.6, 0.3, 1.0), (0.0, 0.0, 0.0):
    limits = dict(zip(("gate", "up", "down"), values, strict=True))
    want = oracle.teal_mlp(X, DENSE["gate"], DENSE["up"], KERNEL, *values)
    for got in run(X, limits):
      pieces.close(got, want, 1e-4)
  plain = {"up": DENSE["up"], "down": KERNEL}
  limits = {"up": 0.5, "down": 0.2}
  got = activations.threshold_ffn(
    X, plain, jax.nn.relu, limits, capacity=NEURONS
  )
  hidden = oracle.matmul(oracle.apply_threshold(X, 0.5), DENSE["up"])
  hidden = oracle.apply_threshold(np.maximum(hidden, 0), 0.2)
  pieces.close(got, oracle.matmul(hidden, KERNEL), 1e-4)


def test_spark_layer_equals_a_loop():
  params = {
    "gate": pieces.draw(11, 2, NEURONS),
    "up_rows": pieces.draw(12, NEURONS, 3),
    "down": KERNEL,
  }
  run = layer(
    lambda x, **options: activations.spark_ffn(x, params, 5, **options)
  )
  want = oracle.spark_ffn(X, params["gate"], params["up_rows"].T, KERNEL, 5)
  for got in run(X):
    pieces.close(got, want)


def test_it_trains():
  params = jax.tree.map(jnp.asarray, ROWS)
  keep = lambda s: activations.keep_above(jax.nn.silu(s), 0.5)

  def loss(params, x, capacity):
    y = activations.sparse_ffn(x, params, keep, capacity=capacity)
    return (y**2).sum()

  f = pieces.jit(jax.grad(loss), static_argnums=2)
  masked = f(params, X, None)
  # The sums of the gradients are of size 100.
  compare = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-3)
  jax.tree.map(compare, f(params, X, 16), masked)
  kept = np.asarray(keep(X @ DENSE["gate"]))
  assert not np.asarray(masked["down"])[~kept.any(0)].any()


@pytest.mark.parametrize("axis_type", common.AXIS_TYPES)
def test_eight_devices(axis_type):
  mesh = common.mesh_of(axis_type)
  a, kernel = np.zeros((4, 8), np.float32), pieces.draw(13, 8, 4)
  a[:, ::3] = pieces.draw(14, 4, 3)
  with jax.set_mesh(mesh):
    placed = common.place(a, mesh, jax.P("x", "y"))
    rows = common.place(kernel, mesh, jax.P("y", "x"))
    got = product(placed, rows, 5)
    loss = lambda *args: activations.sparse_matmul(*args, capacity=5).sum()
    slopes = pieces.jit(jax.grad(loss, argnums=(0, 1)))(placed, rows)
  pieces.close(got, oracle.matmul(a, kernel))
  pieces.close(slopes[0], np.broadcast_to(kernel.sum(1), a.shape))
  pieces.close(slopes[1], np.broadcast_to(a.sum(0)[:, None], kernel.shape))


def test_outside_of_jit_it_is_compiled_once():
  a, kernel = jnp.array([0.0, 2.0, 0.0]), pieces.draw(1, 3, 2)
  activations.sparse_matmul(a, kernel, capacity=2)
  before = ffn._choose._cache_size()
  assert before
  activations.sparse_matmul(2 * a, kernel, capacity=2)
  assert ffn._choose._cache_size() == before


@pytest.mark.parametrize("capacity", [None, 2])
def test_shapes_that_do_not_fit(capacity):
  run = functools.partial(
    activations.sparse_ffn, activation=jax.nn.relu, capacity=capacity
  )
  plain = {"up": DENSE["up"], "down": KERNEL[1:]}
  with pytest.raises(ValueError, match="a and kernel must be"):
    run(X, plain)
  with pytest.raises(ValueError, match=r"x and gate must be \[..., K\]"):
    run(X[:, 1:], ROWS)
  # A Flax kernel that was not transposed, by its name and by its shape.
  with pytest.raises(ValueError, match="gate, up_rows and down"):
    run(X, DENSE)
  with pytest.raises(ValueError, match="a, x, up and down must be"):
    run(X, ROWS | {"up_rows": DENSE["up"]})


def test_bad_input():
  with pytest.raises(ValueError, match="a and kernel must be"):
    activations.sparse_matmul(X, KERNEL, capacity=1)
  with pytest.raises(ValueError, match="capacity must be an integer >= 0"):
    activations.sparse_matmul(sparse(1), KERNEL, capacity=-1)
  with pytest.raises(ValueError, match="a, x, up and down must be"):
    activations.sparse_glu(sparse(1), X, UP.T, KERNEL, capacity=1)
  with pytest.raises(ValueError, match="params must be up and down"):
    activations.sparse_ffn(X, {"up": UP}, jax.nn.relu)
  with pytest.raises(ValueError, match="thresholds must be by the names"):
    activations.threshold_ffn(X, DENSE, jax.nn.silu, {"up": 1.0})
  with pytest.raises(ValueError, match=r"gate \[r, neurons\] with r below 5"):
    activations.spark_ffn(X, ROWS, 2)
