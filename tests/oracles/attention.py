"""Reference definition of block-sparse attention and its gradients.

Everything here is NumPy in float64 with plain loops over heads, queries and
the keys each query reads. The queries of one block, of one head of one batch
element, are a tile; block i of the queries lists the key blocks
indices[..., i, : counts[..., i]]. Leading dimensions of 1 are shared.

Each query is turned into a list of entries. An entry is what takes part in
the softmax as one key: a key of a listed block, the mean of a run of keys of
a listed block with a level, or a single column.

What the definition leaves open and is settled here:
- The ln of a run's length is added after the softcap, and a run is one entry
  in the block mass, of its whole probability.
- Under skip_threshold a listed block that no query of the tile can read is
  skipped, at any threshold. Without a threshold nothing is.
- Where nothing is read but there is a sink, the output is zero and lse is
  the sink; so the sink receives the cotangent of that lse.
- A column inside a listed block (which a canonical mask has not) is read as
  a column only if it is not read by the block.
"""

import dataclasses
import itertools
import math

import numpy as np


def canonical(indices, counts, kv_blocks):
  """The canonical lists of any integers, [..., C] and [...].

  The count is clamped to [0, C]. Of the first `count` entries, those outside
  of [0, kv_blocks) and repetitions are dropped, the rest is made ascending,
  and the slots behind are 0.

  >>> lists, counts = canonical([[5, 2, -1, 2], [1, 0, 9, 9]], [4, 2], 5)
  >>> lists.tolist(), counts.tolist()
  ([[2, 0, 0, 0], [0, 1, 0, 0]], [1, 2])
  >>> lists, counts = canonical([[3, 1], [3, 1]], [7, -2], 4)
  >>> lists.tolist(), counts.tolist()
  ([[1, 3], [0, 0]], [2, 0])
  """
  indices = np.asarray(indices)
  counts = np.asarray(counts)
  if indices.shape[:-1] != counts.shape:
    raise ValueError(f"indices {indices.shape}, counts {counts.shape}")
  capacity = indices.shape[-1]
  new_indices = np.zeros(indices.shape, np.int32)
  new_counts = np.zeros(counts.shape, np.int32)
  for where in np.ndindex(*counts.shape):
    found = []
    for c in range(min(max(int(counts[where]), 0), capacity)):
      block = int(indices[where][c])
      if 0 <= block < kv_blocks and block not in found:
        found.append(block)
    for c, block in enumerate(sorted(found)):
      new_indices[where][c] = block
    new_counts[where] = len(found)
  return new_indices, new_counts


@dataclasses.dataclass
class Attention:
  """What `attention` returns.

  kept marks the slots that are listed and were not skipped. skip_margin is
  how far the closest decision to skip or not was from the other one, in
  logits: a computation in less precision with errors above it may rightly
  differ.
  """

  out: np.ndarray  # [B, S, H, D]
  lse: np.ndarray  # [B, S, H]
  mass_sum: np.ndarray  # [B, H, nq, C]
  mass_max: np.ndarray  # [B, H, nq, C]
  kept: np.ndarray  # bool [B, H, nq, C]
  skip_margin: float


@dataclasses.dataclass
class _Entry:
  """One key of the softmax: the mean of `keys`, counted len(keys) times."""

  keys: list
  slot: int | None  # None for a column
  logit: float
  slope: float  # d logit / d (q . mean of keys)


@dataclasses.dataclass
class _Row:
  """One query of one head: what it reads, with which probabilities."""

  b: int
  s: int
  h: int
  entries: list
  lse: float
  weights: list  # one for each entry
  sink_weight: float


@dataclasses.dataclass
class _Solution:
  rows: list
  kept: np.ndarray
  skip_margin: float


def _at(array, b, h):
  """array[b, h], dimensions of 1 being shared."""
  return array[b if len(array) > 1 else 0][h if array.shape[1] > 1 else 0]


def _per_token(values, batch, length):
  """[length] or [batch, length] integers as nested lists; None stays."""
  if values is None:
    return None
  return np.broadcast_to(np.asarray(values), (batch, length)).tolist()


def _check_leading(name, array, batch, heads, blocks):
  b, h, n = array.shape[:3]
  if b not in (1, batch) or h not in (1, heads) or n != blocks:
    raise ValueError(f"{name} {array.shape} for {(batch, heads, blocks)}")


def _check_lists(indices, counts, kv_blocks):
  for where in np.ndindex(*counts.shape):
    count = int(counts[where])
    listed = indices[where].tolist()[: max(count, 0)]
    ascending = all(x < y for x, y in itertools.pairwise(listed))
    inside = all(0 <= x < kv_blocks for x in listed)
    if not ascending or not inside or len(listed) != count:
      raise ValueError(f"not canonical: count {count} of {indices[where]}")


