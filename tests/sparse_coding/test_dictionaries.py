"""Atoms of norm one, norms that are folded in, and thresholds for all."""

import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sparsejax import sparse_coding
from tests.sparse_coding import given
from tests.sparse_coding.given import close
from tests.sparse_coding.given import D
from tests.sparse_coding.given import M

FOUND = given.arrays(0, n=40)
X = jnp.asarray(FOUND["x"], jnp.float32)


def norms(x):
  return np.linalg.norm(np.asarray(x, np.float64), axis=-1)


def step_of(tx):
  @jax.jit
  def step(params, state, grads):
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  return step


@pytest.mark.parametrize("name", ["adam", "sgd"])
def test_atoms_have_norm_one_after_every_step(name):
  rng = np.random.default_rng(1)
  params = {
    "one": {"dictionary": jnp.eye(3, 4), "kernel": jnp.ones((3, 4))},
    "stacked": {"dictionary": jnp.ones((2, 3, 4))},  # two autoencoders'
  }
  tx = sparse_coding.unit_norm(getattr(optax, name)(0.3))
  step, state = step_of(tx), tx.init(params)
  for _ in range(5):
    grads = jax.tree.map(
      lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), params
    )
    params, state = step(params, state, grads)
    for each in params.values():
      np.testing.assert_allclose(norms(each["dictionary"]), 1, atol=1e-6)
  assert abs(norms(params["one"]["kernel"]) - 1).max() > 0.1


def test_a_step_is_one_along_the_sphere():
  rng = np.random.default_rng(2)
  atoms = rng.normal(size=(M, D))
  atoms /= norms(atoms)[:, None]
  grads = rng.normal(size=(M, D))
  params = {"dictionary": jnp.asarray(atoms, jnp.float32)}
  tx = sparse_coding.unit_norm(optax.sgd(0.3))
  got, _ = step_of(tx)(
    params, tx.init(params), {"dictionary": jnp.asarray(grads, jnp.float32)}
  )
  across = grads - (grads * atoms).sum(-1, keepdims=True) * atoms
  want = atoms - 0.3 * across
  want /= norms(want)[:, None]
  close(got["dictionary"], want, 1e-6, 1e-6)


def test_nothing_along_the_atoms_reaches_the_moments():
  params = {"dictionary": jnp.eye(2)}
  tx = sparse_coding.unit_norm(optax.trace(0.9))
  _, state = tx.update({"dictionary": 5 * jnp.eye(2)}, tx.init(params), params)
  assert not any(x.any() for x in jax.tree.leaves(state))


def test_in_an_nnx_optimizer_and_of_a_crosscoder():
  both = sparse_coding.Crosscoder(
    2, 4, 6, sparse_coding.TopK(2), rngs=nnx.Rngs(0)
  )
  tx = sparse_coding.unit_norm(optax.adam(0.1))
  optimizer = nnx.Optimizer(both, tx, wrt=nnx.Param)
  x = jax.random.normal(jax.random.key(0), (5, 2, 4))

  @nnx.jit
  def step(both, optimizer):
    grads = nnx.grad(lambda both: both.loss(x)[0])(both)
    optimizer.update(both, grads)

  before = both.dictionary[...]
  for _ in range(3):
    step(both, optimizer)
    # All sites of an atom together.
    np.testing.assert_allclose(norms(both.dictionary[...]), 1, atol=1e-6)
  assert abs(both.dictionary[...] - before).max() > 0.01


def test_an_atom_of_zeros_and_bf16():
  params = {"dictionary": jnp.zeros((2, 3), jnp.bfloat16).at[0].set(1)}
  tx = sparse_coding.unit_norm(optax.sgd(1.0))
  grads = jax.tree.map(jnp.zeros_like, params)
  updates, _ = tx.update(grads, tx.init(params), params)
  atoms = optax.apply_updates(params, updates)["dictionary"]
  assert atoms.dtype == jnp.bfloat16 and not atoms[1].any()
  np.testing.assert_allclose(norms(atoms[0]), 1, atol=0.01)


def test_unit_norm_of_bad_trees():
  tx = sparse_coding.unit_norm(optax.sgd(1.0))
  with pytest.raises(ValueError, match="name must end a path of"):
    tx.init({"dictionary_of": jnp.ones(3)})
  params = {"dictionary": jnp.eye(2)}
  with pytest.raises(ValueError, match="params must be given"):
    tx.update(params, tx.init(params))


# Folding.


@pytest.mark.parametrize(
  "make,settings",
  [
    (sparse_coding.ReLU, {}),
    (functools.partial(sparse_coding.JumpReLU, M), {}),
    (functools.partial(sparse_coding.Gated, M), {}),
    (lambda: sparse_coding.FeatureChoice(np.arange(M)), {}),
    (lambda: sparse_coding.TopK(3), dict(score=sparse_coding.norm_aware)),
  ],
)
def test_folded_norms_leave_the_function(make, settings):
  sae = given.autoencoder(FOUND, make(), **settings)
  made = sparse_coding.fold_norms(sae)
  np.testing.assert_allclose(made.norms(), 1, atol=1e-6)
  close(made(X), sae(X), 1e-4, 1e-5)
  assert abs(sae.norms() - 1).max() > 0.1  # the first is as it was
  dense = lambda z: getattr(z, "dense", lambda: z)()
  close(dense(made.encode(X)), dense(sae.encode(X)) * sae.norms(), 1e-4, 1e-5)


