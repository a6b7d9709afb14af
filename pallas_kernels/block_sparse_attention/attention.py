"""The public function: checks, the choice of a backend, and the derivative."""

import dataclasses
import functools

import jax
from jax import lax
import jax.numpy as jnp

from pallas_kernels import block_mask
from pallas_kernels import partitioning
from pallas_kernels import rules
from pallas_kernels.block_sparse_attention import lists as lists_lib
from pallas_kernels.block_sparse_attention import reference
from pallas_kernels.block_sparse_attention import tpu
from pallas_kernels.block_sparse_attention import xla

BACKENDS = ("tpu", "xla", "reference")


def block_sparse_attention(
  q,
  k,
  v,
  mask,
  *,
  scale=None,
  softcap=None,
  sinks=None,
  q_positions=None,
  kv_positions=None,
  q_segment_ids=None,
  kv_segment_ids=None,
  skip_threshold=None,
  return_lse=False,
  return_block_mass=None,
  backend=None,
  interpret=False,
):
  """Attention in which every query block reads the key blocks that it lists.

  Equal to `jax.nn.dot_product_attention` with the mask written out, except that
  a row which may read nothing gives zeros, with zero gradients. Work and
  memory grow with the listed blocks. Differentiable in q, k, v and sinks;
  the mask's arrays carry no gradient and may be arguments of a jitted function.

  Args:
    q: [B, S, H, D], floating.
    k: [B, T, Hkv, D] in the dtype of q, H a multiple of Hkv: query head h reads
      key head h // (H // Hkv).
    v: as k.
    mask: a BlockMask of ceil(S / block_q) query blocks and ceil(T / block_kv)
      key blocks.
    scale: what q . k is multiplied by, default D ** -0.5.
    softcap: None, or logits become softcap * tanh(logits / softcap).
    sinks: None, or f32 [H]: a further logit a head, in the denominator of the
      softmax alone.
    q_positions: int32 [S] or [B, S], default arange(S): what the rule of the
      mask sees.
    kv_positions: int32 [T] or [B, T], default arange(T).
    q_segment_ids: None, or int32 [S] or [B, S]: a query reads only keys of its
      own segment.
    kv_segment_ids: int32 [T] or [B, T]; given together with `q_segment_ids`.
    skip_threshold: None, or a number in [0, 1): a block is skipped whose
      probability, against the largest logit so far, is below it in every row of
      the tile. At 0 nothing is.
    return_lse: also return the log-sum-exp of each row's logits (and its sink).
    return_block_mass: None, "sum" or "max": also return the sum or maximum of
      the probabilities in each listed block, without a gradient.
    backend: None chooses by platform: "tpu" (Pallas) on TPU, "xla" elsewhere.
      "reference" is the dense definition. A backend named here runs or raises.
    interpret: run the Pallas kernel in the interpreter, on any platform: True,
      or `jax.experimental.pallas.tpu.InterpretParams(...)`.

  Returns:
    [B, S, H, D] in the dtype of q; where asked for, a tuple with f32
    [B, S, H] (log-sum-exp, -inf for a row that reads nothing) and
    f32 [B, H, nq, C] (block mass) behind it.

  Raises:
    ValueError: for shapes, dtypes or options that do not fit, naming the
      argument, and for an explicit backend that lacks what is asked.

  Example:
    >>> q = k = v = jnp.ones((1, 64, 2, 8))
    >>> mask = pallas_kernels.BlockMask.from_blocks(
    ...   jnp.tril(jnp.ones((4, 4), bool)),
    ...   block_q=16,
    ...   block_kv=16,
    ...   rule=pallas_kernels.Causal(),
    ... )
    >>> pallas_kernels.block_sparse_attention(q, k, v, mask).shape
    (1, 64, 2, 8)

  Source: blasst, BLASST: the skip condition of its algorithm, decided for a
  tile in the order of its list. psa, PSA: multi-level key blocks, their logits
  raised by the logarithm of the pool's size (`BlockMask.level`).
  """
  _check_arrays(q, k, v, mask)
  b, s, h, d = q.shape
  t = k.shape[1]
  positions = (
    _check_integers("q_positions", q_positions, b, s, jnp.arange(s)),
    _check_integers("kv_positions", kv_positions, b, t, jnp.arange(t)),
  )
  segments = None
  if (q_segment_ids is None) != (kv_segment_ids is None):
    raise ValueError(
      "q_segment_ids and kv_segment_ids must be given together; got "
      f"{'kv' if q_segment_ids is None else 'q'}_segment_ids alone."
    )
  if q_segment_ids is not None:
    segments = (
      _check_integers("q_segment_ids", q_segment_ids, b, s),
      _check_integers("kv_segment_ids", kv_segment_ids, b, t),
    )
  if sinks is not None:
    sinks = jnp.asarray(sinks, jnp.float32)
    if sinks.shape != (h,):
      raise ValueError(
        f"sinks has shape {sinks.shape}; it must be ({h},), one a query head."
      )
  if softcap is not None and not softcap > 0:
    raise ValueError(f"softcap is {softcap}; it must be positive.")
  if skip_threshold is not None and not 0 <= skip_threshold < 1:
    raise ValueError(
      f"skip_threshold is {skip_threshold}; it must be in [0, 1)."
    )
  if return_block_mass not in (None, "sum", "max"):
    raise ValueError(
      f"return_block_mass is {return_block_mass!r}; it takes None, 'sum' or "
      "'max'."
    )
  if backend is not None and backend not in BACKENDS:
    raise ValueError(
      f"backend is {backend!r}; it takes None or one of {BACKENDS}."
    )
  if interpret and backend != "tpu":
    raise ValueError(
      f"interpret is {interpret!r} with backend {backend!r}; it runs a Pallas "
      "kernel, so name one: backend='tpu'."
    )
  settings = lists_lib.Settings(
    block_q=mask.block_q,
    block_kv=mask.block_kv,
    scale=d**-0.5 if scale is None else float(scale),
    softcap=None if softcap is None else float(softcap),
    skip_threshold=skip_threshold or None,
    arange=q_positions is None and kv_positions is None,
    backend=backend or "auto",
    interpret=interpret,
  )
  mask = _drop_unread(mask, t)
  if backend == "reference":
    out, lse, mass = reference.attention(
      q, k, v, mask, settings, positions, segments, sinks
    )
    mass = mass.get(return_block_mass)
    out = out.astype(q.dtype)
  else:
    out, lse, mass = _by_kernel(
      q, k, v, mask, settings, positions, segments, sinks, return_block_mass
    )
  found = (out,)
  if return_lse:
    found += (lse,)
  if return_block_mass is not None:
    found += (lax.stop_gradient(mass),)
  return found if len(found) > 1 else out


