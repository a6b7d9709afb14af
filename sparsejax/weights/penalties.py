"""Penalties that push small weights towards zero before they are pruned."""

import math
import numbers
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
import optax

from sparsejax import masks
from sparsejax import paths
from sparsejax.select import budgets
from sparsejax.select import schedules
from sparsejax.select import thresholds
from sparsejax.weights import plans

Array = jax.Array
PyTree = Any

# The paper's: here tanh bends most (its third derivative is zero).
_BEND = 0.6585
# Below it a weight counts as zero: the slope at zero, s, stays finite.
_LEAST = 1e-30


def hypersparse(
  params: PyTree, *, sparsity: float, where: plans.Where = None
) -> Array:
  """HyperSparse: an L1 penalty for the weights that will be pruned.

  `s = 0.6585 / q`, where q is the magnitude at the prune quantile, that of the
  weight ranked `floor(sparsity * n)` from below among all that `where` selects.
  The penalty is `C * sum(tanh(s * abs(w)))`. s and `C = sum(abs(w)) /
  sum(tanh(s * abs(w)))` are constants to differentiation, so that its gradient
  is `sign(w) * C * s * sech(s * abs(w))**2`: at zero not below 1, which is that
  of L1, at q two thirds of that at zero, and flat far above.

  The paper writes the penalty less `sum(abs(w))`, which is zero everywhere, and
  has the same gradient under its rules of what is constant; here the value is
  `sum(abs(w))`, the L1 norm. Where q is zero, enough weights are: the gradient
  is zero.

  Args:
    params: the parameters.
    sparsity: share of weights that will be pruned, in [0, 1]; at 1 q is the
      largest magnitude.
    where: which parameters count: a pattern or a function, as in `sparsify`.

  Returns:
    A scalar (f32), to be added to a loss, times a strength that grows.

  Raises:
    ValueError: sparsity is not a number in [0, 1], or `where` selects nothing.

  Source: [hypersparse] Glandorf et al., HyperSparse Neural Networks: Shifting
    Exploration to Exploitation through Adaptive Regularization, L_HS.

  >>> params = {"kernel": jnp.array([[4.0, 1.0], [0.5, -0.1]])}
  >>> slope = jax.grad(weights.hypersparse)(params, sparsity=0.5)["kernel"]
  >>> [[round(float(x), 1) for x in row] for row in slope]
  [[0.0, 1.3], [1.7, -1.9]]
  """
  return _penalty(_selected(params, where), sparsity)


def add_hypersparse(
  strength: float | schedules.Schedule,
  *,
  sparsity: float,
  where: plans.Where = None,
) -> optax.GradientTransformation:
  """Adds the gradient of `strength * hypersparse` to the updates.

  A link of `optax.chain` to stand where `optax.add_decayed_weights` does:
  before the learning rate, and before or after the moments as the penalty shall
  be part of the loss or decoupled from it. Adaptive Regularized Training lets
  the strength grow by a factor each epoch, until weights are pruned:
  `optax.exponential_decay(5e-4, steps_per_epoch, 1.05, staircase=True)`.

  Args:
    strength: a number of 0 or more, or a schedule of the step; an array where
      `optax.inject_hyperparams` holds it (with `sparsity` a static argument).
    sparsity: share of weights that will be pruned, in [0, 1].
    where: which parameters count: a pattern or a function, as in `sparsify`.

  Returns:
    An Optax transformation; `update` needs `params`.

  Raises:
    ValueError: as `hypersparse`, a strength below 0, or `params` is missing.

  Source: [hypersparse] Glandorf et al., HyperSparse Neural Networks, ART.

  >>> params = {"kernel": jnp.array([[4.0, 1.0], [0.5, -0.1]])}
  >>> tx = optax.chain(
  ...   weights.add_hypersparse(0.1, sparsity=0.5), optax.sgd(1.0)
  ... )
  >>> zeros = jax.tree.map(jnp.zeros_like, params)
  >>> updates, _ = tx.update(zeros, tx.init(params), params)
  >>> print(updates["kernel"].round(2))
  [[-0.   -0.13]
   [-0.17  0.19]]
  """
  budgets.check_share("sparsity", sparsity)
  # An array may be a hyperparameter that is known at run time only.
  known = not callable(strength) and not isinstance(strength, jax.Array)
  if known and not (isinstance(strength, numbers.Real) and strength >= 0):
    raise ValueError(
      f"strength must be a number of 0 or more, or a schedule, got {strength!r}"
    )

  def init(params):
    del params
    return optax.ScaleByScheduleState(jnp.zeros((), jnp.int32))

  def update(updates, state, params=None):
    if params is None:
      raise ValueError(masks.NO_PARAMS)
    now = strength(state.count) if callable(strength) else strength
    # In f32 also for weights of a narrow type, which holds no steep slope.
    wide = {
      n: w.astype(jnp.float32) for n, w in _selected(params, where).items()
    }
    slopes = jax.grad(_penalty)(wide, sparsity)
    ups, rebuild = paths.named(updates)
    for n, slope in slopes.items():
      ups[n] = (ups[n] + now * slope).astype(ups[n].dtype)
    count = optax.safe_increment(state.count)
    return rebuild(ups), optax.ScaleByScheduleState(count)

  return optax.GradientTransformation(init, update)


def _selected(params, where):
  leaves = paths.named(params)[0]
  return {n: leaves[n] for n in plans.sparse_names(leaves, where)}


def _penalty(leaves, sparsity):
  budgets.check_share("sparsity", sparsity)
  # Not jnp.abs: its derivative at 0 is 1, and here that of masked weights is 0.
  size = lambda w: (w * lax.stop_gradient(jnp.sign(w))).astype(jnp.float32)
  sizes = {n: size(w) for n, w in leaves.items()}
  total = sum(x.size for x in sizes.values())
  if not total:
    return jnp.float32(0)
  below = min(math.floor(sparsity * total), total - 1)
  quantile = thresholds.kth_largest(lax.stop_gradient(sizes), total - below)
  s = _BEND / jnp.maximum(quantile, _LEAST)
  bent = sum(jnp.sum(jnp.tanh(s * x)) for x in sizes.values())
  norm = sum(jnp.sum(x) for x in sizes.values())
  scale = jnp.where(bent > 0, norm / jnp.where(bent > 0, bent, 1), 0)
  return lax.stop_gradient(scale) * bent
