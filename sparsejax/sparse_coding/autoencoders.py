"""Sparse autoencoders: an encoder, a sparsifier, a dictionary, named losses."""

from collections.abc import Callable, Mapping
import dataclasses
import functools
import math
from typing import Any

from flax import nnx
import jax
from jax import lax
import jax.numpy as jnp

from sparsejax.sparse_coding import codes
from sparsejax.sparse_coding import sparsifiers

Array = jax.Array
Code = codes.Code | Array


@dataclasses.dataclass(frozen=True)
class Pass:
  """What a term of the loss may look at.

  Attributes:
    autoencoder: the module.
    target: what is to be reconstructed, [rows, ...].
    pre: pre-activations [rows, latents]; a function, as not every loss
      asks for them.
    code: of the rows.
    reconstruction: like target.
    key: None, or a PRNG key.
  """

  autoencoder: "Autoencoder"
  target: Array
  pre: Callable[[], Array]
  code: Code
  reconstruction: Array
  key: Array | None


class Autoencoder(nnx.Module):
  """A sparse autoencoder, or a transcoder where `outputs` is given.

  The code is `sparsifier((x - bias) @ kernel.T + encoder_bias)`, the
  reconstruction `code @ dictionary + bias`. With a `solver` in the place of the
  sparsifier there is no encoder: the code is `solver(dictionary, x - bias)`.

  Kernel and dictionary hold a latent a row. They begin equal, with rows of
  unit norm.

  Args:
    width: of inputs.
    latents: how many.
    sparsifier: see `sparsifiers`; default ReLU.
    solver: in its place, such as `functools.partial(omp, k=8)`.
    losses: weights of the terms of the loss, which are functions of a Pass;
      default the squared error alone.
    score: None, or a function of the dictionary and of the gradient that
      `encode` is given, to `scores` for the sparsifier.
    tied: whether the dictionary is the kernel as well.
    outputs: None, or the width of what is to be reconstructed from the inputs,
      which may be another layer's; the inputs then keep their mean.
    skip: whether the reconstruction also has a linear function of the inputs,
      zero at first.
    latent_metadata: of kernel and dictionary, as Flax's layers take
      `kernel_metadata`: {"out_sharding": ("latents", None)} divides latents
      over that axis of the mesh.
    dtype: of the parameters.
    rngs: for the first dictionary.

  Example:
    >>> from flax import nnx
    >>> from sparsejax import sparse_coding
    >>> sae = sparse_coding.Autoencoder(
    ...   8, 32, sparse_coding.TopK(4), rngs=nnx.Rngs(0)
    ... )
    >>> x = jnp.ones((5, 8))
    >>> sae(x).shape, sae.encode(x).values.shape
    ((5, 8), (5, 4))
    >>> loss, parts = sae.loss(x)
    >>> list(parts)
    ['squared_error']
  """

  def __init__(
    self,
    width: int,
    latents: int,
    sparsifier: sparsifiers.Sparsifier | None = None,
    *,
    solver: Callable[[Array, Array], Code] | None = None,
    losses: Mapping[Callable[[Pass], Array], float] | None = None,
    score: Callable[[Array, Array | None], Callable] | None = None,
    tied: bool = False,
    outputs: int | None = None,
    skip: bool = False,
    latent_metadata: Mapping[str, Any] | None = None,
    dtype=jnp.float32,
    rngs: nnx.Rngs,
  ):
    _check_positive(width=width, latents=latents)
    if solver is not None and (sparsifier is not None or tied or score):
      raise ValueError(
        "solver takes the place of sparsifier, tied and score, got "
        f"{sparsifier}, {tied} and {score}"
      )
    if sparsifier is None and solver is None:
      sparsifier = sparsifiers.ReLU()
    if score is not None and not sparsifier.ranks:
      raise ValueError(
        f"score goes with a sparsifier that ranks, such as TopK, got "
        f"{type(sparsifier).__name__}"
      )
    if tied and outputs is not None:
      raise ValueError(f"tied goes without outputs, got {outputs}")
    to = width if outputs is None else outputs
    _check_positive(outputs=to)
    metadata = dict(latent_metadata or {})
    atoms = jax.random.normal(rngs.params(), (latents, to), dtype)
    atoms /= jnp.linalg.norm(atoms, axis=1, keepdims=True)
    self.dictionary = nnx.Param(atoms, **metadata)
    kernel = bias = None
    if solver is None and not tied:
      kernel = atoms
      if outputs is not None:
        kernel = jax.random.normal(rngs.params(), (latents, width), dtype)
        kernel /= jnp.linalg.norm(kernel, axis=1, keepdims=True)
      kernel = nnx.Param(kernel, **metadata)
    if solver is None and sparsifier.encoder_bias:
      bias = nnx.Param(jnp.zeros(latents, dtype))
    self.kernel, self.encoder_bias = kernel, bias
    self.bias = nnx.Param(jnp.zeros(to, dtype))
    self.skip = nnx.Param(jnp.zeros((width, to), dtype)) if skip else None
    self.sparsifier, self.solver, self.score = sparsifier, solver, score
    self.losses = tuple((losses or {squared_error: 1.0}).items())
    names = [name(term) for term, _ in self.losses]
    if len(set(names)) < len(names):
      raise ValueError(f"losses must have names of their own, got {names}")
    self.width, self.latents, self.outputs = width, latents, to
    self.centers = outputs is None
    # Rows since each latent was last active.
    self.idle = sparsifiers.LatentStatistic(jnp.zeros(latents, jnp.int32))
    self.use_running_average = False

  def __call__(self, x: Array) -> Array:
    """The reconstruction, [..., outputs], of inputs [..., width]."""
    return self._decoded(self.encode(x), x)

  def encode(self, x: Array, *, gradient: Array | None = None) -> Code:
    """The code of inputs.

    Args:
      x: floating [..., width].
      gradient: None, or like x, for `score` to look at.

    Returns:
      A Code, or dense latents [..., latents].

    Raises:
      ValueError: for inputs of another width.
    """
    centered = self._centered(x)
    if self.solver is not None:
      return self.solver(self.dictionary[...], centered)
    scores = None
    if self.score is not None:
      scores = self.score(lax.stop_gradient(self.dictionary[...]), gradient)
    elif gradient is not None:
      raise ValueError("gradient goes with a score that looks at it")
    bias = None if self.encoder_bias is None else self.encoder_bias[...]
    return self.sparsifier.encode(centered, self._kernel(), bias, scores)

  def pre(self, x: Array) -> Array:
    """Pre-activations [..., latents] of inputs [..., width]."""
    if self.solver is not None:
      raise ValueError("pre-activations are an encoder's; this has a solver")
    pre = self._centered(x) @ self._kernel().T
    return pre if self.encoder_bias is None else pre + self.encoder_bias[...]

  def decode(self, code: Code) -> Array:
    """[..., outputs] of a Code or of dense latents; without what skips."""
    return codes.decode(code, self.dictionary[...]) + self.bias[...]

  def norms(self) -> Array:
    """f32 [latents], of the atoms."""
    return jnp.linalg.norm(self.dictionary[...].astype(jnp.float32), axis=-1)

  def loss(
    self,
    x: Array,
    *,
    target: Array | None = None,
    gradient: Array | None = None,
    key: Array | None = None,
    weights: Mapping[str, Array | float] | None = None,
  ) -> tuple[Array, dict[str, Array]]:
    """The weighted sum of the terms, and each of them unweighted.

    Counts how long latents have been idle, unless `eval()` was called.

    Args:
      x: floating [..., width].
      target: what is to be reconstructed, [..., outputs]; default x.
      gradient: as `encode` takes it.
      key: for terms that draw.
      weights: by name, in place of those of the module; they may be traced.

    Returns:
      f32 scalar, and f32 scalars by the names of the terms.

    Raises:
      ValueError: for arguments that do not fit each other.
    """
    if target is None and not self.centers:
      raise ValueError("target must be given to a transcoder")
    target = x if target is None else target
    if target.shape != (*x.shape[:-1], self.outputs):
      raise ValueError(
        f"target must be {[*x.shape[:-1], self.outputs]}, got "
        f"{list(target.shape)}"
      )
    x = x.reshape(-1, x.shape[-1])
    target = target.reshape(-1, self.outputs)
    if gradient is not None:
      gradient = gradient.reshape(-1, gradient.shape[-1])
    unknown = set(weights or {}) - {name(term) for term, _ in self.losses}
    if unknown:
      raise ValueError(
        f"weights must name terms of {[name(t) for t, _ in self.losses]}, got "
        f"{sorted(unknown)}"
      )
    code = self.encode(x, gradient=gradient)
    found = Pass(
      autoencoder=self,
      target=target,
      pre=lambda: self.pre(x),
      code=code,
      reconstruction=self._decoded(code, x),
      key=key,
    )
    total, parts = jnp.zeros(()), {}
    for term, weight in self.losses:
      parts[name(term)] = value = term(found).astype(jnp.float32)
      total += (weights or {}).get(name(term), weight) * value
    if not self.use_running_average:
      self.idle[...] = _idle(self.idle[...], code)
    return total, parts

  def _decoded(self, code, x):
    y = self.decode(code)
    return y if self.skip is None else y + x @ self.skip[...]

  def _kernel(self):
    return (self.dictionary if self.kernel is None else self.kernel)[...]

  def _centered(self, x):
    if not x.ndim or x.shape[-1] != self.width:
      raise ValueError(f"x must be [..., {self.width}], got {list(x.shape)}")
    if not jnp.issubdtype(x.dtype, jnp.floating):
      raise ValueError(f"x must be floating, got {x.dtype}")
    return x - self.bias[...] if self.centers else x