def _by_kernel(q, k, v, mask, settings, positions, segments, sinks, mass_kind):
  """Prepares, runs the kernel, and applies what is simple after it."""
  s = q.shape[1]
  queries, keys, values, lists, settings = lists_lib.prepare(
    q, k, v, mask, positions, segments, settings
  )
  out, lse, kept = run(queries, keys, values, lists, settings)
  out, lse = out[:, :s], lse[:, :s]
  if sinks is not None:
    # A sink only lowers all probabilities of its row alike.
    share = jax.nn.sigmoid(lse - sinks)
    out = (out * share[..., None]).astype(out.dtype)
    lse = jnp.logaddexp(lse, sinks)
  mass = None
  if mass_kind is not None:
    rows = ((0, 0), (0, queries.shape[1] - s), (0, 0))
    padded = jnp.pad(lse, rows, constant_values=jnp.inf)
    operands = lax.stop_gradient((queries, keys, padded))
    mass = _mass(*operands, without(lists, kept), settings, mass_kind)
    mass = mass[..., : mask.capacity]
    if mask.level is not None and mass_kind == "max":
      mass *= 2 ** mask.level.astype(jnp.int32)  # of a run, not of one key
  return out, lse, mass


def without(lists, kept):
  """Lists in which the blocks that were not kept are not run."""
  if kept is None:
    return lists
  return dataclasses.replace(
    lists, classes=jnp.where(kept, lists.classes, rules.SKIP)
  )


def _lacks(settings):
  """What the TPU kernel cannot do of a call, or None."""
  if settings.skip_threshold:
    return "skip_threshold"
  return None


# What the dimensions of an argument are, for pallas_kernels.partitioning.
_NAMES = {
  "q": "b nw gr d",
  "k": "b t g d",
  "lse": "b nw gr",
  "indices": "b gr n c",
  "classes": "b gr n c",
  "members": "b gr n m w",
  "q_positions": "b nw",
  "kv_positions": "b g t",
  "q_segments": "b nw",
  "kv_segments": "b g t",
}


