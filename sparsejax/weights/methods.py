"""Published methods, each a rule of `sparsify`."""

from collections.abc import Mapping
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from sparsejax.select import schedules
from sparsejax.select import structures
from sparsejax.weights import rules
from sparsejax.weights import scores
from sparsejax.weights import sparsify as _sparsify

Array = jax.Array
Optimizer = optax.GradientTransformation
Sparse = optax.GradientTransformationExtraArgs
Structure = structures.Structure | Mapping[str, structures.Structure]
Sparsity = rules.Sparsity | Mapping[str, rules.Sparsity]


def static(
  inner: Optimizer,
  *,
  sparsity: Sparsity | None = None,
  key: Array,
  distribution: Any = None,
  structure: Structure = structures.Unstructured(),
  every: int = 100,
  **where: Any,
) -> Sparse:
  """A random mask drawn at `init` that never changes.

  Args:
    inner: any Optax optimizer.
    sparsity: share of weights masked, in [0, 1], or by path pattern.
    key: a PRNG key.
    distribution: how the sparsity is divided among layers; "erk" by default.
    structure: what shape masks take, for all weights or by path pattern.
    every: steps between looks for violations.
    **where: `where`, `axes` and `track_explored` of `sparsify`.

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
  return _sparsify.sparsify(inner, rule, key=key, **where)


def gradual_magnitude(
  inner: Optimizer,
  *,
  sparsity: float,
  begin: int,
  until: int,
  every: int = 100,
  initial_sparsity: float = 0.0,
  distribution: Any = "uniform",
  structure: Structure = structures.Unstructured(),
  **where: Any,
) -> Sparse:
  """Prunes the smallest weights along a cubic schedule while training.

  `s_t = s_f + (s_i - s_f) (1 - (t - begin) / (until - begin))^3`, every
  `every` steps; then the final mask stays. Masked weights receive no gradient.

  Args:
    inner: any Optax optimizer.
    sparsity: the final share of weights masked, in [0, 1].
    begin: step of the first mask update.
    until: step at which the final sparsity is reached.
    every: steps between mask updates; it must divide `until - begin`.
    initial_sparsity: the share masked before.
    distribution: how sparsity is divided among layers; the paper's is uniform.
    structure: what shape masks take, for all weights or by path pattern.
    **where: `where`, `axes` and `track_explored` of `sparsify`.

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
    if not 0 <= value <= 1:
      raise ValueError(f"{name} must be in [0, 1], got {value}")
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
  return _sparsify.sparsify(inner, rule, **where)


def set_(
  inner: Optimizer,
  *,
  sparsity: Sparsity,
  key: Array,
  every: int = 100,
  until: int | None = None,
  drop_fraction: float | schedules.Schedule = 0.3,
  distribution: Any = None,
  structure: Structure = structures.Unstructured(),
  **where: Any,
) -> Sparse:
  """Sparse evolutionary training: drops the smallest, grows at random.

  It drops by magnitude; the original ranks positive and negative weights
  apart. Just dropped weights may be drawn again, and then keep their value.

  Args:
    inner: any Optax optimizer.
    sparsity: share of weights masked, in [0, 1], or by path pattern.
    key: a PRNG key.
    every: steps between mask updates.
    until: the last step that may be one; None for no end.
    drop_fraction: share of active weights exchanged, constant or a schedule.
    distribution: how sparsity is divided among layers; "erk" by default.
    structure: what shape masks take, for all weights or by path pattern.
    **where: `where`, `axes` and `track_explored` of `sparsify`.

  Returns:
    An Optax optimizer around `inner`.

  Raises:
    ValueError: as `sparsify`.

  Source: [set] Mocanu et al., Scalable training of artificial neural networks
    with adaptive sparse connectivity, alg. 1.

  >>> tx = weights.set_(optax.sgd(0.1), sparsity=0.9, key=jax.random.key(0))
  """
  if not callable(drop_fraction):
    drop_fraction = schedules.constant(_fraction(drop_fraction))
  rule = rules.Rule(
    sparsity=sparsity,
    distribution=distribution,
    structure=structure,
    grow=scores.random,
    drop_fraction=drop_fraction,
    every=every,
    until=until,
  )
  return _sparsify.sparsify(inner, rule, key=key, **where)


