"""What block-sparse attention means, with dense arrays: the definition.

Every other backend is tested against this one. It forms the whole [S, T] table
of logits and is differentiated by JAX. What a row may not read it multiplies by
zero, so a NaN there spreads, which in other backends it does not.
"""

import jax
import jax.numpy as jnp

from pallas_kernels import block_mask


def attention(q, k, v, mask, settings, positions, segments, sinks):
  """Output and log-sum-exp, of f32 logits.

  Args:
    q: [B, S, H, D].
    k: [B, T, Hkv, D].
    v: [B, T, Hkv, D].
    mask: a BlockMask.
    settings: scale, softcap and skip_threshold are read.
    positions: int32 ([B | 1, S], [B | 1, T]).
    segments: None, or as positions.
    sinks: None or f32 [H].

  Returns:
    out: [B, S, H, D] in the dtype of q.
    lse: f32 [B, S, H].
    mass: dict of f32 [B, H, nq, C]: "sum" and "max" of the probability of each
      listed block.
  """
  b, s, h, d = q.shape
  t, hkv = k.shape[1:3]
  nq, capacity = mask.indices.shape[2:]
  block_q, block_kv = mask.block_q, mask.block_kv
  q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
  k, v = (jnp.repeat(x, h // hkv, axis=2) for x in (k, v))

  # slot_of[b, h, s, c, t]: the query reads the key through this slot.
  block_of_key = jnp.arange(t) // block_kv
  through = (mask.indices[..., None] == block_of_key) & mask.listed[..., None]
  through = jnp.repeat(through, block_q, axis=2)[:, :, :s]
  if mask.members is not None:
    bits = block_mask.unpack_members(mask.members, capacity)
    bits = jnp.swapaxes(bits, -1, -2).reshape(*bits.shape[:2], -1, capacity)
    through &= bits[:, :, :s, :, None]
  level = jnp.zeros_like(mask.indices) if mask.level is None else mask.level
  level = jnp.repeat(level, block_q, axis=2)[:, :, :s, :, None]

  # Keys of every level side by side: [b, h, s, c, keys], c for all but columns.
  logits, reads, values = [], [], []
  for depth in range(mask.max_level + 1):
    run = 2**depth
    pool = lambda x, run=run: x.reshape(b, t // run, run, h, d).mean(2)
    logit = jnp.einsum("bshd,bthd->bhst", q, pool(k)) * settings.scale
    if settings.softcap is not None:
      logit = settings.softcap * jnp.tanh(logit / settings.softcap)
    last = slice(run - 1, None, run)  # a run stands at its last key
    allowed = (through & (level == depth))[..., last]
    extra = _readable(mask.rule, positions, segments, last)
    if depth == 0 and mask.columns is not None:
      single = (mask.columns[..., None] == jnp.arange(t)).any(-2)
      single = jnp.repeat(single, block_q, axis=2)[:, :, :s, None]
      allowed = jnp.concatenate(
        [
          allowed,
          jnp.broadcast_to(single, (*allowed.shape[:2], s, 1, t)),
        ],
        axis=-2,
      )
    elif mask.columns is not None:
      allowed = jnp.pad(allowed, [(0, 0)] * 3 + [(0, 1), (0, 0)])
    logits.append(logit + depth * jnp.log(2.0))
    reads.append(allowed & extra)
    values.append(pool(v))
  logits = jnp.concatenate(logits, -1)
  reads = jnp.broadcast_to(
    jnp.concatenate(reads, -1),
    (b, h, s, capacity + (mask.columns is not None), logits.shape[-1]),
  )
  if settings.skip_threshold:
    reads = _without_skipped(reads, logits, capacity, settings, block_q)
  any_slot = reads.any(-2)

  top = jnp.where(any_slot, logits, -jnp.inf).max(-1, initial=-jnp.inf)
  if sinks is not None:
    top = jnp.maximum(top, sinks[:, None])
  top = jax.lax.stop_gradient(jnp.where(jnp.isfinite(top), top, 0))
  weight = jnp.where(any_slot, jnp.exp(logits - top[..., None]), 0)
  total = weight.sum(-1)
  if sinks is not None:
    total += jnp.exp(sinks[:, None] - top)
  some = total != 0
  safe = jnp.where(some, total, 1)
  p = weight / safe[..., None]
  out = jnp.einsum("bhst,bthd->bshd", p, jnp.concatenate(values, 1))
  lse = jnp.where(some, top + jnp.log(safe), -jnp.inf)

  each = jnp.where(reads[..., :capacity, :], p[..., None, :], 0)
  each = jnp.pad(
    each, ((0, 0), (0, 0), (0, nq * block_q - s), (0, 0), (0, 0))
  ).reshape(b, h, nq, block_q, capacity, -1)
  mass = {"sum": each.sum((3, 5)), "max": each.max((3, 5), initial=0)}
  return out, jnp.swapaxes(lse, 1, 2), mass


def _readable(rule, positions, segments, keys):
  """bool [B | 1, 1, S | 1, 1, keys]: what rule and segments allow."""
  allowed = jnp.ones((1, 1, 1, 1, 1), bool)
  if rule is not None:
    q_at, k_at = positions
    allowed &= rule(q_at[:, :, None], k_at[:, None, keys])[:, None, :, None]
  if segments is not None:
    q_in, k_in = segments
    same = q_in[:, :, None] == k_in[:, None, keys]
    allowed &= same[:, None, :, None]
  return allowed


def _without_skipped(reads, logits, capacity, settings, block_q):
  """Drops the blocks that BLASST skips, tile by tile in the listed order."""
  b, h, s = reads.shape[:3]
  slots = reads[..., :capacity, :]
  top = jnp.where(slots, logits[..., None, :], -jnp.inf).max(-1)
  rows = -s % block_q
  top = jnp.pad(
    top, ((0, 0), (0, 0), (0, rows), (0, 0)), constant_values=-jnp.inf
  )
  best = jax.lax.cummax(top, axis=3)
  low = (top == -jnp.inf) | (top - best < jnp.log(settings.skip_threshold))
  skip = low.reshape(b, h, -1, block_q, capacity).all(3)
  skip = jnp.repeat(skip, block_q, axis=2)[:, :, :s, :, None]
  skip = jnp.pad(skip, [(0, 0)] * 3 + [(0, reads.shape[3] - capacity), (0, 0)])
  return reads & ~skip
