"""What is measured of sparse autoencoders of a model's activations."""

from collections.abc import Iterator, Sequence
import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from experiments import activations
from experiments import prune
from experiments.models import bert
from experiments.models import pretrained
from sparsejax import capture
from sparsejax import sparse_coding

CHUNK = 4096  # rows that are coded at once
PREFIX = 4  # a prefix is this share of the latents, the first ones


class Figures:
  """What is measured of an autoencoder, on texts that none was trained on.

  Attributes:
    store: activations of these texts.
    bounds: figures of the model as it is, and with the mean row in the place of
      all that the block returns.
  """

  def __init__(
    self,
    loaded: pretrained.Pretrained,
    store: activations.Store,
    sides: Sequence[Sequence[str]],
    mean: np.ndarray,
  ):
    """Embeds signatures and docstrings.

    Args:
      loaded: an encoder with its tokenizer.
      store: of the validation texts.
      sides: signatures, and docstrings in their order.
      mean: [width], the row that ablates.
    """
    about, self.store = store.meta["about"], store
    self._model, self._layer = loaded.model, about["layer"]
    self._sides = [
      prune.batches_of(loaded.tokenizer, texts, about["length"])
      for texts in sides
    ]
    self._rows = np.concatenate(
      [
        np.asarray(activations.stream(self._model, self._layer, *batch))[
          batch[1]
        ]
        for side in self._sides
        for batch in side.batches
      ]
    )
    self._clean = self._embeddings(self._rows)
    ablated = self._embeddings(np.broadcast_to(mean, self._rows.shape))
    self.bounds = {
      "intact": self._kept(self._clean),
      "ablated": self._kept(ablated),
    }

  def of(self, sae: sparse_coding.Autoencoder) -> dict[str, float]:
    """All figures of an autoencoder that has been told `eval()`."""
    found = sparse_coding.Statistics.zeros(sae.width, sae.latents)
    prefix = found
    for x, valid in chunks(self.store):
      _, found = reconstruct(sae, x, valid, found)
      _, prefix = reconstruct(sae, x, valid, prefix, sae.latents // PREFIX)
    made = [
      np.asarray(reconstruct(sae, x, valid, found)[0])[valid]
      for x, valid in chunks(self._rows)
    ]
    kept = self._kept(self._embeddings(np.concatenate(made)))
    losses = [
      1 - x["cosine"]
      for x in (self.bounds["intact"], kept, self.bounds["ablated"])
    ]
    return {
      "l0": float(found.l0),
      "explained": float(found.explained_variance),
      "dead": float(sparse_coding.dead_fraction(found.density)),
      "shrinkage": float(found.shrinkage),
      "recovered": float(sparse_coding.loss_recovered(*losses)),
      "prefix": float(prefix.explained_variance),
      "nearest": float(nearest(sae)),
    } | kept

  def _embeddings(self, rows):
    """Of both sides, with these rows in the place of the block's."""
    found, begin = [], 0
    for side in self._sides:
      parts = []
      for tokens, valid in side.batches:
        hidden = np.zeros((*valid.shape, rows.shape[1]), np.float32)
        end = begin + valid.sum()
        hidden[valid] = rows[begin:end]
        begin = end
        parts.append(spliced(self._model, self._layer, tokens, valid, hidden))
      whole = np.concatenate(parts)[: len(side.order)]
      found.append(whole[np.argsort(side.order)])
    return found

  def _kept(self, sides):
    """What is left of the model."""
    return {
      "cosine": float((sides[1] * self._clean[1]).sum(1).mean()),
      "retrieval": prune.retrieval(*sides),
    }


def codes(
  sae: sparse_coding.Autoencoder, store: activations.Store
) -> np.ndarray:
  """All latents of all rows of a store, f16 [rows, latents]."""
  found = [
    np.asarray(dense(sae, x))[valid].astype(np.float16)
    for x, valid in chunks(store)
  ]
  return np.concatenate(found)


def chunks(source) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """All rows in chunks of one shape, and which of them are no padding."""
  for begin in range(0, len(source), CHUNK):
    rows = source[np.arange(begin, min(begin + CHUNK, len(source)))]
    padding = [(0, CHUNK - len(rows)), (0, 0)]
    yield np.pad(rows, padding), np.arange(CHUNK) < len(rows)


@functools.partial(nnx.jit, static_argnames="first")
def reconstruct(sae, x, valid, statistics, first: int | None = None):
  """The reconstruction, and the statistics with these rows.

  Of the first latents alone, where their number is given.
  """
  code = sae.encode(x)
  if first is not None:
    code = sparse_coding.ablate(code, range(first, sae.latents))
  y = sae.decode(code)
  return y, statistics.add(x, y, code, valid)


@nnx.jit
def nearest(sae) -> jax.Array:
  """The largest cosine of an atom with another, mean over atoms."""
  atoms = sae.dictionary[...] / sae.norms()[:, None]
  cosines = atoms @ atoms.T
  return jnp.where(jnp.eye(len(atoms), dtype=bool), -1, cosines).max(1).mean()


@nnx.jit
def dense(sae, x) -> jax.Array:
  """All latents of rows."""
  code = sae.encode(x)
  return code.dense() if isinstance(code, sparse_coding.Code) else code


@functools.partial(nnx.jit, static_argnames="layer")
def spliced(model, layer: str, tokens, valid, hidden) -> jax.Array:
  """Embeddings, where a module returns `hidden`; what is before is not run."""
  run = lambda model: bert.mean_embedding(model(tokens, valid), valid)
  return capture.splice(run, model, {layer: lambda _: hidden})
