"""Methods after training: choices, corrections and budgets against the oracle.

The oracle's numbers are of f64; choices are compared where no two scores are
closer than f32 can tell.
"""

import dataclasses
import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sparsejax import capture
from sparsejax import select
from sparsejax import weights
from tests import common
from tests.oracles import post_training as oracle
from tests.oracles import test_post_training_oracle as authors

K, N, ROWS = 24, 10, 64
STRUCTURES = {
  "tensor": (select.Unstructured(), "tensor", 0.4),
  "output": (select.ConstantFanIn(), "output", 0.4),
  "2:4": (select.NM(2, 4), ("nm", 2, 4), None),
  "4:8": (select.NM(4, 8), ("nm", 4, 8), None),
  "blocks": (select.Block((4, 2)), ("blocks", 4, 2), 0.4),
}


def layer(seed=0, k=K, n=N, dead=()):
  """A kernel, correlated inputs, and their moments twice."""
  rng = np.random.default_rng(seed)
  w = rng.standard_normal((k, n)).astype(np.float32)
  x = rng.standard_normal((ROWS, k)) @ rng.standard_normal((k, k)) / k**0.5
  x = (x * rng.uniform(0.3, 3, k) + rng.normal(0, 1, k)).astype(np.float32)
  x[:, list(dead)] = 0
  moments = capture.Moments.zeros(k)
  for part in np.split(x, 4):
    moments = moments.add(jnp.asarray(part))
  return w, moments, oracle.statistics(x)


@pytest.mark.parametrize("name", STRUCTURES)
def test_magnitude_and_wanda_choose_as_the_oracle(name):
  structure, of_oracle, density = STRUCTURES[name]
  w, moments, statistics = layer()
  for got, want in (
    (
      weights.magnitude_pruning(w, density, structure),
      oracle.magnitude_mask(w, density, of_oracle),
    ),
    (
      weights.wanda(w, moments, density, structure),
      oracle.wanda_mask(w, statistics.second, density, of_oracle),
    ),
  ):
    np.testing.assert_array_equal(got.mask, want)
    np.testing.assert_array_equal(got.kernel, np.where(want, w, 0))


AUTHORS = [
  *(f"sparsegpt/{x}" for x in ("half", "half_blocks_of_16", "70_percent",
                               "2_of_4", "1_of_4_pruned")),
  *(f"prune_{method}/{x}" for method in ("wanda", "magnitude")
    for x in ("half", "70_percent", "2_of_4")),
  *(f"dsnot/{x}" for x in ("same_sign", "same_sign_power_0",
                           "same_sign_2_cycles", "magnitude")),
]  # fmt: skip


@pytest.mark.parametrize("name", AUTHORS)
def test_the_authors_code_chooses_the_same(name):
  x, w = authors.inputs_and_weights()
  moments = capture.Moments.zeros(64).add(jnp.asarray(x))
  options = authors.RESULTS[name]["arguments"]
  method, structure = name.split("/")[0], None
  sparsity = options.get("sparsity", options.get("sparsity_ratio", 0.5))
  block = options.get("blocksize", 64)
  # All but wanda prune the next one too; their n of m is the pruned.
  size = {"sparsegpt": 48 * block, "prune_magnitude": 48 * 64}.get(method)
  density = 1 - (int(size * sparsity) + 1) / size if size else 1 - sparsity
  if "prunen" in options or "prune_n" in options:
    n, m = (options[k] for k in options if k.startswith("prune"))
    structure, density = select.NM(m - n, m), None
  if method == "sparsegpt":
    got = weights.sparsegpt(w, moments, density, structure, block=block)
  elif method == "prune_wanda":
    density = density and 1 - int(64 * sparsity) / 64
    got = weights.wanda(w, moments, density, structure)
  elif method == "prune_magnitude":
    got = weights.magnitude_pruning(w, density, structure)
  else:
    by_wanda = options["initial_method"] == "wanda"
    start = (
      weights.wanda(w, moments, 0.5)
      if by_wanda
      else weights.magnitude_pruning(w, 0.5, select.ConstantFanIn())
    )
    got = weights.dsnot(
      w,
      moments,
      start.mask,
      cycles=options["max_cycle_time"],
      threshold=options["update_threshold"] / len(x),
      power=options["pow_of_var_regrowing"],
    )
  np.testing.assert_array_equal(got.mask, authors.authors_mask(name))


