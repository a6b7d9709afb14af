"""Choices among the sparse parameters at one moment."""

import dataclasses

import jax
from jax import lax
import jax.numpy as jnp

from sparsejax import masks
from sparsejax.select import thresholds
from sparsejax.select import top_k
from sparsejax.weights import plans
from sparsejax.weights import rules
from sparsejax.weights import scores

Array = jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Look:
  """The sparse parameters at one moment, and choices among them.

  Attributes:
    rule: the method.
    plan: its counts.
    params: all parameters by name.
    grads: their raw gradients by name, or none at `init`.
    memory: the rule's own buffers by name, or none.
    key: a PRNG key of this moment, or None.
    step: updates made so far.
    source: the weights that may be active, by name; all where not named.
  """

  rule: rules.Rule
  plan: plans.Plan
  params: dict[str, Array]
  grads: dict[str, Array]
  memory: dict[str, Array]
  key: Array | None
  step: Array
  source: dict[str, Array] = dataclasses.field(default_factory=dict)

  def seen(self, active, backward=None, leak=None):
    """`scores.Seen` of each sparse parameter, given its mask."""
    out = {}
    for i, n in enumerate(sorted(self.plan.leaves)):
      key = None if self.key is None else jax.random.fold_in(self.key, i)
      out[n] = scores.Seen(
        param=self.params[n],
        grad=self.grads.get(n),
        mask=active[n],
        backward=None if backward is None else backward[n],
        memory=self.memory.get(n),
        key=key,
        step=self.step,
        leak=None if leak is None else masks.unboxed(leak),
      )
    return out

  def row(self, table):
    """The row of a plan's table for this step."""
    if len(table) == 1:
      return jnp.asarray(table[0])
    tick = (self.step - self.plan.steps[0]) // self.rule.every
    return jnp.asarray(table)[jnp.clip(tick, 0, len(table) - 1)]

  def keys(self, seen, score, stage=0):
    """Ordered keys of the units of each parameter."""
    out = {}
    for n, leaf in self.plan.leaves.items():
      pool, score_n = leaf.structures[stage].pool, score(seen[n])
      if n not in self.source:
        out[n] = thresholds.ordered_keys(pool(score_n, leaf.axes))
        continue
      # A unit counts with what the source has of it, if it has anything.
      inside = self.source[n]
      score_n = jnp.where(inside, score_n, jnp.zeros((), score_n.dtype))
      some = pool(inside.astype(jnp.float32), leaf.axes) > 0
      keys = thresholds.ordered_keys(pool(score_n, leaf.axes))
      out[n] = thresholds.never(keys, ~some)
    return out

  def pick(self, keys, counts, stage=0):
    """The units with the largest keys, under the budget."""
    if self.plan.together:
      count = next(iter(counts.values()))
      chosen = top_k.top_k_keys(list(keys.values()), count)
      return dict(zip(keys, chosen, strict=True))
    return {
      n: leaf.structures[stage].select(keys[n], counts[n], leaf.axes)
      for n, leaf in self.plan.leaves.items()
    }

  def spread(self, units, stage=0):
    """Masks of weights, sharded as the parameters are."""
    return {
      n: jnp.ones_like(self.params[n], bool)
      & leaf.structures[stage].spread(units[n], self.params[n].shape, leaf.axes)
      & self.source.get(n, True)
      for n, leaf in self.plan.leaves.items()
    }

  def select(self, active, score, backward=False):
    """Masks chosen afresh."""
    leaves, seen = self.plan.leaves, self.seen(active)

    def in_stage(stage):
      keys = self.keys(seen, score, stage)
      if len(self.plan.stages) > 1:  # n:m, each with a count of its own
        counts = {n: leaf.structures[stage].n for n, leaf in leaves.items()}
      else:
        tables = {
          n: leaf.backward if backward else leaf.keep
          for n, leaf in leaves.items()
        }
        counts = {n: self.row(table) for n, table in tables.items()}
      return self.spread(self.pick(keys, counts, stage), stage)

    begins = jnp.asarray(self.plan.stages[1:], jnp.int32)
    if not begins.size:
      return in_stage(0)
    branches = [lambda i=i: in_stage(i) for i in range(len(self.plan.stages))]
    return lax.switch(jnp.sum(self.step >= begins), branches)

  def exchange(self, active):
    """Masks that drop the least active units and grow the best others."""
    leaves, seen = self.plan.leaves, self.seen(active)
    stay = self.keys(seen, self.rule.drop)
    # Another draw than that of `drop`.
    apart = {
      n: s if s.key is None else s._replace(key=jax.random.fold_in(s.key, 1))
      for n, s in seen.items()
    }
    grow = self.keys(apart, self.rule.grow)
    on = {
      n: leaf.structures[0].pool(active[n].astype(jnp.float32), leaf.axes) > 0
      for n, leaf in leaves.items()
    }
    keep = {n: self.row(leaf.keep) for n, leaf in leaves.items()}
    drops = {n: self.row(leaf.drops) for n, leaf in leaves.items()}
    if self.plan.together:
      left = thresholds.count(list(on.values())) - next(iter(drops.values()))
      left = jnp.minimum(left, next(iter(keep.values())))
      kept = self.pick(
        {n: thresholds.never(stay[n], ~on[n]) for n in leaves},
        dict.fromkeys(leaves, left),
      )
      units = self.pick(
        {n: thresholds.always(grow[n], kept[n]) for n in leaves}, keep
      )
    else:
      units = {
        n: leaf.structures[0].exchange(
          on[n], stay[n], grow[n], drops[n], keep[n], leaf.axes
        )
        for n, leaf in leaves.items()
      }
    return self.spread(units)

  def violations(self, active):
    """How many masked weights are not zero."""
    return masks.count_nonzero(
      [self.params[n] for n in active], list(active.values())
    )

  def finite(self):
    """Whether a parameter and its gradient may decide about its mask."""
    out = {}
    for n in self.plan.leaves:
      out[n] = jnp.all(jnp.isfinite(self.params[n]))
      if n in self.grads:
        out[n] &= jnp.all(jnp.isfinite(self.grads[n]))
    if self.plan.together:
      together = jnp.all(jnp.stack(list(out.values())))
      out = dict.fromkeys(out, together)
    return out
