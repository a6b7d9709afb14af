"""Training under masks that are arguments, and procedures made of it.

Iterative magnitude pruning (lottery tickets) and sparse model soups are loops
around one function that trains; masks are arguments of it, so that it is
compiled once for all rounds, controls and seeds.
"""

from collections.abc import Callable, Iterator, Sequence
import dataclasses
import functools
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
import optax

from sparsejax import paths
from sparsejax import select
from sparsejax import weights
from sparsejax.weights import plans

PyTree = Any
SCOPES = ("layer", "global")


def trainer(loss: Callable, optimizer: Callable) -> Callable:
  """A compiled function that trains any parameters under any masks.

  Args:
    loss: (params, batch) -> scalar.
    optimizer: (**settings) -> an Optax optimizer; settings are scalars that are
      traced, so that other values compile nothing.

  Returns:
    `train(params, masks, data, order, **settings)`, which returns what the
    parameters have become, and the loss before each step [steps]. `masks` is a
    tree of bool like `params`, and masked weights are +0.0 from the start.
    `data` is a tree of arrays [examples, ...], of which step i sees the rows
    `order[i]`, int [steps, batch].
  """

  @jax.jit
  def train(params, masks, data, order, **settings):
    tx = optax.chain(optimizer(**settings), weights.keep_masked(masks))
    opt_state = tx.init(params)
    params = weights.sparse_params(opt_state, params)

    def step(carry, rows):
      params, opt_state = carry
      batch = jax.tree.map(lambda x: x[rows], data)
      value, grads = jax.value_and_grad(loss)(params, batch)
      updates, opt_state = tx.update(grads, opt_state, params)
      return (optax.apply_updates(params, updates), opt_state), value

    (params, _), losses = lax.scan(step, (params, opt_state), order)
    return params, losses

  return train


def dense_masks(params: PyTree) -> PyTree:
  """Masks that mask nothing."""
  return jax.tree.map(lambda p: jnp.ones(p.shape, bool), params)


def masked(params: PyTree, masks: PyTree) -> PyTree:
  """The parameters, +0.0 where masked."""
  return jax.tree.map(lambda p, m: jnp.where(m, p, 0), params, masks)


def density(masks: PyTree, where: plans.Where = None) -> float:
  """The share of the weights that may be masked which is not."""
  leaves = paths.named(masks)[0]
  # `where` asks for floating arrays.
  named = {
    n: jax.ShapeDtypeStruct(m.shape, jnp.float32) for n, m in leaves.items()
  }
  chosen = [leaves[n] for n in plans.sparse_names(named, where)]
  return sum(int(m.sum()) for m in chosen) / sum(m.size for m in chosen)


@jax.jit
def _largest(scores, counts):
  """Masks of as many as `counts`: a number each, or one of all together."""
  if isinstance(counts, dict):
    return {n: select.top_k_mask(x, counts[n]) for n, x in scores.items()}
  return select.top_k_mask(scores, counts)


def prune(
  params: PyTree,
  masks: PyTree,
  fraction: float,
  *,
  scope: str = "layer",
  where: plans.Where = None,
) -> PyTree:
  """Masks the smallest of the weights that the masks have left.

  Args:
    params: the parameters.
    masks: bools like them; what is masked stays so.
    fraction: the share of what is left that goes, rounded to whole weights.
    scope: of each "layer" alone, or "global": of all together.
    where: as `weights.static` takes it; other masks stay as they are.

  Returns:
    Masks that are subsets of those given. Of equal magnitudes the first stays.

  Raises:
    ValueError: no such scope, or fraction is not in [0, 1].
  """
  if scope not in SCOPES:
    raise ValueError(f"scope must be one of {SCOPES}, got {scope!r}")
  if not 0 <= fraction <= 1:
    raise ValueError(f"fraction must be in [0, 1], got {fraction}")
  leaves, rebuild = paths.named(params)
  found = dict(paths.named(masks)[0])
  scores = {
    n: jnp.where(found[n], jnp.abs(leaves[n]).astype(jnp.float32), -jnp.inf)
    for n in plans.sparse_names(leaves, where)
  }
  left = {n: int(found[n].sum()) for n in scores}
  kept = lambda count: count - int(fraction * count + 0.5)  # a half up
  if scope == "global":
    counts = kept(sum(left.values()))
  else:
    counts = {n: kept(count) for n, count in left.items()}
  return rebuild(found | _largest(scores, counts))


