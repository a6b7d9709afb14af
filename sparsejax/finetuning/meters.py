"""How much of the parameters an update changed."""

from typing import Any

import jax
import jax.numpy as jnp

from sparsejax import paths

Array = jax.Array
PyTree = Any


def update_masks(
  before: PyTree, after: PyTree, *, tolerance: float = 1e-5
) -> PyTree:
  """Where parameters changed.

  Args:
    before: floating arrays.
    after: a tree of arrays of the same names and shapes.
    tolerance: a change up to it, in f32, is none; 0 counts every change.

  Returns:
    Boolean arrays, a tree like `before`: True where an entry changed by more,
    or is NaN.

  Raises:
    ValueError: the trees differ, or tolerance is negative.

  >>> update_masks(jnp.zeros(2), jnp.array([1e-6, 1.0])).tolist()
  [False, True]

  Source: [rl-subnetworks] Mukherjee et al., Reinforcement Learning Finetunes
    Small Subnetworks in Large Language Models, section 3.
  """
  if not tolerance >= 0:
    raise ValueError(f"tolerance must be at least 0, got {tolerance}")
  old, rebuild = paths.named(before)
  new = same_shapes("after", after, "before", old)
  # An infinity less itself is NaN.
  unchanged = {
    n: (old[n] == new[n]) | (_size(old[n], new[n]) <= tolerance) for n in old
  }
  return rebuild({n: ~m for n, m in unchanged.items()})


def update_sparsity(
  before: PyTree, after: PyTree, *, tolerance: float = 1e-5
) -> Array:
  """The share of all entries that an update left as they were.

  Args:
    before: floating arrays of less than 2^31 entries each.
    after: a tree of arrays of the same names and shapes.
    tolerance: a change up to it, in f32, is none; 0 counts every change.

  Returns:
    f32 scalar in [0, 1].

  Raises:
    ValueError: the trees differ or are empty, or tolerance is negative.

  >>> update_sparsity(jnp.zeros(2), jnp.array([1e-6, 1.0])).item()
  0.5

  Source: [rl-subnetworks] Mukherjee et al., Reinforcement Learning Finetunes
    Small Subnetworks in Large Language Models, section 3; 1e-5 is what their
    code takes for equal.
  """
  changed = paths.named(update_masks(before, after, tolerance=tolerance))[0]
  total = sum(m.size for m in changed.values())
  if not total:
    raise ValueError("before must have entries, got none")
  left = [
    jnp.sum(~m, dtype=jnp.uint32).astype(jnp.float32) / total
    for m in changed.values()
  ]
  return sum(left, start=jnp.float32(0))


def same_shapes(
  what: str, tree: PyTree, like: str, leaves: dict[str, Array]
) -> dict[str, Array]:
  """The leaves of `tree` by name, which are named and shaped as `leaves`."""
  found = paths.named(tree)[0]
  want = {n: jnp.shape(x) for n, x in leaves.items()}
  got = {n: jnp.shape(x) for n, x in found.items()}
  if want != got:
    raise ValueError(f"{what} must be like {like}, {want}, got {got}")
  return found


def _size(old, new):
  return jnp.abs(jnp.asarray(new, jnp.float32) - jnp.asarray(old, jnp.float32))