def _solve(
  q,
  k,
  v,
  indices,
  counts,
  *,
  block_q,
  block_kv,
  members=None,
  columns=None,
  level=None,
  rule=None,
  scale=None,
  softcap=None,
  sinks=None,
  q_positions=None,
  kv_positions=None,
  q_segment_ids=None,
  kv_segment_ids=None,
  skip_threshold=None,
):
  """All rows, with their entries and probabilities; q, k, v in float64."""
  batch, queries, heads, dim = q.shape
  keys, kv_heads = k.shape[1:3]
  q_blocks = -(-queries // block_q)
  kv_blocks = -(-keys // block_kv)
  capacity = indices.shape[-1]

  if heads % kv_heads or k.shape[:3] != v.shape[:3] or len(k) != batch:
    raise ValueError(f"q {q.shape}, k {k.shape}, v {v.shape}")
  if (q_segment_ids is None) != (kv_segment_ids is None):
    raise ValueError("segment ids of queries and keys go together")
  if level is not None and (keys % block_kv or skip_threshold is not None):
    raise ValueError("level takes whole blocks and no skip_threshold")
  given = dict(members=members, columns=columns, level=level)
  given = {key: np.asarray(x) for key, x in given.items() if x is not None}
  arrays = dict(indices=indices, counts=counts) | given
  for name, array in arrays.items():
    _check_leading(name, array, batch, heads, q_blocks)
  _check_lists(indices, counts, kv_blocks)

  scale = dim**-0.5 if scale is None else float(scale)
  if q_positions is None:
    q_positions = range(queries)
  if kv_positions is None:
    kv_positions = range(keys)
  q_position = _per_token(q_positions, batch, queries)
  kv_position = _per_token(kv_positions, batch, keys)
  q_segment = _per_token(q_segment_ids, batch, queries)
  kv_segment = _per_token(kv_segment_ids, batch, keys)

  def allowed(b, s, t):
    if rule is not None and not rule(q_position[b][s], kv_position[b][t]):
      return False
    return q_segment is None or q_segment[b][s] == kv_segment[b][t]

  def is_member(b, h, i, r, c):
    if "members" not in given:
      return True
    word = int(_at(given["members"], b, h)[i][c // 32][r])
    return (word >> (c % 32)) & 1 == 1

  def entry(b, s, h, run, slot):
    key = _mean(k, b, run, h // (heads // kv_heads))
    logit = scale * float(np.dot(q[b, s, h], key))
    slope = scale
    if softcap is not None:
      tanh = math.tanh(logit / softcap)
      logit = softcap * tanh
      slope = scale * (1.0 - tanh * tanh)
    return _Entry(run, slot, logit + math.log(len(run)), slope)

  def block_entries(b, s, h, i, c):
    """What query s reads in the listed block of slot c."""
    if not is_member(b, h, i, s - i * block_q, c):
      return []
    block = int(_at(indices, b, h)[i][c])
    begin, end = block * block_kv, min((block + 1) * block_kv, keys)
    length = 1
    if "level" in given:
      length = 2 ** int(_at(given["level"], b, h)[i][c])
      if block_kv % length:
        raise ValueError(f"runs of {length} in a block of {block_kv}")
    found = []
    for first in range(begin, end, length):
      run = list(range(first, first + length))
      # The last key of a run stands for all of it.
      if allowed(b, s, run[-1]):
        found.append(entry(b, s, h, run, c))
    return found

  def column_entries(b, s, h, i, read):
    seen = {t for e in read for t in e.keys}
    found = []
    for t in _at(given["columns"], b, h)[i].tolist():
      if 0 <= t < keys and t not in seen and allowed(b, s, t):
        found.append(entry(b, s, h, [t], None))
        seen.add(t)
    return found

  rows = []
  kept = np.zeros((batch, heads, q_blocks, capacity), bool)
  skip_margin = math.inf
  for b, h, i in np.ndindex(batch, heads, q_blocks):
    tile = range(i * block_q, min((i + 1) * block_q, queries))
    read = {s: [] for s in tile}
    running = {s: -math.inf for s in tile}
    for c in range(int(_at(counts, b, h)[i])):
      found = {s: block_entries(b, s, h, i, c) for s in tile}
      if skip_threshold is not None:
        skipped, running, margin = _skip(found, running, skip_threshold)
        skip_margin = min(skip_margin, margin)
        if skipped:
          continue
      kept[b, h, i, c] = True
      for s in tile:
        read[s] += found[s]
    for s in tile:
      if "columns" in given:
        read[s] += column_entries(b, s, h, i, read[s])
      sink = -math.inf if sinks is None else float(sinks[h])
      lse, weights, sink_weight = _softmax([e.logit for e in read[s]], sink)
      rows.append(_Row(b, s, h, read[s], lse, weights, sink_weight))
  return _Solution(rows, kept, skip_margin)


def _mean(array, b, run, kv_head):
  """The mean of array[b, t, kv_head] over t in the run."""
  total = array[b, run[0], kv_head]
  if len(run) == 1:
    return total
  for t in run[1:]:
    total = total + array[b, t, kv_head]
  return total / len(run)


def _skip(found, running, threshold):
  """Whether a tile skips a block (BLASST), and the new running maxima.

  `found` has the entries of each row in the block, `running` the largest
  logit of each row so far. The third result is how far the largest of
  top - new was from ln(threshold).

  Two rows, of running maxima 0 and 3: the logits -1 and 1 have e^-1 and e^-2
  of the weight of those, below 0.5 in both rows. With 2.9 one row objects.

  >>> at = lambda x: [_Entry([0], 0, x, 1.0)]
  >>> skipped, running, _ = _skip({0: at(-1.0), 1: at(1.0)}, {0: 0, 1: 3}, 0.5)
  >>> skipped, running
  (True, {0: 0, 1: 3})
  >>> _skip({0: at(-1.0), 1: at(2.9)}, {0: 0, 1: 3}, 0.5)[0]
  False
  >>> _skip({0: [], 1: []}, {0: 0, 1: 3}, 0.0)[0]
  True
  """
  log_threshold = math.log(threshold) if threshold > 0 else -math.inf
  skipped = True
  margin = math.inf
  largest = -math.inf
  new = {}
  for r, entries in found.items():
    top = max([e.logit for e in entries], default=-math.inf)
    new[r] = max(running[r], top)
    if top == -math.inf:
      continue
    largest = max(largest, top - new[r])
    if not top - new[r] < log_threshold:
      skipped = False
  if largest > -math.inf:
    margin = abs(largest - log_threshold)
  return skipped, running if skipped else new, margin


def _softmax(logits, sink):
  """lse, the probabilities, and the sink's; zeros where there is nothing.

  >>> lse, p, sink = _softmax([0.0, math.log(2)], 0.0)
  >>> round(math.exp(lse), 12), [round(x, 12) for x in p], round(sink, 12)
  (4.0, [0.25, 0.5], 0.25)
  >>> _softmax([], -math.inf)
  (-inf, [], 0.0)
  """
  top = max(logits + [sink])
  if top == -math.inf:
    return -math.inf, [0.0] * len(logits), 0.0
  total = math.fsum(math.exp(x - top) for x in logits + [sink])
  lse = top + math.log(total)
  return lse, [math.exp(x - lse) for x in logits], math.exp(sink - lse)


def _float64(*arrays):
  return [np.asarray(x).astype(np.float64) for x in arrays]


def attention(
  q,
  k,
  v,
  indices,
  counts,
  *,
  block_q,
  block_kv,
  members=None,
  columns=None,
  level=None,
  rule=None,
  scale=None,
  softcap=None,
  sinks=None,
  q_positions=None,
  kv_positions=None,
  q_segment_ids=None,
  kv_segment_ids=None,
  skip_threshold=None,
):
  """Block-sparse attention; returns an `Attention`.

  q [B, S, H, D], k and v [B, T, Hkv, D]; query head h reads key head
  h // (H // Hkv). The lists are canonical, `rule` is a function of the
  positions of a query and a key (two ints) that says whether it reads it.

  One query of 1, four keys in blocks of two of which the second is listed:
  the logits are 0 and ln 3, so the values 4 and 8 weigh 1/4 and 3/4.

  >>> q = np.ones((1, 1, 1, 1))
  >>> k = np.array([9.0, 9.0, 0.0, math.log(3)]).reshape(1, 4, 1, 1)
  >>> v = np.array([9.0, 9.0, 4.0, 8.0]).reshape(1, 4, 1, 1)
  >>> lists = np.array([[[[1, 0]]]]), np.array([[[1]]])
  >>> got = attention(q, k, v, *lists, block_q=1, block_kv=2)
  >>> got.out.round(12).tolist(), np.exp(got.lse).round(12).tolist()
  ([[[[7.0]]]], [[[4.0]]])
  >>> got.mass_sum.round(12).tolist(), got.mass_max.round(12).tolist()
  ([[[[1.0, 0.0]]]], [[[[0.75, 0.0]]]])
  """
  q, k, v = _float64(q, k, v)
  indices, counts = np.asarray(indices), np.asarray(counts)
  solution = _solve(
    q,
    k,
    v,
    indices,
    counts,
    block_q=block_q,
    block_kv=block_kv,
    members=members,
    columns=columns,
    level=level,
    rule=rule,
    scale=scale,
    softcap=softcap,
    sinks=sinks,
    q_positions=q_positions,
    kv_positions=kv_positions,
    q_segment_ids=q_segment_ids,
    kv_segment_ids=kv_segment_ids,
    skip_threshold=skip_threshold,
  )
  batch, queries, heads, _ = q.shape
  group = heads // k.shape[2]
  out = np.zeros((batch, queries, heads, v.shape[3]))
  lse = np.full((batch, queries, heads), -np.inf)
  mass_sum = np.zeros(solution.kept.shape)
  mass_max = np.zeros(solution.kept.shape)
  for row in solution.rows:
    lse[row.b, row.s, row.h] = row.lse
    for e, weight in zip(row.entries, row.weights, strict=True):
      value = _mean(v, row.b, e.keys, row.h // group)
      out[row.b, row.s, row.h] += weight * value
      if e.slot is not None:
        at = row.b, row.h, row.s // block_q, e.slot
        mass_sum[at] += weight
        mass_max[at] = max(mass_max[at], weight)
  return Attention(
    out, lse, mass_sum, mass_max, solution.kept, solution.skip_margin
  )


def gradients(q, k, v, indices, counts, *, dout, dlse=None, **options):
  """Gradients of sum(dout * out) + sum(dlse * lse); a dict.

  The keys are dq, dk, dv and dsinks (None without sinks); the options are
  those of `attention`. Which blocks are skipped is held constant. dlse is of
  no effect where lse is -inf.

  With z a logit and p its probability, out = sum p v and lse = log sum e^z:
  dL/dz = p * (dout . v - dout . out + dlse), also for a sink, with v = 0.

  In the example of `attention` with dout 1: 1/4 * (4 - 7) = -3/4 for the
  first logit and 3/4 for the second, and q times that for the keys.

  >>> q = np.ones((1, 1, 1, 1))
  >>> k = np.array([9.0, 9.0, 0.0, math.log(3)]).reshape(1, 4, 1, 1)
  >>> v = np.array([9.0, 9.0, 4.0, 8.0]).reshape(1, 4, 1, 1)
  >>> lists = np.array([[[[1, 0]]]]), np.array([[[1]]])
  >>> got = gradients(q, k, v, *lists, block_q=1, block_kv=2, dout=q)
  >>> got["dk"].ravel().round(12).tolist()
  [0.0, 0.0, -0.75, 0.75]
  >>> got["dv"].ravel().round(12).tolist()
  [0.0, 0.0, 0.25, 0.75]
  """
  q, k, v, dout = _float64(q, k, v, dout)
  if dlse is not None:
    (dlse,) = _float64(dlse)
  indices, counts = np.asarray(indices), np.asarray(counts)
  solution = _solve(q, k, v, indices, counts, **options)
  group = q.shape[2] // k.shape[2]
  dq, dk, dv = np.zeros(q.shape), np.zeros(k.shape), np.zeros(v.shape)
  dsinks = np.zeros(q.shape[2])
  for row in solution.rows:
    if row.lse == -math.inf:
      continue
    b, s, h, kv_head = row.b, row.s, row.h, row.h // group
    pull = dout[b, s, h]
    along = []  # dout . v of each entry
    for e in row.entries:
      along.append(float(np.dot(pull, _mean(v, b, e.keys, kv_head))))
    through_lse = 0.0 if dlse is None else float(dlse[b, s, h])
    average = math.fsum(p * x for p, x in zip(row.weights, along))
    dsinks[h] += row.sink_weight * (through_lse - average)
    for e, p, x in zip(row.entries, row.weights, along, strict=True):
      d_dot = p * (x - average + through_lse) * e.slope
      dq[b, s, h] += d_dot * _mean(k, b, e.keys, kv_head)
      for t in e.keys:
        dk[b, t, kv_head] += d_dot * q[b, s, h] / len(e.keys)
        dv[b, t, kv_head] += p * pull / len(e.keys)
  with_sinks = options.get("sinks") is not None
  return dict(dq=dq, dk=dk, dv=dv, dsinks=dsinks if with_sinks else None)
