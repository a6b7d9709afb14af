"""Traces of routing by hand and by enumeration of bytes and of FLOPs."""

import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax import routing
from tests import common
from tests.routing import pieces

TOKENS, EXPERTS = 7, 5
VALID = np.arange(TOKENS) != 2


@pieces.jit
def trace(logits, other, segments):
  found = routing.top_k(logits, 2, token_valid=VALID)
  return routing.step_trace(
    found,
    kept=routing.limit(found, 2)[0],
    other=routing.top_k(other, 2, token_valid=VALID),
    segments=segments,
  )


def sets_of(logits):
  """The two best experts of each token, empty for padding."""
  best = np.argsort(-logits, axis=-1, kind="stable")[:, :2]
  return [set(row) if valid else set() for row, valid in zip(best, VALID)]


def likeness(pairs):
  shares = [len(a & b) / len(a | b) for a, b in pairs if a | b]
  return np.mean(shares)


def test_a_step():
  logits, other = (
    pieces.draw(0, TOKENS, EXPERTS),
    pieces.draw(1, TOKENS, EXPERTS),
  )
  segments = np.array([0, 0, 0, 0, 1, 1, 1])
  got = trace(logits, other, segments)
  now, then = sets_of(logits), sets_of(other)
  counts = np.array([sum(e in s for s in now) for e in range(EXPERTS)])
  assert got["used"] == (counts > 0).sum()
  close = lambda name, want: np.testing.assert_allclose(got[name], want, 1e-6)
  close("load", counts / 12)
  close("max_violation", counts.max() * EXPERTS / 12 - 1)
  close("dropped", np.maximum(counts - 2, 0).sum() / 12)
  close("overlap", likeness(zip(now, then)))
  pairs = [(0, 1), (4, 5), (5, 6)]  # none of padding, or of two segments
  close("neighbors", likeness([(now[a], now[b]) for a, b in pairs]))
  again = trace(logits, logits, segments)
  assert again["overlap"] == 1
  for name in ("dropped", "neighbors", "overlap"):
    assert got[name].dtype == jnp.float32 and got[name].shape == ()


def test_nothing_is_routed():
  @pieces.jit
  def nothing(logits):
    found = routing.top_k(logits, 1, token_valid=jnp.zeros(3, bool))
    one = routing.top_k(logits[:1], 1)
    return (
      routing.step_trace(found, kept=found, other=found),
      routing.neighbor_overlap(one),
    )

  got, alone = nothing(np.zeros((3, 2), np.float32))
  for name in ("used", "dropped", "overlap", "neighbors"):
    assert got[name] == 0
  assert alone == 0


def test_expert_choice():
  @pieces.jit
  def choose(logits):
    found = routing.expert_choice(logits, 1, scores="identity")
    return routing.step_trace(found, other=found)

  got = choose(np.array([[3, 0], [2, 5], [1, 0]], np.float32))
  # Token 0 has expert 0, token 1 has expert 1, token 2 nothing.
  assert got["used"] == 2 and got["neighbors"] == 0 and got["overlap"] == 1


def test_steps_are_stacked():
  logits = pieces.draw(2, TOKENS, EXPERTS)
  steps = [trace(logits, logits[::-1], np.zeros(TOKENS, int)) for _ in range(3)]
  stacked = routing.stack_traces(iter(steps))
  assert set(stacked) == set(steps[0])
  assert stacked["load"].shape == (3, EXPERTS) and stacked["used"].shape == (3,)
  with pytest.raises(ValueError, match="steps must have the same names"):
    routing.stack_traces([{"a": 1}, {"b": 1}])
  with pytest.raises(ValueError, match="steps must have the same names"):
    routing.stack_traces([])


# Two layers, three experts, the choices of four tokens in each; two bytes a
# number.
CHOICES = [[{0, 1}, {0, 1}, {0, 2}, {0, 1}], [{2, 1}, {2, 1}, {1, 2}, {2, 1}]]
WIDTH, HIDDEN, ATTENTION, CACHE, SECONDS, PEAK = 4, 8, 64, 40, 0.25, 1e5


