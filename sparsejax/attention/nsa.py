"""Native sparse attention: compressed, selected and sliding keys, gated."""

from collections.abc import Sequence

from flax import nnx
import jax
import jax.numpy as jnp

from pallas_kernels.block_mask import BlockMask
from pallas_kernels.block_sparse_attention import block_sparse_attention
from sparsejax.attention import choices
from sparsejax.attention import compressed as compressed_lib
from sparsejax.attention import scores

Array = jax.Array


def nsa_select(
  q: Array,
  k: Array,
  *,
  k_compressed: Array | None = None,
  top_n: int = 16,
  length: int = 32,
  stride: int = 16,
  block: int = 64,
  initial: int = 1,
  local: int = 2,
  q_positions: Array | None = None,
  scale: float | None = None,
  block_q: int = 16,
  capacity: int | None = None,
) -> BlockMask:
  """The blocks that each query reads in the selected branch.

  A block's score is the probability that the query gives to the windows which
  share tokens with it, summed over the query heads of a key head. Among the
  blocks up to the query's own the `top_n` best are read, the `initial` first
  and `local` last ones always. The choice has no gradient.

  Args:
    q: floating [B, S, H, D].
    k: floating [B, T, Hkv, D], H a multiple of Hkv; key t stands at position t.
    k_compressed: a key for each window, [B, C, Hkv, D]; default the means.
    top_n: how many blocks are read, forced ones among them. Where more are
      forced, these.
    length: tokens of a window.
    stride: tokens from one window's start to the next one's; it divides
      `length` and `block`.
    block: keys of a block, at least `length` and a multiple of 16.
    initial: how many of the first blocks are forced.
    local: how many up to the query's own one.
    q_positions: int32 [S] or [B, S], default arange(S).
    scale: of the logits, default D ** -0.5.
    block_q: queries of a tile, which lists what any of them reads: 1 or a power
      of two from 16 to 512.
    capacity: slots of a tile's list; see `formats.from_nsa`.

  Returns:
    A BlockMask with members and a causal rule.

  Raises:
    ValueError: for arguments that do not fit.

  Example:
    >>> q = jnp.ones((1, 64, 1, 2))
    >>> k = jnp.arange(64.0)[None, :, None, None] * jnp.ones(2)
    >>> mask = nsa_select(q, k, top_n=2, length=8, stride=8, block=16, local=1)
    >>> mask.counts[0, 0].tolist(), mask.indices[0, 0, 3, :2].tolist()
    ([1, 2, 2, 2], [0, 3])

  Source: nsa, Native Sparse Attention: Hardware-Aligned and Natively Trainable
  Sparse Attention, equations 8 to 12.
  """
  return compressed_lib.select(
    q,
    k,
    k_compressed,
    top_n=top_n,
    length=length,
    stride=stride,
    block=block,
    initial=initial,
    local=local,
    q_positions=q_positions,
    scale=scale,
    block_q=block_q,
    capacity=capacity,
  )


