"""Sparsifiers as modules: against the oracle, in training and after it."""

from flax import nnx
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sparsejax import sparse_coding
from sparsejax.sparse_coding import selection
from tests.oracles import sparse_coding as oracle
from tests.sparse_coding import given
from tests.sparse_coding.given import close

N, M = 6, 9
FOUND = given.arrays(0)
PRE = np.random.default_rng(1).normal(size=(N, M)).astype(np.float32)


def dense(code):
  return code.dense() if isinstance(code, sparse_coding.Code) else code


def jump_relu():
  made = sparse_coding.JumpReLU(M, threshold=FOUND["theta"])
  close(made.threshold, FOUND["theta"])
  return made


def gated():
  made = sparse_coding.Gated(M)
  for name, source in (
    ("gate_bias", "encoder_bias"),
    ("log_scale", "log_scale"),
    ("magnitude_bias", "magnitude_bias"),
  ):
    getattr(made, name)[...] = jnp.asarray(FOUND[source], jnp.float32)
  return made


def oracle_gated(pre):
  biases = [FOUND[n] for n in ("encoder_bias", "log_scale", "magnitude_bias")]
  return oracle.gated(pre + biases[0], *biases)


COUNTS = np.array([0, 1, 2, 3, 4, 5, 6, 1, 1])


@pytest.mark.parametrize(
  "make,want",
  [
    (sparse_coding.ReLU, oracle.relu),
    (lambda: sparse_coding.TopK(3), lambda p: oracle.top_k(p, 3)),
    (
      lambda: sparse_coding.BatchTopK(2.5),
      lambda p: oracle.batch_top_k(p, 2.5),
    ),
    (
      lambda: sparse_coding.FeatureChoice(COUNTS),
      lambda p: oracle.feature_choice(p, COUNTS),
    ),
    (jump_relu, lambda p: oracle.jump_relu(p, FOUND["theta"])),
    (gated, oracle_gated),
  ],
)
def test_codes(make, want):
  got = dense(make()(jnp.asarray(PRE)))
  close(got, want(PRE))
  # Leading axes are rows of a batch all the same.
  stacked = dense(make()(jnp.asarray(PRE).reshape(2, 3, M)))
  np.testing.assert_array_equal(stacked.reshape(N, M), got)


@pytest.mark.parametrize(
  "make",
  [
    sparse_coding.ReLU,
    lambda: sparse_coding.TopK(3),
    lambda: sparse_coding.TopK(3, schedule=lambda step: 5),
    lambda: sparse_coding.BatchTopK(2.5),
    lambda: sparse_coding.FeatureChoice(COUNTS),
    jump_relu,
    gated,
  ],
)
def test_nan_is_in_the_code(make):
  made = make()
  pre = jnp.asarray(PRE).at[1, 2].set(jnp.nan)
  code = dense(made(pre))
  assert jnp.isnan(code[1, 2]) and jnp.isnan(code).sum() == 1
  made.eval()
  assert jnp.isnan(dense(made(pre))[1, 2])


def test_top_k_of_all_latents_is_relu():
  np.testing.assert_array_equal(
    dense(sparse_coding.TopK(M)(jnp.asarray(PRE))), oracle.relu(PRE)
  )
  none = sparse_coding.TopK(0)(jnp.asarray(PRE))
  assert none.values.shape == (N, 0) and not none.dense().any()


def test_norm_aware_choice_stays_where_atoms_are_rescaled():
  rng = np.random.default_rng(2)
  atoms = rng.normal(size=(M, 5)).astype(np.float32)
  scale = np.exp(rng.normal(size=M)).astype(np.float32)
  chosen = lambda pre, atoms: sparse_coding.TopK(3)(
    jnp.asarray(pre), selection.norm_aware(jnp.asarray(atoms))
  )
  code, other = chosen(PRE, atoms), chosen(PRE * scale, atoms / scale[:, None])
  np.testing.assert_array_equal(other.dense() != 0, code.dense() != 0)
  close(other.dense(), code.dense() * scale)
  want = oracle.top_k(PRE, 3, oracle.norm_scores(PRE, atoms))
  close(code.dense(), want)


