"""Masks that are chosen before training: by what weights do at the start."""

from collections.abc import Callable, Mapping
import dataclasses
import math
import re
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp

from sparsejax import paths
from sparsejax.select import budgets
from sparsejax.select import structures
from sparsejax.select import thresholds
from sparsejax.weights import choices
from sparsejax.weights import mechanism
from sparsejax.weights import plans
from sparsejax.weights import rules
from sparsejax.weights import scores as scores_lib

Array = jax.Array
PyTree = Any
Loss = Callable[[PyTree, Any], Array]
Apply = Callable[[PyTree, Any], PyTree]
Sparsity = float | Mapping[str, float] | None


def choose_masks(
  scores: PyTree,
  *,
  sparsity: Sparsity = None,
  distribution: rules.Distribution = None,
  structure: rules.Structure = structures.Unstructured(),
  where: plans.Where = None,
  axes: plans.AxesByPath = structures.Axes(),
) -> PyTree:
  """Masks of the largest scores, under any budget and structure.

  For scores of one's own; `snip`, `grasp` and `synflow` choose by theirs. Of
  equal scores those of earlier parameters and lower indices are kept. Nothing
  of a sharded tree is gathered.

  Scores that are not finite choose nothing: outside of `jit` they raise, and
  inside it, where values are not known, their parameter stays dense (all do
  under one global budget).

  Args:
    scores: floating arrays, a tree like the parameters; larger is kept first.
    sparsity: share of weights masked, in [0, 1], or by path pattern
      (parameters that none matches stay dense). None where every structure
      fixes it, as n:m does.
    distribution: how one sparsity is divided among layers: "global" ranks all
      weights at once, which is also what None means for one sparsity; or a
      name in `select.BUDGETS`, or a budget function.
    structure: what shape masks take, for all weights or by path pattern.
    where: which parameters are sparse, or a source network, as in `sparsify`.
    axes: dimension numbers, for all or by path pattern.

  Returns:
    Boolean arrays, a tree like `scores`: True where a weight is kept, and
    everywhere in parameters that are not sparse.

  Raises:
    ValueError: a setting that is out of range or contradicts another, or
      scores that are not floating or not finite.

  Source: [snip, grasp, synflow, random-pruning] what they have in common.

  >>> scores = {"a": jnp.array([[4.0, 1.0]]), "b": jnp.array([[3.0, 2.0]])}
  >>> weights.choose_masks(scores, sparsity=0.5)["b"].tolist()
  [[True, False]]
  """
  leaves, rebuild = paths.named(scores)
  for n, s in leaves.items():
    if not jnp.issubdtype(jnp.result_type(s), jnp.floating):
      raise ValueError(
        f"scores must be floating, got {jnp.result_type(s)} for {n!r}"
      )
  leaves = {n: jnp.asarray(s, jnp.float32) for n, s in leaves.items()}
  look = _look(leaves, sparsity, distribution, structure, where, axes)
  return rebuild(_chosen(look, leaves))


def snip_scores(loss: Loss, params: PyTree, batch: Any) -> PyTree:
  """Connection sensitivity `|w dL/dw|`: how much the loss feels a weight.

  Args:
    loss: `loss(params, batch)`, a scalar.
    params: the parameters.
    batch: what `loss` takes.

  Returns:
    f32 arrays, a tree like `params`; larger is kept first.

  Raises:
    ValueError: `loss` returns no scalar.

  Source: [snip] Lee et al., SNIP: Single-shot Network Pruning based on
    Connection Sensitivity, sec. 4.

  >>> loss = lambda params, x: jnp.sum((x @ params["w"]) ** 2)
  >>> params = {"w": jnp.array([[1.0], [-2.0]])}
  >>> weights.snip_scores(loss, params, jnp.ones((1, 2)))["w"].tolist()
  [[2.0], [4.0]]
  """
  leaves, rebuild = paths.named(params)
  value, floats = _of_floats(loss, leaves, rebuild, batch)
  grads = jax.grad(value)(floats)
  sizes = {n: jnp.abs(_f32(p) * _f32(grads[n])) for n, p in floats.items()}
  return rebuild(_zeros(leaves) | sizes)


