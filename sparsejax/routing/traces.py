"""What routing did over steps: numbers to log, and what they cost."""

from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax.automatic import automatic
from sparsejax.routing import balancing
from sparsejax.routing.assignment import Assignment

Array = jax.Array


def step_trace(
  found: Assignment,
  *,
  kept: Assignment | None = None,
  other: Assignment | None = None,
  segments: Array | None = None,
) -> dict[str, Array]:
  """What to record of a step in a layer: `metrics`, and

  used: int32, the experts that some token goes to;
  neighbors: `neighbor_overlap`;
  dropped: f32, the share of the valid edges that `kept` lacks, where given;
  overlap: `overlap` with `other`, where given.

  Args:
    found: what a router returned.
    kept: None, or what `limit` left of it.
    other: None, or the assignment of the same tokens at another step.
    segments: None, or int32 [tokens]: of which sequence a token is.

  Returns:
    The names above, and those of `metrics`; to be collected by `stack_traces`.

  Raises:
    ValueError: for assignments that do not fit each other.

  >>> found = routing.top_k(jnp.array([[2.0, 0.0], [1.0, 0.0]]), 1)
  >>> trace = routing.step_trace(found, kept=routing.limit(found, 1)[0])
  >>> [trace[name].item() for name in ("used", "neighbors", "dropped")]
  [1, 1.0, 0.5]
  """
  trace = balancing.metrics(found)
  trace["used"] = (found.sizes > 0).sum(dtype=jnp.int32)
  trace["neighbors"] = neighbor_overlap(found, segments=segments)
  if kept is not None:
    if kept.valid.shape != found.valid.shape:
      raise ValueError(
        f"kept must have the {found.valid.shape[0]} edges of found, got "
        f"{kept.valid.shape[0]}"
      )
    lost = (found.valid & ~kept.valid).sum()
    share = lost / jnp.maximum(found.valid.sum(), 1)
    trace["dropped"] = share.astype(jnp.float32)
  if other is not None:
    trace["overlap"] = overlap(found, other)
  return trace


def stack_traces(steps: Iterable[Mapping[str, Array]]) -> dict[str, np.ndarray]:
  """Traces of steps as one, with a leading dimension of steps.

  Args:
    steps: of the same names and shapes: `step_trace`, or what `MoE.metrics`
      holds after a step.

  Raises:
    ValueError: for steps with different names, or none.

  >>> steps = [{"entropy": jnp.ones(())}, {"entropy": jnp.zeros(())}]
  >>> routing.stack_traces(steps)["entropy"].tolist()
  [1.0, 0.0]
  """
  steps = [dict(step) for step in steps]
  names = {frozenset(step) for step in steps}
  if len(names) != 1:
    raise ValueError(
      f"steps must have the same names, got {sorted(map(sorted, names))}"
    )
  return {
    name: np.stack([np.asarray(step[name]) for step in steps])
    for name in steps[0]
  }


def overlap(found: Assignment, other: Assignment) -> Array:
  """How alike the choices of the same tokens are at two steps.

  The mean, over the tokens that go to an expert in either, of how many experts
  both have in common over how many there are in both together: 1 where nothing
  changed, 0 where everything did.

  Returns:
    f32 scalar; 0 where no token goes anywhere.

  Raises:
    ValueError: they are of different numbers of tokens or experts.

  >>> one = routing.top_k(jnp.array([[3.0, 2.0, 1.0]]), 2)
  >>> two = routing.top_k(jnp.array([[1.0, 2.0, 3.0]]), 2)
  >>> print(f"{routing.overlap(one, two):.4f}")
  0.3333
  """
  shapes = [x.probabilities.shape for x in (found, other)]
  if shapes[0] != shapes[1]:
    raise ValueError(
      f"other must be of tokens and experts {list(shapes[0])}, got "
      f"{list(shapes[1])}"
    )
  return _likeness(_chosen(found), _chosen(other))


