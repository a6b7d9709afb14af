"""Which backend runs a call, and on which shards of its arguments."""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import backends
from pallas_kernels import partitioning
from pallas_kernels.grouped_matmul import tpu
from pallas_kernels.grouped_matmul import xla


@dataclasses.dataclass(frozen=True)
class Combine:
  """What becomes of a row's products: activation(first) * second."""

  activation: Callable | None = None

  def __call__(self, first, second=None):
    if self.activation is not None:
      first = self.activation(first)
    return first if second is None else first * second


@dataclasses.dataclass(frozen=True)
class Settings:
  """The static part of a call.

  Attributes:
    dtype: of the result.
    transpose_rhs: whether weights are [g, n, k].
    combine: see Combine.
    backend: "auto", "tpu" or "xla".
    interpret: of the Pallas kernel.
  """

  dtype: Any
  transpose_rhs: bool = False
  combine: Combine = Combine()
  backend: str = "auto"
  interpret: Any = False


# The dimensions of an array by a letter each, for pallas_kernels.partitioning:
# m edges, s sources, t targets, g groups, k and n of the weights.


def product(lhs, weights, scale, edges, settings, dots_with=None):
  """See `xla.product`: a tuple of the result and, where asked for, the dots."""
  linear = len(weights) == 1 and settings.combine == Combine()
  target = "m n" if edges.target is None else "t n"
  arrays = {
    "lhs": (lhs, "m k" if edges.source is None else "s k"),
    "weights": (weights, "g n k" if settings.transpose_rhs else "g k n"),
    "dots_with": (dots_with, target),
    "scale": (scale, "m"),
  }
  static = dict(
    transpose_rhs=settings.transpose_rhs,
    combine=settings.combine,
    dtype=settings.dtype,
  )
  outs, summed = [target], {0: "gk" if edges.target is None else "gkm"}
  if dots_with is not None:
    outs, summed = [target, "m"], summed | {1: "gkn"}
  cut = "mgnk" if linear else "mgn"
  run = _choose(settings, "product", static)
  return _on_shards(run, arrays, edges, outs, cut, summed)


def outer(lhs, rhs, scale, edges, settings, like):
  """See `xla.outer`; sharded as the weights `like` the result are."""
  arrays = {
    "lhs": (lhs, "m k" if edges.source is None else "s k"),
    "rhs": (rhs, "m n" if edges.target is None else "t n"),
    "scale": (scale, "m"),
    "like": (like, "g k n"),
  }
  choice = _choose(settings, "outer", dict(dtype=settings.dtype))
  run = lambda like, **given: (choice(**given),)
  (out,) = _on_shards(run, arrays, edges, ["g k n"], "mgkn", {0: "m"})
  return out


def _choose(settings, name, static):
  """The function of the backend asked for, or of the platform's."""
  fallback = functools.partial(getattr(xla, name), **static)
  kernel = functools.partial(
    getattr(tpu, name), **static, interpret=settings.interpret
  )

  def run(**given):
    return backends.choose(
      settings.backend,
      lambda given: kernel(**given),
      lambda given: fallback(**given),
      tpu.lacks(given["lhs"]),
      (given,),
    )

  return run


def _on_shards(f, arrays, edges, outs, cut, summed):
  """f(edges=..., **arrays) on shards of them all."""
  # The first number tells a shard of the edges where it begins.
  number = jnp.arange(edges.count, dtype=jnp.int32)
  lists = {
    "source": (edges.source, "m"),
    "target": (edges.target, "m"),
    "number": (number, "m"),
    "starts": (edges.starts, "g"),
    "ends": (edges.ends, "g"),
  }
  trees = {name: x for name, (x, _) in (arrays | lists).items()}
  words = {
    name: jax.tree.map(lambda _, word=word: word, x)
    for name, (x, word) in (arrays | lists).items()
  }
  leaves, structure = jax.tree.flatten(partitioning.vary_alike(trees)[0])
  names = jax.tree.leaves(words)

  def run(axes, *leaves):
    given = jax.tree.unflatten(structure, leaves)
    number, starts, ends, source, target = (
      given.pop(n) for n in ("number", "starts", "ends", "source", "target")
    )
    count = number.shape[0]
    here = edges
    if "m" in axes:
      starts, ends = (jnp.clip(x - number[0], 0, count) for x in (starts, ends))
    here = dataclasses.replace(
      edges,
      starts=starts,
      ends=ends,
      source=source,
      target=target,
      count=count,
      sources=count if source is None else edges.sources,
      targets=count if target is None else edges.targets,
    )
    return f(edges=here, **given)

  sizes = {"m": edges.count, "s": edges.sources, "t": edges.targets}
  for x, word in zip(leaves, names, strict=True):
    sizes |= dict(zip(word.split(), x.shape, strict=True))

  # Of loops whose length varies vmap would make masked ones.
  @jax.custom_batching.sequential_vmap
  def call(*leaves):
    return partitioning.per_shard(
      run,
      leaves,
      names,
      outs,
      sizes,
      cut,
      summed=summed,
      follow=len(leaves),
      batch=None,
    )

  return call(*leaves)
