"""Layers made smaller: neurons that can do nothing are taken out."""

from collections.abc import Callable, Mapping, Sequence
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax import paths

Array = jax.Array
PyTree = Any


class Shrunk(NamedTuple):
  """What `remove_dead_neurons` returns.

  Attributes:
    params: a tree like the parameters, whose arrays are smaller; masked weights
      of its layers are zero.
    masks: a tree like the masks, likewise smaller.
    kept: by layer, but for the last: which of its neurons are left (sorted
      indices, int32).
  """

  params: PyTree
  masks: PyTree
  kept: dict[str, np.ndarray]


def remove_dead_neurons(
  params: PyTree,
  masks: PyTree,
  layers: Sequence[str],
  activation: Callable[[Array], Array] = jax.nn.relu,
) -> Shrunk:
  """The same function of dense layers by smaller arrays.

  `x -> activation(x @ kernel + bias)` for each layer, without the activation
  after the last. A hidden neuron that no active weight enters is a constant,
  `activation(bias)`: times the weights that leave it, it is added to the next
  bias. A neuron that no active weight leaves is read by nobody. Both go, and
  with them the weights of others, which so may die too: it repeats until none
  is left. Inputs of the first layer and outputs of the last stay.

  Masks alone decide, not whether an active weight happens to be zero. A masked
  bias that is given a constant becomes active. A module of the new sizes takes
  the parameters; masks go on with `sparsejax.weights.keep_masked`.

  Args:
    params: the parameters. A layer has a "kernel" [inputs, outputs] and may
      have a "bias" [outputs].
    masks: boolean, a tree like `params` or part of it, as
      `masks(opt_state, params)` gives. Concrete: shapes depend on them, so this
      is not for `jit`.
    layers: names of consecutive layers ("mlp/up" for "mlp/up/kernel").
    activation: elementwise, between the layers.

  Returns:
    A `Shrunk`.

  Raises:
    ValueError: naming the layer, where there is no such kernel, outputs are not
      the next layer's inputs, a mask does not fit, or a constant that is not
      zero has no next bias to go into.

  >>> params = {
  ...   "up": {"kernel": jnp.ones((2, 3)), "bias": jnp.array([0.0, 5.0, 0.0])},
  ...   "down": {"kernel": jnp.ones((3, 1)), "bias": jnp.zeros(1)},
  ... }
  >>> masks = {
  ...   "up": {"kernel": jnp.array([[1, 0, 1], [1, 0, 0]], bool)},
  ...   "down": {"kernel": jnp.array([[1], [1], [0]], bool)},
  ... }
  >>> small = weights.remove_dead_neurons(params, masks, ["up", "down"])
  >>> small.params["up"]["kernel"].shape, small.params["down"]["bias"].tolist()
  ((2, 1), [5.0])
  >>> small.kept["up"].tolist()
  [0]
  """
  leaves, rebuild = paths.named(params)
  bits, rebuild_masks = paths.named(masks)
  _check(leaves, bits, layers)
  live = {}
  for layer in layers:
    for name in (f"{layer}/kernel", f"{layer}/bias"):
      if name in leaves:
        live[name] = np.ones(leaves[name].shape, bool)
        if name in bits:
          live[name] = np.asarray(bits[name])
          leaves[name] = jnp.where(live[name], leaves[name], 0)
  kept = {
    layer: np.arange(leaves[f"{layer}/kernel"].shape[1], dtype=np.int32)
    for layer in layers[:-1]
  }

  def take(name, at, axis):
    leaves[name] = jnp.take(leaves[name], at, axis)
    live[name] = live[name].take(at, axis)

  changed = True
  while changed:
    changed = False
    for layer, following in itertools.pairwise(layers):
      kernel, after = f"{layer}/kernel", f"{following}/kernel"
      entered, left = live[kernel].any(0), live[after].any(1)
      (alive,) = np.nonzero(entered & left)
      if len(alive) == len(entered):
        continue
      changed = True
      (constant,) = np.nonzero(~entered & left)
      if len(constant):
        _fold(leaves, live, layer, following, constant, activation)
      take(kernel, alive, 1)
      take(after, alive, 0)
      if f"{layer}/bias" in leaves:
        take(f"{layer}/bias", alive, 0)
      kept[layer] = kept[layer][alive]

  bits |= {n: jnp.asarray(m) for n, m in live.items() if n in bits}
  return Shrunk(rebuild(leaves), rebuild_masks(bits), kept)


def _fold(leaves, live, layer, following, neurons, activation):
  """Adds to the next bias what the constant `neurons` of `layer` give it."""
  kernel = leaves[f"{following}/kernel"][neurons]
  bias = leaves.get(f"{layer}/bias")
  if bias is None:
    bias = jnp.zeros(leaves[f"{layer}/kernel"].shape[1], kernel.dtype)
  wide = jnp.promote_types(kernel.dtype, jnp.float32)
  more = activation(bias[neurons]).astype(wide) @ kernel.astype(wide)
  name = f"{following}/bias"
  if name in leaves:
    leaves[name] = (leaves[name] + more).astype(leaves[name].dtype)
    # A masked bias that now holds a constant must not go back to zero.
    live[name] = live[name] | (np.asarray(more) != 0)
  elif np.any(np.asarray(more)):
    raise ValueError(
      f"{following} must have a bias, for what constant neurons of {layer} "
      f"give it; got none, and constants up to {jnp.abs(more).max():.3g}"
    )


def _check(leaves: Mapping[str, Array], bits, layers):
  if isinstance(layers, str) or len(set(layers)) < len(layers) or not layers:
    raise ValueError(f"layers must be different names, got {layers!r}")
  for layer in layers:
    kernel, bias = (leaves.get(f"{layer}/{n}") for n in ("kernel", "bias"))
    if kernel is None or kernel.ndim != 2:
      got = "none" if kernel is None else f"shape {tuple(kernel.shape)}"
      raise ValueError(
        f"{layer} must have a kernel [inputs, outputs], got {got}; the "
        f"parameters are {sorted(leaves)}"
      )
    if bias is not None and bias.shape != kernel.shape[1:]:
      raise ValueError(
        f"{layer} must have a bias {tuple(kernel.shape[1:])}, got "
        f"{tuple(bias.shape)}"
      )
  for one, other in itertools.pairwise(layers):
    outputs = leaves[f"{one}/kernel"].shape[1]
    inputs = leaves[f"{other}/kernel"].shape[0]
    if outputs != inputs:
      raise ValueError(
        f"layers must follow each other: {one} has {outputs} outputs, and "
        f"{other} has {inputs} inputs"
      )
  for name, mask in bits.items():
    if isinstance(mask, jax.core.Tracer):
      raise ValueError(f"masks[{name!r}] must be concrete, got {mask}")
    shape = tuple(leaves[name].shape) if name in leaves else None
    if tuple(mask.shape) != shape or mask.dtype != bool:
      raise ValueError(
        f"masks[{name!r}] must be a boolean mask of a parameter, got "
        f"{mask.dtype}{list(mask.shape)} for a parameter of shape {shape}"
      )
