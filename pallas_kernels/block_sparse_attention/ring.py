"""Block-sparse attention over keys that are spread over devices, in a ring.

Every device keeps its queries; keys and values go around, one neighbor at a
time, and so do their gradients in the backward pass. No device ever holds more
than two shards of keys.
"""

import functools

import jax
from jax import lax
import jax.numpy as jnp

from pallas_kernels import partitioning
from pallas_kernels.block_sparse_attention import attention
from pallas_kernels.block_sparse_attention import checks
from pallas_kernels.block_sparse_attention import dispatch


def ring_attention(
  q,
  k,
  v,
  mask,
  *,
  axis_name,
  scale=None,
  softcap=None,
  sinks=None,
  q_positions=None,
  kv_positions=None,
  q_segment_ids=None,
  kv_segment_ids=None,
  return_lse=False,
  backend=None,
  interpret=False,
):
  """`block_sparse_attention` inside a `jax.shard_map`, its keys sharded.

  The device at index i of the axis has the i-th of n equal shards of the
  queries and of the keys. Differentiable in q, k, v and sinks.

  Args:
    q: [B, S / n, H, D], the device's queries.
    k: [B, T / n, Hkv, D], its keys; T / n a multiple of block_kv.
    v: as k.
    mask: a BlockMask of the device's query blocks over all key blocks: its
      indices and columns count from the first key of all, and kv_blocks is
      T / block_kv. S / n must be a multiple of block_q.
    axis_name: the mesh axis along which the sequence is sharded.
    scale: as in `block_sparse_attention`; so are `softcap`, `sinks`,
      `return_lse`, `backend` and `interpret`.
    q_positions: int32 [S / n] or [B, S / n]; by default the device's part of
      arange(S).
    kv_positions: int32 [T / n] or [B, T / n]; by default its part of arange(T).
    q_segment_ids: None, or int32 [S / n] or [B, S / n].
    kv_segment_ids: None, or int32 [T / n] or [B, T / n].

  Returns:
    [B, S / n, H, D] in the dtype of q, and f32 [B, S / n, H] if asked for.

  Raises:
    ValueError: as `block_sparse_attention` does, and for shards that are no
      whole blocks.

  Example:
    >>> import functools
    >>> mesh = jax.make_mesh((2,), ("sequence",))
    >>> q = jnp.ones((1, 64, 2, 8))
    >>> mask = pallas_kernels.BlockMask.from_blocks(
    ...   jnp.tril(jnp.ones((4, 4), bool)),
    ...   block_q=16,
    ...   block_kv=16,
    ...   rule=pallas_kernels.Causal(),
    ... )
    >>> rows = jax.P(None, "sequence")
    >>> lists = jax.tree.map(lambda _: jax.P(None, None, "sequence"), mask)
    >>> attend = jax.shard_map(
    ...   functools.partial(
    ...     pallas_kernels.ring_attention, axis_name="sequence"
    ...   ),
    ...   mesh=mesh,
    ...   in_specs=(rows, rows, rows, lists),
    ...   out_specs=rows,
    ... )
    >>> with jax.set_mesh(mesh):
    ...   q, mask = jax.reshard(q, rows), jax.tree.map(jax.reshard, mask, lists)
    ...   jax.jit(attend)(q, q, q, mask).shape
    (1, 64, 2, 8)
  """
  if backend == "reference":
    raise ValueError(
      "backend is 'reference'; a ring takes None, 'tpu' or 'xla'."
    )
  try:
    shards = lax.axis_size(axis_name)
  except NameError as e:
    raise ValueError(
      f"axis_name is {axis_name!r}, which is bound to no axis here; call "
      "ring_attention inside a jax.shard_map over that axis."
    ) from e
  s, t = q.shape[1], k.shape[1]
  if s % mask.block_q or t % mask.block_kv:
    raise ValueError(
      f"q has {s} rows and k {t} on each device; they must be multiples of "
      f"block_q, {mask.block_q}, and block_kv, {mask.block_kv}."
    )
  here = lax.axis_index(axis_name)
  of_all = mask._replace(kv_blocks=mask.kv_blocks // shards)
  if mask.kv_blocks % shards:
    raise ValueError(
      f"mask has {mask.kv_blocks} key blocks; {shards} devices must divide"
      " them."
    )
  call = checks.check(
    q,
    k,
    v,
    of_all,
    scale=scale,
    softcap=softcap,
    sinks=sinks,
    q_positions=here * s + jnp.arange(s)
    if q_positions is None
    else q_positions,
    kv_positions=here * t + jnp.arange(t)
    if kv_positions is None
    else kv_positions,
    q_segment_ids=q_segment_ids,
    kv_segment_ids=kv_segment_ids,
    backend=backend,
    interpret=interpret,
  )
  settings, positions, segments, sinks = call
  moving = (positions[1],) + (() if segments is None else (segments[1],))
  staying = (positions[0],) + (() if segments is None else (segments[0],))
  q, k, v, mask, staying, moving = partitioning.vary_alike(
    q, k, v, mask, staying, moving
  )
  out, lse = _ring(q, k, v, mask, staying, moving, settings, axis_name)
  out, lse = attention.with_sinks(out, lse, sinks)
  return (out, lse) if return_lse else out


def _prepare(q, k, v, mask, staying, moving, settings, shard):
  """The prepared call against the keys of one shard."""
  t = k.shape[1]
  blocks = t // mask.block_kv
  indices = mask.indices - shard * blocks
  inside = (indices >= 0) & (indices < blocks)
  columns = mask.columns
  if columns is not None:
    columns = columns - shard * t
    columns = jnp.where((columns >= 0) & (columns < t), columns, -1)
  local = mask._replace(
    indices=jnp.where(inside, indices, 0), columns=columns, kv_blocks=blocks
  )
  pairs = list(zip(staying, moving, strict=True))
  return dispatch.prepare(
    q,
    k,
    v,
    local,
    pairs[0],
    pairs[1] if len(pairs) > 1 else None,
    settings,
    listed=mask.listed & inside,
  )


def _pass_on(tree, axis_name):
  """Everything moves to the next device."""
  n = lax.axis_size(axis_name)
  around = [(i, (i + 1) % n) for i in range(n)]
  return jax.tree.map(lambda x: lax.ppermute(x, axis_name, around), tree)


def _shard_at(step, axis_name):
  """Whose keys are here after so many steps."""
  n = lax.axis_size(axis_name)
  return (lax.axis_index(axis_name) - step) % n


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def _ring(q, k, v, mask, staying, moving, settings, axis_name):
  """Output and log-sum-exp over the keys of all devices."""

  def step(carry, at):
    (k_here, v_here, moving_here), out, lse = carry
    *call, full = _prepare(
      q,
      k_here,
      v_here,
      mask,
      staying,
      moving_here,
      settings,
      _shard_at(at, axis_name),
    )
    more, more_lse = dispatch.on_shards(dispatch.FORWARD, *call, (), full)
    total = jnp.logaddexp(lse, more_lse)
    share = lambda x: jnp.exp(
      jnp.where(jnp.isfinite(total), x - total, -jnp.inf)
    )[..., None]
    out = out * share(lse) + more.astype(jnp.float32) * share(more_lse)
    here = _pass_on((k_here, v_here, moving_here), axis_name)
    return (here, out, total), None

  out = jnp.zeros_like(q, dtype=jnp.float32)
  lse = jnp.full_like(out[..., 0], -jnp.inf)
  steps = jnp.arange(lax.axis_size(axis_name))
  (_, out, lse), _ = lax.scan(step, ((k, v, moving), out, lse), steps)
  return out.astype(q.dtype), lse


def _ring_fwd(q, k, v, mask, staying, moving, settings, axis_name):
  # Itself, so that it can be differentiated again by its own rule.
  out, lse = _ring(q, k, v, mask, staying, moving, settings, axis_name)
  return (out, lse), (q, k, v, mask, staying, moving, out, lse)


def _ring_bwd(settings, axis_name, residuals, cotangents):
  q, k, v, mask, staying, moving, out, lse = residuals
  dout, dlse = cotangents
  delta = attention.delta(out, dout, dlse)

  def step(carry, at):
    (k_here, v_here, moving_here, dk, dv), dq = carry
    shard = _shard_at(at, axis_name)

    def keys(k, v):
      call = _prepare(q, k, v, mask, staying, moving_here, settings, shard)
      return call[1:3]

    *call, full = _prepare(
      q, k_here, v_here, mask, staying, moving_here, settings, shard
    )
    *arrays, lists = call
    rest = (lse, delta, dout)
    more, *of_keys = attention.backward(*arrays, rest, lists, full)
    _, pull = jax.vjp(keys, k_here, v_here)
    of_keys = pull(tuple(of_keys))
    dk, dv = (
      total + part.astype(jnp.float32)
      for total, part in zip((dk, dv), of_keys, strict=True)
    )
    here = _pass_on((k_here, v_here, moving_here, dk, dv), axis_name)
    return (here, dq + more.astype(jnp.float32)), None

  zeros = lambda x: jnp.zeros_like(x, dtype=jnp.float32)
  carry = ((k, v, moving, zeros(k), zeros(v)), zeros(q))
  steps = jnp.arange(lax.axis_size(axis_name))
  ((*_, dk, dv), dq), _ = lax.scan(step, carry, steps)
  grads = (x.astype(like.dtype) for x, like in ((dq, q), (dk, k), (dv, v)))
  return *grads, None, None, None


_ring.defvjp(_ring_fwd, _ring_bwd)
