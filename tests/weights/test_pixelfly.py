"""Pixelfly: its blocks, its matrix, its gradients, and what it approximates."""

import dataclasses
import re

from flax import nnx
from flax.nnx import bridge
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import pallas_kernels
from sparsejax import attention
from sparsejax import select
from sparsejax import weights
from tests import common
from tests import training
from tests.oracles import methods_rest as oracle
from tests.weights.problem import jit
from tests.weights.problem import numbers


def make(k=12, n=24, block=3, rank=2, seed=0, **options):
  layer = weights.Pixelfly(
    k, n, block=block, rank=rank, rngs=nnx.Rngs(seed), **options
  )
  if layer.bias is not None:
    layer.bias[...] = jnp.asarray(numbers(n, seed=9), layer.bias.dtype)
  layer.gamma[...] = jnp.asarray(0.3, layer.gamma.dtype)
  return layer


def dense(layer):
  """The matrix from its parts, in f64, blocks put where the oracle has them."""
  shape, block = (layer.in_features, layer.out_features), layer.block
  rows, columns = shape[0] // block, shape[1] // block
  stride = None if layer.max_stride is None else 2 * layer.max_stride
  places = oracle.pixelfly_blocks(rows, columns, stride)
  values = common.float64(layer.values[...])
  by_column = sorted(places, key=lambda place: place[::-1])
  return oracle.pixelfly_matrix(
    dict(zip(by_column, values, strict=True)),
    shape,
    common.float64(layer.gamma[...]),
    common.float64(layer.down[...]),
    common.float64(layer.up[...]).T,
  )


@pytest.mark.parametrize(
  ("k", "n", "block", "max_stride"),
  [
    (12, 24, 3, None),
    (48, 16, 4, 1),
    (32, 8, 2, 2),
    (12, 12, 3, 1),
    (4, 4, 4, None),
  ],
)
def test_it_multiplies_by_its_matrix(k, n, block, max_stride):
  layer = make(k, n, block, max_stride=max_stride)
  want = dense(layer)
  np.testing.assert_allclose(layer.dense(), want, 1e-5, 1e-6)
  x, bias = numbers(5, k), common.float64(layer.bias[...])
  np.testing.assert_allclose(layer(x), x @ want + bias, 1e-5, 1e-5)


@pytest.mark.parametrize("lead", [(), (2, 3), (0,)], ids=str)
def test_any_leading_axes(lead):
  layer, x = make(), numbers(*lead, 12)
  bias = common.float64(layer.bias[...])
  np.testing.assert_allclose(layer(x), x @ dense(layer) + bias, 1e-5, 1e-5)


@pytest.mark.parametrize("n", [1, 2, 8, 32])
def test_it_has_n_log_n_blocks_whose_partners_differ_in_a_bit(n):
  layer = make(2 * n, 2 * n, 2)
  assert layer.values.shape == (n * (1 + n.bit_length() - 1), 2, 2)
  layer.gamma[...] = jnp.ones(())
  layer.values[...] = jnp.ones(layer.values.shape)
  for i, j in zip(*np.nonzero(np.asarray(layer.dense())[::2, ::2])):
    assert (int(i) ^ int(j)).bit_count() <= 1
  where = select.flat_block_butterfly((2 * n, 2 * n), 2)
  np.testing.assert_array_equal(layer.dense() != 0, where)


def test_attention_reads_the_same_blocks():
  mask = select.flat_block_butterfly((8, 8), 1, 2)
  lists = attention.patterns.butterfly(8 * 16, 16, max_stride=4)
  got = np.zeros((8, 8), bool)
  for i in range(8):
    got[i, lists.indices[0, 0, i][: lists.counts[0, 0, i]]] = True
  np.testing.assert_array_equal(got, mask)


def test_gradients_are_those_of_the_masked_dense_layer():
  layer = make()
  x, dy = numbers(5, 12), numbers(5, 24, seed=1)
  graph, params = nnx.split(layer)
  weight = layer._weight(layer.values[...])
  mask = jnp.asarray(select.flat_block_butterfly((12, 24), 3))

  def masked(p, x):
    b = dataclasses.replace(weight, values=p["values"]).dense() * mask
    y = p["gamma"] * x @ b + (1 - p["gamma"]) * (x @ p["down"] @ p["up"])
    return y + p["bias"]

  def sparse(p, x):
    state = jax.tree.map(lambda x: x, params)
    nnx.replace_by_pure_dict(state, p)
    return nnx.merge(graph, state)(x)

  @jit
  def both(p, x, dy):
    return [jax.vjp(f, p, x)[1](dy) for f in (sparse, masked)]

  got, want = both(nnx.to_pure_dict(params), x, dy)
  assert got[0].keys() == {"values", "down", "up", "gamma", "bias"}
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(a, b, 1e-5, 1e-5)
  assert jnp.abs(got[0]["gamma"]) > 0.1  # it is learned