def snip(
  loss: Loss,
  params: PyTree,
  batch: Any,
  *,
  sparsity: Sparsity = None,
  distribution: rules.Distribution = None,
  structure: rules.Structure = structures.Unstructured(),
  where: plans.Where = None,
  axes: plans.AxesByPath = structures.Axes(),
) -> PyTree:
  """Masks of the weights that the loss feels most, from one batch.

  It works under `jit`: `jax.jit(functools.partial(snip, loss, sparsity=0.9))`.

  Args:
    loss: `loss(params, batch)`, a scalar.
    params: the parameters at initialization. The paper scales the variance of
      their initialization by the layers' sizes.
    batch: what `loss` takes.
    sparsity: share of weights masked, as in `choose_masks`.
    distribution: how it is divided; the paper's is "global", so None.
    structure: what shape masks take, for all weights or by path pattern.
    where: which parameters are sparse, or a source network, as in `sparsify`.
      What is scored is that network: the parameters, zero outside of it.
    axes: dimension numbers, for all or by path pattern.

  Returns:
    Boolean arrays, a tree like `params`, for `keep_masked`.

  Raises:
    ValueError: as `choose_masks` and `snip_scores`.

  Source: [snip] Lee et al., SNIP: Single-shot Network Pruning based on
    Connection Sensitivity, alg. 1.

  >>> loss = lambda params, x: jnp.sum((x @ params["w"]) ** 2)
  >>> params = {"w": jnp.array([[1.0], [-2.0]])}
  >>> masks = weights.snip(loss, params, jnp.ones((1, 2)), sparsity=0.5)
  >>> masks["w"].tolist()
  [[False], [True]]
  >>> tx = optax.chain(optax.adamw(1e-3), weights.keep_masked(masks))
  """
  leaves, rebuild = paths.named(params)
  look = _look(leaves, sparsity, distribution, structure, where, axes)
  scores = snip_scores(loss, rebuild(_inside(look)), batch)
  return rebuild(_chosen(look, paths.named(scores)[0]))


def grasp_scores(
  loss: Loss, params: PyTree, batch: Any, *, where: plans.Where = None
) -> PyTree:
  """`w (H g)`: how much of the gradient's norm a weight is worth.

  The paper's score is its negative, of which it removes the highest. The
  gradient g and the Hessian H are those of the parameters that `where` names,
  as in the authors' code. `H g` is one derivative of the gradient along g.

  The authors divide the logits by 200 and take g from two halves of a batch:
  that is up to `loss`.

  Args:
    loss: `loss(params, batch)`, a scalar that can be differentiated twice.
    params: the parameters.
    batch: what `loss` takes.
    where: which parameters are sparse, as in `sparsify`; of a source network
      the names are used.

  Returns:
    f32 arrays, a tree like `params`, zero where not sparse; larger is kept
    first.

  Raises:
    ValueError: `loss` returns no scalar, or `where` names nothing.

  Source: [grasp] Wang et al., Picking Winning Tickets Before Training by
    Preserving Gradient Flow, sec. 4.

  >>> loss = lambda params, x: jnp.sum((params["w"] - x) ** 2)
  >>> params = {"w": jnp.array([[3.0, 1.0]])}
  >>> weights.grasp_scores(loss, params, 1.0)["w"].tolist()
  [[24.0, 0.0]]
  """
  leaves, rebuild = paths.named(params)
  names = plans.sparse_names(leaves, plans.source_network(where)[0])
  value, floats = _of_floats(loss, leaves, rebuild, batch, names)
  gradient = jax.grad(value)
  _, product = jax.jvp(gradient, (floats,), (gradient(floats),))
  worth = {n: _f32(p) * _f32(product[n]) for n, p in floats.items()}
  return rebuild(_zeros(leaves) | worth)


