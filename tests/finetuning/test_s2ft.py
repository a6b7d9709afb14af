import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax import finetuning
from tests import common
from tests.oracles import finetuning as oracle

RNG = np.random.default_rng(0)


def drawn(*shape):
  return jnp.asarray(RNG.normal(size=shape), jnp.float32)


@pytest.mark.parametrize(
  ("first", "second", "units"),
  [
    ([4, 1], [1, 3], 5),
    ([], [2], 3),
    ([0], [], 1),
    ([2, 0], [0, 2], 3),
    ([], [], 4),
    ([3, 1, 0], [2], 4),
  ],
)
def test_order(first, second, units):
  order, one, two = finetuning.s2ft_order(first, second, units)
  want = oracle.s2ft_order(first, second, units)
  assert (order.tolist(), one, two) == (list(want[0]), want[1], want[2])
  assert set(order[slice(*one)].tolist()) == set(first)
  assert set(order[slice(*two)].tolist()) == set(second)


def test_a_gated_network_is_the_same_function():
  params = {
    "gate": {"kernel": drawn(4, 6), "bias": drawn(6)},
    "up": {"kernel": drawn(4, 6)},
    "down": {"kernel": drawn(6, 3), "bias": drawn(3)},
  }

  def run(p, x):
    gate = jax.nn.silu(x @ p["gate"]["kernel"] + p["gate"]["bias"])
    h = gate * (x @ p["up"]["kernel"])
    return h @ p["down"]["kernel"] + p["down"]["bias"]

  order, up, down = finetuning.s2ft_order([5, 2], [2, 0, 3], 6)
  axes = {"gate/kernel": 1, "gate/bias": 0, "up/kernel": 1, "down/kernel": 0}
  new = finetuning.co_permute(params, order, axes)
  x = drawn(7, 4)
  # The same products, added up in another order.
  np.testing.assert_allclose(run(new, x), run(params, x), rtol=1e-5, atol=1e-5)
  np.testing.assert_array_equal(
    new["up"]["kernel"],
    oracle.permute_columns(np.asarray(params["up"]["kernel"]), order),
  )
  np.testing.assert_array_equal(
    new["up"]["kernel"][:, slice(*up)], params["up"]["kernel"][:, [5, 2]]
  )
  np.testing.assert_array_equal(
    new["down"]["kernel"][slice(*down)],
    params["down"]["kernel"][np.array([2, 0, 3])],
  )
  back = finetuning.co_permute(new, np.argsort(order), axes)
  jax.tree.map(np.testing.assert_array_equal, back, params)
  assert np.argsort(order).tolist() == oracle.inverse(order.tolist())


def test_attention_is_the_same_function():
  """Six heads of queries share three of keys: a unit is all of a key's head."""
  heads, kv, dim, width, tokens = 6, 3, 2, 5, 4
  params = {
    "q": drawn(width, heads * dim),
    "k": drawn(width, kv * dim),
    "v": drawn(width, kv * dim),
    "o": drawn(heads * dim, width),
  }

  def run(p, x):
    of = lambda n, h: (x @ p[n]).reshape(1, tokens, h, dim)
    y = jax.nn.dot_product_attention(of("q", heads), of("k", kv), of("v", kv))
    return y.reshape(tokens, -1) @ p["o"]

  order, v, o = finetuning.s2ft_order([2], [2, 1], kv)
  new = finetuning.co_permute(params, order, {"q": 1, "k": 1, "v": 1, "o": 0})
  x = drawn(tokens, width)
  # The same products, added up in another order.
  np.testing.assert_allclose(run(new, x), run(params, x), rtol=1e-5, atol=1e-5)
  for n, width in (("q", heads // kv * dim), ("v", dim)):
    want = oracle.permute_columns(np.asarray(params[n]), order, width)
    np.testing.assert_array_equal(new[n], want)
  want = oracle.permute_rows(np.asarray(params["o"]), order, heads // kv * dim)
  np.testing.assert_array_equal(new["o"], want)
  assert v == (0, 1) and o == (0, 2)


@pytest.mark.parametrize("axis_type", common.AXIS_TYPES)
def test_sharded(axis_type):
  mesh = common.mesh_of(axis_type)
  order = RNG.permutation(8)
  w = drawn(8, 16)
  want = finetuning.co_permute({"w": w}, order, {"w": 1})["w"]
  with jax.set_mesh(mesh):
    params = {"w": common.place(w, mesh, jax.P("x", "y"))}
    run = jax.jit(lambda p: finetuning.co_permute(p, order, {"w": 1}))
    got = run(params)["w"]
    np.testing.assert_array_equal(got, want)
    if axis_type == jax.sharding.AxisType.Explicit:
      assert got.sharding.is_equivalent_to(params["w"].sharding, 2)


def test_bad_input():
  params = {"up": drawn(4, 6), "down": drawn(6, 4)}
  for first in ([0, 0], [6], [-1]):
    with pytest.raises(ValueError, match=r"first must be distinct units in"):
      finetuning.s2ft_order(first, [], 6)
  with pytest.raises(ValueError, match="second must be distinct units"):
    finetuning.s2ft_order([], [7], 6)
  for order in ([0, 0], [1, 2], [[0, 1]]):
    with pytest.raises(ValueError, match="order must be a permutation"):
      finetuning.co_permute(params, order, {"up": 1})
  with pytest.raises(ValueError, match="axes must name parameters, got 'gate'"):
    finetuning.co_permute(params, [1, 0], {"gate": 1})
  for axis in (0, 2, -1):
    with pytest.raises(ValueError, match=r"axes\['up'\] must be an axis of 6"):
      finetuning.co_permute(params, np.arange(6), {"up": axis})
