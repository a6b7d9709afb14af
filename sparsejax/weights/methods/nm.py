"""Training under n:m patterns with dense weights behind them."""

import math
import numbers

import jax.numpy as jnp
import optax

from sparsejax.select import structures
from sparsejax.weights import mechanism
from sparsejax.weights import plans
from sparsejax.weights import rules
from sparsejax.weights import scores


def sr_ste(
  inner: optax.GradientTransformation,
  *,
  n: int = 2,
  m: int = 4,
  decay: float = 2e-4,
  every: int = 1,
  until: int | None = None,
  axis: int | None = None,
  where: plans.Where = None,
  axes: plans.AxesByPath = structures.Axes(),
  track_explored: bool = False,
) -> optax.GradientTransformationExtraArgs:
  """n:m training: straight-through gradients, and decay of masked weights.

  `w <- w - lr (g(masked w) + decay * (1 - mask) w)`; decay = 0 is the plain
  straight-through estimator. Dense weights are kept, so the model must compute
  with `sparse_params(opt_state, params)` in every step. The metric SAD is
  `sparsejax.weights.sad`.

  Args:
    inner: any Optax optimizer; the decay passes through it.
    n: weights kept of every m.
    m: weights in a group, along the last input axis.
    decay: the paper's lambda_w.
    every: steps between mask updates; the paper's is 1.
    until: the last step that may be one; None for no end.
    axis: the axis of the groups, if another.
    where: which parameters are sparse, as in `sparsify`.
    axes: dimension numbers, for all or by path pattern.
    track_explored: also keep which weights were ever active.

  Returns:
    An Optax optimizer around `inner`.

  Raises:
    ValueError: as `sparsify`, m does not divide an axis, or decay < 0.

  Source: [sr-ste] Zhou et al., Learning N:M Fine-grained Structured Sparse
    Neural Networks From Scratch, eq. (9).

  >>> tx = weights.sr_ste(optax.sgd(0.1), n=2, m=4)
  """

  if not isinstance(decay, numbers.Real) or not decay >= 0:
    raise ValueError(f"decay must be a number of 0 or more, got {decay!r}")

  def refined(seen):
    pull = jnp.where(seen.mask, 0, decay * seen.param.astype(jnp.float32))
    return (seen.grad + pull).astype(seen.grad.dtype)

  rule = rules.Rule(
    structure=structures.NM(n, m, axis),
    initial=scores.magnitude,
    gradient=refined,
    dense=True,
    every=every,
    until=until,
  )
  return mechanism.sparsify(
    inner, rule, where=where, axes=axes, track_explored=track_explored
  )


def mask_decay(
  inner: optax.GradientTransformation,
  *,
  n: int = 2,
  m: int = 4,
  begin: int = 0,
  until: int,
  kind: str = "linear",
  every: int = 1,
  axis: int | None = None,
  where: plans.Where = None,
  axes: plans.AxesByPath = structures.Axes(),
  track_explored: bool = False,
) -> optax.GradientTransformationExtraArgs:
  """MdGf: masked weights fade out of the forward pass, and out of training.

  The forward pass sees `w * (mask + beta_t * (1 - mask))` and masked weights
  get `beta_t` times their gradient. beta is 1 until `begin`, falls linearly or
  exponentially, and is 0 from `until` on; masks stay there, and masked weights
  then receive nothing. The authors' code passes gradients on undiminished;
  this is the gradient of the stated forward pass.

  The model must compute with `sparse_params(opt_state, params)` in every step.

  Args:
    inner: any Optax optimizer.
    n: weights kept of every m.
    m: weights in a group, along the last input axis.
    begin: step at which the decay begins.
    until: step from which masked weights are gone.
    kind: "linear", or "exponential" (down to 1% just before `until`).
    every: steps between mask updates.
    axis: the axis of the groups, if another.
    where: which parameters are sparse, as in `sparsify`.
    axes: dimension numbers, for all or by path pattern.
    track_explored: also keep which weights were ever active.

  Returns:
    An Optax optimizer around `inner`.

  Raises:
    ValueError: as `sparsify`, an unknown kind, or until <= begin.

  Source: [pgf-nm] Bambhaniya et al., Progressive Gradient Flow for Robust N:M
    Sparsity Training in Transformers, sec. 3 (MdGf).

  >>> tx = weights.mask_decay(optax.sgd(0.1), n=1, m=4, until=1000)
  """
  rules.check_step("begin", begin)
  rules.check_step("until", until)
  if until <= begin:
    raise ValueError(f"until must be after begin={begin}, got {until}")
  if kind not in ("linear", "exponential"):
    raise ValueError(f'kind must be "linear" or "exponential", got {kind!r}')

  def beta(step):
    x = jnp.clip((step - begin) / (until - begin), 0, 1)
    if kind == "linear":
      return 1 - x
    return jnp.where(x < 1, jnp.exp(x * math.log(0.01)), 0.0)

  rule = rules.Rule(
    structure=structures.NM(n, m, axis),
    initial=scores.magnitude,
    gradient=scores.leaky_gradient,
    dense=True,
    leak=beta,
    every=every,
    until=until,
  )
  return mechanism.sparsify(
    inner, rule, where=where, axes=axes, track_explored=track_explored
  )


