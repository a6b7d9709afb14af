"""How sparse codes are, how much they explain, and whose atoms are found.

Codes are dense latents [..., latents] or a `Code`; a latent is active where its
value is not 0. A share of the variance is a ratio of two sums over all rows:
over batches that is what `Statistics` gives, and not the mean of their ratios.
"""

from collections.abc import Sequence
import dataclasses
import functools
import math

import jax
from jax import lax
import jax.numpy as jnp
import optax

from sparsejax.automatic import automatic
from sparsejax.sparse_coding.codes import Code

Array = jax.Array

_TINY = float(jnp.finfo(jnp.float32).tiny)


def l0(code: Code | Array) -> Array:
  """How many latents are active in a row, on average.

  Args:
    code: a Code, or dense latents [..., latents].

  Returns:
    f32 scalar.

  Example:
    >>> l0(jnp.array([[2.0, 0.0, 1.0], [0.0, 0.0, 4.0]])).item()
    1.5
  """
  return (_values(code) != 0).sum(-1).mean(dtype=jnp.float32)


def density(code: Code | Array) -> Array:
  """The share of the rows in which each latent is active.

  Args:
    code: a Code, or dense latents [..., latents].

  Returns:
    f32 [latents].

  Example:
    >>> code = Code(jnp.array([[2.0], [0.0]]), jnp.array([[1], [0]]), 3)
    >>> density(code).tolist()
    [0.0, 0.5, 0.0]
  """
  return _active_rows(code) / math.prod(_rows(code))


def dead_fraction(density: Array, at_most: float = 0) -> Array:
  """The share of the latents that are active in no more rows than that.

  Args:
    density: [latents], as `density` gives it.
    at_most: the share of rows up to which a latent counts as dead.

  Returns:
    f32 scalar.

  Example:
    >>> dead_fraction(jnp.array([0.0, 0.5, 1.0, 0.0])).item()
    0.5
  """
  return (density <= at_most).mean(dtype=jnp.float32)


def dense_fraction(density: Array, above: float = 0.1) -> Array:
  """The share of the latents that are active in more rows than that.

  Args:
    density: [latents], as `density` gives it.
    above: the share of rows above which a latent counts as dense.

  Returns:
    f32 scalar.

  Example:
    >>> dense_fraction(jnp.array([0.0, 0.1, 0.2, 1.0])).item()
    0.5
  """
  return (density > above).mean(dtype=jnp.float32)


def explained_variance(x: Array, reconstruction: Array) -> Array:
  """1 minus the squared error as a share of the variance about the mean row.

  About zero it would be near 1 for any x that is far from it. Below 0, the mean
  would have been a better reconstruction. Rows that are all equal have none: it
  is no number.

  Args:
    x: [..., width].
    reconstruction: as x, and on its scale.

  Returns:
    f32 scalar.

  Raises:
    ValueError: for shapes that differ.

  Example:
    >>> x = jnp.array([[11.0], [9.0]])
    >>> explained_variance(x, jnp.array([[11.0], [10.0]])).item()
    0.5
  """
  x, reconstruction = _pair(x, reconstruction)
  error = ((x - reconstruction) ** 2).sum()
  return 1 - error / ((x - x.mean(range(x.ndim - 1))) ** 2).sum()


def shrinkage(x: Array, reconstruction: Array) -> Array:
  """How long reconstructions are against the best multiple of them: 1 is best.

  Divided by it they would have the least squared error, so below 1 they are too
  short, as an l1 penalty makes them.

  Args:
    x: [..., width].
    reconstruction: as x.

  Returns:
    f32 scalar.

  Raises:
    ValueError: for shapes that differ.

  Example:
    >>> x = jnp.array([[1.0, 0.0], [0.0, 2.0]])
    >>> shrinkage(x, 0.5 * x).item()
    0.5

  Source: gated-sae, Improving Dictionary Learning with Gated Sparse
  Autoencoders, relative reconstruction bias.
  """
  x, reconstruction = _pair(x, reconstruction)
  return (reconstruction**2).sum() / (reconstruction * x).sum()


