"""Which row is multiplied by which weight, and where the product goes.

A grouped matmul is a list of edges. Edge i takes row `source[i]` of lhs through
the weight of its group to row `target[i]` of the result, where what arrives is
added up. The edges of a group lie next to each other.
"""

import dataclasses

import jax
from jax import lax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Edges:
  """The edges of a call. Those of no group are never run.

  Attributes:
    starts: int32 [g], the first edge of each weight's group.
    ends: int32 [g], behind its last one.
    source: None (edge i reads row i), or int32 [count]. Rows that do not exist
      are `sources`.
    target: None, or int32 [count], in the same way.
    count: how many edges there are.
    sources: how many rows lhs has.
    targets: how many rows the result has.
  """

  starts: jax.Array
  ends: jax.Array
  source: jax.Array | None
  target: jax.Array | None
  count: int = dataclasses.field(metadata=dict(static=True))
  sources: int = dataclasses.field(metadata=dict(static=True))
  targets: int = dataclasses.field(metadata=dict(static=True))

  def reversed(self) -> "Edges":
    """The same edges from the result to lhs, as the gradient takes them."""
    return dataclasses.replace(
      self,
      source=self.target,
      target=self.source,
      sources=self.targets,
      targets=self.sources,
    )

  def in_a_group(self) -> jax.Array:
    """bool [count]: the groups of the weights lie next to each other."""
    at = jnp.arange(self.count)
    return (at >= self.starts[0]) & (at < self.ends[-1])


def make(
  group_sizes, weights, offset, gather, rows, scatter, num_rows
) -> Edges:
  """The edges of a call's arguments; see `grouped_matmul`."""
  count = rows if gather is None else gather.shape[0]
  sizes = jnp.clip(group_sizes, 0, count)
  # A sum that stops at count cannot overflow.
  ends = lax.associative_scan(lambda a, b: jnp.minimum(a + b, count), sizes)
  bounds = jnp.concatenate([jnp.zeros(1, jnp.int32), ends])
  group = jnp.arange(weights, dtype=jnp.int32)
  if offset is not None:
    group += offset
  # Groups that do not exist are empty.
  at = lambda group: bounds[jnp.clip(group, 0, ends.size)]
  inside = lambda index, size: (
    None
    if index is None
    else jnp.where((index < 0) | (index > size), size, index)
  )
  targets = count if scatter is None else num_rows
  return Edges(
    starts=at(group),
    ends=at(group + 1),
    source=inside(gather, rows),
    target=inside(scatter, targets),
    count=count,
    sources=rows,
    targets=targets,
  )
