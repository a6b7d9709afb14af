"""Thresholds: quantiles of what was seen, and what they leave."""

import functools

from flax import linen
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax import activations
from sparsejax.activations import thresholds as module
from tests import common
from tests.activations import pieces
from tests.oracles import activations as oracle

SPARSITIES = (0.0, 0.1, 0.5, 0.9, 1.0)
X = pieces.draw(0, 6, 40)
WIDTH = 2**-7  # of a bin, relative to where it begins


@pieces.jit
def quantiles(x, valid):
  sizes = activations.Magnitudes.zeros().add(x[:2], valid[:2])
  rest = activations.Magnitudes.zeros().add(x[2:], valid[2:])
  merged = sizes.merge(rest)
  return jnp.stack([merged.quantile(s) for s in SPARSITIES]), merged.counts


def edges():
  """Where the bins of finite numbers begin, and end."""
  bits = np.arange(0x7F81, dtype=np.uint32) << 16
  return bits.view(np.float32).astype(np.float64)


def test_quantiles_equal_those_of_the_histogram():
  got, counts = quantiles(X, np.ones(6, bool))
  assert counts.sum() == X.size
  for sparsity, threshold in zip(SPARSITIES, got, strict=True):
    assert np.asarray(threshold) >= 0
    exact = oracle.kth_smallest(X, sparsity)
    # Of 240 values the next one may lie a little further than a bin.
    np.testing.assert_allclose(threshold, exact, WIDTH + 0.02, 0.02)
    if sparsity:
      nonzero = np.flatnonzero(counts)
      begin, end = nonzero[0], nonzero[-1]
      want = oracle.histogram_threshold(
        edges()[begin : end + 2], np.asarray(counts)[begin : end + 1], sparsity
      )
      np.testing.assert_allclose(threshold, want, 1e-5)
  assert got[0] == 0 and got[-1] >= np.abs(X).max()


def test_what_does_not_count():
  x = X.copy()
  x[1] = 1e9
  x[2, 3] = np.nan
  valid = np.arange(6) != 1
  got, counts = quantiles(x, valid)
  assert counts.sum() == 5 * 40 - 1 and got[-1] < 1e3
  empty, _ = quantiles(x, np.zeros(6, bool))
  assert not empty.any()


def test_special_sizes():
  add = pieces.jit(lambda x: activations.Magnitudes.zeros().add(x))
  infinite = add(np.array([np.inf, -np.inf, 3e38], np.float32))
  assert infinite.quantile(1.0) == np.inf
  assert np.isfinite(infinite.quantile(0.1))
  assert add(np.zeros(3, np.float32)).quantile(1.0) < 1e-30


def test_held_out_sparsity_is_the_target():
  sizes = activations.Magnitudes.zeros().add(pieces.draw(1, 64, 512))
  held = pieces.draw(2, 64, 512)
  for target in (0.25, 0.5, 0.8):
    threshold = sizes.quantile(target)
    found = 1 - activations.density(activations.keep_above(held, threshold))
    # A standard error of at most 0.003 of each of the two draws.
    assert abs(found - target) < 0.015


def test_keep_above_equals_a_loop():
  limits = np.abs(pieces.draw(3, 40))
  f = activations.keep_above
  for threshold in (0.0, 0.7, limits):
    got = pieces.jit(f)(X, threshold)
    want = oracle.apply_threshold(X, threshold)
    np.testing.assert_array_equal(got, want.astype(np.float32))
    gradient = pieces.jit(jax.grad(lambda x, t: f(x, t).sum()))(X, threshold)
    np.testing.assert_array_equal(gradient, want != 0)
  at = activations.keep_above(jnp.array([1.0, jnp.nan, -1.0]), 1.0)
  np.testing.assert_array_equal(at, [0, np.nan, 0])


def test_chess_thresholds_equal_a_loop():
  gate, up = pieces.draw(4, 9, 5), pieces.draw(5, 9, 5)
  up[:, 2] = 0

  @pieces.jit
  def found(gate, up, sparsity):
    magnitude = activations.Activity.zeros(5).add(up).magnitude
    scores = activations.Magnitudes.zeros().add(gate * magnitude)
    limit = scores.quantile(sparsity)
    return limit, activations.chess_thresholds(limit, magnitude)

  limit, got = found(gate, up, 0.6)
  want = oracle.chess_thresholds(gate, up, 0.6)
  exact = want[0] * np.abs(up[:, 0]).mean()
  assert got[2] == np.inf == want[2]
  # The limit is a quantile of 45 scores, right to a bin; the rest is exact.
  np.testing.assert_allclose(got / limit, want / exact, 1e-5)
  np.testing.assert_allclose(limit, exact, 0.1)
  assert not found(gate, up, 0.0)[1].any()


def test_a_magnitude_that_is_nan_keeps_its_neuron():
  magnitude = jnp.array([jnp.nan, 1.0, 0.0])
  thresholds = activations.chess_thresholds(2.0, magnitude)
  kept = activations.keep_above(jnp.array([1.0, 1.0, 1.0]), thresholds)
  assert kept.tolist() == [1, 0, 0]


def test_calibration_compiles_once():
  run = lambda model, x: model(x)
  model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
  before = module._seen._cache_size()
  for _ in range(2):
    activations.calibrate(run, model, [jnp.ones((4, 2))] * 3, 0.5)
  assert module._seen._cache_size() == before + 1


