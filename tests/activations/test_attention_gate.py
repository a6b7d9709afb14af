"""Gates behind attention against loops, on devices, and in Linen."""

import functools

from flax import nnx
from flax.nnx import bridge
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sparsejax import activations
from tests import common
from tests import training
from tests.activations import pieces
from tests.oracles import activations as oracle

Y = pieces.draw(5, 6, 2, 3)
INPUT = pieces.draw(6, 6, 4)


@pytest.mark.parametrize("shape", [(4, 2), (4, 2, 3)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_output_gate_equals_a_loop(shape, with_bias):
  kernel = pieces.draw(7, *shape)
  bias = pieces.draw(8, *shape[1:]) if with_bias else None
  cotangent = pieces.draw(9, *Y.shape)

  @pieces.jit
  def run(y, x, kernel):
    f = functools.partial(activations.output_gate, bias=bias)
    out, back = jax.vjp(f, y, x, kernel)
    return out, back(cotangent)

  got, gradients = run(Y, INPUT, kernel)
  pieces.close(got, oracle.output_gate(Y, INPUT, kernel, bias))
  want = oracle.output_gate_gradient(Y, INPUT, kernel, cotangent, bias)
  jax.tree.map(pieces.close, gradients, want)


def test_gate_module():
  gate = activations.OutputGate(4, 2, 3, use_bias=True, rngs=nnx.Rngs(0))
  np.testing.assert_array_equal(gate(Y, INPUT), Y / 2)
  gate.bias[...] = jnp.full((2, 3), 200.0)
  np.testing.assert_array_equal(gate(Y, INPUT), Y)
  heads = activations.OutputGate(4, 2, rngs=nnx.Rngs(0))
  gradient = nnx.grad(lambda gate: (gate(Y, INPUT) ** 2).sum())(heads)
  assert gradient["kernel"][...].shape == (4, 2)
  assert (np.abs(gradient["kernel"][...]) > 0).all()
  assert heads(jnp.asarray(Y, jnp.bfloat16), INPUT).dtype == jnp.bfloat16


@pytest.mark.parametrize("axis_type", common.AXIS_TYPES)
def test_eight_devices(axis_type):
  mesh = common.mesh_of(axis_type)
  y, x, kernel = (
    pieces.draw(10, 8, 2, 4),
    pieces.draw(11, 8, 4),
    np.eye(4)[:, :2],
  )
  with jax.set_mesh(mesh):
    placed = common.place(y, mesh, jax.P("x", "y", None))
    inputs = common.place(x, mesh, jax.P("x", None))
    weight = common.place(kernel.astype(np.float32), mesh, jax.P(None, "y"))
    got = jax.jit(activations.output_gate)(placed, inputs, weight)
  assert got.sharding.is_equivalent_to(placed.sharding, 3)
  pieces.close(got, oracle.output_gate(y, x, kernel))


@pytest.mark.slow
def test_linen(tmp_path):
  """Ten steps through the bridge, saved and restored halfway."""
  target = pieces.draw(12, *Y.shape)
  tx = optax.sgd(0.5, momentum=0.9)
  linen = bridge.to_linen(activations.OutputGate, 4, 2, 3, use_bias=True)
  params = linen.init(jax.random.key(0), Y, INPUT)["params"]
  make = lambda: activations.OutputGate(
    4, 2, 3, use_bias=True, rngs=nnx.Rngs(0)
  )
  gate = make()
  assert nnx.to_pure_dict(nnx.state(gate, nnx.Param)).keys() == params.keys()
  training.assert_trains_alike(
    linen, params, make, gate, (Y, INPUT), target, tx, tmp_path
  )


def test_bad_input():
  for shape in (4, 3), (5, 2), (4, 2, 3, 1):
    with pytest.raises(ValueError, match="y, x, kernel and bias must be"):
      activations.output_gate(Y, INPUT, jnp.ones(shape))
