"""What makes a code of pre-activations, as Flax modules.

A sparsifier is called as `sparsifier(pre, scores=None)`; `scores` is a function
of the pre-activations that ranks latents in the place of their values, which
the sparsifiers that rank those of a row take. A pre-activation that is NaN is
NaN in the code as well, but where k others of its row that are NaN, too, come
first in a TopK.
"""

from collections.abc import Callable
from typing import Any

from flax import nnx
import jax
from jax import lax
import jax.numpy as jnp

from sparsejax import select
from sparsejax.sparse_coding import codes
from sparsejax.sparse_coding import selection

Array = jax.Array
Scores = Callable[[Array], Array]


class LatentStatistic(nnx.Variable):
  """What is counted of latents in training; no parameter."""


class Sparsifier(nnx.Module):
  """The common part: sparsifiers that rank nothing refuse scores.

  Attributes:
    encoder_bias: whether the encoder adds a bias to the pre-activations.
    ranks: whether it takes scores.
  """

  encoder_bias = True
  ranks = False

  def encode(
    self, x: Array, kernel: Array, bias: Array | None, scores: Scores | None
  ) -> codes.Code | Array:
    """The code of inputs [..., width]; kernel is [latents, width]."""
    pre = x @ kernel.T
    pre = pre if bias is None else pre + bias
    return self(pre, scores) if self.ranks else self(pre)


class ReLU(Sparsifier):
  """What is positive; sparse where the loss has an L1 term.

  Source: l1-sae, Towards Monosemanticity: Decomposing Language Models With
  Dictionary Learning.
  """

  def __call__(self, pre: Array) -> Array:
    """[..., latents]."""
    return jax.nn.relu(pre)


class TopK(Sparsifier):
  """The k largest of each row, as a Code; see `top_k`.

  Args:
    k: of a row, static.
    schedule: None, or a function of the training step that gives how many are
      kept, such as `optax.linear_schedule(latents, k, 1000)`. The code is dense
      then, in all of training, and nothing compiles again as k changes.

  Source: topk-sae, Scaling and evaluating sparse autoencoders, section 2.3;
  llama-scope and csrv2 for the schedule.
  """

  ranks = True

  def __init__(self, k: int, *, schedule: Callable | None = None):
    self.k, self.schedule = k, schedule
    self.use_running_average = False
    steps = LatentStatistic(jnp.zeros((), jnp.int32))
    self.steps = None if schedule is None else steps

  def __call__(
    self, pre: Array, scores: Scores | None = None
  ) -> codes.Code | Array:
    """A Code of [..., latents]."""
    if self._scheduled():
      return self._annealed(pre, scores)
    return codes.top_k(pre, self.k, scores=scores)

  def encode(self, x, kernel, bias, scores):
    """The code of inputs, whose gradient reads the kept latents alone."""
    if self._scheduled():
      return super().encode(x, kernel, bias, scores)
    return codes.encode_top_k(x, kernel, bias, self.k, scores=scores)

  def _scheduled(self):
    return self.schedule is not None and not self.use_running_average

  def _annealed(self, pre, scores):
    codes.check_k(self.k, pre.shape[-1])
    k = jnp.round(self.schedule(self.steps[...])).astype(jnp.int32)
    self.steps[...] += 1
    ranked = lax.stop_gradient(pre if scores is None else scores(pre))
    mask = select.top_k_mask(ranked, jnp.maximum(k, self.k), axis=-1)
    return selection.kept(mask, jax.nn.relu(pre))


class BatchTopK(Sparsifier):
  """The largest of a whole batch; after training, what is above a threshold.

  In training the smallest value that is kept is averaged over batches. After
  `autoencoder.eval()` that average is the threshold, so that a row's code does
  not depend on the rows beside it.

  Args:
    k: of a row, on average.
    rate: of the exponential average; the first batch sets it.

  Source: batch-topk-sae, BatchTopK Sparse Autoencoders, section 3; also
  mutual-feature-choice-sae, whose mutual choice it is.
  """

  def __init__(self, k: float, *, rate: float = 0.01):
    if not 0 < rate <= 1:
      raise ValueError(f"rate must be above 0 and at most 1, got {rate}")
    self.k, self.rate = k, rate
    self.use_running_average = False
    self.threshold = LatentStatistic(jnp.float32(-1))  # none yet

  def __call__(self, pre: Array) -> Array:
    """[..., latents]."""
    if self.use_running_average:
      threshold = self.threshold[...].astype(pre.dtype)
      return selection.above(pre, jnp.maximum(threshold, 0))
    z = selection.batch_top_k(pre, self.k)
    self.threshold[...] = _averaged(self.threshold[...], z, self.rate)
    return z