def test_wanda_of_inputs_of_one_norm_is_magnitude_by_output():
  w, moments, _ = layer()
  alike = capture.Moments(
    moments.count, moments.mean, jnp.ones(K), moments.second
  )
  np.testing.assert_array_equal(
    weights.wanda(w, alike, 0.5).mask,
    weights.magnitude_pruning(w, 0.5, select.ConstantFanIn()).mask,
  )


@pytest.mark.parametrize("block", [8, 10, 128])
def test_sparsegpt(block):
  w, moments, statistics = layer(dead=(3, 11))
  got = weights.sparsegpt(w, moments, 0.4, block=block)
  new, mask = oracle.sparsegpt(w, statistics.second, 0.4, block=block)
  np.testing.assert_array_equal(got.mask, mask)
  np.testing.assert_allclose(got.kernel, new, rtol=2e-3, atol=2e-3)
  assert not np.asarray(got.kernel)[[3, 11]].any()
  assert not np.asarray(got.kernel)[~mask].any()


@pytest.mark.parametrize("n, m", [(2, 4), (4, 8), (1, 4)])
def test_sparsegpt_of_n_of_m(n, m):
  w, moments, statistics = layer()
  got = weights.sparsegpt(w, moments, None, select.NM(n, m), block=8)
  new, mask = oracle.sparsegpt(w, statistics.second, nm=(n, m), block=8)
  np.testing.assert_array_equal(got.mask, mask)
  np.testing.assert_allclose(got.kernel, new, rtol=2e-3, atol=2e-3)
  assert (mask.reshape(-1, m, N).sum(1) == n).all()


@pytest.mark.parametrize(
  "shape, block", [((2, 5), 8), ((4, 2), 16), ((3, 1), 128)]
)
def test_sparsegpt_of_blocks(shape, block):
  w, moments, statistics = layer(dead=(5,))
  structure = select.Block(shape)
  got = weights.sparsegpt(w, moments, 0.4, structure, block=block)
  options = dict(blocks=shape, block=block)
  new, mask = oracle.sparsegpt(w, statistics.second, 0.4, **options)
  np.testing.assert_array_equal(got.mask, mask)
  np.testing.assert_allclose(got.kernel, new, rtol=2e-3, atol=2e-3)


def test_blocks_of_one_weight_are_unstructured():
  w, moments, _ = layer()
  got, want = (
    weights.sparsegpt(w, moments, 0.4, structure, block=8)
    for structure in (select.Block((1, 1)), select.Unstructured())
  )
  np.testing.assert_array_equal(got.mask, want.mask)
  np.testing.assert_array_equal(got.kernel, want.kernel)


def test_sparsegpt_of_n_of_m_outputs():
  w, moments, _ = layer()
  # Strips of 16 and 8 inputs: neither is whole groups of 5.
  got = weights.sparsegpt(w, moments, None, select.NM(2, 5, axis=1), block=16)
  assert (np.asarray(got.mask).reshape(K, 2, 5).sum(-1) == 2).all()
  want = oracle.column_by_column_obs(w, moments.second, np.asarray(got.mask))
  np.testing.assert_allclose(got.kernel, want, rtol=2e-3, atol=2e-3)


def test_sparsegpt_moves_weights_as_direct_obs_does():
  w, moments, statistics = layer(seed=1)
  got = weights.sparsegpt(w, moments, 0.5, damping=0.02)
  want = oracle.column_by_column_obs(
    w, statistics.second, np.asarray(got.mask), damping=0.02
  )
  np.testing.assert_allclose(got.kernel, want, rtol=2e-3, atol=2e-3)


