"""Sparse-IFT: multiply-adds counted, limits, and training in the room."""

import itertools
import math
import re

from flax import nnx
from flax.nnx import bridge
import hypothesis
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sparsejax import costs
from sparsejax import select
from sparsejax import weights
from tests import common
from tests.oracles import methods_rest as oracle
from tests.weights.problem import jit
from tests.weights.problem import numbers

K, N = 8, 12
LAYERS = {
  "parallel": weights.SparseParallel,
  "factorized": weights.SparseFactorized,
  "doped": weights.SparseDoped,
}


def make(kind, sparsity, k=K, n=N, seed=0, **options):
  rngs = nnx.Rngs(seed)
  if kind == "wide":
    return weights.SparseWide(
      k, (6, 10), n, sparsity=sparsity, rngs=rngs, **options
    )
  return LAYERS[kind](k, n, sparsity=sparsity, rngs=rngs, **options)


def counted(module, masks):
  """Multiply-adds of a row: nonzero entries of all kernels, one by one."""
  params = nnx.to_pure_dict(nnx.state(module, nnx.Param))
  kernels = [
    (path, x)
    for path, x in jax.tree_util.tree_leaves_with_path(params)
    if x.ndim == 2
  ]
  given = dict(jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(masks)))
  return sum(int(np.asarray(given[path]).sum()) for path, _ in kernels)


SHARES = st.floats(0, 0.97) | st.sampled_from([0, 0.5, 0.75, 0.9, 2 / 3])


@hypothesis.given(
  kind=st.sampled_from(list(LAYERS)),
  sparsity=SHARES,
  k=st.integers(1, 20),
  n=st.integers(1, 20),
)
@hypothesis.settings(max_examples=40)
def test_layers_keep_the_multiply_adds_of_the_dense_one(kind, sparsity, k, n):
  made = jax.eval_shape(lambda: nnx.split(make(kind, sparsity, k, n)))
  module = nnx.merge(*made)
  assert module.nonzero() == oracle.dense_count([k, n])
  assert module.flops() == costs.weight_flops(k * n)
  below, above = oracle.ift_slack(k, n, sparsity, kind)
  count = {
    "parallel": lambda *a: oracle.parallel_count(*a)[1],
    "factorized": oracle.factorized_count,
    "doped": oracle.doped_count,
  }[kind](k, n, sparsity)
  # Branches are rounded there too, but each keeps a share of 1 - s.
  if kind != "parallel":
    assert -above <= module.nonzero() - count <= below
  sizes = module._kernels()
  for name, kept in module.kept:
    assert 0 <= kept <= math.prod(sizes[name])


@hypothesis.given(
  sparsity=SHARES, widths=st.lists(st.integers(1, 20), min_size=3, max_size=5)
)
@hypothesis.settings(max_examples=20)
def test_wide_keeps_the_multiply_adds_of_each_layer(sparsity, widths):
  k, *hidden, n = widths
  made = jax.eval_shape(
    lambda: nnx.split(
      weights.SparseWide(k, hidden, n, sparsity=sparsity, rngs=nnx.Rngs(0))
    )
  )
  module = nnx.merge(*made)
  assert module.nonzero() == oracle.dense_count(widths)
  wide = [k, *(oracle.wide_width(h, sparsity, "nearest") for h in hidden), n]
  np.testing.assert_allclose(module.widths, wide, atol=1)  # halves: to even
  densities = oracle.wide_densities(widths, module.widths)
  shares = module.sparsities()
  for i, density in enumerate(densities):
    share = shares.get(f"(^|/)layers/{i}/kernel$", 0.0)
    np.testing.assert_allclose(1 - share, density, 1e-12)


def test_shapes_are_those_of_the_paper():
  assert make("wide", 0.75).widths == (K, 12, 20, N)
  assert len(make("parallel", 0.9).branches) == oracle.ift_scale(0.9) == 10
  inner = oracle.factorized_inner(K, N, 0.75)
  assert make("factorized", 0.75).down.kernel.shape == (K, inner) == (K, 20)
  rank = oracle.doped_rank(K, N, 0.75)
  assert make("doped", 0.75).down.kernel.shape == (K, rank) == (K, 3)
  for share in make("parallel", 0.75).sparsities().values():
    assert share == 0.75
  widest = make("wide", 0.75).sparsities()
  assert widest["(^|/)layers/1/kernel$"] == 0.75
  assert widest["(^|/)layers/0/kernel$"] == 0.5


