"""Autoencoders: against released packages, on any leading axes, on devices."""

import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sparsejax import sparse_coding
from tests import common
from tests.oracles import sparse_coding as oracle
from tests.sparse_coding import given
from tests.sparse_coding.given import close
from tests.sparse_coding.given import D
from tests.sparse_coding.given import M

squared_error = sparse_coding.squared_error
normalized_error = sparse_coding.normalized_error
l1_loss = sparse_coding.l1_loss


def dense(code):
  return code.dense() if isinstance(code, sparse_coding.Code) else code


@functools.partial(jax.jit, static_argnames=("graph", "trains"))
def run(graph, state, x, target=None, trains=True):
  """Code, reconstruction, parts of the loss, and how long latents are idle."""
  sae = nnx.merge(graph, state, copy=True)
  code, made = dense(sae.encode(x)), sae(x)
  parts = sae.loss(x, target=target)[1] if trains else {}
  return code, made, parts, sae.idle[...]


# Numbers of SAELens, sparsify and dictionary_learning. What theirs compute
# differently is listed in tests/oracles/test_sparse_coding_oracle.py.

TOP_K = functools.partial(sparse_coding.TopK, 3)
JUMP = functools.partial(sparse_coding.JumpReLU, 16, bandwidth=0.5)
DEAD = sparse_coding.DeadLatents(1)
MATRYOSHKA = sparse_coding.NestedPrefixes((4, 10, 16))
PURSUIT = functools.partial(sparse_coding.matching_pursuit, k=4, signed=True)


@pytest.mark.parametrize(
  "case,sparsifier,terms,settings",
  [
    (
      0,
      sparse_coding.ReLU,
      {squared_error: "mse_loss", l1_loss: "l1_loss"},
      {},
    ),
    (
      2,
      functools.partial(sparse_coding.Gated, 16),
      {
        squared_error: "mse_loss",
        sparse_coding.gate_l1: "l1_loss",
        sparse_coding.gate_error: "auxiliary_reconstruction_loss",
      },
      {},
    ),
    (3, TOP_K, {squared_error: "mse_loss"}, {}),
    (
      5,
      TOP_K,
      {squared_error: "mse_loss"},
      dict(score=sparse_coding.norm_aware),
    ),
    (
      6,
      JUMP,
      {squared_error: "mse_loss", sparse_coding.l0_loss: "l0_loss"},
      {},
    ),
    (8, lambda: sparse_coding.BatchTopK(2.5), {squared_error: "mse_loss"}, {}),
    (9, lambda: sparse_coding.BatchTopK(2.5), {MATRYOSHKA: None}, {}),
    (10, lambda: None, {squared_error: "mse_loss"}, dict(solver=PURSUIT)),
    (11, sparse_coding.ReLU, {}, dict(outputs=4)),
    (12, sparse_coding.ReLU, {}, dict(outputs=4, skip=True)),
    (13, JUMP, {}, dict(outputs=4)),
    (14, JUMP, {}, dict(outputs=4, skip=True)),
    (17, TOP_K, {normalized_error: "fvu"}, {}),
    (21, TOP_K, {normalized_error: "fvu"}, dict(outputs=6, skip=True)),
    (24, TOP_K, {DEAD: "auxk_loss"}, {}),
    (25, lambda: sparse_coding.BatchTopK(2), {DEAD: "auxk_loss"}, {}),
  ],
)
def test_numbers_of_released_packages(case, sparsifier, terms, settings):
  everything = given.authors()
  case, arrays = everything["cases"][case], everything["arrays"]
  found = {**arrays, **{k: arrays[v] for k, v in case["weights"].items()}}
  sae = given.autoencoder(
    found, sparsifier(), losses=dict.fromkeys(terms, 1.0) or None, **settings
  )
  dead = np.isin(np.arange(16), case.get("dead") or [])
  sae.idle[...] = jnp.asarray(dead, jnp.int32)
  x = jnp.asarray(found["x"], jnp.float32)
  target = found[case["target"]] if case.get("target") else found["x"]
  code, made, parts, _ = run(
    *nnx.split(sae), x, jnp.asarray(target, jnp.float32), trains=bool(terms)
  )
  z = np.array(case["z"])
  if "score" in settings:  # their values have the lengths in them
    z = z / oracle.norms(found["dictionary"])
  close(code, z, 1e-5, 1e-5)
  close(made, case["x_hat"], 1e-5, 1e-5)
  losses = {k: v for k, v in case.get("losses", {}).items()}
  for name, weight in case.get("coefficients", {}).items():
    losses[f"{name}_loss"] /= weight
  for term, theirs in terms.items():
    ours = parts[sparse_coding.losses.name(term)]
    # Of Matryoshka the levels are listed.
    levels = [v for k, v in losses.items() if "mse" in k]
    close(ours, losses[theirs] if theirs else sum(levels), 1e-5)


