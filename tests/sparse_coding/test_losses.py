"""Terms of the loss and their gradients against the oracle; their limits."""

import functools
from types import SimpleNamespace

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax import sparse_coding
from sparsejax.sparse_coding import losses
from tests.oracles import sparse_coding as oracle
from tests.sparse_coding import given
from tests.sparse_coding.given import close
from tests.sparse_coding.given import D
from tests.sparse_coding.given import M
from tests.sparse_coding.given import N

IDLE = np.array([0, 9, 3, 7, 7, 0, 8, 2, 9])
DEAD = IDLE >= 7
CHUNKS = 3
KEY = jax.random.key(5)
PARAMETERS = ("encoder", "encoder_bias", "dictionary", "bias")


def forward(found, kind, **settings):
  return oracle.forward(kind, found, found["x"], **settings)


def check(got, grads, found, want, names=PARAMETERS):
  """A term against a function of the parameters in float64."""
  close(got, want(found))
  for name in names:
    at = lambda x, name=name: want({**found, name: x})
    # Differences of 1e-6 leave about 1e-9 of f64's digits.
    slope = oracle.gradient(at, found[name])
    close(grads.get(name, 0), slope, rtol=1e-4, atol=1e-4)


def frozen_error(found, kind, **settings):
  return found["x"] - forward(found, kind, **settings)["x_hat"]


@functools.cache
def of_top_k():
  """Every term that goes with a Code, in one program."""
  found = given.arrays(1)
  terms = (
    sparse_coding.squared_error,
    sparse_coding.normalized_error,
    sparse_coding.l1_loss,
    sparse_coding.flops_loss,
    sparse_coding.DeadLatents(dead_after=7),
    sparse_coding.ZipfAuxiliary(exponent=1.0, offset=0.5, k=3),
    sparse_coding.NestedPrefixes((2, 5, M)),
    sparse_coding.NestedBudgets((1, 3), (0.5, 2.0)),
    sparse_coding.AllBudgets(),
    sparse_coding.Orthogonality(CHUNKS),
  )
  sae = given.autoencoder(
    found, sparse_coding.TopK(4), losses=dict.fromkeys(terms, 1.0)
  )
  sae.idle[...] = jnp.asarray(IDLE, jnp.int32)
  return found, *given.parts(sae, found["x"], key=KEY)


@functools.cache
def of_batch_top_k():
  """The same of dense codes."""
  found = given.arrays(2)
  terms = (
    sparse_coding.l1_loss,
    sparse_coding.DeadLatents(dead_after=7, k=6),
    sparse_coding.NestedPrefixes((2, 5, M)),
    sparse_coding.NestedBudgets((1, 3)),
    sparse_coding.AllBudgets(3),
  )
  sae = given.autoencoder(
    found, sparse_coding.BatchTopK(2.5), losses=dict.fromkeys(terms, 1.0)
  )
  sae.idle[...] = jnp.asarray(IDLE, jnp.int32)
  return found, *given.parts(sae, found["x"])


def used_counts(z):
  return (z > 0).sum(axis=0)


def expected_counts(z):
  share = (np.arange(1, M + 1) + 0.5) ** -1.0
  return np.minimum(share / share.sum() * used_counts(z).sum(), len(z))


def term_of_top_k(name):
  run = lambda w: forward(w, "top_k", k=4)
  error = frozen_error(given.arrays(1), "top_k", k=4)
  z = run(given.arrays(1))["z"]
  permutation = jax.random.permutation(KEY, np.arange(M))
  return {
    "squared_error": lambda w: oracle.squared_error(w["x"], run(w)["x_hat"]),
    "normalized_error": lambda w: oracle.normalized_error(
      w["x"], run(w)["x_hat"]
    ),
    "l1_loss": lambda w: oracle.l1(run(w)["z"], w["dictionary"]),
    "flops_loss": lambda w: oracle.flops(run(w)["z"]),
    # k of its own is half the width, 2, not half the latents.
    "DeadLatents": lambda w: oracle.dead_auxiliary(
      error, run(w)["pre"], w["dictionary"], DEAD, D // 2
    ),
    "ZipfAuxiliary": lambda w: oracle.zipf_auxiliary(
      error,
      run(w)["pre"],
      w["dictionary"],
      used_counts(z),
      expected_counts(z),
      3,
    ),
    "NestedPrefixes": lambda w: oracle.nested_prefixes(
      w["x"], run(w)["z"], w["dictionary"], w["bias"], (2, 5, M)
    ),
    "NestedBudgets": lambda w: oracle.nested_budgets(
      w["x"], run(w)["pre"], w["dictionary"], w["bias"], (1, 3), (0.5, 2.0)
    ),
    "AllBudgets": lambda w: oracle.all_budgets(
      w["x"], run(w)["z"], w["dictionary"], w["bias"], 4
    ),
    "Orthogonality": lambda w: oracle.orthogonality(
      w["dictionary"], permutation.tolist(), CHUNKS
    ),
  }[name]