def enumerated(choices):
  """Bytes read and FLOPs run, counted one by one."""
  read, flops = 0, 0
  expert = 3 * WIDTH * HIDDEN
  for layer in choices:
    read += 2 * ATTENTION
    for _ in set().union(*layer):
      read += 2 * expert
    for token in layer:
      flops += 2 * ATTENTION
      for _ in token:
        flops += 2 * expert
  return read + CACHE, flops


def utilization(choices):
  used = [len(set().union(*layer)) for layer in choices]
  edges = [sum(len(token) for token in layer) for layer in choices]
  expert = 3 * WIDTH * HIDDEN
  rest = dict(seconds=SECONDS, peak=PEAK)
  return (
    routing.s_mbu(
      used,
      expert_bytes=2 * expert,
      other_bytes=2 * 2 * ATTENTION,
      cache_bytes=CACHE,
      **rest,
    ),
    routing.s_mfu(
      edges,
      tokens=4,
      expert_flops=2 * expert,
      token_flops=2 * 2 * ATTENTION,
      **rest,
    ),
  )


def test_utilization_is_what_an_enumeration_gives():
  read, flops = enumerated(CHOICES)
  want = read / SECONDS / PEAK, flops / SECONDS / PEAK
  np.testing.assert_allclose(utilization(CHOICES), want, rtol=1e-12)


def test_utilization_of_all_experts_is_the_dense_one():
  everything = [[{0, 1, 2}] * 4] * 2
  weights = 2 * (ATTENTION + 3 * 3 * WIDTH * HIDDEN)
  mbu = (2 * weights + CACHE) / SECONDS / PEAK
  mfu = 4 * 2 * weights / SECONDS / PEAK  # two FLOPs, and two bytes, a weight
  np.testing.assert_allclose(utilization(everything), (mbu, mfu), rtol=1e-12)


def test_utilization_of_many_steps():
  used = np.array([[2, 3], [1, 1], [3, 3]])
  got = routing.s_mbu(
    used, expert_bytes=10, other_bytes=5, seconds=np.array([1, 2, 1]), peak=100
  )
  np.testing.assert_allclose(got, [0.55, 0.125, 0.65])
  one = routing.s_mfu(
    6, tokens=3, expert_flops=10, token_flops=20, seconds=1, peak=240
  )
  assert one == 0.5


@pytest.mark.slow
@pytest.mark.parametrize("axis_type", common.AXIS_TYPES)
def test_eight_devices(axis_type):
  weights = pieces.draw(8, 3, EXPERTS)

  def f(x):
    found = routing.top_k(x @ weights, 2)
    kept, _ = routing.limit(found, 3)
    return routing.step_trace(found, kept=kept, other=found)

  pieces.compare_on_eight_devices(f, pieces.draw(9, 16, 3), axis_type)


def test_bad_input():
  one, two = (routing.top_k(jnp.zeros((2, e)), 1) for e in (2, 3))
  with pytest.raises(ValueError, match=r"other must be of tokens and experts"):
    routing.overlap(one, two)
  with pytest.raises(ValueError, match=r"segments must be int\[2\], got \[3\]"):
    routing.neighbor_overlap(one, segments=jnp.zeros(3, int))
  with pytest.raises(ValueError, match="kept must have the 2 edges of found"):
    routing.step_trace(one, kept=routing.top_k(jnp.zeros((2, 2)), 2))
  given = dict(expert_bytes=1, other_bytes=1)
  for seconds, peak in ((0, 1), (1, 0), (np.nan, 1), (np.array([1, -1]), 1)):
    with pytest.raises(ValueError, match="seconds and peak must be positive"):
      routing.s_mbu([1], seconds=seconds, peak=peak, **given)