def test_everything_kept_changes_nothing():
  w, moments, _ = layer()
  for pruned in (
    weights.magnitude_pruning(w, 1.0),
    weights.wanda(w, moments, 1.0),
    weights.sparsegpt(w, moments, 1.0),
  ):
    assert pruned.mask.all()
    np.testing.assert_array_equal(pruned.kernel, w)
    assert weights.reconstruction_error(w, pruned.kernel, moments) == 0


def test_the_order_of_the_papers_on_correlated_inputs():
  errors = []
  for seed in range(8):
    w, moments, _ = layer(seed, k=64, n=16)
    error = lambda pruned, w=w, moments=moments: float(
      weights.reconstruction_error(w, pruned.kernel, moments)
    )
    errors.append([
      error(weights.sparsegpt(w, moments, 0.5)),
      error(weights.wanda(w, moments, 0.5)),
      error(weights.magnitude_pruning(w, 0.5)),
    ])  # fmt: skip
  sparsegpt, wanda, magnitude = np.mean(errors, 0)
  assert sparsegpt < wanda < magnitude


def test_reconstruction_error():
  w, moments, statistics = layer()
  after = np.where(np.arange(N) % 2, w, 0)
  want = oracle.reconstruction_error(w, after, statistics.second)
  want /= oracle.reconstruction_error(w, 0 * w, statistics.second)
  got = weights.reconstruction_error(w, jnp.asarray(after), moments)
  np.testing.assert_allclose(got, want, rtol=1e-4)


@pytest.mark.parametrize("group", [None, 4])
@pytest.mark.parametrize("power", [0.0, 1.0])
def test_dsnot(group, power):
  for seed in range(4):
    w, moments, s = layer(seed)
    structure = None if group is None else select.NM(2, 4)
    density = 0.5 if group is None else None
    start = weights.wanda(w, moments, density, structure)
    got = weights.dsnot(
      w, moments, start.mask, group=group, power=power, threshold=0.05
    )
    options = dict(m=group, power=power, threshold=0.05)
    mask = np.asarray(start.mask)
    want = oracle.dsnot(w, mask, s.mean, s.variance, s.second, **options)
    np.testing.assert_array_equal(got.mask, want)
    np.testing.assert_array_equal(got.mask.sum(0), mask.sum(0))
    np.testing.assert_array_equal(got.kernel, np.where(want, w, 0))
    before, after = (
      np.abs(oracle.expected_error(w, m, s.mean)) for m in (mask, want)
    )
    assert (after <= before).all() and after.mean() < before.mean()


def test_owl():
  rng = np.random.default_rng(0)
  scores = {
    "a": np.abs(rng.standard_normal((20, 30))) ** 3,
    "b": np.abs(rng.standard_normal((40, 10))),
    "c": np.abs(rng.standard_normal((10, 10))) ** 2,
  }
  got = weights.owl({n: jnp.asarray(x) for n, x in scores.items()}, 0.3)
  want = oracle.owl(list(scores.values()), 0.7)
  np.testing.assert_allclose([1 - got[n] for n in scores], want, rtol=1e-5)
  assert got["a"] > got["c"] > got["b"]


class Model(nnx.Module):
  """Two layers, the second of several dimensions."""

  def __init__(self, rngs):
    self.first = nnx.Linear(8, 6, rngs=rngs)
    self.second = nnx.LinearGeneral(6, (2, 3), rngs=rngs)

  def __call__(self, x):
    return self.second(jnp.tanh(self.first(x)))