class FeatureChoice(Sparsifier):
  """Of each latent the rows in which it is largest; see `feature_choice`.

  A row's code depends on the rows beside it, after `eval()` as well.

  Args:
    counts: int [latents], how many rows of a batch each latent is given.

  Source: mutual-feature-choice-sae, Adaptive Sparse Allocation with Mutual
  Choice & Feature Choice Sparse Autoencoders, section 3.
  """

  def __init__(self, counts: Any):
    self.counts = LatentStatistic(jnp.asarray(counts, jnp.int32))

  def __call__(self, pre: Array) -> Array:
    """[..., latents]."""
    return selection.feature_choice(pre, self.counts[...])


class JumpReLU(Sparsifier):
  """What is above a learned threshold of each latent; see `jump_relu`.

  Args:
    latents: how many.
    threshold: the first, positive; or [latents].
    bandwidth: of the smoothed gradient.

  Source: jumprelu-sae, Jumping Ahead: Improving Reconstruction Fidelity with
  JumpReLU Sparse Autoencoders, section 3; gemma-scope, Gemma Scope.
  """

  def __init__(
    self, latents: int, *, threshold: Any = 0.001, bandwidth: float = 0.001
  ):
    if not bandwidth > 0:
      raise ValueError(f"bandwidth must be positive, got {bandwidth}")
    if isinstance(threshold, (int, float)) and not threshold > 0:
      raise ValueError(f"threshold must be positive, got {threshold}")
    start = jnp.broadcast_to(jnp.asarray(threshold, jnp.float32), (latents,))
    if not isinstance(start, jax.core.Tracer) and not (start >= 0).all():
      raise ValueError(f"threshold must not be negative, got {threshold}")
    self.log_threshold = nnx.Param(jnp.log(start))
    self.bandwidth = bandwidth

  @property
  def threshold(self) -> Array:
    """f32 [latents]."""
    return jnp.exp(self.log_threshold[...])

  def __call__(self, pre: Array) -> Array:
    """[..., latents]."""
    threshold = self.threshold.astype(pre.dtype)
    return selection.jump_relu(pre, threshold, self.bandwidth)


class Gated(Sparsifier):
  """A gate says which latents are active, and a scaled copy how much.

  Args:
    latents: how many.

  Source: gated-sae, Improving Dictionary Learning with Gated Sparse
  Autoencoders, equations 6 and 7.
  """

  encoder_bias = False  # the gate and the magnitude have their own

  def __init__(self, latents: int):
    self.gate_bias = nnx.Param(jnp.zeros(latents))
    self.magnitude_bias = nnx.Param(jnp.zeros(latents))
    self.log_scale = nnx.Param(jnp.zeros(latents))

  def gate(self, pre: Array) -> Array:
    """What opens the gate where it is positive, [..., latents]."""
    return pre + self.gate_bias[...].astype(pre.dtype)

  def __call__(self, pre: Array) -> Array:
    """[..., latents]."""
    scale = jnp.exp(self.log_scale[...]).astype(pre.dtype)
    magnitude = scale * pre + self.magnitude_bias[...].astype(pre.dtype)
    return jnp.where(self.gate(pre) <= 0, 0, jax.nn.relu(magnitude))


def _averaged(threshold, z, rate):
  """The running threshold after a batch of codes."""
  least = jnp.min(jnp.where(z > 0, z, jnp.inf)).astype(jnp.float32)
  new = jnp.where(threshold < 0, least, threshold + rate * (least - threshold))
  return lax.stop_gradient(jnp.where(jnp.isfinite(least), new, threshold))
