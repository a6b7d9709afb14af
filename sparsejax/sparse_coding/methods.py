"""Published autoencoders, as constructors: parts that are chosen together.

Each gives an `Autoencoder`. Further settings, such as `outputs` for a
transcoder or `latent_metadata`, are those of that class; each constructor is
short, and to be copied where a part should differ.
"""

from collections.abc import Callable, Sequence
import functools
from typing import Any

import optax

from sparsejax.sparse_coding import losses
from sparsejax.sparse_coding import proximal
from sparsejax.sparse_coding import selection
from sparsejax.sparse_coding import solvers
from sparsejax.sparse_coding import sparsifiers
from sparsejax.sparse_coding.autoencoders import Autoencoder

AUXILIARY = 1 / 32  # of DeadLatents, in all papers that have it
DEAD_AFTER = 10_000_000


def l1_sae(
  width: int, latents: int, *, weight: float, **settings: Any
) -> Autoencoder:
  """ReLU and an L1 term; train it with `unit_norm`, or without.

  Args:
    width: of inputs.
    latents: how many.
    weight: of `l1_loss`.
    **settings: others of `Autoencoder`, such as `rngs`.

  Source: l1-sae, Towards Monosemanticity: Decomposing Language Models With
  Dictionary Learning.
  """
  terms = {losses.squared_error: 1.0, losses.l1_loss: weight}
  return Autoencoder(width, latents, losses=terms, **settings)


def gated_sae(
  width: int, latents: int, *, weight: float, **settings: Any
) -> Autoencoder:
  """Gates say which latents are active; L1 is on the gates alone.

  Args:
    width: of inputs.
    latents: how many.
    weight: of `gate_l1`.
    **settings: others of `Autoencoder`, such as `rngs`.

  Source: gated-sae, Improving Dictionary Learning with Gated Sparse
  Autoencoders, equations 6 to 8.
  """
  terms = {
    losses.squared_error: 1.0,
    losses.gate_l1: weight,
    losses.gate_error: 1.0,
  }
  return Autoencoder(
    width, latents, sparsifiers.Gated(latents), losses=terms, **settings
  )


def jump_relu_sae(
  width: int,
  latents: int,
  *,
  weight: float,
  threshold: float = 0.001,
  bandwidth: float = 0.001,
  **settings: Any,
) -> Autoencoder:
  """Learned thresholds and an L0 term; train it with `unit_norm`.

  Args:
    width: of inputs, which should have a mean square of one.
    latents: how many.
    weight: of `l0_loss`.
    threshold: the first.
    bandwidth: as `JumpReLU` takes it.
    **settings: others of `Autoencoder`, such as `rngs`.

  Source: gemma-scope, Gemma Scope: Open Sparse Autoencoders Everywhere All At
  Once on Gemma 2, section 3; jumprelu-sae, Jumping Ahead: Improving
  Reconstruction Fidelity with JumpReLU Sparse Autoencoders.
  """
  terms = {losses.squared_error: 1.0, losses.l0_loss: weight}
  sparsifier = sparsifiers.JumpReLU(
    latents, threshold=threshold, bandwidth=bandwidth
  )
  return Autoencoder(width, latents, sparsifier, losses=terms, **settings)


def top_k_sae(
  width: int,
  latents: int,
  k: int,
  *,
  dead_after: int = DEAD_AFTER,
  **settings: Any,
) -> Autoencoder:
  """The k largest of each row; dead latents learn from what is left.

  Args:
    width: of inputs.
    latents: how many.
    k: of a row.
    dead_after: rows without activity, see `DeadLatents`.
    **settings: others of `Autoencoder`, such as `rngs`.

  Source: topk-sae, Scaling and evaluating sparse autoencoders, section 2.3 and
  appendix A.2.
  """
  return Autoencoder(
    width,
    latents,
    sparsifiers.TopK(k),
    losses=_with_auxiliary(dead_after),
    **settings,
  )


def batch_top_k_sae(
  width: int,
  latents: int,
  k: float,
  *,
  dead_after: int = DEAD_AFTER,
  **settings: Any,
) -> Autoencoder:
  """The k largest of a row on average, of a batch; later a threshold.

  Args:
    width: of inputs.
    latents: how many.
    k: of a row, on average.
    dead_after: rows without activity, see `DeadLatents`.
    **settings: others of `Autoencoder`, such as `rngs`.

  Source: batch-topk-sae, BatchTopK Sparse Autoencoders, section 3.
  """
  return Autoencoder(
    width,
    latents,
    sparsifiers.BatchTopK(k),
    losses=_with_auxiliary(dead_after),
    **settings,
  )