@pytest.mark.parametrize("kind", [*LAYERS, "wide"])
def test_at_sparsity_0_it_is_the_dense_layer(kind):
  """The same numbers from the same keys."""
  x, rngs = numbers(3, 2, K), nnx.Rngs(5)
  if kind == "wide":
    widths = (K, 6, 10, N)
    layers = [
      nnx.Linear(a, b, rngs=rngs) for a, b in itertools.pairwise(widths)
    ]
    want = layers[2](jax.nn.relu(layers[1](jax.nn.relu(layers[0](x)))))
  else:
    want = nnx.Linear(K, N, rngs=rngs)(x)
  module = make(kind, 0.0, seed=5)
  np.testing.assert_array_equal(module(x), want)
  assert not module.sparsities()


@pytest.mark.parametrize("kind", [*LAYERS, "wide"])
@pytest.mark.parametrize("sparsity", [0.0, 0.75])
def test_inputs_and_outputs_stay(kind, sparsity):
  module = make(kind, sparsity, dtype=jnp.bfloat16)
  for lead in (), (5,), (0, 2):
    y = module(numbers(*lead, K))
    assert y.shape == (*lead, N) and y.dtype == jnp.bfloat16


def kernels(*layers):
  return [common.float64(layer.kernel[...]) for layer in layers]


def test_forward_passes_are_the_oracle():
  x = numbers(3, K)
  relu = lambda v: max(v, 0.0)
  for activation, scalar in (None, None), (jax.nn.relu, relu):
    layer = make("parallel", 0.75, activation=activation)
    want = oracle.parallel_forward(x, kernels(*layer.branches), scalar)
    np.testing.assert_allclose(layer(x), want, 1e-5, 1e-5)
    layer = make("factorized", 0.75, activation=activation, use_bias=False)
    both = kernels(layer.down, layer.up)
    want = oracle.factorized_forward(x, *both, scalar)
    np.testing.assert_allclose(layer(x), want, 1e-5, 1e-5)
  layer = make("doped", 0.75)
  layer.sparse.bias[...] = jnp.arange(1.0, N + 1)
  both = kernels(layer.sparse, layer.down, layer.up)
  want = oracle.doped_forward(x, *both) + np.arange(1.0, N + 1)
  np.testing.assert_allclose(layer(x), want, 1e-5, 1e-5)


class Model(nnx.Module):
  """A transformed layer within a model, and a readout that stays dense."""

  def __init__(self, kind, **options):
    self.layer = make(kind, 0.75, k=16, n=32, **options)
    self.out = nnx.Linear(32, 4, rngs=nnx.Rngs(1))

  def __call__(self, x):
    return self.out(jax.nn.relu(self.layer(x)))


def begin(tx, params):
  """Masked parameters, the optimizer's state and the masks."""

  @jit
  def made(params):
    opt_state = tx.init(params)
    params = weights.sparse_params(opt_state, params)
    return params, opt_state, weights.masks(opt_state, params)

  return made(params)


@pytest.mark.parametrize("kind", [*LAYERS, "wide"])
def test_rigl_trains_it_with_exact_counts(kind):
  model = Model(kind)
  tx = weights.rigl(
    optax.adam(0.01),
    sparsity=model.layer.sparsities(),
    where="layer/.*kernel$",
    every=2,
    until=20,
    key=jax.random.key(0),
  )
  graph, params = nnx.split(model, nnx.Param)
  params, opt_state, first = begin(tx, params)
  x, y = numbers(32, 16), numbers(32, 4, seed=1)

  @jit
  def step(params, opt_state):
    loss = lambda p: ((nnx.merge(graph, p)(x) - y) ** 2).mean()
    value, grads = jax.value_and_grad(loss)(params)
    updates, opt_state = tx.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, value

  values = []
  for _ in range(6):
    params, opt_state, value = step(params, opt_state)
    values.append(value)
  assert values[-1] < values[0]
  masks = weights.masks(opt_state, params)
  assert any(
    (a != b).any()
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(masks))
  )
  inside = nnx.to_pure_dict(masks)["layer"]
  dense = 16 * 6 + 6 * 10 + 10 * 32 if kind == "wide" else 16 * 32
  assert model.layer.nonzero(inside) == model.layer.nonzero() == dense
  assert counted(model.layer, nnx.state(masks)["layer"]) == dense
  assert nnx.to_pure_dict(masks)["out"]["kernel"].all()


