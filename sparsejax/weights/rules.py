"""A rule: everything that tells one sparse training method from another."""

from collections.abc import Callable, Mapping
import dataclasses
import numbers

import jax

from sparsejax.select import budgets
from sparsejax.select import schedules
from sparsejax.select import structures
from sparsejax.weights import scores

Array = jax.Array
Sparsity = float | schedules.Schedule | Mapping[str, float | schedules.Schedule]
Distribution = str | budgets.Budget | None
Structure = structures.Structure | Mapping[str, structures.Structure]
Stages = tuple[tuple[int, structures.Structure], ...]


def check_step(name: str, value: int) -> None:
  """Raises a ValueError where `value` is not an integer."""
  if not isinstance(value, numbers.Integral):
    raise ValueError(f"{name} must be an integer, got {value!r}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
  """A budget, a structure, scores, a schedule and a gradient rule.

  Attributes:
    sparsity: share of weights that are masked, in [0, 1]; a schedule of the
      step; or a mapping from path patterns to either (parameters that none
      matches stay dense). None where every structure fixes it, as n:m does.
    distribution: how one sparsity is divided among layers: a name in
      `sparsejax.select.BUDGETS`, a budget function, or "global" to rank all
      weights at once. None is "erk".
    structure: what shapes masks take, for all weights or by path pattern; or
      stages `((step, structure), ...)`, each used from its step on.
    initial: score of the first masks; None starts dense.
    drop: score of active weights; the least go.
    grow: score of inactive weights; the best come. None: masks are chosen
      afresh by `drop`.
    drop_fraction: share of active weights that an update exchanges, or a
      schedule of it.
    begin: step of the first mask update (step 0 is left to `init`).
    until: no mask update after this step; None for no end.
    every: steps between mask updates.
    gradient: what the wrapped optimizer gets as a gradient.
    dense: masked weights keep their values, and `sparse_params` hides them
      from the forward pass; otherwise updates keep them at zero.
    leak: share of a masked weight that the forward pass still sees, by step.
    shrink: share of a masked weight that an update leaves, by the number of
      updates made with it.
    memory: initial value of the rule's own buffer for a parameter.
    remember: the buffer after a mask update, from `Seen` with the new mask.
    backward_sparsity: share of weights that receive no update at all, at most
      `sparsity`. None: what is masked in the forward pass decides.
  """

  sparsity: Sparsity | None = None
  distribution: Distribution = None
  structure: Structure | Stages = structures.Unstructured()
  initial: scores.Score | None = scores.random
  drop: scores.Score = scores.magnitude
  grow: scores.Score | None = None
  drop_fraction: float | schedules.Schedule | None = None
  begin: int = 0
  until: int | None = 0
  every: int = 100
  gradient: Callable[[scores.Seen], Array] = scores.masked_gradient
  dense: bool = False
  leak: schedules.Schedule | None = None
  shrink: schedules.Schedule | None = None
  memory: Callable[[Array], Array] | None = None
  remember: Callable[[scores.Seen], Array] | None = None
  backward_sparsity: float | None = None

  def __post_init__(self):
    for name in ("begin", "until", "every"):
      if name != "until" or self.until is not None:
        check_step(name, getattr(self, name))
    if self.every < 1:
      raise ValueError(f"every must be at least 1, got {self.every}")
    if self.begin < 0:
      raise ValueError(f"begin must not be negative, got {self.begin}")
    if self.until is not None and self.until < 0:
      raise ValueError(f"until must not be negative, got {self.until}")
    if (self.grow is None) != (self.drop_fraction is None):
      raise ValueError("grow and drop_fraction must be given together")
    given = self.sparsity
    for value in given.values() if isinstance(given, Mapping) else [given]:
      if value is not None and not callable(value):
        budgets.check_share("sparsity", value)
    if self.drop_fraction is not None and not callable(self.drop_fraction):
      budgets.check_share("drop_fraction", self.drop_fraction)
    if (self.memory is None) != (self.remember is None):
      raise ValueError("memory and remember must be given together")
    if self.leak is not None and not self.dense:
      raise ValueError("leak must come with dense=True, got dense=False")
    if self.shrink is not None and not self.dense:
      raise ValueError("shrink must come with dense=True, got dense=False")
    if self.backward_sparsity is not None:
      if not self.dense:
        raise ValueError("backward_sparsity must come with dense=True")
      if self.staged:
        raise ValueError("backward_sparsity must not come with stages")
      most = 1 if callable(self.sparsity) else self.sparsity
      if most is None or isinstance(most, Mapping):
        raise ValueError(
          "backward_sparsity must come with one sparsity, got "
          f"sparsity={self.sparsity}"
        )
      budgets.check_share("backward_sparsity", self.backward_sparsity)
      if self.backward_sparsity > most:
        raise ValueError(
          f"backward_sparsity must be in [0, sparsity={most}], got "
          f"{self.backward_sparsity}"
        )
    shapes = self.structure
    if not self.staged:
      shapes = shapes.values() if isinstance(shapes, Mapping) else [shapes]
      for shape in shapes:
        if not isinstance(shape, structures.Structure):
          raise ValueError(
            "structure must be a structure such as select.NM(2, 4), or a "
            f"mapping from path patterns to them, got {shape!r}"
          )
    if self.staged and self.grow is not None:
      raise ValueError("stages of structures must not come with grow")
    if self.staged and not all(
      isinstance(stage, tuple) and isinstance(stage[-1], structures.NM)
      for stage in self.structure
    ):
      raise ValueError(
        "stages must all be n:m, as in ((0, NM(2, 4)), (100, NM(1, 4))), got "
        f"{self.structure}"
      )
    if isinstance(given, Mapping) and self.distribution is not None:
      raise ValueError(
        "distribution must not be given where sparsity is by path, got "
        f"{self.distribution!r}"
      )
    divide = self.distribution
    if (
      divide is not None
      and not callable(divide)
      and divide not in (*budgets.BUDGETS, "global")
    ):
      raise ValueError(
        "distribution must be a function or one of "
        f"{[*budgets.BUDGETS, 'global']}, got {self.distribution!r}"
      )
    first = self.begin or self.every
    updates = self.grow is not None or self.until
    if updates and self.until is not None and self.until < first:
      raise ValueError(
        "until must not be before the first mask update, at step "
        f"{first}, got {self.until}"
      )

  @property
  def staged(self) -> bool:
    """Whether the structure changes in time."""
    return isinstance(self.structure, tuple)

  @property
  def draws(self) -> bool:
    """Whether it needs a key."""
    return scores.random in (self.initial, self.drop, self.grow)
