"""Masks in an optimizer's state: packed, found again, and enforced."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
import optax

from sparsejax import paths
from sparsejax import sharding
from sparsejax.select import estimators
from sparsejax.select import thresholds

Array = jax.Array
PyTree = Any

NO_PARAMS = (
  "params must be given to update, got None: "
  "tx.update(grads, opt_state, params)"
)


def pack_axis(shape: Sequence[int]) -> int | None:
  """The axis whose weights share bytes; None where the mask stays bool.

  The axis, never the last, with the largest power of two in its size: packing
  lanes would cost a TPU five times the cycles. It depends on the shape alone,
  so that a checkpoint moves between meshes.

  >>> pack_axis((3, 64, 128)), pack_axis((4, 128)), pack_axis((128,))
  (1, None, None)
  """
  twos = [sharding.power_of_two(d) for d in shape[:-1]]
  return twos.index(max(twos)) if twos and max(twos) >= 8 else None


def _bit_index(axis: int, ndim: int) -> Array:
  return jnp.arange(8, dtype=jnp.uint8).reshape(8, *[1] * (ndim - axis - 1))


def pack(mask: Array) -> Array:
  """Eight weights a byte, the first in the lowest bit.

  The rank is kept, so the PartitionSpec of the weight is that of its mask.

  Args:
    mask: a boolean array.

  Returns:
    A uint8 array, `pack_axis` an eighth as long; `mask` where there is none.

  >>> pack(jnp.ones((8, 2), bool))
  Array([[255, 255]], dtype=uint8)
  """
  axis = pack_axis(mask.shape)
  if axis is None:
    return mask
  mask = sharding.whole_groups(mask, axis, 8)
  shape = mask.shape
  split = mask.reshape(*shape[:axis], shape[axis] // 8, 8, *shape[axis + 1 :])
  bits = split.astype(jnp.uint8) << _bit_index(axis, mask.ndim)
  return jnp.sum(bits, axis + 1, dtype=jnp.uint8)


def unpack(bits: Array, weight: Array) -> Array:
  """The boolean mask of `weight`, shaped and sharded as it is."""
  axis = pack_axis(weight.shape)
  if axis is None:
    return bits
  one = jnp.expand_dims(bits, axis + 1) >> _bit_index(axis, bits.ndim) & 1
  return sharding.like((one != 0).reshape(weight.shape), weight)


class SparseState(NamedTuple):
  """State of `sparsify` and `keep_masked`.

  Attributes:
    count: updates made so far (int32 scalar).
    masks: packed masks, a tree like the parameters; ones where dense.
    violations: masked weights found nonzero when the masks were last looked
      at (int32 scalar): something changed the updates afterwards.
    churn: weights that the last mask update flipped, of each parameter in the
      order of their sorted names (int32 vector).
    key: raw key data of rules that draw, or None.
    memory: a rule's own buffers, a tree like the parameters, or None.
    explored: packed, weights that were ever active, or None (untracked).
    backward: packed, weights that receive updates, or None (those of `masks`).
    leak: what share of a masked weight the forward pass sees (f32), or None.
    inner: state of the wrapped optimizer.
    source: packed, weights that may ever be active, or None (all of them).
  """

  count: Array
  masks: PyTree
  violations: Array
  churn: Array
  key: Array | None
  memory: PyTree | None
  explored: PyTree | None
  backward: PyTree | None
  leak: Array | None
  inner: PyTree
  source: PyTree | None = None


def find_states(opt_state: PyTree) -> list[SparseState]:
  """The states of all sparsifiers in an optimizer state, however nested.

  Raises:
    ValueError: a sparsifier is followed by another link of `optax.chain`.
  """
  if isinstance(opt_state, SparseState):
    return [opt_state]
  if type(opt_state) is tuple and any(map(find_states, opt_state[:-1])):
    raise ValueError(
      "a sparsifier must be the last link of optax.chain: what comes after "
      "it would change masked weights. Put the other links inside: "
      "rigl(optax.chain(clip, adamw), ...)"
    )

  def stop(x):
    return x is not opt_state and (
      isinstance(x, SparseState) or type(x) is tuple
    )

  found = [x for x in jax.tree.leaves(opt_state, is_leaf=stop) if stop(x)]
  return [state for x in found for state in find_states(x)]


def unboxed(x: Any) -> Array:
  """A single array of a state, out of the box NNX may have put it into."""
  (leaf,) = jax.tree.leaves(x)
  return leaf


def check_model(state: SparseState, params: PyTree) -> None:
  """Raises where `state` holds masks of other parameters than `params`."""
  shapes = {n: tuple(p.shape) for n, p in paths.named(params)[0].items()}
  for n, bits in paths.named(state.masks)[0].items():
    if n not in shapes:
      raise ValueError(
        f"opt_state is of another model: it masks {n!r}, and params have "
        f"{list(shapes)}"
      )
    axis, want = pack_axis(shapes[n]), list(shapes[n])
    if axis is not None:
      want[axis] //= 8
    dtype = jnp.dtype(bool if axis is None else jnp.uint8)
    if tuple(bits.shape) != tuple(want) or bits.dtype != dtype:
      raise ValueError(
        f"opt_state is of another model: its mask of {n!r} is "
        f"{bits.dtype}{list(bits.shape)}, and a parameter of shape "
        f"{shapes[n]} takes {dtype}{want}"
      )


def states_of(opt_state: PyTree, params: PyTree) -> list[SparseState]:
  """`find_states`, refused where there is none or it is not of `params`."""
  states = find_states(opt_state)
  if not states and find_states(params):
    raise ValueError("opt_state comes first: masks(opt_state, params)")
  if not states:
    raise ValueError(
      "opt_state must hold a sparsifier's state, got "
      f"{type(opt_state).__name__}: was it made by sparsify, one of its "
      "rules, or keep_masked?"
    )
  for state in states:
    check_model(state, params)
  return states


def masks(opt_state: PyTree, params: PyTree) -> PyTree:
  """The masks in an optimizer state, wherever it nests them.

  Args:
    opt_state: the state of any optimizer that holds a sparsifier.
    params: the parameters it is for; they give the masks' shapes.

  Returns:
    Boolean arrays, a tree like `params`: True where a weight is active, and
    everywhere in parameters that are not sparse.

  Raises:
    ValueError: there is no sparsifier, it is of another model, it is not the
      last link, or masked weights were found nonzero (not seen under `jit`).
  """
  leaves, rebuild = paths.named(params)
  out = {n: jnp.ones_like(p, bool) for n, p in leaves.items()}
  for state in states_of(opt_state, params):
    check_violations(state)
    for n, bits in paths.named(state.masks)[0].items():
      out[n] = unpack(bits, leaves[n])
  return rebuild(out)


def check_violations(state: SparseState) -> None:
  """Raises where masked weights were found nonzero; silent under `jit`."""
  violations = unboxed(state.violations)
  if not isinstance(violations, jax.core.Tracer) and violations > 0:
    raise ValueError(
      f"{violations} masked weights are not zero: something changed the "
      "updates after the sparsifier, or the parameters were replaced. It "
      "must be the last link, and around optimizers such as schedule_free"
    )


def sparse_params(opt_state: PyTree, params: PyTree) -> PyTree:
  """The parameters as the model should see them: masked.

  Call it once after `init` (an optimizer cannot change parameters there), in
  each forward pass where the rule keeps dense weights (straight-through,
  Top-KAST, mask decay), and on evaluation copies (averages, schedule_free).
  Where updates enforce the masks it then changes nothing.

  Its derivative is the identity (straight-through): the gradient at masked
  weights, which rules grow by, is that at the masked parameters, whether a loss
  is differentiated at the result or through this function.

  Args:
    opt_state: the state of any optimizer that holds a sparsifier.
    params: the parameters it is for.

  Returns:
    A tree like `params`; masked weights are +0.0 exactly, or the share of
    themselves that the rule leaks.

  Raises:
    ValueError: as `masks`, but for violations.
  """
  leaves, rebuild = paths.named(params)
  for state in states_of(opt_state, params):
    source = paths.named(state.source)[0]
    for n, bits in paths.named(state.masks)[0].items():
      p, rest = leaves[n], jnp.zeros((), leaves[n].dtype)
      if state.leak is not None:
        leak = unboxed(state.leak)
        rest = jnp.where(leak == 0, 0, leak * p).astype(p.dtype)
        if n in source:
          rest = jnp.where(unpack(source[n], p), rest, 0).astype(p.dtype)
      masked = jnp.where(unpack(bits, p), p, rest)
      if jnp.issubdtype(p.dtype, jnp.floating):
        # The same gradient whether a loss is differentiated at the result or
        # through this function: rules need it at masked weights too.
        masked = estimators.straight_through(masked, p)
      leaves[n] = masked
  return rebuild(leaves)


def count_nonzero(params: Sequence[Array], masks: Sequence[Array]) -> Array:
  """How many masked weights are not zero (int32): violations.

  Exact below 2^31 / leaves in each leaf; it saturates there and never wraps.
  """
  most = jnp.int32((2**31 - 1) // max(1, len(params)))
  counts = [
    jnp.minimum(thresholds.count([~m & (p != 0)]), most)
    for p, m in zip(params, masks, strict=True)
  ]
  return sum(counts, start=jnp.int32(0))


def enforced(update: Array, param: Array, mask: Array) -> Array:
  """The update after which `param` is exactly +0.0 where masked."""
  return jnp.where(mask, update, -param)


def shrunk(update: Array, param: Array, mask: Array, left: Array) -> Array:
  """The update after which, where masked, the share `left` (f32) is left.

  A share of 1 changes no bit of `update`, and 0 leaves exactly +0.0.
  """
  wide = jnp.promote_types(param.dtype, jnp.float32)
  moved = (param + update).astype(param.dtype).astype(wide)
  less = (left * moved - param.astype(wide)).astype(update.dtype)
  less = jnp.where(left == 0, -param.astype(update.dtype), less)
  return jnp.where(mask | (left == 1), update, less)


def keep_masked(masks: PyTree) -> optax.GradientTransformationExtraArgs:
  """Keeps masked weights at zero, for masks that never change.

  The last link of `optax.chain`, as `optax.keep_params_nonnegative` is: use it
  to train on from a mask made elsewhere (one shot, a lottery ticket).

  Args:
    masks: a tree of boolean arrays like the parameters, or part of that tree;
      parameters it does not name stay dense.

  Returns:
    An Optax transformation; `update` needs `params`.

  Raises:
    ValueError: at `init`, a mask names no parameter or has another shape; at
      `update`, `params` is missing.

  >>> params = {"w": jnp.ones((2, 2))}
  >>> masks = {"w": jnp.array([[True, False], [True, True]])}
  >>> tx = optax.chain(optax.sgd(0.5), keep_masked(masks))
  >>> updates, _ = tx.update(params, tx.init(params), params)
  >>> optax.apply_updates(params, updates)
  {'w': Array([[0.5, 0. ],
         [0.5, 0.5]], dtype=float32)}
  """
  wanted = paths.named(jax.tree.map(jnp.asarray, masks))[0]
  every = 100  # steps between looks for violations: each reads all weights

  def init(params):
    leaves, rebuild = paths.named(params)
    for n, m in wanted.items() if leaves else ():
      got = leaves[n].shape if n in leaves else None
      if got != m.shape or m.dtype != bool:
        raise ValueError(
          f"masks[{n!r}] must be a boolean mask of a parameter, got "
          f"{m.dtype}{list(m.shape)} for a parameter of shape {got}"
        )
    bits = {
      n: pack(jnp.ones_like(p, bool) & wanted.get(n, True))
      for n, p in leaves.items()
    }
    return SparseState(
      count=jnp.zeros((), jnp.int32),
      masks=rebuild(bits),
      violations=jnp.zeros((), jnp.int32),
      churn=jnp.zeros(len(leaves), jnp.int32),
      key=None,
      memory=None,
      explored=None,
      backward=None,
      leak=None,
      inner=optax.EmptyState(),
    )

  def update(updates, state, params=None, **extra):
    del extra
    if params is None:
      raise ValueError(NO_PARAMS)
    check_model(state, params)
    ups, rebuild = paths.named(updates)
    leaves, bits = paths.named(params)[0], paths.named(state.masks)[0]
    live = {n: unpack(bits[n], leaves[n]) for n in wanted}
    ups |= {n: enforced(ups[n], leaves[n], m) for n, m in live.items()}
    violations = lax.cond(
      (state.count > 0) & (state.count % every == 0),
      lambda: count_nonzero([leaves[n] for n in live], list(live.values())),
      lambda: state.violations,
    )
    count = optax.safe_increment(state.count)
    return rebuild(ups), state._replace(count=count, violations=violations)

  return optax.GradientTransformationExtraArgs(init, update)
