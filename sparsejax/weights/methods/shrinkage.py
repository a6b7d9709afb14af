"""Training from scratch while the smallest weights shrink, again and again."""

from collections.abc import Mapping

import jax.numpy as jnp
import optax

from sparsejax.select import budgets
from sparsejax.select import structures
from sparsejax.weights import mechanism
from sparsejax.weights import plans
from sparsejax.weights import rules
from sparsejax.weights import scores


def iss_p(
  inner: optax.GradientTransformation,
  *,
  sparsity: rules.Sparsity,
  until: int,
  factor: float = 0.95,
  every: int = 1,
  distribution: rules.Distribution = None,
  structure: rules.Structure = structures.Unstructured(),
  where: plans.Where = None,
  axes: plans.AxesByPath = structures.Axes(),
  track_explored: bool = False,
) -> optax.GradientTransformationExtraArgs:
  """ISS-P: the smallest weights are made smaller after each step, not zero.

  After each optimizer step the smallest `sparsity` of each layer's weights are
  multiplied by `factor`; all weights compute and receive gradients, so that a
  small one may come back. At step `until` what is then smallest becomes zero
  for good, and the rest is fine-tuned. Factor 0 is iterative hard thresholding;
  factor 1 is dense training, pruned once.

  `masks(opt_state, params)` are the weights that were not shrunk last.
  `sparse_params` gives the parameters as they are before `until`, and changes
  nothing afterwards: a model may skip it.

  Args:
    inner: any Optax optimizer. Its state never sees the shrinking.
    sparsity: share of weights shrunk and at last masked, in [0, 1]; a schedule
      of the step; or either by path pattern. None where every structure fixes
      it, as n:m does.
    until: the step that prunes, a multiple of `every`.
    factor: what a shrunk weight is multiplied by, in [0, 1]. The authors'
      commands give 0.95; their code's default is 0.99.
    every: steps between two shrinkages; the paper's is 1.
    distribution: how one sparsity is divided among layers; "uniform", which is
      the paper's, by default.
    structure: what shape masks take, for all weights or by path pattern.
    where: which parameters are sparse, as in `sparsify`.
    axes: dimension numbers, for all or by path pattern.
    track_explored: also keep which weights were ever among the largest.

  Returns:
    An Optax optimizer around `inner`.

  Raises:
    ValueError: as `sparsify`, `factor` is not in [0, 1], or `until` is not a
      multiple of `every` above 0.

  Source: [iss-p] Wang et al., Iterative Soft Shrinkage Learning for Efficient
    Image Super-Resolution (ISS-P).

  >>> params = {"kernel": jnp.array([[4.0, 2.0], [1.0, 3.0]])}
  >>> tx = weights.iss_p(optax.sgd(1.0), sparsity=0.5, until=2, factor=0.5)
  >>> state = tx.init(params)
  >>> for _ in range(2):
  ...   updates, state = tx.update(
  ...     jax.tree.map(jnp.zeros_like, params), state, params
  ...   )
  ...   params = optax.apply_updates(params, updates)
  ...   print(params["kernel"].tolist())
  [[4.0, 1.0], [0.5, 3.0]]
  [[4.0, 0.0], [0.0, 3.0]]
  """
  budgets.check_share("factor", factor)
  for name, value in dict(until=until, every=every).items():
    rules.check_step(name, value)
  if every < 1:
    raise ValueError(f"every must be at least 1, got {every}")
  if until < 1 or until % every:
    raise ValueError(
      f"until must be a multiple of every={every} above 0, got {until}"
    )
  one = sparsity is not None and not isinstance(sparsity, Mapping)
  if distribution is None and one:
    distribution = "uniform"

  def shrink(step):
    now = jnp.where(step % every == 0, factor, 1.0)
    return jnp.where(step < until, now, 0.0)

  rule = rules.Rule(
    sparsity=sparsity,
    distribution=distribution,
    structure=structure,
    initial=scores.magnitude,
    gradient=scores.leaky_gradient,
    dense=True,
    leak=lambda step: jnp.where(step < until, 1.0, 0.0),
    shrink=shrink,
    every=every,
    until=until,
  )
  return mechanism.sparsify(
    inner, rule, where=where, axes=axes, track_explored=track_explored
  )
