"""Weights that change places with pruned ones: DSnoT."""

import functools

import jax
from jax import lax
import jax.numpy as jnp

from sparsejax.automatic import automatic
from sparsejax.capture import Moments
from sparsejax.select import structures as structures_lib
from sparsejax.weights.post_training import checks
from sparsejax.weights.post_training.results import Made
from sparsejax.weights.post_training.results import masked
from sparsejax.weights.post_training.results import Pruned
from sparsejax.weights.post_training.scores import wanda_scores

Array = jax.Array


def dsnot(
  kernel: Array,
  moments: Moments,
  mask: Array | Pruned,
  *,
  cycles: int = 50,
  threshold: float = 5e-5,
  power: float = 1.0,
  group: int | None = None,
) -> Pruned:
  """Swaps kept weights for pruned ones until outputs are right on average.

  The error of an output is the sum of weight times mean input over what is
  pruned of it. A cycle regrows the weight that takes most off the error,
  divided by the variance of its input, and prunes the one of the lowest Wanda
  score that takes more off it. Weights and their number in each output do not
  change.

  An output is finished when its error is below the threshold, nothing is left
  to swap, or the next swap would turn the error's sign; so errors never grow.
  Departures: the authors' code does so with `without_same_sign=False`, goes on
  when the sign turns without it, and within groups prunes whatever the sign.
  Its error is that of a sequence: a threshold of 0.1 there, with 2048 tokens,
  is 5e-5 here.

  Args:
    kernel: floating [inputs, outputs], before it was pruned.
    moments: of the layer's inputs.
    mask: where to begin: bool, of the kernel's shape, or a `Pruned`, whose
      structure is then kept.
    cycles: swaps of an output at most.
    threshold: the error that is small enough.
    power: of the variance.
    group: None, or m where the mask is n:m: swaps stay within a group. Of a
      `Pruned` it is known.

  Returns:
    Pruned.

  Raises:
    ValueError: for arguments that do not fit each other, and for a `Pruned` of
      blocks, channels or n:m of outputs: swaps are of single weights within an
      output, which would cut these up.

  Example:
    >>> from sparsejax.capture import Moments
    >>> moments = Moments.zeros(3).add(jnp.array([[0.0] * 3, [2.0] * 3]))
    >>> kernel = jnp.array([[3.0], [2.0], [-1.0]])
    >>> mask = jnp.array([[False], [False], [True]])
    >>> weights.dsnot(kernel, moments, mask).mask.ravel().tolist()
    [True, False, False]

  Source: dsnot, Dynamic Sparse No Training: Training-Free Fine-tuning for
  Sparse LLMs, algorithm 1.
  """
  checks.check_moments(kernel, moments)
  start, structure = None, None
  if isinstance(mask, Pruned):
    start, mask = mask.made, mask.mask
  if start is not None:
    structure = start.structure
    group = _group_of(structure, group)
  if mask.shape != kernel.shape or mask.dtype != bool:
    raise ValueError(
      f"mask must be bool{list(kernel.shape)}, got {mask.dtype}"
      f"{list(mask.shape)}"
    )
  settings = tuple(
    dict(cycles=cycles, threshold=threshold, power=power, group=group).items()
  )
  group = kernel.shape[0] if group is None else group
  if group < 1 or kernel.shape[0] % group:
    raise ValueError(
      f"group must divide the {kernel.shape[0]} inputs, got {group}"
    )
  run = lambda kernel, moments, mask: _dsnot(
    kernel, moments, mask, cycles, threshold, power, group
  )
  mask = automatic(run, kernel, moments, mask, out=kernel)
  density = None if start is None else start.density
  made = Made("dsnot", density, structure, settings, moments.count, start)
  return masked(kernel, mask, made)


def _group_of(structure, group):
  """The group of inputs within which swaps keep the structure; None for all."""
  single = structures_lib.Unstructured | structures_lib.ConstantFanIn
  if structure is None or isinstance(structure, single):
    return group
  if not checks.is_nm_of_inputs(structure):
    raise ValueError(
      "mask must be of Unstructured, ConstantFanIn or n:m of inputs, for swaps "
      f"of single weights, got {structure}"
    )
  if group not in (None, structure.m):
    raise ValueError(
      f"group must be {structure.m} for {structure}, got {group}"
    )
  return structure.m


@functools.partial(jax.jit, static_argnums=(3, 4, 5, 6))
def _dsnot(kernel, moments, mask, cycles, threshold, power, group):
  # What a weight adds on average.
  drift = kernel.astype(jnp.float32) * moments.mean[:, None]
  scores = wanda_scores(kernel, moments)
  worth = jnp.abs(drift) / moments.variance[:, None] ** power
  column = jnp.arange(kernel.shape[1])
  group_of = jnp.arange(kernel.shape[0])[:, None] // group

  def cycle(carry):
    mask, moved, error, going, turns = carry
    going &= jnp.abs(error) >= threshold
    toward = jnp.sign(error) * drift
    may_go = mask & ~moved & (toward < 0)
    some = may_go.reshape(-1, group, len(column)).any(1)
    may_come = ~mask & ~moved & (toward > 0) & jnp.repeat(some, group, axis=0)
    comes = jnp.where(may_come, worth, -1).argmax(0)
    may_go &= group_of == comes // group
    # Of equal scores the last goes.
    last = jnp.where(may_go, scores, jnp.inf)[::-1].argmin(0)
    goes = kernel.shape[0] - 1 - last
    after = error - drift[comes, column] + drift[goes, column]
    going &= may_come.any(0) & may_go.any(0) & (jnp.sign(error) * after >= 0)
    swap = lambda x, at, value: x.at[at, column].set(
      jnp.where(going, value, x[at, column])
    )
    mask = swap(swap(mask, comes, True), goes, False)
    moved = swap(swap(moved, comes, True), goes, True)
    return mask, moved, jnp.where(going, after, error), going, turns + 1

  error = jnp.where(mask, 0, drift).sum(0)
  start = (mask, jnp.zeros_like(mask), error, jnp.ones_like(error, bool), 0)
  mask, *_ = lax.while_loop(
    lambda carry: carry[3].any() & (carry[4] < cycles), cycle, start
  )
  return mask
