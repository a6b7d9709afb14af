"""Activations that are mostly zero, against what computes them all.

Statistical top-k stands against `lax.top_k`; a decode step of one token, whose
feed-forward layers read the rows of what fires, against dense ones. One layer
may stay in the cache; as many as 128 MiB come from memory, as a model's do.
"""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from experiments.bench import timing
from sparsejax import activations

TOKENS, NEURONS = 2048, 8192
WIDTH, HIDDEN = 1024, 4096
SPARSITY = 0.8
MODEL = 2**27  # bytes of dense kernels that no cache holds
CAPACITY = HIDDEN // 2


def layer(seed: int, gated: bool) -> dict[str, jax.Array]:
  """Kernels as Flax has them."""
  keys = jax.random.split(jax.random.key(seed), 3)
  names = ("gate", "up", "down") if gated else ("up", "down")
  shapes = {"down": (HIDDEN, WIDTH)}
  return {
    name: jax.random.normal(key, shapes.get(name, (WIDTH, HIDDEN))) / 32
    for name, key in zip(names, keys)
  }


def quantile(x: jax.Array) -> jax.Array:
  """The threshold that leaves 20% of x."""
  return activations.Magnitudes.zeros().add(x).quantile(SPARSITY)


def dense(x, params, activation):
  """The layer as it is."""
  hidden = activation(x @ params["gate" if "gate" in params else "up"])
  if "gate" in params:
    hidden *= x @ params["up"]
  return hidden @ params["down"]


def by_gate(params, x):
  """A threshold after the first product (CATS), and what runs with it."""
  gated = "gate" in params
  act = jax.nn.silu if gated else jax.nn.relu
  rows = dict(params)
  if gated:
    rows["up_rows"] = rows.pop("up").T
  limit = quantile(act(x @ params["gate" if gated else "up"]))

  def run(x, given):
    rows, limit = given
    keep = lambda s: activations.keep_above(act(s), limit)
    return activations.sparse_ffn(x, rows, keep, capacity=CAPACITY)

  return run, (rows, limit)


def by_inputs(params, x):
  """A threshold at each product (TEAL), and what runs with them."""
  gated = "gate" in params
  act = jax.nn.silu if gated else jax.nn.relu
  limits = dict.fromkeys(params, quantile(x))
  kept = activations.keep_above(x, limits["up"])
  hidden = act(kept @ params["gate" if gated else "up"])
  hidden *= kept @ params["up"] if gated else 1
  limits["down"] = quantile(hidden)

  def run(x, given):
    params, limits = given
    return activations.threshold_ffn(x, params, act, limits, capacity=CAPACITY)

  return run, (params, limits)


def decode(gated: bool, thresholds, layers: int) -> tuple[Any, Any]:
  """Contestants: ours and dense, of layers one behind the other."""
  x = jax.random.normal(jax.random.key(99), (1, WIDTH))
  act = jax.nn.silu if gated else jax.nn.relu
  plain = lambda x, params: dense(x, params, act)
  kernels, ours, seen = [], [], x
  for seed in range(layers):
    params = layer(seed, gated)
    run, given = thresholds(params, seen)
    kernels.append(params)
    ours.append(given)
    seen = normal(run(seen, given))

  def chain(f):
    def run_all(x, given):
      for one in given:
        x = normal(f(x, one))
      return x

    return jax.jit(run_all)

  return (
    timing.timed(chain(run), x, ours),
    timing.timed(chain(plain), x, kernels),
  )


def normal(x: jax.Array) -> jax.Array:
  """Of size one, as a norm between the layers would have it."""
  return x / jnp.sqrt((x**2).mean())


def cases(bandwidth: float) -> Iterator[timing.Case]:
  """Rows, given the bytes per second that this machine reads."""
  x = jax.random.normal(jax.random.key(0), (TOKENS, NEURONS))
  k = NEURONS * 8 // 100
  yield timing.Case(
    name=f"statistical top-{k} of {TOKENS} x {NEURONS} f32",
    ours=timing.timed(
      jax.jit(lambda x: activations.statistical_top_k(x, k)), x
    ),
    peers={
      "lax.top_k": timing.timed(jax.jit(lambda x: jax.lax.top_k(x, k)), x),
      "exact top_k": timing.timed(
        jax.jit(lambda x: activations.top_k(x, k)), x
      ),
    },
    target={"lax.top_k": 5},
    limit=2 * x.nbytes / bandwidth,
    note="limit: one read and one write; lax.top_k gives values and indices, "
    "and zeroes nothing",
  )
  for gated in (True, False):
    kernels = 3 if gated else 2
    size = 4 * kernels * WIDTH * HIDDEN
    for how, thresholds, read in (
      ("after the first product", by_gate, 1 + (kernels - 1) / 5),
      ("at each product", by_inputs, kernels / 5),
    ):
      for layers in (1, MODEL // size):
        ours, theirs = decode(gated, thresholds, layers)
        yield timing.Case(
          name=f"{'SwiGLU' if gated else 'ReLU'} {WIDTH} x {HIDDEN}, batch 1, "
          f"80% zero {how}, {layers} layer{'s' * (layers > 1)}",
          ours=ours,
          peers={"jax dense": theirs},
          # A ReLU layer reads 1.2 of 2 kernels: at most 1.67 times less.
          target={"jax dense": 2} if kernels / read > 2 else {},
          limit=layers * size * read / kernels / bandwidth,
          note="limit: one read of the rows needed",
        )


def facts() -> dict[str, Any]:
  """None."""
  return {}
