"""The one mechanism: wraps an Optax optimizer so that weights are sparse."""

import dataclasses
import functools
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
      "norm". Or a source network: boolean masks, a tree like the parameters or
      part of it, such as `sparsejax.weights.random_masks` makes. It names the
      sparse parameters, and what it masks is never active: every mask is a
      subset of it, and keeps all of it where it has fewer weights than the
      budget. (A mask of ones of what is dense by default leaves that dense.)
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
    gradual-magnitude-pruning, random-pruning, random-pruning-er, rigl-itop]
    their common core.
  """
  if not isinstance(inner, optax.GradientTransformation):
    raise ValueError(f"inner must be an Optax optimizer, got {inner!r}")
  if not isinstance(rule, rules.Rule):
    raise ValueError(f"rule must be a sparsejax.weights.Rule, got {rule!r}")
  inner = optax.with_extra_args_support(inner)
  key_data, key_impl = raw_key(rule, key)
  where, network = plans.source_network(where)

  @functools.lru_cache(maxsize=8)
  def plan_of_shapes(shapes):
    given = {n: jax.ShapeDtypeStruct(s, d) for n, s, d in shapes}
    return plans.make_plan(rule, given, where, axes)

  def plan_of(leaves):
    for n, p in leaves.items():
      if not hasattr(p, "dtype"):
        raise ValueError(f"params must be arrays, got {p!r} for {n!r}")
    shapes = tuple((n, tuple(p.shape), p.dtype) for n, p in leaves.items())
    return plan_of_shapes(shapes)

  def look(plan, params, grads, memory, key, step, source):
    if key is not None:
      key = jax.random.wrap_key_data(key, impl=key_impl)
      key = jax.random.fold_in(key, step)
    return choices.Look(
      rule=rule,
      plan=plan,
      params=params,
      grads=grads,
      memory=memory,
      key=key,
      step=step,
      source=source,
    )

  def init(params):
    leaves, rebuild = paths.named(params)
    if any(isinstance(p, jax.ShapeDtypeStruct) for p in leaves.values()):
      return jax.eval_shape(init, params)
    source = plans.source_of(network, leaves)
    plan = plan_of(leaves)
    memory = {}
    if rule.memory:
      memory = {n: rule.memory(p) for n, p in leaves.items()}
    full = {n: jnp.ones_like(p, bool) for n, p in leaves.items()} | source
    now = look(plan, leaves, {}, memory, key_data, jnp.int32(0), source)
    first, backward = full, full
    if rule.initial is not None:
      first = full | now.select(full, rule.initial)
    if rule.backward_sparsity is not None:
      backward = full | now.select(full, rule.initial, backward=True)
    if rule.memory:
      seen = now.seen(first)
      memory |= {n: rule.remember(seen[n]) for n in plan.leaves}
    bits = {n: masks.pack(m) for n, m in first.items()}
    # No array stands in the state twice: it could not be donated.
    return masks.SparseState(
      count=jnp.zeros((), jnp.int32),
      masks=rebuild(bits),
      violations=jnp.zeros((), jnp.int32),
      churn=jnp.zeros(len(leaves), jnp.int32),
      # A new array: one made outside of a mesh would change its type in it.
      key=None if key_data is None else key_data + 0,
      memory=rebuild(memory) if rule.memory else None,
      explored=rebuild(jax.tree.map(jnp.copy, bits))
      if track_explored
      else None,
      backward=(
        rebuild({n: masks.pack(m) for n, m in backward.items()})
        if rule.backward_sparsity is not None
        else None
      ),
      leak=None if rule.leak is None else jnp.float32(rule.leak(0)),
      inner=inner.init(params),
      source=(
        rebuild({n: jnp.copy(masks.pack(m)) for n, m in full.items()})
        if network is not None
        else None
      ),
    )

  def update(grads, state, params=None, **extra):
    if params is None:
      raise ValueError(masks.NO_PARAMS)
    masks.check_model(state, params)
    leaves, rebuild = paths.named(params)
    raw = paths.named(grads)[0]
    if missing := [n for n in leaves if raw.get(n) is None]:
      raise ValueError(f"grads must be a tree like params, got no {missing}")
    for n, p in leaves.items():
      if jnp.shape(raw[n]) != tuple(p.shape):
        raise ValueError(
          f"grads must have the shapes of params, got {jnp.shape(raw[n])} for "
          f"{n!r} of shape {tuple(p.shape)}"
        )
    if new := leaves.keys() - paths.named(state.masks)[0].keys():
      raise ValueError(
        f"opt_state is of another model: it has no masks of {sorted(new)}"
      )
    plan = plan_of(leaves)

    def look_at(params, step):
      memory = {}
      if rule.memory:
        memory = paths.named(state.memory)[0]
      return look(plan, params, raw, memory, state.key, step, {})

    def active(packed):
      bits = paths.named(packed)[0]
      return {n: masks.unpack(bits[n], leaves[n]) for n in plan.leaves}

    new = state
    if not rule.dense:
      new = _revised(look_at(leaves, state.count), state, rebuild)
    live = active(new.masks)
    inner_state = state.inner
    if rule.grow is not None:
      # A grown weight starts at +0.0 with the moments of a new one, and moves a
      # step later. A reset before `inner.update` fuses with its own writes.
      before = active(state.masks)
      grown = {n: jnp.zeros_like(p, bool) for n, p in leaves.items()}
      grown |= {n: live[n] & ~before[n] for n in live}
      live = {n: live[n] & before[n] for n in live}
      inner_state = reset(inner, inner_state, params, rebuild(grown))

    wider = None if state.backward is None else active(state.backward)
    seen = look_at(leaves, state.count).seen(live, wider, state.leak)
    trained = raw | {n: rule.gradient(seen[n]) for n in live}
    source = {}  # where masks are not enforced, it must be
    if rule.dense and state.source is not None:
      source = active(state.source)
    for n, m in source.items():
      trained[n] = jnp.where(m, trained[n], jnp.zeros((), trained[n].dtype))
    updates, inner_state = inner.update(
      rebuild(trained), inner_state, params, **extra
    )
    ups = paths.named(updates)[0]
    if not rule.dense:
      ups |= {n: masks.enforced(ups[n], leaves[n], m) for n, m in live.items()}
    else:
      for n, m in (wider or {}).items():
        ups[n] = jnp.where(m, ups[n], jnp.zeros((), ups[n].dtype))
      for n, m in source.items():
        ups[n] = masks.enforced(ups[n], leaves[n], m)
      # The next forward pass uses the masks of the weights it will see.
      moved = {n: (p + ups[n]).astype(p.dtype) for n, p in leaves.items()}
      new = _revised(look_at(moved, state.count + 1), state, rebuild)
    count = optax.safe_increment(state.count)
    if rule.shrink is not None:
      left = jnp.asarray(rule.shrink(count), jnp.float32)
      for n, m in active(new.masks).items():
        ups[n] = masks.shrunk(ups[n], leaves[n], m, left)
    leak = state.leak
    if rule.leak is not None:
      leak = jnp.asarray(rule.leak(count), jnp.float32)
    return rebuild(ups), new._replace(count=count, leak=leak, inner=inner_state)

  return optax.GradientTransformationExtraArgs(init, update)


def raw_key(rule, key):
  """Raw key data, which any checkpoint can hold, and what it is data of."""
  if key is None:
    if rule.draws:
      raise ValueError(
        "key must be given to a rule that draws at random, got None: "
        "key=jax.random.key(0)"
      )
    return None, None
  typed = isinstance(key, jax.Array) and jax.dtypes.issubdtype(
    key.dtype, jax.dtypes.prng_key
  )
  if typed and not key.shape:
    return jax.random.key_data(key), jax.random.key_impl(key)
  raw = isinstance(key, jax.Array) and key.dtype == jnp.uint32
  if raw and key.ndim == 1:
    return key, None
  raise ValueError(
    f"key must be a PRNG key such as jax.random.key(0), got {key!r}"
  )


def reset(
  inner: optax.GradientTransformation, state: Any, params: Any, where: Any
) -> Any:
  """Begins every parameter-shaped buffer of any optimizer anew where `where`.

  What it begins as is what `inner.init(params)` makes it: zero for most.
  """

  def absent(x):
    return isinstance(x, optax.MaskedNode)

  def wherever(buffer, at):
    # Not for what is factored or absent: adafactor's rows, MaskedNode.
    same = getattr(buffer, "shape", None) == getattr(at, "shape", ())
    return at if same else False

  at = optax.tree.map_params(
    inner,
    wherever,
    state,
    where,
    transform_non_params=lambda _: False,
    is_leaf=absent,
  )

  def choose(old, fresh, at):
    return old if at is False else jnp.where(at, fresh, old)

  return jax.tree.map(choose, state, inner.init(params), at, is_leaf=absent)


def _revised(look, state, rebuild):
  """The state with new masks where a mask update is due.

  Only packed bits and the rule's own memory pass through the `cond`: XLA
  copies what does.
  """
  rule, plan, step = look.rule, look.plan, look.step
  old, old_backward, old_explored, old_memory, source = (
    paths.named(tree)[0] if tree is not None else {}
    for tree in (
      state.masks,
      state.backward,
      state.explored,
      state.memory,
      state.source,
    )
  )

  def unpacked(bits):
    return {n: masks.unpack(bits[n], look.params[n]) for n in plan.leaves}

  def active_now():
    return unpacked(old)

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
    inside = look
    if source:  # unpacked in here, where few steps come
      inside = dataclasses.replace(look, source=unpacked(source))

    def settle(chosen, before):
      return {
        n: jnp.where(finite[n], masks.pack(m), before[n])
        for n, m in chosen.items()
      }

    chosen = (
      inside.select(active, rule.drop)
      if rule.grow is None
      else inside.exchange(active)
    )
    bits = old | settle(chosen, old)
    backward = old_backward
    if backward:
      wider = inside.select(active, rule.drop, backward=True)
      backward = old_backward | settle(wider, old_backward)
    explored = {n: b | bits[n] for n, b in old_explored.items()}
    now = unpacked(bits)
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
    churn = jnp.stack(churn) if churn else masks.unboxed(state.churn)
    return bits, backward, explored, memory, violations, churn

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
