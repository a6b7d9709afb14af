"""Pruning at random before training, or by magnitude during it."""

import jax
import optax

from sparsejax.select import budgets
from sparsejax.select import schedules
from sparsejax.select import structures
from sparsejax.weights import mechanism
from sparsejax.weights import plans
from sparsejax.weights import rules
from sparsejax.weights import scores


def static(
  inner: optax.GradientTransformation,
  *,
  sparsity: rules.Sparsity | None = None,
  key: jax.Array,
  distribution: rules.Distribution = None,
  structure: rules.Structure = structures.Unstructured(),
  every: int = 100,
  where: plans.Where = None,
  axes: plans.AxesByPath = structures.Axes(),
  track_explored: bool = False,
) -> optax.GradientTransformationExtraArgs:
  """A random mask drawn at `init` that never changes.

  Args:
    inner: any Optax optimizer.
    sparsity: share of weights masked, in [0, 1], or by path pattern.
    key: a PRNG key.
    distribution: how the sparsity is divided among layers; "erk" by default.
    structure: what shape masks take, for all weights or by path pattern.
    every: steps between looks for violations.
    where: which parameters are sparse, as in `sparsify`.
    axes: dimension numbers, for all or by path pattern.
    track_explored: also keep which weights were ever active.

  Returns:
    An Optax optimizer around `inner`.

  Raises:
    ValueError: as `sparsify`.

  Source: [random-pruning] Liu et al., The Unreasonable Effectiveness of Random
    Pruning.

  >>> params = {"kernel": jnp.ones((8, 8))}
  >>> tx = weights.static(
  ...   optax.adam(1e-3), sparsity=0.75, key=jax.random.key(0)
  ... )
  >>> int(weights.sparse_params(tx.init(params), params)["kernel"].sum())
  16
  """
  rule = rules.Rule(
    sparsity=sparsity,
    distribution=distribution,
    structure=structure,
    every=every,
  )
  return mechanism.sparsify(
    inner, rule, key=key, where=where, axes=axes, track_explored=track_explored
  )


def gradual_magnitude(
  inner: optax.GradientTransformation,
  *,
  sparsity: float,
  begin: int,
  until: int,
  every: int = 100,
  initial_sparsity: float = 0.0,
  distribution: rules.Distribution = "uniform",
  structure: rules.Structure = structures.Unstructured(),
  where: plans.Where = None,
  axes: plans.AxesByPath = structures.Axes(),
  track_explored: bool = False,
) -> optax.GradientTransformationExtraArgs:
  """Prunes the smallest weights along a cubic schedule while training.

  `s_t = s_f + (s_i - s_f) (1 - (t - begin) / (until - begin))^3`, every
  `every` steps; then the final mask stays. Masked weights receive no gradient.

  Args:
    inner: any Optax optimizer.
    sparsity: the final share of weights masked, one number in [0, 1].
    begin: step of the first mask update.
    until: step at which the final sparsity is reached.
    every: steps between mask updates; it must divide `until - begin`.
    initial_sparsity: the share masked before.
    distribution: how sparsity is divided among layers; the paper's is uniform.
    structure: what shape masks take, for all weights or by path pattern.
    where: which parameters are sparse, as in `sparsify`.
    axes: dimension numbers, for all or by path pattern.
    track_explored: also keep which weights were ever active.

  Returns:
    An Optax optimizer around `inner`.

  Raises:
    ValueError: as `sparsify`, or where the schedule does not end on an update.

  Source: [gradual-magnitude-pruning] Zhu and Gupta, To prune, or not to
    prune, eq. (1).

  >>> tx = weights.gradual_magnitude(
  ...   optax.sgd(0.1), sparsity=0.5, begin=0, until=1000
  ... )
  """
  for name, value in dict(
    sparsity=sparsity, initial_sparsity=initial_sparsity
  ).items():
    budgets.check_share(name, value)
  for name, value in dict(begin=begin, until=until, every=every).items():
    rules.check_step(name, value)
  if every < 1:
    raise ValueError(f"every must be at least 1, got {every}")
  if until <= begin or (until - begin) % every:
    raise ValueError(
      "until must be after begin by a multiple of every, got "
      f"begin={begin}, until={until}, every={every}"
    )
  rule = rules.Rule(
    sparsity=schedules.cubic(initial_sparsity, sparsity, begin, until),
    distribution=distribution,
    structure=structure,
    initial=scores.magnitude if initial_sparsity else None,
    begin=begin,
    until=until,
    every=every,
  )
  return mechanism.sparsify(
    inner, rule, where=where, axes=axes, track_explored=track_explored
  )
