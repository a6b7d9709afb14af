"""Weights chosen by their scores alone: magnitude, Wanda."""

import functools

import jax
import jax.numpy as jnp

from sparsejax.capture import Moments
from sparsejax.select import structures as structures_lib
from sparsejax.weights.post_training import checks
from sparsejax.weights.post_training.results import Made
from sparsejax.weights.post_training.results import masked
from sparsejax.weights.post_training.results import Pruned

Array = jax.Array
Structure = structures_lib.Structure


def magnitude_pruning(
  kernel: Array, density: float | None, structure: Structure | None = None
) -> Pruned:
  """Keeps the weights of largest magnitude.

  Args:
    kernel: floating [inputs, outputs].
    density: share of weights to keep, in [0, 1]; None for n:m.
    structure: what may be chosen, default `select.Unstructured()`.

  Returns:
    Pruned. Ties go to the lower index.

  Raises:
    ValueError: for a kernel or density that does not fit the structure.

  Example:
    >>> kernel = jnp.array([[1.0, -4.0], [3.0, 2.0]])
    >>> weights.magnitude_pruning(kernel, 0.5).kernel.tolist()
    [[0.0, -4.0], [3.0, 0.0]]
  """
  checks.check_kernel(kernel)
  structure = structure or structures_lib.Unstructured()
  checks.check_density(density, structure, kernel.shape)
  made = Made("magnitude_pruning", density, structure)
  mask = _choose(jnp.abs(kernel.astype(jnp.float32)), density, structure)
  return masked(kernel, mask, made)


def wanda(
  kernel: Array,
  moments: Moments,
  density: float | None,
  structure: Structure | None = None,
) -> Pruned:
  """Keeps the weights of largest magnitude times the norm of their input.

  By default each output keeps equally many, as the paper has it. Weights do not
  change.

  Args:
    kernel: floating [inputs, outputs].
    moments: of the layer's inputs.
    density: share of weights to keep, in [0, 1]; None for n:m.
    structure: what may be chosen, default `select.ConstantFanIn()`.

  Returns:
    Pruned. Ties go to the lower index.

  Raises:
    ValueError: for arguments that do not fit each other.

  Example:
    >>> from sparsejax.capture import Moments
    >>> moments = Moments.zeros(2).add(jnp.array([[1.0, 10.0]]))
    >>> kernel = jnp.array([[4.0, 1.0], [1.0, -1.0]])
    >>> weights.wanda(kernel, moments, 0.5).mask.tolist()
    [[False, False], [True, True]]

  Source: wanda, A Simple and Effective Pruning Approach for Large Language
  Models, equation 1.
  """
  checks.check_kernel(kernel)
  structure = structure or structures_lib.ConstantFanIn()
  checks.check_density(density, structure, kernel.shape)
  made = Made("wanda", density, structure, rows=moments.count)
  mask = _choose(wanda_scores(kernel, moments), density, structure)
  return masked(kernel, mask, made)


def wanda_scores(kernel: Array, moments: Moments) -> Array:
  """Magnitudes times the root mean square of their input, f32."""
  checks.check_moments(kernel, moments)
  size = jnp.abs(kernel.astype(jnp.float32))
  return size * jnp.sqrt(moments.squares)[:, None]


@functools.partial(jax.jit, static_argnums=(1, 2))
def _choose(scores, density, structure):
  return structure.mask(scores, density)