sparse_evolutionary = set_


def rigl(
  inner: Optimizer,
  *,
  sparsity: Sparsity,
  key: Array,
  every: int = 100,
  until: int,
  drop_fraction: float | schedules.Schedule = 0.3,
  distribution: Any = None,
  structure: Structure = structures.Unstructured(),
  grow: scores.Score = scores.gradient,
  **settings: Any,
) -> Sparse:
  """Drops the smallest weights and grows where the gradient is largest.

  Grown weights start at zero with clean moments and move from the next step
  on. Just dropped weights may be grown again, and then keep their value (as in
  the paper and its code). Unlike there, the other weights also take their
  ordinary step when masks are updated.

  Args:
    inner: any Optax optimizer.
    sparsity: share of weights masked, in [0, 1], or by path pattern.
    key: a PRNG key, for the first masks.
    every: steps between mask updates.
    until: the last step that may be one; best about 75% of the training.
    drop_fraction: share of active weights exchanged at first, which then
      falls along a cosine to 0 at `until`; or a schedule of its own.
    distribution: how sparsity is divided among layers; "erk" by default.
    structure: what shape masks take, for all weights or by path pattern.
    grow: score of inactive weights.
    **settings: `where`, `axes` and `track_explored` of `sparsify`; `memory`
      and `remember` of `Rule`.

  Returns:
    An Optax optimizer around `inner`.

  Raises:
    ValueError: as `sparsify`.

  Source: [rigl] Evci et al., Rigging the Lottery, alg. 1.

  >>> params = {"kernel": jnp.ones((8, 8)), "bias": jnp.ones(8)}
  >>> tx = weights.rigl(
  ...   optax.adamw(1e-3), sparsity=0.75, until=750, key=jax.random.key(0)
  ... )
  >>> state = tx.init(params)
  >>> params = weights.sparse_params(state, params)
  >>> updates, state = tx.update(params, state, params)
  >>> params = optax.apply_updates(params, updates)
  >>> int((params["kernel"] != 0).sum())
  16
  """
  if not callable(drop_fraction):
    if until < 1:
      raise ValueError(f"until must be at least 1, got {until}")
    drop_fraction = schedules.cosine(_fraction(drop_fraction), until)
  own = {k: settings.pop(k) for k in ("memory", "remember") if k in settings}
  rule = rules.Rule(
    sparsity=sparsity,
    distribution=distribution,
    structure=structure,
    grow=grow,
    drop_fraction=drop_fraction,
    every=every,
    until=until,
    **own,
  )
  return _sparsify.sparsify(inner, rule, key=key, **settings)


def srigl(
  inner: Optimizer, *, ablate: float = 0.3, distribution: Any = None, **settings
) -> Sparse:
  """RigL with the same fan-in for every neuron, and neuron ablation.

  At a mask update, neurons with fewer than `ablate * fan_in` salient weights
  (survivors of the drop, or among the best candidates) are removed, and the
  others share what they had: `floor(budget / neurons left)` inputs each.

  The paper's code counts candidates among active weights too, and rounds the
  threshold to an integer; this follows the paper's text.

  Args:
    inner: any Optax optimizer.
    ablate: the paper's gamma, in [0, 1]; 0 removes no neuron.
    distribution: how sparsity is divided among layers; "erk" by default.
    **settings: those of `rigl`, but for `structure`.

  Returns:
    An Optax optimizer around `inner`.

  Raises:
    ValueError: as `rigl`.

  Source: [srigl] Lasby et al., Dynamic Sparse Training with Structured
    Sparsity, sec. 3.

  >>> tx = weights.srigl(
  ...   optax.sgd(0.1), sparsity=0.9, until=750, key=jax.random.key(0)
  ... )
  """
  structure = structures.ConstantFanIn(ablate=ablate)
  return rigl(inner, structure=structure, distribution=distribution, **settings)


