"""Dead neurons leave: the same function, smaller arrays, nothing left to do."""

import itertools
import re

from flax import nnx
import hypothesis
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sparsejax import weights
from tests import common
from tests.oracles import methods_rest as oracle
from tests.weights.problem import numbers

LAYERS = ["in", "mid", "mlp/out"]
WIDTHS = (5, 7, 6, 3)


def problem(density, seed=0, widths=WIDTHS, bias=True):
  """Parameters and masks of a chain of three layers, in a nested tree."""
  rng = np.random.default_rng(seed)
  made = []
  for i, shape in enumerate(itertools.pairwise(widths)):
    layer = {"kernel": numbers(*shape, seed=seed + i)}
    if bias:
      layer["bias"] = numbers(shape[1], seed=seed + 10 + i)
    made.append((layer, {"kernel": rng.random(shape) < density}))
  tree = lambda a, b, c: {"in": a, "mid": b, "mlp": {"out": c}}
  return tree(*(p for p, _ in made)), tree(*(m for _, m in made))


def in_order(tree):
  return [tree["in"], tree["mid"], tree["mlp"]["out"]]


def apply(params, masks, x, activation):
  """In f64."""
  layers = zip(in_order(params), in_order(masks), strict=True)
  for i, (layer, mask) in enumerate(layers):
    kernel = np.where(mask["kernel"], common.float64(layer["kernel"]), 0)
    x = x @ kernel + common.float64(layer.get("bias", 0))
    x = np.asarray(activation(x), np.float64) if i < 2 else x
  return x


ACTIVATIONS = {
  "relu": (jax.nn.relu, lambda v: max(v, 0.0), lambda x: np.maximum(x, 0)),
  "sigmoid": (
    jax.nn.sigmoid,
    lambda v: 1 / (1 + np.exp(-v)),
    lambda x: 1 / (1 + np.exp(-x)),
  ),
}


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@hypothesis.given(seed=st.integers(0, 99), density=st.floats(0, 0.4))
@hypothesis.settings(max_examples=8)
def test_it_equals_the_oracle_and_the_function_stays(activation, seed, density):
  ours, scalar, wide = ACTIVATIONS[activation]
  params, masks = problem(density, seed)
  got = weights.remove_dead_neurons(params, masks, LAYERS, ours)
  plain = [m["kernel"] for m in in_order(masks)]
  small, bits, kept = oracle.remove_dead_neurons(
    in_order(params), plain, scalar
  )
  for layer, mask, want, bit in zip(
    in_order(got.params), in_order(got.masks), small, bits, strict=True
  ):
    np.testing.assert_array_equal(mask["kernel"], bit)
    assert layer["kernel"].shape == bit.shape
    want["kernel"] = np.where(bit, want["kernel"], 0)
    for n in "kernel", "bias":
      # Up to seven products of numbers of order 1 are added in f32.
      np.testing.assert_allclose(layer[n], want[n], 1e-5, 1e-5)
  assert list(got.kept) == LAYERS[:-1]
  for layer, want in zip(LAYERS, kept):
    assert got.kept[layer].tolist() == want
  x = numbers(4, WIDTHS[0], seed=50)
  before = apply(params, masks, x, wide)
  np.testing.assert_allclose(
    apply(got.params, got.masks, x, wide), before, 1e-5, 1e-5
  )
  # A fixed point, in which every neuron is entered and left.
  again = weights.remove_dead_neurons(got.params, got.masks, LAYERS, ours)
  for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(got), strict=True):
    assert a.shape == b.shape
  for layer in LAYERS[:-1]:
    assert len(again.kept[layer]) == len(got.kept[layer])


def test_death_spreads_both_ways():
  """Only a chain of one neuron lives; whatever hangs off it goes."""
  params, masks = problem(0.0)
  masks["in"]["kernel"][2, 3] = True
  masks["mid"]["kernel"][3, 4] = True
  masks["mlp"]["out"]["kernel"][4, 1] = True
  masks["mid"]["kernel"][5, 0] = True  # entered by none: 5, then 0 of mid
  masks["mlp"]["out"]["kernel"][0, 2] = True
  masks["in"]["kernel"][1, 6] = True  # left by one that is left by none
  masks["mid"]["kernel"][6, 2] = True
  got = weights.remove_dead_neurons(params, masks, LAYERS)
  assert {n: k.tolist() for n, k in got.kept.items()} == {"in": [3], "mid": [4]}
  shapes = [layer["kernel"].shape for layer in in_order(got.params)]
  assert shapes == [(5, 1), (1, 1), (1, 3)]
  relu = ACTIVATIONS["relu"][2]
  constant = relu(
    params["mid"]["bias"][0]
    + relu(params["in"]["bias"][5]) * params["mid"]["kernel"][5, 0]
  )
  bias = params["mlp"]["out"]["bias"].copy()
  bias[2] += constant * params["mlp"]["out"]["kernel"][0, 2]
  np.testing.assert_allclose(got.params["mlp"]["out"]["bias"], bias, 1e-6)


def test_a_masked_bias_that_is_given_a_constant_becomes_active():
  """Or training under the masks would take it away again."""
  params, masks = problem(0.1)
  for layer, bits in zip(in_order(params), in_order(masks), strict=True):
    bits["bias"] = np.zeros(layer["bias"].shape, bool)
  masked = lambda p, m: jax.tree.map(lambda p, m: np.where(m, p, 0), p, m)
  x, sigmoid = numbers(4, 5), ACTIVATIONS["sigmoid"][2]
  want = apply(masked(params, masks), masks, x, sigmoid)
  got = weights.remove_dead_neurons(params, masks, LAYERS, jax.nn.sigmoid)
  assert in_order(got.masks)[-1]["bias"].any()
  kept = apply(masked(got.params, got.masks), got.masks, x, sigmoid)
  # Sums of a few f32 terms of order 1.
  np.testing.assert_allclose(kept, want, 0, 1e-5)


