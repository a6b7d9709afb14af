"""Thresholds of activations, calibrated to a sparsity.

`calibrate` reads what a model's layers read, and `sparsified` runs the model
with what is below the thresholds zeroed (TEAL). `chess_thresholds` gives each
neuron of a gated network its own, after `Magnitudes` of the importances.
"""

from collections.abc import Callable, Iterable, Mapping
import dataclasses
import functools
from typing import Any

from flax import linen
from flax import nnx
import jax
from jax import lax
import jax.numpy as jnp

from sparsejax import capture
from sparsejax.automatic import automatic

Array = jax.Array

_BINS = 2**15  # the numbers of bf16 that are not negative
_INFINITE = 0x7F80  # the bin of infinity


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Magnitudes:
  """How often sizes were seen, over any number of batches.

  A bin goes from one number of bf16 to the next, so that a quantile is right to
  one part in 128, and what is between is taken for evenly spread.

  Attributes:
    counts: uint32 [32768], which hold fewer than 2^32 sizes in all.
  """

  counts: Array

  @classmethod
  def zeros(cls) -> "Magnitudes":
    """Those of nothing."""
    return cls(jnp.zeros(_BINS, jnp.uint32))

  def add(self, x: Array, valid: Array | None = None) -> "Magnitudes":
    """With further sizes.

    Args:
      x: floating, of any shape. NaN does not count.
      valid: None, or bool of x's first dimensions: what counts.

    Returns:
      The sizes of all; on Explicit axes they lie whole on every device.

    Raises:
      ValueError: x is not floating, or valid is not of its first dimensions.

    >>> sizes = Magnitudes.zeros().add(jnp.array([1.0, -2.0, 3.0, -4.0]))
    >>> 2 <= sizes.quantile(0.5).item() <= 2 + 2 / 128
    True
    """
    if not jnp.issubdtype(x.dtype, jnp.floating):
      raise ValueError(f"x must be floating, got {x.dtype}")
    if valid is not None and valid.shape != x.shape[: valid.ndim]:
      raise ValueError(
        f"valid must be of the first dimensions of x, {x.shape}, got "
        f"{valid.shape}"
      )

    def count(counts, x, valid):
      sizes = jnp.abs(x.astype(jnp.float32))
      bins = lax.bitcast_convert_type(sizes, jnp.uint32) >> 16
      counted = ~jnp.isnan(sizes)
      if valid is not None:
        lead = (*valid.shape, *(1,) * (x.ndim - valid.ndim))
        counted &= valid.reshape(lead)
      # What does not count goes behind the last bin, and is dropped.
      bins = jnp.where(counted, bins, _BINS)
      return counts.at[bins.reshape(-1)].add(1, mode="drop")

    return Magnitudes(automatic(count, self.counts, x, valid))

  def merge(self, other: "Magnitudes") -> "Magnitudes":
    """The sizes of both."""
    return Magnitudes(self.counts + other.counts)

  def quantile(self, sparsity: float | Array) -> Array:
    """The size that a share of what was seen does not exceed.

    Args:
      sparsity: from 0 to 1; a traced one is clamped.

    Returns:
      f32 scalar: 0 for a sparsity of 0 and where nothing was seen.

    Raises:
      ValueError: for a sparsity out of range.
    """
    if not isinstance(sparsity, jax.core.Tracer) and not 0 <= sparsity <= 1:
      raise ValueError(f"sparsity must be in [0, 1], got {sparsity}")
    sparsity = jnp.clip(jnp.float32(sparsity), 0, 1)
    reached = jnp.cumsum(self.counts).astype(jnp.float32)
    target = sparsity * reached[-1]
    full = (reached >= target) & (self.counts > 0)
    at = jnp.argmax(full)
    count = self.counts[at].astype(jnp.float32)
    share = 1 - (reached[at] - target) / jnp.maximum(count, 1)
    low, high = _edge(at), _edge(jnp.minimum(at + 1, _INFINITE - 1))
    between = jnp.where(at < _INFINITE - 1, low + share * (high - low), low)
    return jnp.where((sparsity > 0) & (reached[-1] > 0), between, 0)


