"""Densities against loops, in one go and over batches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax import activations
from tests import common
from tests.activations import pieces
from tests.oracles import activations as oracle

X = np.maximum(pieces.draw(0, 7, 5), 0)
X[3, 2] = np.nan
X[4] = 0


@pieces.jit
def meter(x, valid):
  half = activations.Activity.zeros(5).add(x[:3], valid[:3])
  rest = activations.Activity.zeros(5).add(x[3:], valid[3:])
  return half.merge(rest), half.add(x[3:], valid[3:])


@pytest.mark.parametrize("threshold", [0.0, 0.5])
def test_density_equals_a_loop(threshold):
  got = activations.density(X, threshold=threshold)
  assert got.dtype == jnp.float32
  pieces.close(got, oracle.density(X, threshold))
  by_token = activations.density(X, -1, threshold=threshold)
  pieces.close(by_token, oracle.token_density(X, threshold))
  by_neuron = activations.density(jnp.asarray(X)[None], (0, 1))
  pieces.close(by_neuron, oracle.neuron_density(X))


def test_batches_are_as_one():
  valid = np.arange(7) != 1
  x = np.nan_to_num(X)
  want = x[valid]
  for got in meter(x, valid):
    assert got.tokens == 6 and got.fired.dtype == jnp.uint32
    pieces.close(got.density, oracle.neuron_density(want))
    pieces.close(got.magnitude, np.abs(want).mean(0))


def test_padding_may_hold_anything():
  x = X.copy()
  x[1] = np.nan
  x[3, 2] = 1
  got, _ = meter(x, np.arange(7) != 1)
  assert np.isfinite(np.asarray(got.magnitude)).all()


def test_nothing_has_no_activity():
  @pieces.jit
  def run():
    empty = activations.Activity.zeros(3).add(jnp.zeros((0, 3)))
    one = activations.Activity.zeros(3).add(jnp.ones((2, 3)))
    return empty.tokens, empty.density, empty.merge(one).density

  tokens, none, merged = run()
  assert tokens == 0 and not none.any()
  np.testing.assert_array_equal(merged, 1)


@pytest.mark.parametrize("axis_type", common.AXIS_TYPES)
def test_eight_devices(axis_type):
  mesh = common.mesh_of(axis_type)
  x = np.maximum(pieces.draw(1, 8, 6), 0)
  with jax.set_mesh(mesh):
    placed = common.place(x, mesh, jax.P("x", "y"))
    add = jax.jit(lambda x: activations.Activity.zeros(6).add(x))
    got = add(placed)
    whole = jax.jit(activations.density)(placed)
  pieces.close(got.density, oracle.neuron_density(x))
  pieces.close(whole, oracle.density(x))


def test_thresholds_are_compared_in_f32():
  # The bf16 number that 0.1 is rounded to exceeds 0.1.
  x = jnp.array([[0.1, 0.05]], jnp.bfloat16)
  activity = activations.Activity.zeros(2).add(x, threshold=0.1)
  assert activity.density.tolist() == [1, 0]
  np.testing.assert_array_equal(
    activations.density(x, 0, threshold=0.1), activity.density
  )


def test_no_neurons():
  activity = activations.Activity.zeros(0).add(jnp.zeros((3, 0)))
  assert activity.tokens == 3
  assert not activity.density.size


def test_bad_input():
  activity = activations.Activity.zeros(3)
  with pytest.raises(ValueError, match="x must be floating, got int32"):
    activations.density(jnp.arange(3))
  with pytest.raises(ValueError, match="threshold must be at least 0"):
    activations.density(jnp.ones(3), threshold=-1.0)
  with pytest.raises(ValueError, match="x must not be empty"):
    activations.density(jnp.ones((0, 3)))
  with pytest.raises(ValueError, match=r"x must be \[..., 3\]"):
    activity.add(jnp.ones((2, 4)))
  with pytest.raises(ValueError, match="valid of its leading"):
    activity.add(jnp.ones((2, 3)), jnp.ones(3, bool))