def test_a_model_and_training_from_its_masks():
  model = Model(nnx.Rngs(0))
  x = jax.random.normal(jax.random.key(1), (32, 8))
  run = lambda model, x: model(x)
  moments = capture.moments(run, model, x.reshape(4, 8, 8))
  params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
  method = functools.partial(weights.sparsegpt, density=0.5)
  pruned, masks = weights.prune(params, moments, method)
  for name in ("first", "second"):
    kernel, mask = pruned[name]["kernel"], masks[name]["kernel"]
    assert mask.sum() == mask.size // 2 and not kernel[~mask].any()
    assert masks[name]["bias"].all()
  tx = optax.chain(optax.adam(0.1), weights.keep_masked(masks))
  state = tx.init(pruned)
  updates, _ = tx.update(jax.tree.map(jnp.ones_like, pruned), state, pruned)
  trained = optax.apply_updates(pruned, updates)
  assert not trained["first"]["kernel"][~masks["first"]["kernel"]].any()
  assert (trained["first"]["kernel"] != pruned["first"]["kernel"]).any()
  densities = weights.owl(
    {
      name: weights.wanda_scores(
        params[name]["kernel"].reshape(len(moments[f"{name}/kernel"].mean), -1),
        moments[f"{name}/kernel"],
      )
      for name in ("first", "second")
    },
    0.5,
    outlier=2.0,
  )
  densities = {f"{name}/kernel": d for name, d in densities.items()}
  _, masks = weights.prune(params, moments, weights.wanda, densities)
  for name, density in densities.items():
    mask = masks[name.split("/")[0]]["kernel"]
    assert abs(float(mask.mean()) - density) < 0.1


METHODS = {
  "magnitude": lambda w, moments: weights.magnitude_pruning(w, 0.5),
  "wanda": lambda w, moments: weights.wanda(w, moments, 0.5),
  "sparsegpt": lambda w, moments: weights.sparsegpt(w, moments, 0.5, block=16),
  "dsnot": lambda w, moments: weights.dsnot(
    w, moments, weights.wanda(w, moments, 0.5)
  ),
}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("axis_type", common.AXIS_TYPES, ids=lambda x: x.name)
def test_eight_devices_choose_the_same(name, axis_type):
  w, moments, _ = layer(k=32, n=16)
  run = jax.jit(METHODS[name])
  want, mesh = run(w, moments), common.mesh_of(axis_type)
  with jax.set_mesh(mesh):
    placed = common.place(w, mesh, jax.P("y", "x"))
    got = run(placed, common.place(moments, mesh, jax.P()))
    error = weights.reconstruction_error(placed, got.kernel, moments)
  np.testing.assert_array_equal(got.mask, want.mask)
  np.testing.assert_allclose(got.kernel, want.kernel, rtol=1e-4, atol=1e-5)
  assert got.kernel.sharding == got.mask.sharding == placed.sharding
  expected = weights.reconstruction_error(w, want.kernel, moments)
  np.testing.assert_allclose(error, expected, rtol=1e-4)


def test_a_result_says_how_it_was_made():
  w, moments, _ = layer()
  magnitude = weights.magnitude_pruning(w, 0.4)
  assert magnitude.made == weights.Made(
    "magnitude_pruning", 0.4, select.Unstructured()
  )
  start = weights.wanda(w, moments, None, select.NM(2, 4))
  assert (start.made.method, start.made.density) == ("wanda", None)
  assert start.made.structure == select.NM(2, 4) and start.made.rows == ROWS
  swapped = weights.dsnot(w, moments, start, threshold=0.05)
  assert dict(swapped.made.settings) == {
    "cycles": 50, "threshold": 0.05, "power": 1.0, "group": 4
  }  # fmt: skip
  assert swapped.made.start is start.made
  again = weights.dsnot(w, moments, swapped, threshold=0.05)
  assert again.made.start is swapped.made
  assert again.made.structure == select.NM(2, 4)
  np.testing.assert_array_equal(
    swapped.mask,
    weights.dsnot(w, moments, start.mask, group=4, threshold=0.05).mask,
  )
  gpt = weights.sparsegpt(w, moments, 0.4, block=8)
  assert gpt.made.settings == (("block", 8), ("damping", 0.01))
  # What was made alike is one type of pytree, so jit compiles once for it.
  other = weights.sparsegpt(2 * w, moments.add(jnp.ones((1, K))), 0.4, block=8)
  assert jax.tree.structure(gpt) == jax.tree.structure(other)
  assert other.made.rows == ROWS + 1
  run = jax.jit(lambda w, m: weights.sparsegpt(w, m, 0.4, block=8))
  traced = run(w, moments)
  assert jax.tree.structure(gpt) == jax.tree.structure(traced)
  assert traced.made.rows == ROWS
  several = jax.vmap(lambda w: weights.wanda(w, moments, 0.5))(w[None])
  assert several.made.rows.shape == (1,)


