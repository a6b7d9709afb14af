"""DeepSeek sparse attention: a small indexer says which keys a token reads."""

from collections.abc import Callable

from flax import nnx
import jax
from jax import lax
import jax.numpy as jnp

from pallas_kernels import rules
from pallas_kernels.block_mask import BlockMask
from pallas_kernels.block_sparse_attention import block_sparse_attention
from sparsejax.attention import choices
from sparsejax.attention import scores

Array = jax.Array


def index_scores(q: Array, k: Array, w: Array) -> Array:
  """How much the indexer wants each query to read each key.

  The sum over index heads of w * relu(q . k), for keys ahead as well; all of
  them at once. The index heads share one key.

  Args:
    q: index queries, floating [B, S, J, C].
    k: index keys, floating [B, T, C].
    w: weights of the index heads, [B, S, J]. DeepSeek's hold a factor
      (J * C) ** -0.5, as those of `LightningIndexer`.

  Returns:
    f32 [B, S, T].

  Raises:
    ValueError: for shapes that do not fit each other.

  Example:
    >>> q, w = jnp.array([[[[1.0], [-1.0]]]]), jnp.array([[[3.0, 5.0]]])
    >>> index_scores(q, jnp.array([[[2.0], [-2.0]]]), w).tolist()
    [[[6.0, 10.0]]]

  Source: deepseek-dsa, DeepSeek-V3.2, equation 1.
  """
  check_index(q, k, w)
  found = jax.nn.relu(scores.products(q, k[:, :, None]))
  return jnp.einsum(
    "bjnt,bnj->bnt", found, w.astype(jnp.float32), precision="highest"
  )


def dsa_keys(
  q: Array,
  k: Array,
  w: Array,
  *,
  top_k: int = 2048,
  q_positions: Array | None = None,
) -> Array:
  """The keys that each token reads, the same for all of its heads.

  The best of those up to the token; none is forced, its own neither. The choice
  has no gradient: `index_loss` trains the indexer.

  Args:
    q: index queries, floating [B, S, J, C].
    k: index keys, floating [B, T, C]; key t stands at position t.
    w: weights of the index heads, [B, S, J].
    top_k: how many keys a token reads. 0 reads nothing.
    q_positions: int32 [S] or [B, S], default arange(S).

  Returns:
    int32 [B, S, min(top_k, T)]: the best first, then -1 where there are fewer.

  Raises:
    ValueError: for arguments that do not fit.

  Example:
    >>> q, w = jnp.ones((1, 3, 2, 4)), jnp.ones((1, 3, 2))
    >>> k = jnp.array([2.0, 1.0, 3.0])[None, :, None] * jnp.ones(4)
    >>> dsa_keys(q, k, w, top_k=2).tolist()
    [[[0, -1], [0, 1], [2, 0]]]

  Source: deepseek-dsa, DeepSeek-V3.2, equation 2.
  """
  check_index(q, k, w)
  choices.check_integers(0, top_k=top_k)
  q, k, w = lax.stop_gradient((q, k, w))

  def choose(arrays):
    q, w, at = arrays
    before = jnp.arange(k.shape[1]) <= at[..., None]
    return choices.top_k_lists(index_scores(q, k, w), top_k, candidates=before)

  at = _positions(q_positions, q)
  row = q.shape[0] * q.shape[2] * k.shape[1]
  return scores.in_chunks(choose, (q, w, at), row)


