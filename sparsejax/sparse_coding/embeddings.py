"""Sparse embeddings: how they are made, regularized, compared and searched."""

import dataclasses
import functools
import math

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from sparsejax.automatic import automatic
from sparsejax.sparse_coding.codes import Code

Array = jax.Array

_CHUNK = 512  # postings that are read at once


def splade(logits: Array, valid: Array | None = None) -> Array:
  """Weights of the words of a vocabulary, from the logits of all tokens.

  A word's weight is the largest of log(1 + relu(logit)) over the tokens. Only
  what it is the largest of is kept: there is no second array of logits' size.

  Args:
    logits: floating [..., tokens, words].
    valid: bool [..., tokens]: which tokens count (padding does not); default
      all.

  Returns:
    [..., words] in the dtype of logits; zeros where no token is valid.

  Raises:
    ValueError: for a valid that does not fit.

  Example:
    >>> weights = splade(jnp.array([[1.0, -5.0, 0.0], [3.0, -1.0, 0.0]]))
    >>> [round(x, 3) for x in weights.tolist()]
    [1.386, 0.0, 0.0]

  Source: lsr-splade, A Unified Framework for Learned Sparse Retrieval, MLM
  encoder.
  """
  if valid is not None:
    if valid.shape != logits.shape[:-1] or valid.dtype != bool:
      raise ValueError(
        f"valid must be bool{list(logits.shape[:-1])}, got "
        f"{valid.dtype}{list(valid.shape)}"
      )
    logits = jnp.where(valid[..., None], logits, -jnp.inf)
  # Both functions rise: the maximum may come first.
  largest = logits.max(-2).astype(jnp.float32)
  return jnp.log1p(jax.nn.relu(largest)).astype(logits.dtype)


def flops(code: Code | Array) -> Array:
  """A smooth stand-in for how many products a search takes: a loss.

  The sum over latents of the squared mean of their sizes. At one mean size it
  is least where all latents share it alike; l1 does not tell the difference.

  Args:
    code: a Code, or dense latents [..., latents].

  Returns:
    f32 scalar.

  Example:
    >>> flops(jnp.array([[2.0, 0.0], [0.0, 2.0]])).item()
    2.0
    >>> flops(jnp.array([[2.0, 0.0], [2.0, 0.0]])).item()
    4.0

  Source: flops-regularizer, Minimizing FLOPs to Learn Efficient Sparse
  Representations, equation of the relaxation.
  """
  if isinstance(code, Code):
    sizes = jnp.abs(code.values).astype(jnp.float32)
    zeros = jnp.zeros(code.latents, jnp.float32)
    add = lambda indices, sizes: zeros.at[indices].add(sizes)
    means = automatic(add, code.indices, sizes) / math.prod(sizes.shape[:-1])
  else:
    sizes = jnp.abs(jnp.asarray(code)).astype(jnp.float32)
    means = sizes.mean(range(sizes.ndim - 1))
  return (means**2).sum()