def test_chess_loses_less_where_neurons_differ():
  scale = np.exp(2 * pieces.draw(6, 32))
  gate, up = pieces.draw(7, 200, 32), pieces.draw(8, 200, 32) * scale
  held = (pieces.draw(9, 200, 32), pieces.draw(10, 200, 32) * scale)

  @pieces.jit
  def errors(gate, up, held_gate, held_up, down):
    magnitude = activations.Activity.zeros(32).add(up).magnitude
    quantile = lambda x: activations.Magnitudes.zeros().add(x).quantile(0.5)
    chess = activations.chess_thresholds(quantile(gate * magnitude), magnitude)
    exact = (held_gate * held_up) @ down
    kept = [
      activations.keep_above(held_gate, t) for t in (quantile(gate), chess)
    ]
    return jnp.stack(
      [
        jnp.stack(
          [
            (((k * held_up) @ down - exact) ** 2).mean(),
            1 - activations.density(k),
          ]
        )
        for k in kept
      ]
    )

  (uniform, s), (chess, t) = errors(gate, up, *held, pieces.draw(11, 32, 8))
  assert chess < uniform / 2
  # 6,400 gates: a standard error of 0.006 of each of two draws.
  assert abs(s - 0.5) < 0.03 and abs(t - 0.5) < 0.03


class Network(linen.Module):
  @linen.compact
  def __call__(self, x):
    x = jnp.tanh(linen.Dense(5)(x))
    return linen.Dense(3)(x)


@functools.cache
def networks():
  nnx_model = nnx.Sequential(
    nnx.Linear(4, 5, rngs=nnx.Rngs(0)),
    jnp.tanh,
    nnx.Linear(5, 3, rngs=nnx.Rngs(1)),
  )
  module = Network()
  variables = module.init(jax.random.key(0), jnp.ones((1, 4)))
  names = ("layers/0/kernel", "layers/2/kernel")
  linen_names = ("Dense_0/kernel", "Dense_1/kernel")
  run = lambda model, x: model(x)
  kernels = [nnx_model.layers[i].kernel[...] for i in (0, 2)]
  linen_kernels = [
    variables["params"][n.split("/")[0]]["kernel"] for n in linen_names
  ]
  return [
    (run, nnx_model, names, kernels),
    (module.apply, variables, linen_names, linen_kernels),
  ]


@pytest.mark.parametrize("kind", [0, 1])
def test_a_model_with_thresholds(kind):
  call, model, names, kernels = networks()[kind]
  x = pieces.draw(12, 16, 4)
  found = activations.calibrate(
    call, model, [x[:8], x[8:]], lambda name: 0.5 if name == names[0] else 0.0
  )
  assert sorted(found) == sorted(names) and found[names[1]] == 0
  np.testing.assert_allclose(found[names[0]], oracle.kth_smallest(x, 0.5), 0.05)
  run = lambda thresholds: activations.sparsified(call, model, thresholds, x)
  limits = {names[0]: 0.7, names[1]: 0.2}
  kept = oracle.apply_threshold(x, 0.7)
  hidden = np.tanh(oracle.matmul(kept, np.asarray(kernels[0])))
  hidden = oracle.apply_threshold(hidden, 0.2)
  pieces.close(run(limits), oracle.matmul(hidden, np.asarray(kernels[1])))
  dense = call(model, x)
  np.testing.assert_array_equal(run(dict.fromkeys(names, 0.0)), dense)


@pytest.mark.parametrize("axis_type", common.AXIS_TYPES)
def test_eight_devices(axis_type):
  mesh = common.mesh_of(axis_type)
  x = pieces.draw(13, 8, 6)
  with jax.set_mesh(mesh):
    placed = common.place(x, mesh, jax.P("x", "y"))
    add = jax.jit(lambda x: activations.Magnitudes.zeros().add(x).counts)
    kept = jax.jit(lambda x: activations.keep_above(x, 0.5))(placed)
    counts = add(placed)
  alone = activations.Magnitudes.zeros().add(jnp.asarray(x)).counts
  np.testing.assert_array_equal(counts, alone)
  assert kept.sharding.is_equivalent_to(placed.sharding, 2)


def test_bad_input():
  sizes = activations.Magnitudes.zeros()
  with pytest.raises(ValueError, match="x must be floating, got int32"):
    sizes.add(jnp.arange(3))
  with pytest.raises(ValueError, match="valid must be of the first"):
    sizes.add(jnp.ones((2, 3)), jnp.ones(3, bool))
  with pytest.raises(ValueError, match=r"sparsity must be in \[0, 1\]"):
    sizes.quantile(1.5)
  with pytest.raises(ValueError, match=r"threshold must be a number or \[3\]"):
    activations.keep_above(jnp.ones((2, 3)), jnp.ones(2))
  with pytest.raises(ValueError, match="x must be floating"):
    activations.keep_above(jnp.arange(3), 1.0)
  with pytest.raises(ValueError, match=r"magnitude must be \[neurons\]"):
    activations.chess_thresholds(1.0, jnp.ones((2, 2)))
  call, model, *_ = networks()[0]
  with pytest.raises(ValueError, match="batches must hold at least one"):
    activations.calibrate(call, model, [], 0.5)
  with pytest.raises(ValueError, match="thresholds must name layers"):
    activations.sparsified(call, model, {"nowhere": 1.0}, jnp.ones((1, 4)))
