"""What fine-tuning changed, as sparse differences that add up."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from sparsejax import paths
from sparsejax.finetuning import choices as choices_lib
from sparsejax.finetuning import meters

Array = jax.Array
PyTree = Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Delta:
  """A sparse difference of parameters.

  Attributes:
    choices: where, as `choose` returns it.
    parts: by how much, as `take` returns it; at least f32.
  """

  choices: PyTree
  parts: PyTree


def delta(params: PyTree, start: PyTree, chosen: PyTree) -> Delta:
  """The difference of the trained parts alone.

  Args:
    params: floating arrays: the parameters after training.
    start: a tree like it: those before.
    chosen: what was trained, as in `choose`.

  Returns:
    A `Delta`, whose size is that of what was trained, an index for each entry
    of a mask besides.

  Raises:
    ValueError: the trees differ, or as `choose`.

  >>> masks = jnp.array([False, True, False])
  >>> found = delta(
  ...   jnp.array([1.0, 5.0, 3.0]), jnp.array([1.0, 2.0, 3.0]), masks
  ... )
  >>> found.choices.index.tolist(), found.parts.tolist()
  ([1], [3.0])

  Source: [lt-sft] Ansell et al., Composable Sparse Fine-Tuning for
    Cross-Lingual Transfer, section 3.
  """
  meters.same_shapes("start", start, "params", paths.named(params)[0])
  choices = choices_lib.choose(params, chosen)
  now, before = (
    choices_lib.take(params, choices),
    choices_lib.take(start, choices),
  )
  return Delta(
    choices, jax.tree.map(lambda x, y: _wide(x) - _wide(y), now, before)
  )


def compose(start: PyTree, *deltas: Delta) -> PyTree:
  """Parameters with several differences added to them, one after another.

  Args:
    start: the parameters that the differences are from.
    *deltas: differences, say of a task and of a language.

  Returns:
    A tree like `start`, of its dtypes, summed in at least f32 and rounded once.
    What no difference has is bit-equal. With one difference it is what was
    trained, up to the rounding of a difference.

  Raises:
    ValueError: a difference is of other parameters.

  >>> start = jnp.array([1.0, 2.0])
  >>> task = delta(jnp.array([6.0, 2.0]), start, jnp.array([True, False]))
  >>> compose(start, task, task).tolist()
  [11.0, 2.0]

  Source: [lt-sft] Ansell et al., Composable Sparse Fine-Tuning for
    Cross-Lingual Transfer, section 3.2.
  """
  leaves, rebuild = paths.named(start)
  sums = {}
  for d in deltas:
    if not isinstance(d, Delta):
      raise ValueError(f"deltas must be made by delta, got {d!r}")
    parts = paths.named(d.parts)[0]
    if new := parts.keys() - leaves.keys():
      raise ValueError(f"deltas must be of start, got some of {sorted(new)}")
    for n, c in choices_lib.by_name(d.choices, leaves).items():
      total = sums.get(n, _wide(leaves[n]))
      sums[n] = c.put(total, c.take(total) + parts[n])
  return rebuild(
    leaves | {n: x.astype(leaves[n].dtype) for n, x in sums.items()}
  )


def _wide(x):
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))