def test_layers_by_name_and_what_prune_makes_of_them():
  w, moments, _ = layer()
  params = {"a": w.reshape(K, 5, 2), "b": jnp.ones(3)}
  densities = {"a": 0.5}
  layers = weights.prune_layers(
    params, {"a": moments}, weights.wanda, densities
  )
  assert layers["a"].kernel.shape == layers["a"].mask.shape == (K, 5, 2)
  assert layers["a"].made.density == 0.5 and layers["a"].made.rows == ROWS
  put = weights.put_layers(params, layers)
  pruned = weights.prune(params, {"a": moments}, weights.wanda, densities)
  for got, want in zip(jax.tree.leaves(put), jax.tree.leaves(pruned)):
    np.testing.assert_array_equal(got, want)


def bad(moments, **changes):
  return {"a": dataclasses.replace(moments, **changes)}


def test_what_prune_cannot_calibrate_by():
  w, moments, _ = layer()
  params = {"a": jnp.asarray(w)}
  gpt = functools.partial(weights.sparsegpt, density=0.5)
  undamped = functools.partial(gpt, damping=0.0)
  few = capture.Moments.zeros(K).add(jnp.ones((3, K)))
  # Of rank one, though of rows enough.
  flat = bad(moments, second=jnp.ones((K, K)))
  lost = "a: .* NaN .* 64 rows for 24 inputs"
  for match, call in (
    ("a: moments must be finite", lambda: weights.prune(
      params, bad(moments, mean=moments.mean.at[2].set(jnp.nan)), gpt)),
    ("a: moments must be finite", lambda: weights.prune(
      params, bad(moments, second=moments.second / 0), gpt)),
    ("a: kernel must be finite", lambda: weights.prune(
      {"a": params["a"].at[1, 2].set(jnp.inf)}, {"a": moments}, gpt)),
    ("a: moments must be of rows, got 0", lambda: weights.prune(
      params, {"a": capture.Moments.zeros(K)}, gpt)),
    ("a: damping .* got 0 and 3 rows", lambda: weights.prune(
      params, {"a": few}, undamped)),
    (lost, lambda: weights.prune(params, flat, undamped)),
    ("densities must be of", lambda: weights.prune(
      params, {"a": moments}, weights.wanda, {"b": 0.5})),
    ("layers must be of the parameters, got 'b'", lambda: weights.put_layers(
      params, {"b": weights.magnitude_pruning(w, 0.5)})),
  ):  # fmt: skip
    with pytest.raises(ValueError, match=match):
      call()
  # Few rows are no error where there is damping, nor what cannot be seen.
  weights.prune(params, {"a": few}, gpt)
  masks = jax.jit(lambda m: weights.prune(params, m, undamped))(flat)[0]
  assert not np.isfinite(masks["a"]).all()


@pytest.mark.parametrize(
  "structure", [select.Block((4, 2)), select.Channel(), select.NM(1, 2, axis=1)]
)
def test_dsnot_does_not_cut_up_what_is_whole(structure):
  w, moments, _ = layer()
  density = None if isinstance(structure, select.NM) else 0.5
  start = weights.magnitude_pruning(w, density, structure)
  with pytest.raises(ValueError, match="mask must be of Unstructured"):
    weights.dsnot(w, moments, start)


