"""Sparse recovery: codes of signals over a given dictionary.

Every solver takes a dictionary [latents, width], an atom a row, and signals
[..., width], and returns dense codes [..., latents] in the signal's dtype.
Arithmetic is f32, or float64 where the arrays are. A row that is not finite
has a code of NaN.
"""

import functools
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp

from sparsejax.automatic import automatic
from sparsejax.select import top_k
from sparsejax.sparse_coding import codes

Array = jax.Array

_dot = functools.partial(jnp.matmul, precision="highest")


@functools.partial(jax.jit, static_argnames="steps")
def ista(
  dictionary: Array,
  signal: Array,
  penalty: Any,
  steps: int = 200,
  *,
  step_size: Array | float | None = None,
  initial: Array | None = None,
) -> Array:
  """Proximal gradient steps on half the squared error plus a penalty.

  With the default step the objective never rises, whatever the penalty; with L1
  it converges to the Lasso. Differentiable through the steps.

  Args:
    dictionary: floating [latents, width].
    signal: floating [..., width].
    penalty: an `L1` or another, or any pytree with its `prox(z, step)`.
    steps: how many, static.
    step_size: None for one over the largest eigenvalue of the atoms' products,
      which carries no gradient.
    initial: codes [..., latents] to start from, default 0.

  Returns:
    Codes [..., latents].

  Raises:
    ValueError: for shapes that do not fit, or a negative number of steps.

  Example:
    >>> from sparsejax.sparse_coding import L1
    >>> print(ista(jnp.eye(3), jnp.array([3.0, -2.0, 0.5]), L1(1.0), 10))
    [ 2. -1.  0.]

  Source: ista-fista, A Fast Iterative Shrinkage-Thresholding Algorithm for
  Linear Inverse Problems, section 3.
  """
  kernel, x, z = _start(dictionary, signal, initial)
  _check_count("steps", steps)
  size = _step_size(kernel, step_size)

  def step(z, _):
    return penalty.prox(_descend(kernel, x, z, size), size), None

  z, _ = lax.scan(step, z, length=steps)
  return _finish(z, signal)


@functools.partial(jax.jit, static_argnames="steps")
def fista(
  dictionary: Array,
  signal: Array,
  penalty: Any,
  steps: int = 200,
  *,
  step_size: Array | float | None = None,
  initial: Array | None = None,
) -> Array:
  """`ista` with momentum: far fewer steps for a convex penalty.

  The objective may rise between steps. For penalties that are not convex there
  is no guarantee; `ista` has one.

  Args:
    dictionary: floating [latents, width].
    signal: floating [..., width].
    penalty: as in `ista`, as are those that follow.
    steps: how many, static.
    step_size: None for the largest that is safe.
    initial: codes to start from, default 0.

  Returns:
    Codes [..., latents].

  Raises:
    ValueError: as `ista`.

  Example:
    >>> from sparsejax.sparse_coding import L1
    >>> print(fista(jnp.eye(3), jnp.array([3.0, -2.0, 0.5]), L1(1.0), 10))
    [ 2. -1.  0.]

  Source: ista-fista, A Fast Iterative Shrinkage-Thresholding Algorithm for
  Linear Inverse Problems, section 4, with constant steps.
  """
  kernel, x, z = _start(dictionary, signal, initial)
  _check_count("steps", steps)
  size = _step_size(kernel, step_size)

  def step(carry, _):
    z, ahead, t = carry
    new = penalty.prox(_descend(kernel, x, ahead, size), size)
    t_new = (1 + jnp.sqrt(1 + 4 * t * t)) / 2
    return (new, new + (t - 1) / t_new * (new - z), t_new), None

  start = (z, z, jnp.ones((), z.dtype))
  (z, *_), _ = lax.scan(step, start, length=steps)
  return _finish(z, signal)