class Crosscoder(Autoencoder):
  """One code for several sites of a model, which each have atoms of their own.

  Args:
    sites: how many; inputs and reconstructions are [..., sites, width].
    width: of a site.
    latents: how many.
    sparsifier: as `Autoencoder` takes it.
    **settings: likewise.

  Example:
    >>> from flax import nnx
    >>> from sparsejax import sparse_coding
    >>> both = sparse_coding.Crosscoder(
    ...   2, 8, 32, sparse_coding.TopK(4), rngs=nnx.Rngs(0)
    ... )
    >>> both(jnp.ones((5, 2, 8))).shape
    (5, 2, 8)
  """

  def __init__(
    self,
    sites: int,
    width: int,
    latents: int,
    sparsifier: sparsifiers.Sparsifier | None = None,
    **settings,
  ):
    _check_positive(sites=sites, width=width)
    super().__init__(sites * width, latents, sparsifier, **settings)
    self.site = (sites, width)

  def __call__(self, x: Array) -> Array:
    """The reconstruction, like the inputs [..., sites, width]."""
    return super().__call__(self._flat(x)).reshape(x.shape)

  def encode(self, x: Array, **given) -> Code:
    """The code of inputs [..., sites, width]."""
    return super().encode(self._flat(x), **given)

  def loss(self, x: Array, **given) -> tuple[Array, dict[str, Array]]:
    """As of an Autoencoder, of inputs [..., sites, width]."""
    return super().loss(self._flat(x), **given)

  def norms(self) -> Array:
    """f32 [latents], the sum of an atom's norms at the sites."""
    atoms = self.dictionary[...].astype(jnp.float32)
    atoms = atoms.reshape(len(atoms), *self.site)
    return jnp.linalg.norm(atoms, axis=-1).sum(-1)

  def _flat(self, x):
    return x.reshape(*x.shape[:-2], -1) if x.shape[-2:] == self.site else x


def squared_error(found: Pass) -> Array:
  """The squared error of a row, summed over its width; the mean of rows."""
  error = (found.reconstruction - found.target).astype(jnp.float32)
  return (error**2).sum(-1).mean()


def name(term: Callable[[Pass], Array]) -> str:
  """What a term of the loss is called: as its function or its class is."""
  if isinstance(term, functools.partial):
    term = term.func
  return getattr(term, "__name__", None) or type(term).__name__


def _idle(idle, code):
  """Rows since each latent was last active, after a code of further rows."""
  if isinstance(code, codes.Code):
    hits = (code.values != 0).reshape(-1)
    active = jnp.zeros(idle.shape, bool)
    active = active.at[code.indices.reshape(-1)].max(hits)
    rows = math.prod(code.values.shape[:-1])
  else:
    active = (code != 0).reshape(-1, code.shape[-1]).any(0)
    rows = math.prod(code.shape[:-1])
  # Not beyond what an int32 holds.
  return jnp.where(active, 0, jnp.minimum(idle, 2**30) + rows)


def _check_positive(**values):
  for argument, value in values.items():
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
      raise ValueError(f"{argument} must be a positive integer, got {value!r}")
