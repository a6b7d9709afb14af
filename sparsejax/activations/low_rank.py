"""R-Sparse: what is strong meets a kernel's rows, the rest a low rank of it."""

from collections.abc import Sequence
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax.activations.thresholds import Magnitudes
from sparsejax.automatic import automatic

Array = jax.Array


def r_sparse_budget(
  inputs: int, outputs: int, sparsity: float, share: float
) -> tuple[int, int, float]:
  """How many rows and ranks may be read, of one budget of weights.

  Args:
    inputs: rows of the kernel.
    outputs: its columns.
    sparsity: from 0 to 1; the rest of the kernel's weights is the budget.
    share: from 0 to 1, of the budget that goes to whole rows. What is left goes
      to ranks of inputs + outputs numbers each.

  Returns:
    (rows, rank, sparsity of the inputs), the first two rounded down.

  Raises:
    ValueError: for a sparsity or share out of range.

  Example:
    >>> r_sparse_budget(10, 8, 0.5, 0.4)
    (2, 1, 0.8)

  Source: r-sparse, R-Sparse: Rank-Aware Activation Sparsity for Efficient LLM
  Inference, as the authors' code counts it.
  """
  for name, value in dict(sparsity=sparsity, share=share).items():
    if not 0 <= value <= 1:
      raise ValueError(f"{name} must be in [0, 1], got {value}")
  rows = int(inputs * (1 - sparsity) * share)
  left = inputs * outputs * (1 - sparsity) - rows * outputs
  return rows, int(left / (inputs + outputs)), 1 - (1 - sparsity) * share


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RSparse:
  """What stands beside a kernel [K, N] for `r_sparse`.

  Attributes:
    threshold: f32 scalar; what exceeds it in size is strong.
    scale: f32 [K], by which an input counts.
    left: [K, rank].
    right: [rank, N].
  """

  threshold: Array
  scale: Array
  left: Array
  right: Array

  def strong(self, x: Array) -> Array:
    """What is strong of inputs [..., K], the rest zeroed."""
    size = jnp.abs(x.astype(jnp.float32)) * self.scale
    weak = jax.lax.stop_gradient(size <= self.threshold)
    return jnp.where(weak, 0, x)


def r_sparse_fit(
  kernel: Array, x: Array, *, sparsity: float, share: float = 0.5
) -> RSparse:
  """The threshold, and the best low rank of a kernel, for one budget.

  Args:
    kernel: floating [K, N].
    x: what it reads, of calibration, [..., K].
    sparsity: from 0 to 1: 1 less the weights that may be read.
    share: of that budget for whole rows, from 0 to 1; see `r_sparse_budget`.

  Returns:
    What `r_sparse` takes. An input counts by the norm of its row; without a
    rank, as it is.

  Raises:
    ValueError: for shapes that do not fit, or numbers out of range.

  Example:
    >>> fit = r_sparse_fit(
    ...   jnp.eye(4), jnp.ones((2, 4)), sparsity=0.5, share=0.0
    ... )
    >>> fit.left.shape, fit.right.shape
    ((4, 1), (1, 4))

  Source: r-sparse, R-Sparse: Rank-Aware Activation Sparsity for Efficient LLM
  Inference.
  """
  _check(kernel, x)
  return _fit(kernel, _factors(kernel), x, sparsity, share)


def _check(kernel, x):
  if kernel.ndim != 2 or x.shape[-1:] != kernel.shape[:1]:
    raise ValueError(
      f"kernel and x must be [K, N] and [..., K], got {kernel.shape} and "
      f"{x.shape}"
    )


def _factors(kernel):
  """The singular vectors and values, whole on every device."""
  svd = functools.partial(jnp.linalg.svd, full_matrices=False)
  return automatic(svd, kernel.astype(jnp.float32))


def _fit(kernel, factors, x, sparsity, share):
  _, rank, zeros = r_sparse_budget(*kernel.shape, sparsity, share)
  rank = min(rank, *kernel.shape)
  u, s, vt = factors
  scale = jnp.ones(len(kernel))
  if rank:
    scale = jnp.sqrt((kernel.astype(jnp.float32) ** 2).sum(1))
  threshold = Magnitudes.zeros().add(x * scale).quantile(zeros)
  left = (u[:, :rank] * s[:rank]).astype(kernel.dtype)
  return RSparse(threshold, scale, left, vt[:rank].astype(kernel.dtype))


def r_sparse(x: Array, kernel: Array, fit: RSparse) -> Array:
  """x @ kernel, in which the weak inputs meet a low rank of the kernel.

  The product with the strong inputs is dense here; in its place
  `sparse_matmul(fit.strong(x), kernel, capacity=...)` reads their rows alone.

  Args:
    x: floating [..., K].
    kernel: [K, N].
    fit: of `r_sparse_fit`.

  Returns:
    [..., N]. With a threshold of 0, or the full rank, that is x @ kernel.

  Raises:
    ValueError: for shapes that do not fit.

  Example:
    >>> x, kernel = jnp.array([[1.0, 2.0]]), jnp.diag(jnp.array([3.0, 4.0]))
    >>> low = jnp.zeros((2, 0)), jnp.zeros((0, 2))
    >>> fit = RSparse(jnp.float32(1), jnp.ones(2), *low)
    >>> r_sparse(x, kernel, fit).tolist()
    [[0.0, 8.0]]

  Source: r-sparse, R-Sparse: Rank-Aware Activation Sparsity for Efficient LLM
  Inference.
  """
  if kernel.shape != (fit.left.shape[0], fit.right.shape[1]) or (
    x.shape[-1:] != kernel.shape[:1]
  ):
    raise ValueError(
      "x, kernel and fit must be [..., K], [K, N] and of [K, N], got "
      f"{x.shape}, {kernel.shape} and one of "
      f"{(fit.left.shape[0], fit.right.shape[1])}"
    )
  strong = fit.strong(x)
  return strong @ kernel + ((x - strong) @ fit.left) @ fit.right


def r_sparse_search(
  kernel: Array,
  x: Array,
  *,
  sparsity: float,
  shares: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 0.9, 1.0),
) -> tuple[float, np.ndarray]:
  """The share of the budget for rows that changes a layer's output least.

  Args:
    kernel: concrete, floating [K, N].
    x: concrete, what it reads, of calibration, [..., K].
    sparsity: as `r_sparse_fit` takes it.
    shares: which are tried.

  Returns:
    The best of the shares, the first of equal ones; and each one's mean squared
    error of the output on x, f64 [shares].

  Raises:
    ValueError: there are no shares, one is out of range, or for shapes that do
      not fit.

  Example:
    >>> x, kernel = jnp.array([[9.0, 0.1]]), jnp.eye(2)
    >>> r_sparse_search(kernel, x, sparsity=0.5, shares=(0.0, 1.0))[0]
    1.0

  Source: r-sparse, R-Sparse: Rank-Aware Activation Sparsity for Efficient LLM
  Inference. The paper evolves the shares of all layers together, by the model's
  loss; here each layer's is tried alone, by its own error.
  """
  if not shares:
    raise ValueError("shares must hold at least one, got none")
  _check(kernel, x)
  errors = []
  exact, factors = x @ kernel, _factors(kernel)
  for share in shares:
    fit = _fit(kernel, factors, x, sparsity, share)
    error = (r_sparse(x, kernel, fit) - exact).astype(jnp.float32)
    errors.append(float((error**2).mean()))
  return shares[int(np.argmin(errors))], np.array(errors)