def grasp(
  loss: Loss,
  params: PyTree,
  batch: Any,
  *,
  sparsity: Sparsity = None,
  distribution: rules.Distribution = None,
  structure: rules.Structure = structures.Unstructured(),
  where: plans.Where = None,
  axes: plans.AxesByPath = structures.Axes(),
) -> PyTree:
  """Masks that leave the gradient as much of its norm as they can.

  It works under `jit`, as `snip` does, and takes a Hessian-vector product,
  never a Hessian.

  Args:
    loss: `loss(params, batch)`, a scalar. The authors' divides logits by 200.
    params: the parameters at initialization.
    batch: what `loss` takes; the default of the authors' code is 25 examples
      of each class.
    sparsity: share of weights masked, as in `choose_masks`.
    distribution: how it is divided; the paper's is "global", so None.
    structure: what shape masks take, for all weights or by path pattern.
    where: which parameters are sparse, or a source network, as in `sparsify`.
      What is scored is that network: the parameters, zero outside of it.
    axes: dimension numbers, for all or by path pattern.

  Returns:
    Boolean arrays, a tree like `params`, for `keep_masked`.

  Raises:
    ValueError: as `choose_masks` and `grasp_scores`.

  Source: [grasp] Wang et al., Picking Winning Tickets Before Training by
    Preserving Gradient Flow, alg. 1.

  >>> loss = lambda params, x: jnp.sum((params["w"] - x) ** 2)
  >>> params = {"w": jnp.array([[3.0, 1.0]])}
  >>> weights.grasp(loss, params, 1.0, sparsity=0.5)["w"].tolist()
  [[True, False]]
  """
  leaves, rebuild = paths.named(params)
  look = _look(leaves, sparsity, distribution, structure, where, axes)
  scores = grasp_scores(loss, rebuild(_inside(look)), batch, where=where)
  return rebuild(_chosen(look, paths.named(scores)[0]))


def synflow_scores(apply: Apply, params: PyTree, inputs: Any) -> PyTree:
  """`|w| dR/d|w|`, R the sum of outputs of the network of absolute weights.

  What flows through a weight from the inputs to the outputs. In a network of
  layers without biases, whose activations keep positive values as they are,
  each layer's scores sum to R. Biases and gains become positive too, as in the
  authors' code.

  Args:
    apply: `apply(params, inputs)`, the outputs: an array or a tree of them.
    params: the parameters.
    inputs: what `apply` takes. The paper's are ones, one example of them.

  Returns:
    f32 arrays, a tree like `params`; larger is kept first.

  Raises:
    ValueError: `apply` returns no array.

  Source: [synflow] Tanaka et al., Pruning neural networks without any data by
    iteratively conserving synaptic flow, alg. 1.

  >>> apply = lambda params, x: x @ params["a"] @ params["b"]
  >>> params = {"a": jnp.array([[1.0, -2.0]]), "b": jnp.array([[-3.0], [4.0]])}
  >>> scores = weights.synflow_scores(apply, params, jnp.ones((1, 1)))
  >>> scores["a"].tolist(), scores["b"].tolist()
  ([[3.0, 8.0]], [[3.0], [8.0]])
  """
  leaves, rebuild = paths.named(params)
  names = [n for n, p in leaves.items() if _floating(p)]
  _, scores = _flow(apply, leaves, rebuild, inputs, names, lambda _: 1.0)
  return rebuild(_zeros(leaves) | scores)