def test_a_large_beta_chooses_what_matters_downstream():
  atoms, slope = jnp.eye(3), jnp.array([0.0, 0.0, 1.0])
  pre = jnp.array([3.0, 2.0, 0.5])
  chosen = lambda beta: sparse_coding.TopK(1)(
    pre, selection.gradient_aware(atoms, slope, beta)
  )
  assert chosen(0.0).dense().tolist() == [3, 0, 0]
  # The value is the plain one, whatever the score.
  assert chosen(10.0).dense().tolist() == [0, 0, 0.5]


# BatchTopK: the threshold it has after training.


def test_threshold_is_a_mean_over_batches():
  made = sparse_coding.BatchTopK(2.5, rate=0.25)
  want = None
  for scale in (1.0, 0.5, 0.0, 2.0):  # zeros change nothing
    z = made(jnp.asarray(PRE) * scale)
    want = oracle.running_threshold(want, z, 0.25)
    close(made.threshold[...], want, 1e-6)
  before = made.threshold[...]
  made.eval()
  code = made(jnp.asarray(PRE))
  close(code, oracle.at_threshold(PRE, want))
  assert made.threshold[...] == before
  # A row's code is its own now.
  np.testing.assert_array_equal(made(jnp.asarray(PRE[:1]))[0], code[0])


def test_threshold_that_no_batch_has_set():
  made = sparse_coding.BatchTopK(2.5)
  made(jnp.asarray(-np.abs(PRE)))
  made.eval()
  np.testing.assert_array_equal(made(jnp.asarray(PRE)), oracle.relu(PRE))


# TopK with a schedule.


def test_k_falls_along_its_schedule_without_compiling_again():
  made = sparse_coding.TopK(2, schedule=optax.linear_schedule(M, 2, 4))
  positive = jnp.abs(jnp.asarray(PRE)) + 1

  traced = []

  @nnx.jit
  def run(made, pre):
    traced.append(pre)
    return (made(pre) != 0).sum(-1)

  # 7.25 and 3.75 round to 7 and 4, 5.5 to the even 6.
  assert [run(made, positive)[0].item() for _ in range(6)] == [9, 7, 6, 4, 2, 2]
  assert len(traced) == 1
  made.eval()
  code = made(positive)
  assert isinstance(code, sparse_coding.Code) and code.values.shape == (N, 2)
  assert made.steps[...] == 6


@pytest.mark.parametrize(
  "make,message",
  [
    (
      lambda: sparse_coding.TopK(M + 1)(PRE),
      "k must be an integer from",
    ),
    (lambda: sparse_coding.TopK(2.0)(PRE), "k must be an integer"),
    (lambda: sparse_coding.BatchTopK(M + 1)(PRE), "k must be from 0 to 9"),
    (lambda: sparse_coding.FeatureChoice([1, 2])(PRE), "counts must be"),
    (lambda: sparse_coding.JumpReLU(M, bandwidth=0), "bandwidth must be"),
    (lambda: sparse_coding.JumpReLU(M, threshold=0.0), "threshold must be"),
    (lambda: sparse_coding.BatchTopK(2, rate=0), "rate must be"),
  ],
)
def test_settings_that_do_not_fit(make, message):
  with pytest.raises(ValueError, match=message):
    make()


def test_bf16():
  pre = jnp.asarray(PRE, jnp.bfloat16)
  for made in (jump_relu(), gated(), sparse_coding.BatchTopK(2)):
    assert made(pre).dtype == jnp.bfloat16


def test_vmap_of_stacked_sparsifiers():
  @nnx.vmap
  def make(threshold):
    return sparse_coding.JumpReLU(M, threshold=threshold)

  thresholds = jnp.array([0.1, 0.5])
  stacked = make(thresholds)
  got = nnx.vmap(lambda made, pre: made(pre), in_axes=(0, None))(
    stacked, jnp.asarray(PRE)
  )
  for i in range(2):
    want = oracle.jump_relu(PRE, np.full(M, float(thresholds[i])))
    close(got[i], want)
