"""What to train: by Fisher information, by how it moved, by its gradients."""

from collections.abc import Callable
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from sparsejax import paths
from sparsejax import sharding
from sparsejax.automatic import automatic
from sparsejax.finetuning import choices
from sparsejax.finetuning import meters
from sparsejax.select import thresholds
from sparsejax.select.top_k import top_k_keys
from sparsejax.select.top_k import top_k_mask

Array = jax.Array
PyTree = Any


def fisher_scores(
  log_prob: Callable[[PyTree, Any], Array], params: PyTree, examples: PyTree
) -> PyTree:
  """The empirical Fisher information: mean squared gradients of examples.

  Squares are of each example's own gradient, never of a batch's; so examples
  are gone through one by one, in the memory of one gradient and the sum. On
  several devices each goes through all of them.

  Args:
    log_prob: `log_prob(params, example)`, the scalar log-probability of the
      example's label. (For the expectation over labels, as the authors also
      have it, draw the labels from the model.)
    params: floating arrays.
    examples: a pytree of arrays with a leading axis of examples.

  Returns:
    f32 arrays, a tree like `params`.

  Raises:
    ValueError: parameters are not floating, or there are no examples, or not
      the same number in all arrays.

  >>> log_prob = lambda params, x: params["w"] @ x
  >>> x = jnp.array([[1.0, 0.0], [-3.0, 2.0]])
  >>> fisher_scores(log_prob, {"w": jnp.zeros(2)}, x)["w"].tolist()
  [5.0, 2.0]

  Source: [fish-mask] Sung et al., Training Neural Networks with Fixed Sparse
    Masks, section 3.
  """
  for n, p in paths.named(params)[0].items():
    if not jnp.issubdtype(p.dtype, jnp.floating):
      raise ValueError(f"params must be floating, got {p.dtype} for {n!r}")
  counts = {jnp.shape(x)[:1] for x in jax.tree.leaves(examples)}
  if len(counts) != 1 or not all(counts) or counts == {(0,)}:
    raise ValueError(
      "examples must be arrays with the same leading axis, not of 0, got "
      f"{sorted(counts)}"
    )
  ((count,),) = counts
  gradient = jax.grad(log_prob)

  def add(total, example):
    square = lambda t, g: t + jnp.square(g.astype(jnp.float32)) / count
    return jax.tree.map(square, total, gradient(params, example)), None

  zeros = jax.tree.map(lambda p: jnp.zeros_like(p, jnp.float32), params)
  return lax.scan(add, zeros, jax.tree.map(_in_one_place, examples))[0]


def _in_one_place(x):
  """x, whose leading axis lies whole on every device."""
  if not sharding.is_explicit(x):
    return x
  rest = list(jax.typeof(x).sharding.spec)[1:]
  return jax.sharding.reshard(x, jax.P(None, *rest))


def fish_mask(scores: PyTree, k: int, *, always: str | None = None) -> PyTree:
  """Masks of the k entries with the largest scores, of all parameters together.

  Args:
    scores: floating arrays, such as `fisher_scores` gives; NaN ranks last, and
      earlier parameters and lower indices win ties.
    k: how many entries are trained.
    always: a regular expression of paths whose parameters are trained whole,
      such as a new head's; they count in k.

  Returns:
    Boolean arrays, a tree like `scores`, k of them True.

  Raises:
    ValueError: k is less than what is always trained, or more than there is;
      or `always` matches nothing.

  >>> scores = {"a": jnp.array([1.0, 4.0]), "b": jnp.array([3.0, 2.0])}
  >>> [mask.tolist() for mask in fish_mask(scores, 2).values()]
  [[False, True], [True, False]]

  Source: [fish-mask] Sung et al., Training Neural Networks with Fixed Sparse
    Masks, section 3; what is always trained, and its count, as in their code.
  """
  leaves, rebuild = paths.named(scores)
  whole = (
    {} if always is None else paths.matching("always", {always: 1}, leaves)
  )
  least = sum(leaves[n].size for n in whole)
  size = sum(s.size for s in leaves.values())
  if not least <= k <= size:
    raise ValueError(f"k must be in [{least}, {size}], got {k}")
  masks = {n: jnp.ones_like(leaves[n], bool) for n in whole}
  rest = [n for n in leaves if n not in whole]
  if rest:
    chosen = top_k_mask([leaves[n] for n in rest], k - least)
    masks |= dict(zip(rest, chosen, strict=True))
  return rebuild(masks)


def lt_sft_masks(
  start: PyTree, tuned: PyTree, k: int, *, already: PyTree | None = None
) -> PyTree:
  """Masks of the k entries that full fine-tuning moved most.

  What follows is to begin again from `start` and to train these alone.

  Args:
    start: floating arrays: the parameters before.
    tuned: a tree like it: those after fine-tuning all of them.
    k: how many entries to choose, of all parameters together; earlier
      parameters and lower indices win ties.
    already: masks of what is trained anyway, to which k more are added, or as
      many as are left.

  Returns:
    Boolean arrays, a tree like `start`.

  Raises:
    ValueError: the trees differ, or k is out of range.

  >>> lt_sft_masks(jnp.zeros(3), jnp.array([1.0, -3.0, 2.0]), 1).tolist()
  [False, True, False]

  Source: [lt-sft] Ansell et al., Composable Sparse Fine-Tuning for
    Cross-Lingual Transfer, section 3.1. Exactly k, where their code takes all
    that tie with the last.
  """
  leaves, rebuild = paths.named(start)
  ends = meters.same_shapes("tuned", tuned, "start", leaves)
  f32 = lambda x: jnp.asarray(x, jnp.float32)
  keys = {
    n: thresholds.ordered_keys(jnp.abs(f32(ends[n]) - f32(p)))
    for n, p in leaves.items()
  }
  before = {}
  if already is not None:
    before = meters.same_shapes("already", already, "start", leaves)
    for n, m in before.items():
      if not jnp.issubdtype(jnp.result_type(m), jnp.bool):
        raise ValueError(
          f"already must be boolean masks, got {jnp.result_type(m)} for {n!r}"
        )
      # Key 0 is never chosen.
      keys[n] = jnp.where(m, jnp.zeros((), keys[n].dtype), keys[n])
  size = sum(p.size for p in leaves.values())
  k = thresholds.check_k(k, size, scalar=True)
  chosen = top_k_keys(list(keys.values()), k)
  masks = dict(zip(leaves, chosen, strict=True))
  return rebuild({n: m | before.get(n, False) for n, m in masks.items()})