@functools.partial(jax.jit, static_argnames="k")
def omp(dictionary: Array, signal: Array, k: int) -> Array:
  """Orthogonal matching pursuit: k greedy atoms, refitted after each.

  Each step takes the atom whose angle with the residual is smallest, the lower
  index of equal ones, and the residual is then what no combination of the taken
  atoms explains. A row whose residual correlates with no atom any more, up to
  rounding, takes no more. Atoms of zeros are never taken.

  The gradient is that of the least squares on the atoms as chosen.

  Args:
    dictionary: floating [latents, width]; norms may differ.
    signal: floating [..., width].
    k: the most atoms of a row, static, from 0 to the smaller of latents and
      width: there are no more independent ones.

  Returns:
    Codes [..., latents] of at most k nonzeros.

  Raises:
    ValueError: for shapes that do not fit, or a k that does not.

  Example:
    >>> print(omp(jnp.eye(3), jnp.array([3.0, -2.0, 0.5]), 2).round())
    [ 3. -2.  0.]

  Source: omp, Orthogonal matching pursuit: recursive function approximation
  with applications to wavelet decomposition. The residual is kept by a
  Gram-Schmidt process, and the code is solved for at the end.
  """
  kernel, x, z = _start(dictionary, signal)
  codes.check_k(k, min(kernel.shape))
  if not k:
    return _finish(z, signal)
  noise = 10 * jnp.finfo(x.dtype).eps

  def choose(kernel, x):
    unit, lengths = _normalized(kernel)

    def step(carry, i):
      residual, basis, taken = carry
      scores = jnp.abs(_dot(residual, unit.T))
      scores = jnp.where(taken, -1, scores)
      j = jnp.argmax(scores)
      q = unit[j]
      for _ in range(2):  # once leaves what the first pass rounds off
        q -= _dot(_dot(basis, q), basis)
      fits = scores[j] > noise * jnp.linalg.norm(x)
      q = jnp.where(fits, q / jnp.linalg.norm(q), 0)
      residual -= _dot(q, residual) * q
      return (residual, basis.at[i].set(q), taken.at[j].set(True)), (j, fits)

    start = (x, jnp.zeros((k, len(x)), x.dtype), lengths == 0)
    return lax.scan(step, start, jnp.arange(k))[1]

  def solve(kernel, x):
    return _refit(kernel, x, *choose(*lax.stop_gradient((kernel, x))))

  return _finish(_each_row(solve, z, kernel, x), signal)


@functools.partial(jax.jit, static_argnames=("k", "signed"))
def matching_pursuit(
  dictionary: Array, signal: Array, k: int, *, signed: bool = False
) -> Array:
  """Matching pursuit: k times the best atom is taken off the residual.

  Nothing is refitted, so that an atom may come again. The residual never grows,
  and is orthogonal to the last atom. Atoms of zeros are never taken.

  Differentiable through the steps; which atoms they take has no gradient.

  Args:
    dictionary: floating [latents, width]; norms may differ.
    signal: floating [..., width].
    k: how many steps, static.
    signed: whether the best atom is that of the largest product, as in MP-SAE,
      not of the largest magnitude of it. Either way values may be negative.

  Returns:
    Codes [..., latents] of at most k nonzeros.

  Raises:
    ValueError: for shapes that do not fit, or a negative k.

  Example:
    >>> matching_pursuit(jnp.eye(3), jnp.array([3.0, -2.0, 0.5]), 2).tolist()
    [3.0, -2.0, 0.0]

  Source: omp, Matching pursuits with time-frequency dictionaries, section III;
  mp-sae, From Flat to Hierarchical: Extracting Sparse Representations with
  Matching Pursuit.
  """
  kernel, x, z = _start(dictionary, signal)
  _check_count("k", k)

  def solve(kernel, x):
    unit, lengths = _normalized(kernel)

    def step(residual, _):
      scores = _dot(residual, unit.T)
      scores = scores if signed else jnp.abs(scores)
      j = jnp.argmax(jnp.where(lengths == 0, -jnp.inf, scores))
      amount = _dot(residual, unit[j])
      return residual - amount * unit[j], (j, amount)

    _, (j, amounts) = lax.scan(step, x, length=k)
    z = jnp.zeros(len(kernel), x.dtype)
    return z.at[j].add(amounts / jnp.where(lengths == 0, 1, lengths)[j])

  return _finish(_each_row(solve, z, kernel, x), signal)