def dst_ee(
  inner: Optimizer, *, c: float = 1e-3, epsilon: float = 1.0, **settings
) -> Sparse:
  """RigL that also explores: grows by `|gradient| + c ln(t) / (N + epsilon)`.

  t is the step and N counts the masks in which a weight has been active, the
  first one and this included. With c = 0 it is RigL.

  Args:
    inner: any Optax optimizer.
    c: weight of exploration, at least 0.
    epsilon: keeps the quotient finite, above 0.
    **settings: those of `rigl`.

  Returns:
    An Optax optimizer around `inner`; its state holds one int32 a weight.

  Raises:
    ValueError: as `rigl`, or c or epsilon out of range.

  Source: [dst-ee] Huang et al., Dynamic Sparse Training via Balancing the
    Exploration-Exploitation Trade-off, eq. (4).

  >>> tx = weights.dst_ee(
  ...   optax.sgd(0.1), sparsity=0.9, until=750, key=jax.random.key(0)
  ... )
  """
  if c < 0:
    raise ValueError(f"c must not be negative, got {c}")
  if epsilon <= 0:
    raise ValueError(f"epsilon must be positive, got {epsilon}")

  def acquisition(seen):
    t = jnp.maximum(seen.step, 1).astype(jnp.float32)
    visits = seen.memory.astype(jnp.float32)
    return scores.gradient(seen) + c * jnp.log(t) / (visits + epsilon)

  return rigl(
    inner,
    grow=acquisition,
    memory=lambda p: jnp.zeros_like(p, jnp.int32),
    remember=lambda seen: seen.memory + seen.mask,
    **settings,
  )


def top_kast(
  inner: Optimizer,
  *,
  sparsity: float,
  backward_sparsity: float,
  every: int = 1,
  until: int | None = None,
  decay: float = 1e-4,
  distribution: Any = "uniform",
  structure: Structure = structures.Unstructured(),
  **where: Any,
) -> Sparse:
  """Forward with the largest weights, updates to a superset of them.

  Dense weights are kept; those outside the superset never change. The loss
  pulls weights to zero: `decay * w` in the forward set and, stronger,
  `decay * w / D` in the rest of the superset, D the layer's forward density.

  The model must compute with `sparse_params(opt_state, params)` in every step.

  Args:
    inner: any Optax optimizer.
    sparsity: share of weights masked in the forward pass, in [0, 1].
    backward_sparsity: share that receives no update, at most `sparsity`.
    every: steps between mask updates (the paper finds 100 as good as 1).
    until: the last step that may be one; None for no end.
    decay: strength of the L2 penalty.
    distribution: how sparsity is divided among layers; the paper's is uniform.
    structure: what shape masks take, for all weights or by path pattern.
    **where: `where`, `axes` and `track_explored` of `sparsify`.

  Returns:
    An Optax optimizer around `inner`, with two bits of mask a weight.

  Raises:
    ValueError: as `sparsify`, or a backward_sparsity above `sparsity`.

  Source: [top-kast] Jayakumar et al., Top-KAST: Top-K Always Sparse Training,
    sec. 2.

  >>> tx = weights.top_kast(optax.sgd(0.1), sparsity=0.9, backward_sparsity=0.5)
  """
  if not 0 <= backward_sparsity <= sparsity:
    raise ValueError(
      f"backward_sparsity must be in [0, sparsity={sparsity}], got "
      f"{backward_sparsity}"
    )

  def penalized(seen):
    w = seen.param.astype(jnp.float32)
    density = jnp.mean(seen.mask, dtype=jnp.float32)
    pull = jnp.where(seen.mask, w, w / jnp.maximum(density, 1e-6))
    whole = (seen.grad + decay * pull).astype(seen.grad.dtype)
    return jnp.where(seen.backward, whole, jnp.zeros((), whole.dtype))

  rule = rules.Rule(
    sparsity=sparsity,
    backward_sparsity=backward_sparsity,
    distribution=distribution,
    structure=structure,
    initial=scores.magnitude,
    gradient=penalized,
    dense=True,
    every=every,
    until=until,
  )
  return _sparsify.sparsify(inner, rule, **where)