# Leading axes, other targets, other sites.


@pytest.mark.parametrize(
  "sparsifier",
  [lambda: sparse_coding.TopK(3), lambda: sparse_coding.BatchTopK(2.5)],
)
def test_batches_of_tokens_are_rows(sparsifier):
  found = given.arrays(1)
  x = jnp.asarray(found["x"], jnp.float32)
  terms = {squared_error: 1.0, sparse_coding.DeadLatents(1): 1.0}
  sae = given.autoencoder(found, sparsifier(), losses=terms)
  sae.idle[...] = jnp.arange(M)
  flat = run(*nnx.split(sae), x)
  both = run(*nnx.split(sae), x.reshape(2, 3, D))
  assert both[0].shape == (2, 3, M) and both[1].shape == (2, 3, D)
  for a, b in zip(jax.tree.leaves(flat), jax.tree.leaves(both), strict=True):
    np.testing.assert_allclose(a, b.reshape(a.shape), rtol=1e-6, atol=1e-6)


def test_tied():
  found = given.arrays(2)
  found["encoder"] = found["dictionary"]
  sae = given.autoencoder(found, sparse_coding.TopK(3), tied=True)
  assert sae.kernel is None
  want = oracle.forward("top_k", found, found["x"], k=3)
  code, made, *_ = run(*nnx.split(sae), jnp.asarray(found["x"], jnp.float32))
  close(code, want["z"])
  close(made, want["x_hat"])


def test_a_transcoder_learns_its_target():
  found = given.arrays(3, outputs=4)
  sae = given.autoencoder(found, sparse_coding.TopK(3), outputs=4)
  x = jnp.asarray(found["x"], jnp.float32)
  target = jnp.ones((len(x), 4))
  _, made, parts, _ = run(*nnx.split(sae), x, target)
  want = oracle.forward("top_k", found, found["x"], k=3, transcoder=True)
  close(made, want["x_hat"])
  close(parts["squared_error"], oracle.squared_error(target, want["x_hat"]))
  with pytest.raises(ValueError, match="target must be given to a transcoder"):
    sae.loss(x)
  with pytest.raises(ValueError, match=r"target must be \[..., 4\]"):
    sae.loss(x, target=x)
  with pytest.raises(ValueError, match="got leading axes"):
    sae.loss(x, target=target[1:])


def test_a_crosscoder_is_an_autoencoder_of_all_sites():
  make = lambda cls, *sizes: cls(
    *sizes,
    sparse_coding.TopK(3),
    losses={squared_error: 1.0, l1_loss: 1.0},
    rngs=nnx.Rngs(0),
  )
  both = make(sparse_coding.Crosscoder, 2, 4, 6)
  one = make(sparse_coding.Autoencoder, 8, 6)
  x = jax.random.normal(jax.random.key(0), (3, 5, 2, 4))
  code, made, parts, _ = run(*nnx.split(both), x)
  flat = run(*nnx.split(one), x.reshape(15, 8))
  close(code.reshape(15, 6), flat[0])
  close(made.reshape(15, 8), flat[1])
  close(parts["squared_error"], flat[2]["squared_error"])
  back = jax.eval_shape(lambda x: both.decode(both.encode(x)), x)
  assert back.shape == x.shape
  norms = np.linalg.norm(
    np.asarray(both.dictionary[...]).reshape(6, 2, 4), axis=-1
  )
  close(both.norms(), norms.sum(-1))
  assert parts["l1_loss"] > flat[2]["l1_loss"]
  with pytest.raises(ValueError, match=r"x must be \[..., 2, 4\]"):
    both(x.reshape(15, 8))
  single = make(sparse_coding.Crosscoder, 1, 4, 6)  # not taken for a flat row
  assert jax.eval_shape(single, x[0, :1, :1]).shape == (1, 1, 4)


def test_nan_that_a_target_does_not_show():
  found = given.arrays(4, outputs=4)
  x = jnp.asarray(found["x"], jnp.float32).at[1, 2].set(jnp.nan)
  target = jnp.ones((len(x), 4))
  for sparsifier in (
    sparse_coding.JumpReLU(M),
    sparse_coding.BatchTopK(2),
    sparse_coding.TopK(2),
  ):
    sae = given.autoencoder(found, sparsifier, outputs=4)
    _, made, parts, _ = run(*nnx.split(sae), x, target)
    assert jnp.isnan(parts["squared_error"]) and jnp.isnan(made[1]).all()
    assert jnp.isfinite(made[jnp.array([0, 2, 3])]).all()


