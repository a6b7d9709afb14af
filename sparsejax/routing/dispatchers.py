"""Dispatchers: they run a bank of experts along the edges of an assignment.

  y = dispatch(x, found, bank, params)

sums, for each token, the outputs of its experts times the weights of the edges.
A bank is any function `bank(params, rows, group_sizes)` that processes rows
[m, d] which lie in groups, one an expert, the first ones of expert 0. Where it
has an attribute `fuses` that is True, it also takes what `grouped_matmul` takes
to read rows where they are and add them where they belong; see `experts.py`.
"""

from collections.abc import Callable
import fractions
import math
from typing import Any

import jax
import jax.numpy as jnp

from sparsejax import sharding
from sparsejax.automatic import automatic
from sparsejax.routing.assignment import Assignment

Array = jax.Array
Bank = Callable[..., Array]


def dropless(x: Array, found: Assignment, bank: Bank, params: Any) -> Array:
  """Every edge is processed, however the load falls.

  Args:
    x: floating [tokens, d].
    found: which experts process which tokens.
    bank: see above.
    params: of the bank.

  Returns:
    [tokens, d of the bank] in the dtype of x; zeros for tokens without a valid
    edge.

  Raises:
    ValueError: x is not of the assignment's tokens.

  Example:
    >>> found = routing.by_id(jnp.array([1, 0, 1]), 2)
    >>> bank = lambda scale, rows, sizes: (
    ...   rows
    ...   * jnp.repeat(scale, sizes, total_repeat_length=len(rows))[:, None]
    ... )
    >>> x = jnp.ones((3, 1))
    >>> routing.dropless(x, found, bank, jnp.array([10.0, 20.0])).tolist()
    [[20.0], [10.0], [20.0]]

  Source: megablocks-dmoe, MegaBlocks, section 5; scattermoe, Scattered
  Mixture-of-Experts Implementation.
  """
  of_tokens(x, found)
  expert = jnp.where(found.valid, found.expert, found.num_experts)
  return run(x, found.token, expert, found.weight, found.sizes, bank, params)


def capacity(
  x: Array, found: Assignment, bank: Bank, params: Any, *, size: int
) -> Array:
  """Every expert processes a buffer of equally many rows.

  Shapes do not depend on the load, so buffers can be divided over devices. What
  is beyond an expert's size must have been dropped by `limit`: edges beyond
  it count for nothing here, in their order in the list.

  Args:
    x: floating [tokens, d].
    found: which experts process which tokens.
    bank: see above; its group sizes are all `size`.
    params: of the bank.
    size: rows of an expert's buffer.

  Returns:
    As `dropless`.

  Raises:
    ValueError: x is not of the assignment's tokens, or size is not positive.

  Source: gshard-topk, GShard, section 2.2; tutel, Tutel: Adaptive
  Mixture-of-Experts at Scale.
  """
  of_tokens(x, found)
  if size < 1:
    raise ValueError(f"size must be 1 or more, got {size}")
  experts, edges = found.num_experts, found.expert.shape[0]

  def fill(x, found):
    slot = places(found, jnp.arange(edges))
    slot = jnp.where(slot < size, found.expert * size + slot, experts * size)
    # The edge of each slot; a row of zeros where there is none.
    edge = jnp.full(experts * size, edges, jnp.int32)
    edge = edge.at[slot].set(jnp.arange(edges, dtype=jnp.int32), mode="drop")
    of_slot = lambda x, other: x.at[edge].get(mode="fill", fill_value=other)
    token = of_slot(found.token, found.num_tokens)
    return rows_of(x, token), token, of_slot(found.weight, 0)

  rows, token, weight = automatic(fill, x, found)
  rows = bank(params, rows, jnp.full(experts, size, jnp.int32))
  return combined(x, rows, token, weight)


