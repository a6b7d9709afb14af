"""What a sparsifier has done so far: a table for people, numbers for code."""

from collections.abc import Mapping
import dataclasses
import math
from typing import Any

import jax

from sparsejax import costs
from sparsejax import masks
from sparsejax import paths
from sparsejax.select import structures
from sparsejax.select import thresholds
from sparsejax.weights import plans


@dataclasses.dataclass(frozen=True)
class Row:
  """One parameter, or all of them.

  Attributes:
    size: weights.
    nonzero: active weights.
    flops: forward FLOPs of one application if masked weights cost nothing.
    flipped: weights that the last mask update changed.
    explored: share of weights that were ever active (in-time
      over-parameterization rate); None where it was not tracked.
    outputs: output neurons; None for arrays of fewer than two axes.
    dead_outputs: output neurons without any active weight, likewise.
  """

  size: int
  nonzero: int
  flops: float
  flipped: int
  explored: float | None
  outputs: int | None
  dead_outputs: int | None

  @property
  def density(self) -> float:
    """Share of weights that are active (1 for an empty array)."""
    return self.nonzero / self.size if self.size else 1.0

  @property
  def churn(self) -> float:
    """Half the flips per active weight: the share of them exchanged.

    Where weights were only pruned, half of what the update removed.
    """
    return self.flipped / (2 * self.nonzero) if self.nonzero else 0.0


@dataclasses.dataclass(frozen=True)
class Summary:
  """Rows by path, their total, and violations; `str` makes it a table.

  Attributes:
    layers: a row for each parameter.
    total: over all parameters, sparse and dense.
    violations: masked weights found nonzero when masks were last looked at.
  """

  layers: Mapping[str, Row]
  total: Row
  violations: int

  def __str__(self) -> str:
    lines = [
      f"{'parameter':<40} {'size':>12} {'active':>12} {'density':>8} "
      f"{'FLOPs':>14} {'churn':>7} {'explored':>8} {'dead':>6}"
    ]
    for name, r in {**self.layers, "total": self.total}.items():
      explored = "-" if r.explored is None else f"{r.explored:.1%}"
      dead = "-" if r.dead_outputs is None else f"{r.dead_outputs}"
      lines.append(
        f"{name:<40} {r.size:>12,} {r.nonzero:>12,} {r.density:>8.2%} "
        f"{r.flops:>14,.0f} {r.churn:>7.2%} {explored:>8} {dead:>6}"
      )
    lines.append(f"violations: {self.violations}")
    return "\n".join(lines)


def summary(
  opt_state: Any,
  params: Any,
  *,
  axes: plans.AxesByPath = structures.Axes(),
) -> Summary:
  """Densities, costs and motion of the masks in an optimizer state.

  Args:
    opt_state: the state of any optimizer that holds a sparsifier.
    params: the parameters it is for.
    axes: dimension numbers, for all or by path pattern; they say what a neuron
      is. The state does not keep those of the sparsifier: give them again, or
      the neurons of a stack's layers are counted as one layer's.

  Returns:
    A `Summary`. Violations are reported in it and do not raise.

  Raises:
    ValueError: as `masks`, but for violations.

  >>> params = {"kernel": jnp.ones((8, 8))}
  >>> tx = weights.static(optax.sgd(0.1), sparsity=0.75, key=jax.random.key(0))
  >>> weights.summary(tx.init(params), params).total.density
  0.25
  """
  leaves = paths.named(params)[0]
  at = plans.axes_by_name(axes, list(leaves))
  states = masks.states_of(opt_state, params)
  counted = jax.device_get(_count(states, leaves, at))
  rows = {n: _row(n, leaves[n], counted, at[n]) for n in leaves}
  return Summary(rows, _total(rows), int(counted["violations"]))


def _count(states, leaves, axes):
  """Counts of every parameter, on the device."""
  out = {"nonzero": {}, "flipped": {}, "explored": {}, "dead": {}}
  out["violations"] = sum(masks.unboxed(s.violations) for s in states)
  for state in states:
    churn = masks.unboxed(state.churn)
    explored = {}
    if state.explored is not None:
      explored = paths.named(state.explored)[0]
    bits = paths.named(state.masks)[0]
    for i, n in enumerate(sorted(bits)):
      mask = masks.unpack(bits[n], leaves[n])
      out["nonzero"][n] = thresholds.count([mask])
      out["flipped"][n] = churn[i]
      if n in explored:
        ever = masks.unpack(explored[n], leaves[n])
        out["explored"][n] = thresholds.count([ever])
      if mask.ndim >= 2:
        fan_in = thresholds.count([mask], axes[n].fan_in(mask.ndim))
        out["dead"][n] = thresholds.count([fan_in == 0])
  return out


def _row(name, leaf, counted, axes):
  nonzero = int(counted["nonzero"].get(name, leaf.size))
  explored, dead = counted["explored"].get(name), counted["dead"].get(name)
  outputs = None
  if leaf.ndim >= 2:
    inputs = math.prod(leaf.shape[a] for a in axes.fan_in(leaf.ndim))
    outputs = leaf.size // max(1, inputs)
  return Row(
    size=leaf.size,
    nonzero=nonzero,
    flops=costs.weight_flops(nonzero),
    flipped=int(counted["flipped"].get(name, 0)),
    explored=None if explored is None else int(explored) / max(1, leaf.size),
    outputs=outputs,
    dead_outputs=None if dead is None else int(dead),
  )


def _total(rows):
  def over(field):
    values = [getattr(r, field) for r in rows.values()]
    known = [v for v in values if v is not None]
    return sum(known) if known else None

  size = over("size") or 0
  known = [r for r in rows.values() if r.explored is not None]
  explored = sum(r.explored * r.size for r in known)
  return Row(
    size=size,
    nonzero=over("nonzero") or 0,
    flops=over("flops") or 0,
    flipped=over("flipped") or 0,
    explored=explored / max(1, sum(r.size for r in known)) if known else None,
    outputs=over("outputs"),
    dead_outputs=over("dead_outputs"),
  )


def sad(before: Any, after: Any) -> jax.Array:
  """Sparse architecture divergence: how many weights two masks differ in.

  Args:
    before: a tree of boolean masks.
    after: a tree like it, of a later moment.

  Returns:
    The number of flips over all leaves (int32 scalar).

  Raises:
    ValueError: the trees differ, or there are 2^31 weights or more.

  Source: [sr-ste] Zhou et al., Learning N:M Fine-grained Structured Sparse
    Neural Networks From Scratch, sec. 3.2.

  >>> weights.sad(
  ...   {"w": jnp.array([True, False])}, {"w": jnp.array([False, True])}
  ... )
  Array(2, dtype=int32)
  """
  old, new = paths.named(before)[0], paths.named(after)[0]
  shapes, got = ({n: m.shape for n, m in t.items()} for t in (old, new))
  if got != shapes:
    raise ValueError(
      f"after must be a tree like before, of shapes {shapes}, got {got}"
    )
  size = sum(m.size for m in old.values())
  if size >= 2**31:
    raise ValueError(f"before must hold fewer than 2**31 weights, got {size}")
  return thresholds.count([old[n] ^ new[n] for n in old])
