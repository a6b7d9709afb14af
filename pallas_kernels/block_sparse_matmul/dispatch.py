"""Which backend runs a call, and on which shards of its arguments."""

import dataclasses
import functools
import math
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp

from pallas_kernels import backends
from pallas_kernels import partitioning
from pallas_kernels.block_sparse_matmul import lists
from pallas_kernels.block_sparse_matmul import tpu
from pallas_kernels.block_sparse_matmul import xla


@dataclasses.dataclass(frozen=True)
class Settings:
  """The static part of a call; hashable.

  Attributes:
    shape: (K, N) of the weight.
    values: (nnz, bk, bn).
    dtype: of the result.
    backend: "auto", "tpu" or "xla".
    interpret: of the Pallas kernel.
  """

  shape: tuple[int, int]
  values: tuple[int, int, int]
  dtype: Any
  backend: str = "auto"
  interpret: Any = False

  @property
  def blocks(self) -> tuple[int, int]:
    """(n_k, n_n)."""
    return tuple(
      -(-size // block) for size, block in zip(self.shape, self.values[1:])
    )


# The dimensions of arrays by a letter each, for pallas_kernels.partitioning:
# b and t rows, k and n block rows and columns of r and c numbers, p values.
_X, _Y, _VALUES = "b t kr", "b t nc", "p r c"


def product(x, values, ints, settings, transpose):
  """x @ weight, or its transpose: [b, t, width] of whole blocks."""
  names, target = (_X, _VALUES), _Y
  if transpose:
    names, target = (_Y, _VALUES), _X

  def run(x, values, where, share):
    row, column, first, n_k, n_n, edges = where
    sides = (column, row, n_n, n_k) if transpose else (row, column, n_k, n_n)
    values = lists.inside(values, row, column + first, settings.shape)
    static = dict(
      sources=sides[2],
      targets=sides[3],
      transpose=transpose,
      dtype=settings.dtype,
    )
    kernel = functools.partial(
      tpu.product, edges=edges, interpret=settings.interpret, **static
    )
    fallback = functools.partial(xla.product, share=share, **static)
    arrays = (x.reshape(-1, x.shape[-1]), values, *sides[:2])
    bytes_of = x.dtype.itemsize, settings.dtype.itemsize
    room = tpu.product_room(values.shape, *bytes_of, transpose)
    lacks = tpu.lacks(len(arrays[0]), values.shape, sides[3], room)
    out = backends.choose(settings.backend, kernel, fallback, lacks, arrays)
    return out.reshape(*x.shape[:-1], -1)

  summed = "np" if transpose else "p"
  return _on_shards(run, (x, values), names, target, ints, settings, summed)


def sampled(x, y, like, ints, settings):
  """The listed blocks of x.T @ y, sharded as the values `like` them are."""

  def run(x, y, like, where, share):
    row, column, first, n_k, n_n, _ = where
    static = dict(rows=n_k, columns=n_n, dtype=settings.dtype)
    kernel = functools.partial(
      tpu.sampled, interpret=settings.interpret, **static
    )
    fallback = functools.partial(xla.sampled, share=share, **static)
    x, y = (a.reshape(-1, a.shape[-1]) for a in (x, y))
    bytes_of = x.dtype.itemsize, settings.dtype.itemsize
    room = tpu.sampled_room(like.shape, *bytes_of)
    lacks = tpu.lacks(len(x), like.shape, 0, room)
    arrays = (x, y, row, column)
    out = backends.choose(settings.backend, kernel, fallback, lacks, arrays)
    return lists.inside(out, row, column + first, settings.shape)

  names = (_X, _Y, _VALUES)
  return _on_shards(run, (x, y, like), names, _VALUES, ints, settings, "btn")


def _on_shards(f, args, names, out, ints, settings, summed):
  """f(*args, where the values lie, the share of them) on shards of them all.

  Every shard knows where its block columns and its values begin, and all
  counts; so values may be cut anywhere, also within a column.
  """
  indices, counts, edges = ints
  (n_k, n_n), (nnz, bk, bn) = settings.blocks, settings.values
  number = lambda size: jnp.arange(size, dtype=jnp.int32)
  counts = lists.clipped(indices, counts)
  given = len(args)
  args = (*args, indices, counts, number(n_n), number(nnz))
  names = (*names, "n s", "n", "n", "p")
  if edges is not None:
    args, names = (*args, edges), (*names, "e")
  args = partitioning.vary_alike(args)[0]

  def run(axes, *args):
    indices, counts, columns, values, *edges = args[given:]
    here, first = len(columns), columns[0]
    if "n" in axes:
      counts = jnp.zeros(n_n, jnp.int32).at[columns].set(counts)
      counts = lax.psum(counts, axes["n"])
    row, column = lists.places(indices, counts, values, here, first, n_k)
    # Values of which not all are here have an order of their own.
    whole = edges and not {"n", "p"} & axes.keys()
    where = (row, column, first, n_k, here, edges[0] if whole else None)
    return (f(*args[:given], where, here / n_n),)

  def call(*args):
    b, t = args[0].shape[:2]
    sizes = dict(b=b, t=t, k=n_k, n=n_n, r=bk, c=bn, p=nnz, e=nnz)
    sizes["s"] = indices.shape[1]
    return partitioning.per_shard(
      run,
      args,
      names,
      [out],
      sizes,
      cut="btnp",
      summed={0: summed},
      follow=len(args),
      batch=None,
    )[0]

  @jax.custom_batching.custom_vmap
  def mapped(*args):
    return call(*args)

  @mapped.def_vmap
  def rule(size, batched, *args):
    x, *others = args
    if out != _VALUES and batched[0] and not any(batched[1:]):
      # More rows of one product.
      rows = jnp.moveaxis(x, 0, 1)
      shape = rows.shape[:3]
      rows = rows.reshape(shape[0], math.prod(shape[1:]), -1)
      y = mapped(rows, *others)
      return jnp.moveaxis(y.reshape(*shape, -1), 1, 0), True
    # Of loops whose length varies vmap would make masked ones.
    each = [a for a, is_mapped in zip(args, batched) if is_mapped]

    def one(each):
      each = iter(each)
      return mapped(
        *(next(each) if m else a for a, m in zip(args, batched, strict=True))
      )

    return lax.map(one, each), True

  return mapped(*args)
