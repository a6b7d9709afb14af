"""Terms of an autoencoder's loss: functions of a `Pass`, or settings of some.

A term gives an f32 scalar. What is named here of a row is summed over its width
or its latents, and averaged over rows.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from sparsejax.sparse_coding import codes
from sparsejax.sparse_coding import embeddings
from sparsejax.sparse_coding import selection
from sparsejax.sparse_coding import sparsifiers

Array = jax.Array
Code = codes.Code | Array


@dataclasses.dataclass(frozen=True)
class Pass:
  """What a term of the loss may look at.

  Attributes:
    autoencoder: the module.
    inputs: [rows, width], or [rows, sites, width] of a crosscoder.
    target: what is to be reconstructed, [rows, outputs].
    code: of the rows.
    reconstruction: like target.
    key: None, or a PRNG key.
  """

  autoencoder: Any
  inputs: Array
  target: Array
  code: Code
  reconstruction: Array
  key: Array | None

  def pre(self) -> Array:
    """Pre-activations, [rows, latents]."""
    return self.autoencoder.pre(self.inputs)

  def error(self) -> Array:
    """What is left of the target, f32 [rows, outputs]."""
    target = self.target.astype(jnp.float32)
    return target - self.reconstruction.astype(jnp.float32)

  def error_without_atoms(self) -> Array:
    """What an empty code would leave of it, f32 [rows, outputs]."""
    offset = self.autoencoder.offset(self.inputs)
    return self.target.astype(jnp.float32) - offset.astype(jnp.float32)

  def atoms(self) -> Array:
    """The dictionary, [latents, outputs]."""
    return self.autoencoder.dictionary[...]


def name(term: Callable[[Pass], Array]) -> str:
  """What a term is called: as its function or its class is."""
  if isinstance(term, functools.partial):
    term = term.func
  return getattr(term, "__name__", None) or type(term).__name__


def squared_error(found: Pass) -> Array:
  """The squared error of a row, summed over its width; the mean of rows."""
  return _mean_square(found.error())


def normalized_error(found: Pass) -> Array:
  """The squared error as a share of the variance of the target.

  One ratio of two sums over all rows, about the mean row: one less the
  explained variance. Rows that are all alike have no variance to explain, so
  that it is infinite or NaN.
  """
  return (found.error() ** 2).sum() / _spread(found.target)


def l1_loss(found: Pass) -> Array:
  """Magnitudes of a code, each times the norm of its atom.

  Source: l1-sae, Towards Monosemanticity: Decomposing Language Models With
  Dictionary Learning; the norms are there so that atoms need no unit norm.
  """
  norms = found.autoencoder.norms()
  if isinstance(found.code, codes.Code):
    return _mean_sum(found.code.values, norms[found.code.indices])
  return _mean_sum(found.code, norms)


def l0_loss(found: Pass) -> Array:
  """How many latents of a row are above their thresholds, for a JumpReLU.

  The gradient of the thresholds is that of a smoothed step, see `step`; nothing
  else gets one.

  Source: jumprelu-sae, Jumping Ahead: Improving Reconstruction Fidelity with
  JumpReLU Sparse Autoencoders, equation 9.
  """
  sparsifier = _of(found, sparsifiers.JumpReLU, "l0_loss")
  pre = found.pre().astype(jnp.float32)
  above = selection.step(pre, sparsifier.threshold, sparsifier.bandwidth)
  return above.sum(-1).mean()


def gate_l1(found: Pass) -> Array:
  """The `l1_loss` of what opens the gates of a `Gated`.

  Source: gated-sae, Improving Dictionary Learning with Gated Sparse
  Autoencoders, equation 8; atoms of unit norm are not asked for.
  """
  return _mean_sum(_gates(found, "gate_l1"), found.autoencoder.norms())


def gate_error(found: Pass) -> Array:
  """The squared error of what the gates of a `Gated` alone would make.

  Dictionary and bias are as they are: it trains the encoder.

  Source: gated-sae, Improving Dictionary Learning with Gated Sparse
  Autoencoders, equation 8.
  """
  atoms, left = lax.stop_gradient((found.atoms(), found.error_without_atoms()))
  return _mean_square(left - codes.decode(_gates(found, "gate_error"), atoms))


def flops_loss(found: Pass) -> Array:
  """The `flops` of a code: small where latents are rare, and as rare as others.

  Source: flops-regularizer, Minimizing FLOPs to Learn Efficient Sparse
  Representations, equation of the relaxation.
  """
  return embeddings.flops(found.code)


@dataclasses.dataclass(frozen=True)
class DeadLatents:
  """Lets latents that are idle for long explain what is left of the target.

  Of each row the k largest pre-activations among the dead ones make a second
  reconstruction, without the bias, of the error of the first; its error is a
  share of the variance of that. The dead then get a gradient, and nothing else
  does but the bias that inputs are centered by. Where fewer than k are dead the
  loss is smaller by that share; where none is, it is 0 and nothing is computed.

  Args:
    dead_after: rows without activity, from which on a latent is dead.
    k: how many a row takes; default half the width, or all if there are fewer.

  Source: topk-sae, Scaling and evaluating sparse autoencoders, appendix A.2.
  """

  dead_after: int
  k: int | None = None

  def __post_init__(self):
    _check_positive(dead_after=self.dead_after)

  def __call__(self, found: Pass) -> Array:
    dead = found.autoencoder.idle[...] >= self.dead_after
    return _on_the_error(found, dead, self.k)


@dataclasses.dataclass(frozen=True)
class ZipfAuxiliary:
  """As `DeadLatents`, of the latents that a batch uses less than Zipf's law.

  The latents of a batch are ranked by how often they are active. Under-used are
  those below what their rank has of all activity, if shares fall as
  `(rank + offset) ** -exponent`.

  Args:
    exponent: 0 is an even use.
    offset: above -1.
    k: how many a row takes; default half the width, or all if there are fewer.

  Source: mutual-feature-choice-sae, Adaptive Sparse Allocation with Mutual
  Choice & Feature Choice Sparse Autoencoders, section 3 (aux_zipf_loss), whose
  words leave open which latents are under-used: this is our reading.
  """

  exponent: float = 1.0
  offset: float = 0.0
  k: int | None = None

  def __call__(self, found: Pass) -> Array:
    latents = found.autoencoder.latents
    shares = selection.zipf_shares(latents, self.exponent, self.offset)
    counts = active_counts(found.code)
    expected = jnp.minimum(
      jnp.asarray(shares, jnp.float32) * counts.sum(), len(found.inputs)
    )
    order = jnp.argsort(-counts)
    below = jnp.zeros(latents, bool).at[order].set(counts[order] < expected)
    return _on_the_error(found, below, self.k)


@dataclasses.dataclass(frozen=True)
class NestedPrefixes:
  """Squared errors of what the first latents alone make, summed over sizes.

  Args:
    sizes: how many latents each has, rising; the last is all of them.
    normalized: whether errors are shares of the variance of the target, as
      those of `normalized_error` and `DeadLatents`.

  Raises:
    ValueError: for sizes that do not rise, or do not end with all latents.

  Source: matryoshka-sae, Learning Multi-Level Features with Matryoshka Sparse
  Autoencoders, section 3.
  """

  sizes: tuple[int, ...]
  normalized: bool = False

  def __post_init__(self):
    object.__setattr__(self, "sizes", tuple(self.sizes))
    _check_positive(sizes=self.sizes)
    _check_rising(sizes=self.sizes)

  def __call__(self, found: Pass) -> Array:
    latents = found.autoencoder.latents
    if self.sizes[-1] != latents:
      raise ValueError(f"sizes must end with {latents}, got {self.sizes}")
    error, loss = found.error_without_atoms(), jnp.zeros(())
    for start, end in zip((0, *self.sizes), self.sizes):
      error = error - _made_by(found, start, end)
      loss += _mean_square(error)
    if self.normalized:
      loss *= len(found.target) / _spread(found.target)
    return loss


@dataclasses.dataclass(frozen=True)
class NestedBudgets:
  """Squared errors of what the largest latents of rows make, of some budgets.

  Args:
    ks: how many a row keeps, rising; at most those that the sparsifier keeps.
    weights: one for each, default 1.

  Raises:
    ValueError: for ks that do not rise or go beyond the code, or weights that
      are not as many.

  Source: msae-clip, Interpreting CLIP with Hierarchical Sparse Autoencoders,
  section 3.
  """

  ks: tuple[int, ...]
  weights: tuple[float, ...] | None = None

  def __post_init__(self):
    object.__setattr__(self, "ks", tuple(self.ks))
    _check_positive(ks=self.ks)
    _check_rising(ks=self.ks)
    weights = self.weights
    weights = (1.0,) * len(self.ks) if weights is None else tuple(weights)
    object.__setattr__(self, "weights", weights)
    if len(weights) != len(self.ks):
      raise ValueError(
        f"weights must be {len(self.ks)} as the ks, got {self.weights}"
      )

  def __call__(self, found: Pass) -> Array:
    code = _largest(found.code, self.ks[-1])
    error, loss = found.error_without_atoms(), jnp.zeros(())
    for start, end, weight in zip((0, *self.ks), self.ks, self.weights):
      values, indices = (x[..., start:end] for x in (code.values, code.indices))
      part = codes.Code(values, indices, code.latents)
      error = error - codes.decode(part, found.atoms())
      loss += weight * _mean_square(error)
    return loss


@dataclasses.dataclass(frozen=True)
class AllBudgets:
  """The squared error of what the j largest latents of a row make, of each j.

  The mean over j from 1 to k. Atoms are added one by one, and taken off again
  for the gradient: memory is that of one reconstruction.

  Args:
    k: of a row; default as many as the code has.

  Raises:
    ValueError: for a k beyond the code, or none where the code is dense.

  Source: hierarchical-topk-sae, Train One Sparse Autoencoder Across Multiple
  Sparsity Budgets to Preserve Interpretability and Accuracy, section 3.
  """

  k: int | None = None

  def __post_init__(self):
    if self.k is not None:
      _check_positive(k=self.k)

  def __call__(self, found: Pass) -> Array:
    k = self.k
    if k is None:
      if not isinstance(found.code, codes.Code):
        raise ValueError("k must be given where codes are dense, got None")
      k = found.code.values.shape[-1]
    code = _largest(found.code, k)
    error = found.error_without_atoms()
    total = _prefix_squares(code.values, code.indices, found.atoms(), error)
    return total / (k * len(error))


@dataclasses.dataclass(frozen=True)
class Orthogonality:
  """The largest cosine of an atom with another of its chunk, squared; the mean.

  Chunks are drawn anew with the key that `loss` is given, so that the cost
  grows as the dictionary and not as its square.

  Args:
    chunks: how many, which divides the latents; 1 compares all pairs and draws
      nothing.

  Raises:
    ValueError: for chunks that do not divide, or leave an atom alone, or where
      there is no key to draw with.

  Source: ortsae, OrtSAE: Orthogonal Sparse Autoencoders Uncover Atomic
  Features, section 3.
  """

  chunks: int = 1

  def __post_init__(self):
    _check_positive(chunks=self.chunks)

  def __call__(self, found: Pass) -> Array:
    atoms = found.atoms().astype(jnp.float32)
    size, left = divmod(len(atoms), self.chunks)
    if left or size < 2:
      raise ValueError(
        f"chunks must divide the {len(atoms)} latents into two or more each, "
        f"got {self.chunks}"
      )
    if self.chunks > 1:
      if found.key is None:
        raise ValueError("key must be given to draw chunks, got None")
      atoms = jax.random.permutation(found.key, atoms)
    squares = (atoms**2).sum(-1, keepdims=True)
    atoms *= lax.rsqrt(jnp.where(squares == 0, 1, squares))

    @jax.checkpoint  # or the cosines of every chunk would be held
    def largest(chunk):
      cosines = jnp.dot(chunk, chunk.T, precision="highest")
      return jnp.where(jnp.eye(size, dtype=bool), -jnp.inf, cosines).max(-1)

    return (lax.map(largest, atoms.reshape(self.chunks, size, -1)) ** 2).mean()


def active_counts(code: Code) -> Array:
  """In how many rows each latent is active, int32 [latents]."""
  if isinstance(code, codes.Code):
    active = (code.values != 0).astype(jnp.int32).reshape(-1)
    counts = jnp.zeros(code.latents, jnp.int32)
    return counts.at[code.indices.reshape(-1)].add(active)
  return (code != 0).reshape(-1, code.shape[-1]).sum(0, dtype=jnp.int32)


def _on_the_error(found, chosen, k):
  """How much of the error some latents leave, as a share of its variance."""
  sae, error = found.autoencoder, lax.stop_gradient(found.error())
  wanted = error.shape[-1] // 2 if k is None else k
  k = min(wanted, sae.latents) if k is None else k

  def compute():
    code = sae.encode_among(found.inputs, chosen, k)
    left = error - codes.decode(code, found.atoms())
    spread = _spread(error)
    # Where rows of the error are all alike there is nothing to learn.
    share = (left**2).sum() / jnp.where(spread == 0, 1, spread)
    share = jnp.where(spread == 0, 0, share)
    return share * jnp.minimum(chosen.sum() / max(wanted, 1), 1)

  return lax.cond(chosen.any(), compute, lambda: jnp.zeros(()))


def _made_by(found, start, end):
  """What the latents from `start` to before `end` make."""
  code, atoms = found.code, found.atoms()
  if not isinstance(code, codes.Code):
    return codes.decode(code[..., start:end], atoms[start:end])
  inside = (code.indices >= start) & (code.indices < end)
  values = jnp.where(inside, code.values, 0)
  return codes.decode(dataclasses.replace(code, values=values), atoms)


def _largest(code, k):
  """The k largest values of rows as a Code, the largest first."""
  if not isinstance(code, codes.Code):
    return codes.top_k(code, k)
  codes.check_k(k, code.values.shape[-1])
  _, places = lax.top_k(lax.stop_gradient(code.values), k)
  take = lambda x: jnp.take_along_axis(x, places, axis=-1)
  return codes.Code(take(code.values), take(code.indices), code.latents)


@jax.custom_vjp
def _prefix_squares(values, indices, atoms, error):
  """Squares of the errors after 1, 2, ... atoms were taken off, all added."""
  return _prefix_forward(values, indices, atoms, error)[0]


def _prefix_forward(values, indices, atoms, error):
  def take_off(carry, one):
    error, total = carry
    value, index = one
    error = error - _scaled(atoms, index, value)
    return (error, total + (error**2).sum()), None

  columns = (values.T, indices.T)
  start = (error, jnp.zeros((), jnp.float32))
  (last, total), _ = lax.scan(take_off, start, columns)
  return total, (values, indices, atoms, last)


def _prefix_backward(kept, given):
  values, indices, atoms, last = kept

  def put_back(carry, one):
    error, later, to_atoms = carry
    value, index = one
    later = later + 2 * given * error  # of all budgets from this one on
    taken = value.astype(jnp.float32)[:, None] * later
    to_atoms = to_atoms.at[index].add(-taken)
    to_value = -(later * atoms[index]).sum(-1)
    error = error + _scaled(atoms, index, value)
    return (error, later, to_atoms), to_value

  start = (last, jnp.zeros_like(last), jnp.zeros(atoms.shape, jnp.float32))
  columns = (values.T, indices.T)
  (_, later, to_atoms), to_values = lax.scan(
    put_back, start, columns, reverse=True
  )
  to_atoms = to_atoms.astype(atoms.dtype)
  to_indices = np.zeros(indices.shape, jax.dtypes.float0)
  return to_values.T.astype(values.dtype), to_indices, to_atoms, later


def _scaled(atoms, index, value):
  scaled = value[:, None].astype(jnp.float32) * atoms[index]
  return scaled.astype(jnp.float32)


_prefix_squares.defvjp(_prefix_forward, _prefix_backward)


def _gates(found, term):
  return jax.nn.relu(_of(found, sparsifiers.Gated, term).gate(found.pre()))


def _of(found, kind, term):
  sparsifier = found.autoencoder.sparsifier
  if not isinstance(sparsifier, kind):
    raise ValueError(
      f"{term} goes with {kind.__name__}, got {type(sparsifier).__name__}"
    )
  return sparsifier


def _mean_square(error):
  return (error.astype(jnp.float32) ** 2).sum(-1).mean()


def _mean_sum(z, norms):
  return (jnp.abs(z.astype(jnp.float32)) * norms).sum(-1).mean()


def _spread(x):
  x = x.astype(jnp.float32)
  return ((x - x.mean(0)) ** 2).sum()


def _check_positive(**values):
  for argument, value in values.items():
    numbers = value if isinstance(value, tuple) else (value,)
    if not numbers or any(type(x) is not int or x < 1 for x in numbers):
      raise ValueError(f"{argument} must be positive integers, got {value!r}")


def _check_rising(**values):
  for argument, value in values.items():
    if list(value) != sorted(set(value)):
      raise ValueError(f"{argument} must rise, got {value}")
