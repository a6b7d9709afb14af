"""What the methods take, and the errors where they get something else."""

import jax
import jax.numpy as jnp

from sparsejax.select import budgets
from sparsejax.select import structures as structures_lib


def check_kernel(kernel):
  if kernel.ndim != 2 or not jnp.issubdtype(kernel.dtype, jnp.floating):
    raise ValueError(
      f"kernel must be floating [inputs, outputs], got {kernel.dtype}"
      f"{list(kernel.shape)}"
    )


def check_moments(kernel, moments):
  check_kernel(kernel)
  if moments.mean.shape != kernel.shape[:1]:
    raise ValueError(
      f"moments must be of {kernel.shape[0]} inputs, got "
      f"{moments.mean.shape[0]}"
    )


def second_moments(kernel, moments):
  """The second moments; an error where they were not kept."""
  check_moments(kernel, moments)
  if moments.second is None:
    raise ValueError("moments must have second, got None: capture them with it")
  return moments.second


def check_density(density, structure, shape):
  """An error unless something stays of each group and something goes."""
  axes = structures_lib.Axes()
  structure.check(shape, axes)
  if density is None:
    if not isinstance(structure, structures_lib.NM):
      raise ValueError(f"density must be given for {structure}, got None")
    return
  budgets.check_share("density", density)
  units = structure.group_size(shape, axes)
  kept = structure.group_count(shape, axes, density)
  if units and 0 < density < 1 and kept in (0, units):
    raise ValueError(
      f"density must keep some and prune some, got {density:.4g}, which "
      f"keeps {kept} of {units} in a group of {structure} over {tuple(shape)}"
    )


def is_nm_of_inputs(structure):
  """Whether it is chosen group by group, as the groups' first inputs come."""
  return (
    isinstance(structure, structures_lib.NM)
    and structure.along(2, structures_lib.Axes()) == 0
  )


def known_false(truth):
  """Under jit nothing is known."""
  return not isinstance(truth, jax.core.Tracer) and not truth