def _edge(bins):
  """Where a bin begins."""
  return lax.bitcast_convert_type(bins.astype(jnp.uint32) << 16, jnp.float32)


def keep_above(x: Array, threshold: float | Array) -> Array:
  """Zeroes what is at most a threshold in size.

  Gradients pass through what is kept alone; the threshold has none.

  Args:
    x: floating [..., neurons].
    threshold: a number, or one for each neuron; 0 changes nothing.

  Returns:
    Like x. NaN stays.

  Raises:
    ValueError: x is not floating, or thresholds of another number of neurons.

  Example:
    >>> keep_above(jnp.array([3.0, -1.0, -2.0]), 1.0).tolist()
    [3.0, 0.0, -2.0]

  Source: top-k-activation, Training-Free Activation Sparsity in Large Language
  Models, section 4; also CATS, and chess, whose code keeps what is equal, too.
  """
  if not jnp.issubdtype(x.dtype, jnp.floating):
    raise ValueError(f"x must be floating, got {x.dtype}")
  if jnp.ndim(threshold) and jnp.shape(threshold) != x.shape[-1:]:
    raise ValueError(
      f"threshold must be a number or [{x.shape[-1]}], got "
      f"{jnp.shape(threshold)}"
    )
  size = jnp.abs(x).astype(jnp.float32)
  return jnp.where(lax.stop_gradient(size <= threshold), 0, x)


def chess_thresholds(limit: float | Array, magnitude: Array) -> Array:
  """A threshold for each neuron's gate: the limit by what its up gives.

  The importance of a gate is its size times the mean size of its neuron's
  up-projection. The limit is a quantile of the importances of all neurons.

  Args:
    limit: at least 0, such as `Magnitudes.zeros().add(gate *
      magnitude).quantile(0.5)`.
    magnitude: f32 [neurons], the mean size of each up-projection, as
      `Activity.magnitude` has it.

  Returns:
    f32 [neurons], for `keep_above` of the activated gate. Infinite for a neuron
    whose up-projection is always 0, unless the limit is 0; NaN, at which
    everything is kept, where a magnitude is.

  Raises:
    ValueError: magnitude is not [neurons].

  Example:
    >>> chess_thresholds(3.0, jnp.array([4.0, 1.0, 0.0])).tolist()
    [0.75, 3.0, inf]

  Source: chess, CHESS: Optimizing LLM Inference via Channel-Wise Thresholding
  and Selective Sparsification, section 3.2.
  """
  if magnitude.ndim != 1:
    raise ValueError(f"magnitude must be [neurons], got {magnitude.shape}")
  magnitude = magnitude.astype(jnp.float32)
  silent = magnitude == 0
  found = jnp.where(silent, jnp.inf, limit / jnp.where(silent, 1, magnitude))
  return jnp.where(jnp.asarray(limit) > 0, found, 0)