def sr_ste(
  inner: Optimizer,
  *,
  n: int = 2,
  m: int = 4,
  decay: float = 2e-4,
  every: int = 1,
  until: int | None = None,
  axis: int | None = None,
  **where: Any,
) -> Sparse:
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
    **where: `where`, `axes` and `track_explored` of `sparsify`.

  Returns:
    An Optax optimizer around `inner`.

  Raises:
    ValueError: as `sparsify`, or m does not divide an axis.

  Source: [sr-ste] Zhou et al., Learning N:M Fine-grained Structured Sparse
    Neural Networks From Scratch, eq. (9).

  >>> tx = weights.sr_ste(optax.sgd(0.1), n=2, m=4)
  """

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
  return _sparsify.sparsify(inner, rule, **where)


def mask_decay(
  inner: Optimizer,
  *,
  n: int = 2,
  m: int = 4,
  begin: int = 0,
  until: int,
  kind: str = "linear",
  every: int = 1,
  axis: int | None = None,
  **where: Any,
) -> Sparse:
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
    **where: `where`, `axes` and `track_explored` of `sparsify`.

  Returns:
    An Optax optimizer around `inner`.

  Raises:
    ValueError: as `sparsify`, an unknown kind, or until <= begin.

  Source: [pgf-nm] Bambhaniya et al., Progressive Gradient Flow for Robust N:M
    Sparsity Training in Transformers, sec. 3 (MdGf).

  >>> tx = weights.mask_decay(optax.sgd(0.1), n=1, m=4, until=1000)
  """
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
  return _sparsify.sparsify(inner, rule, **where)


def structure_decay(
  inner: Optimizer,
  *,
  n: int = 1,
  m: int = 8,
  begin: int = 0,
  until: int,
  kind: str = "stepwise",
  every: int = 1,
  axis: int | None = None,
  **where: Any,
) -> Sparse:
  """SdGf: the n:m pattern tightens in stages, with straight-through gradients.

  "stepwise" keeps m and halves what is kept: m-1, m/2, m/4, ... n. "geometric"
  keeps n/m and halves both from eight times: 8n:8m, 4n:4m, 2n:2m, n:m. Stages
  are equally long; the last begins at `until`. Before `begin` it is dense.

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
    **where: `where`, `axes` and `track_explored` of `sparsify`.

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
    gradient=scores.straight_through,
    dense=True,
    every=every,
    until=None,
  )
  return _sparsify.sparsify(inner, rule, **where)


def decay_patterns(n: int, m: int, kind: str) -> list[tuple[int, int]]:
  """The (n, m) of each stage of `structure_decay`, ending in (n, m).

  >>> weights.decay_patterns(1, 4, "geometric")
  [(8, 32), (4, 16), (2, 8), (1, 4)]
  """
  if kind == "geometric":
    return [(f * n, f * m) for f in (8, 4, 2, 1)]
  if kind != "stepwise":
    raise ValueError(f'kind must be "stepwise" or "geometric", got {kind!r}')
  kept = [m - 1]
  while kept[-1] > n:
    half = m >> len(kept)
    kept.append(half if half > n else n)
  return [(k, m) for k in dict.fromkeys(max(k, n) for k in kept)]


def _fraction(value: float) -> float:
  if not 0 <= value <= 1:
    raise ValueError(f"drop_fraction must be in [0, 1], got {value}")
  return value
