"""Shardings that the compiler chooses where types would have to state them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from sparsejax.automatic import automatic
from tests import common
from tests.routing import problem


def counts(ids, x):
  """Sums of x by id, for which a type could state no sharding."""
  return jnp.zeros(3).at[ids].add(x)


IDS, X = np.array([0, 2, 2, 1, 0, 2, 9, 1]), np.arange(8.0, dtype=np.float32)
WANT = [4.0, 10.0, 8.0]


@pytest.mark.parametrize("set_mesh", [False, True])
@pytest.mark.parametrize("axis_type", common.AXIS_TYPES)
def test_values_and_gradients(axis_type, set_mesh):
  mesh = common.mesh_of(axis_type)
  ids, x = (common.place(x, mesh, jax.P(("x", "y"))) for x in (IDS, X))

  def f(ids, x):
    pull = lambda x: automatic(counts, ids, x)
    out, back = jax.vjp(pull, x)
    return out, *back(jnp.arange(3.0))

  if set_mesh:
    with jax.set_mesh(mesh):
      out, back = problem.jit(f)(ids, x)
  else:
    out, back = problem.jit(f)(ids, x)
  np.testing.assert_array_equal(out, WANT)
  np.testing.assert_array_equal(back, [0, 2, 2, 1, 0, 2, 0, 1])


def test_results_are_sharded_as_asked():
  mesh = common.mesh_of(jax.sharding.AxisType.Explicit)
  ids, x = (common.place(x, mesh, jax.P("x")) for x in (IDS, X))
  sort = lambda x: automatic(jnp.sort, x, out=x)
  assert jax.typeof(jax.jit(sort)(x)).sharding.spec == jax.P("x")
  whole = lambda ids, x: automatic(counts, ids, x)
  assert jax.typeof(jax.jit(whole)(ids, x)).sharding.spec == jax.P(None)


def product(x, w):
  return pallas_kernels.grouped_matmul(x, w, np.array([3, 5]))


def attention(x, w):
  q = (x @ w[0]).reshape(8, 2, 2, 4)
  blocks = np.tril(np.ones((1, 1), bool))
  mask = pallas_kernels.BlockMask.from_blocks(
    blocks, block_q=16, block_kv=16, rule=pallas_kernels.Causal()
  )
  y = pallas_kernels.block_sparse_attention(q, q, q, mask)
  return y.reshape(x.shape)


@pytest.mark.parametrize(
  "f", [product, pytest.param(attention, marks=pytest.mark.slow)]
)
def test_kernels_whose_mesh_is_set(f):
  """What runs on shards is compiled within the mesh, but is of no mesh."""
  x, w = problem.normal(0, 8, 16), problem.normal(1, 2, 16, 16)

  def run(call, x, w):
    loss = lambda *args: (call(*args) ** 2).sum()
    return call(x, w), jax.grad(loss, (0, 1))(x, w)

  mesh = common.mesh_of(jax.sharding.AxisType.Explicit)
  place = lambda x, spec: common.place(x, mesh, spec)
  whole = lambda x, w: automatic(f, x, w, out=x)
  with jax.set_mesh(mesh):
    got = problem.jit(lambda *args: run(whole, *args))(
      place(x, jax.P(("x", "y"))), place(w, jax.P())
    )
  want = problem.jit(lambda *args: run(f, *args))(x, w)
  close = lambda a, b: problem.close(a, b, rtol=1e-4, atol=1e-4)
  jax.tree.map(close, got, want)
  assert got[0].sharding.spec[0] == ("x", "y")
