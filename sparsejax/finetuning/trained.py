"""An optimizer that exists for what is trained alone."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sparsejax import paths
from sparsejax import sharding
from sparsejax.finetuning import choices

Array = jax.Array
PyTree = Any


class TrainOnlyState(NamedTuple):
  """State of `train_only`.

  Attributes:
    index: int32 arrays, a tree like the parameters: [n] of entries, [n, 2] of
      blocks; `optax.MaskedNode()` elsewhere.
    inner: state of the wrapped optimizer, for the parts that `take` gives.
  """

  index: PyTree
  inner: PyTree


def train_only(
  inner: optax.GradientTransformation, chosen: PyTree
) -> optax.GradientTransformationExtraArgs:
  """Wraps an optimizer so that it trains, and has a state for, a part alone.

  `inner` sees a tree like the parameters, in which an array is its trained part
  (a vector of entries, blocks, a slice) and what is frozen is left out, as by
  `optax.masked`; so norms, clipping and weight decay are of what is trained.
  Where it needs whole matrices (adafactor's rows and columns, muon) choose
  slices or whole arrays.

  Updates outside are -0.0, the one number that changes no bit of what it is
  added to, also not of a -0.0. (What has no subnormal numbers, such as XLA on
  CPU, makes them 0 in any sum.) So it stands last and outside: what has updates
  or a copy of the parameters of its own belongs into `inner`, such as weight
  decay (which outside moves what is frozen), `schedule_free` (which rounds it)
  or `MultiSteps(...).gradient_transformation()` (whose zeros are +0.0).

  Indices lie in the state, not in the compiled program. Parameters may be
  sharded; of them and their gradients only the chosen parts are moved. Vectors
  of entries lie whole on every device, unless the state is placed otherwise.

  Args:
    inner: any Optax optimizer.
    chosen: what is trained: masks, slices, blocks, as in `choose`.

  Returns:
    An Optax optimizer. Its gradients may be missing (None) where nothing is
    trained, if `update` is given `params`.

  Raises:
    ValueError: at `init` as `choose`; at `update`, if gradients of what is
      trained are missing, or the state is of another choice.

  >>> params = {"w": jnp.ones((2, 2)), "b": jnp.ones(2)}
  >>> masks = {"w": jnp.array([[True, False], [False, False]])}
  >>> tx = train_only(optax.adam(0.5), masks)
  >>> state = tx.init(params)
  >>> state.inner[0].mu
  {'b': MaskedNode(), 'w': Array([0.], dtype=float32)}
  >>> updates, _ = tx.update(params, state, params)
  >>> jnp.round(optax.apply_updates(params, updates)["w"], 3).tolist()
  [[0.5, 1.0], [1.0, 1.0]]

  Source: [fish-mask, lt-sft, smt, s2ft] what they have in common: a fixed
    choice of what is trained.
  """
  if not isinstance(inner, optax.GradientTransformation):
    raise ValueError(f"inner must be an Optax optimizer, got {inner!r}")
  inner = optax.with_extra_args_support(inner)
  wanted, shapes = choices.read(chosen)

  def init(params):
    leaves, rebuild = paths.named(params)
    choices.check_fit(wanted, shapes, leaves)
    # Copies: a state may be donated, and what was chosen is kept.
    index = {
      n: jnp.array(c.index) if hasattr(c, "index") else choices.NOTHING
      for n, c in wanted.items()
    }
    full = rebuild({n: index.get(n, choices.NOTHING) for n in leaves})
    return TrainOnlyState(
      full, inner.init(rebuild(choices.taken(wanted, leaves)))
    )

  def update(updates, state, params=None, **extra):
    index = paths.named(state.index)[0]
    found = {}
    for n, c in wanted.items():
      if hasattr(c, "index"):
        if n not in index or index[n].shape != c.index.shape:
          raise ValueError(
            f"opt_state is of another choice: of {n!r} it has "
            f"{'nothing' if n not in index else list(index[n].shape)}, and "
            f"chosen {list(c.index.shape)}"
          )
        c = dataclasses.replace(c, index=index[n])
      found[n] = c
    grads, rebuild = paths.named(updates)
    leaves = grads
    if params is not None:
      leaves, rebuild = paths.named(params)
    for n in found:
      got = jnp.shape(grads[n]) if n in grads else None
      if n not in leaves or got != jnp.shape(leaves[n]):
        raise ValueError(
          f"grads must be of what is trained, got shape {got} for {n!r}"
        )
    parts = rebuild(choices.taken(found, leaves, grads))
    seen = None if params is None else rebuild(choices.taken(found, leaves))
    parts, inner_state = inner.update(parts, state.inner, seen, **extra)
    parts = paths.named(parts)[0]
    none = {n: _no_update(p, parts.get(n)) for n, p in leaves.items()}
    out = rebuild(none | choices.replaced(found, none, parts))
    return out, TrainOnlyState(state.index, inner_state)

  return optax.GradientTransformationExtraArgs(init, update)


def _no_update(leaf, part):
  """What changes no bit of `leaf`."""
  dtype = leaf.dtype if part is None else part.dtype
  zeros = sharding.like(jnp.zeros_like(leaf, dtype), leaf)
  return -zeros if jnp.issubdtype(dtype, jnp.inexact) else zeros