# Training.


def test_idle_counts_rows():
  found = given.arrays(5)
  x = jnp.asarray(found["x"], jnp.float32)
  want = np.zeros(M, int)
  active = (oracle.forward("top_k", found, found["x"], k=3)["z"] != 0).any(0)
  assert active.any() and not active.all()
  sae = given.autoencoder(found, sparse_coding.TopK(3))
  for _ in range(2):
    want = np.where(active, 0, want + len(x))
    sae.loss(x)
    np.testing.assert_array_equal(sae.idle[...], want)
  sae.idle[...] = jnp.full(M, 2**31 - 1)
  sae.loss(x)
  assert sae.idle[...].min() >= 0 and sae.idle[...].max() > 2**30
  sae.eval()
  before = sae.idle[...]
  sae.loss(x)
  np.testing.assert_array_equal(sae.idle[...], before)


def test_weights_are_given_by_name():
  found = given.arrays(6)
  x = jnp.asarray(found["x"], jnp.float32)
  terms = {squared_error: 1.0, l1_loss: 0.5}
  sae = given.autoencoder(found, losses=terms)
  loss, parts = sae.loss(x)
  close(loss, parts["squared_error"] + 0.5 * parts["l1_loss"], 1e-6)
  loss, _ = sae.loss(x, weights={"l1_loss": jnp.float32(2.0)})
  close(loss, parts["squared_error"] + 2 * parts["l1_loss"], 1e-6)
  with pytest.raises(ValueError, match="weights must name terms of"):
    sae.loss(x, weights={"l1": 1.0})


def trainer(graph, x, steps=4):
  """A function of a state and a weight: the parameters after a few steps."""
  tx = sparse_coding.unit_norm(optax.adam(0.01))

  def train(params, rest, weight):
    def step(carry, _):
      params, rest, state = carry

      def loss(params):
        sae = nnx.merge(graph, params, rest, copy=True)
        value, _ = sae.loss(x, weights={"l1_loss": weight})
        return value, nnx.state(sae, sparse_coding.LatentStatistic)

      (value, rest), grads = jax.value_and_grad(loss, has_aux=True)(params)
      updates, state = tx.update(grads, state, params)
      params = optax.apply_updates(params, updates)
      return (params, rest, state), value

    start = params, rest, tx.init(params)
    (params, *_), values = jax.lax.scan(step, start, length=steps)
    return params, values

  return train


def test_a_sweep_of_weights_in_one_program_is_one_training_each():
  x = jax.random.normal(jax.random.key(1), (12, D))
  terms = {squared_error: 1.0, l1_loss: 0.0}
  saes = [
    sparse_coding.Autoencoder(D, M, losses=terms, rngs=nnx.Rngs(seed))
    for seed in range(3)
  ]
  split = [
    nnx.split(sae, nnx.Param, sparse_coding.LatentStatistic) for sae in saes
  ]
  graph = split[0][0]
  train = trainer(graph, x)
  weights = jnp.array([0.0, 0.1, 1.0])
  stacked = jax.tree.map(lambda *x: jnp.stack(x), *[s[1:] for s in split])
  params, values = jax.jit(jax.vmap(train))(*stacked, weights)
  one = jax.jit(train)
  for i, (_, *state) in enumerate(split):
    want, want_values = one(*state, weights[i])
    close(values[i], want_values)
    for a, b in zip(*map(jax.tree.leaves, (params, want)), strict=True):
      close(a[i], b)
  assert one._cache_size() == 1


# Devices.


@functools.partial(jax.jit, static_argnames="graph")
def value_and_grads(graph, params, rest, x):
  def loss(params):
    return nnx.merge(graph, params, rest, copy=True).loss(x)[0]

  made = nnx.merge(graph, params, rest, copy=True)(x)
  return made, *jax.value_and_grad(loss)(params)


