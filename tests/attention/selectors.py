"""What tests of selectors share: inputs, tables of choices, dense attention."""

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax.attention import formats
from tests.kernels import problem

# Two sequences with grouped heads, more keys than queries, and no length that
# blocks of 16 divide.
B, S, T, H, HKV, D = 2, 53, 70, 4, 2, 8
OFFSET = T - S
BLOCK = 16
BLOCKS = -(-T // BLOCK)
SHAPES = ((B, S, H, D), (B, T, HKV, D), (B, T, HKV, D))
WEIGHTS = np.cos(np.arange(S * H * D)).reshape(S, H, D)


def inputs(seed, dtype=np.float32):
  """q, k and v of normal numbers."""
  rng = np.random.default_rng(seed)
  return [jnp.array(rng.normal(size=shape), dtype) for shape in SHAPES]


def grid(seed):
  """q, k and v of -1, 0 and 1: scores are exact, and many are equal."""
  rng = np.random.default_rng(seed)
  q, k, v = (rng.integers(-1, 2, x).astype(np.float32) for x in SHAPES)
  k[:, 16:32] = k[:, :16]
  k[:, 64:] = 0
  return [jnp.array(x) for x in (q, k, v)]


def table(chosen):
  """Lists [heads][S] of each sequence as bool [B, heads, S, BLOCKS]."""
  out = np.zeros((B, len(chosen[0]), S, BLOCKS), bool)
  for b, h, s in np.ndindex(*out.shape[:3]):
    out[b, h, s, chosen[b][h][s]] = True
  return out


def rows(mask):
  """Which query reads which block, bool [B, H, S, blocks]."""
  x = np.asarray(formats._rows(mask))
  return x.reshape(*x.shape[:2], -1, x.shape[-1])[:, :, :S]


def causal(offset):
  """bool [S, T]."""
  return np.arange(T) <= np.arange(S)[:, None] + offset


def tokens(blocks, offset):
  """Tables of blocks [B, heads, S, BLOCKS] as bool [B, H, S, T]; causal."""
  read = np.repeat(blocks, H // blocks.shape[1], axis=1)
  return np.repeat(read, BLOCK, axis=-1)[..., :T] & causal(offset)


def dense(q, k, v, read):
  """Attention over bool read [B, H, S, T], in the plainest form."""
  k, v = (jnp.repeat(x, H // HKV, axis=2) for x in (k, v))
  logits = jnp.einsum("bshd,bthd->bhst", q, k) * D**-0.5
  p = jnp.where(read, jnp.exp(logits), 0)
  p /= jnp.maximum(p.sum(-1, keepdims=True), 1e-30)
  return jnp.einsum("bhst,bthd->bshd", p, v)


def gradients(attend):
  """A jitted function of arguments: weighted sum of outputs, and gradients."""

  def loss(args, *rest):
    return (attend(*args, *rest) * WEIGHTS).sum()

  return problem.jit(jax.value_and_grad(loss))


def assert_close(got, want, tolerance=2e-5):
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(
      x, y, rtol=tolerance, atol=tolerance
    ),
    got,
    want,
  )
