"""Codes as lists: as plain forms and the oracle have them, at any shape."""

import functools
import re

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax import sparse_coding
from sparsejax.sparse_coding import codes
from tests import common
from tests.oracles import sparse_coding as oracle

ROWS, WIDTH, LATENTS, K = 7, 10, 96, 3  # a row is searched in chunks
TINY = {"cpu": 1, "default": 1}


def plain_top_k(pre, k, scores=None):
  ranked = lax.stop_gradient(pre)
  ranked = ranked if scores is None else lax.stop_gradient(scores(ranked))
  _, indices = lax.top_k(ranked, k)
  values = jax.nn.relu(jnp.take_along_axis(pre, indices, axis=-1))
  return codes.Code(values, indices, pre.shape[-1])


def plain_encode(x, kernel, bias, k, scores=None):
  return plain_top_k(x @ kernel.T + bias, k, scores)


def plain_decode(code, dictionary):
  return jnp.einsum("...k,...kd->...d", code.values, dictionary[code.indices])


def inputs(seed=0, rows=(ROWS,), latents=LATENTS, dtype=jnp.float32):
  """x, kernel, bias, dictionary."""
  rng = np.random.default_rng(seed)
  shapes = (*rows, WIDTH), (latents, WIDTH), (latents,), (latents, WIDTH - 1)
  return [jnp.array(rng.normal(size=shape), dtype) for shape in shapes]


def passes(encode, decode, k, **options):
  """What comes out of encoding and decoding, and all gradients."""

  def loss(x, kernel, bias, dictionary):
    code = encode(x, kernel, bias, k, **options)
    out = decode(code, dictionary)
    return (out**2).sum(), (code, out)

  return jax.grad(loss, argnums=(0, 1, 2, 3), has_aux=True)


ours = functools.partial(passes, codes.encode_top_k, codes.decode)
plain = functools.partial(passes, plain_encode, plain_decode)


def assert_close(got, want, tolerance=1e-5):
  """Equal up to the order of sums of some tens of f32 products."""
  for a, b in zip(*map(jax.tree.leaves, (got, want)), strict=True):
    assert a.dtype == b.dtype
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
  "rows,latents,k",
  [
    ((2, 1, 3), 101, K),  # chunks of a row do not divide it
    ((), 11, 11),
    ((0,), LATENTS, K),
    ((1,), LATENTS, 0),
  ],
)
def test_equal_plain_forms(rows, latents, k):
  args = inputs(1, rows, latents)
  got, want = (jax.jit(f(k))(*args) for f in (ours, plain))
  assert_close(got, want)
  code = got[1][0]
  assert code.indices.dtype == jnp.int32
  np.testing.assert_array_equal(code.indices, want[1][0].indices)


def test_some_rows_at_a_time(monkeypatch):
  monkeypatch.setattr(codes, "GATHERED", TINY)
  monkeypatch.setattr(codes, "SCORED", 1)  # 128 rows
  args = inputs(2, (3, 47), 32)
  got, want = (jax.jit(f(2))(*args) for f in (ours, plain))
  assert_close(got, want, 1e-4)  # sums over 141 rows