def loss_recovered(clean: Array, spliced: Array, ablated: Array) -> Array:
  """How much of the loss that an ablation costs a reconstruction wins back.

  1 where the reconstruction costs nothing, 0 where it is no better than the
  ablation. Losses of several batches count together: it is the ratio of their
  means.

  Args:
    clean: losses of the model as it is, a scalar or an array.
    spliced: as clean, with reconstructions spliced in; see `capture.splice`.
    ablated: as clean, with zeros, or the mean, in their place.

  Returns:
    f32 scalar.

  Raises:
    ValueError: for shapes that differ.

  Example:
    >>> loss_recovered(2.0, 3.0, 6.0).item()
    0.75
  """
  losses = [jnp.asarray(x, jnp.float32) for x in (clean, spliced, ablated)]
  if len({x.shape for x in losses}) > 1:
    raise ValueError(
      "clean, spliced and ablated must be losses of the same batches, got "
      f"shapes {[x.shape for x in losses]}"
    )
  clean, spliced, ablated = (x.mean() for x in losses)
  return (ablated - spliced) / (ablated - clean)


def mcc(dictionary: Array, truth: Array) -> Array:
  """How well atoms match the true ones, one to one: the mean of their cosines.

  The matching is the best there is, and a cosine counts without its sign.

  Args:
    dictionary: [latents, width], an atom a row.
    truth: [atoms, width]. The pairs are as many as the smaller one has rows.

  Returns:
    f32 scalar.

  Raises:
    ValueError: for widths that differ.

  Example:
    >>> truth = jnp.eye(3)[:2]
    >>> mcc(jnp.array([[0.0, -2.0, 0.0], [1.0, 0.0, 0.0]]), truth).item()
    1.0
  """
  if dictionary.ndim != 2 or dictionary.shape[1:] != truth.shape[1:]:
    raise ValueError(
      "dictionary and truth must be [latents, width] and [atoms, width], got "
      f"{dictionary.shape} and {truth.shape}"
    )
  cosines = jnp.matmul(_unit(dictionary), _unit(truth).T, precision="highest")
  cosines = jnp.abs(cosines)
  rows, columns = optax.assignment.hungarian_algorithm(-cosines)
  return cosines[rows, columns].mean()


def absorption(
  x: Array,
  code: Code | Array,
  dictionary: Array,
  probe: Array,
  present: Array,
  main: Array | Sequence[int],
  *,
  cosine_threshold: float = 0.025,
  share_threshold: float = 0.4,
) -> Array:
  """The share of the rows with a feature in which another latent stands for it.

  A feature, such as a first letter, has a direction and latents that stand for
  it. It is absorbed where these are all silent, and the latent that gives most
  along the direction is aligned with it and gives a good part of what x has.

  Args:
    x: [..., width], what the autoencoder read.
    code: of these rows, a Code, or dense latents [..., latents].
    dictionary: [latents, width], an atom a row.
    probe: [width], the feature's direction, of any length.
    present: bool of the leading dimensions of x: the rows that have the
      feature, and in which the probe finds it.
    main: the latents that stand for it; may be empty.
    cosine_threshold: least cosine of the other latent's atom and the probe.
    share_threshold: least share that it has of the product of x and the probe,
      above 0.

  Returns:
    f32 scalar; no number where no row has the feature.

  Raises:
    ValueError: for arguments that do not fit.

  Example:
    >>> parent, child = jnp.eye(2)
    >>> dictionary = jnp.array([[1.0, 0.0], [1.0, 1.0]])  # parent, child on it
    >>> x = jnp.array([[1.0, 0.0], [1.0, 1.0]])
    >>> present = jnp.array([True, True])
    >>> absorption(x, jnp.eye(2), dictionary, parent, present, [0]).item()
    0.5

  Source: A is for Absorption, section on the metric; SAEBench, which measures
  by projections in place of ablations, as here. Where a latent gives z times
  its atom's product with the probe, SAEBench takes the cosine: it is the same
  for atoms of length 1.
  """
  if not share_threshold > 0:
    raise ValueError(f"share_threshold must be above 0, got {share_threshold}")
  total, carried, cosines, is_main = _along(
    x, code, dictionary, probe, present, main
  )
  others = jnp.where(is_main, -jnp.inf, carried)
  most = others.max(-1, keepdims=True, initial=-jnp.inf)
  # Of equal ones the latent that comes first in the dictionary counts.
  latents = jnp.broadcast_to(_entries(code)[1], others.shape)
  first = jnp.where(others == most, latents, len(dictionary)).min(-1)
  silent = ~(is_main & (_entries(code)[0] != 0)).any(-1)
  aligned = cosines.at[first].get(mode="clip") >= cosine_threshold
  enough = most[..., 0] >= share_threshold * total
  absorbed = present & silent & (total > 0) & aligned & enough
  return _share(absorbed, present)