def shuffled(
  key: jax.Array, masks: PyTree, where: plans.Where = None
) -> PyTree:
  """Random masks that keep as many weights in each layer."""
  found, rebuild = paths.named(masks)
  like = {
    n: jax.ShapeDtypeStruct(m.shape, jnp.float32) for n, m in found.items()
  }
  names = plans.sparse_names(like, where)
  keys = jax.random.split(key, len(names))
  scores = {
    n: jax.random.uniform(k, found[n].shape)
    for n, k in zip(names, keys, strict=True)
  }
  return rebuild(
    found | _largest(scores, {n: int(found[n].sum()) for n in names})
  )


@dataclasses.dataclass(frozen=True)
class Round:
  """One round of iterative magnitude pruning.

  Attributes:
    density: of the weights that are pruned.
    masks: bools like the parameters.
    ticket: what is trained: the rewound weights, +0.0 where masked.
    trained: what they have become.
  """

  density: float
  masks: PyTree
  ticket: PyTree
  trained: PyTree


def imp(
  train: Callable,
  params: PyTree,
  *,
  fraction: float,
  rounds: int,
  scope: str = "layer",
  rewind: int = 0,
  where: plans.Where = None,
) -> Iterator[Round]:
  """Iterative magnitude pruning: trains, prunes, goes back, and again.

  After n rounds (1 - fraction)^n of the weights are left, up to roundings. The
  optimizer begins anew at each reset. Where the paper prunes the last layer at
  half the rate, this has one rate for all.

  Args:
    train: (params, masks, begin, end) -> what they become from step `begin` to
      step `end`, or to the last one where that is None.
    params: as they are initialized.
    fraction: the share of what is left that a round prunes.
    rounds: how often it does.
    scope: as `prune` takes it.
    rewind: the step whose weights a reset goes back to; 0 is `params`.
    where: as `prune` takes it.

  Yields:
    `rounds` + 1 rounds, first the dense one.

  Raises:
    ValueError: fraction or rewind is out of range.

  Source: [lottery-ticket] Frankle and Carbin, The Lottery Ticket Hypothesis,
  section 2; with `rewind` Frankle et al., Linear Mode Connectivity and the
  Lottery Ticket Hypothesis, algorithm 2.
  """
  if not 0 < fraction < 1:
    raise ValueError(f"fraction must be between 0 and 1, got {fraction}")
  if rewind < 0:
    raise ValueError(f"rewind must be 0 or more, got {rewind}")
  masks = dense_masks(params)
  start = trained = train(params, masks, 0, rewind) if rewind else params
  for number in range(rounds + 1):
    if number:
      masks = prune(trained, masks, fraction, scope=scope, where=where)
    ticket = masked(start, masks)
    trained = train(ticket, masks, rewind, None)
    yield Round(density(masks, where), masks, ticket, trained)


@functools.partial(jax.jit, static_argnames="m")
def _mean(trees, m):
  def of(*leaves):
    total = sum(x.astype(jnp.float32) for x in leaves)
    return (total / m).astype(leaves[0].dtype)

  return jax.tree.map(of, *trees)


def average(members: Sequence[PyTree]) -> PyTree:
  """The mean of parameters of one shape; zeros of all of them stay +0.0."""
  return _mean(list(members), len(members))


@dataclasses.dataclass(frozen=True)
class Phase:
  """One phase of a soup.

  Attributes:
    density: of the weights that are pruned.
    masks: bools like the parameters, those of every member.
    members: what the copies have become.
    params: their average.
  """

  density: float
  masks: PyTree
  members: list[PyTree]
  params: PyTree


def soups(
  train: Callable,
  params: PyTree,
  *,
  fractions: Sequence[float],
  copies: int,
  scope: str = "global",
  where: plans.Where = None,
) -> Iterator[Phase]:
  """Sparse model soups: prunes, retrains copies, averages, and again.

  With one copy it is iterative magnitude pruning without rewinding.

  Args:
    train: (params, masks, phase, copy) -> what a copy becomes; copies differ by
      what this makes of their number (order of data, weight decay).
    params: trained densely.
    fractions: the share of what is left that each phase prunes.
    copies: how many there are.
    scope: as `prune` takes it.
    where: as `prune` takes it.

  Yields:
    A phase for each fraction; the next one begins with its average.

  Raises:
    ValueError: there are no copies.

  Source: [sparse-model-soups] Zimmer et al., Sparse Model Soups, section 2,
  with uniform weights.
  """
  if copies < 1:
    raise ValueError(f"copies must be 1 or more, got {copies}")
  masks = dense_masks(params)
  for phase, fraction in enumerate(fractions):
    masks = prune(params, masks, fraction, scope=scope, where=where)
    start = masked(params, masks)
    members = [train(start, masks, phase, copy) for copy in range(copies)]
    params = average(members)
    yield Phase(density(masks, where), masks, members, params)
