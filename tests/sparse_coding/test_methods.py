"""Published autoencoders: their parts, their limits, and what they recover."""

import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax import sparse_coding
from tests.oracles import sparse_coding as oracle
from tests.sparse_coding import given
from tests.sparse_coding.given import close
from tests.sparse_coding.given import D
from tests.sparse_coding.given import M
from tests.sparse_coding.given import N
from tests.sparse_coding.training import dense

BOTH = ["normalized_error", "DeadLatents"]
ZIPF = ["normalized_error", "ZipfAuxiliary"]


@pytest.mark.parametrize(
  "make,names",
  [
    (
      functools.partial(sparse_coding.l1_sae, weight=0.1),
      ["squared_error", "l1_loss"],
    ),
    (
      functools.partial(sparse_coding.gated_sae, weight=0.1),
      ["squared_error", "gate_l1", "gate_error"],
    ),
    (
      functools.partial(sparse_coding.jump_relu_sae, weight=0.1),
      ["squared_error", "l0_loss"],
    ),
    (functools.partial(sparse_coding.top_k_sae, k=3), BOTH),
    (functools.partial(sparse_coding.batch_top_k_sae, k=2.5), BOTH),
    (functools.partial(sparse_coding.mutual_choice_sae, k=2.5), ZIPF),
    (functools.partial(sparse_coding.feature_choice_sae, k=2, rows=N), ZIPF),
    (functools.partial(sparse_coding.gradient_sae, k=3, beta=1.0), BOTH),
    (functools.partial(sparse_coding.llama_scope_sae, k=3, steps=9), BOTH),
    (
      functools.partial(sparse_coding.matryoshka_sae, k=2, sizes=(3, M)),
      ["NestedPrefixes", "DeadLatents"],
    ),
    (functools.partial(sparse_coding.msae, ks=[1, 3]), ["NestedBudgets"]),
    (
      functools.partial(sparse_coding.hierarchical_top_k_sae, k=3),
      ["AllBudgets"],
    ),
    (
      functools.partial(sparse_coding.ort_sae, k=2, chunks=3),
      [*BOTH, "Orthogonality"],
    ),
    (functools.partial(sparse_coding.mp_sae, k=3), ["squared_error"]),
    (
      functools.partial(sparse_coding.ista_sae, weight=0.1, steps=3),
      ["squared_error"],
    ),
  ],
)
def test_parts(make, names):
  sae = make(D, M, rngs=nnx.Rngs(0))
  graph, state = nnx.split(sae)

  def run(state, x):
    sae = nnx.merge(graph, state, copy=True)
    return sae.loss(x, key=jax.random.key(0))[1], dense(sae.encode(x))

  parts, code = jax.eval_shape(run, state, jnp.ones((N, D)))
  assert sorted(parts) == sorted(names)
  assert code.shape == (N, M)
  weights = {
    sparse_coding.losses.name(term): weight for term, weight in sae.losses
  }
  assert weights.get("DeadLatents", 1 / 32) == 1 / 32


def x_and_atoms():
  found = given.arrays(0)
  unit = found["dictionary"] / oracle.norms(found["dictionary"])[:, None]
  return jnp.asarray(found["x"], jnp.float32), unit


def test_codes_of_solvers():
  x, unit = x_and_atoms()
  set_atoms = lambda sae: sae.dictionary.set_value(
    jnp.asarray(unit, jnp.float32)
  )
  sae = sparse_coding.mp_sae(D, M, 3, rngs=nnx.Rngs(0))
  set_atoms(sae)
  want = oracle.matching_pursuit(x, unit, np.zeros(D), 3)[0]
  close(sae.encode(x), want)
  assert sae.kernel is None and sae.encoder_bias is None
  sae = sparse_coding.ista_sae(D, M, weight=0.3, steps=5, rngs=nnx.Rngs(0))
  set_atoms(sae)
  close(sae.encode(x), oracle.ista(x, unit, 0.3, 5), 1e-4)


def test_beta_of_zero_is_top_k():
  x, _ = x_and_atoms()
  slope = jnp.ones_like(x)
  make = lambda method, **settings: method(
    D, M, 3, rngs=nnx.Rngs(0), **settings
  )
  want = make(sparse_coding.top_k_sae).encode(x)
  zero = make(sparse_coding.gradient_sae, beta=0.0)
  np.testing.assert_array_equal(
    zero.encode(x, gradient=slope).dense(), want.dense()
  )
  large = make(sparse_coding.gradient_sae, beta=100.0)
  assert (large.encode(x, gradient=slope).dense() != want.dense()).any()
  # After training there may be no gradient to look at.
  np.testing.assert_array_equal(large.encode(x).dense(), want.dense())


def test_llama_scope_begins_with_all_latents():
  sae = sparse_coding.llama_scope_sae(D, M, 3, steps=9, rngs=nnx.Rngs(0))
  sae.encoder_bias[...] += 9  # all are positive
  x, _ = x_and_atoms()
  kept = lambda: (dense(sae.encode(x)) != 0).sum(-1).tolist()
  assert kept() == [M] * N
  sae.sparsifier.steps[...] = jnp.int32(9)
  assert kept() == [3] * N


def test_feature_choice_gives_each_latent_its_rows():
  sae = sparse_coding.feature_choice_sae(
    D, M, 2, rows=N, exponent=1.0, rngs=nnx.Rngs(0)
  )
  counts = sparse_coding.zipf_counts(2 * N, M, exponent=1.0, most=N)
  sae.encoder_bias[...] += 9
  x, _ = x_and_atoms()
  np.testing.assert_array_equal((sae.encode(x) != 0).sum(0), counts)


def test_further_settings_are_those_of_an_autoencoder():
  sae = sparse_coding.top_k_sae(D, M, 3, outputs=4, skip=True, rngs=nnx.Rngs(0))
  assert jax.eval_shape(sae, jnp.ones((N, D))).shape == (N, 4)