@functools.partial(jax.jit, static_argnames=("k", "steps"))
def iht(
  dictionary: Array,
  signal: Array,
  k: int,
  steps: int = 200,
  *,
  step_size: Array | float | None = None,
) -> Array:
  """Iterative hard thresholding: gradient steps that keep the k largest.

  Args:
    dictionary: floating [latents, width].
    signal: floating [..., width].
    k: how many latents of a row are kept at each step, static.
    steps: how many, static.
    step_size: as in `ista`; with the default the error never grows.

  Returns:
    Codes [..., latents] of at most k nonzeros.

  Raises:
    ValueError: for shapes that do not fit, a k beyond the latents, or a
      negative number of steps.

  Example:
    >>> iht(jnp.eye(3), jnp.array([3.0, -2.0, 0.5]), 2).tolist()
    [3.0, -2.0, 0.0]

  Source: iht, Iterative hard thresholding for compressed sensing, equation 9;
  the paper scales the dictionary instead of the step.
  """
  kernel, x, z = _start(dictionary, signal)
  codes.check_k(k, len(kernel))
  _check_count("steps", steps)
  size = _step_size(kernel, step_size)

  def step(z, _):
    z = _descend(kernel, x, z, size)
    kept = top_k.top_k_mask(jnp.abs(z), k, axis=-1)
    return jnp.where(kept, z, 0), None

  z, _ = lax.scan(step, z, length=steps)
  return _finish(z, signal)


@functools.partial(jax.jit, static_argnames=("k", "steps"))
def htp(
  dictionary: Array,
  signal: Array,
  k: int,
  steps: int = 50,
  *,
  step_size: Array | float | None = None,
) -> Array:
  """Hard thresholding pursuit: `iht` that refits the k latents at each step.

  It reaches a fixed point after few steps. The gradient is that of the last
  refit. Where chosen atoms depend on each other, the code is one of those that
  fit best.

  Steps of 1 for atoms of length 1, as in the paper, often find more than the
  default, which is safe with any dictionary.

  Args:
    dictionary: floating [latents, width].
    signal: floating [..., width].
    k: how many latents of a row, static, from 0 to the smaller of latents and
      width.
    steps: how many, static.
    step_size: as in `ista`.

  Returns:
    Codes [..., latents] of at most k nonzeros.

  Raises:
    ValueError: for shapes that do not fit, a k that does not, or a negative
      number of steps.

  Example:
    >>> print(htp(jnp.eye(3), jnp.array([3.0, -2.0, 0.5]), 2).round())
    [ 3. -2.  0.]

  Source: iht, Hard thresholding pursuit: an algorithm for compressive sensing,
  section 2; the step is that of `iht`, and their number is fixed.
  """
  kernel, x, z = _start(dictionary, signal)
  codes.check_k(k, min(kernel.shape))
  _check_count("steps", steps)
  size = _step_size(kernel, step_size)

  def refit(kernel, x, sizes):
    return _refit(kernel, x, lax.top_k(sizes, k)[1])

  def step(z, _):
    sizes = jnp.abs(_descend(kernel, x, z, size))
    return _each_row(refit, z, kernel, x, lax.stop_gradient(sizes)), None

  z, _ = lax.scan(step, z, length=steps)
  return _finish(z, signal)


@functools.partial(jax.jit, static_argnames=("rounds", "steps"))
def learn_dictionary(
  dictionary: Array,
  signal: Array,
  penalty: Any,
  rounds: int = 100,
  *,
  steps: int = 10,
) -> tuple[Array, Array]:
  """Learns a dictionary: by turns codes by `ista`, and a step of the atoms.

  Each round goes on from the codes of the one before. The atoms' step is one
  over the largest eigenvalue of the codes' products, and after it they are
  brought to length 1. An atom that no code has stays as it is.

  Args:
    dictionary: the first one, floating [latents, width].
    signal: floating [..., width], all of it in every round.
    penalty: as in `ista`.
    rounds: how many, static.
    steps: those of `ista` in a round, static.

  Returns:
    The dictionary in its dtype, atoms of length 1, and the codes
    [..., latents] that its last step was made for.

  Raises:
    ValueError: as `ista`.

  Example:
    >>> from sparsejax.sparse_coding import L1
    >>> signal = jnp.array([[3.0, 3.0], [2.0, -2.0]])
    >>> first = jnp.array([[1.0, 0.8], [0.8, -1.0]])
    >>> print(learn_dictionary(first, signal, L1(0.1))[0].round(3))
    [[ 0.707  0.707]
     [ 0.707 -0.707]]

  Source: prox-lq-v1, Beyond l1 sparse coding in V1: alternating proximal
  coding and normalized dictionary steps. The step sizes are ours.
  """
  kernel, x, z = _start(dictionary, signal)
  _check_count("rounds", rounds)
  rows, z = x.reshape(-1, x.shape[-1]), z.reshape(-1, z.shape[-1])

  def turn(carry, _):
    kernel, z = carry
    z = ista(kernel, rows, penalty, steps, initial=z)
    kernel += _step_size(z, None) * _dot(z.T, rows - _dot(z, kernel))
    return (_normalized(kernel)[0], z), None

  (kernel, z), _ = lax.scan(turn, (_normalized(kernel)[0], z), length=rounds)
  z = z.reshape(*signal.shape[:-1], -1)
  return kernel.astype(dictionary.dtype), _finish(z, signal)


