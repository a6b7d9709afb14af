"""The one mechanism: wraps an Optax optimizer so that weights are sparse."""

from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
import optax

from sparsejax import masks
from sparsejax import paths
from sparsejax.select import structures
from sparsejax.select import thresholds
from sparsejax.weights import choices
from sparsejax.weights import plans
from sparsejax.weights import rules

Array = jax.Array


def sparsify(
  inner: optax.GradientTransformation,
  rule: rules.Rule,
  *,
  where: plans.Where = None,
  axes: plans.AxesByPath = structures.Axes(),
  key: Array | None = None,
  track_explored: bool = False,
) -> optax.GradientTransformationExtraArgs:
  """Wraps `inner` so that its parameters are, and stay, sparse.

  It wraps, as `optax.MultiSteps` does, because a rule needs the raw gradients
  before `inner`, the updates after it, and the state of `inner`. What changes
  updates (clipping, weight decay, schedule_free) belongs inside.

  Where a gradient or weight is not finite at a mask update, the mask of that
  parameter stays as it is: nothing is dropped or grown by it.

  Args:
    inner: any Optax optimizer.
    rule: the method; `sparsejax.weights.rigl` and its kin make one.
    where: which parameters are sparse: a regular expression searched in their
      paths ("layers/0/kernel"), or a function of path and leaf. By default
      floating arrays of two or more axes whose path has neither "embed" nor
      "norm".
    axes: dimension numbers, for all or by path pattern.
    key: a PRNG key, for rules that draw.
    track_explored: also keep which weights were ever active, for the
      in-time over-parameterization rate (one more bit a weight).

  Returns:
    An Optax optimizer. Its `update` needs `params`; its state holds packed
    masks (see `sparsejax.masks.SparseState`).

  Raises:
    ValueError: a setting that is out of range, unused, contradicts another,
      or fits no parameter; here where possible, else at `init` or `update`.

  Source: [rigl, set, srigl, dst-ee, top-kast, sr-ste, pgf-nm,
    gradual-magnitude-pruning, random-pruning, rigl-itop] their common core.
  """
  inner = optax.with_extra_args_support(inner)
  key_data = _key_data(rule, key)

  def init(params):
    leaves, rebuild = paths.named(params)
    if any(isinstance(p, jax.ShapeDtypeStruct) for p in leaves.values()):
      return jax.eval_shape(init, params)
    plan = plans.make_plan(rule, leaves, where, axes)
    memory = {}
    if rule.memory:
      memory = {n: rule.memory(p) for n, p in leaves.items()}
    full = {n: jnp.ones_like(p, bool) for n, p in leaves.items()}
    look = choices.Look(rule, plan, leaves, {}, memory, key_data, jnp.int32(0))
    first, backward = full, full
    if rule.initial is not None:
      first = full | look.select(full, rule.initial)
    if rule.backward_sparsity is not None:
      backward = full | look.select(full, rule.initial, backward=True)
    if rule.memory:
      seen = look.seen(first)
      memory |= {n: rule.remember(seen[n]) for n in plan.leaves}
    bits = {n: masks.pack(m) for n, m in first.items()}
    zero = jnp.zeros((), jnp.int32)
    return masks.SparseState(
      count=zero,
      masks=rebuild(bits),
      violations=zero,
      churn=jnp.zeros(len(leaves), jnp.int32),
      # A new array: one made outside of a mesh would change its type in it.
      key=None if key_data is None else key_data + 0,
      memory=rebuild(memory) if rule.memory else None,
      explored=rebuild(bits) if track_explored else None,
      backward=(
        rebuild({n: masks.pack(m) for n, m in backward.items()})
        if rule.backward_sparsity is not None
        else None
      ),
      leak=None if rule.leak is None else jnp.float32(rule.leak(0)),
      inner=inner.init(params),
    )

  def update(grads, state, params=None, **extra):
    if params is None:
      raise ValueError(masks.NO_PARAMS)
    masks.check_model(state, params)
    leaves, rebuild = paths.named(params)
    raw = paths.named(grads)[0]
    if new := leaves.keys() - paths.named(state.masks)[0].keys():
      raise ValueError(
        f"opt_state is of another model: it has no masks of {sorted(new)}"
      )
    plan = plans.make_plan(rule, leaves, where, axes)
    step = state.count

    def look(params, step):
      memory = {}
      if rule.memory:
        memory = paths.named(state.memory)[0]
      return choices.Look(rule, plan, params, raw, memory, state.key, step)

    def active(packed):
      bits = paths.named(packed)[0]
      return {n: masks.unpack(bits[n], leaves[n]) for n in plan.leaves}

    old, new = state, state
    if not rule.dense:
      new = _revised(rule, look(leaves, step), state, rebuild)
    live = active(new.masks)
    inner_state = state.inner
    if rule.grow is not None:
      # A grown weight starts at +0.0 with clean moments, and moves a step
      # later. Resetting before `inner.update` fuses with its own writes.
      before = active(old.masks)
      grown = {n: jnp.zeros_like(p, bool) for n, p in leaves.items()}
      grown |= {n: live[n] & ~before[n] for n in live}
      live = {n: live[n] & before[n] for n in live}
      inner_state = reset(inner, inner_state, rebuild(grown))

    wider = None if state.backward is None else active(state.backward)
    seen = look(leaves, step).seen(live, wider, state.leak)
    trained = raw | {n: rule.gradient(seen[n]) for n in live}
    updates, inner_state = inner.update(
      rebuild(trained), inner_state, params, **extra
    )
    ups = paths.named(updates)[0]
    if not rule.dense:
      ups |= {n: masks.enforced(ups[n], leaves[n], m) for n, m in live.items()}
    else:
      for n, m in (wider or {}).items():
        ups[n] = jnp.where(m, ups[n], jnp.zeros((), ups[n].dtype))
      # The next forward pass uses the masks of the weights it will see.
      moved = {n: (p + ups[n]).astype(p.dtype) for n, p in leaves.items()}
      new = _revised(rule, look(moved, step + 1), state, rebuild)
    count = optax.safe_increment(state.count)
    leak = state.leak
    if rule.leak is not None:
      leak = jnp.asarray(rule.leak(count), jnp.float32)
    return rebuild(ups), new._replace(count=count, leak=leak, inner=inner_state)

  return optax.GradientTransformationExtraArgs(init, update)


