"""The linear layers of a Flax model by name, and what stands in their place.

What is added to a layer is its `dot_general`: the layer stays what and where it
was, with its bias, its dtypes and the path of its kernel.
"""

from typing import Any

from flax import nnx
from jax import lax

from sparsejax import paths


def linears(model: nnx.Module) -> dict[str, nnx.Linear]:
  """The layers of a model that multiply by a kernel, by path."""
  if not isinstance(model, nnx.Module):
    raise ValueError(f"model must be an nnx.Module, got {type(model).__name__}")
  return {
    "/".join(map(str, path)): layer
    for path, layer in nnx.iter_graph(model)
    if isinstance(layer, nnx.Linear)
  }


def matching(model: nnx.Module, where: str) -> dict[str, nnx.Linear]:
  """Those in whose path `where`, a regular expression, is found."""
  layers = linears(model)
  found = paths.matching("where", {where: True}, layers)
  return {n: layers[n] for n in found}


def set_dot(name: str, layer: nnx.Linear, dot: Any) -> None:
  """Makes `dot` the product of a layer that has none of its own."""
  if layer.dot_general is not lax.dot_general:
    raise ValueError(
      f"{name}: its dot_general must be lax.dot_general, got "
      f"{type(layer.dot_general).__name__}: merge it first"
    )
  layer.dot_general = nnx.data(dot)


def plain_dot(layer: nnx.Linear) -> None:
  """Gives a layer its usual product back."""
  layer.dot_general = nnx.static(lax.dot_general)
