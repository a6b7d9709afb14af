"""Sparse autoencoders: an encoder, a sparsifier, a dictionary, named losses."""

from collections.abc import Callable, Mapping
import dataclasses
import math
from typing import Any

from flax import nnx
import jax
from jax import lax
import jax.numpy as jnp

from sparsejax.sparse_coding import codes
from sparsejax.sparse_coding import losses as terms
from sparsejax.sparse_coding import sparsifiers

Array = jax.Array
Code = codes.Code | Array


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
      default the squared error alone. See `losses`.
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
    losses: Mapping[Callable[[terms.Pass], Array], float] | None = None,
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
      kernel = jnp.copy(atoms)  # or donating both would donate one twice
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
    self.losses = tuple((losses or {terms.squared_error: 1.0}).items())
    names = [terms.name(term) for term, _ in self.losses]
    if len(set(names)) < len(names):
      raise ValueError(f"losses must have names of their own, got {names}")
    self.width, self.latents, self.outputs = width, latents, to
    self.shapes = (width,), (to,)  # of inputs and of reconstructions
    self.centers = outputs is None
    # Rows since each latent was last active.
    self.idle = sparsifiers.LatentStatistic(jnp.zeros(latents, jnp.int32))
    self.use_running_average = False

  def __call__(self, x: Array) -> Array:
    """The reconstruction, [..., outputs], of inputs [..., width]."""
    return self._shaped(self._made(self.encode(x), x))

  def encode(self, x: Array, *, gradient: Array | None = None) -> Code:
    """The code of inputs.

    Args:
      x: floating [..., width].
      gradient: None, or like x, for `score` to look at.

    Returns:
      A Code, or dense latents [..., latents].

    Raises:
      ValueError: for inputs of another width, or a gradient nobody looks at.
    """
    centered = self._centered(x)
    self._check_gradient(gradient, x)
    scores = None
    if self.score is not None:
      if gradient is not None:
        gradient = self._flat(gradient)
      scores = self.score(lax.stop_gradient(self.dictionary[...]), gradient)
    if self.solver is not None:
      return self.solver(self.dictionary[...], centered)
    return self.sparsifier.encode(centered, *self._encoder(), scores)

  def encode_among(self, x: Array, among: Array, k: int) -> codes.Code:
    """A Code of the k largest positive pre-activations of some latents.

    Args:
      x: floating [..., width].
      among: bool [latents]; where fewer are True the rest of the values are 0.
      k: of a row, static.
    """
    score = lambda pre: jnp.where(among, pre, -jnp.inf)
    centered, (kernel, bias) = self._centered(x), self._encoder()
    if bias is None:
      bias = jnp.zeros(self.latents, kernel.dtype)
    code = codes.encode_top_k(centered, kernel, bias, k, scores=score)
    values = jnp.where(among[code.indices], code.values, 0)
    return dataclasses.replace(code, values=values)

  def pre(self, x: Array) -> Array:
    """Pre-activations [..., latents] of inputs [..., width]."""
    kernel, bias = self._encoder()
    pre = self._centered(x) @ kernel.T
    return pre if bias is None else pre + bias

  def decode(self, code: Code) -> Array:
    """[..., outputs] of a Code or of dense latents; without what skips."""
    return self._shaped(self._atoms(code) + self.bias[...])

  def offset(self, x: Array) -> Array:
    """What reconstructions have beside atoms: the bias, and what skips."""
    if self.skip is None:
      return self.bias[...]
    return self.bias[...] + self._flat(x) @ self.skip[...]

  def norms(self) -> Array:
    """f32 [latents], of the atoms."""
    return _norms(self.dictionary[...])

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
    names = [terms.name(term) for term, _ in self.losses]
    unknown = sorted(set(weights or {}) - set(names))
    if unknown:
      raise ValueError(f"weights must name terms of {names}, got {unknown}")
    self._check_gradient(gradient, x)
    target = self._flat(x if target is None else target, "target", 1)
    lead = self._flat(x).shape[:-1]
    if target.shape[:-1] != lead:
      raise ValueError(
        f"target must be {[*lead, *self.shapes[1]]}, got leading axes "
        f"{list(target.shape[:-1])}"
      )
    # A row each, whatever the leading axes.
    target = target.reshape(-1, self.outputs)
    x, gradient = jax.tree.map(
      lambda x: x.reshape(-1, *self.shapes[0]), (x, gradient)
    )
    code = self.encode(x, gradient=gradient)
    found = terms.Pass(
      autoencoder=self,
      inputs=x,
      target=target,
      code=code,
      reconstruction=self._made(code, x),
      key=key,
    )
    total, parts = jnp.zeros(()), {}
    for name, (term, weight) in zip(names, self.losses):
      parts[name] = value = term(found).astype(jnp.float32)
      total += (weights or {}).get(name, weight) * value
    if not self.use_running_average:
      self.idle[...] = _idle(self.idle[...], code)
    return total, parts

  def _atoms(self, code):
    return codes.decode(code, self.dictionary[...])

  def _made(self, code, x):
    return self._atoms(code) + self.offset(x)

  def _kernel(self):
    return (self.dictionary if self.kernel is None else self.kernel)[...]

  def _encoder(self):
    if self.solver is not None:
      raise ValueError("pre-activations are an encoder's; this has a solver")
    bias = self.encoder_bias
    return self._kernel(), None if bias is None else bias[...]

  def _check_gradient(self, gradient, x):
    if gradient is None:
      return
    if self.score is None:
      raise ValueError("gradient goes with a score that looks at it")
    if gradient.shape != x.shape:
      raise ValueError(
        f"gradient must be {list(x.shape)} as x, got {list(gradient.shape)}"
      )

  def _centered(self, x):
    x = self._flat(x)
    return x - self.bias[...] if self.centers else x

  def _flat(self, x, name="x", side=0):
    """[..., width] of inputs, or of outputs where side is 1."""
    shape = self.shapes[side]
    lead = x.shape[: max(x.ndim - len(shape), 0)]
    if x.shape != (*lead, *shape):
      wanted = ", ".join(map(str, shape))
      raise ValueError(f"{name} must be [..., {wanted}], got {list(x.shape)}")
    if not jnp.issubdtype(x.dtype, jnp.floating):
      raise ValueError(f"{name} must be floating, got {x.dtype}")
    return x.reshape(*lead, math.prod(shape))

  def _shaped(self, y):
    return y.reshape(*y.shape[:-1], *self.shapes[1])


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
    if settings.get("outputs") is not None:
      raise ValueError(
        f"outputs are a crosscoder's own sites, got {settings['outputs']}"
      )
    super().__init__(sites * width, latents, sparsifier, **settings)
    self.shapes = (sites, width), (sites, width)

  def norms(self) -> Array:
    """f32 [latents], the sum of an atom's norms at the sites."""
    atoms = self.dictionary[...]
    return _norms(atoms.reshape(len(atoms), *self.shapes[0])).sum(-1)


def _norms(atoms):
  squares = (atoms.astype(jnp.float32) ** 2).sum(-1)
  # An atom of zeros has no gradient, instead of NaN.
  return jnp.sqrt(jnp.where(squares == 0, 1, squares)) * (squares != 0)


def _idle(idle, code):
  """Rows since each latent was last active, after a code of further rows."""
  if isinstance(code, codes.Code):
    hits = (jnp.abs(code.values) > 0).reshape(-1)
    active = jnp.zeros(idle.shape, bool)
    active = active.at[code.indices.reshape(-1)].max(hits)
    rows = math.prod(code.values.shape[:-1])
  else:
    # NaN is no activity, or one row of it would revive all latents.
    active = (jnp.abs(code) > 0).reshape(-1, code.shape[-1]).any(0)
    rows = math.prod(code.shape[:-1])
  # Not beyond what an int32 holds.
  return jnp.where(active, 0, jnp.minimum(idle, 2**30) + rows)


def _check_positive(**values):
  for argument, value in values.items():
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
      raise ValueError(f"{argument} must be a positive integer, got {value!r}")
