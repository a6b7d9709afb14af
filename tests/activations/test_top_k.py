"""Top-k activations against loops: values, gradients, limits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax import activations
from tests import common
from tests.activations import pieces
from tests.oracles import activations as oracle

X = pieces.draw(0, 3, 7)
X[0, 2] = X[0, 5]  # a tie
COTANGENT = pieces.draw(1, 3, 7)


def pulled(f, x, cotangent):
  def run(x, cotangent):
    y, back = jax.vjp(f, x)
    return y, back(cotangent)[0]

  return pieces.jit(run)(x, cotangent)


@pytest.mark.parametrize("by", ["value", "magnitude"])
@pytest.mark.parametrize("k", [0, 3, 7])
def test_top_k_equals_a_loop(k, by):
  f = lambda x: activations.top_k(x, k, by_magnitude=by == "magnitude")
  got, gradient = pulled(f, X, COTANGENT)
  np.testing.assert_array_equal(got, oracle.top_k(X, k, by))
  want = oracle.top_k_gradient(X, k, COTANGENT, by)
  np.testing.assert_array_equal(gradient, want.astype(np.float32))


def test_at_most_k_fire():
  hidden = np.maximum(X, 0)
  found = activations.top_k(jnp.asarray(hidden), 2)
  assert (np.asarray(found != 0).sum(-1) <= 2).all()
  everything = activations.top_k(jnp.asarray(hidden), 7)
  np.testing.assert_array_equal(everything, hidden)


@pytest.mark.parametrize("k", [0.5, 3, 6])
def test_statistical_top_k_equals_a_loop(k):
  f = lambda x: activations.statistical_top_k(x, k)
  got, gradient = pulled(f, X, COTANGENT)
  pieces.close(got, oracle.statistical_top_k(X, k))
  want = oracle.statistical_top_k_gradient(X, k, COTANGENT)
  pieces.close(gradient, want)


def test_hardly_any_are_kept():
  assert not activations.statistical_top_k(jnp.asarray(X), 1e-20).any()


@pytest.mark.parametrize("k", [64, 410, 2048])
def test_about_k_are_kept_of_normal_activations(k):
  x = 3 * pieces.draw(2, 64, 4096) - 1
  kept = np.asarray(activations.statistical_top_k(x, k) > 0).sum(-1).mean()
  # The mean of 64 tokens: a standard error of at most sqrt(1 / (64 k)), 1.6%.
  assert abs(kept / k - 1) < 0.05


def test_nothing_is_sorted():
  program = str(
    jax.make_jaxpr(lambda x: activations.statistical_top_k(x, 2))(X)
  )
  assert "sort" not in program and "top_k" not in program


def test_it_is_continuous():
  f = jax.jit(lambda x: activations.statistical_top_k(x, 3))
  steps = jnp.linspace(-2, 2, 2001)
  y = jax.vmap(lambda s: f(X[0] + s * COTANGENT[0]))(steps)
  # The slope of the operator is below 3 here, and that of the path below 2.
  jumps = np.abs(np.diff(np.asarray(y), axis=0)).max()
  assert jumps < 3 * 2 * 4 / 2000


def test_equal_activations_give_zeros():
  f = lambda x: activations.statistical_top_k(x, 2)
  y, gradient = pulled(f, np.full((1, 5), 3.0, np.float32), np.ones((1, 5)))
  assert not y.any() and np.isfinite(np.asarray(gradient)).all()


def test_bf16_is_computed_in_f32():
  x = jnp.asarray(X, jnp.bfloat16)
  got = activations.statistical_top_k(x, 3)
  assert got.dtype == jnp.bfloat16
  # bf16 has eight bits.
  pieces.close(got, oracle.statistical_top_k(common.float64(x), 3), 2**-7)
  assert activations.top_k(x, 3).dtype == jnp.bfloat16


@pytest.mark.parametrize("axis_type", common.AXIS_TYPES)
def test_eight_devices(axis_type):
  mesh = common.mesh_of(axis_type)
  x = pieces.draw(3, 8, 6)
  with jax.set_mesh(mesh):
    placed = common.place(x, mesh, jax.P("x", "y"))
    got = jax.jit(lambda x: activations.statistical_top_k(x, 2))(placed)
    exact = jax.jit(lambda x: activations.top_k(x, 2))(placed)
  assert got.sharding.is_equivalent_to(placed.sharding, 2)
  pieces.close(got, oracle.statistical_top_k(x, 2))
  np.testing.assert_array_equal(exact, oracle.top_k(x, 2))


def test_bad_input():
  with pytest.raises(ValueError, match="k must be above 0 and below 7, got 7"):
    activations.statistical_top_k(X, 7)
  with pytest.raises(ValueError, match="k must be above 0"):
    activations.statistical_top_k(X, 0)
  with pytest.raises(ValueError, match="x must be floating, got int32"):
    activations.statistical_top_k(jnp.arange(7), 2)
  with pytest.raises(ValueError, match=r"k must be in \[0, 7\], got 8"):
    activations.top_k(X, 8)
  with pytest.raises(ValueError, match="must be floating, got int32"):
    activations.top_k(jnp.arange(7), 2)