def synflow(
  apply: Apply,
  params: PyTree,
  inputs: Any,
  *,
  sparsity: Sparsity = None,
  rounds: int = 100,
  distribution: rules.Distribution = None,
  structure: rules.Structure = structures.Unstructured(),
  where: plans.Where = None,
  axes: plans.AxesByPath = structures.Axes(),
) -> PyTree:
  """Masks that no layer vanishes under, without any data.

  After round k of n the density is `density^(k/n)`; then what is left is
  scored anew. All rounds are one compiled loop. Pruned weights stay so.

  R may overflow or vanish in a deep network: float32 holds 1e-38 to 3e38.
  Outside of `jit` that raises, and inside it all parameters stay dense. In a
  network without biases the scale of `inputs` changes no mask: give 1e-30
  instead of ones where R overflows, and 1e30 where it vanishes, which leaves as
  much again. (Backward, R is scaled to about 1, by a power of two.)

  Args:
    apply: `apply(params, inputs)`, the outputs: an array or a tree of them. It
      is given absolute values: state such as running means is up to it.
    params: the parameters at initialization.
    inputs: what `apply` takes: `jnp.ones((1, features))` as in the paper.
    sparsity: share of weights masked, in [0, 1), or by path pattern.
    rounds: how often to score, at least 1.
    distribution: how it is divided; the paper's is "global", so None.
    structure: what shape masks take, for all weights or by path pattern.
    where: which parameters are sparse, or a source network, as in `sparsify`.
      What is scored is that network: the parameters, zero outside of it.
    axes: dimension numbers, for all or by path pattern.

  Returns:
    Boolean arrays, a tree like `params`, for `keep_masked`.

  Raises:
    ValueError: as `choose_masks` and `synflow_scores`; sparsity is 1; rounds is
      below 1; R is not finite, or 0: it vanished, or no path was left.

  Source: [synflow] Tanaka et al., Pruning neural networks without any data by
    iteratively conserving synaptic flow, alg. 1.

  >>> apply = lambda params, x: x @ params["a"] @ params["b"]
  >>> params = {"a": jnp.array([[1.0, -2.0]]), "b": jnp.array([[-3.0], [4.0]])}
  >>> masks = weights.synflow(apply, params, jnp.ones((1, 1)), sparsity=0.5)
  >>> masks["a"].tolist(), masks["b"].tolist()
  ([[False, True]], [[False], [True]])
  """
  rules.check_step("rounds", rounds)
  if rounds < 1:
    raise ValueError(f"rounds must be at least 1, got {rounds}")
  leaves, rebuild = paths.named(params)
  look = _look(
    leaves, sparsity, distribution, structure, where, axes, rounds=rounds
  )
  whole = _whole(look)

  def scored_and_pruned(i, carry):
    active, flowing = carry
    left = leaves | {
      n: jnp.where(m, leaves[n], jnp.zeros((), leaves[n].dtype))
      for n, m in active.items()
    }
    flow, scores = _flow(apply, left, rebuild, inputs, list(active), _to_one)
    # What is pruned comes after weights of no flow.
    scores = {n: jnp.where(active[n], s, -1.0) for n, s in scores.items()}
    now = dataclasses.replace(look, params=leaves | scores, step=i)
    finite = jnp.all(jnp.stack([flow > 0, *now.finite().values()]))
    return now.select(active, _given), flowing & finite & jnp.isfinite(flow)

  begin = {n: whole[n] for n in look.plan.leaves}, jnp.bool_(True)
  chosen, flowing = lax.fori_loop(0, rounds, scored_and_pruned, begin)
  if _known_false(flowing):
    raise ValueError(
      "apply must give outputs whose sum, of absolute parameters, is above 0 "
      "and finite in float32 in each round: scale inputs, take more rounds, or "
      "leave more weights to the smallest layers"
    )
  return rebuild(
    whole | {n: jnp.where(flowing, m, whole[n]) for n, m in chosen.items()}
  )