def test_errors():
  w, moments, _ = layer()
  flat = capture.Moments(moments.count, moments.mean, moments.squares, None)
  for match, call in (
    ("kernel", lambda: weights.magnitude_pruning(jnp.ones(3), 0.5)),
    ("kernel", lambda: weights.wanda(jnp.ones((K, N), int), moments, 0.5)),
    ("moments must be of 3", lambda: weights.wanda(w[:3], moments, 0.5)),
    ("moments must have second", lambda: weights.sparsegpt(w, flat, 0.5)),
    ("density", lambda: weights.wanda(w, moments, 1.5)),
    ("density", lambda: weights.sparsegpt(w, moments, None)),
    ("density", lambda: weights.sparsegpt(w, moments, -1)),
    ("structure", lambda: weights.sparsegpt(
      w, moments, 0.5, select.Channel())),
    ("block must be a positive multiple of 4", lambda: weights.sparsegpt(
      w, moments, None, select.NM(2, 4), block=6)),
    ("block must be a positive multiple of 4", lambda: weights.sparsegpt(
      w, moments, 0.5, select.Block((4, 2)), block=6)),
    ("must divide", lambda: weights.sparsegpt(
      w, moments, 0.5, select.Block((5, 2)), block=5)),
    ("density must be n/m", lambda: weights.sparsegpt(
      w, moments, 0.3, select.NM(2, 4))),
    ("density .* keeps 0 of 4", lambda: weights.sparsegpt(
      w, moments, 0.1, select.Block((8, 5)), block=16)),
    ("density .* keeps 0 of 1 .* over .8, 10.", lambda: weights.sparsegpt(
      w, moments, 0.5, select.Block((8, 10)), block=16)),
    ("density .* keeps 6 of 6", lambda: weights.wanda(
      w, moments, 0.95, select.Block((8, 5)))),
    ("density .* keeps 0 of 10", lambda: weights.magnitude_pruning(
      w, 0.04, select.Channel())),
    ("damping", lambda: weights.sparsegpt(w, moments, 0.5, damping=-1.0)),
    ("mask", lambda: weights.dsnot(w, moments, jnp.ones((K, N)))),
    ("group", lambda: weights.dsnot(w, moments, w > 0, group=5)),
    ("group must be 4", lambda: weights.dsnot(
      w, moments, weights.wanda(w, moments, None, select.NM(2, 4)), group=8)),
    ("spread", lambda: weights.owl(
      dict(a=jnp.array([1.0] * 9 + [99.0]), b=jnp.ones(10)), 0.9, spread=0.5)),
    ("moments must be of parameters", lambda: weights.prune(
      dict(a=w), dict(b=moments), weights.wanda)),
    ("a: ", lambda: weights.prune(
      dict(a=w), dict(a=moments), functools.partial(weights.wanda, density=2))),
  ):  # fmt: skip
    with pytest.raises(ValueError, match=match):
      call()


def of_rank(rank, seed, scales=1.0):
  """A kernel, and moments of inputs that lie in fewer directions."""
  rng = np.random.default_rng(seed)
  x = rng.standard_normal((ROWS, rank)) @ rng.standard_normal((rank, K))
  x = jnp.asarray(x * scales, jnp.float32)
  w = rng.standard_normal((K, N)).astype(np.float32)
  return w, capture.Moments.zeros(K).add(x)


@pytest.mark.parametrize("rank", [1, 12, K - 1])
def test_a_hessian_that_cannot_be_inverted_shows(rank):
  """Not by infinities alone: rounding hides that it cannot."""
  run = functools.partial(weights.sparsegpt, density=0.5, damping=0.0)
  for seed in range(10):
    assert not np.isfinite(run(*of_rank(rank, seed)).kernel).any()
    assert np.isfinite(run(*of_rank(K, seed)).kernel).all()


def test_damping_makes_a_hessian_one_that_can_be_inverted():
  """Also where some inputs are a thousand times larger."""
  for seed in range(10):
    scales = np.where(np.arange(K) % 5 == seed % 5, 1e3, 1)
    w, moments = of_rank(3, seed, scales)
    pruned = weights.sparsegpt(w, moments, 0.5)
    assert np.isfinite(pruned.kernel).all()