def dsa(
  q: Array,
  k: Array,
  v: Array,
  keys: Array,
  *,
  q_positions: Array | None = None,
  **options,
) -> Array:
  """Attention in which each token reads single keys, the same in all heads.

  Tokens are taken some at a time: what is gathered is as large as k and v, or
  as what 16 tokens read. With all keys it is dense attention, in outputs and in
  gradients.

  Args:
    q: floating [B, S, H, D].
    k: [B, T, Hkv, D] in the dtype of q; key t stands at position t.
    v: as k.
    keys: int32 [B | 1, S, K], such as those of `dsa_keys` or `hisa_keys`; what
      is no position of a key, repeated or ahead of the token is not read.
    q_positions: int32 [S] or [B, S], default arange(S).
    **options: `scale`, `softcap`, `sinks`, `return_lse`, `backend` and
      `interpret` of `pallas_kernels.block_sparse_attention`.

  Returns:
    [B, S, H, D] in the dtype of q; zeros for a token that reads nothing.

  Raises:
    ValueError: for arguments that do not fit.

  Example:
    >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 40, 2, 8))
    >>> keys = jnp.arange(40)[:, None] - jnp.arange(4)  # the last four
    >>> jax.jit(dsa)(q, k, v, keys[None]).shape
    (1, 40, 2, 8)

  Source: deepseek-dsa, DeepSeek-V3.2, equation 2. The latent attention of
  DeepSeek is this with one key head; its projections are the caller's.
  """
  scores.group_size(q, k)
  kv_len = k.shape[1]
  keys = _check_keys(keys, q)
  pad = max(-keys.shape[2] % 16, 16 - keys.shape[2])
  keys = jnp.pad(keys, ((0, 0), (0, 0), (0, pad)), constant_values=-1)
  width = keys.shape[2]
  block_kv = choices.size_in_mask(width)

  def some(arrays):
    q, keys, at = arrays
    columns = jnp.where(keys < kv_len, keys, -1)[:, None]
    empty = jnp.zeros_like(columns[..., :1])
    mask = BlockMask(
      empty,
      empty[..., 0],
      block_q=1,
      block_kv=block_kv,
      kv_blocks=-(-kv_len // block_kv),
      columns=columns,
      rule=rules.Causal(),
    )
    return block_sparse_attention(q, k, v, mask, q_positions=at, **options)

  # Each turn also copies k and v, so that it should gather as much.
  size = max(16, -(-kv_len // width))
  at = _positions(q_positions, q)
  return scores.in_chunks(some, (q, keys, at), 0, size=size)


def index_loss(
  index: tuple[Array, Array, Array],
  q: Array,
  k: Array,
  *,
  keys: Array | None = None,
  scale: float | None = None,
  q_positions: Array | None = None,
) -> Array:
  """How far the indexer is from what the attention reads.

  KL(target || softmax of the index scores), the target being the attention
  probabilities summed over the heads and divided by their sum. Without `keys`
  both are over all keys up to the token: the warm-up, beside dense attention.
  With them, over these: beside sparse attention. The gradient reaches `index`
  alone. Tokens are taken some at a time, forward and backward.

  Args:
    index: the indexer's q [B, S, J, C], k [B, T, C] and w [B, S, J].
    q: floating [B, S, H, D], of the attention.
    k: floating [B, T, Hkv, D]; key t stands at position t.
    keys: None, or int32 [B | 1, S, K] without repetition, those of `dsa_keys`.
    scale: of the attention's logits, default D ** -0.5.
    q_positions: int32 [S] or [B, S], default arange(S).

  Returns:
    f32 [B, S], 0 for a token that reads nothing. The paper sums over tokens.

  Raises:
    ValueError: for arguments that do not fit.

  Example:
    >>> x = jnp.ones((1, 3, 2, 4))
    >>> index = x, x[:, :, 0], x[..., 0]
    >>> index_loss(index, x, x).round(3).tolist()  # alike: all keys equal
    [[0.0, 0.0, 0.0]]

  Source: deepseek-dsa, DeepSeek-V3.2, equations 3 and 4.
  """
  check_index(*index)
  index_q, index_k, index_w = index
  group = scores.group_size(q, k)
  q, k = lax.stop_gradient((q, k))
  if index_q.shape[:2] != q.shape[:2] or index_k.shape[:2] != k.shape[:2]:
    raise ValueError(
      f"index has q {list(index_q.shape)} and k {list(index_k.shape)}; their "
      f"batch and lengths must be those of q {list(q.shape)} and k "
      f"{list(k.shape)}."
    )
  scale = q.shape[3] ** -0.5 if scale is None else scale
  b, t, heads = k.shape[0], k.shape[1], q.shape[2] + index_q.shape[2]

  def over_all(arrays):
    q, index_q, w, at = arrays
    seen = jnp.arange(t) <= at[..., None]
    p = scores.probabilities(scores.products(q, k, scale), seen[:, None])
    return _divergence(p.sum(1), index_scores(index_q, index_k, w), seen)

  def over_keys(arrays):
    q, index_q, w, at, keys = arrays
    seen = (keys >= 0) & (keys <= at[..., None]) & (keys < t)
    take = jax.vmap(lambda x, i: x[i])
    keys = jnp.where(seen, keys, 0)
    # A token's keys are a sequence of their own.
    alone = lambda x: x.reshape(-1, 1, *x.shape[2:])
    near = lambda x: take(x, keys).reshape(-1, keys.shape[2], *x.shape[2:])
    logits = scores.products(alone(q), near(k), scale)  # [b * n, H, 1, K]
    p = scores.probabilities(logits, seen.reshape(-1, 1, 1, seen.shape[2]))
    found = index_scores(alone(index_q), near(index_k), alone(w))
    return _divergence(
      p[:, :, 0].sum(1).reshape(seen.shape), found.reshape(seen.shape), seen
    )

  arrays = (q, index_q, index_w, _positions(q_positions, q))
  if keys is None:
    return scores.in_chunks(over_all, arrays, b * t * heads)
  keys = _check_keys(keys, q)
  gathered = q.shape[2] // group * q.shape[3] + index_k.shape[2]
  row = b * keys.shape[2] * (heads + gathered)
  return scores.in_chunks(over_keys, (*arrays, keys), row)


class LightningIndexer(nnx.Module):
  """The indexer's projections: small queries and keys, and weights of heads.

  No gradient reaches what it is applied to.

  Args:
    width: of the tokens.
    heads: of the index, J.
    head_dim: of index queries and keys, C.
    query_width: of what queries are made of, if that is not the tokens
      (DeepSeek's is the compressed query of its latent attention).
    rotate: None, or what is done to queries [B, n, J, C] and keys [B, n, 1, C]
      at positions int32 [n] or [B, n], such as rotary embedding of some of
      their dimensions.
    dtype: to compute in, default that of the parameters and tokens.
    param_dtype: of the parameters.
    rngs: for the initial parameters.

  Example:
    >>> indexer = LightningIndexer(16, heads=2, head_dim=4, rngs=nnx.Rngs(0))
    >>> q, k, w = indexer(jnp.ones((1, 5, 16)))
    >>> dsa_keys(q, k, w, top_k=3).shape
    (1, 5, 3)

  Source: deepseek-dsa, DeepSeek-V3.2, equation 1. Keys are normalized and
  weights hold (heads * head_dim) ** -0.5, as in its released code; that code's
  Hadamard rotation and 8-bit arithmetic are left out.
  """

  def __init__(
    self,
    width: int,
    *,
    heads: int = 64,
    head_dim: int = 128,
    query_width: int | None = None,
    rotate: Callable[[Array, Array], Array] | None = None,
    dtype=None,
    param_dtype=jnp.float32,
    rngs: nnx.Rngs,
  ):
    given = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
    linear = lambda *sizes: nnx.Linear(*sizes, use_bias=False, **given)
    self.query = linear(query_width or width, heads * head_dim)
    self.key = linear(width, head_dim)
    self.norm = nnx.LayerNorm(head_dim, **given)
    self.weight = linear(width, heads)
    self.heads, self.head_dim, self.rotate = heads, head_dim, rotate

  def __call__(
    self,
    x: Array,
    x_query: Array | None = None,
    *,
    positions: Array | None = None,
  ) -> tuple[Array, Array, Array]:
    """Index queries, keys and weights of tokens.

    Args:
      x: floating [B, S, width].
      x_query: [B, S, query_width], default x.
      positions: of the tokens, for `rotate`; default arange(S).

    Returns:
      q [B, S, J, C], k [B, S, C] and w f32 [B, S, J]. In decoding the caller
      keeps the keys.
    """
    x = lax.stop_gradient(x)
    x_query = x if x_query is None else lax.stop_gradient(x_query)
    q = self.query(x_query)
    q = q.reshape(*q.shape[:2], self.heads, self.head_dim)
    k = self.norm(self.key(x))
    if self.rotate is not None:
      at = jnp.arange(x.shape[1]) if positions is None else positions
      q, k = self.rotate(q, at), self.rotate(k[:, :, None], at)[:, :, 0]
    w = self.weight(x).astype(jnp.float32)
    return q, k, w * (self.heads * self.head_dim) ** -0.5


def check_index(q, k, w):
  """ValueError for shapes of an index that do not fit each other."""
  fits = q.ndim == 4 and k.ndim == 3 and w.shape == q.shape[:3]
  if not fits or (q.shape[0], q.shape[3]) != (k.shape[0], k.shape[2]):
    raise ValueError(
      f"the index has q {list(q.shape)}, k {list(k.shape)} and w "
      f"{list(w.shape)}; they must be [B, S, J, C], [B, T, C] and [B, S, J]."
    )


def _check_keys(keys, q):
  """int32 [B, S, K]."""
  keys = jnp.asarray(keys)
  b, s = q.shape[:2]
  fits = keys.ndim == 3 and keys.shape[0] in (1, b) and keys.shape[1] == s
  if not fits or not jnp.issubdtype(keys.dtype, jnp.integer):
    raise ValueError(
      f"keys is {keys.dtype}{list(keys.shape)}; it must hold integers, "
      f"[{b} or 1, {s}, K]."
    )
  return jnp.broadcast_to(keys, (b, *keys.shape[1:])).astype(jnp.int32)


def _positions(value, q):
  return jnp.broadcast_to(scores.positions(value, q.shape[1]), q.shape[:2])


def _divergence(target, found, seen):
  """KL(target over its sum || softmax of found), of the last axis."""
  total = target.sum(-1, keepdims=True)
  target /= jnp.where(total > 0, total, 1)
  return scores.divergence(target, jnp.where(seen, found, -jnp.inf))
