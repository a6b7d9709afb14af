"""Choices over batches, and thresholds, against the oracle."""

import functools

from hypothesis import given
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.sparse_coding import selection
from tests import common
from tests.oracles import sparse_coding as oracle

N, M = 7, 5
batch_top_k = jax.jit(selection.batch_top_k, static_argnames="k")
mutual_choice = jax.jit(selection.mutual_choice)  # any total in one program
feature_choice = jax.jit(selection.feature_choice)


def pre_of(seed, n=N, m=M):
  """With ties and zeros: sixteenths."""
  rng = np.random.default_rng(seed)
  return rng.integers(-16, 16, (n, m)).astype(np.float32) / 16


@pytest.mark.parametrize("k", [0, 1, 1.3, 2.5, M])
def test_batch_top_k(k):
  pre = pre_of(0)
  got = batch_top_k(pre, k)
  np.testing.assert_array_equal(got, oracle.batch_top_k(pre, k))
  # All leading axes are one batch.
  stacked = batch_top_k(pre.reshape(1, N, M), k)
  np.testing.assert_array_equal(stacked[0], got)


@given(total=st.integers(0, N * M), seed=st.integers(0, 9))
def test_mutual_choice(total, seed):
  pre = pre_of(seed)
  got = mutual_choice(pre, total)
  np.testing.assert_array_equal(got, oracle.mutual_choice(pre, total))
  positive = mutual_choice(np.abs(pre) + 1, total)
  assert (positive != 0).sum() == total


@given(
  counts=st.lists(st.integers(0, N), min_size=M, max_size=M),
  seed=st.integers(0, 9),
)
def test_feature_choice(counts, seed):
  pre, counts = pre_of(seed), np.array(counts, np.int32)
  got = feature_choice(pre, counts)
  np.testing.assert_array_equal(got, oracle.feature_choice(pre, counts))
  positive = feature_choice(np.abs(pre) + 1, counts)
  np.testing.assert_array_equal((positive != 0).sum(0), counts)


def test_gradients_are_of_what_is_kept():
  pre = common.distinct(np.random.default_rng(1), (N, M))
  for choose in (
    functools.partial(mutual_choice, total=9),
    functools.partial(feature_choice, counts=jnp.arange(M)),
  ):
    grad = jax.grad(lambda pre, choose=choose: choose(pre).sum())(pre)
    np.testing.assert_array_equal(grad, choose(pre) != 0)


def test_nan_is_kept_and_takes_no_place_of_others():
  pre = pre_of(3)
  pre[2, 1] = np.nan
  for got, plain in (
    (mutual_choice(pre, 6), oracle.mutual_choice(np.nan_to_num(pre), 6)),
    (
      feature_choice(pre, np.full(M, 2)),
      oracle.feature_choice(np.nan_to_num(pre), [2] * M),
    ),
    (selection.above(pre, 0.0), oracle.relu(np.nan_to_num(pre))),
  ):
    assert np.isnan(got[2, 1])
    np.testing.assert_array_equal(np.nan_to_num(got), plain)


@given(
  total=st.integers(0, 400),
  latents=st.integers(1, 30),
  exponent=st.sampled_from([0.0, 0.5, 1.0, 2.0]),
  offset=st.sampled_from([0.0, 0.5, 7.0]),
  most=st.integers(0, 40),
)
def test_zipf_counts(total, latents, exponent, offset, most):
  setting = dict(exponent=exponent, offset=offset, most=most)
  got = selection.zipf_counts(total, latents, **setting)
  assert got.dtype == np.int32
  assert got.sum() == min(total, latents * most)
  assert got.max() <= most and (np.diff(got) <= 0).all()
  want = oracle.zipf_counts(total, latents, **setting)
  np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(
  "change,message",
  [
    (dict(total=-1), "total must be"),
    (dict(total=1.5), "total must be"),
    (dict(latents=-1), "latents must be"),
    (dict(most=-1), "most must be"),
    (dict(exponent=-1.0), "exponent must be"),
    (dict(offset=-1.0), "offset must be"),
  ],
)
def test_zipf_counts_of_bad_settings(change, message):
  setting = dict(total=3, latents=2, exponent=1.0, offset=0.0, most=2)
  with pytest.raises(ValueError, match=message):
    selection.zipf_counts(**{**setting, **change})