def random_masks(
  key: Array,
  params: PyTree,
  *,
  sparsity: float | Mapping[str, float],
  distribution: rules.Distribution = None,
  bernoulli: bool = False,
  where: plans.Where = None,
  axes: plans.AxesByPath = structures.Axes(),
) -> PyTree:
  """Random masks: those of `static`, or a source network of other methods.

  Args:
    key: a PRNG key. The same one draws the same masks, and (unless Bernoulli)
      those that `static` draws with it.
    params: the parameters; only their names, shapes and shardings matter.
    sparsity: share of weights masked, in [0, 1], or by path pattern.
    distribution: how one sparsity is divided among layers: a name in
      `select.BUDGETS`, a budget function, or "global"; "erk" by default.
    bernoulli: whether each weight is drawn alone, so that counts are right on
      average; otherwise they are exact. (Both keep all of a source network that
      has fewer.)
    where: which parameters are sparse, as in `sparsify`.
    axes: dimension numbers, for all or by path pattern.

  Returns:
    Boolean arrays, a tree like `params`, for `keep_masked`, or for `where=` of
    any method, whose masks then stay subsets of these.

  Raises:
    ValueError: as `sparsify`, or "global" with Bernoulli draws.

  Source: [random-pruning] Liu et al., The Unreasonable Effectiveness of Random
    Pruning; [random-pruning-er] Gadhikar et al., Why Random Pruning Is All We
    Need to Start Sparse.

  >>> params = {"kernel": jnp.ones((8, 8)), "bias": jnp.ones(8)}
  >>> source = weights.random_masks(jax.random.key(0), params, sparsity=0.5)
  >>> int(source["kernel"].sum()), bool(source["bias"].all())
  (32, True)
  >>> tx = weights.rigl(
  ...   optax.sgd(0.1),
  ...   sparsity=0.75,
  ...   where=source,
  ...   until=750,
  ...   key=jax.random.key(1),
  ... )
  """
  leaves, rebuild = paths.named(params)
  if bernoulli and distribution == "global":
    raise ValueError(
      'distribution must not be "global" with bernoulli=True: "uniform" is it'
    )
  _check_sparsity(sparsity)
  rule = rules.Rule(sparsity=sparsity, distribution=distribution)
  look = _look_of(rule, leaves, where, axes)
  data, impl = mechanism.raw_key(rule, key)
  # As at step 0 of a rule.
  key = jax.random.fold_in(jax.random.wrap_key_data(data, impl=impl), 0)
  look, whole = dataclasses.replace(look, key=key), _whole(look)
  if not bernoulli:
    return rebuild(whole | look.select(whole, scores_lib.random))
  names = list(look.plan.leaves)
  density = plans.densities(rule, leaves, names, axes)
  drawn = look.seen(whole)
  for n, p in density.items():
    p = jnp.float32(p)
    if n in look.source:  # which has fewer to draw from
      p = p / jnp.maximum(_share(whole[n], look.plan.leaves[n].axes), 1e-30)
    whole[n] &= scores_lib.random(drawn[n]) < p
  return rebuild(whole)


def sparsities(masks: PyTree) -> dict[str, float]:
  """The share masked of each parameter, for `sparsity=` of any method.

  With those of `snip` or `grasp`, `static` draws masks of their layer ratios.

  Args:
    masks: boolean arrays, a tree like the parameters; not inside of `jit`.

  Returns:
    Shares by pattern: each matches the path of one parameter and no other.
    Parameters that are masked nowhere are left out, and so stay dense.

    Layers of a stack share one.

  Raises:
    ValueError: masks are not boolean arrays, or not concrete.

  Source: [random-pruning] Liu et al., The Unreasonable Effectiveness of Random
    Pruning, sec. 3: SNIP ratios and GraSP ratios.

  >>> masks = {"mlp": {"kernel": jnp.array([[True, False]])}}
  >>> weights.sparsities(masks)
  {'^mlp/kernel$': 0.5}
  """
  out = {}
  for n, m in _named_masks(masks).items():
    if isinstance(m, jax.core.Tracer):
      raise ValueError(f"masks must be concrete, got {m} for {n!r}")
    kept = int(thresholds.count([jnp.asarray(m)]))
    if kept < m.size:
      out[f"^{re.escape(n)}$"] = (m.size - kept) / m.size
  return out


