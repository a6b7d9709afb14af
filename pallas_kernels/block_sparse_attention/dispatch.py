"""Which backend runs a call, and on which shards of its arguments."""

import dataclasses
import functools

from jax import lax

from pallas_kernels import partitioning
from pallas_kernels.block_sparse_attention import tpu
from pallas_kernels.block_sparse_attention import xla


def _lacks(q, k, lists, settings):
  """What the TPU kernel cannot do of a call, or None."""
  if settings.skip_threshold:
    return "skip_threshold"
  taken = tpu.smem_bytes(q, k, lists, settings)
  if q.size and k.size and taken > tpu.SMEM:
    return f"room for lists of {taken} bytes (SMEM holds {tpu.SMEM})"
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
  "edges": "b g e",
}


def on_shards(name, q, k, v, lists, rest, settings):
  """A function of the chosen backend, on the shards of its arguments."""
  # The branches of a choice must vary alike, whatever they read.
  q, k, v, lists, rest = partitioning.vary_alike(q, k, v, lists, rest)
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
    "e": 1 if lists.edges is None else lists.edges.shape[2],
    "m": 1 if lists.members is None else lists.members.shape[3],
  }

  def run(axes, q, k, v, *others):
    rest_here, arrays = others[: len(rest)], others[len(rest) :]
    lists_here = dataclasses.replace(
      lists, **dict(zip(present, arrays, strict=True))
    )
    # Of a shard of the queries the positions are no indices, and edges would
    # tell of others.
    if "n" in axes:
      lists_here = dataclasses.replace(lists_here, edges=None)
    here = dataclasses.replace(
      settings, arange=settings.arange and "n" not in axes
    )
    found = _choose(here, name, q, k, v, lists_here, *rest_here)
    return tuple(x for x in found if x is not None)

  if name == "block_mass":
    outs, summed = [_NAMES["indices"]], {}
  elif name == "forward":
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
  if name == "block_mass":  # a pass of its own, by XLA everywhere
    return fallback(*args)
  kernel = functools.partial(getattr(tpu, name), settings=settings)
  lacks = _lacks(args[0], args[1], args[3], settings)
  if settings.backend == "xla" or (settings.backend == "auto" and lacks):
    return fallback(*args)
  if settings.backend == "tpu":
    if lacks:
      raise ValueError(f"backend 'tpu' has no {lacks}; use 'xla' or None.")
    return kernel(*args)
  return lax.platform_dependent(*args, tpu=kernel, default=fallback)