@pytest.mark.parametrize("kind", [*LAYERS, "wide"])
def test_condensed_layers_run_it_in_blocks(kind):
  """Fewer numbers, and the same result."""
  block = select.Block((2, 2))
  options = dict(multiple=2) if kind in ("wide", "factorized") else {}
  model = Model(kind, **options)
  tx = weights.static(
    optax.sgd(0.1),
    sparsity=model.layer.sparsities(),
    structure=block,
    where="layer/.*kernel$",
    key=jax.random.key(0),
  )
  params, _, masks = begin(tx, nnx.state(model, nnx.Param))
  nnx.update(model, params)
  fast = weights.condense_layers(model, nnx.to_pure_dict(masks), block)
  x = numbers(5, 16)
  run = jit(lambda model, x: model(x))
  np.testing.assert_allclose(run(fast, x), run(model, x), 1e-5, 1e-5)
  held = sum(p.size for p in jax.tree.leaves(nnx.state(fast.layer, nnx.Param)))
  full = sum(p.size for p in jax.tree.leaves(nnx.state(model.layer)))
  assert held < full
  inside = nnx.to_pure_dict(masks)["layer"]
  # Whole blocks of four: each kernel's count is rounded to one of them.
  kernels = len(model.layer.kept)
  assert abs(fast.layer.nonzero(inside) - model.layer.nonzero()) <= 4 * kernels


@pytest.mark.parametrize("kind", ["wide", "factorized"])
@pytest.mark.parametrize("sparsity", [0.0, 0.02, 0.7])
def test_widths_are_multiples_and_the_count_stays(kind, sparsity):
  module = make(kind, sparsity, multiple=4)
  dense = K * 6 + 6 * 10 + 10 * N if kind == "wide" else K * N
  assert module.nonzero() == dense
  widths = module.widths[1:-1] if kind == "wide" else [module.up.in_features]
  assert not sparsity or not any(w % 4 for w in widths)


def test_linen():
  linen = bridge.to_linen(weights.SparseParallel, K, N, sparsity=0.5)
  x = numbers(3, K)
  params = linen.init(jax.random.key(0), x)["params"]
  assert len(params["branches"]) == 2
  assert linen.apply({"params": params}, x).shape == (3, N)


def test_masks_are_counted():
  layer = make("doped", 0.5)
  params = nnx.to_pure_dict(nnx.state(layer, nnx.Param))
  masks = jax.tree.map(lambda p: jnp.zeros(p.shape, bool), params)
  assert layer.nonzero(masks) == layer.flops(masks) == 0
  del masks["down"]
  rank = layer.down.out_features
  assert layer.nonzero(masks) == K * rank
  masks["sparse"]["kernel"] = np.ones((N, K), bool)
  with pytest.raises(ValueError, match="'sparse/kernel'"):
    layer.nonzero(masks)
  with pytest.raises(ValueError, match=r"others for .*'mlp/sparse/kernel'"):
    layer.nonzero({"mlp": {"sparse": masks["sparse"]}})


def test_modules_of_one_model_are_told_apart():
  make = lambda sparsity: weights.SparseWide(
    8, 16, 4, sparsity=sparsity, rngs=nnx.Rngs(0)
  )
  blocks = {"a": make(0.75), "b": make(0.5), "bb": make(0.0)}
  params = {n: nnx.state(block, nnx.Param) for n, block in blocks.items()}
  sparsity = {}
  for name, block in blocks.items():
    sparsity |= block.sparsities(name)
  masks = weights.random_masks(jax.random.key(0), params, sparsity=sparsity)
  for name, block in blocks.items():
    assert block.nonzero(masks[name]) == 8 * 16 + 16 * 4


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda: make("wide", 1.0), "sparsity must be in [0, 1), got 1"),
    (lambda: make("wide", 0.5, multiple=0), "multiple must be a positive"),
    (lambda: make("parallel", -0.1), "sparsity must be in [0, 1]"),
    (lambda: make("doped", 1), "sparsity must be in [0, 1), got 1"),
    (lambda: make("factorized", "half"), "sparsity must be a Python number"),
    (
      lambda: weights.SparseWide(4, (), 4, sparsity=0.5, rngs=nnx.Rngs(0)),
      "hidden must have at least one width",
    ),
  ],
)
def test_bad_settings(call, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    call()