def test_what_does_not_fold():
  for sparsifier in (sparse_coding.TopK(3), sparse_coding.BatchTopK(3)):
    with pytest.raises(ValueError, match="choose each latent by itself"):
      sparse_coding.fold_norms(given.autoencoder(FOUND, sparsifier))
  with pytest.raises(ValueError, match="got a tied one"):
    sparse_coding.fold_norms(given.autoencoder(FOUND, tied=True))


def test_an_atom_of_zeros_folds():
  sae = given.autoencoder(FOUND)
  sae.dictionary[...] = sae.dictionary[...].at[0].set(0)
  close(sparse_coding.fold_norms(sae)(X), sae(X))


# Export.


@pytest.mark.parametrize(
  "make,settings",
  [
    (lambda: sparse_coding.TopK(3), {}),
    (lambda: sparse_coding.TopK(3), dict(score=sparse_coding.norm_aware)),
    (lambda: sparse_coding.BatchTopK(2.5), {}),
    (lambda: sparse_coding.TopK(M), {}),  # all that is positive
    (lambda: sparse_coding.TopK(0), {}),
  ],
)
def test_export_keeps_the_mean_l0(make, settings):
  sae = given.autoencoder(FOUND, make(), **settings)
  made = sparse_coding.to_jump_relu(sae, X)
  code = sae.encode(X)
  values = getattr(code, "values", code)
  want = (values != 0).sum() / len(X)
  z = made.encode(X)
  assert isinstance(made.sparsifier, sparse_coding.JumpReLU)
  # The same number of pairs, but for rounding of the threshold's logarithm.
  np.testing.assert_allclose((z != 0).sum() / len(X), want, rtol=0.02)
  if settings:
    folded = sparse_coding.fold_norms(made)
    threshold = folded.sparsifier.threshold
    np.testing.assert_allclose(threshold, threshold[0], rtol=1e-5)
    close(folded(X), made(X), 1e-4, 1e-5)


def test_export_of_batch_top_k_has_the_same_codes():
  sae = given.autoencoder(FOUND, sparse_coding.BatchTopK(2.5))
  code = sae.encode(X)
  before = sae.sparsifier.threshold[...]
  np.testing.assert_array_equal(
    sparse_coding.to_jump_relu(sae, X).encode(X), code
  )
  assert sae.sparsifier.threshold[...] == before
  # The threshold of training: after one batch its smallest value, excluded.
  made = sparse_coding.to_jump_relu(sae, threshold=before)
  sae.eval()
  close(made.encode(X), sae.encode(X))


def test_export_of_other_inputs_is_within_five_percent():
  rng = np.random.default_rng(3)
  x, other = jnp.asarray(rng.normal(size=(2, 4000, D)), jnp.float32)
  sae = given.autoencoder(FOUND, sparse_coding.TopK(2))
  active = lambda code: (code != 0).sum() / len(x)
  got = active(sparse_coding.to_jump_relu(sae, x).encode(other))
  np.testing.assert_allclose(got, active(sae.encode(other).values), rtol=0.05)


def test_what_is_not_exported():
  with pytest.raises(ValueError, match="must have a TopK or a BatchTopK"):
    sparse_coding.to_jump_relu(given.autoencoder(FOUND), X)
  sae = given.autoencoder(FOUND, sparse_coding.TopK(3))
  for setting in ({}, dict(x=X, threshold=1.0)):
    with pytest.raises(ValueError, match="x or threshold must be given"):
      sparse_coding.to_jump_relu(sae, **setting)
  score = functools.partial(sparse_coding.gradient_aware, beta=1.0)
  sae = given.autoencoder(FOUND, sparse_coding.TopK(3), score=score)
  with pytest.raises(ValueError, match="score must be norm_aware or None"):
    sparse_coding.to_jump_relu(sae, X)


def test_to_jump_relu_of_a_threshold_that_no_batch_set():
  sae = sparse_coding.Autoencoder(
    D, M, sparse_coding.BatchTopK(2), rngs=nnx.Rngs(0)
  )
  threshold = sae.sparsifier.threshold[...]
  assert threshold < 0
  made = sparse_coding.to_jump_relu(sae, threshold=threshold)
  x = jax.random.normal(jax.random.key(0), (7, D))
  close(made.encode(x), jax.nn.relu(made.pre(x)))
  with pytest.raises(ValueError, match="threshold must not be negative"):
    sparse_coding.JumpReLU(2, threshold=jnp.array([-1.0, 1.0]))