def absorption_fraction(
  x: Array,
  code: Code | Array,
  dictionary: Array,
  probe: Array,
  present: Array,
  main: Array | Sequence[int],
  *,
  cosine_threshold: float = 0.1,
  share_threshold: float = 0.4,
  most: int = 3,
) -> Array:
  """How much of a feature other latents take over, in part or whole.

  In each row with the feature it is the share that the `most` strongest other
  latents have of what they and the main ones give along its direction, as far
  as the main ones leave something to give; and 0 where the others give little.

  Args:
    x: as in `absorption`, as are all up to `share_threshold`.
    code: of these rows.
    dictionary: [latents, width].
    probe: [width].
    present: bool of the leading dimensions of x.
    main: the latents that stand for the feature.
    cosine_threshold: least cosine of another latent's atom and the probe.
    share_threshold: least share that the others have together.
    most: how many others count in a row.

  Returns:
    f32 scalar, the mean over the rows that have the feature.

  Raises:
    ValueError: for arguments that do not fit.

  Example:
    >>> parent, child = jnp.eye(2)
    >>> dictionary = jnp.array([[1.0, 0.0], [1.0, 1.0]])
    >>> x, code = jnp.array([[1.0, 0.5]]), jnp.array([[0.5, 0.5]])
    >>> present = jnp.array([True])
    >>> absorption_fraction(x, code, dictionary, parent, present, [0]).item()
    0.5

  Source: SAEBench, absorption fraction. As in `absorption`, products stand for
  cosines.
  """
  if isinstance(most, bool) or not isinstance(most, int) or most < 1:
    raise ValueError(f"most must be an integer of at least 1, got {most!r}")
  total, carried, cosines, is_main = _along(
    x, code, dictionary, probe, present, main
  )
  by_main = jnp.where(is_main, carried, 0).sum(-1)
  aligned = cosines[_entries(code)[1]] >= cosine_threshold
  others = jnp.where(aligned & ~is_main, jnp.maximum(carried, 0), 0)
  strongest, _ = lax.top_k(others, min(most, others.shape[-1]))
  by_others = strongest.sum(-1)
  taken = jnp.minimum(by_others, total - by_main)
  part = jnp.where(by_main > 0, taken / jnp.maximum(taken + by_main, _TINY), 1)
  none = (by_main >= total) | (by_others < share_threshold * total)
  part = jnp.where(none | (total <= 0) | ~present, 0, part)
  return _share(part, present)


def description_length(code: Code | Array, bin: float) -> Array:
  """Bits that it takes to say which latents of a row are active, and how much.

  Latents are coded one by one, each by the best code for how often it is active
  and for how often its value falls in each bin. Atoms are not counted.

  Args:
    code: a Code, or dense latents [..., latents].
    bin: the width of a bin; b is in bin `floor(b / bin)`.

  Returns:
    f32 scalar, bits a row.

  Raises:
    ValueError: for a bin that is not positive.

  Example:
    >>> z = jnp.array([[0.0, 1.0], [0.5, 1.0], [2.5, 1.0], [0.0, 1.0]])
    >>> description_length(z, 1.0).item()  # 1 bit whether, 1 of half the rows
    1.5
  """
  if not bin > 0:
    raise ValueError(f"bin must be positive, got {bin}")
  rows = math.prod(_rows(code))
  active = _active_rows(code)
  share = active / rows
  whether = _bits(share) + _bits(1 - share)
  return whether.sum() + automatic(_value_bits, code, bin, active) / rows


