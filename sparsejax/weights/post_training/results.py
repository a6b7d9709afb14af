"""What the methods return: kernel, mask, and how they were made."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from sparsejax.automatic import automatic
from sparsejax.capture import Moments
from sparsejax.select import structures as structures_lib
from sparsejax.weights.post_training import checks

Array = jax.Array
Structure = structures_lib.Structure

_STATIC = {"static": True}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Made:
  """How a kernel was pruned: the method's arguments.

  A pytree of `rows`; all else is static.

  Attributes:
    method: the function's name.
    density: as given; None where the structure or `start` says it.
    structure: what was chosen; None where only a mask is known.
    settings: the other arguments and their values.
    rows: f32 scalar, how many rows the moments are of; None without moments.
    start: how the mask was made that the method began with, where it is known.
  """

  method: str = dataclasses.field(metadata=_STATIC)
  density: float | None = dataclasses.field(metadata=_STATIC)
  structure: Structure | None = dataclasses.field(metadata=_STATIC)
  settings: tuple[tuple[str, Any], ...] = dataclasses.field(
    default=(), metadata=_STATIC
  )
  rows: Array | None = None
  start: "Made | None" = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pruned:
  """A kernel after pruning.

  Attributes:
    kernel: [inputs, outputs], +0.0 where it is pruned.
    mask: bool [inputs, outputs], True where it is kept.
    made: how, or None from a method that does not say it.
  """

  kernel: Array
  mask: Array
  made: Made | None = None


def masked(kernel, mask, made):
  return Pruned(jnp.where(mask, kernel, 0), mask, made)


def reconstruction_error(before: Array, after: Array, moments: Moments):
  """The mean squared change of a layer's outputs, over its squared outputs.

  Args:
    before: [inputs, outputs].
    after: the same shape.
    moments: of the layer's inputs, with `second`.

  Returns:
    f32 scalar, 0 for equal kernels and 1 where nothing is left.

  >>> from sparsejax.capture import Moments
  >>> moments = Moments.zeros(2).add(jnp.eye(2))
  >>> reconstruction_error(
  ...   jnp.array([[3.0], [4.0]]), jnp.array([[0.0], [4.0]]), moments
  ... ).item()
  0.36000001430511475
  """
  second = checks.second_moments(before, moments)
  return automatic(_error, before, after, second)


def _error(before, after, second):
  norm = lambda w: jnp.einsum(
    "io,ij,jo->", w, second, w, precision="highest"
  )  # fmt: skip
  before = before.astype(jnp.float32)
  change = before - after.astype(jnp.float32)
  return norm(change) / jnp.maximum(norm(before), jnp.finfo(jnp.float32).tiny)