def distance_penalty(params: PyTree, start: PyTree, strength: float) -> Array:
  """The mean distance of parameters from where they began, to add to a loss.

  Args:
    params: floating arrays.
    start: a tree like it.
    strength: what the mean is multiplied by.

  Returns:
    f32 scalar: strength times the mean absolute difference of all entries.

  Raises:
    ValueError: the trees differ, or are empty.

  >>> distance_penalty(jnp.array([1.0, -3.0]), jnp.zeros(2), 0.5).item()
  1.0

  Source: [lt-sft] Ansell et al., Composable Sparse Fine-Tuning for
    Cross-Lingual Transfer, section 3.1; divided by the number of parameters
    as in their code.
  """
  leaves = paths.named(params)[0]
  begin = meters.same_shapes("start", start, "params", leaves)
  size = sum(p.size for p in leaves.values())
  if not size:
    raise ValueError("params must have entries, got none")
  f32 = lambda x: jnp.asarray(x, jnp.float32)
  moved = [f32(p) - f32(begin[n]) for n, p in leaves.items()]
  # The gradient of abs is 1 at 0, where all begin; a sign is 0 there.
  far = [(m * lax.stop_gradient(jnp.sign(m))).sum() for m in moved]
  return strength * sum(far) / size


def block_scores(
  sizes: PyTree, block: tuple[int, int] = (256, 256), *, where: str = ""
) -> PyTree:
  """The mean of each block of some matrices.

  Args:
    sizes: floating arrays, a tree like the parameters: the absolute gradients
      of warm-up steps, summed up.
    block: rows and columns of a block; they divide the matrices.
    where: a regular expression of the paths of the matrices meant; the paper's
      are those of queries, keys and values.

  Returns:
    f32 arrays [rows / block rows, columns / block columns] by path.

  Raises:
    ValueError: `where` matches nothing, or what a block does not divide.

  >>> block_scores({"q": jnp.array([[1.0, 3.0, 0.0, 0.0]])}, (1, 2))
  {'q': Array([[2., 0.]], dtype=float32)}

  Source: [smt] He et al., Sparse Matrix in Large Language Model Fine-tuning,
    section 3. Their code sums signed gradients, which cancel out; the paper's
    are absolute.
  """
  leaves = paths.named(sizes)[0]
  scores = {}
  for n in paths.matching("where", {where: True}, leaves):
    shape, (r, c) = leaves[n].shape, block
    if len(shape) != 2 or min(block) < 1 or shape[0] % r or shape[1] % c:
      raise ValueError(
        f"block must divide the matrices, got {tuple(block)} for {n!r} of "
        f"shape {shape}"
      )
    grid = shape[0] // r, r, shape[1] // c, c
    mean = lambda x, grid=grid: x.reshape(grid).mean((1, 3), jnp.float32)
    scores[n] = automatic(mean, leaves[n])
  return scores


def smt_blocks(
  sizes: PyTree,
  k: int,
  block: tuple[int, int] = (256, 256),
  *,
  where: str = "",
) -> dict[str, choices.Blocks]:
  """The k blocks with the largest mean gradients, of all matrices together.

  Args:
    sizes: floating arrays, a tree like the parameters: the absolute gradients
      of warm-up steps, summed up. They must be known: outside of `jit`.
    k: how many blocks are trained; of equal ones those of earlier matrices and
      lower indices.
    block: rows and columns of a block; they divide the matrices.
    where: a regular expression of the paths of the matrices meant; the paper's
      are those of queries, keys and values.

  Returns:
    `Blocks` by path of the matrices that have some, row by row. What takes
    choices takes them: the path is the name of the parameter, nested or not.

  Raises:
    ValueError: as `block_scores`, k is out of range, or sizes are traced.

  >>> sizes = {"q": jnp.array([[1.0, 3.0, 0.0, 0.0]]), "k": jnp.ones((2, 2))}
  >>> smt_blocks(sizes, 1, (1, 2))["q"].index.tolist()
  [[0, 0]]

  Source: [smt] He et al., Sparse Matrix in Large Language Model Fine-tuning,
    section 3.
  """
  if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(sizes)):
    raise ValueError("sizes must be known, outside of jit, got traced arrays")
  scores = block_scores(sizes, block, where=where)
  masks = top_k_mask(list(scores.values()), k)
  found = {
    n: np.argwhere(np.asarray(m)) for n, m in zip(scores, masks, strict=True)
  }
  return {
    n: choices.Blocks(index.astype(np.int32), tuple(block))
    for n, index in found.items()
    if len(index)
  }
