"""A method for all layers of a model."""

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from sparsejax import paths
from sparsejax.capture import Moments
from sparsejax.weights.post_training import checks
from sparsejax.weights.post_training.results import Pruned

PyTree = Any


def prune(
  params: PyTree,
  moments: Mapping[str, Moments],
  method: Callable[..., Pruned],
  densities: Mapping[str, float] | None = None,
) -> tuple[PyTree, PyTree]:
  """Applies a method to each layer that there are moments of.

  It is `put_layers` of `prune_layers`, which also say how layers were made.

  Args:
    params: the parameters.
    moments: by the kernel's name, as `capture.moments` gives them.
    method: function of a kernel [inputs, outputs] and its moments, such as
      `functools.partial(wanda, density=0.5)`.
    densities: None, or by the kernel's name what `method` takes as `density`.

  Returns:
    The parameters, pruned, and masks of them all (True where nothing was
    chosen), for `keep_masked`.

  Raises:
    ValueError: see `prune_layers`.

  Example:
    >>> import functools
    >>> from sparsejax.capture import Moments
    >>> params = {"kernel": jnp.array([[4.0], [1.0]]), "bias": jnp.ones(1)}
    >>> moments = {"kernel": Moments.zeros(2).add(jnp.array([[1.0, 10.0]]))}
    >>> method = functools.partial(weights.wanda, density=0.5)
    >>> pruned, masks = weights.prune(params, moments, method)
    >>> pruned["kernel"].tolist(), masks["bias"].tolist()
    ([[0.0], [1.0]], [True])
  """
  return put_layers(params, prune_layers(params, moments, method, densities))


def prune_layers(
  params: PyTree,
  moments: Mapping[str, Moments],
  method: Callable[..., Pruned],
  densities: Mapping[str, float] | None = None,
) -> dict[str, Pruned]:
  """What `prune` makes of each layer, and how it was made.

  Args:
    params: the parameters.
    moments: by the kernel's name, as `capture.moments` gives them.
    method: function of a kernel [inputs, outputs] and its moments.
    densities: None, or by the kernel's name what `method` takes as `density`.

  Returns:
    By the kernel's name a `Pruned` of the kernel's own shape.

  Raises:
    ValueError: naming the parameter: for arguments that do not fit, moments of
      no rows, and for NaN or infinity in a kernel, in its moments, or in what
      the method makes of them (SparseGPT does of a Hessian that cannot be
      inverted). Under `jit` values cannot be looked at: there NaN goes on.

  Example:
    >>> import functools
    >>> from sparsejax.capture import Moments
    >>> params = {"kernel": jnp.array([[4.0], [1.0]])}
    >>> moments = {"kernel": Moments.zeros(2).add(jnp.array([[1.0, 10.0]]))}
    >>> method = functools.partial(weights.wanda, density=0.5)
    >>> layers = weights.prune_layers(params, moments, method)
    >>> made = layers["kernel"].made
    >>> made.method, made.density, made.structure, made.rows.item()
    ('wanda', 0.5, ConstantFanIn(ablate=0.0), 1.0)
  """
  leaves, _ = paths.named(params)
  if densities is not None and set(densities) != set(moments):
    raise ValueError(
      f"densities must be of {sorted(moments)}, as moments are, got those of "
      f"{sorted(densities)}"
    )
  layers = {}
  for name, of_layer in moments.items():
    if name not in leaves:
      raise ValueError(
        f"moments must be of parameters, got {name!r}; there are "
        f"{sorted(leaves)}"
      )
    kernel = leaves[name]
    given = {} if densities is None else {"density": densities[name]}
    try:
      layers[name] = _prune_layer(kernel, of_layer, method, given)
    except (TypeError, ValueError) as error:
      raise ValueError(f"{name}: {error}") from error
  return layers


def put_layers(
  params: PyTree, layers: Mapping[str, Pruned]
) -> tuple[PyTree, PyTree]:
  """The parameters with pruned layers, and masks of them all.

  Args:
    params: the parameters.
    layers: as `prune_layers` gives them.

  Returns:
    As `prune` does.

  Raises:
    ValueError: naming the layer that is not of the parameters.

  Example:
    >>> params = {"kernel": jnp.array([[4.0], [1.0]])}
    >>> layer = weights.magnitude_pruning(params["kernel"], 0.5)
    >>> weights.put_layers(params, {"kernel": layer})[0]["kernel"].tolist()
    [[4.0], [0.0]]
  """
  leaves, rebuild = paths.named(params)
  masks = {name: jnp.ones(jnp.shape(x), bool) for name, x in leaves.items()}
  for name, layer in layers.items():
    if name not in leaves or leaves[name].shape != layer.kernel.shape:
      raise ValueError(
        f"layers must be of the parameters, got {name!r} of "
        f"{list(layer.kernel.shape)}; there are "
        f"{ {n: list(jnp.shape(x)) for n, x in leaves.items()} }"
      )
    leaves[name], masks[name] = layer.kernel, layer.mask
  return rebuild(leaves), rebuild(masks)


def _prune_layer(kernel, moments, method, given):
  inputs = moments.mean.shape[0]
  if checks.known_false(moments.count > 0):
    raise ValueError(f"moments must be of rows, got {moments.count}")
  for what, value in (("kernel", kernel), ("moments", moments)):
    if checks.known_false(_all_finite(value)):
      raise ValueError(f"{what} must be finite, got NaN or infinity")
  pruned = method(kernel.reshape(inputs, -1), moments, **given)
  if checks.known_false(_all_finite(pruned.kernel)):
    raise ValueError(
      f"the method made NaN or infinity of it, from {int(moments.count)} rows "
      f"for {inputs} inputs; more rows to calibrate on, or more damping, make "
      "the Hessian one that can be inverted"
    )
  return dataclasses.replace(
    pruned,
    kernel=pruned.kernel.reshape(kernel.shape),
    mask=pruned.mask.reshape(kernel.shape),
  )


@jax.jit
def _all_finite(tree):
  return jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(tree)]).all()