def test_equal_the_oracle():
  x, kernel, bias, dictionary = inputs(3)
  code = jax.jit(functools.partial(codes.encode_top_k, k=K))(x, kernel, bias)
  exact = [common.float64(a) for a in (x, kernel, bias, dictionary)]
  z = oracle.top_k(exact[0] @ exact[1].T + exact[2], K)
  np.testing.assert_allclose(code.dense(), z, rtol=1e-5, atol=1e-5)
  assert ((code.dense() != 0) == (z != 0)).all()
  want = oracle.decode(z, exact[3], 0)
  for given_code in (code, code.dense()):
    out = codes.decode(given_code, dictionary)
    np.testing.assert_allclose(out, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("norms", [False, True])
def test_scores_rank_and_have_no_gradient(norms):
  x, kernel, bias, dictionary = inputs(4)

  def loss(encode, decode):
    def run(x, kernel, bias, dictionary):
      weights = jnp.linalg.norm(dictionary, axis=1) if norms else -1.0
      scores = lambda pre: pre * weights
      code = encode(x, kernel, bias, K, scores=scores)
      return (decode(code, dictionary) ** 2).sum(), code

    return jax.jit(jax.grad(run, argnums=(0, 1, 2, 3), has_aux=True))

  args = x, kernel, bias, dictionary
  got = loss(codes.encode_top_k, codes.decode)(*args)
  assert_close(got, loss(plain_encode, plain_decode)(*args), 1e-4)
  if not norms:  # the lowest ones, which are not positive
    assert not got[1].values.any()


class TestLargest:
  """The list of the k largest of a long row."""

  run = staticmethod(jax.jit(codes.largest, static_argnums=1))

  @pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
  def test_equals_top_k(self, dtype):
    rng = np.random.default_rng(0)
    for k in (1, 2, 6):
      x = jnp.array(rng.normal(size=(2, 3, 199)), dtype)
      np.testing.assert_array_equal(self.run(x, k), lax.top_k(x, k)[1])

  def test_ties_and_infinities(self):
    rng = np.random.default_rng(0)
    for palette in ([0.0], [-np.inf], [-np.inf, 1, np.inf], [1, 2], range(40)):
      x = rng.choice(np.array(palette, np.float32), (4, 256))
      for k in (1, 6):
        want = np.argsort(-x, axis=-1, kind="stable")[:, :k]
        np.testing.assert_array_equal(self.run(x, k), want)

  def test_nan_comes_first(self):
    x = np.zeros((2, 256), np.float32)
    x[0, [7, 8, 200]] = np.nan
    x[1, 30:] = np.nan
    got = self.run(x, 2)
    np.testing.assert_array_equal(got, [[7, 8], [30, 31]])


def test_transformations():
  """vmap, scan and checkpoint of parameters and rows; one compilation."""
  f = jax.checkpoint(ours(K))

  @jax.jit
  def one_by_one(args):
    step = lambda carry, x: (carry, f(*x))
    return jax.vmap(f)(*args), lax.scan(step, 0, args)[1]

  for seed in (5, 6):
    each = [inputs(seed + 10 * i) for i in range(3)]
    args = jax.tree.map(lambda *x: jnp.stack(x), *each)
    together, scanned = one_by_one(tuple(args))
    want = [jax.jit(plain(K))(*x) for x in each]
    want = jax.tree.map(lambda *x: jnp.stack(x), *want)
    assert_close(together, want)
    assert_close(scanned, want)
  assert one_by_one._cache_size() == 1


def test_a_dictionary_for_all():
  *_, dictionary = inputs()
  found = [plain_encode(*inputs(seed)[:3], K) for seed in range(3)]
  code = jax.tree.map(lambda *x: jnp.stack(x), *found)
  decode = jax.vmap(codes.decode, in_axes=(0, None))
  want = jnp.stack([plain_decode(c, dictionary) for c in found])
  assert_close(jax.jit(decode)(code, dictionary), want)


def test_bf16():
  args = inputs(7, dtype=jnp.bfloat16)
  grads, (code, out) = jax.jit(ours(K))(*args)
  for x in (*grads, code.values, out):
    assert x.dtype == jnp.bfloat16
  wide = [x.astype(jnp.float32) for x in args]
  want = jax.jit(plain(K))(*wide)
  # Chosen and added up in f32; the output, which the gradients begin with, is
  # rounded to 8 bits: a hundredth of the largest.
  np.testing.assert_array_equal(code.indices, want[1][0].indices)
  wanted = want[0], (want[1][0].values, want[1][1])
  got = grads, (code.values, out)
  for a, b in zip(*map(jax.tree.leaves, (got, wanted)), strict=True):
    atol = 0.01 * float(jnp.abs(b).max())
    np.testing.assert_allclose(a.astype(jnp.float32), b, rtol=0.01, atol=atol)


def latent_products(f, *args):
  """Of how many matrix products latents are a dimension."""
  text = jax.jit(f).lower(*args).as_text()
  found = re.findall(r"stablehlo.dot_general .*", text)
  return sum(bool(re.search(rf"[<x]{LATENTS}x", line)) for line in found)


def test_only_the_encoder_sees_all_latents():
  args = inputs(8, (200,))
  assert latent_products(ours(K), *args) == 1
  dense = lambda code, dictionary: code.dense() @ dictionary
  assert latent_products(passes(plain_encode, dense, K), *args) > 1


def test_no_array_of_all_gathered_rows(monkeypatch):
  args = inputs(9, (257,))
  shapes = "257,96", "257,3,10", "257,3,9", "771,10", "771,9"
  found = lambda f: [
    s for s in shapes if f"[{s}]" in jax.jit(f).lower(*args).compile().as_text()
  ]
  assert "257,96" in found(plain(K))
  monkeypatch.setattr(codes, "GATHERED", {"cpu": 999, "default": 999})
  monkeypatch.setattr(codes, "SCORED", 1)
  assert not found(ours(K))


@pytest.mark.parametrize("k", [-1, 97, 2.0, True])
def test_a_k_that_does_not_fit(k):
  x, kernel, bias, _ = inputs()
  with pytest.raises(ValueError, match="k must be an integer from 0 to 96"):
    codes.encode_top_k(x, kernel, bias, k)
  with pytest.raises(ValueError, match="k must be an integer from 0 to 96"):
    sparse_coding.top_k(x @ kernel.T, k)


def test_integers():
  with pytest.raises(ValueError, match="pre must be floating, got int32"):
    sparse_coding.top_k(jnp.arange(4), 1)


def test_choices_in_float64():
  with jax.enable_x64(True):
    pre = jnp.ones((1, 64), jnp.float64).at[0, 40].add(1e-10)
    assert codes.largest(pre, 1).tolist() == [[40]]


def test_arrays_of_other_widths():
  kernel, bias = jnp.ones((4, 3)), jnp.zeros(4)
  with pytest.raises(ValueError, match=r"got \[\[2, 5\], \[4, 3\], \[4\]\]"):
    codes.encode_top_k(jnp.ones((2, 5)), kernel, bias, 1)
  code = codes.top_k(jnp.ones((2, 6)), 1)
  for latents in (code, code.dense()):
    with pytest.raises(ValueError, match=r"the 4 latents .* got 6"):
      codes.decode(latents, kernel)
