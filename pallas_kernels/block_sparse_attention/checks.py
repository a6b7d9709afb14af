"""Whether the arguments of a call fit each other."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import backends
from pallas_kernels import block_mask
from pallas_kernels.block_sparse_attention import lists as lists_lib


def check(
  q,
  k,
  v,
  mask,
  *,
  scale,
  softcap,
  sinks,
  q_positions,
  kv_positions,
  q_segment_ids,
  kv_segment_ids,
  backend,
  interpret,
  skip_threshold=None,
  block_mass=None,
):
  """Settings, positions, segments and sinks of a call.

  Args:
    q: as in `block_sparse_attention`; so are all the others.

  Returns:
    Settings, int32 positions ([B | 1, S], [B | 1, T]), None or segments of the
    same shapes, None or f32 sinks [H].

  Raises:
    ValueError: naming the argument, what it got, and what it takes.
  """
  _arrays(q, k, v, mask)
  b, s, h, d = q.shape
  t = k.shape[1]
  positions = (
    _integers("q_positions", _near(q_positions), b, s, jnp.arange(s)),
    _integers("kv_positions", _near(kv_positions), b, t, jnp.arange(t)),
  )
  positions = tuple(map(_near, positions))
  segments = None
  if (q_segment_ids is None) != (kv_segment_ids is None):
    raise ValueError(
      "q_segment_ids and kv_segment_ids must be given together; got "
      f"{'kv' if q_segment_ids is None else 'q'}_segment_ids alone."
    )
  if q_segment_ids is not None:
    segments = (
      _integers("q_segment_ids", q_segment_ids, b, s),
      _integers("kv_segment_ids", kv_segment_ids, b, t),
    )
  if sinks is not None:
    sinks = _array("sinks", sinks, f"real numbers, [{h}]")
    if jnp.issubdtype(sinks.dtype, jnp.complexfloating):
      raise ValueError(f"sinks has dtype {sinks.dtype}; it must be real.")
    sinks = sinks.astype(jnp.float32)
    if sinks.shape != (h,):
      raise ValueError(
        f"sinks has shape {sinks.shape}; it must be ({h},), one a query head."
      )
  scale = d**-0.5 if scale is None else _number("scale", scale)
  if not math.isfinite(scale):
    raise ValueError(f"scale is {scale}; it must be finite.")
  if softcap is not None:
    softcap = _number("softcap", softcap)
    if not 0 < softcap < math.inf:
      raise ValueError(
        f"softcap is {softcap}; it must be positive and finite, or None."
      )
  if skip_threshold is not None:
    skip_threshold = _number("skip_threshold", skip_threshold)
    if not 0 <= skip_threshold < 1:
      raise ValueError(
        f"skip_threshold is {skip_threshold}; it must be in [0, 1)."
      )
  if skip_threshold and mask.level is not None:
    raise ValueError(
      f"skip_threshold is {skip_threshold}; with a mask that has level it must "
      "be None, since a run of keys has no one probability to hold against it."
    )
  if block_mass not in (None, "sum", "max"):
    raise ValueError(
      f"return_block_mass is {block_mass!r}; it takes None, 'sum' or 'max'."
    )
  backends.check(backend, interpret)
  settings = lists_lib.Settings(
    block_q=mask.block_q,
    block_kv=mask.block_kv,
    scale=scale,
    softcap=softcap,
    skip_threshold=skip_threshold or None,
    arange=q_positions is None and kv_positions is None,
    backend=backend or "auto",
    interpret=interpret,
  )
  return settings, positions, segments, sinks


def _arrays(q, k, v, mask):
  for name, x in (("q", q), ("k", k), ("v", v)):
    if not hasattr(x, "dtype"):
      raise ValueError(
        f"{name} is a {type(x).__name__}; it must be a floating array, [batch, "
        "sequence, heads, head_dim]."
      )
    if x.ndim != 4 or not jnp.issubdtype(x.dtype, jnp.floating):
      raise ValueError(
        f"{name} is {x.dtype}{list(x.shape)}; it must be floating, [batch, "
        "sequence, heads, head_dim]."
      )
    if x.dtype != q.dtype:
      raise ValueError(f"{name} has dtype {x.dtype}, q {q.dtype}; use one.")
  if k.shape != v.shape:
    raise ValueError(f"v has shape {v.shape}; it must be that of k, {k.shape}.")
  b, s, h, d = q.shape
  if (k.shape[0], k.shape[3]) != (b, d):
    raise ValueError(
      f"k has shape {k.shape}; with q {q.shape} its batch must be {b} and its "
      f"head_dim {d}."
    )
  if k.shape[2] == 0 or h % k.shape[2]:
    raise ValueError(
      f"q has {h} heads and k {k.shape[2]}; the query heads must be a multiple "
      "of the key heads."
    )
  if not isinstance(mask, block_mask.BlockMask):
    raise ValueError(
      f"mask is a {type(mask).__name__}; it must be a BlockMask "
      "(BlockMask.from_blocks makes one of a dense table)."
    )
  lead_b, lead_h, nq = mask.counts.shape
  wanted = (-(-s // mask.block_q), -(-k.shape[1] // mask.block_kv))
  if (nq, mask.kv_blocks) != wanted:
    raise ValueError(
      f"mask has {nq} query blocks of {mask.block_q} and {mask.kv_blocks} key "
      f"blocks of {mask.block_kv}; {s} queries and {k.shape[1]} keys make "
      f"{wanted[0]} and {wanted[1]}. (Arrays are [batch, sequence, heads, "
      f"head_dim]; q is {list(q.shape)}.)"
    )
  if lead_b not in (1, b) or lead_h not in (1, h):
    raise ValueError(
      f"mask has leading dimensions {(lead_b, lead_h)}; they must be 1 or the "
      f"batch {b}, and 1 or the query heads {h}."
    )
  if mask.edges is not None and lists_lib.tells(mask):
    width = h // k.shape[2] * nq * mask.capacity
    if mask.edges.shape[2] != width:
      raise ValueError(
        f"mask has edges of {mask.edges.shape}; {h} query and {k.shape[2]} key "
        f"heads need {width}. Make them by mask.with_transpose({h}, "
        f"{k.shape[2]})."
      )
  if mask.level is not None and k.shape[1] % mask.block_kv:
    raise ValueError(
      f"k has {k.shape[1]} keys; with a mask that has level they must be a "
      f"multiple of block_kv, {mask.block_kv}."
    )


def _near(x):
  """Positions within what int32 holds the differences of.

  NumPy's are clipped before JAX makes int32 of them, which would wrap.
  """
  if not isinstance(x, jax.Array | np.ndarray) or x.dtype.kind not in "iu":
    return x
  return x.clip(1 - lists_lib.FAR, lists_lib.FAR - 1)


def _array(name, value, takes):
  """A JAX array; ValueError for what makes none."""
  try:
    return jnp.asarray(value)
  except (TypeError, ValueError) as e:
    raise ValueError(
      f"{name} is a {type(value).__name__}; it must hold {takes}."
    ) from e


def _number(name, value):
  """A float; ValueError for a traced one and what is none."""
  if isinstance(value, jax.core.Tracer):
    raise ValueError(
      f"{name} is traced; it is static, a number that is known when the call "
      "is compiled."
    )
  try:
    return float(value if not isinstance(value, str | bytes) else None)
  except (TypeError, ValueError) as e:
    got = f"of shape {value.shape}" if hasattr(value, "shape") else repr(value)
    raise ValueError(f"{name} is {got}; it must be a number or None.") from e


def _integers(name, value, batch, length, default=None):
  """int32 [B | 1, length]."""
  takes = f"integers, [{length}] or [{batch}, {length}]"
  value = default if value is None else _array(name, value, takes)
  shapes = ((length,), (1, length), (batch, length))
  if value.shape not in shapes or not jnp.issubdtype(value.dtype, jnp.integer):
    raise ValueError(
      f"{name} is {value.dtype}{list(value.shape)}; it must hold {takes}."
    )
  return jnp.atleast_2d(value.astype(jnp.int32))
