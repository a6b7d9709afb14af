"""Choosing weights of a trained model in one shot, a layer at a time.

Each method takes a kernel [inputs, outputs] and the moments of what the layer
reads (`sparsejax.capture.moments`), and returns a `Pruned`: the kernel with
exact zeros, and its mask. Papers write the transpose, [outputs, inputs]: their
rows are the columns here.

Masks go on to `keep_masked` for training, and to `condense` to be run.
"""

from collections.abc import Callable, Mapping
import dataclasses
import functools
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp

from sparsejax import paths
from sparsejax.capture import Moments
from sparsejax.select import budgets
from sparsejax.select import structures as structures_lib

Array = jax.Array
PyTree = Any
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
  second = _table(before, moments)
  norm = lambda w: jnp.einsum(
    "io,ij,jo->", w, second, w, precision="highest"
  )  # fmt: skip
  before = before.astype(jnp.float32)
  change = before - after.astype(jnp.float32)
  return norm(change) / jnp.maximum(norm(before), jnp.finfo(jnp.float32).tiny)


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
  _kernel(kernel)
  structure = structure or structures_lib.Unstructured()
  _check_density(density, structure, kernel.shape)
  made = Made("magnitude_pruning", density, structure)
  mask = _choose(jnp.abs(_f32(kernel)), density, structure)
  return _masked(kernel, mask, made)


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
  _kernel(kernel)
  structure = structure or structures_lib.ConstantFanIn()
  _check_density(density, structure, kernel.shape)
  made = Made("wanda", density, structure, rows=moments.count)
  mask = _choose(wanda_scores(kernel, moments), density, structure)
  return _masked(kernel, mask, made)


def wanda_scores(kernel: Array, moments: Moments) -> Array:
  """Magnitudes times the root mean square of their input, f32."""
  _fits(kernel, moments)
  return jnp.abs(_f32(kernel)) * jnp.sqrt(moments.squares)[:, None]


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
    Pruned. Where the Hessian cannot be inverted (damping too small), the kernel
    is NaN; `jnp.isfinite` tells, and `prune` says which layer it is.

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
  _kernel(kernel)
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
  _check_density(density, structure, (min(block, inputs), outputs))
  if together > 1 and inputs > block and inputs % block:
    # Of few blocks all could be kept, or none.
    _check_density(density, structure, (inputs % block, outputs))
  second = _table(kernel, moments)
  if not damping:
    _check_rank(moments)
  w, mask = _sparsegpt(kernel, second, density, structure, block, damping)
  settings = (("block", block), ("damping", damping))
  return Pruned(
    w, mask, Made("sparsegpt", density, structure, settings, moments.count)
  )


@functools.partial(jax.jit, static_argnums=(2, 3, 4, 5))
def _sparsegpt(kernel, second, density, structure, block, damping):
  inputs = kernel.shape[0]
  block = min(block, inputs)
  dead = jnp.diagonal(second) == 0
  w = jnp.where(dead[:, None], 0, _f32(kernel))
  second = second + jnp.diag(dead.astype(jnp.float32))
  second += damping * jnp.diagonal(second).mean() * jnp.eye(inputs)
  lower = jnp.linalg.cholesky(second, symmetrize_input=False)
  inverse = jax.scipy.linalg.cho_solve((lower, True), jnp.eye(inputs))
  # H^-1 = upper.T @ upper.
  upper = jnp.linalg.cholesky(inverse, symmetrize_input=True, upper=True)
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
  return jnp.where(mask, w, 0).astype(kernel.dtype), mask


def _prune_block(w, upper, diagonal, density, structure):
  """The block's rows and mask, and the errors that later blocks make up for."""
  nm = _is_nm_of_inputs(structure)
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


def _check_rank(moments):
  """An error where the Hessian is singular: its rank is the rows at most."""
  rows, alive = moments.count, (jnp.diagonal(moments.second) != 0).sum()
  if _known_false(rows >= alive):
    raise ValueError(
      f"damping must be above 0 where rows are fewer than the {alive} inputs "
      f"that are not always 0, got 0 and {int(rows)} rows"
    )


def _is_nm_of_inputs(structure):
  """Whether it is chosen group by group, as the groups' first inputs come."""
  return (
    isinstance(structure, structures_lib.NM)
    and structure.along(2, structures_lib.Axes()) == 0
  )