def test_bad_choices():
  pre = jnp.ones((N, M))
  for k in (-1, M + 1):
    with pytest.raises(ValueError, match=f"k must be from 0 to {M}, got {k}"):
      selection.batch_top_k(pre, k)
  with pytest.raises(ValueError, match=r"counts must be \[5\], got \[4\]"):
    selection.feature_choice(pre, jnp.ones(4, jnp.int32))
  with pytest.raises(ValueError, match="gradient must be None"):
    selection.norm_aware(jnp.ones((M, 2)), jnp.ones((N, 2)))


# JumpReLU: what theta is told.

BANDWIDTH = 0.5


@functools.partial(jax.jit, static_argnums=0)
def pulled(function, pre, theta, pull):
  out, back = jax.vjp(lambda *x: function(*x, BANDWIDTH), pre, theta)
  return out, *back(pull)


@pytest.mark.parametrize("name", ["jump_relu", "step"])
def test_pseudo_gradients(name):
  rng = np.random.default_rng(2)
  pre = rng.normal(size=(2, N, M)).astype(np.float32)
  pull = rng.normal(size=pre.shape).astype(np.float32)
  theta = np.array([0.1, 0.5, 1.0, 1e-3, 2.0], np.float32)
  out, to_pre, to_theta = pulled(getattr(selection, name), pre, theta, pull)
  flat, flat_pull = pre.reshape(-1, M), pull.reshape(-1, M)
  want = getattr(oracle, name)(flat, theta)
  np.testing.assert_array_equal(out.reshape(-1, M), want.astype(np.float32))
  want_pre, want_theta = getattr(oracle, f"{name}_gradient")(
    flat, theta, BANDWIDTH, flat_pull
  )
  np.testing.assert_allclose(to_pre.reshape(-1, M), want_pre, rtol=1e-6)
  np.testing.assert_allclose(to_theta, want_theta, rtol=1e-5, atol=1e-5)
  assert (want_theta != 0).sum() >= 4


def test_theta_gradient_is_that_of_the_smoothed_expected_l0():
  # With the step smoothed to a ramp as wide as the bandwidth, L0 is
  # differentiable, and the mean over many rows is the expectation.
  rng = np.random.default_rng(3)
  pre = rng.normal(size=(20_000, 1))
  theta, h = 0.4, 1e-3
  ramp = lambda t: np.clip((pre - t) / BANDWIDTH + 0.5, 0, 1).mean()
  slope = (ramp(theta + h) - ramp(theta - h)) / (2 * h)
  _, _, got = pulled(
    selection.step,
    pre.astype(np.float32),
    np.array([theta], np.float32),
    np.full(pre.shape, 1 / len(pre), np.float32),
  )
  # Rows that enter the ramp within h: 1e-3 of a density of 0.4.
  np.testing.assert_allclose(got[0], slope, rtol=5e-3)
  # And of the expected L0 itself: the density at theta, smoothed.
  np.testing.assert_allclose(
    got[0], -np.exp(-(theta**2) / 2) / np.sqrt(2 * np.pi), rtol=0.05
  )


def test_scores():
  rng = np.random.default_rng(4)
  pre = rng.normal(size=(N, M)).astype(np.float32)
  atoms = rng.normal(size=(M, 3)).astype(np.float32)
  slope = rng.normal(size=(N, 3)).astype(np.float32)
  close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
  close(selection.norm_aware(atoms)(pre), oracle.norm_scores(pre, atoms))
  close(
    selection.gradient_aware(atoms, slope, 0.7)(pre),
    oracle.gradient_scores(pre, atoms, slope, 0.7),
  )
  plain = oracle.relu(pre)
  close(selection.gradient_aware(atoms, slope, 0.0)(pre), plain)
  close(selection.gradient_aware(atoms, None, 0.7)(pre), plain)


def test_latents_that_are_given_more_rows_than_there_are():
  pre = jnp.array([[1.0, 2.0], [3.0, 4.0]])
  counts = jnp.array([5, 1])
  for run in (selection.feature_choice, jax.jit(selection.feature_choice)):
    assert run(pre, counts).tolist() == [[1.0, 0.0], [3.0, 4.0]]