@pytest.mark.parametrize(
  "name",
  [
    "squared_error",
    "normalized_error",
    "l1_loss",
    "flops_loss",
    "DeadLatents",
    "ZipfAuxiliary",
    "NestedPrefixes",
    "NestedBudgets",
    "AllBudgets",
    "Orthogonality",
  ],
)
def test_terms_of_codes(name):
  found, values, grads = of_top_k()
  check(values[name], grads[name], found, term_of_top_k(name))


@pytest.mark.slow  # a second large program
@pytest.mark.parametrize(
  "name",
  ["l1_loss", "DeadLatents", "NestedPrefixes", "NestedBudgets", "AllBudgets"],
)
def test_terms_of_dense_codes(name):
  found, values, grads = of_batch_top_k()
  run = lambda w: forward(w, "batch_top_k", k=2.5)
  error = frozen_error(found, "batch_top_k", k=2.5)
  want = {
    "l1_loss": lambda w: oracle.l1(run(w)["z"], w["dictionary"]),
    # Fewer than six are dead: the loss is five sixths.
    "DeadLatents": lambda w: oracle.dead_auxiliary(
      error, run(w)["pre"], w["dictionary"], DEAD, 6
    ),
    "NestedPrefixes": lambda w: oracle.nested_prefixes(
      w["x"], run(w)["z"], w["dictionary"], w["bias"], (2, 5, M)
    ),
    "NestedBudgets": lambda w: oracle.nested_budgets(
      w["x"], run(w)["z"], w["dictionary"], w["bias"], (1, 3), (1.0, 1.0)
    ),
    "AllBudgets": lambda w: oracle.all_budgets(
      w["x"], oracle.top_k(run(w)["z"], 3), w["dictionary"], w["bias"], 3
    ),
  }
  check(values[name], grads[name], found, want[name])


def test_terms_of_a_gated_code():
  found = given.arrays(3)
  terms = dict.fromkeys(
    (
      sparse_coding.squared_error,
      sparse_coding.gate_l1,
      sparse_coding.gate_error,
    ),
    1.0,
  )
  sae = given.autoencoder(found, sparse_coding.Gated(M), losses=terms)
  values, grads = given.parts(sae, found["x"])
  names = (*PARAMETERS, "log_scale", "magnitude_bias")
  for i, name in enumerate(("squared_error", "gate_l1", "gate_error")):

    def want(w, i=i):
      run = forward(w, "gated")
      frozen = found["dictionary"], found["bias"]
      return oracle.gated_losses(
        w["x"], run["pre"], run["z"], w["dictionary"], w["bias"], *frozen
      )[i]

    check(values[name], grads[name], found, want, names)
  assert not grads["gate_error"]["dictionary"].any()
  assert not grads["gate_error"]["log_scale"].any()
  assert grads["gate_error"]["encoder"].any()


def test_l0_counts_and_its_gradient_is_of_the_thresholds_alone():
  found = given.arrays(4)
  sae = given.autoencoder(
    found,
    sparse_coding.JumpReLU(M, bandwidth=0.7),
    losses={sparse_coding.l0_loss: 1.0},
  )
  values, grads = given.parts(sae, found["x"])
  pre, theta = forward(found, "jump_relu")["pre"], found["theta"]
  close(values["l0_loss"], oracle.l0_loss(pre, theta))
  _, slope = oracle.step_gradient(pre, theta, 0.7, np.full(pre.shape, 1 / N))
  assert np.abs(slope).max() > 0.1
  grads = grads["l0_loss"]
  close(grads.pop("log_theta"), slope * theta)
  assert not any(x.any() for x in grads.values())


# Limits: what a setting makes of a term.


def a_pass(code, found, key=None, idle=None):
  """A Pass of a code, without a program of its own."""
  sae = given.autoencoder(found, sparse_coding.TopK(3))
  sae.idle[...] = jnp.zeros(M, jnp.int32) if idle is None else idle
  x = jnp.asarray(found["x"], jnp.float32)
  return losses.Pass(sae, x, x, code, sae.decode(code), key)