def ablate(code: Code | Array, latents: Array | Sequence[int] | int):
  """A code in which some latents are 0.

  Args:
    code: a Code, or dense latents [..., latents].
    latents: an index, or several.

  Returns:
    A code of the same kind.

  Raises:
    ValueError: for indices that are no integers, or that no latent has.

  Example:
    >>> ablate(jnp.array([[1.0, 2.0, 3.0]]), [0, 2]).tolist()
    [[0.0, 2.0, 0.0]]
  """
  latents = jnp.asarray(latents)
  if not jnp.issubdtype(latents.dtype, jnp.integer):
    raise ValueError(f"latents must be integers, got {latents.dtype}")
  many = code.latents if isinstance(code, Code) else code.shape[-1]
  known = not isinstance(latents, jax.core.Tracer)
  if known and not ((latents >= 0) & (latents < many)).all():
    raise ValueError(f"latents must be from 0 to {many - 1}, got {latents}")
  if isinstance(code, Code):
    gone = jnp.isin(code.indices, latents)
    return dataclasses.replace(code, values=jnp.where(gone, 0, code.values))
  return jnp.where(jnp.isin(jnp.arange(code.shape[-1]), latents), 0, code)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Statistics:
  """What the metrics of many batches are made of, as sums over all rows.

  Attributes:
    rows: int32 scalar, how many so far.
    active: int32 [latents], in how many of them each latent was active.
    mean: f32 [width], of x.
    spread: f32 scalar, the sum of the squared distances of x from its mean.
    error: f32 scalar, of the squared errors.
    squares: f32 scalar, of the squares of the reconstruction.
    products: f32 scalar, of its products with x.

  Example:
    >>> x = jnp.array([[1.0, 0.0], [0.0, 3.0]])
    >>> found = Statistics.zeros(width=2, latents=4)
    >>> for scale in (1.0, 2.0):
    ...   code = Code(jnp.ones((2, 1)), jnp.array([[0], [1]]), 4)
    ...   found = found.add(scale * x, 0.5 * scale * x, code)
    >>> found.l0.item(), found.density.tolist(), found.shrinkage.item()
    (1.0, [0.5, 0.5, 0.0, 0.0], 0.5)
  """

  rows: Array
  active: Array
  mean: Array
  spread: Array
  error: Array
  squares: Array
  products: Array

  @classmethod
  def zeros(cls, width: int, latents: int) -> "Statistics":
    """Those of no rows."""
    zero, mean = jnp.zeros((), jnp.float32), jnp.zeros(width, jnp.float32)
    # Counts in f32 would stop at 2**24.
    rows, active = jnp.zeros((), jnp.int32), jnp.zeros(latents, jnp.int32)
    return cls(rows, active, mean, zero, zero, zero, zero)

  def add(
    self,
    x: Array,
    reconstruction: Array,
    code: Code | Array,
    valid: Array | None = None,
  ) -> "Statistics":
    """With the rows of a further batch.

    Args:
      x: [..., width].
      reconstruction: as x.
      code: a Code, or dense latents, of the same rows.
      valid: None, or bool of the leading dimensions of x: which rows count
        (padding does not).

    Returns:
      The statistics of all rows.

    Raises:
      ValueError: for shapes that do not fit.
    """
    lead, axes = x.shape[:-1], range(x.ndim - 1)
    if _rows(code) != lead or (valid is not None and valid.shape != lead):
      given = None if valid is None else valid.shape
      raise ValueError(
        f"code and valid must have the rows of x, {lead}, got {_rows(code)} "
        f"and {given}"
      )
    x, reconstruction = _pair(x, reconstruction)
    active = _active_rows(code, valid)
    count = jnp.int32(math.prod(lead))
    if valid is not None:
      kept = valid[..., None]
      x, reconstruction = (jnp.where(kept, y, 0) for y in (x, reconstruction))
      count = kept.sum(dtype=jnp.int32)
    # By the batch's own mean: squares less the square of the mean would lose
    # all digits where the mean is large.
    rows = self.rows + count
    mean = x.sum(axes) / jnp.maximum(count, 1)
    around = x - mean if valid is None else jnp.where(kept, x - mean, 0)
    weight = count.astype(jnp.float32) / jnp.maximum(rows, 1)
    apart = mean - self.mean
    between = self.rows * weight * (apart**2).sum()
    return Statistics(
      rows=rows,
      active=self.active + active.astype(jnp.int32),
      mean=self.mean + weight * apart,
      spread=self.spread + (around**2).sum() + between,
      error=self.error + ((x - reconstruction) ** 2).sum(),
      squares=self.squares + (reconstruction**2).sum(),
      products=self.products + (reconstruction * x).sum(),
    )

  @property
  def density(self) -> Array:
    """See `density`."""
    return self.active.astype(jnp.float32) / self.rows

  @property
  def l0(self) -> Array:
    """See `l0`."""
    return self.density.sum()

  @property
  def explained_variance(self) -> Array:
    """See `explained_variance`."""
    return 1 - self.error / self.spread

  @property
  def shrinkage(self) -> Array:
    """See `shrinkage`."""
    return self.squares / self.products