def rescale_fan_in(
  params: PyTree,
  masks: PyTree,
  *,
  axes: plans.AxesByPath = structures.Axes(),
) -> PyTree:
  """Initial weights as if drawn for the inputs that each neuron really has.

  Multiplies the weights of each output by `sqrt(inputs / active inputs)`: the
  variance of most initializations is inverse to the number of inputs. The
  paper draws anew with that variance; this scales what was drawn.

  Args:
    params: the parameters, as initialized for dense layers.
    masks: boolean arrays, a tree like `params` or part of it.
    axes: dimension numbers, for all or by path pattern: kernel axes count as
      inputs, and layers of a stack are scaled each on its own.

  Returns:
    A tree like `params`, of the same dtypes: +0.0 where masked, and unchanged
    where nothing of an output is masked.

  Raises:
    ValueError: a mask names no parameter or has another shape.

  Source: Evci et al., Gradient Flow in Sparse Neural Networks and How Lottery
    Tickets Win, the section on sparse initialization.

  >>> params = {"kernel": jnp.ones((4, 2))}
  >>> masks = {"kernel": jnp.array([[1, 1], [0, 1], [0, 1], [0, 1]], bool)}
  >>> weights.rescale_fan_in(params, masks)["kernel"].tolist()
  [[2.0, 1.0], [0.0, 1.0], [0.0, 1.0], [0.0, 1.0]]
  """
  leaves, rebuild = paths.named(params)
  at = plans.axes_by_name(axes, list(leaves))
  for n, m in _named_masks(masks).items():
    shape = tuple(leaves[n].shape) if n in leaves else None
    if m.shape != shape:
      raise ValueError(
        f"masks[{n!r}] must be the mask of a parameter, got shape {m.shape} "
        f"for a parameter of shape {shape}"
      )
    p, m = leaves[n], jnp.asarray(m)
    if not _floating(p):
      continue
    over = at[n].fan_in(len(shape))
    inputs = math.prod(shape[a] for a in over)
    active = jnp.maximum(thresholds.count([m], over), 1)
    scaled = (_f32(p) * jnp.sqrt(inputs / active)).astype(p.dtype)
    leaves[n] = jnp.where(m, scaled, jnp.zeros((), p.dtype))
  return rebuild(leaves)


def _share(mask, axes):
  """The share active of each layer of a stack, broadcasting against it."""
  stack = axes.of(mask.ndim).stack
  over = tuple(a for a in range(mask.ndim) if a not in stack)
  size = math.prod(mask.shape[a] for a in over)
  return _f32(thresholds.count([mask], over)) / max(size, 1)


def _f32(x):
  return jnp.asarray(x).astype(jnp.float32)


def _floating(p):
  return jnp.issubdtype(jnp.result_type(p), jnp.floating)


def _zeros(leaves):
  return {n: jnp.zeros_like(p, jnp.float32) for n, p in leaves.items()}


def _named_masks(masks):
  out = paths.named(masks)[0]
  for n, m in out.items():
    if not hasattr(m, "dtype") or m.dtype != bool:
      got = getattr(m, "dtype", m)
      raise ValueError(f"masks must be boolean arrays, got {got} for {n!r}")
  return out


def _known_false(flag):
  """Whether a flag is False; never under `jit`, which knows no values."""
  return not isinstance(flag, jax.core.Tracer) and not flag


def _given(seen):
  """The score of weights where scores stand in their place."""
  return seen.param


def _of_floats(loss, leaves, rebuild, batch, names=None):
  """The loss as a function of what it can be differentiated by, and that."""
  floats = {n: p for n, p in leaves.items() if _floating(p)}
  if names is not None:
    floats = {n: floats[n] for n in names}

  def value(floats):
    out = loss(rebuild(leaves | floats), batch)
    alone = jax.tree.structure(out) == jax.tree.structure(0)
    if not alone or jnp.shape(out) or not _floating(out):
      raise ValueError(f"loss must return a floating scalar, got {out}")
    return out

  return value, floats


