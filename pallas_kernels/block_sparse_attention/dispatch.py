"""Which backend runs a call, and on which shards of its arguments."""

from collections.abc import Callable
import dataclasses
import functools

from jax import lax

from pallas_kernels import partitioning
from pallas_kernels.block_sparse_attention import tpu
from pallas_kernels.block_sparse_attention import xla


def _lacks(q, k, lists, settings):
  """What the TPU kernel cannot do of a call, or None."""
  taken = max(tpu.smem_bytes(q, k, lists, settings))
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


@dataclasses.dataclass(frozen=True)
class Pass:
  """What every backend has a function of.

  Attributes:
    xla: f(q, k, v, lists, *rest, settings), which returns a tuple.
    tpu: the same as a kernel, or None where XLA runs it everywhere.
    rest: the dimensions of the further arguments, as names of `_NAMES`.
    outs: those of the outputs.
    if_skipping: those of what is returned besides with a skip_threshold, and
      is None without.
    summed: for an output by its number, the letter whose shards to sum over.
  """

  xla: Callable
  tpu: Callable | None
  rest: tuple[str, ...]
  outs: tuple[str, ...]
  if_skipping: tuple[str, ...] = ()
  summed: tuple[tuple[int, str], ...] = ()


FORWARD = Pass(xla.forward, tpu.forward, (), ("q", "lse"), ("indices",))
BACKWARD = Pass(
  xla.backward,
  tpu.backward,
  ("lse", "lse", "q"),
  ("q", "k", "k"),
  summed=((1, "n"), (2, "n")),
)
BLOCK_MASS = Pass(xla.block_mass, None, ("lse",), ("indices",))


def on_shards(which: Pass, q, k, v, lists, rest, settings):
  """A function of the chosen backend, on the shards of its arguments."""
  # The branches of a choice must vary alike, whatever they read.
  q, k, v, lists, rest = partitioning.vary_alike(q, k, v, lists, rest)
  present = {
    field.name: getattr(lists, field.name)
    for field in dataclasses.fields(lists)
    if getattr(lists, field.name) is not None
  }
  args = (q, k, v, *rest, *present.values())
  names = [_NAMES[x] for x in ("q", "k", "k", *which.rest, *present)]
  outs = which.outs + (which.if_skipping if settings.skip_threshold else ())
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
    found = _choose(which, here, q, k, v, lists_here, *rest_here)
    return tuple(x for x in found if x is not None)

  return partitioning.per_shard(
    run,
    args,
    names,
    [_NAMES[x] for x in outs],
    sizes,
    cut="bng",
    summed=dict(which.summed),
  )


def _choose(which, settings, *args):
  """Runs a function of the backend asked for, or of the platform's."""
  fallback = functools.partial(which.xla, settings=settings)
  if which.tpu is None:
    return fallback(*args)
  kernel = functools.partial(which.tpu, settings=settings)
  lacks = _lacks(args[0], args[1], args[3], settings)
  if settings.backend == "xla" or (settings.backend == "auto" and lacks):
    return fallback(*args)
  if settings.backend == "tpu":
    if lacks:
      raise ValueError(f"backend 'tpu' has no {lacks}; use 'xla' or None.")
    return kernel(*args)
  return lax.platform_dependent(*args, tpu=kernel, default=fallback)