def _along(x, code, dictionary, probe, present, main):
  """What x has along a probe, what its latents give there, all atoms' cosines
  with it, and which latents are main ones."""
  main = jnp.asarray(main, None if len(main) else jnp.int32)
  lead, width = x.shape[:-1], x.shape[-1]
  if not jnp.issubdtype(main.dtype, jnp.integer):
    raise ValueError(f"main must be integers, got {main.dtype}")
  if probe.shape != (width,) or dictionary.shape[1:] != (width,):
    raise ValueError(
      f"probe and dictionary must have the width of x, {width}, got "
      f"{probe.shape} and {dictionary.shape}"
    )
  if _rows(code) != lead or present.shape != lead or present.dtype != bool:
    raise ValueError(
      f"code and present, which is bool, must have the rows of x, {lead}, got "
      f"{_rows(code)} and {present.dtype}{present.shape}"
    )
  along = functools.partial(jnp.matmul, precision="highest")
  probe = _unit(probe)
  values, latents = _entries(code)
  total = along(x.astype(jnp.float32), probe)
  carried = values * along(dictionary.astype(jnp.float32), probe)[latents]
  cosines = along(_unit(dictionary), probe)
  return total, carried, cosines, jnp.isin(latents, main)


def _share(parts, rows):
  """The mean over some of the rows."""
  return parts.sum(dtype=jnp.float32) / rows.sum(dtype=jnp.float32)


def _entries(code):
  """The values that are listed, f32 [..., k], and of which latents."""
  values = _values(code).astype(jnp.float32)
  listed = isinstance(code, Code)
  return values, code.indices if listed else jnp.arange(values.shape[-1])


def _values(code):
  return jnp.asarray(code.values if isinstance(code, Code) else code)


def _rows(code):
  """The leading dimensions of a code."""
  return _values(code).shape[:-1]


def _active_rows(code, valid=None):
  """In how many rows each latent is active, f32."""
  active = _values(code) != 0
  if valid is not None:
    active &= valid[..., None]
  if not isinstance(code, Code):
    return active.sum(range(active.ndim - 1), dtype=jnp.float32)
  zeros = jnp.zeros(code.latents, jnp.float32)
  return automatic(lambda i, a: zeros.at[i].add(a), code.indices, active)


def _pair(x, reconstruction):
  """Both in f32."""
  if x.shape != reconstruction.shape:
    raise ValueError(
      f"x and reconstruction must have the same shape, got {x.shape} and "
      f"{reconstruction.shape}"
    )
  return tuple(jnp.asarray(y, jnp.float32) for y in (x, reconstruction))


def _unit(atoms):
  """Atoms of length 1; those of length 0 stay."""
  atoms = atoms.astype(jnp.float32)
  norms = jnp.linalg.norm(atoms, axis=-1, keepdims=True)
  return atoms / jnp.where(norms > 0, norms, 1)


def _bits(share):
  """What an event with this share adds to an entropy."""
  return -share * jnp.log2(jnp.where(share > 0, share, 1))


def _value_bits(code, bin, active):
  """The bits of all values: those of a bin with c of a latent's n are
  log2(n / c)."""
  values, latents = _entries(code)
  latents = jnp.broadcast_to(latents, values.shape).ravel()
  values = values.ravel()
  bins = jnp.floor(values / bin)
  # What is not active comes last, as if of one more latent.
  latents = jnp.where(values != 0, latents, len(active))
  order = jnp.lexsort((bins, latents))
  latents, bins = latents[order], bins[order]
  new = (jnp.diff(latents) != 0) | (jnp.diff(bins) != 0)
  run = jnp.cumsum(jnp.pad(new, (1, 0)))
  equal = jnp.zeros(run.shape, jnp.float32).at[run].add(1)[run]
  bits = jnp.log2(active.at[latents].get(mode="clip") / equal)
  return jnp.where(latents < len(active), bits, 0).sum()