def test_block_sparse_matmul_runs_it():
  layer = make(use_bias=False)
  layer.gamma[...] = jnp.ones(())
  x = jnp.asarray(numbers(5, 12))
  want = pallas_kernels.BlockSparseWeight.from_dense(
    layer.dense(), jnp.asarray(select.flat_block_butterfly((12, 24), 3)), (3, 3)
  ).with_transpose()
  got = layer._weight(layer.values[...])
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(a, b)
  want = pallas_kernels.block_sparse_matmul(x, want)
  np.testing.assert_allclose(layer(x), want, 1e-6, 1e-6)


def test_a_flat_butterfly_approximates_the_product_to_second_order():
  """Its blocks are those of a first-order sum, whose error is of order c^2."""
  n, rng = 16, np.random.default_rng(0)
  supports = [oracle.butterfly_factor_mask(n, s) for s in (16, 8, 4, 2)]
  factors = [rng.normal(size=(n, n)) * support for support in supports]
  flat = oracle.residual_first_order(factors, 1.0) != 0
  np.testing.assert_array_equal(flat, select.flat_block_butterfly((n, n), 1))
  errors = []
  for scale in (0.01, 0.005, 0.0025):
    product = oracle.residual_product(factors, scale)
    first = oracle.residual_first_order(factors, scale)
    errors.append(np.linalg.norm(product - first))
    assert errors[-1] <= oracle.residual_error_bound(factors, scale)
  # Halving c quarters the error, but for a next term of relative order c.
  np.testing.assert_allclose(
    np.log2(errors[:-1] / np.array(errors[1:])), 2, 0.02
  )


def test_dtypes():
  layer = make(dtype=jnp.bfloat16)
  x = numbers(5, 12)
  got = layer(x)
  assert got.dtype == jnp.bfloat16 and layer.values.dtype == jnp.float32
  want = x @ dense(layer) + common.float64(layer.bias[...])
  # Operands and the two terms are rounded to bf16.
  np.testing.assert_allclose(common.float64(got), want, 2.0**-5, 2.0**-4)
  half = make(param_dtype=jnp.bfloat16)
  assert {p.dtype for p in jax.tree.leaves(nnx.state(half))} == {
    jnp.dtype(jnp.bfloat16)
  }
  assert half(jnp.asarray(x, jnp.bfloat16)).dtype == jnp.bfloat16


def test_vmap():
  layer, x = make(), numbers(4, 3, 12)
  np.testing.assert_allclose(jax.vmap(layer)(x), layer(x), 1e-5, 1e-5)


def test_rows_over_devices():
  x = jnp.asarray(numbers(8, 12))
  mesh = common.mesh_of(jax.sharding.AxisType.Explicit)
  slope = lambda layer, x: (layer(x) ** 2).sum()
  want = nnx.jit(nnx.grad(slope))(make(), x)
  with jax.set_mesh(mesh):
    got = nnx.jit(nnx.grad(slope))(make(), common.place(x, mesh, jax.P("x")))
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(a, b, 1e-4, 1e-4)


def test_it_begins_with_the_variance_of_a_dense_layer():
  rngs = nnx.Rngs(0)
  layer = weights.Pixelfly(128, 256, block=8, rank=32, rngs=rngs)
  y = layer(numbers(1000, 128))
  # Of 128 x 256 draws and 1000 rows: within a few percent.
  np.testing.assert_allclose(np.var(y), 1, 0.1)
  assert layer.gamma[...] == 0.5 and not layer.bias[...].any()


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    (dict(block=5), "block must divide in_features and out_features, got 5"),
    (dict(block=0), "block must divide in_features and out_features, got 0"),
    (dict(max_stride=3), "max_stride must be a power of two"),
    (dict(k=12, n=30), "shape must have blocks along one axis that divide"),
    (dict(rank=0), "rank must be at least 1, got 0"),
    (dict(rank=2.5), "rank must be an integer, got 2.5"),
    (dict(block=4.0), "block must be an integer, got 4.0"),
  ],
)
def test_bad_settings(settings, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    make(**settings)


def test_bad_input():
  with pytest.raises(ValueError, match=re.escape("x must be [..., 12]")):
    make()(numbers(3, 24))


@pytest.mark.slow
def test_linen(tmp_path):
  """Ten steps through the bridge, saved and restored halfway."""
  x, target = numbers(16, 12), numbers(16, 24, seed=1)
  tx = optax.sgd(0.1, momentum=0.9)
  linen = bridge.to_linen(weights.Pixelfly, 12, 24, block=3, rank=2)
  params = linen.init(jax.random.key(0), x)["params"]
  layer = make()
  state = nnx.state(layer, nnx.Param)
  assert nnx.to_pure_dict(state).keys() == params.keys()
  leaves = jax.tree.leaves(params)
  nnx.update(layer, jax.tree.unflatten(jax.tree.structure(state), leaves))
  training.assert_trains_alike(
    linen, params, lambda: make(seed=7), layer, (x,), target, tx, tmp_path
  )
