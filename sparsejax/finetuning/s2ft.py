"""S2FT: coupled matrices in an order that makes what is trained contiguous."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from sparsejax import paths
from sparsejax.automatic import automatic

PyTree = Any


def s2ft_order(
  first: Sequence[int], second: Sequence[int], units: int
) -> tuple[np.ndarray, tuple[int, int], tuple[int, int]]:
  """An order of units in which two selections of them are contiguous.

  Units are what couples two matrices: hidden channels (up and down), or heads
  (values and output). First come those of the first selection alone, then those
  of both, then those of the second alone, then the rest.

  Args:
    first: the units to train in the first matrix (up, or values), distinct;
      their order is kept.
    second: those in the second (down, or output).
    units: how many there are.

  Returns:
    (order, first, second): int [units], `order[new] = old`, and where the two
    selections then are, from and to, in units.

  Raises:
    ValueError: a selection names a unit twice, or one that is not there.

  >>> order, first, second = s2ft_order([4, 1], [1, 3], 5)
  >>> order.tolist(), first, second
  ([4, 1, 3, 0, 2], (0, 2), (1, 3))

  Source: [s2ft] Yang et al., S2FT: Efficient, Scalable and Generalizable LLM
    Fine-tuning by Structured Sparsity, section 3; the order is their code's.
  """
  first, second = list(map(int, first)), list(map(int, second))
  for name, given in (("first", first), ("second", second)):
    if len(set(given)) < len(given) or not all(0 <= j < units for j in given):
      raise ValueError(
        f"{name} must be distinct units in [0, {units}), got {given}"
      )
  one, two = set(first), set(second)
  order = [j for j in first if j not in two] + [j for j in first if j in two]
  begin, middle = len(one - two), len(first)
  order += [j for j in second if j not in one]
  end = len(order)
  order += [j for j in range(units) if j not in one | two]
  return np.array(order, np.int32), (0, middle), (begin, end)


def co_permute(
  params: PyTree, order: Sequence[int], axes: Mapping[str, int]
) -> PyTree:
  """Parameters with the units of coupled arrays in another order.

  Named are all arrays that have the units as an axis: of a gated network those
  of up and gate, and their biases, by outputs, and down by inputs; of attention
  queries, keys and values by outputs, and the output by inputs, where a unit is
  a head, or all that belongs to a head of keys where queries share them. The
  network is then the same function, up to the order of sums. A kernel that
  holds several (queries, keys and values in one) is to be split first.

  `co_permute(params, numpy.argsort(order), axes)` undoes it.

  Args:
    params: arrays.
    order: int [units], a permutation, `order[new] = old`.
    axes: for each path the axis of the units. A unit is a run of neighbors
      there, of the same length for all units: a head has head_dim of them.

  Returns:
    A tree like `params`, each array sharded as it was.

  Raises:
    ValueError: order is no permutation; a path names nothing; or an axis is not
      there, or is no multiple of the units.

  >>> params = {
  ...   "up": jnp.array([[1.0, 2.0]]),
  ...   "down": jnp.array([[3.0], [4.0]]),
  ... }
  >>> new = co_permute(params, [1, 0], {"up": 1, "down": 0})
  >>> new["up"].tolist(), new["down"].tolist()
  ([[2.0, 1.0]], [[4.0], [3.0]])

  Source: [s2ft] Yang et al., S2FT: Efficient, Scalable and Generalizable LLM
    Fine-tuning by Structured Sparsity, section 3.
  """
  order = np.asarray(order)
  units = order.size
  if order.ndim != 1 or sorted(order.tolist()) != list(range(units)):
    raise ValueError(f"order must be a permutation, got {order.tolist()}")
  leaves, rebuild = paths.named(params)
  new = {}
  for n, axis in axes.items():
    if n not in leaves:
      raise ValueError(
        f"axes must name parameters, got {n!r}: they are {list(leaves)}"
      )
    shape = leaves[n].shape
    if not 0 <= axis < len(shape) or not units or shape[axis] % units:
      raise ValueError(
        f"axes[{n!r}] must be an axis of {units} units, got {axis} of {shape}"
      )
    width = shape[axis] // units
    index = (order[:, None] * width + np.arange(width)).reshape(-1)
    permute = lambda x, i, axis=axis: jnp.take(x, i, axis=axis)
    new[n] = automatic(permute, leaves[n], index, out=leaves[n])
  return rebuild(leaves | new)
