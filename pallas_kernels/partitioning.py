"""Runs a kernel on the shards that its arguments already lie in.

XLA cannot look into a kernel: without help it gathers every operand on every
device. Here dimensions are written as words of letters, one letter a factor of
the dimension: `"b nw gr d"` is [batch, blocks * queries of a block, key heads *
group, dim]. What the sharding of a leading argument cuts is cut in all:

- on Explicit axes the shardings are types, and `jax.shard_map` is used;
- on Auto axes the compiler decides late, and asks through
  `jax.experimental.custom_partitioning`;
- inside a `jax.shard_map` of the caller's the arguments are shards already.
"""

from collections.abc import Callable, Sequence
import functools
import math

import jax
from jax import lax
from jax.experimental.custom_partitioning import ArrayMapping
from jax.experimental.custom_partitioning import CompoundFactor
from jax.experimental.custom_partitioning import custom_partitioning
from jax.experimental.custom_partitioning import SdyShardingRule
import jax.numpy as jnp
from jax.sharding import AbstractMesh
from jax.sharding import AxisType
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec


def varying(x) -> frozenset:
  """The manual axes along which x may differ between devices."""
  return jax.typeof(x).manual_axis_type.varying


def vary(x: jax.Array, axes: frozenset) -> jax.Array:
  """x, taken to vary along manual axes as well."""
  more = tuple(sorted(axes - varying(x)))
  return lax.pcast(x, more, to="varying") if more else x


def vary_alike(*trees):
  """The trees with every array varying along the manual axes of any of them.

  Loops ask that what they carry varies alike before and after a step.
  """
  axes = frozenset().union(*map(varying, jax.tree.leaves(trees)))
  return jax.tree.map(lambda x: vary(x, axes), trees)


def sum_like(x: jax.Array, like: jax.Array) -> jax.Array:
  """A gradient as its primal is.

  It is summed over the manual axes that the primal is equal along, and sharded
  as the primal is where shardings are types.
  """
  axes = varying(x) - varying(like)
  x = lax.psum(x, tuple(sorted(axes))) if axes else x
  wanted = jax.typeof(like).sharding
  if AxisType.Explicit in wanted.mesh.axis_types:
    x = jax.sharding.reshard(x, wanted)
  return x


def replicated(x: jax.Array) -> jax.Array:
  """x whole on every device, where shardings are types."""
  mesh = jax.typeof(x).sharding.mesh
  if AxisType.Explicit not in mesh.axis_types:
    return x
  return jax.sharding.reshard(x, NamedSharding(mesh, PartitionSpec()))