def similarity(queries: Code, documents: Code) -> Array:
  """The products of sparse codes, of each query with each document.

  A query at a time is made dense, and what a document lists is looked up there.

  Args:
    queries: of [..., k].
    documents: of [documents, k'], and as many latents.

  Returns:
    [..., documents] in the dtype of the queries' values.

  Raises:
    ValueError: for codes that do not fit.

  Example:
    >>> query = Code(jnp.array([2.0, 1.0]), jnp.array([0, 3]), 4)
    >>> documents = Code(jnp.array([[1.0], [5.0]]), jnp.array([[3], [1]]), 4)
    >>> similarity(query, documents).tolist()
    [1.0, 0.0]
  """
  _check(queries, documents.latents)
  values = documents.values.astype(jnp.float32)

  def one(query):
    dense = Code(*query, documents.latents).dense().astype(jnp.float32)
    return (values * dense[documents.indices]).sum(-1)

  return _each(one, queries).astype(queries.values.dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class InvertedIndex:
  """Of each latent the documents in which it is active.

  Attributes:
    values: [postings], those of latent 0 first.
    documents: int32 [postings], which document each is of, rising in a latent.
    starts: int32 [latents + 1], where each latent's postings start, and the
      end.
    size: how many documents there are.

  Example:
    >>> z = jnp.array([[0.0, 1.0], [2.0, 3.0], [4.0, 0.0]])
    >>> index = InvertedIndex.of(z)
    >>> index.documents.tolist(), index.starts.tolist()
    ([1, 2, 0, 1], [0, 2, 4])
    >>> query = Code(jnp.array([1.0]), jnp.array([0]), 2)
    >>> index.scores(query).tolist(), index.products(query).item()
    ([0.0, 2.0, 4.0], 2)
    >>> best, documents = index.search(query, 2)
    >>> best.tolist(), documents.tolist()
    ([4.0, 2.0], [2, 1])

  Source: flops-regularizer, Minimizing FLOPs to Learn Efficient Sparse
  Representations; lsr-splade, A Unified Framework for Learned Sparse Retrieval.
  """

  values: Array
  documents: Array
  starts: Array
  size: int = dataclasses.field(metadata={"static": True})

  @classmethod
  def of(cls, code: Code | Array) -> "InvertedIndex":
    """The index of documents.

    Their number of active latents is a shape here: it is not for use in `jit`.

    Args:
      code: of the documents, a Code of [documents, k], or dense latents
        [documents, latents].
    """
    if isinstance(code, Code):
      values, count = np.asarray(code.values), code.latents
      latents = np.asarray(code.indices)
    else:
      values = np.asarray(code)
      count = values.shape[-1]
      latents = np.broadcast_to(np.arange(count), values.shape)
    if values.ndim != 2:
      raise ValueError(
        f"code must be of [documents, ...], got {values.shape} values"
      )
    documents = np.broadcast_to(np.arange(len(values))[:, None], values.shape)
    active = values != 0
    order = np.argsort(latents[active], kind="stable")
    starts = np.searchsorted(latents[active][order], np.arange(count + 1))
    return cls(
      jnp.asarray(values[active][order]),
      jnp.asarray(documents[active][order], jnp.int32),
      jnp.asarray(starts, jnp.int32),
      len(values),
    )

  def products(self, queries: Code) -> Array:
    """How many products a search takes, int32 [...] for queries [..., k]."""
    _check(queries, len(self.starts) - 1)
    return self._lengths(queries.values, queries.indices).sum(-1)

  def scores(self, queries: Code) -> Array:
    """Products with all documents, by those that share a latent alone.

    Args:
      queries: of [..., k], and as many latents.

    Returns:
      [..., size] in the dtype of the queries' values. It has no gradient; see
      `similarity` for that.
    """
    _check(queries, len(self.starts) - 1)
    found = _each(self._scores, queries)
    return found.astype(queries.values.dtype)

  def search(self, queries: Code, k: int) -> tuple[Array, Array]:
    """The k documents with the largest scores.

    Args:
      queries: of [..., k'], and as many latents.
      k: how many, up to `size`. Those that share nothing with a query score 0.

    Returns:
      Their scores, falling, and int32 which they are, both [..., k].

    Raises:
      ValueError: for a k that does not fit.
    """
    if not 0 <= k <= self.size:
      raise ValueError(f"k must be from 0 to {self.size}, got {k}")
    return lax.top_k(self.scores(queries), k)

  def _lengths(self, values, indices):
    """How many postings of each of a query's latents are read."""
    lengths = self.starts[indices + 1] - self.starts[indices]
    return jnp.where(values != 0, lengths, 0)

  def _scores(self, query):
    """Scores of one query: all its postings, a chunk at a time.

    The postings of its latents stand one behind the other in a list that is
    nowhere but in `ends`.
    """
    values, indices = query[0].astype(jnp.float32), query[1]
    zeros = jnp.zeros(self.size, jnp.float32)
    if not len(self.values) or not len(values):
      return zeros
    lengths = self._lengths(values, indices)
    ends = jnp.cumsum(lengths)
    ahead = self.starts[indices] - (ends - lengths)

    def add(i, scores):
      at = i * _CHUNK + jnp.arange(_CHUNK)
      which = jnp.searchsorted(ends, at, side="right")
      posting = at + ahead.at[which].get(mode="clip")
      # Behind the last one there is no value.
      value = values.at[which].get(mode="fill", fill_value=0)
      found = self.values.at[posting].get(mode="clip").astype(jnp.float32)
      documents = self.documents.at[posting].get(mode="clip")
      return scores.at[documents].add(value * found)

    return lax.fori_loop(0, -(-ends[-1] // _CHUNK), add, zeros)


def annealed_k(step: Array | int, start: int, end: int, steps: int) -> Array:
  """How many latents a code may use at a step: from start to end, linearly.

  It is for `keep_first`, where it changes without compiling anew.

  Args:
    step: int scalar.
    start: what it is at step 0.
    end: what it is from step `steps` on.
    steps: how many steps it takes.

  Returns:
    int32 scalar, rounded with halves to even.

  Example:
    >>> [annealed_k(step, 8, 2, 3).item() for step in (0, 1, 2, 3, 9)]
    [8, 6, 4, 2, 2]

  Source: csrv2, CSRv2: Unlocking Ultra-Sparse Embeddings, k-annealing.
  """
  part = jnp.float32(end - start) * step / max(steps, 1)
  k = jnp.where(step >= steps, end, jnp.round(start + part))
  return k.astype(jnp.int32)


def keep_first(code: Code, k: Array | int) -> Code:
  """A code with the first k latents of each row, the others being 0.

  Those that `top_k` lists fall by their scores, so that what is left is its
  choice of k; but this k may be an array, and of as many values as there are
  rows. What a code takes up stays as it is.

  Args:
    code: of [..., K].
    k: int, a scalar or [...].

  Returns:
    A Code of the same shape.

  Example:
    >>> code = Code(jnp.array([3.0, 2.0, 1.0]), jnp.array([4, 0, 1]), 5)
    >>> keep_first(code, 2).values.tolist()
    [3.0, 2.0, 0.0]

  Source: csrv2, CSRv2: Unlocking Ultra-Sparse Embeddings, k-annealing.
  """
  kept = jnp.arange(code.values.shape[-1]) < jnp.asarray(k)[..., None]
  return dataclasses.replace(code, values=jnp.where(kept, code.values, 0))


def contrastive_loss(
  code: Code | Array, labels: Array, *, temperature: float = 0.2
) -> Array:
  """A loss by which codes of one label are alike and others are not.

  Of each row it is minus the log of the share that the rows with its label have
  of exp(cosine / temperature), summed over all rows but itself.

  Args:
    code: a Code of [rows, k], or dense latents [rows, latents].
    labels: int [rows]. Without labels, a row and its copy share one.
    temperature: above 0.

  Returns:
    f32 scalar, the mean over the rows whose label another row has; 0 if none
    does.

  Raises:
    ValueError: for labels or a temperature that do not fit.

  Example:
    >>> z = jnp.array([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0], [0.0, 3.0]])
    >>> right = contrastive_loss(z, jnp.array([0, 0, 1, 1])).item()
    >>> wrong = contrastive_loss(z, jnp.array([0, 1, 0, 1])).item()
    >>> round(right, 3), round(wrong, 3)
    (0.013, 5.013)

  Source: csrv2, CSRv2: Unlocking Ultra-Sparse Embeddings, supervised
  contrastive loss. The sum over positives is inside of the logarithm, as in the
  authors' code; Supervised Contrastive Learning prefers it outside.
  """
  if not temperature > 0:
    raise ValueError(f"temperature must be above 0, got {temperature}")
  z = code.dense() if isinstance(code, Code) else code
  if z.ndim != 2 or labels.shape != z.shape[:1]:
    raise ValueError(
      "code and labels must be of [rows, ...] and [rows], got "
      f"{z.shape} and {labels.shape}"
    )
  z = z.astype(jnp.float32)
  squares = (z**2).sum(-1, keepdims=True)
  # A code of zeros stays one; and the root of 0 has no gradient.
  unit = z * lax.rsqrt(jnp.where(squares > 0, squares, 1))
  cosines = jnp.matmul(unit, unit.T, precision="highest") / temperature
  others = ~jnp.eye(len(z), dtype=bool)
  alike = others & (labels[:, None] == labels)
  counts = alike.any(-1)
  # A row like no other has the same on both sides, a loss of 0.
  others, alike = (x | ~counts[:, None] for x in (others, alike))
  sum_of = functools.partial(jax.nn.logsumexp, cosines, axis=-1)
  losses = sum_of(where=others) - sum_of(where=alike)
  return losses.sum() / jnp.maximum(counts.sum(), 1)


def _check(queries, latents):
  if queries.latents != latents:
    raise ValueError(
      f"queries must have {latents} latents, as the documents, got "
      f"{queries.latents}"
    )


def _each(f, queries):
  """f of the values and indices of each query, one at a time."""
  lead, k = queries.values.shape[:-1], queries.values.shape[-1]
  flat = (math.prod(lead), k)
  rows = [x.reshape(flat) for x in (queries.values, queries.indices)]
  out = lax.map(f, tuple(rows))
  return out.reshape(*lead, out.shape[-1])