def test_one_prefix_one_budget_and_one_chunk_are_the_plain_terms():
  found = given.arrays(6)
  sae = given.autoencoder(found, sparse_coding.TopK(1))
  x = jnp.asarray(found["x"], jnp.float32)
  seen = a_pass(sae.encode(x), found)
  plain = losses.squared_error(seen)
  for term in (
    losses.NestedPrefixes((M,)),
    losses.NestedBudgets((1,)),
    losses.AllBudgets(),
  ):
    close(term(seen), plain, 1e-6)
  atoms = found["dictionary"]
  unit = atoms / np.linalg.norm(atoms, axis=1, keepdims=True)
  cosines = unit @ unit.T - 9 * np.eye(M)
  close(losses.Orthogonality()(seen), (cosines.max(1) ** 2).mean())


def test_orthogonality_of_orthonormal_and_of_equal_atoms():
  @jax.jit
  @jax.value_and_grad
  def term(atoms):
    return losses.Orthogonality()(SimpleNamespace(atoms=lambda: atoms))

  orthonormal = np.eye(2 * M, dtype=np.float32)
  assert term(orthonormal)[0] == 0
  twice = np.concatenate([orthonormal[::2], 3 * orthonormal[::2]])
  close(term(twice)[0], 1.0)
  # Nor is an atom of zeros NaN.
  twice[0] = 0
  assert np.isfinite(term(twice)[1]).all()