def _key_data(rule: rules.Rule, key: Array | None) -> Array | None:
  """Raw key data, which any checkpoint can hold."""
  if key is None:
    if rule.draws:
      raise ValueError(
        "key must be given to a rule that draws at random, got None: "
        "key=jax.random.key(0)"
      )
    return None
  if not isinstance(key, jax.Array):
    raise ValueError(
      f"key must be a PRNG key such as jax.random.key(0), got {key!r}"
    )
  if jax.dtypes.issubdtype(key.dtype, jax.dtypes.prng_key):
    return jax.random.key_data(key)
  return key


def reset(inner: optax.GradientTransformation, state: Any, where: Any) -> Any:
  """Zeroes every parameter-shaped buffer of any optimizer where `where`."""

  def zero(buffer, at):
    if getattr(buffer, "shape", None) != getattr(at, "shape", ()):
      return buffer  # factored or absent: adafactor's rows, MaskedNode
    return jnp.where(at, jnp.zeros_like(buffer), buffer)

  return optax.tree.map_params(
    inner,
    zero,
    state,
    where,
    is_leaf=lambda x: isinstance(x, optax.MaskedNode),
  )


def _revised(rule, look, state, rebuild):
  """The state with new masks where a mask update is due.

  Only packed bits and the rule's own memory pass through the `cond`: XLA
  copies what does.
  """
  plan, step = look.plan, look.step
  old, old_backward, old_explored, old_memory = (
    paths.named(tree)[0] if tree is not None else {}
    for tree in (state.masks, state.backward, state.explored, state.memory)
  )

  def active_now():
    return {n: masks.unpack(old[n], look.params[n]) for n in plan.leaves}

  def unchanged():
    return (
      old,
      old_backward,
      old_explored,
      old_memory,
      masks.unboxed(state.violations),
      masks.unboxed(state.churn),
    )

  def revise():
    active, finite = active_now(), look.finite()

    def settle(chosen, before):
      return {
        n: jnp.where(finite[n], masks.pack(m), before[n])
        for n, m in chosen.items()
      }

    chosen = (
      look.select(active, rule.drop)
      if rule.grow is None
      else look.exchange(active)
    )
    bits = old | settle(chosen, old)
    backward = old_backward
    if backward:
      wider = look.select(active, rule.drop, backward=True)
      backward = old_backward | settle(wider, old_backward)
    explored = {n: b | bits[n] for n, b in old_explored.items()}
    now = {n: masks.unpack(bits[n], look.params[n]) for n in plan.leaves}
    memory = old_memory
    if rule.memory:
      memory = old_memory | {
        n: rule.remember(seen) for n, seen in look.seen(now).items()
      }
    violations = jnp.int32(0) if rule.dense else look.violations(active)
    churn = [
      thresholds.count([active[n] ^ now[n]] if n in now else [])
      for n in sorted(old)
    ]
    return bits, backward, explored, memory, violations, jnp.stack(churn)

  due = (step > 0) & (step >= rule.begin)
  due &= (step - rule.begin) % rule.every == 0
  if rule.until == 0:  # the masks never change; only look at them
    violations = lax.cond(
      due,
      lambda: look.violations(active_now()),
      lambda: masks.unboxed(state.violations),
    )
    return state._replace(violations=violations)
  if rule.until is not None:
    due &= step <= max(rule.until, rule.begin)
  revised = lax.cond(due, revise, unchanged)
  bits, backward, explored, memory, violations, churn = revised

  def boxed(tree, by_name):
    return None if tree is None else rebuild(by_name)

  return state._replace(
    masks=rebuild(bits),
    backward=boxed(state.backward, backward),
    explored=boxed(state.explored, explored),
    memory=boxed(state.memory, memory),
    violations=violations,
    churn=churn,
  )
