"""Weights that make up for those pruned before them: SparseGPT."""

import functools

import jax
from jax import lax
import jax.numpy as jnp

from sparsejax.automatic import automatic
from sparsejax.capture import Moments
from sparsejax.select import structures as structures_lib
from sparsejax.weights.post_training import checks
from sparsejax.weights.post_training.results import Made
from sparsejax.weights.post_training.results import Pruned

Array = jax.Array
Structure = structures_lib.Structure


def sparsegpt(
  kernel: Array,
  moments: Moments,
  density: float | None,
  structure: Structure | None = None,
  *,
  block: int = 128,
  damping: float = 0.01,
) -> Pruned:
  """Prunes input after input, and lets the later ones make up for it.

  Weights are chosen by w^2 over the squared diagonal of the Cholesky factor of
  the inverse Hessian, for a block of inputs at a time; n:m for a group of m at
  a time. What a pruned weight did to the outputs is then taken over by the
  inputs behind it (the OBS correction).

  Inputs that are always 0 lose their weights. Departures: exactly the share
  asked for is pruned of every block, where the authors' code prunes one more;
  `ConstantFanIn` and `Block` are not in the paper. The score of a `Block` is
  the mean of its weights'.

  Args:
    kernel: floating [inputs, outputs].
    moments: of the layer's inputs, with `second`.
    density: share of weights to keep, in [0, 1]; None for n:m.
    structure: `select.Unstructured()` (default), `ConstantFanIn` or `Block`,
      which are chosen in each block of inputs; or `NM`.
    block: how many inputs are chosen among at once (all, where there are
      fewer): whole groups of `NM`, whole rows of `Block`.
    damping: what is added to the Hessian's diagonal, as a share of its mean.

  Returns:
    Pruned. Where the Hessian cannot be inverted (an input is a sum of others as
    far as f32 can tell, and the damping too small), the kernel is NaN;
    `jnp.isfinite` tells, and `prune` says which layer it is.

  Raises:
    ValueError: for arguments that do not fit each other, and outside of `jit`
      for a damping of 0 with fewer rows than inputs.

  Example:
    >>> from sparsejax.capture import Moments
    >>> moments = Moments.zeros(2).add(jnp.array([[1.0, 1.0], [1.0, 1.1]]))
    >>> kernel = jnp.array([[1.0], [2.0]])
    >>> pruned = weights.sparsegpt(kernel, moments, 0.5)
    >>> pruned.mask.tolist(), pruned.kernel.round(1).tolist()
    ([[False], [True]], [[0.0], [2.9000000953674316]])

  Source: sparsegpt, SparseGPT: Massive Language Models Can Be Accurately Pruned
  in One-Shot, algorithm 1.
  """
  checks.check_kernel(kernel)
  structure = structure or structures_lib.Unstructured()
  together = _inputs_together(structure)
  if block < 1 or min(block, kernel.shape[0]) % together:
    raise ValueError(
      f"block must be a positive multiple of {together} for {structure}, got "
      f"{block}"
    )
  if not damping >= 0:
    raise ValueError(f"damping must be 0 or more, got {damping}")
  structure.check(kernel.shape, structures_lib.Axes())
  inputs, outputs = kernel.shape
  checks.check_density(density, structure, (min(block, inputs), outputs))
  if together > 1 and inputs > block and inputs % block:
    # Of few blocks all could be kept, or none.
    checks.check_density(density, structure, (inputs % block, outputs))
  second = checks.second_moments(kernel, moments)
  if not damping:
    _check_rank(moments)
  run = lambda kernel, second: _sparsegpt(
    kernel, second, density, structure, block, damping
  )
  w, mask = automatic(run, kernel, second, out=kernel)
  settings = (("block", block), ("damping", damping))
  made = Made("sparsegpt", density, structure, settings, moments.count)
  return Pruned(w, mask, made)


def _inputs_together(structure):
  """How many inputs the structure cannot be cut between."""
  if isinstance(structure, structures_lib.Block):
    return structure.shape[0]
  if isinstance(structure, structures_lib.NM):
    return structure.m if checks.is_nm_of_inputs(structure) else 1
  if isinstance(
    structure, structures_lib.Unstructured | structures_lib.ConstantFanIn
  ):
    return 1
  raise ValueError(
    "structure must be Unstructured, ConstantFanIn, Block or NM, got "
    f"{structure}"
  )