def structure_decay(
  inner: optax.GradientTransformation,
  *,
  n: int = 1,
  m: int = 8,
  begin: int = 0,
  until: int,
  kind: str = "stepwise",
  every: int = 1,
  axis: int | None = None,
  where: plans.Where = None,
  axes: plans.AxesByPath = structures.Axes(),
  track_explored: bool = False,
) -> optax.GradientTransformationExtraArgs:
  """SdGf: the n:m pattern tightens in stages, with straight-through gradients.

  "stepwise" keeps m and halves what is kept: m-1, m/2, m/4, ... n. "geometric"
  keeps n/m and halves both from eight times: 8n:8m, 4n:4m, 2n:2m, n:m. Stages
  are equally long; the last begins at `until`. Before `begin` it is dense. A
  stage begins with the first mask update in it: `every` should divide them.

  The model must compute with `sparse_params(opt_state, params)` in every step.

  Args:
    inner: any Optax optimizer.
    n: weights kept of every m at the end.
    m: weights in a group at the end, along the last input axis.
    begin: step at which the first pattern applies.
    until: step at which the final pattern applies.
    kind: "stepwise" or "geometric".
    every: steps between mask updates.
    axis: the axis of the groups, if another.
    where: which parameters are sparse, as in `sparsify`.
    axes: dimension numbers, for all or by path pattern.
    track_explored: also keep which weights were ever active.

  Returns:
    An Optax optimizer around `inner`.

  Raises:
    ValueError: as `sparsify`, an unknown kind, or until <= begin.

  Source: [pgf-nm] Bambhaniya et al., Progressive Gradient Flow for Robust N:M
    Sparsity Training in Transformers, sec. 3 (SdGf).

  >>> weights.decay_patterns(1, 8, "stepwise")
  [(7, 8), (4, 8), (2, 8), (1, 8)]
  >>> tx = weights.structure_decay(optax.sgd(0.1), n=1, m=8, until=1000)
  """
  rules.check_step("begin", begin)
  rules.check_step("until", until)
  if until <= begin:
    raise ValueError(f"until must be after begin={begin}, got {until}")
  patterns = decay_patterns(n, m, kind)
  apart = (until - begin) / max(1, len(patterns) - 1)
  stages = [
    (begin + round(i * apart), structures.NM(a, b, axis))
    for i, (a, b) in enumerate(patterns)
  ]
  stages[-1] = (until, stages[-1][1])
  if begin > 0:
    b = patterns[0][1]
    stages.insert(0, (0, structures.NM(b, b, axis)))
  rule = rules.Rule(
    structure=tuple(stages),
    initial=scores.magnitude,
    gradient=scores.passed_gradient,
    dense=True,
    every=every,
    until=None,
  )
  return mechanism.sparsify(
    inner, rule, where=where, axes=axes, track_explored=track_explored
  )


def decay_patterns(n: int, m: int, kind: str) -> list[tuple[int, int]]:
  """The (n, m) of each stage of `structure_decay`, ending in (n, m).

  Raises:
    ValueError: an unknown kind, or n is not in [0, m].

  >>> weights.decay_patterns(1, 4, "geometric")
  [(8, 32), (4, 16), (2, 8), (1, 4)]
  """
  structures.NM(n, m)  # refuses what is no pattern
  if kind == "geometric":
    return [(f * n, f * m) for f in (8, 4, 2, 1)]
  if kind != "stepwise":
    raise ValueError(f'kind must be "stepwise" or "geometric", got {kind!r}')
  kept = [m - 1]
  while kept[-1] > n:
    half = m >> len(kept)
    kept.append(half if half > n else n)
  return [(k, m) for k in dict.fromkeys(max(k, n) for k in kept)]