def _start(dictionary, signal, initial=None):
  """The dictionary, signal and first codes as they are computed with."""
  for name, x in (("dictionary", dictionary), ("signal", signal)):
    if not jnp.issubdtype(x.dtype, jnp.floating):
      raise ValueError(f"{name} must be floating, got {x.dtype}")
  if dictionary.ndim != 2 or not dictionary.size:
    raise ValueError(
      f"dictionary must be [latents, width], got {list(dictionary.shape)}"
    )
  latents, width = dictionary.shape
  if signal.shape[-1:] != (width,):
    raise ValueError(
      f"signal must be [..., {width}] as the dictionary, "
      f"got {list(signal.shape)}"
    )
  dtype = jnp.promote_types(jnp.result_type(dictionary, signal), jnp.float32)
  kernel, x = dictionary.astype(dtype), signal.astype(dtype)
  if initial is None:
    # Zeros with the sharding of the rows.
    return kernel, x, jnp.zeros_like(_dot(x, kernel.T))
  if initial.shape != (*signal.shape[:-1], latents):
    raise ValueError(
      f"initial must be {[*signal.shape[:-1], latents]}, "
      f"got {list(initial.shape)}"
    )
  return kernel, x, initial.astype(dtype)


def _finish(z, signal):
  finite = jnp.isfinite(signal).all(-1, keepdims=True)
  return jnp.where(finite, z, jnp.nan).astype(signal.dtype)


def _check_count(name, value):
  if type(value) is not int or value < 0:
    raise ValueError(f"{name} must be an integer of at least 0, got {value!r}")


def _step_size(kernel, step_size):
  if step_size is not None:
    return jnp.asarray(step_size, kernel.dtype)
  kernel = lax.stop_gradient(kernel)
  latents, width = kernel.shape
  short = kernel if latents <= width else kernel.T
  largest = jnp.linalg.eigvalsh(_dot(short, short.T))[-1]
  return 1 / jnp.where(largest == 0, 1, largest)


def _descend(kernel, x, z, size):
  """One step down the squared error."""
  return z + size * _dot(x - _dot(z, kernel), kernel.T)


def _normalized(kernel):
  """Atoms of length 1, or 0, and the lengths."""
  squares = (kernel * kernel).sum(-1)
  lengths = jnp.sqrt(jnp.where(squares == 0, 1, squares))
  return kernel / lengths[:, None], jnp.where(squares == 0, 0, lengths)


def _each_row(solve, z, kernel, *rows):
  """solve(kernel, row, ...) of every row: codes that are divided as z is."""
  for _ in range(z.ndim - 1):
    solve = jax.vmap(solve, (None, *(0 for _ in rows)))
  return automatic(solve, kernel, *rows, out=z)


def _refit(kernel, x, chosen, fits=True):
  """Least squares of one signal on chosen atoms: a code [latents]."""
  atoms = jnp.where(jnp.reshape(fits, (-1, 1)), kernel[chosen], 0)
  atoms, lengths = _normalized(atoms)
  # The ridge is for atoms of zeros and dependent ones. What it takes off the
  # solution the further passes give back.
  ridge = 10 * len(chosen) ** 0.5 * jnp.finfo(x.dtype).eps
  products = _dot(atoms, atoms.T) + ridge * jnp.eye(len(chosen), dtype=x.dtype)
  factor = jnp.linalg.cholesky(products)
  values = jnp.zeros(len(chosen), x.dtype)
  for _ in range(3):
    left = _dot(atoms, x - _dot(values, atoms))
    values += jax.scipy.linalg.cho_solve((factor, True), left)
  values /= jnp.where(lengths == 0, 1, lengths)
  return jnp.zeros(len(kernel), x.dtype).at[chosen].add(values)