def _check_rank(moments):
  """An error where the Hessian is singular: its rank is the rows at most."""
  rows, alive = moments.count, (jnp.diagonal(moments.second) != 0).sum()
  if checks.known_false(rows >= alive):
    raise ValueError(
      f"damping must be above 0 where rows are fewer than the {alive} inputs "
      f"that are not always 0, got 0 and {int(rows)} rows"
    )


@functools.partial(jax.jit, static_argnums=(2, 3, 4, 5))
def _sparsegpt(kernel, second, density, structure, block, damping):
  inputs = kernel.shape[0]
  block = min(block, inputs)
  dead = jnp.diagonal(second) == 0
  w = jnp.where(dead[:, None], 0, kernel.astype(jnp.float32))
  second = second + jnp.diag(dead.astype(jnp.float32))
  second += damping * jnp.diagonal(second).mean() * jnp.eye(inputs)
  # H = factor @ factor.T, factor upper: Cholesky's of the inputs in reverse.
  reverse = jnp.linalg.cholesky(second[::-1, ::-1], symmetrize_input=False)
  factor = reverse[::-1, ::-1]
  # H^-1 = upper.T @ upper.
  upper = jax.scipy.linalg.solve_triangular(factor, jnp.eye(inputs))
  invertible = (_lost(upper, second) < 0.1).all()
  diagonal = jnp.diagonal(upper)[:, None]

  def of_block(begin, size, carry):
    w, mask = carry
    across = lax.dynamic_slice_in_dim(upper, begin, size)
    rows, chosen, errors = _prune_block(
      lax.dynamic_slice_in_dim(w, begin, size),
      lax.dynamic_slice_in_dim(across, begin, size, axis=1),
      lax.dynamic_slice_in_dim(diagonal, begin, size),
      density,
      structure,
    )
    later = jnp.arange(inputs)[:, None] >= begin + size
    moved = jnp.matmul(across.T, errors, precision="highest")
    w = jnp.where(later, w - moved, w)
    put = lambda x, rows: lax.dynamic_update_slice_in_dim(x, rows, begin, 0)
    return put(w, rows), put(mask, chosen)

  whole = inputs // block
  carry = lax.fori_loop(
    0,
    whole,
    lambda i, carry: of_block(i * block, block, carry),
    (w, jnp.zeros(w.shape, bool)),
  )
  if inputs % block:
    carry = of_block(whole * block, inputs % block, carry)
  w, mask = carry
  w = jnp.where(invertible, jnp.where(mask, w, 0), jnp.nan)
  return w.astype(kernel.dtype), mask


def _lost(upper, second):
  """The share of an input's own part that may be rounding.

  Its own part, 1 / upper[i, i]^2, is what inputs behind it do not explain: a
  sum over entries of the Hessian, weighted by upper[i] / upper[i, i], and f32
  knows those no better than to its resolution. The share is about 1 where the
  Hessian is singular, and 1e-4 or less with the usual damping.
  """
  resolution = jnp.finfo(jnp.float32).eps
  squares = jnp.diagonal(second)
  return resolution * jnp.matmul(upper**2, squares, precision="highest")


def _prune_block(w, upper, diagonal, density, structure):
  """The block's rows and mask, and the errors that later blocks make up for."""
  nm = checks.is_nm_of_inputs(structure)
  if nm:
    group, chosen = structure.m, jnp.zeros(w.shape, bool)
  else:
    # Once, for all of the block.
    group, chosen = None, structure.mask((w / diagonal) ** 2, density)

  def step(i, carry):
    w, mask, errors = carry
    if nm:

      def choose(mask):
        of_group = lambda x: lax.dynamic_slice_in_dim(x, i, group)
        scores = (of_group(w) / of_group(diagonal)) ** 2
        return lax.dynamic_update_slice_in_dim(
          mask, structure.mask(scores), i, 0
        )

      mask = lax.cond(i % group == 0, choose, lambda mask: mask, mask)
    error = jnp.where(mask[i], 0, w[i]) / diagonal[i]
    # Rows before i have zeros in upper.
    w -= upper[i][:, None] * error
    return w, mask, errors.at[i].set(error)

  carry = (w, chosen, jnp.zeros_like(w))
  return lax.fori_loop(0, w.shape[0], step, carry)
