"""ProxyAttn: groups of heads share a ranking, each has a budget of its own."""

from collections.abc import Sequence

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import rules
from pallas_kernels.block_mask import BlockMask
from sparsejax.attention import choices
from sparsejax.attention import scores
from sparsejax.automatic import automatic

Array = jax.Array


def proxyattn_select(
  q: Array,
  k: Array,
  *,
  groups: Sequence[Sequence[int]],
  gamma: float = 0.95,
  block: int = 128,
  stride: int = 8,
  sink: bool = False,
  scale: float | None = None,
  capacity: int | None = None,
) -> BlockMask:
  """Blocks by the scores of a proxy of several heads, as many as a head needs.

  The proxy of a group has the mean of its queries and of its keys, and every
  `stride`-th token of these. A block's score for a tile is the largest
  probability among their pairs. A head needs as many blocks as hold `gamma` of
  what the queries of the last block give to all keys, and each of its tiles
  reads so many: the best of its group up to the own block, which is always
  among them. The choice has no gradient.

  Args:
    q: floating [B, S, H, D].
    k: floating [B, S, Hkv, D], H a multiple of Hkv.
    groups: the query heads of each group. Every head is in one group, those
      of a key head in the same.
    gamma: the share of probability that makes a head's budget. 1 reads
      everything, 0 the blocks that are forced.
    block: queries and keys of a block, a power of two from 16 to 512.
    stride: of the tokens that are scored; it divides `block`.
    sink: whether the first block is always read, too, and counted.
    scale: of the logits, default D ** -0.5.
    capacity: slots of a tile's list, by default all blocks. A tile reads no
      more than so many, the best ones, and `dropped` tells of the others.

  Returns:
    A causal BlockMask, [B, H, n, capacity].

  Raises:
    ValueError: for arguments that do not fit.

  Example:
    >>> x = jnp.zeros((1, 64, 4, 8))
    >>> f = lambda x: proxyattn_select(
    ...   x, x, groups=[[0, 1], [2, 3]], gamma=0.5, block=16
    ... )
    >>> jax.jit(f)(x).counts[0].tolist()
    [[1, 2, 2, 2], [1, 2, 2, 2], [1, 2, 2, 2], [1, 2, 2, 2]]

  Source: proxyattn, ProxyAttn: Guided Sparse Attention via Representative
  Heads, Algorithm 1 for the budgets. `gamma` and `stride` are settings: their
  defaults are not the paper's. It does not say that the own block is read.
  """
  group = scores.same_tokens(q, k)
  _, length, heads, d = q.shape
  group_of = _group_of(groups, heads, group)
  choices.check_integers(1, block=block, stride=stride)
  if block % stride:
    raise ValueError(
      f"stride is {stride} and block {block}; stride must divide block."
    )
  blocks = -(-length // block)
  capacity = blocks if capacity is None else capacity
  choices.check_integers(1 + bool(sink), capacity=capacity)
  q, k = lax.stop_gradient((q, k))
  scale = d**-0.5 if scale is None else scale

  def rank(q, k):  # blocks of each head, the best first
    own = jnp.arange(blocks)
    ranking = choices.top_k_lists(
      _proxy_scores(q, k, groups, block, stride, scale),
      capacity,
      candidates=own <= own[:, None],
      forced=choices.near(own, blocks, first=bool(sink)),
    )
    budgets = _budgets(q, k, gamma, block, scale)
    return ranking[:, group_of], budgets[..., None]

  ranking, budgets = automatic(rank, q, k, out=q[:, 0])  # mixes heads
  counts = jnp.maximum(budgets, 1 + bool(sink))
  counts = jnp.minimum(counts, 1 + jnp.arange(blocks))
  mask = BlockMask(
    ranking,
    jnp.minimum(counts, capacity),
    block_q=block,
    block_kv=block,
    kv_blocks=blocks,
    rule=rules.Causal(),
  )
  return mask._replace(counts=counts)


def _group_of(groups, heads, group):
  """int [H]: each head's group; ValueError for what are no groups."""
  found = np.full(heads, -1)
  members = [list(x) for x in groups]
  fits = sorted(h for x in members for h in x) == list(range(heads))
  if fits:
    for i, x in enumerate(members):
      found[x] = i
    found = found.reshape(-1, group)
    fits = (found == found[:, :1]).all() and all(members)
  if not fits:
    raise ValueError(
      f"groups is {groups}; it must hold each of the {heads} query heads once, "
      f"the {group} of a key head in one group."
    )
  return found.ravel()


def _proxy_scores(q, k, groups, block, stride, scale):
  """Largest probability of pairs of blocks, f32 [B, groups, n, n]."""
  b, length, heads, d = q.shape
  group, per = heads // k.shape[2], block // stride

  def proxy(x, groups):
    x = jnp.pad(x, ((0, 0), (0, -length % block), (0, 0), (0, 0)))
    x = x[:, ::stride].astype(jnp.float32)
    return jnp.stack([x[:, :, np.array(of)].mean(2) for of in groups], axis=2)

  q = proxy(q, groups)
  k = proxy(k, [sorted({h // group for h in of}) for of in groups])
  k_at = jnp.arange(k.shape[1]) * stride
  blocks = k.shape[1] // per

  def score(arrays):  # of tiles: [B, n, per, groups, D], and where they stand
    q, at = arrays
    q, at = q.reshape(b, -1, *q.shape[3:]), at.reshape(b, 1, -1, 1)
    logits = scores.products(q, k, scale)
    logits = jnp.where(k_at <= at, logits, -jnp.inf)
    largest = logits.reshape(*logits.shape[:3], blocks, per).max(-1)
    top = largest.max(-1, keepdims=True)  # at least of key 0
    p = jnp.exp(largest - top) / jnp.exp(logits - top).sum(-1, keepdims=True)
    p = jnp.where(at < length, p, 0)  # no queries behind the end
    p = p.reshape(b, len(groups), -1, per, blocks).max(3)
    return jnp.swapaxes(p, 1, 2)

  tiles = q.reshape(b, blocks, per, len(groups), d)
  at = jnp.broadcast_to(k_at.reshape(1, blocks, per), (b, blocks, per))
  row = b * len(groups) * per * len(k_at)
  size = max(scores.CHUNK // row, 1)
  found = scores.in_chunks(score, (tiles, at), row, size=size)
  return jnp.swapaxes(found, 1, 2)


def _budgets(q, k, gamma, block, scale):
  """How many blocks hold gamma of what the last ones give, int32 [B, H]."""
  b, length, heads, _ = q.shape
  first = (length - 1) // block * block
  k_at = jnp.arange(length)

  def by_block(arrays):
    q, at = arrays
    logits = scores.products(q, k, scale)
    logits = jnp.where(k_at <= at[:, None, :, None], logits, -jnp.inf)
    p = jax.nn.softmax(logits, axis=-1)
    p = jnp.pad(p, ((0, 0), (0, 0), (0, 0), (0, -length % block)))
    return jnp.swapaxes(p.reshape(*p.shape[:3], -1, block).sum(-1), 1, 2)

  at = jnp.broadcast_to(k_at[first:], (b, length - first))
  arrays = q[:, first:], at
  mass = scores.in_chunks(by_block, arrays, b * heads * length).sum(1)
  # Of each block the mean over its keys, also if it is short.
  size = jnp.minimum(length - jnp.arange(0, length, block), block)
  return choices.top_mass(mass / size, gamma).sum(-1, dtype=jnp.int32)
