"""HISA: the keys of DeepSeek's indexer, looked for in the best blocks only."""

import functools

import jax
from jax import lax
import jax.numpy as jnp

from sparsejax.attention import choices
from sparsejax.attention import scores
from sparsejax.attention.dsa import check_index
from sparsejax.attention.dsa import index_scores
from sparsejax.automatic import automatic

Array = jax.Array


def hisa_keys(
  q: Array,
  k: Array,
  w: Array,
  *,
  block: int = 128,
  top_m: int = 64,
  top_k: int = 2048,
  q_positions: Array | None = None,
) -> Array:
  """As `dsa_keys`, without a score for every pair of tokens.

  A block's score is the index score of the mean of its index keys. Among the
  blocks up to the token's own the `top_m` best are looked into, the first and
  the own one always; the best keys in them are read. It needs no training of
  its own. Where all blocks are looked into, the keys are those of `dsa_keys`.

  Args:
    q: index queries, floating [B, S, J, C].
    k: index keys, floating [B, T, C]; key t stands at position t.
    w: weights of the index heads, [B, S, J].
    block: keys of a block.
    top_m: how many blocks are looked into, the two forced ones among them.
    top_k: how many keys a token reads. 0 reads nothing.
    q_positions: int32 [S] or [B, S], default arange(S).

  Returns:
    int32 [B, S, K], K the lesser of top_k and the keys of so many blocks: the
    best first, then -1. `dsa` reads them.

  Raises:
    ValueError: for arguments that do not fit.

  Example:
    >>> q, w = jnp.ones((1, 6, 2, 4)), jnp.ones((1, 6, 2))
    >>> k = jnp.array([1.0, 1, 4, 0, 3, 3])[None, :, None] * jnp.ones(4)
    >>> choose = jax.jit(lambda *x: hisa_keys(*x, block=2, top_m=2, top_k=2))
    >>> choose(q, k, w)[0, 5].tolist()  # not 2: the mean of its block is less
    [4, 5]

  Source: hisa, HISA: Efficient Hierarchical Indexing for Fine-Grained Sparse
  Attention, equations 4 to 9. In its Algorithm 1 the two forced blocks come on
  top of top_m.
  """
  check_index(q, k, w)
  choices.check_integers(0, top_m=top_m, top_k=top_k)
  q, k, w = lax.stop_gradient((q, k, w))
  at = jnp.broadcast_to(scores.positions(q_positions, q.shape[1]), q.shape[:2])
  choose = functools.partial(_keys, block=block, top_m=top_m, top_k=top_k)
  # Candidates lie where indices say. Choices are sharded as the tokens are.
  return automatic(choose, q, k, w, at, out=w.sum(-1, keepdims=True))


def _keys(q, k, w, at, block, top_m, top_k):
  """`hisa_keys`; at is int32 [B, S], where the queries stand."""
  centers = scores.pooled(k[:, :, None], block)[:, :, 0]
  length, blocks = k.shape[1], centers.shape[1]
  pad = ((0, 0), (0, blocks * block - length), (0, 0))
  by_block = jnp.pad(k, pad).reshape(len(k), blocks, block, k.shape[2])

  def choose(arrays):
    q, w, at = arrays
    own = at // block
    found = choices.top_k_lists(
      index_scores(q, centers, w),
      top_m,
      candidates=jnp.arange(blocks) <= own[..., None],
      forced=choices.near(own, blocks, first=1),
      most_forced=2,
    )
    # Ascending, or the first of equal keys would not be the lowest.
    found = jnp.sort(jnp.where(found < 0, blocks, found), axis=-1)
    tokens = found[..., None] * block + jnp.arange(block)
    rows = jax.vmap(lambda x, i: x[jnp.minimum(i, blocks - 1)])(by_block, found)
    n = found.shape[2] * block
    tokens = tokens.reshape(*at.shape, n)
    # A token's candidates are a sequence of their own.
    fine = index_scores(
      q.reshape(-1, 1, *q.shape[2:]),
      rows.reshape(-1, n, k.shape[2]),
      w.reshape(-1, 1, w.shape[2]),
    )
    may = (tokens <= at[..., None]) & (tokens < length)
    best = choices.top_k_lists(
      fine.reshape(tokens.shape), top_k, candidates=may
    )
    keys = jnp.take_along_axis(tokens, jnp.maximum(best, 0), axis=-1)
    return jnp.where(best < 0, -1, keys)

  looked = min(max(top_m, 2), blocks) * block
  row = q.shape[0] * (looked * (q.shape[2] + q.shape[3]) + blocks * q.shape[2])
  return scores.in_chunks(choose, (q, w, at), row)