def test_dead_latents():
  found = given.arrays(7)
  code = sparse_coding.top_k(jnp.asarray(found["x"] @ found["encoder"].T), 3)
  terms = [(10,), (10**9,), (7,), (7, D // 2), (7, M // 2)]

  @jax.jit
  def run(idle):
    seen = a_pass(code, found, idle=idle)
    return [losses.DeadLatents(*setting)(seen) for setting in terms]

  later, never, plain, of_width, of_latents = run(jnp.asarray(IDLE, jnp.int32))
  assert later == never == 0 and plain > 0
  # As many are taken as half of the width, however large the dictionary is.
  assert plain == of_width and plain != of_latents


def test_the_auxiliary_counts_once_and_reads_no_bias():
  # In the released trainers its weight was once applied twice, its number of
  # latents taken from the dictionary, and the bias added again.
  found = given.arrays(8)
  term = sparse_coding.DeadLatents(7)
  plain = {sparse_coding.squared_error: 1.0}
  total = {}
  for weight in (0.0, 1.0, 3.0):
    sae = given.autoencoder(
      found, sparse_coding.TopK(3), losses={**plain, term: weight}
    )
    sae.idle[...] = jnp.asarray(IDLE, jnp.int32)
    total[weight], parts = sae.loss(jnp.asarray(found["x"], jnp.float32))
  close(total[1.0] - total[0.0], parts["DeadLatents"], 1e-4)
  close(total[3.0] - total[0.0], 3 * parts["DeadLatents"], 1e-4)
  pre = forward(found, "top_k", k=3)["pre"]
  error = frozen_error(found, "top_k", k=3)
  right = oracle.dead_auxiliary(error, pre, found["dictionary"], DEAD)
  close(parts["DeadLatents"], right)
  chosen = oracle.top_k(np.where(DEAD, pre, -np.inf), D // 2)
  again = oracle.decode(chosen, found["dictionary"], found["bias"])
  spread = ((error - error.mean(0)) ** 2).sum()
  with_bias = ((error - again) ** 2).sum() / spread
  assert abs(with_bias - right) > 0.01


def test_nothing_is_computed_while_none_is_dead():
  found = given.arrays(7)
  sae = given.autoencoder(
    found,
    sparse_coding.TopK(3),
    losses={sparse_coding.DeadLatents(7): 1.0},
  )
  graph, state = nnx.split(sae)
  loss = lambda state, x: nnx.merge(graph, state, copy=True).loss(x)[0]
  text = str(jax.make_jaxpr(loss)(state, jnp.ones((N, D))))
  assert " cond[" in text


def test_one_row_that_leaves_nothing_to_explain():
  found = given.arrays(7, n=1)
  sae = given.autoencoder(
    found,
    sparse_coding.TopK(3),
    losses={sparse_coding.DeadLatents(7): 1.0},
  )
  sae.idle[...] = jnp.asarray(IDLE, jnp.int32)
  values, grads = given.parts(sae, found["x"])
  assert values["DeadLatents"] == 0
  assert all(np.isfinite(x).all() for x in grads["DeadLatents"].values())


PLAIN = (
  losses.squared_error,
  losses.normalized_error,
  losses.l1_loss,
  losses.AllBudgets(),
  losses.NestedBudgets((1, 3)),
  losses.NestedPrefixes((2, M)),
)


@functools.partial(jax.jit, static_argnames="graph")
def run(graph, state, x):
  return nnx.merge(graph, state, copy=True).loss(x)[1]


def test_nan_makes_every_loss_nan():
  found = given.arrays(9)
  x = jnp.asarray(found["x"], jnp.float32).at[1, 0].set(jnp.nan)
  sae = given.autoencoder(
    found, sparse_coding.TopK(3), losses=dict.fromkeys(PLAIN, 1.0)
  )
  got = run(*nnx.split(sae), x)
  assert len(got) == len(PLAIN) and all(map(np.isnan, got.values()))


def test_bf16_sums_in_f32():
  found = given.arrays(10, n=40)
  x = jnp.asarray(found["x"], jnp.bfloat16)
  sae = given.autoencoder(
    found, sparse_coding.TopK(3), losses=dict.fromkeys(PLAIN, 1.0)
  )
  graph, state = nnx.split(sae)
  wide = run(graph, state, x.astype(jnp.float32))
  narrow = lambda x: (
    x.astype(jnp.bfloat16) if jnp.issubdtype(x.dtype, jnp.floating) else x
  )
  got = run(graph, jax.tree.map(narrow, state), x)
  for name, value in got.items():
    assert value.dtype == jnp.float32
    close(value, wide[name], rtol=0.03)


@pytest.mark.parametrize(
  "make,message",
  [
    (lambda: losses.DeadLatents(0), "dead_after must be positive"),
    (lambda: losses.NestedPrefixes(()), "sizes must be positive"),
    (lambda: losses.NestedPrefixes((4, 4)), "sizes must rise"),
    (lambda: losses.NestedBudgets((3, 2)), "ks must rise"),
    (lambda: losses.NestedBudgets((1, 2), (1.0,)), "weights must be 2"),
    (lambda: losses.AllBudgets(0), "k must be positive"),
    (lambda: losses.Orthogonality(0), "chunks must be positive"),
  ],
)
def test_settings_that_do_not_fit(make, message):
  with pytest.raises(ValueError, match=message):
    make()


@pytest.mark.parametrize(
  "term,message",
  [
    (losses.NestedPrefixes((2, M + 1)), f"sizes must end with {M}"),
    (losses.NestedPrefixes((2,)), f"sizes must end with {M}"),
    (losses.NestedBudgets((1, 4)), "k must be an integer from 0 to 3"),
    (losses.AllBudgets(4), "k must be an integer from 0 to 3"),
    (losses.DeadLatents(1, M + 1), f"from 0 to {M}"),
    (losses.Orthogonality(2), "chunks must divide"),
    (losses.Orthogonality(M), "chunks must divide"),
    (losses.Orthogonality(3), "key must be given"),
    (losses.ZipfAuxiliary(offset=-1.0), "offset must be above -1"),
    (losses.ZipfAuxiliary(exponent=-1.0), "exponent must be at least 0"),
    (losses.l0_loss, "l0_loss goes with JumpReLU, got TopK"),
    (losses.gate_l1, "gate_l1 goes with Gated"),
    (losses.gate_error, "gate_error goes with Gated"),
  ],
)
def test_terms_that_do_not_fit(term, message):
  found = given.arrays()
  code = sparse_coding.top_k(jnp.asarray(found["x"] @ found["encoder"].T), 3)
  with pytest.raises(ValueError, match=message):
    term(a_pass(code, found, idle=jnp.full(M, 9)))


def test_a_dense_code_has_no_budgets_of_its_own():
  found = given.arrays()
  with pytest.raises(ValueError, match="k must be given where codes are dense"):
    losses.AllBudgets()(a_pass(jnp.ones((N, M)), found))


def test_prefixes_as_shares_do_not_depend_on_the_scale():
  sae = sparse_coding.Autoencoder(
    D,
    M,
    losses={losses.NestedPrefixes((2, M), normalized=True): 1.0},
    rngs=nnx.Rngs(0),
  )
  x = jax.random.normal(jax.random.key(0), (9, D))
  loss, larger = (sae.loss(scale * x)[0] for scale in (1.0, 100.0))
  close(loss, larger)
  sae.losses = ((losses.NestedPrefixes((2, M)), 1.0),)
  error, _ = sae.loss(x)
  close(loss, error * len(x) / ((x - x.mean(0)) ** 2).sum())


def test_all_budgets_in_float64():
  with jax.enable_x64(True):
    sae = sparse_coding.hierarchical_top_k_sae(
      D, M, 3, dtype=jnp.float64, rngs=nnx.Rngs(0)
    )
    x = jax.random.normal(jax.random.key(0), (9, D), jnp.float64)
    loss = lambda sae: sae.loss(x)[0]
    grads = nnx.grad(loss)(sae)
    assert grads.dictionary[...].dtype == jnp.float64
    wide = grads.dictionary[...]
  assert np.isfinite(wide).all()