def mutual_choice_sae(
  width: int,
  latents: int,
  k: float,
  *,
  exponent: float = 1.0,
  offset: float = 0.0,
  **settings: Any,
) -> Autoencoder:
  """As `batch_top_k_sae`; latents below Zipf's law learn from what is left.

  Args:
    width: of inputs.
    latents: how many.
    k: of a row, on average.
    exponent: of the law, see `ZipfAuxiliary`.
    offset: likewise.
    **settings: others of `Autoencoder`, such as `rngs`.

  Source: mutual-feature-choice-sae, Adaptive Sparse Allocation with Mutual
  Choice & Feature Choice Sparse Autoencoders, section 3. Exponent, offset and
  the weight of the auxiliary loss are ours.
  """
  return Autoencoder(
    width,
    latents,
    sparsifiers.BatchTopK(k),
    losses=_with_zipf(exponent, offset),
    **settings,
  )


def feature_choice_sae(
  width: int,
  latents: int,
  k: float,
  *,
  rows: int,
  exponent: float = 1.0,
  offset: float = 0.0,
  **settings: Any,
) -> Autoencoder:
  """Each latent has its share of a batch's rows, after Zipf's law.

  Args:
    width: of inputs.
    latents: how many.
    k: of a row, on average.
    rows: of a batch, on which the shares depend.
    exponent: of the law, see `zipf_counts`.
    offset: likewise.
    **settings: others of `Autoencoder`, such as `rngs`.

  Source: mutual-feature-choice-sae, Adaptive Sparse Allocation with Mutual
  Choice & Feature Choice Sparse Autoencoders, section 3. Exponent, offset and
  the weight of the auxiliary loss are ours.
  """
  counts = selection.zipf_counts(
    int(k * rows), latents, exponent=exponent, offset=offset, most=rows
  )
  return Autoencoder(
    width,
    latents,
    sparsifiers.FeatureChoice(counts),
    losses=_with_zipf(exponent, offset),
    **settings,
  )


def gradient_sae(
  width: int,
  latents: int,
  k: int,
  *,
  beta: float,
  dead_after: int = DEAD_AFTER,
  **settings: Any,
) -> Autoencoder:
  """`top_k_sae` that ranks latents by what they do to a loss downstream, too.

  `encode` and `loss` take that loss's `gradient` in the inputs.

  Args:
    width: of inputs.
    latents: how many.
    k: of a row.
    beta: how much the gradient counts; 0 is `top_k_sae`.
    dead_after: rows without activity, see `DeadLatents`.
    **settings: others of `Autoencoder`, such as `rngs`.

  Source: g-sae, Features that Make a Difference: Leveraging Gradients for
  Improved Dictionary Learning, section 3.
  """
  score = functools.partial(selection.gradient_aware, beta=beta)
  return top_k_sae(
    width, latents, k, dead_after=dead_after, score=score, **settings
  )


def llama_scope_sae(
  width: int,
  latents: int,
  k: int,
  *,
  steps: int,
  dead_after: int = DEAD_AFTER,
  **settings: Any,
) -> Autoencoder:
  """Ranks by what a latent adds, and begins with all of them.

  After training `fold_norms(to_jump_relu(autoencoder, x))` is what is released.

  Args:
    width: of inputs.
    latents: how many.
    k: of a row, in the end.
    steps: in which the number kept falls from all to k, linearly.
    dead_after: rows without activity, see `DeadLatents`.
    **settings: others of `Autoencoder`, such as `rngs`.

  Source: llama-scope, Llama Scope: Extracting Millions of Features from
  Llama-3.1-8B with Sparse Autoencoders, section 3.
  """
  schedule = optax.linear_schedule(latents, k, steps)
  return Autoencoder(
    width,
    latents,
    sparsifiers.TopK(k, schedule=schedule),
    score=selection.norm_aware,
    losses=_with_auxiliary(dead_after),
    **settings,
  )


def matryoshka_sae(
  width: int,
  latents: int,
  k: float,
  sizes: Sequence[int],
  *,
  dead_after: int = DEAD_AFTER,
  **settings: Any,
) -> Autoencoder:
  """A BatchTopK whose first latents must do alone, for several sizes.

  Args:
    width: of inputs.
    latents: how many.
    k: of a row, on average.
    sizes: as `NestedPrefixes` takes them; the last is all latents.
    dead_after: rows without activity, see `DeadLatents`.
    **settings: others of `Autoencoder`, such as `rngs`.

  Source: matryoshka-sae, Learning Multi-Level Features with Matryoshka Sparse
  Autoencoders, section 3. Prefixes are given; the paper also draws them.
  """
  # Or the auxiliary term, which is a share, would not count.
  error = losses.NestedPrefixes(tuple(sizes), normalized=True)
  return Autoencoder(
    width,
    latents,
    sparsifiers.BatchTopK(k),
    losses=_with_auxiliary(dead_after, error),
    **settings,
  )


