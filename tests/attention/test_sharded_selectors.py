"""Choices on sharded queries and keys: the same, and sharded as these are."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
import numpy as np
import pytest

from sparsejax import attention

P = jax.P
Q = jax.random.normal(jax.random.key(0), (2, 64, 4, 8))
K, V = jax.random.normal(jax.random.key(1), (2, 2, 64, 2, 8))
LINES = dict(verticals=8, slashes=8, last_q=16, first=4, recent=8, block=16)
COMPRESSED = dict(length=8, stride=4, block=16, block_q=16, local=1)

# By batch and heads.
SELECTORS = {
  "anchor": functools.partial(
    attention.anchor_select, block=16, step=2, capacity=16
  ),
  "infllm": functools.partial(attention.infllm_select, top_k=2, **COMPRESSED),
  "mean_pool": functools.partial(attention.mean_pool_select, top_k=2, block=16),
  "moba": functools.partial(
    attention.moba_select, block=16, top_k=2, block_q=16
  ),
  "nsa": functools.partial(attention.nsa_select, top_n=2, **COMPRESSED),
  "proxyattn": functools.partial(
    attention.proxyattn_select, groups=((0, 1), (2, 3)), block=16
  ),
  "psa": functools.partial(attention.psa_select, block_q=16),
  "vertical_slash": functools.partial(attention.vertical_slash_select, **LINES),
  "xattention": functools.partial(
    attention.xattention_select, block=16, stride=4
  ),
}
# By batch: all heads read the same keys.
INDEXERS = {
  "dsa": functools.partial(attention.dsa_keys, top_k=8),
  "hisa": functools.partial(attention.hisa_keys, block=16, top_m=2, top_k=8),
}


def mesh_of(kind):
  return jax.make_mesh((2, 2), ("data", "model"), axis_types=(kind,) * 2)


def assert_equal(got, want):
  assert jax.tree.structure(got) == jax.tree.structure(want)
  for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
    np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("name", SELECTORS)
def test_lists_lie_where_the_queries_do(name):
  select = jax.jit(SELECTORS[name])
  want = select(Q, K)
  mesh = mesh_of(AxisType.Explicit)
  with jax.set_mesh(mesh):
    spec = P("data", None, "model")
    q, k = (jax.device_put(x, jax.NamedSharding(mesh, spec)) for x in (Q, K))
    got = select(q, k)
  assert_equal(got, want)
  # Anchor's blocks are the same for all; its columns are what it chooses.
  chosen = got.columns if name == "anchor" else got.counts
  assert jax.typeof(chosen).sharding.spec[:2] == ("data", "model")


@pytest.mark.parametrize("name", INDEXERS)
def test_keys_lie_where_the_tokens_do(name):
  choose = jax.jit(INDEXERS[name])
  arrays = Q, K[:, :, 0], jnp.sin(Q[..., 0])
  want = choose(*arrays)
  mesh = mesh_of(AxisType.Explicit)
  with jax.set_mesh(mesh):
    sharding = jax.NamedSharding(mesh, P("data"))
    got = choose(*(jax.device_put(x, sharding) for x in arrays))
  assert_equal(got, want)
  assert jax.typeof(got).sharding.spec[0] == "data"


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_moba_trains_on_shards_without_gathering(kind):
  def loss(q, k, v):
    out = attention.moba(q, k, v, block=16, top_k=2, block_q=16)
    return jnp.sum(out**2)

  step = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))
  want = step(Q, K, V)
  mesh = mesh_of(kind)
  with jax.set_mesh(mesh):
    sharding = jax.NamedSharding(mesh, P("data", None, "model"))
    sharded = [jax.device_put(x, sharding) for x in (Q, K, V)]
    program = step.lower(*sharded).compile()
    got = program(*sharded)
  assert "all-gather" not in program.as_text()
  # Sums of 64 products of order 1, in another order.
  for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
    np.testing.assert_allclose(x, y, rtol=1e-5, atol=64 * 2.0**-22)