def _on_shards(name, q, k, v, lists, rest, settings):
  """A function of the chosen backend, on the shards of its arguments."""
  present = {
    field.name: getattr(lists, field.name)
    for field in dataclasses.fields(lists)
    if getattr(lists, field.name) is not None
  }
  args = (q, k, v, *rest, *present.values())
  names = [_NAMES[x] for x in ("q", "k", "k")]
  names += [_NAMES["lse"], _NAMES["lse"], _NAMES["q"]][: len(rest)]
  names += [_NAMES[x] for x in present]
  sizes = {
    "b": q.shape[0],
    "n": lists.indices.shape[2],
    "w": settings.block_q,
    "g": k.shape[2],
    "r": q.shape[2] // k.shape[2],
    "d": q.shape[3],
    "t": k.shape[1],
    "c": lists.indices.shape[3],
    "m": 1 if lists.members is None else lists.members.shape[3],
  }

  def run(axes, q, k, v, *others):
    rest_here, arrays = others[: len(rest)], others[len(rest) :]
    lists_here = dataclasses.replace(
      lists, **dict(zip(present, arrays, strict=True))
    )
    # Of a shard of the queries the positions are no indices.
    here = dataclasses.replace(
      settings, arange=settings.arange and "n" not in axes
    )
    found = _choose(here, name, q, k, v, lists_here, *rest_here)
    return tuple(x for x in found if x is not None)

  if name == "forward":
    outs, summed = [_NAMES["q"], _NAMES["lse"]], {}
    if settings.skip_threshold:
      outs.append(_NAMES["indices"])
  else:
    outs, summed = [_NAMES["q"], _NAMES["k"], _NAMES["k"]], {1: "n", 2: "n"}
  return partitioning.per_shard(
    run, args, names, outs, sizes, cut="bng", summed=summed
  )


def _choose(settings, name, *args):
  """Runs a function of the backend asked for, or of the platform's."""
  fallback = functools.partial(getattr(xla, name), settings=settings)
  kernel = functools.partial(getattr(tpu, name), settings=settings)
  lacks = _lacks(settings)
  if settings.backend == "xla" or (settings.backend == "auto" and lacks):
    return fallback(*args)
  if settings.backend == "tpu":
    if lacks:
      raise ValueError(f"backend 'tpu' has no {lacks}; use 'xla' or None.")
    return kernel(*args)
  return lax.platform_dependent(*args, tpu=kernel, default=fallback)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def run(q, k, v, lists, settings):
  """out, lse and kept of prepared arguments; see xla.forward."""
  return _run_fwd(q, k, v, lists, settings)[0]


def _run_fwd(q, k, v, lists, settings):
  out, lse, *kept = _on_shards("forward", q, k, v, lists, (), settings)
  kept = kept[0] if kept else None
  lists = without(lists, kept)
  return (out, lse, kept), (q, k, v, lists, out, lse)


def _run_bwd(settings, residuals, cotangents):
  q, k, v, lists, out, lse = residuals
  dout, dlse, _ = cotangents
  delta = jnp.einsum(
    "bshd,bshd->bsh", out, dout, preferred_element_type=jnp.float32
  )
  rest = (lse, delta - dlse, dout)
  grads = _on_shards("backward", q, k, v, lists, rest, settings)
  grads = map(partitioning.sum_like, grads, (q, k, v))
  return *grads, None


run.defvjp(_run_fwd, _run_bwd)


def _mass(q, k, lse, lists, settings, kind):
  return xla.block_mass(q, k, lists, settings, lse, kind)


def _check_arrays(q, k, v, mask):
  for name, x in (("q", q), ("k", k), ("v", v)):
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
      f"{wanted[0]} and {wanted[1]}."
    )
  if lead_b not in (1, b) or lead_h not in (1, h):
    raise ValueError(
      f"mask has leading dimensions {(lead_b, lead_h)}; they must be 1 or the "
      f"batch {b}, and 1 or the query heads {h}."
    )
  if mask.level is not None and k.shape[1] % mask.block_kv:
    raise ValueError(
      f"k has {k.shape[1]} keys; with a mask that has level they must be a "
      f"multiple of block_kv, {mask.block_kv}."
    )


def _check_integers(name, value, batch, length, default=None):
  """int32 [B | 1, length]."""
  value = default if value is None else jnp.asarray(value)
  shapes = ((length,), (1, length), (batch, length))
  if value.shape not in shapes or not jnp.issubdtype(value.dtype, jnp.integer):
    raise ValueError(
      f"{name} is {value.dtype}{list(value.shape)}; it must hold integers, "
      f"[{length}] or [{batch}, {length}]."
    )
  return value.astype(jnp.int32).reshape(-1, length)


def _drop_unread(mask, keys):
  """The mask without columns past the last key, which padding would read."""
  if mask.columns is None:
    return mask
  inside = jnp.where(mask.columns < keys, mask.columns, -1)
  return mask._replace(columns=inside)