def calibrate(
  call: Callable[..., Any],
  model: Any,
  batches: Iterable[Any],
  sparsity: float | Callable[[str], float],
  *,
  where: Callable[[str], bool] | None = None,
  valid: Callable[[Any], Array] | None = None,
) -> dict[str, Array]:
  """Thresholds at which a share of what each layer reads is zeroed.

  Args:
    call: function of the model and a batch; see `capture.inputs`.
    model: an `nnx.Module`, or the variables of a Linen module.
    batches: pytrees of arrays, of equal shapes.
    sparsity: from 0 to 1; or a function of the kernel's name.
    where: which layers, by the kernel's name; default all.
    valid: None, or a function of a batch: bool, of the leading dimensions of
      the inputs: which tokens count (padding does not).

  Returns:
    f32 scalars by the kernel's name, for `sparsified`.

  Raises:
    ValueError: there are no batches, no layers, or a sparsity is out of range.

  Example:
    >>> from flax import nnx
    >>> model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    >>> run = lambda model, x: model(x)
    >>> batches = [jnp.array([[1.0, -2.0], [3.0, 4.0]])]
    >>> calibrate(run, model, batches, 0.0)["kernel"].item()
    0.0

  Source: top-k-activation, Training-Free Activation Sparsity in Large Language
  Models, section 4. The quantile is of sizes; the paper's code takes the one of
  signed values, as if they were symmetric about zero. How much each layer
  gives, which the paper searches greedily, is the caller's `sparsity`.
  """
  rebuild, arrays = (
    nnx.split(model) if isinstance(model, nnx.Module) else (None, model)
  )
  static, found = (call, rebuild, where, valid), None
  for batch in batches:
    if found is None:
      # That the first batch goes through the program of the others.
      names = _seen.eval_shape(static, arrays, None, batch)
      found = {name: Magnitudes.zeros() for name in names}
    found = _seen(static, arrays, found, batch)
  if found is None:
    raise ValueError("batches must hold at least one batch, got none")
  of = sparsity if callable(sparsity) else lambda name: sparsity
  return {name: sizes.quantile(of(name)) for name, sizes in found.items()}


# Calls with the same functions compile once.
@functools.partial(jax.jit, static_argnums=0)
def _seen(static, model, found, batch):
  """The sizes with those of a batch."""
  call, rebuild, where, valid = static
  model = model if rebuild is None else nnx.merge(rebuild, model)
  _, xs = capture.inputs(call, model, batch, where=where)
  tokens = None if valid is None else valid(batch)
  found = found or {name: Magnitudes.zeros() for name in xs}
  return {name: found[name].add(x, tokens) for name, x in xs.items()}


def sparsified(
  call: Callable[..., Any],
  model: Any,
  thresholds: Mapping[str, float | Array],
  *args: Any,
) -> Any:
  """`call(model, *args)`, with the inputs of some layers thresholded.

  The products stay dense: this says what a model is worth at a sparsity, and
  trains it so. `sparse_matmul` is what makes it fast. Nothing of `model`
  changes. What cannot be seen is as for `capture.inputs`.

  Args:
    call: function of the model and `args`.
    model: an `nnx.Module`, or the variables of a Linen module.
    thresholds: by the kernel's name, as `calibrate` gives them.
    *args: whatever `call` takes besides.

  Returns:
    The outputs of the call.

  Raises:
    ValueError: a name of which the call runs no layer.

  Example:
    >>> from flax import nnx
    >>> model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    >>> run = lambda model, x: model(x)
    >>> sparsified(run, model, {"kernel": 9.0}, jnp.ones(2)).tolist()
    [0.0, 0.0, 0.0]

  Source: top-k-activation, Training-Free Activation Sparsity in Large Language
  Models, section 4.
  """
  ran = {}  # in the order of the calls

  def change(name, x):
    ran[name] = None
    return keep_above(x, thresholds[name]) if name in thresholds else x

  if isinstance(model, nnx.Module):
    model = nnx.clone(model)
    for path, layer in nnx.iter_graph(model):
      if hasattr(layer, "kernel") and hasattr(layer, "dot_general"):
        name = "/".join(map(str, (*path, "kernel")))
        layer.dot_general = _changed(name, layer.dot_general, change)
    result = call(model, *args)
  else:

    def intercept(method, args, kwargs, context):
      layer = context.module
      if context.method_name == "__call__" and isinstance(
        layer, linen.Dense | linen.DenseGeneral
      ):
        x, *rest = args
        x = change("/".join((*layer.path, "kernel")), jnp.asarray(x))
        args = (x, *rest)
      return method(*args, **kwargs)

    with linen.intercept_methods(intercept):
      result = call(model, *args)
  if unknown := [name for name in thresholds if name not in ran]:
    raise ValueError(
      f"thresholds must name layers that the call runs, {[*ran]}, got {unknown}"
    )
  return result


def _changed(name, dot_general, change):
  dot_general = dot_general or lax.dot_general

  def dot(x, kernel, *args, **options):
    return dot_general(change(name, x), kernel, *args, **options)

  return dot