def test_nothing_is_left_but_a_bias():
  params, masks = problem(0.0)
  got = weights.remove_dead_neurons(params, masks, LAYERS)
  shapes = [layer["kernel"].shape for layer in in_order(got.params)]
  assert shapes == [(5, 0), (0, 0), (0, 3)]
  x, want = numbers(4, 5), params["mlp"]["out"]["bias"]
  relu = ACTIVATIONS["relu"][2]
  got = apply(got.params, got.masks, x, relu)
  np.testing.assert_allclose(got, np.broadcast_to(want, (4, 3)))


def test_layers_without_biases_and_without_masks():
  params, masks = problem(0.2, bias=False)
  del masks["mid"]
  got = weights.remove_dead_neurons(params, masks, LAYERS)
  assert "mid" not in got.masks and "bias" not in got.params["mid"]
  entered = masks["in"]["kernel"].any(0)
  np.testing.assert_array_equal(got.kept["in"], np.nonzero(entered)[0])
  masks["in"]["kernel"][:, 0] = False
  with pytest.raises(ValueError, match="mid must have a bias, for what"):
    weights.remove_dead_neurons(params, masks, LAYERS, jax.nn.sigmoid)


def test_masks_of_a_state_and_bfloat16():
  """As `weights.masks` gives them: ones for biases; dtypes stay."""
  params, _ = problem(0.3)
  params = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), params)
  tx = weights.static(optax.sgd(0.1), sparsity=0.85, key=jax.random.key(1))
  state = tx.init(params)
  params = weights.sparse_params(state, params)
  masks = weights.masks(state, params)
  got = weights.remove_dead_neurons(params, masks, LAYERS)
  assert len(got.kept["in"]) < 7
  for p, m in zip(jax.tree.leaves(got.params), jax.tree.leaves(got.masks)):
    assert p.dtype == jnp.bfloat16 and m.shape == p.shape


def test_smaller_modules_take_them():
  """An nnx model of the sizes that are left computes the same, and trains."""

  class Model(nnx.Module):
    def __init__(self, widths, rngs):
      pairs = itertools.pairwise(widths)
      self.layers = nnx.List([nnx.Linear(a, b, rngs=rngs) for a, b in pairs])

    def __call__(self, x):
      for layer in self.layers[:-1]:
        x = jax.nn.relu(layer(x))
      return self.layers[-1](x)

  model = Model((5, 32, 16, 3), nnx.Rngs(0))
  params = nnx.state(model, nnx.Param)
  tx = weights.static(optax.sgd(0.1), sparsity=0.9, key=jax.random.key(0))
  opt_state = tx.init(params)
  params = weights.sparse_params(opt_state, params)
  nnx.update(model, params)
  names = [f"layers/{i}" for i in range(3)]
  got = weights.remove_dead_neurons(
    params, weights.masks(opt_state, params), names
  )
  widths = (5, *(len(got.kept[n]) for n in names[:-1]), 3)
  assert widths[1] < 32 and widths[2] < 16
  small = Model(widths, nnx.Rngs(1))
  nnx.update(small, got.params)
  x = numbers(4, 5)
  np.testing.assert_allclose(small(x), model(x), 1e-5, 1e-6)
  tx = optax.chain(optax.sgd(0.1), weights.keep_masked(got.masks))
  state = nnx.state(small, nnx.Param)
  updates, _ = tx.update(state, tx.init(state), state)
  after = nnx.to_pure_dict(optax.apply_updates(state, updates))
  kernel = after["layers"][1]["kernel"]
  mask = nnx.to_pure_dict(got.masks)["layers"][1]["kernel"]
  np.testing.assert_array_equal(kernel != 0, mask)


def bad(change):
  params, masks = problem(0.3)
  layers = list(LAYERS)
  change(params, masks, layers)
  weights.remove_dead_neurons(params, masks, layers)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda p, m, n: n.reverse(), "layers must follow each other: mlp/out has"),
    (lambda p, m, n: n.append("top"), "top must have a kernel"),
    (lambda p, m, n: n.append("mid"), "layers must be different names"),
    (lambda p, m, n: n.clear(), "layers must be different names"),
    (
      lambda p, m, n: p["mid"].update(kernel=np.ones((2, 7, 6))),
      "mid must have a kernel [inputs, outputs], got shape (2, 7, 6)",
    ),
    (
      lambda p, m, n: p["mid"].update(bias=np.ones(7)),
      "mid must have a bias (6,), got (7,)",
    ),
    (
      lambda p, m, n: m["mid"].update(kernel=np.ones((6, 7), bool)),
      "masks['mid/kernel'] must be a boolean mask of a parameter",
    ),
    (
      lambda p, m, n: m["mid"].update(kernel=np.ones((7, 6))),
      "masks['mid/kernel'] must be a boolean mask of a parameter",
    ),
    (
      lambda p, m, n: m.update(other=np.ones(3, bool)),
      "masks['other'] must be a boolean mask of a parameter",
    ),
  ],
)
def test_bad_calls(change, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    bad(change)


def test_masks_must_be_concrete():
  params, masks = problem(0.3)
  call = lambda m: weights.remove_dead_neurons(params, m, LAYERS)
  with pytest.raises(ValueError, match="must be concrete"):
    jax.jit(call)(masks)