def msae(
  width: int,
  latents: int,
  ks: Sequence[int],
  *,
  weights: Sequence[float] | None = None,
  **settings: Any,
) -> Autoencoder:
  """A TopK that is to do with fewer latents as well, for several budgets.

  Args:
    width: of inputs.
    latents: how many.
    ks: as `NestedBudgets` takes them; the last is that of the code.
    weights: likewise, default 1 each.
    **settings: others of `Autoencoder`, such as `rngs`.

  Source: msae-clip, Interpreting CLIP with Hierarchical Sparse Autoencoders,
  section 3.
  """
  error = losses.NestedBudgets(tuple(ks), weights)
  return Autoencoder(
    width, latents, sparsifiers.TopK(ks[-1]), losses={error: 1.0}, **settings
  )


def hierarchical_top_k_sae(
  width: int, latents: int, k: int, **settings: Any
) -> Autoencoder:
  """A TopK that is to do with any number of its latents.

  Args:
    width: of inputs.
    latents: how many.
    k: of a row at most.
    **settings: others of `Autoencoder`, such as `rngs`.

  Source: hierarchical-topk-sae, Train One Sparse Autoencoder Across Multiple
  Sparsity Budgets to Preserve Interpretability and Accuracy, section 3.
  """
  terms = {losses.AllBudgets(): 1.0}
  return Autoencoder(
    width, latents, sparsifiers.TopK(k), losses=terms, **settings
  )


def ort_sae(
  width: int,
  latents: int,
  k: float,
  *,
  chunks: int,
  weight: float = 0.25,
  dead_after: int = DEAD_AFTER,
  **settings: Any,
) -> Autoencoder:
  """A BatchTopK whose atoms are pushed apart; `loss` takes a `key`.

  Args:
    width: of inputs.
    latents: how many.
    k: of a row, on average.
    chunks: as `Orthogonality` takes them.
    weight: of that term, next to the normalized error.
    dead_after: rows without activity, see `DeadLatents`.
    **settings: others of `Autoencoder`, such as `rngs`.

  Source: ortsae, OrtSAE: Orthogonal Sparse Autoencoders Uncover Atomic
  Features, section 3.
  """
  terms = {**_with_auxiliary(dead_after), losses.Orthogonality(chunks): weight}
  return Autoencoder(
    width, latents, sparsifiers.BatchTopK(k), losses=terms, **settings
  )


def mp_sae(width: int, latents: int, k: int, **settings: Any) -> Autoencoder:
  """Codes by k steps of matching pursuit; train it with `unit_norm`.

  Args:
    width: of inputs.
    latents: how many.
    k: steps, each of which adds to one latent.
    **settings: others of `Autoencoder`, such as `rngs`.

  Source: mp-sae, From Flat to Hierarchical: Extracting Sparse Representations
  with Matching Pursuit.
  """
  solver = functools.partial(solvers.matching_pursuit, k=k, signed=True)
  return Autoencoder(width, latents, solver=solver, **settings)


def ista_sae(
  width: int, latents: int, *, weight: float, steps: int, **settings: Any
) -> Autoencoder:
  """Codes by steps of ISTA that gradients go through; train with `unit_norm`.

  Args:
    width: of inputs.
    latents: how many.
    weight: of the L1 penalty that ISTA minimizes.
    steps: how many.
    **settings: others of `Autoencoder`, such as `rngs`.

  Source: ista-fista, A Fast Iterative Shrinkage-Thresholding Algorithm for
  Linear Inverse Problems, section 3.
  """
  penalty = proximal.L1(weight, nonnegative=True)
  solver = functools.partial(solvers.ista, penalty=penalty, steps=steps)
  return Autoencoder(width, latents, solver=solver, **settings)


def _with_auxiliary(
  dead_after: int, error: Callable = losses.normalized_error
) -> dict[Callable, float]:
  return {error: 1.0, losses.DeadLatents(dead_after): AUXILIARY}


def _with_zipf(exponent: float, offset: float) -> dict[Callable, float]:
  auxiliary = losses.ZipfAuxiliary(exponent, offset)
  return {losses.normalized_error: 1.0, auxiliary: AUXILIARY}
