"""Experts that are removed: which ones, and what is left of a mixture."""

from typing import Any

from flax import nnx
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from sparsejax.automatic import automatic
from sparsejax.routing import dispatchers
from sparsejax.routing.assignment import Assignment
from sparsejax.routing.attention_experts import sorted_edges
from sparsejax.routing.modules import MoE

Array = jax.Array


def reap(
  x: Array, found: Assignment, bank: dispatchers.Bank, params: Any
) -> Array:
  """What each expert adds to its tokens: the mean of weight x output norm.

  The mean is over the valid edges of an expert. Of several batches it is the
  means weighted by `found.sizes`. Where experts are removed for how seldom they
  are used, the saliency is `found.sizes` itself, summed over batches.

  Args:
    x: floating [tokens, d].
    found: which experts process which tokens.
    bank: see `dispatchers`.
    params: of the bank.

  Returns:
    f32 [experts]; 0 for an expert without edges.

  Raises:
    ValueError: x is not of the assignment's tokens.

  Example:
    >>> bank = routing.FeedForward(jax.nn.relu)
    >>> params = {"up": jnp.ones((3, 1, 1)), "down": jnp.ones((3, 1, 1))}
    >>> found = routing.top_k(jnp.array([[9.0, 9.0, 0.0]]), 2, renormalize=True)
    >>> routing.reap(jnp.array([[4.0]]), found, bank, params).tolist()
    [2.0, 2.0, 0.0]

  Source: reap, REAP the Experts: Why Pruning Prevails for One-Shot MoE
  compression; by use: zcode-m3-moe, Scalable and Efficient MoE Training for
  Multitask Multilingual Models.
  """
  dispatchers.of_tokens(x, found)
  edges = sorted_edges(found)
  if getattr(bank, "fuses", False):
    rows = bank(params, x, found.sizes, gather=edges.token)
  else:
    rows = bank(
      params, automatic(dispatchers.rows_of, x, edges.token), found.sizes
    )
  norm = jnp.sqrt(jnp.sum(rows.astype(jnp.float32) ** 2, -1))
  weighted = automatic(
    lambda norm, weight, order: (
      jnp.zeros_like(norm).at[order].set(norm * weight)
    ),
    norm,
    edges.weight,
    edges.order,
  )
  # What stands in rows behind the last group may be anything.
  total = found.by_expert(jnp.where(found.valid, weighted, 0))
  return total / jnp.maximum(found.sizes, 1)


def best_experts(saliency: Array, count: int) -> Array:
  """The experts of the largest saliency, in their order.

  Args:
    saliency: floating or integer [experts]. NaN counts as the lowest.
    count: how many to keep.

  Returns:
    int32 [count], rising. Of equal ones, the lower experts.

  Raises:
    ValueError: for a count that is not in 1 to experts.

  >>> routing.best_experts(jnp.array([3.0, 1.0, 3.0, 2.0]), 2).tolist()
  [0, 2]
  """
  if saliency.ndim != 1:
    raise ValueError(f"saliency must be [experts], got {saliency.shape}")
  if not 1 <= count <= len(saliency):
    raise ValueError(f"count must be 1 to {len(saliency)}, got {count}")
  if jnp.issubdtype(saliency.dtype, jnp.floating):
    saliency = jnp.where(jnp.isnan(saliency), -jnp.inf, saliency)
  return jnp.sort(lax.top_k(saliency, count)[1])


def keep_experts(params: Any, kept: Array, *, axis: int = 0) -> Any:
  """Parameters of some experts, in the order of `kept`.

  Args:
    params: a pytree of arrays; of a bank, or of what decides over experts: a
      router's kernel has them along `axis=-1`, a bias of the choice along 0.
    kept: int [count], which experts; as `best_experts` gives them.
    axis: the axis of experts.

  Returns:
    The pytree.

  >>> routing.keep_experts(
  ...   jnp.array([1.0, 2.0, 3.0]), jnp.array([0, 2])
  ... ).tolist()
  [1.0, 3.0]
  """
  return jax.tree.map(lambda x: jnp.take(x, kept, axis), params)


def prune_experts(moe: MoE, kept: Array) -> MoE:
  """A mixture without the experts that are not kept.

  What is left of the router's logits is unchanged. A softmax is over fewer
  experts then: weights that are renormalized over the chosen stay as they were
  wherever the chosen stay, others rise. With renormalized weights the removal
  of experts that no token chooses changes nothing.

  Args:
    moe: a `MoE` or `MoA`; it stays as it is. Not a `recipes.UMoE`, which would
      no longer share its experts: remove those of its `ffn`, and make another.
    kept: concrete int [count], which experts, all different.

  Returns:
    A mixture of `count` experts. Its router must do with so many: k experts a
    token, groups and masks are those of `moe`.

  Raises:
    ValueError: kept is not a list of the mixture's experts, or they are not
      its own.

  Example:
    >>> from flax import nnx
    >>> moe = routing.MoE(4, 8, experts=3, rngs=nnx.Rngs(0))
    >>> routing.prune_experts(moe, jnp.array([0, 2])).experts["up"].shape
    (2, 4, 8)
  """
  if not isinstance(moe, MoE) or moe.borrows_experts:
    raise ValueError(
      "moe must be a MoE with experts of its own, got a "
      f"{type(moe).__name__}; experts that are shared are removed where they "
      "are, and what shares them is made anew"
    )
  experts = moe.router.out_features
  ids = np.asarray(kept)
  sound = ids.ndim == 1 and ids.size and np.issubdtype(ids.dtype, np.integer)
  if not (sound and np.isin(ids, np.arange(experts)).all()) or (
    len(set(ids.tolist())) < len(ids)
  ):
    raise ValueError(
      f"kept must be different experts in 0 to {experts - 1}, got {kept}"
    )
  pruned = nnx.clone(moe)
  is_variable = lambda x: isinstance(x, nnx.Variable)

  def keep(variable, axis=0):
    return variable.replace(keep_experts(variable[...], ids, axis=axis))

  pruned.router.kernel = keep(pruned.router.kernel, -1)
  pruned.router.out_features = len(ids)
  pruned.experts = nnx.data(
    jax.tree.map(keep, pruned.experts, is_leaf=is_variable)
  )
  if pruned.balance_bias is not None:
    pruned.balance_bias = keep(pruned.balance_bias)
  metrics = pruned.metrics.get_value()
  pruned.metrics.set_value(
    metrics | {"load": keep_experts(metrics["load"], ids)}
  )
  return pruned
