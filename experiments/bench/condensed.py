"""Sparse layers on CPU against the dense ones that they replace.

Masks are random: blocks are as uneven over the columns as chance makes them. A
layer alone is measured in the cache, where a dense one stays that fits. Layers
of a model come from memory, so some that together do not fit are measured, too.
"""

from collections.abc import Iterator
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from experiments.bench import timing
from sparsejax import select
from sparsejax import weights

SMALL, LARGE = (768, 3072), (2048, 8192)
KINDS = {
  "blocks of 16": select.Block((16, 16)),
  "blocks of 32": select.Block((32, 32)),
  "blocks of 64": select.Block((64, 64)),
  "constant fan-in": select.ConstantFanIn(),
}
# (kind, shape, batch): the least ratio that is aimed at, or None.
ROWS = {
  **{("blocks of 32", SMALL, n): 2 for n in (1, 8, 16, 64, 128)},
  ("blocks of 32", SMALL, 1024): None,
  **{("constant fan-in", SMALL, n): 1.5 for n in (1, 4, 8, 16)},
  ("constant fan-in", SMALL, 128): None,
  ("constant fan-in", LARGE, 1): 3.5,
}
MODEL = 2**27  # bytes of dense kernels that no cache holds
# What the crossovers are looked for in, at SMALL.
BATCHES = (1, 8, 16, 64, 128, 256, 1024)
SPARSITIES = (0.5, 0.7, 0.8, 0.9, 0.95)


@functools.cache
def layer(kind: str, shape: tuple[int, int], sparsity: float, seed: int = 0):
  """The condensed kernel and the dense one, with zeros."""
  keys = jax.random.split(jax.random.key(seed))
  mask = KINDS[kind].mask(jax.random.uniform(keys[0], shape), 1 - sparsity)
  params = {"w": jnp.where(mask, jax.random.normal(keys[1], shape), 0)}
  masks = {"w": mask}
  return weights.condense(params, masks, KINDS[kind])["w"], params["w"]


def backward(f):
  """The gradients of f's sum of squares by both of its arguments."""
  return jax.grad(lambda x, w: (f(x, w) ** 2).sum(), (0, 1))


def contestants(kind, shape, sparsity, batch, gradients=False):
  """Ours and the dense layer's."""
  weight, kernel = layer(kind, shape, sparsity)
  x = jax.random.normal(jax.random.key(2), (batch, shape[0]))

  def ours(x, values):
    w = dataclasses.replace(weight, values=values)
    return weights.condensed_matmul(x, w)

  theirs = lambda x, w: x @ w
  if gradients:
    return (
      timing.timed(jax.jit(backward(ours)), x, weight.values),
      timing.timed(jax.jit(backward(theirs)), x, kernel),
    )
  return (
    timing.timed(jax.jit(weights.condensed_matmul), x, weight),
    timing.timed(jax.jit(theirs), x, kernel),
  )


def model(kind, shape, batch):
  """The same of as many layers as are MODEL bytes, one behind the other."""
  count = MODEL // (4 * shape[0] * shape[1])
  kernels = zip(*(layer(kind, shape, 0.9, seed) for seed in range(count)))
  x = jax.random.normal(jax.random.key(2), (batch, shape[0]))

  def chain(f):
    def run(x, kernels):
      for w in kernels:
        y = f(x[:, : shape[0]], w)
        x = y / jnp.abs(y).max()
      return x

    return jax.jit(run)

  return count, [
    timing.timed(chain(f), x, list(ws))
    for f, ws in zip((weights.condensed_matmul, jnp.matmul), kernels)
  ]


def cases(bandwidth: float) -> Iterator[timing.Case]:
  """Rows at 90%; the limit is to read the condensed kernels once."""
  for (kind, shape, batch), target in ROWS.items():
    bytes_read = sum(
      a.nbytes for a in jax.tree.leaves(layer(kind, shape, 0.9)[0])
    )
    count, many = model(kind, shape, batch)
    for label, layers, (ours, theirs) in (
      ("", 1, contestants(kind, shape, 0.9, batch)),
      (f", {count} layers", count, many),
    ):
      yield timing.Case(
        name=f"{kind}, 90%, {shape[0]} x {shape[1]}, batch {batch}{label}",
        ours=ours,
        peers={"jax dense": theirs},
        target={} if target is None else {"jax dense": target},
        limit=layers * bytes_read / bandwidth,
      )
  for kind in ("blocks of 32", "constant fan-in"):
    ours, theirs = contestants(kind, SMALL, 0.9, 128, gradients=True)
    yield timing.Case(
      name=f"{kind}, 90%, 768 x 3072, batch 128, forward and backward",
      ours=ours,
      peers={"jax dense": theirs},
      target={},
      note="both gradients; ours leaves what the mask excludes without one",
    )


def facts() -> dict[str, Any]:
  """Where each kind is faster than dense, and the cells where it is not."""
  found = {}
  for kind in KINDS:
    for sparsity in SPARSITIES:
      ratios = {}
      for batch in BATCHES:
        ours, theirs = contestants(kind, SMALL, sparsity, batch)
        case = timing.Case("", ours, {"dense": theirs}, {})
        ratios[batch] = timing.race(case, 5)["ratio"]["dense"]
      losing = [f"{n} ({r:.2f}x)" for n, r in ratios.items() if r < 1]
      best = max(ratios, key=ratios.get)
      found[f"{kind}, {sparsity:.0%}, 768 x 3072 against dense"] = (
        f"at best {ratios[best]:.1f}x, at batch {best}; "
        + (f"loses at batch {', '.join(losing)}" if losing else "loses nowhere")
      )
  return found