@pytest.mark.slow  # two programs of eight devices each
@pytest.mark.parametrize("sharded", ["latents", "rows"])
@pytest.mark.parametrize(
  "sparsifier,terms",
  [
    (
      lambda: sparse_coding.TopK(3),
      {squared_error: 1.0, sparse_coding.AllBudgets(): 1.0},
    ),
    (
      lambda: sparse_coding.BatchTopK(2.5),
      {
        normalized_error: 1.0,
        sparse_coding.DeadLatents(5): 1.0,
        sparse_coding.NestedPrefixes((4, 16)): 1.0,
      },
    ),
  ],
)
def test_sharded_is_one_device(sharded, sparsifier, terms):
  found = given.arrays(7, n=16, d=6, m=16)
  sae = given.autoencoder(found, sparsifier(), losses=terms)
  sae.idle[...] = jnp.arange(16)
  graph, params, rest = nnx.split(sae, nnx.Param, ...)
  x = jnp.asarray(found["x"], jnp.float32)
  want = value_and_grads(graph, params, rest, x)
  mesh = common.mesh_of(jax.sharding.AxisType.Auto)
  put = lambda x, *spec: common.place(x, mesh, jax.P(*spec))
  if sharded == "rows":
    params, rest = jax.tree.map(put, (params, rest))
    x = put(x, ("x", "y"))
  else:
    over_latents = lambda v: (
      put(v, ("x", "y")) if v.shape[:1] == (16,) else put(v)
    )
    params, rest = jax.tree.map(over_latents, (params, rest))
    x = put(x)
  got = value_and_grads(graph, params, rest, x)
  for a, b in zip(*map(jax.tree.leaves, (got, want)), strict=True):
    close(a, b)


def test_latents_are_placed_by_their_metadata():
  mesh = common.mesh_of(jax.sharding.AxisType.Auto)
  with jax.set_mesh(mesh):
    sae = sparse_coding.Autoencoder(
      6,
      16,
      sparse_coding.TopK(3),
      latent_metadata={"out_sharding": ("x", None)},
      rngs=nnx.Rngs(0),
    )
  for parameter in (sae.dictionary, sae.kernel):
    assert parameter[...].sharding.spec == jax.P("x", None)


# What does not fit.

Autoencoder = functools.partial(sparse_coding.Autoencoder, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
  "make,message",
  [
    (lambda: Autoencoder(0, 4), "width must be a positive integer"),
    (lambda: Autoencoder(4, 2.0), "latents must be a positive integer"),
    (lambda: Autoencoder(4, 8, outputs=0), "outputs must be a positive"),
    (
      lambda: Autoencoder(4, 8, sparse_coding.ReLU(), solver=PURSUIT),
      "solver takes the place of",
    ),
    (
      lambda: Autoencoder(4, 8, score=sparse_coding.norm_aware),
      "score goes with a sparsifier that ranks",
    ),
    (lambda: Autoencoder(4, 8, tied=True, outputs=4), "tied goes without"),
    (
      lambda: Autoencoder(
        4,
        8,
        losses={DEAD: 1.0, sparse_coding.DeadLatents(2): 1.0},
      ),
      "losses must have names of their own",
    ),
    (
      lambda: sparse_coding.Crosscoder(2, 4, 8, outputs=4, rngs=nnx.Rngs(0)),
      "outputs are a crosscoder's own",
    ),
    (lambda: Autoencoder(4, 8)(jnp.ones((2, 5))), r"x must be \[..., 4\]"),
    (lambda: Autoencoder(4, 8)(jnp.ones(())), r"x must be \[..., 4\]"),
    (
      lambda: Autoencoder(4, 8)(jnp.ones((2, 4), jnp.int32)),
      "x must be floating",
    ),
    (
      lambda: Autoencoder(4, 8).encode(jnp.ones(4), gradient=jnp.ones(4)),
      "gradient goes with a score",
    ),
    (
      lambda: Autoencoder(
        4,
        8,
        sparse_coding.TopK(2),
        score=functools.partial(sparse_coding.gradient_aware, beta=1.0),
      ).encode(jnp.ones((2, 4)), gradient=jnp.ones(4)),
      r"gradient must be \[2, 4\]",
    ),
    (
      lambda: Autoencoder(4, 8, solver=PURSUIT).pre(jnp.ones(4)),
      "pre-activations are an encoder's",
    ),
    (
      lambda: Autoencoder(4, 8, sparse_coding.TopK(9)).encode(jnp.ones(4)),
      "k must be an integer from 0 to 8",
    ),
  ],
)
def test_what_does_not_fit(make, message):
  with pytest.raises(ValueError, match=message):
    make()


def test_a_new_one_may_be_donated():
  sae = sparse_coding.Autoencoder(D, M, rngs=nnx.Rngs(0))
  _, state = nnx.split(sae)
  run = jax.jit(
    lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0
  )
  assert jax.tree.leaves(run(state))


def test_nan_revives_no_latent():
  sae = sparse_coding.Autoencoder(D, M, rngs=nnx.Rngs(0))
  sae.idle[...] = jnp.full(M, 100)
  sae.loss(jnp.full((3, D), jnp.nan))
  assert (sae.idle[...] == 103).all()
