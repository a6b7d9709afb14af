"""Which experts process which tokens: a list of edges."""

import dataclasses

import jax
import jax.numpy as jnp

from sparsejax.automatic import automatic

Array = jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Assignment:
  """Edges from tokens to experts, and what the router thought.

  A router makes one, a dispatcher runs it, and the losses of balancing are
  functions of it. With token choice there are tokens x k edges, a token's side
  by side; with expert choice experts x capacity, an expert's side by side.

  Attributes:
    token: int32 [edges].
    expert: int32 [edges].
    rank: int32 [edges], which choice of its token an edge is, 0 the first (with
      expert choice, which choice of its expert).
    weight: f32 [edges], what the expert's output is multiplied by; 0 where the
      edge is not valid. Differentiable.
    valid: bool [edges].
    logits: f32 [tokens, experts], -inf where not allowed.
    probabilities: f32 [tokens, experts]: scores over their sum, so that those
      of a token add up to 1; zeros where it does not count. Differentiable.
    token_valid: bool [tokens], which tokens count: False at padding, at tokens
      whose logits hold NaN or +inf, at those that may go nowhere, and where an
      id names no expert.
    unsound: int32 scalar, how many hold NaN or +inf (or name no expert), and
      are not padding.
    choices: edges of a token, which lie side by side; None where experts chose.
      Static.
  """

  token: Array
  expert: Array
  rank: Array
  weight: Array
  valid: Array
  logits: Array
  probabilities: Array
  token_valid: Array
  unsound: Array
  choices: int | None = dataclasses.field(metadata=dict(static=True))

  @property
  def num_tokens(self) -> int:
    return self.probabilities.shape[0]

  @property
  def num_experts(self) -> int:
    return self.probabilities.shape[1]

  @property
  def sizes(self) -> Array:
    """int32 [experts]: the valid edges of each."""
    return self.by_expert(self.valid.astype(jnp.int32))

  def by_expert(self, x: Array) -> Array:
    """The sums of numbers [edges] by expert, [experts]."""
    return automatic(
      lambda x, expert: jax.ops.segment_sum(x, expert, self.num_experts),
      x,
      self.expert,
    )

  def where(self, kept: Array) -> "Assignment":
    """The edges that are valid and kept, bool [edges].

    Raises:
      ValueError: kept is not bool [edges].
    """
    if kept.shape != self.valid.shape or kept.dtype != bool:
      raise ValueError(
        f"kept must be bool{list(self.valid.shape)}, got {kept.dtype}"
        f"{list(kept.shape)}"
      )
    valid = self.valid & kept
    return dataclasses.replace(
      self, valid=valid, weight=jnp.where(valid, self.weight, 0)
    )