def _inputs_together(structure):
  """How many inputs the structure cannot be cut between."""
  if isinstance(structure, structures_lib.Block):
    return structure.shape[0]
  if isinstance(structure, structures_lib.NM):
    return structure.m if _is_nm_of_inputs(structure) else 1
  if isinstance(
    structure, structures_lib.Unstructured | structures_lib.ConstantFanIn
  ):
    return 1
  raise ValueError(
    "structure must be Unstructured, ConstantFanIn, Block or NM, got "
    f"{structure}"
  )


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
  _fits(kernel, moments)
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
  mask = _dsnot(kernel, moments, mask, cycles, threshold, power, group)
  density = None if start is None else start.density
  made = Made("dsnot", density, structure, settings, moments.count, start)
  return _masked(kernel, mask, made)


def _group_of(structure, group):
  """The group of inputs within which swaps keep the structure; None for all."""
  single = structures_lib.Unstructured | structures_lib.ConstantFanIn
  if structure is None or isinstance(structure, single):
    return group
  if not _is_nm_of_inputs(structure):
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
  drift = _f32(kernel) * moments.mean[:, None]  # what a weight adds on average
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


def owl(
  scores: Mapping[str, Array],
  density: float,
  *,
  spread: float = 0.08,
  outlier: float = 5.0,
) -> dict[str, float]:
  """Densities by layer: more where more scores are outliers.

  A layer's share of scores above `outlier` times their mean says where in
  [density - spread, density + spread] its density lies; then all are shifted,
  so that their mean, weighted by size, is the density.

  Args:
    scores: what `wanda_scores` gives, by layer; concrete.
    density: over all layers.
    spread: half of the interval.
    outlier: see above.

  Returns:
    Densities by layer.

  Raises:
    ValueError: a density would leave [0, 1].

  Example:
    >>> scores = {"a": jnp.array([1.0] * 15 + [9.0]), "b": jnp.ones(16)}
    >>> weights.owl(scores, 0.5, spread=0.25, outlier=4.0)
    {'a': 0.75, 'b': 0.25}

  Source: owl, Outlier Weighed Layerwise Sparsity (OWL): A Missing Secret Sauce
  for Pruning LLMs to High Sparsity, section 3.
  """
  budgets.check_share("density", density)
  shares = {
    name: float((x > outlier * x.mean()).mean()) for name, x in scores.items()
  }
  least, most = min(shares.values()), max(shares.values())
  if least == most:
    return dict.fromkeys(scores, density)
  at = {n: spread * (2 * (x - least) / (most - least) - 1)
        for n, x in shares.items()}  # fmt: skip
  size = {name: x.size for name, x in scores.items()}
  mean = sum(size[n] * x for n, x in at.items()) / sum(size.values())
  found = {name: density + x - mean for name, x in at.items()}
  for name, x in found.items():
    if not 0 <= x <= 1:
      raise ValueError(
        f"spread must leave densities in [0, 1], got {spread} with density "
        f"{density}: {name} would have {x:.3f}"
      )
  return found


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


def _prune_layer(kernel, moments, method, given):
  inputs = moments.mean.shape[0]
  if _known_false(moments.count > 0):
    raise ValueError(f"moments must be of rows, got {moments.count}")
  for what, value in (("kernel", kernel), ("moments", moments)):
    if _known_false(_all_finite(value)):
      raise ValueError(f"{what} must be finite, got NaN or infinity")
  pruned = method(kernel.reshape(inputs, -1), moments, **given)
  if _known_false(_all_finite(pruned.kernel)):
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


@jax.jit
def _all_finite(tree):
  return jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(tree)]).all()


def _f32(x):
  return x.astype(jnp.float32)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _choose(scores, density, structure):
  return structure.mask(scores, density)


def _known_false(truth):
  """Under jit nothing is known."""
  return not isinstance(truth, jax.core.Tracer) and not truth


def _check_density(density, structure, shape):
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
      f"density must keep some and prune some, got {density}, which keeps "
      f"{kept} of {units} in a group of {structure} over {tuple(shape)}"
    )


def _masked(kernel, mask, made):
  return Pruned(jnp.where(mask, kernel, 0), mask, made)


def _kernel(kernel):
  if kernel.ndim != 2 or not jnp.issubdtype(kernel.dtype, jnp.floating):
    raise ValueError(
      f"kernel must be floating [inputs, outputs], got {kernel.dtype}"
      f"{list(kernel.shape)}"
    )


def _fits(kernel, moments):
  _kernel(kernel)
  if moments.mean.shape != kernel.shape[:1]:
    raise ValueError(
      f"moments must be of {kernel.shape[0]} inputs, got "
      f"{moments.mean.shape[0]}"
    )


def _table(kernel, moments):
  """The second moments; an error where they were not kept."""
  _fits(kernel, moments)
  if moments.second is None:
    raise ValueError("moments must have second, got None: capture them with it")
  return moments.second
