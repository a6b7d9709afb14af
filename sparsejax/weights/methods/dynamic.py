"""Dynamic sparse training: masks that move while their size stays."""

from collections.abc import Callable
import numbers
from typing import Any

import jax
import jax.numpy as jnp
import optax

from sparsejax import masks
from sparsejax import paths
from sparsejax.select import budgets
from sparsejax.select import schedules
from sparsejax.select import structures
from sparsejax.select import thresholds
from sparsejax.weights import mechanism
from sparsejax.weights import plans
from sparsejax.weights import rules
from sparsejax.weights import scores


def set_(
  inner: optax.GradientTransformation,
  *,
  sparsity: rules.Sparsity,
  key: jax.Array,
  every: int = 100,
  until: int | None = None,
  drop_fraction: float | schedules.Schedule = 0.3,
  distribution: rules.Distribution = None,
  structure: rules.Structure = structures.Unstructured(),
  where: plans.Where = None,
  axes: plans.AxesByPath = structures.Axes(),
  track_explored: bool = False,
) -> optax.GradientTransformationExtraArgs:
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
    where: which parameters are sparse, as in `sparsify`.
    axes: dimension numbers, for all or by path pattern.
    track_explored: also keep which weights were ever active.

  Returns:
    An Optax optimizer around `inner`.

  Raises:
    ValueError: as `sparsify`.

  Source: [set] Mocanu et al., Scalable training of artificial neural networks
    with adaptive sparse connectivity, alg. 1.

  >>> tx = weights.set_(optax.sgd(0.1), sparsity=0.9, key=jax.random.key(0))
  """
  if not callable(drop_fraction):
    budgets.check_share("drop_fraction", drop_fraction)
  rule = rules.Rule(
    sparsity=sparsity,
    distribution=distribution,
    structure=structure,
    grow=scores.random,
    drop_fraction=drop_fraction,
    every=every,
    until=until,
  )
  return mechanism.sparsify(
    inner, rule, key=key, where=where, axes=axes, track_explored=track_explored
  )


sparse_evolutionary = set_


def rigl(
  inner: optax.GradientTransformation,
  *,
  sparsity: rules.Sparsity,
  key: jax.Array,
  every: int = 100,
  until: int,
  drop_fraction: float | schedules.Schedule = 0.3,
  distribution: rules.Distribution = None,
  structure: rules.Structure = structures.Unstructured(),
  grow: scores.Score = scores.gradient,
  memory: Callable[[jax.Array], jax.Array] | None = None,
  remember: Callable[[scores.Seen], jax.Array] | None = None,
  where: plans.Where = None,
  axes: plans.AxesByPath = structures.Axes(),
  track_explored: bool = False,
) -> optax.GradientTransformationExtraArgs:
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
    memory: initial value of a buffer for `grow`, from the parameter.
    remember: that buffer after a mask update.
    where: which parameters are sparse, as in `sparsify`.
    axes: dimension numbers, for all or by path pattern.
    track_explored: also keep which weights were ever active.

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
  rules.check_step("until", until)
  if not callable(drop_fraction):
    if until < 1:
      raise ValueError(f"until must be at least 1, got {until}")
    budgets.check_share("drop_fraction", drop_fraction)
    drop_fraction = schedules.cosine(drop_fraction, until)
  rule = rules.Rule(
    sparsity=sparsity,
    distribution=distribution,
    structure=structure,
    grow=grow,
    drop_fraction=drop_fraction,
    every=every,
    until=until,
    memory=memory,
    remember=remember,
  )
  return mechanism.sparsify(
    inner, rule, key=key, where=where, axes=axes, track_explored=track_explored
  )


def rigl_itop(
  inner: optax.GradientTransformation,
  *,
  sparsity: rules.Sparsity,
  key: jax.Array,
  every: int = 4000,
  until: int,
  drop_fraction: float | schedules.Schedule = 0.5,
  distribution: rules.Distribution = None,
  structure: rules.Structure = structures.Unstructured(),
  where: plans.Where = None,
  axes: plans.AxesByPath = structures.Axes(),
) -> optax.GradientTransformationExtraArgs:
  """RigL that explores: rare, large exchanges until the end of training.

  Each mask is trained for long before the next, so that what was grown can
  prove itself, and over the training nearly every weight gets its turn. Its
  state keeps which did: see `explored_share`. In all else it is `rigl`.

  Args:
    inner: any Optax optimizer.
    sparsity: share of weights masked, in [0, 1], or by path pattern.
    key: a PRNG key, for the first masks.
    every: steps between mask updates; 4000 are those of the authors' commands
      (with batches of 128 on CIFAR, 64 on ImageNet). Shorter training takes
      fewer.
    until: the last step that may be one; the authors' is the last of all.
    drop_fraction: share of active weights exchanged at first, falling along a
      cosine to 0 at `until`; or a schedule of its own. 0.5 is the authors'.
    distribution: how sparsity is divided among layers; "erk" by default.
    structure: what shape masks take, for all weights or by path pattern.
    where: which parameters are sparse, as in `sparsify`.
    axes: dimension numbers, for all or by path pattern.

  Returns:
    An Optax optimizer around `inner`, with one more bit a weight.

  Raises:
    ValueError: as `rigl`.

  Source: [rigl-itop] Liu et al., Do We Actually Need Dense
    Over-Parameterization? In-Time Over-Parameterization in Sparse Training.

  >>> tx = weights.rigl_itop(
  ...   optax.sgd(0.1), sparsity=0.9, until=100_000, key=jax.random.key(0)
  ... )
  """
  return rigl(
    inner,
    sparsity=sparsity,
    key=key,
    every=every,
    until=until,
    drop_fraction=drop_fraction,
    distribution=distribution,
    structure=structure,
    where=where,
    axes=axes,
    track_explored=True,
  )


def explored_share(
  opt_state: Any, params: Any, *, where: plans.Where = None
) -> jax.Array:
  """In-time over-parameterization rate: the share of weights ever active.

  Args:
    opt_state: the state of `rigl_itop`, or of any method that was given
      `track_explored=True`, wherever it is nested.
    params: the parameters it is for.
    where: which parameters count, as in `sparsify`: give what it was given.
      Of a source network the names are used, and the share is of all weights.

  Returns:
    R_s, an f32 scalar in [0, 1]; it works under `jit`.

  Raises:
    ValueError: as `sparsejax.weights.masks`, but for violations; nothing was
      tracked; `where` names a parameter that no sparsifier has.

  Source: [rigl-itop] Liu et al., Do We Actually Need Dense
    Over-Parameterization? In-Time Over-Parameterization in Sparse Training.

  >>> params = {"kernel": jnp.ones((8, 8))}
  >>> tx = weights.rigl_itop(
  ...   optax.sgd(0.1), sparsity=0.75, until=8000, key=jax.random.key(0)
  ... )
  >>> float(weights.explored_share(tx.init(params), params))
  0.25
  """
  leaves = paths.named(params)[0]
  ever = {}
  for state in masks.states_of(opt_state, params):
    ever |= paths.named(state.explored)[0]
  if not ever:
    raise ValueError(
      "opt_state must have tracked what was explored: track_explored=True"
    )
  names = plans.sparse_names(leaves, plans.source_network(where)[0])
  if missing := [n for n in names if n not in ever]:
    raise ValueError(
      f"where must name parameters that are tracked, got {missing} too"
    )
  active = [thresholds.count([masks.unpack(ever[n], leaves[n])]) for n in names]
  size = sum(leaves[n].size for n in names)
  return sum(a.astype(jnp.float32) for a in active) / max(1, size)


def srigl(
  inner: optax.GradientTransformation,
  *,
  sparsity: rules.Sparsity,
  key: jax.Array,
  every: int = 100,
  until: int,
  drop_fraction: float | schedules.Schedule = 0.3,
  distribution: rules.Distribution = None,
  ablate: float = 0.3,
  where: plans.Where = None,
  axes: plans.AxesByPath = structures.Axes(),
  track_explored: bool = False,
) -> optax.GradientTransformationExtraArgs:
  """RigL with the same fan-in for every neuron, and neuron ablation.

  At a mask update, neurons with fewer than `ablate * fan_in` salient weights
  (survivors of the drop, or among the best candidates) are removed, and the
  others share what they had: `floor(budget / neurons left)` inputs each.

  The paper's code counts candidates among active weights too, and rounds the
  threshold to an integer; this follows the paper's text.

  Args:
    inner: any Optax optimizer.
    sparsity: share of weights masked, in [0, 1], or by path pattern.
    key: a PRNG key, for the first masks.
    every: steps between mask updates.
    until: the last step that may be one.
    drop_fraction: as in `rigl`.
    distribution: how sparsity is divided among layers; "erk" by default.
    ablate: the paper's gamma, in [0, 1]; 0 removes no neuron.
    where: which parameters are sparse, as in `sparsify`.
    axes: dimension numbers, for all or by path pattern.
    track_explored: also keep which weights were ever active.

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
  return rigl(
    inner,
    sparsity=sparsity,
    key=key,
    every=every,
    until=until,
    drop_fraction=drop_fraction,
    distribution=distribution,
    structure=structures.ConstantFanIn(ablate=ablate),
    where=where,
    axes=axes,
    track_explored=track_explored,
  )


