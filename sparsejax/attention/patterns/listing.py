"""From rules to lists: the blocks of which a rule leaves something."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import rules
from pallas_kernels.block_mask import BlockMask
from sparsejax.attention.patterns import checks
from sparsejax.attention.patterns.lines import Columns
from sparsejax.attention.patterns.lines import Diagonals
from sparsejax.attention.patterns.lines import Dilated
from sparsejax.attention.patterns.lines import Longformer
from sparsejax.attention.patterns.lines import Sinks
from sparsejax.attention.patterns.lines import Strided
from sparsejax.attention.patterns.neighborhood import Neighborhood

_TILES = 2**16  # classified at a time
_PAIRS = 2**22  # of positions, looked at at a time

_classify = jax.jit(rules.classify, static_argnums=0)


@functools.partial(jax.jit, static_argnums=0)
def _reads(rule, q_at, k_at):
  """bool [n]: whether some pair of the tiles [n, block] is read."""
  shape = (*q_at.shape, k_at.shape[1])
  found = rule(q_at[:, :, None], k_at[:, None])
  return jnp.broadcast_to(found, shape).any((1, 2))


def _is_tight(rule):
  """Whether the rule calls no tile PARTIAL of which it leaves nothing."""
  if isinstance(rule, rules.Any):
    return all(map(_is_tight, rule.rules))
  return type(rule) in (
    *(rules.Causal, rules.Window),
    *(Sinks, Dilated, Diagonals, Columns, Strided, Longformer, Neighborhood),
  )


def _blocks_of(name, positions, length, block):
  """int32 [blocks, block]: positions, the last one repeated at the end."""
  length = checks.integer(name[0], length, 1)
  if positions is None:
    positions = np.arange(length)
  checks.require(
    not isinstance(positions, jax.core.Tracer),
    f"{name[1]} is traced; lists of a rule are made of concrete positions.",
  )
  positions = np.asarray(positions)
  checks.require(
    positions.shape == (length,) and np.issubdtype(positions.dtype, np.integer),
    f"{name[1]} is {positions.dtype}{list(positions.shape)}; it must hold "
    f"integers, [{length}].",
  )
  positions = np.pad(positions, (0, -length % block), mode="edge")
  return positions.astype(np.int32).reshape(-1, block)


def mask(
  rule, queries, keys, *, block_q, block_kv, q_positions=None, kv_positions=None
) -> BlockMask:
  """The blocks of which a rule leaves something, and the rule itself.

  Lists are made when the function is traced, and hold no block of which nothing
  may be read. No table of tokens is made: memory goes with the listed
  blocks. Of rules without a `classify`, and of those joined by `&`, the blocks
  that may be cut are looked into, which takes time.

  Args:
    rule: a rule of positions.
    queries: how many queries, S.
    keys: how many keys, T.
    block_q: queries of a block, 1 or a power of two from 16 to 512.
    block_kv: keys of a block, a power of two from 16 to 512.
    q_positions: int [S], concrete; default arange(S). A step of decoding over T
      keys has [T - 1]. Give the kernel the same ones.
    kv_positions: int [T], concrete; default arange(T).

  Returns:
    A BlockMask [1, 1, nq, C], C being what the fullest list needs.

  Raises:
    ValueError: for a rule, lengths, blocks or positions that are none.

  Example:
    >>> found = mask(Sinks(first=4, local=20), 80, 80, block_q=16, block_kv=16)
    >>> found.indices[0, 0].tolist(), found.counts.tolist()
    ([[0, 0, 0, 0], [0, 1, 0, 0], [0, 1, 2, 0], [0, 1, 2, 3], [0, 2, 3, 4]],
     [[[1, 2, 3, 4, 4]]])
  """
  # Without lists, for its checks; those made here are in order.
  made = BlockMask(
    np.zeros((1, 1, 0, 1), np.int32),
    block_q=block_q,
    block_kv=block_kv,
    kv_blocks=0,
    rule=rule,
  )
  checks.require(
    rule is not None, "rule is None; it must be a rule of positions."
  )
  q_at = _blocks_of(("queries", "q_positions"), q_positions, queries, block_q)
  k_at = _blocks_of(("keys", "kv_positions"), kv_positions, keys, block_kv)
  with jax.ensure_compile_time_eval():  # constants, inside of jit too
    query, key = _listed(rule, q_at, k_at)
    counts = np.bincount(query, minlength=len(q_at))
    first = np.cumsum(counts) - counts
    indices = np.zeros((len(q_at), max(counts.max(), 1)), np.int32)
    indices[query, np.arange(len(query)) - first[query]] = key
    return made._replace(
      indices=jnp.asarray(indices[None, None]),
      counts=jnp.asarray(counts[None, None], jnp.int32),
      kv_blocks=len(k_at),
    )


def _listed(rule, q_at, k_at):
  """Pairs of blocks in row order: query blocks [n] and key blocks [n]."""
  rows = min(max(_TILES // len(k_at), 1), len(q_at))
  q_low, q_high = q_at.min(1), q_at.max(1)
  bounds_of_keys = (k_at.min(1), k_at.max(1))
  looks = not _is_tight(rule)
  found = []
  for row in range(0, len(q_at), rows):
    at = np.minimum(np.arange(row, row + rows), len(q_at) - 1)
    bounds = (q_low[at, None], q_high[at, None], *bounds_of_keys)
    classes = np.asarray(_classify(rule, *bounds))
    classes = np.broadcast_to(classes, (rows, len(k_at)))
    query, key = np.nonzero(classes[: len(q_at) - row])
    query += row
    if looks:
      cut = classes[query - row, key] == rules.PARTIAL
      kept = ~cut
      kept[cut] = _readable(rule, q_at, k_at, query[cut], key[cut])
      query, key = query[kept], key[kept]
    found.append((query, key))
  return tuple(np.concatenate(x) for x in zip(*found, strict=True))


def _readable(rule, q_at, k_at, query, key):
  """bool [n]: of which tiles some pair may be read, by looking at them all."""
  size = max(_PAIRS // (q_at.shape[1] * k_at.shape[1]), 1)
  size = min(size, 1 << max(len(query) - 1, 0).bit_length())  # few programs
  found = np.zeros(len(query), bool)
  for at in range(0, len(query), size):
    here = np.minimum(np.arange(at, at + size), len(query) - 1)
    reads = np.asarray(_reads(rule, q_at[query[here]], k_at[key[here]]))
    found[at : at + size] = reads[: len(query) - at]
  return found