def nsa(
  q: Array,
  k: Array,
  v: Array,
  gates: Array,
  *,
  compressed: Sequence[Array] | None = None,
  sliding: Sequence[Array] | None = None,
  top_n: int = 16,
  length: int = 32,
  stride: int = 16,
  block: int = 64,
  initial: int = 1,
  local: int = 2,
  window: int = 512,
  q_positions: Array | None = None,
  scale: float | None = None,
  block_q: int = 16,
  capacity: int | None = None,
  backend: str | None = None,
) -> Array:
  """The gated sum of attention to windows, chosen blocks and what is near.

  The first branch reads one key for each window of the past. The second reads
  the blocks to which the first gives most probability: all query heads of a
  key head the same, and every token its own. The third reads the last `window`
  keys. A token before the end of the first window gets zeros from the first.

  Args:
    q: floating [B, S, H, D].
    k: keys of the second branch, [B, T, Hkv, D]; key t stands at position t.
    v: its values, as k.
    gates: floating [B, S, H, 3]: what the compressed, selected and sliding
      branch are multiplied by, such as sigmoids.
    compressed: keys and values of the first branch, one for each window (see
      `scores.windows`), [B, C, Hkv, D]; default the means of k and v.
    sliding: keys and values of the third branch; default k and v.
    top_n: how many blocks are read; see `nsa_select`, also for the next five.
    length: tokens of a window of the first branch.
    stride: tokens from one window's start to the next one's.
    block: keys of a block.
    initial: how many of the first blocks are always read.
    local: how many up to the query's own one are.
    window: keys that the third branch reads, the query's own among them.
    q_positions: int32 [S] or [B, S], default arange(S).
    scale: of all logits, default D ** -0.5.
    block_q: queries of a tile.
    capacity: slots of a tile's list.
    backend: of `pallas_kernels.block_sparse_attention`, which runs the second
      and third branch; the first is plain XLA.

  Returns:
    [B, S, H, D] in the dtype of q.

  Raises:
    ValueError: for arguments that do not fit.

  Example:
    >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 40, 2, 8))
    >>> gates = jnp.full((1, 40, 2, 3), 0.5)
    >>> sizes = dict(length=8, stride=4, block=16, top_n=2)
    >>> jax.jit(lambda *args: nsa(*args, **sizes))(q, k, v, gates).shape
    (1, 40, 2, 8)

  Source: nsa, Native Sparse Attention: Hardware-Aligned and Natively Trainable
  Sparse Attention, equation 5. `NSA` has its parameters.
  """
  if gates.shape != (*q.shape[:3], 3):
    raise ValueError(
      f"gates has shape {list(gates.shape)}; with q {list(q.shape)} it must be "
      f"{[*q.shape[:3], 3]}."
    )
  choices.check_integers(1, window=window)
  if compressed is None:
    compressed = [scores.window_means(x, length, stride) for x in (k, v)]
  first, chosen = compressed_lib.read_windows(
    q,
    *compressed,
    k.shape[1],
    top_n=top_n,
    length=length,
    stride=stride,
    block=block,
    initial=initial,
    local=local,
    q_positions=q_positions,
    scale=scale,
  )
  group = scores.group_size(q, k)
  mask = compressed_lib.mask_of_groups(
    chosen, k.shape[1], group, block, block_q, capacity
  )
  k_near, v_near = (k, v) if sliding is None else sliding
  near = compressed_lib.causal_mask(
    q, k_near.shape[1], window, mask.block_kv, block_q, q_positions
  )
  options = dict(scale=scale, q_positions=q_positions, backend=backend)
  second = block_sparse_attention(q, k, v, mask, **options)
  third = block_sparse_attention(q, k_near, v_near, near, **options)
  out = sum(
    gates[..., i, None].astype(jnp.float32) * x
    for i, x in enumerate((first, second, third))
  )
  return out.astype(q.dtype)


class Compressor(nnx.Module):
  """One key (or value) for each window of them.

  An embedding of the place in the window is added to each row, and a network of
  two layers makes one row of all; key heads share it.

  Args:
    head_dim: of keys.
    length: tokens of a window.
    stride: tokens from one window's start to the next one's.
    hidden: width of the layer between, default 2 * head_dim.
    dtype: to compute in, default that of the parameters and rows.
    param_dtype: of the parameters.
    rngs: for the initial parameters.

  Example:
    >>> from flax import nnx
    >>> compress = Compressor(8, 4, 2, rngs=nnx.Rngs(0))
    >>> compress(jnp.ones((1, 10, 3, 8))).shape
    (1, 4, 3, 8)
  """

  def __init__(
    self,
    head_dim: int,
    length: int,
    stride: int,
    *,
    hidden: int | None = None,
    dtype=None,
    param_dtype=jnp.float32,
    rngs: nnx.Rngs,
  ):
    given = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
    hidden = 2 * head_dim if hidden is None else hidden
    self.length, self.stride = length, stride
    place = jax.random.normal(rngs.params(), (length, head_dim), param_dtype)
    self.place = nnx.Param(0.02 * place)
    self.inner = nnx.Linear(length * head_dim, hidden, **given)
    self.outer = nnx.Linear(hidden, head_dim, **given)

  def __call__(self, x: Array) -> Array:
    """[B, T, Hkv, D] -> [B, C, Hkv, D] in the dtype of x."""
    rows = scores.windows(x, self.length, self.stride)
    rows += self.place[...][:, None].astype(x.dtype)
    rows = jnp.swapaxes(rows, 2, 3)
    rows = rows.reshape(*rows.shape[:3], -1)
    return self.outer(jax.nn.gelu(self.inner(rows))).astype(x.dtype)