def per_shard(
  f: Callable,
  args: Sequence[jax.Array],
  names: Sequence[str],
  out_names: Sequence[str],
  sizes: dict[str, int],
  cut: str,
  summed: dict[int, str] | None = None,
  follow: int = 1,
  batch: str | None = "b",
):
  """f(axes, *args), on the shards of args.

  Args:
    f: pure function of `axes` and arrays, which returns a tuple of arrays.
      `axes` has, by letter, the mesh axes along which it is cut here.
    args: arrays; the sharding of the first ones is followed. A dimension of
      size 1 whose letters are larger is shared by all shards.
    names: a word a dimension, for each argument.
    out_names: the same for each output.
    sizes: of each letter.
    cut: the letters that may be cut; each must be the first of its words.
    summed: for an output by its number, the letters whose shards to sum over.
    follow: how many of the arguments to follow, an earlier one first.
    batch: the letter, first of all words, that a vmapped axis joins, or None
      where the caller sees to vmap.

  Returns:
    The tuple that f returns.
  """
  mesh = jax.typeof(args[0]).sharding.mesh
  if mesh.empty or mesh.size == 1 or AxisType.Manual in mesh.axis_types:
    return f({}, *args)
  summed = summed or {}

  def choose(shardings):
    """The mesh axes that cut each letter of the arguments to follow."""
    axes, taken = {}, set()
    for words, sharding in zip(names[:follow], shardings, strict=False):
      # An array that lies on no mesh may have a sharding without names.
      spec = tuple(getattr(sharding, "spec", ())) + (None,) * len(words)
      for word, part in zip(words.split(), spec, strict=False):
        part = part if isinstance(part, tuple) else (part,) if part else ()
        letter, shards = word[0], math.prod(mesh.shape[axis] for axis in part)
        if letter not in cut or letter in axes or taken.intersection(part):
          continue
        if shards > 1 and sizes[letter] % shards == 0:
          axes[letter] = part
          taken.update(part)
    return axes

  def place(axes, words, x):
    spec = [
      axes.get(word[0]) if size > 1 else None
      for word, size in zip(words.split(), x.shape, strict=True)
    ]
    return PartitionSpec(*spec)

  def local(axes, *args):
    outs = list(f(axes, *args))
    for at, letters in summed.items():
      over = [axis for x in letters for axis in axes.get(x, ())]
      if over:
        outs[at] = lax.psum(outs[at], tuple(over))
    return tuple(outs)

  shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in args]
  outputs = jax.eval_shape(functools.partial(f, {}), *shapes)
  if AxisType.Explicit in mesh.axis_types:
    axes = choose([jax.typeof(x).sharding for x in args])
    in_specs = [place(axes, *pair) for pair in zip(names, args, strict=True)]
    return jax.shard_map(
      functools.partial(local, axes),
      mesh=mesh,
      in_specs=tuple(in_specs),
      out_specs=tuple(
        place(axes, *pair) for pair in zip(out_names, outputs, strict=True)
      ),
      check_vma=False,  # Pallas's interpreter does not pass it
    )(
      *(
        jax.sharding.reshard(x, NamedSharding(mesh, spec))
        for x, spec in zip(args, in_specs, strict=True)
      )
    )

  def partition(devices, arg_shapes, result_shapes):
    axes = choose([x.sharding for x in arg_shapes])

    def on_shards(*args):
      # Traced while XLA compiles, within whatever mesh was set around it, whose
      # Explicit axes would become shardings of what is a shard already.
      with jax.sharding.use_abstract_mesh(AbstractMesh((), ())):
        return local(axes, *args)

    def shardings(names, shapes):
      pairs = zip(names, shapes, strict=True)
      return tuple(NamedSharding(devices, place(axes, *pair)) for pair in pairs)

    return (
      devices,
      on_shards,
      shardings(out_names, result_shapes),
      shardings(names, arg_shapes),
    )

  run = custom_partitioning(functools.partial(f, {}))
  run.def_partition(
    partition=partition,
    sharding_rule=_rule(names, out_names, args, outputs, sizes, cut),
  )
  if batch is None:
    return run(*args)
  folded = jax.custom_batching.custom_vmap(run)

  @folded.def_vmap
  def fold(size, batched, *args):
    """A vmapped axis joins the first dimension, which all arguments share."""

    def join(x, mapped):
      if not mapped and x.shape[0] == 1:
        return x
      x = x if mapped else jnp.broadcast_to(x, (size, *x.shape))
      lead = (size, sizes[batch])
      return jnp.broadcast_to(x, (*lead, *x.shape[2:])).reshape(
        -1, *x.shape[2:]
      )

    joined = [join(*pair) for pair in zip(args, batched, strict=True)]
    outs = per_shard(
      f,
      joined,
      names,
      out_names,
      {**sizes, batch: size * sizes[batch]},
      cut,
      summed,
      follow,
      batch,
    )
    outs = tuple(x.reshape(size, -1, *x.shape[1:]) for x in outs)
    return outs, (True,) * len(outs)

  return folded(*args)


def _rule(names, out_names, args, outputs, sizes, cut):
  """How Shardy carries a sharding from one array to the others."""
  whole, free = set(), 0

  def factors(word, size):
    nonlocal free
    letters = [letter for letter in word if sizes[letter] > 1]
    if size == 1 or not letters:
      free += 1
      whole.add(f"free{free}")
      return f"free{free}"
    if len(letters) > 1:
      return CompoundFactor(*letters)
    whole.add(letters[0])
    return letters[0]

  def mapping(words, x):
    pairs = zip(words.split(), x.shape, strict=True)
    return ArrayMapping(*(factors(*pair) for pair in pairs))

  operands = tuple(mapping(*pair) for pair in zip(names, args, strict=True))
  results = tuple(
    mapping(*pair) for pair in zip(out_names, outputs, strict=True)
  )
  # In the order in which they appear, as Shardy asks.
  used = dict.fromkeys(
    letter
    for array in (*operands, *results)
    for factor in array
    for letter in (factor if isinstance(factor, tuple) else (factor,))
  )
  kept = {letter for words in out_names for letter in words}
  return SdyShardingRule(
    operands,
    results,
    reduction_factors=tuple(x for x in used if x in cut and x not in kept),
    need_replication_factors=tuple(x for x in used if x not in cut),
    **{letter: sizes[letter] for letter in used if letter not in whole},
  )