def dst_ee(
  inner: optax.GradientTransformation,
  *,
  sparsity: rules.Sparsity,
  key: jax.Array,
  every: int = 100,
  until: int,
  drop_fraction: float | schedules.Schedule = 0.3,
  distribution: rules.Distribution = None,
  structure: rules.Structure = structures.Unstructured(),
  c: float = 1e-3,
  epsilon: float = 1.0,
  where: plans.Where = None,
  axes: plans.AxesByPath = structures.Axes(),
  track_explored: bool = False,
) -> optax.GradientTransformationExtraArgs:
  """RigL that also explores: grows by `|gradient| + c ln(t) / (N + epsilon)`.

  t is the step and N counts the masks in which a weight has been active, the
  first one and this included. With c = 0 it is RigL.

  Args:
    inner: any Optax optimizer.
    sparsity: share of weights masked, in [0, 1], or by path pattern.
    key: a PRNG key, for the first masks.
    every: steps between mask updates.
    until: the last step that may be one.
    drop_fraction: as in `rigl`.
    distribution: how sparsity is divided among layers; "erk" by default.
    structure: what shape masks take, for all weights or by path pattern.
    c: weight of exploration, at least 0.
    epsilon: keeps the quotient finite, above 0.
    where: which parameters are sparse, as in `sparsify`.
    axes: dimension numbers, for all or by path pattern.
    track_explored: also keep which weights were ever active.

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
    sparsity=sparsity,
    key=key,
    every=every,
    until=until,
    drop_fraction=drop_fraction,
    distribution=distribution,
    structure=structure,
    grow=acquisition,
    memory=lambda p: jnp.zeros_like(p, jnp.int32),
    remember=lambda seen: seen.memory + seen.mask,
    where=where,
    axes=axes,
    track_explored=track_explored,
  )


def top_kast(
  inner: optax.GradientTransformation,
  *,
  sparsity: float,
  backward_sparsity: float,
  every: int = 1,
  until: int | None = None,
  decay: float = 1e-4,
  distribution: rules.Distribution = "uniform",
  structure: rules.Structure = structures.Unstructured(),
  where: plans.Where = None,
  axes: plans.AxesByPath = structures.Axes(),
  track_explored: bool = False,
) -> optax.GradientTransformationExtraArgs:
  """Forward with the largest weights, updates to a superset of them.

  Dense weights are kept; those outside the superset never change. The loss
  pulls weights to zero: `decay * w` in the forward set and, stronger,
  `decay * w / D` in the rest of the superset, D the layer's forward density.

  The model must compute with `sparse_params(opt_state, params)` in every step.

  Args:
    inner: any Optax optimizer.
    sparsity: share of weights masked in the forward pass, one number in
      [0, 1].
    backward_sparsity: share that receives no update, at most `sparsity`.
    every: steps between mask updates (the paper finds 100 as good as 1).
    until: the last step that may be one; None for no end.
    decay: strength of the L2 penalty.
    distribution: how sparsity is divided among layers; the paper's is uniform.
    structure: what shape masks take, for all weights or by path pattern.
    where: which parameters are sparse, as in `sparsify`.
    axes: dimension numbers, for all or by path pattern.
    track_explored: also keep which weights were ever active.

  Returns:
    An Optax optimizer around `inner`, with two bits of mask a weight.

  Raises:
    ValueError: as `sparsify`, backward_sparsity > sparsity, or decay < 0.

  Source: [top-kast] Jayakumar et al., Top-KAST: Top-K Always Sparse Training,
    sec. 2.

  >>> tx = weights.top_kast(optax.sgd(0.1), sparsity=0.9, backward_sparsity=0.5)
  """
  budgets.check_share("sparsity", sparsity)
  budgets.check_share("backward_sparsity", backward_sparsity)
  if not isinstance(decay, numbers.Real) or not decay >= 0:
    raise ValueError(f"decay must be a number of 0 or more, got {decay!r}")

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
  return mechanism.sparsify(
    inner, rule, where=where, axes=axes, track_explored=track_explored
  )