class NSA(nnx.Module):
  """Native sparse attention with its parameters: compression and gates.

  Queries, keys and values are made outside, by projections of the model's own.
  The gates are sigmoids of a linear layer of the tokens, one for each query
  head and branch.

  Args:
    width: of the tokens that the gates are made of.
    heads: query heads.
    head_dim: of queries, keys and values.
    length: tokens of a window of the compressed branch.
    stride: tokens from one window's start to the next one's.
    hidden: of the compression; see `Compressor`.
    dtype: of the compression, default that of its parameters and keys.
    param_dtype: of the parameters.
    rngs: for the initial parameters.
    **settings: those of `nsa`, such as `top_n`.

  Example:
    >>> from flax import nnx
    >>> layer = NSA(
    ...   12, 2, 8, length=8, stride=4, block=16, top_n=2, rngs=nnx.Rngs(0)
    ... )
    >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 40, 2, 8))
    >>> jax.eval_shape(layer, jnp.ones((1, 40, 12)), q, k, v).shape
    (1, 40, 2, 8)

  Source: nsa, Native Sparse Attention: Hardware-Aligned and Natively Trainable
  Sparse Attention, equations 5 and 7. The paper leaves the network of the
  compression and of the gates open; these are plain ones.
  """

  def __init__(
    self,
    width: int,
    heads: int,
    head_dim: int,
    *,
    length: int = 32,
    stride: int = 16,
    hidden: int | None = None,
    dtype=None,
    param_dtype=jnp.float32,
    rngs: nnx.Rngs,
    **settings,
  ):
    make = lambda: Compressor(
      head_dim,
      length,
      stride,
      hidden=hidden,
      dtype=dtype,
      param_dtype=param_dtype,
      rngs=rngs,
    )
    self.keys, self.values = make(), make()
    self.gates = nnx.Linear(
      width, heads * 3, dtype=jnp.float32, param_dtype=param_dtype, rngs=rngs
    )
    self.settings = (*settings.items(), ("length", length), ("stride", stride))

  def __call__(
    self,
    x: Array,
    q: Array,
    k: Array | Sequence[Array],
    v: Array | Sequence[Array],
    *,
    q_positions: Array | None = None,
  ) -> Array:
    """Attention of queries to the keys before them.

    Args:
      x: floating [B, S, width], the tokens of the queries.
      q: [B, S, H, D].
      k: [B, T, Hkv, D], or three of them, for the compressed, selected and
        sliding branch, as in the paper.
      v: as k.
      q_positions: int32 [S] or [B, S], default arange(S).

    Returns:
      [B, S, H, D] in the dtype of q.

    Raises:
      ValueError: for arguments that do not fit each other.
    """
    ks, vs = (x if isinstance(x, tuple | list) else [x] * 3 for x in (k, v))
    if len(ks) != 3 or len(vs) != 3:
      raise ValueError(
        f"k and v are {len(ks)} and {len(vs)} arrays; they must be one or "
        "three each."
      )
    gates = jax.nn.sigmoid(self.gates(x))
    return nsa(
      q,
      ks[1],
      vs[1],
      gates.reshape(*q.shape[:3], 3),
      compressed=(self.keys(ks[0]), self.values(vs[0])),
      sliding=(ks[2], vs[2]),
      q_positions=q_positions,
      **dict(self.settings),
    )