def limit(
  found: Assignment,
  size: int,
  *,
  priority: str = "position",
  uniform: Array | None = None,
) -> tuple[Assignment, Array]:
  """At most `size` edges an expert; the others are dropped, and counted.

  First choices go before second ones, and within those the tokens by priority.

  Args:
    found: which experts process which tokens.
    size: edges an expert keeps.
    priority: "position" keeps the earlier tokens; "weight" those whose largest
      weight is larger (batch prioritized routing); "random" draws.
    uniform: for "random" alone: f32 [tokens] of `jax.random.uniform`.

  Returns:
    The assignment without what was dropped, and the share of the valid edges
    that were, f32.

  Raises:
    ValueError: for arguments that do not fit each other.

  Example:
    >>> found = routing.top_k(jnp.array([[1.0, 0.0], [2.0, 0.0]]), 1)
    >>> kept, dropped = routing.limit(found, 1, priority="weight")
    >>> kept.valid.tolist(), dropped.item()
    ([False, True], 0.5)

  Source: switch, Switch Transformers, section 2.2; v-moe, Scaling Vision with
  Sparse Mixture of Experts; zcode-m3-moe, Scalable and Efficient MoE Training
  for Multitask Multilingual Models (random).
  """
  if size < 1:
    raise ValueError(f"size must be 1 or more, got {size}")
  if priority not in ("position", "weight", "random"):
    raise ValueError(
      f'priority must be "position", "weight" or "random", got {priority!r}'
    )
  if (uniform is not None) != (priority == "random"):
    raise ValueError(
      f'uniform must be given with priority="random" alone, got {priority!r} '
      f"and {None if uniform is None else uniform.shape}"
    )
  if priority == "random" and uniform.shape != (found.num_tokens,):
    raise ValueError(
      f"uniform must be [{found.num_tokens}], got {uniform.shape}"
    )

  def keep(found, uniform):
    edges = jnp.arange(found.expert.shape[0])
    if found.choices is None:  # an expert's lie in the order of their ranks
      return places(found, edges) < size
    by_token = edges.reshape(-1, found.choices)
    if priority == "random":
      by_token = by_token[jnp.argsort(-uniform)]
    elif priority == "weight":
      weight = jnp.where(found.valid, found.weight, -jnp.inf)
      by_token = by_token[jnp.argsort(-weight[by_token].max(-1))]
    return places(found, by_token.T.reshape(-1)) < size

  fixed = jax.tree.map(jax.lax.stop_gradient, found)
  kept = found.where(automatic(keep, fixed, uniform, out=found.valid))
  valid = found.valid.sum()
  dropped = (valid - kept.valid.sum()) / jnp.maximum(valid, 1)
  return kept, dropped.astype(jnp.float32)


def capacity_of(edges: int, num_experts: int, factor: float) -> int:
  """The size at which experts could take `factor` times the edges, rounded up.

  The factor is the decimal number that it prints as.

  >>> routing.capacity_of(4096 * 2, 64, 1.25), routing.capacity_of(100, 1, 1.1)
  (160, 110)
  """
  if num_experts < 1 or not factor > 0:
    raise ValueError(
      f"num_experts and factor must be positive, got {num_experts}, {factor}"
    )
  exact = fractions.Fraction(str(float(factor)))
  return max(1, math.ceil(exact * edges / num_experts))


def places(found: Assignment, order: Array) -> Array:
  """Each edge's place among the valid edges of its expert.

  They are counted in the order in which `order` lists the edges. Edges that are
  not valid have places behind all others.
  """
  edges = found.expert.shape[0]
  group = jnp.where(found.valid, found.expert, found.num_experts)
  by_expert = order[jnp.argsort(group[order])]
  begin = jnp.cumsum(found.sizes) - found.sizes
  place = jnp.zeros(edges, jnp.int32).at[by_expert].set(jnp.arange(edges))
  return jnp.where(found.valid, place - begin[found.expert], edges)


def run(
  x: Array,
  token: Array,
  expert: Array,
  weight: Array | None,
  sizes: Array,
  bank: Bank,
  params: Any,
) -> Array:
  """Sums the bank's rows along edges, [tokens, d of the bank].

  Edges whose expert is the number of experts go nowhere; `sizes` are those of
  the others by expert. Without weights they are 1.
  """

  def by_expert(*lists):
    order = jnp.argsort(lists[1])
    return jax.tree.map(lambda x: x[order], lists)

  token, expert, weight = automatic(
    by_expert, token, expert, weight, out=expert
  )
  if getattr(bank, "fuses", False):
    y = bank(
      params,
      x,
      sizes,
      gather=token,
      scatter=token,
      num_rows=x.shape[0],
      row_scale=weight,
    )
    return sharding.like(y, x)
  # A row that is not to be processed may hold anything, which must not reach
  # the gradients of the parameters.
  token = jnp.where(expert < len(sizes), token, len(x))
  return combined(
    x, bank(params, automatic(rows_of, x, token), sizes), token, weight
  )


def rows_of(x: Array, token: Array) -> Array:
  """The rows of tokens; zeros where a token does not exist."""
  return jnp.asarray(x).at[token].get(mode="fill", fill_value=0)


def combined(
  x: Array, rows: Array, token: Array, weight: Array | None
) -> Array:
  """Rows times their weights, added up by token, in the dtype of x.

  Whatever the rows of tokens that do not exist hold, it goes nowhere.
  """

  def add(rows, token, weight):
    exists = (token < x.shape[0])[:, None]
    rows = jnp.where(exists, rows, 0).astype(jnp.float32)
    if weight is not None:
      rows *= weight[:, None]
    y = jnp.zeros((x.shape[0], rows.shape[1]), jnp.float32)
    return y.at[token].add(rows, mode="drop").astype(x.dtype)

  return automatic(add, rows, token, weight, out=x)


def of_tokens(x, found):
  if x.ndim != 2 or x.shape[0] != found.num_tokens:
    raise ValueError(
      f"x must be [{found.num_tokens}, d], the assignment's tokens, got "
      f"{x.shape}"
    )