def neighbor_overlap(
  found: Assignment, *, segments: Array | None = None
) -> Array:
  """How alike the choices of a token and of the one behind it are.

  Args:
    found: what a router returned, of tokens in their order.
    segments: None, or int [tokens]: only pairs of one segment count.

  Returns:
    f32 scalar, as of `overlap`, over pairs of tokens that both count; 0 where
    there is none.

  Raises:
    ValueError: segments are not of the tokens.

  >>> logits = jnp.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
  >>> routing.neighbor_overlap(routing.top_k(logits, 1)).item()
  0.5
  """
  if segments is None:
    segments = jnp.zeros_like(found.token_valid)
  elif segments.shape != found.token_valid.shape:
    raise ValueError(
      f"segments must be int[{found.num_tokens}], got {list(segments.shape)}"
    )

  def compare(chosen, valid, segments):
    pairs = valid[1:] & valid[:-1] & (segments[1:] == segments[:-1])
    return _likeness(chosen[1:] & pairs[:, None], chosen[:-1] & pairs[:, None])

  return automatic(compare, _chosen(found), found.token_valid, segments)


def s_mbu(
  used: np.ndarray,
  *,
  expert_bytes: float,
  other_bytes: float,
  cache_bytes: float = 0,
  seconds: np.ndarray,
  peak: float,
) -> np.ndarray:
  """What share of the memory bandwidth a step needs, read once (S-MBU).

  Of the experts, only those that some token goes to are read. With all of them
  it is the usual model bandwidth utilization (MBU).

  Args:
    used: int [..., layers], experts that a step goes to: "used" of
      `step_trace`.
    expert_bytes: of an expert's weights.
    other_bytes: of all other weights that a step reads: attention, routers,
      shared experts.
    cache_bytes: of the keys and values that a step reads.
    seconds: [...], that a step took: the time per output token when decoding.
    peak: bytes a second, of all devices.

  Returns:
    float64 [...].

  Raises:
    ValueError: seconds or the peak are not positive.

  >>> float(
  ...   routing.s_mbu(
  ...     [2, 3], expert_bytes=100, other_bytes=500, seconds=0.5, peak=4000
  ...   )
  ... )
  0.5

  Source: moe-cap, MoE-CAP: Benchmarking Cost, Accuracy and Performance of
  Sparse Mixture-of-Experts Systems, section on sparsity-aware metrics.
  """
  needed = _sum(used) * expert_bytes + other_bytes + cache_bytes
  return _utilization(needed, seconds, peak)


def s_mfu(
  edges: np.ndarray,
  *,
  tokens: np.ndarray,
  expert_flops: float,
  token_flops: float,
  seconds: np.ndarray,
  peak: float,
) -> np.ndarray:
  """What share of the peak FLOPs a step needs (S-MFU).

  Of the experts, each token counts those that it goes to. With all of them it
  is the usual model FLOPs utilization (MFU).

  Args:
    edges: int [..., layers], valid edges of a step: tokens x k without drops.
      "edges" of `step_trace` are those of a token.
    tokens: [...], how many a step processes.
    expert_flops: of one token in one expert.
    token_flops: of one token in all else: attention, routers, shared experts.
    seconds: [...], that a step took.
    peak: FLOPs a second, of all devices.

  Returns:
    float64 [...].

  Raises:
    ValueError: seconds or the peak are not positive.

  >>> float(
  ...   routing.s_mfu(
  ...     [8, 8],
  ...     tokens=4,
  ...     expert_flops=10,
  ...     token_flops=60,
  ...     seconds=0.5,
  ...     peak=1600,
  ...   )
  ... )
  0.5

  Source: moe-cap, MoE-CAP: Benchmarking Cost, Accuracy and Performance of
  Sparse Mixture-of-Experts Systems, section on sparsity-aware metrics.
  """
  needed = _sum(edges) * expert_flops + np.asarray(tokens) * token_flops
  return _utilization(needed, seconds, peak)


def _chosen(found):
  """bool [tokens, experts]"""
  shape = found.probabilities.shape
  mark = lambda token, expert, valid: (
    jnp.zeros(shape, bool).at[token, expert].max(valid)
  )
  return automatic(mark, found.token, found.expert, found.valid)


def _likeness(a, b):
  both, either = (a & b).sum(-1), (a | b).sum(-1)
  share = (both / jnp.maximum(either, 1)).astype(jnp.float32)
  return share.sum() / jnp.maximum((either > 0).sum(), 1)


def _sum(by_layer):
  return np.atleast_1d(np.asarray(by_layer)).sum(-1, dtype=np.float64)


def _utilization(needed, seconds, peak):
  seconds = np.asarray(seconds, np.float64)
  if not (seconds > 0).all() or not peak > 0:
    raise ValueError(
      f"seconds and peak must be positive, got {seconds} and {peak}"
    )
  return needed / seconds / peak