def _flow(apply, leaves, rebuild, inputs, names, scale):
  """R, and the scores of `names` times `scale(R)`."""
  positive = {
    n: jnp.abs(jnp.asarray(p)) if _floating(p) else p for n, p in leaves.items()
  }

  def total(some):
    out = jax.tree.leaves(apply(rebuild(positive | some), inputs))
    if not out:
      raise ValueError("apply must return an array, got nothing")
    return sum(jnp.sum(_f32(x)) for x in out)

  some = {n: positive[n] for n in names}
  flow, pull = jax.vjp(total, some)
  (grads,) = pull(jnp.asarray(scale(flow), jnp.float32))
  return flow, {n: _f32(some[n]) * _f32(grads[n]) for n in names}


def _to_one(flow):
  """The power of two that brings `flow` to about 1: it rounds nothing."""
  _, exponent = jnp.frexp(flow)
  return jnp.ldexp(jnp.float32(1), jnp.clip(-exponent, -120, 120))


def _check_sparsity(sparsity, below_one=False):
  given = sparsity.values() if isinstance(sparsity, Mapping) else [sparsity]
  for s in given:
    if s is not None:
      budgets.check_share("sparsity", s)
    if s == 1 and below_one:
      raise ValueError(
        "sparsity must be below 1: nothing flows through nothing"
      )


def _look(leaves, sparsity, distribution, structure, where, axes, rounds=None):
  """Choices among parameters by scores that are yet to come."""
  _check_sparsity(sparsity, below_one=rounds is not None)
  if distribution is None and not isinstance(sparsity, Mapping):
    distribution = None if sparsity is None else "global"
  until = 0
  if rounds is not None:  # a table of counts by round
    until = rounds - 1
    if isinstance(sparsity, Mapping):
      sparsity = {n: _by_round(s, rounds) for n, s in sparsity.items()}
    elif sparsity is not None:
      sparsity = _by_round(sparsity, rounds)
  rule = rules.Rule(
    sparsity=sparsity,
    distribution=distribution,
    structure=structure,
    every=1,
    until=until,
  )
  return _look_of(rule, leaves, where, axes)


def _by_round(sparsity, rounds):
  def after(i):
    if i + 1 == rounds:
      return sparsity
    return 1 - (1 - sparsity) ** ((i + 1) / rounds)

  return after


def _look_of(rule, leaves, where, axes):
  for n, p in leaves.items():
    if not hasattr(p, "dtype"):
      raise ValueError(f"params must be arrays, got {p!r} for {n!r}")
  where, network = plans.source_network(where)
  source = plans.source_of(network, leaves)
  return choices.Look(
    rule=rule,
    plan=plans.make_plan(rule, leaves, where, axes),
    params=leaves,
    grads={},
    memory={},
    key=None,
    step=jnp.int32(0),
    source=source,
  )


def _whole(look):
  """Masks of everything that may be active."""
  full = {n: jnp.ones_like(p, bool) for n, p in look.params.items()}
  return full | look.source


def _inside(look):
  """The parameters, zero outside of a source network."""
  return look.params | {
    n: jnp.where(m, look.params[n], jnp.zeros((), look.params[n].dtype))
    for n, m in look.source.items()
  }


def _chosen(look, scores):
  """Masks of the largest scores; whole ones where a score is not finite."""
  scores = {n: scores[n] for n in look.plan.leaves}
  look = dataclasses.replace(look, params=look.params | scores)
  whole, finite = _whole(look), look.finite()
  if bad := [n for n, ok in finite.items() if _known_false(ok)]:
    raise ValueError(f"scores must be finite, got others for {bad}")
  chosen = look.select(whole, _given)
  return whole | {
    n: jnp.where(finite[n], m, whole[n]) for n, m in chosen.items()
  }
