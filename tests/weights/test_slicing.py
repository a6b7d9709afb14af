"""SliceGPT's algebra against the oracle, whose numbers are of f64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax import capture
from sparsejax import weights
from tests.oracles import slicing as oracle

D, ROWS = 12, 60


@pytest.fixture(scope="module")
def case():
  """Two rotations, gains and shifts, and tables that read and write."""
  rng = np.random.default_rng(0)
  turn = lambda: np.linalg.qr(rng.standard_normal((D, D)))[0]
  names = {"gain": (D,), "shift": (D,), "kernel": (D, 7), "bias": (7,)}
  names |= {"written": (5, D), "written_bias": (D,)}
  arrays = {name: rng.standard_normal(s) for name, s in names.items()}
  found = arrays | {"q": turn(), "next_q": turn()}
  return {name: np.float32(x) for name, x in found.items()}


def near(actual, expected):
  np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("run", [lambda f: f, jax.jit])
def test_rotation(run):
  rng = np.random.default_rng(1)
  x = rng.standard_normal((ROWS, D)) * np.exp(-np.arange(D) / 4)
  x = (x @ np.linalg.qr(rng.standard_normal((D, D)))[0]).astype(np.float32)
  valid = rng.random(ROWS) < 0.8
  moments = capture.Moments.zeros(D).add(jnp.asarray(x), jnp.asarray(valid))
  q, energies = run(weights.rotation)(moments)
  want, of_oracle = oracle.rotation(oracle.second_moments(x, valid))
  np.testing.assert_allclose(energies, of_oracle, rtol=1e-4, atol=1e-6)
  np.testing.assert_allclose(q, want, atol=1e-3)
  near(q.T @ q, np.eye(D))
  assert (jnp.diff(energies) <= 0).all()
  # Along the directions, nothing goes together with another.
  table = q.T @ moments.second @ q
  near(table, np.diag(energies))


def test_rotation_of_a_signal_that_does_not_vary():
  """A centered signal of few rows: directions where energies are zero."""
  x = jax.random.normal(jax.random.key(0), (3, D))
  x -= x.mean(-1, keepdims=True)
  q, energies = weights.rotation(capture.Moments.zeros(D).add(x))
  near(q.T @ q, np.eye(D))
  assert (energies >= 0).all() and (energies[3:] < 1e-5).all()


@pytest.mark.parametrize("multiple", [1, 3, 8])
def test_width(multiple):
  for width in (1, 7, 8, 12, 20, 64, 100, 384):
    for sparsity in (0.0, 0.1, 0.25, 0.3, 0.5, 0.8):
      want = oracle.width(width, sparsity, multiple)
      if want:
        assert weights.slice_width(width, sparsity, multiple) == want
  assert weights.slice_width(384, 0.25) == 288
  assert weights.slice_width(20, 0.0) == 20


@pytest.mark.parametrize("r", [D, 7])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("normed", ["", "gain", "gain shift"])
def test_reading(case, r, biased, normed):
  bias = case["bias"] if biased else None
  norm = [case[name] if name in normed else None for name in ("gain", "shift")]
  q = case["q"][:, :r]
  got, got_bias = weights.slice_inputs(case["kernel"], bias, q, *norm)
  want, want_bias = oracle.reading(case["kernel"], bias, case["q"], r, *norm)
  near(got, want)
  assert got.shape == (r, 7)
  if biased or "shift" in normed:
    near(got_bias, want_bias)
  else:
    assert got_bias is None


@pytest.mark.parametrize("r", [D, 7])
@pytest.mark.parametrize("centered", [True, False])
def test_writing_and_residual(case, r, centered):
  q, then = case["q"][:, :r], case["next_q"][:, :5]
  for name in ("written", "written_bias"):
    got = weights.slice_outputs(case[name], q, centered=centered)
    near(got, oracle.writing(case[name], case["q"], r, centered))
  for gain in (None, case["gain"]):
    got = weights.slice_residual(q, then, gain, centered=centered)
    want, _ = oracle.residual(
      case["q"], r, case["next_q"], 5, gain, None, centered
    )
    near(got, want)


def test_a_norm_and_its_neighbours_compute_the_same(case):
  """Layer norm, then a kernel; rotated, then an RMS norm, then its kernel."""
  x = jax.random.normal(jax.random.key(1), (4, 5))
  written = x @ case["written"] + case["written_bias"]
  centered = written - written.mean(-1, keepdims=True)
  u = centered / jnp.sqrt((centered**2).mean(-1, keepdims=True))
  want = (u * case["gain"] + case["shift"]) @ case["kernel"] + case["bias"]
  q = case["q"]
  kernel, bias = weights.slice_inputs(
    case["kernel"], case["bias"], q, case["gain"], case["shift"]
  )
  v = x @ weights.slice_outputs(case["written"], q, centered=True)
  v += weights.slice_outputs(case["written_bias"], q, centered=True)
  v /= jnp.sqrt((v**2).sum(-1, keepdims=True) / D)
  near(v @ kernel + bias, want)


def test_half_precision_is_folded_in_f32(case):
  half = {name: jnp.asarray(x, jnp.bfloat16) for name, x in case.items()}
  kernel, bias = weights.slice_inputs(
    half["kernel"], half["bias"], case["q"], half["gain"], half["shift"]
  )
  assert kernel.dtype == bias.dtype == jnp.float32
  near(kernel, oracle.reading(
    half["kernel"], None, case["q"], D, half["gain"])[0])  # fmt: skip
  assert weights.slice_outputs(half["written"], case["q"]).dtype == jnp.float32


def test_errors():
  for match, call in (
    ("moments must have second", lambda: weights.rotation(
      capture.Moments.zeros(3, second=False))),
    ("sparsity must be in", lambda: weights.slice_width(8, 1.0)),
    ("sparsity must be in", lambda: weights.slice_width(8, -0.1)),
    ("sparsity must leave", lambda: weights.slice_width(8, 0.99)),
    ("multiple", lambda: weights.slice_width(8, 0.5, 0)),
  ):  # fmt: skip
    with pytest.raises(ValueError, match=match):
      call()
