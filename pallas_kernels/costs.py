"""What block-sparse attention costs: FLOPs and bytes, counted from a mask."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import rules
from pallas_kernels.block_mask import BlockMask
from pallas_kernels.block_sparse_attention import lists
from pallas_kernels.block_sparse_attention import tpu


@dataclasses.dataclass(frozen=True)
class Cost:
  """Counts of one call, over all batch elements and query heads.

  Attributes:
    blocks: pairs of a query block and a key block that are run: the listed
      ones, and blocks of columns, that the rule does not skip.
    flops: FLOPs of the products of these pairs.
    dense_flops: FLOPs of the same products for all queries and keys.
    bytes_read: bytes that the kernels read.
    bytes_written: bytes that they write.
    smem_bytes: of the lists that the TPU kernels read from scalar memory, the
      larger of the forward and the backward pass. Where it does not hold them
      (1 MiB), a call runs in parts.
  """

  blocks: int
  flops: int
  dense_flops: int
  bytes_read: int
  bytes_written: int
  smem_bytes: int

  @property
  def speedup_bound(self) -> float:
    """How much faster than dense it is if only FLOPs count; inf for none."""
    return self.dense_flops / self.flops if self.flops else float("inf")

  @property
  def arithmetic_intensity(self) -> float:
    """FLOPs for each byte read or written."""
    moved = self.bytes_read + self.bytes_written
    return self.flops / moved if moved else 0.0


def cost(mask, q_shape, kv_shape, *, dtype, backward=False) -> Cost:
  """Counts what `block_sparse_attention` does for a mask.

  Counted are, for each pair of a query and a key block that is run and each
  query head:

  - forward, two products (logits, output) of 2 * D * block_q * block_kv FLOPs;
  - backward, five more (logits again, dP, dV, dQ, dK). The TPU kernels, one for
    dQ and one for dK and dV, compute logits and dP in both, which is not
    counted;
  - bytes, as the kernels fetch them. Forward: q once, k and v of every pair,
    the lists; out and the log-sum-exp are written. Backward adds: out and dout
    once, for their products by row; q, dout, their two f32 statistics
    once, k and v of every pair, for dQ; k and v once, q, dout and statistics of
    every pair, for dK and dV; the lists; dQ, dK, dV are written.

  Blocks have their whole size, also where the queries or keys end in them.
  Not counted are softmax, the sorting of lists, columns and levels being laid
  out as keys, positions, and segments. Positions are taken to be indices.

  Args:
    mask: a concrete BlockMask.
    q_shape: (B, S, H, D).
    kv_shape: (B, T, Hkv, D).
    dtype: of q, k and v.
    backward: whether to count the backward pass as well.

  Returns:
    A Cost of exact integers.

  Raises:
    ValueError: for a traced mask, or shapes that fit neither each other nor the
      mask.

  Example:
    >>> mask = pallas_kernels.BlockMask.from_blocks(
    ...   jnp.ones((8, 8), bool),
    ...   block_q=128,
    ...   block_kv=128,
    ...   rule=pallas_kernels.Causal(),
    ... )
    >>> shape = (1, 1024, 4, 64)
    >>> found = cost(mask, shape, shape, dtype=jnp.bfloat16)
    >>> found.blocks, round(found.speedup_bound, 2)
    (144, 1.78)
  """
  b, s, h, d, t, kv_heads = _check(mask, q_shape, kv_shape)
  size = jnp.dtype(dtype).itemsize
  lead_b, lead_h = mask.counts.shape[:2]
  edges = _edges(mask, s, t) * (b // lead_b) * (h // lead_h)
  product = 2 * d * mask.block_q * mask.block_kv
  dense_product = 2 * d * s * t * b * h
  products = 7 if backward else 2
  statistic = 4 * b * s * h
  q_bytes, kv_bytes = b * s * h * d * size, 2 * b * t * kv_heads * d * size
  kv_of_pairs = edges * 2 * mask.block_kv * d * size
  by_query, by_key = _smem(mask, q_shape, kv_shape)
  members = 0
  if mask.members is not None:
    members = 4 * mask.members.size * (b // lead_b) * (h // lead_h)
  read = q_bytes + kv_of_pairs + by_query + members
  written = q_bytes + statistic
  if backward:
    read += 2 * q_bytes  # out and dout, for delta
    read += 2 * q_bytes + 2 * statistic + kv_of_pairs + members  # dQ
    read += kv_bytes  # dK, dV
    read += edges * mask.block_q * (2 * d * size + 2 * 4)
    if mask.members is not None:
      read += edges * 4 * mask.members.shape[3] * mask.block_q
    read += by_query + by_key
    written += statistic + q_bytes + kv_bytes  # delta, dQ, dK and dV
  return Cost(
    blocks=edges,
    flops=products * product * edges,
    dense_flops=products * dense_product,
    bytes_read=read,
    bytes_written=written,
    smem_bytes=max(by_query, by_key) if backward else by_query,
  )


def _check(mask, q_shape, kv_shape):
  """B, S, H, D, T and Hkv as ints."""
  if not isinstance(mask, BlockMask):
    raise ValueError(
      f"mask is a {type(mask).__name__}; it must be a BlockMask."
    )
  if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(mask)):
    raise ValueError("mask is traced; costs are counted from a concrete mask.")
  for name, shape in (("q_shape", q_shape), ("kv_shape", kv_shape)):
    if hasattr(shape, "shape"):
      raise ValueError(
        f"{name} is an array of shape {shape.shape}; give the shape alone."
      )
    if len(shape) != 4:
      raise ValueError(
        f"{name} is {tuple(shape)}; it must be (batch, sequence, heads, "
        "head_dim)."
      )
  b, s, h, d = map(int, q_shape)
  kv_batch, t, kv_heads, kv_d = map(int, kv_shape)
  if (kv_batch, kv_d) != (b, d) or kv_heads == 0 or h % kv_heads:
    raise ValueError(
      f"kv_shape is {tuple(kv_shape)}; with q_shape {tuple(q_shape)} it must "
      f"have batch {b}, a number of heads that divides {h}, and head_dim {d}."
    )
  lead_b, lead_h, nq = mask.counts.shape
  wanted = (-(-s // mask.block_q), -(-t // mask.block_kv))
  if (
    (nq, mask.kv_blocks) != wanted
    or lead_b not in (1, b)
    or lead_h
    not in (
      1,
      h,
    )
  ):
    raise ValueError(
      f"mask has batch {lead_b}, heads {lead_h}, {nq} query blocks of "
      f"{mask.block_q} and {mask.kv_blocks} key blocks of {mask.block_kv}; "
      f"q_shape {tuple(q_shape)} and kv_shape {tuple(kv_shape)} need 1 or {b}, "
      f"1 or {h}, {wanted[0]} and {wanted[1]}."
    )
  return b, s, h, d, t, kv_heads


def _edges(mask, s, t):
  """Pairs of all lists of the mask that are run."""
  nq = mask.counts.shape[2]
  q_low = np.arange(nq)[:, None] * mask.block_q
  q_high = np.minimum(q_low + mask.block_q, s) - 1

  def run(valid, k_low, k_high):
    if mask.rule is not None:
      bounds = np.broadcast_arrays(q_low, q_high, k_low, k_high)
      found = rules.classify(mask.rule, *map(jnp.asarray, bounds))
      valid = valid & (np.asarray(found) != rules.SKIP)
    return int(np.count_nonzero(valid))

  k_low = np.asarray(mask.indices) * mask.block_kv
  k_high = np.minimum(k_low + mask.block_kv, t) - 1
  if mask.level is not None:  # a run stands at its last key
    k_low = k_low + 2 ** np.asarray(mask.level, np.int64) - 1
  edges = run(np.asarray(mask.listed), k_low, k_high)
  if mask.columns is not None:
    columns = np.asarray(mask.columns)
    pad = -columns.shape[-1] % mask.block_kv
    columns = np.pad(columns, [(0, 0)] * 3 + [(0, pad)], constant_values=-1)
    columns = columns.reshape(*columns.shape[:3], -1, mask.block_kv)
    read = (columns >= 0) & (columns < t)
    low = np.where(read, columns, t).min(-1)
    edges += run(read.any(-1), low, np.where(read, columns, -1).max(-1))
  return edges


def _smem(mask, q_shape, kv_shape):
  """Bytes of the lists of the TPU kernels, by query and by key."""
  settings = lists.Settings(
    block_q=mask.block_q, block_kv=mask.block_kv, scale=1.0, arange=True
  )

  def prepared(q, k, mask):
    positions = tuple(jnp.arange(x.shape[1])[None] for x in (q, k))
    return lists.prepare(q, k, k, mask, positions, None, settings)[:4]

  q, k = (jax.ShapeDtypeStruct(x, jnp.float32) for x in (q_shape, kv_shape))
  q, k, _, prefetched = jax.eval_shape(prepared, q, k, mask)
  return tpu.smem_bytes(q, k, prefetched, settings)
