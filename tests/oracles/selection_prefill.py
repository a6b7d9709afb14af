"""Reference definition of training-free selectors for the prompt.

Conventions are those of selection.py. BLASST's skipping is in attention.py.
"""

import fractions
import math

import numpy as np

from tests.oracles import selection
from tests.oracles.selection import cut
from tests.oracles.selection import float64
from tests.oracles.selection import group_size
from tests.oracles.selection import prefix
from tests.oracles.selection import softmax
from tests.oracles.selection import top

# --- MInference


def line_masses(q, k, *, last_q=64, offset=0, scale=None):
  """Mass of columns [H, T] and diagonals [H, T] among the last queries.

  The causal softmax of the last min(last_q, S) queries, summed over them for
  each key, and for each distance p - t. A diagonal that leaves the keys is
  shorter, and is not divided by its length.

  Source: minference, MInference 1.0, Algorithm 2.
  """
  q, k = float64(q, k)
  last = min(last_q, len(q))
  start = len(q) - last
  p = selection.probabilities(q[start:], k, offset=offset + start, scale=scale)
  vertical = np.zeros((q.shape[1], len(k)))
  slash = np.zeros((q.shape[1], len(k)))
  for h, s, t in np.ndindex(*p.shape):
    back = start + s + offset - t
    if back >= 0:
      vertical[h, t] += p[h, s, t]
      if back < len(k):
        slash[h, back] += p[h, s, t]
  return vertical, slash


def vertical_slash(
  q,
  k,
  *,
  verticals,
  slashes,
  last_q=64,
  first=30,
  recent=100,
  offset=0,
  scale=None,
):
  """Columns and diagonals of each head: two lists [H] of ascending lists.

  The best `verticals` columns and the best `slashes` diagonals (distances
  p - t, 0 the query's own), counted with the forced ones: the `first`
  columns and the `recent` smallest distances. The authors' online code has
  30 and 100 and takes at least 30 columns and 50 diagonals; its offline
  search forces 30 and 30. The paper forces nothing. Each query head has its
  own lines (GQA repeats the keys).

  Source: minference, MInference 1.0, Algorithm 2.
  """
  vertical, slash = line_masses(q, k, last_q=last_q, offset=offset, scale=scale)
  found = []
  for masses, count, forced in (
    (vertical, verticals, first),
    (slash, slashes, recent),
  ):
    found.append(
      [top(dict(enumerate(row)), count, range(forced)) for row in masses]
    )
  return found


def lines_to_blocks(
  verticals, slashes, queries, keys, *, block_q=64, block_kv=64, offset=0
):
  """Blocks and single columns of each block of queries: two lists [nq].

  A key block is listed whole where one of the queries of the tile has a key
  of a diagonal in it; columns are those that some query of the tile may read
  and that lie in no listed block. So a tile reads more than the lines name.
  The authors' kernel does not align its blocks: it covers the diagonals of a
  tile by stretches of 64 keys that start anywhere.

  >>> blocks, columns = lines_to_blocks([1], [0], 4, 4, block_q=2, block_kv=2)
  >>> blocks, columns
  ([[0], [1]], [[], [1]])
  """
  blocks, columns = [], []
  for tile in cut(queries, block_q):
    listed = set()
    for s in tile:
      for back in slashes:
        t = s + offset - back
        if back >= 0 and 0 <= t < keys:
          listed.add(t // block_kv)
    last = tile[-1] + offset
    blocks.append(sorted(listed))
    columns.append(
      sorted(
        t
        for t in set(verticals)
        if t <= min(last, keys - 1) and t // block_kv not in listed
      )
    )
  return blocks, columns


def mean_pool_blocks(q, k, *, top_k=100, block=64, offset=0):
  """MInference's block-sparse heads: [H][nq] lists of key blocks.

  Blocks are ranked by mean of the queries . mean of the keys (the softmax of
  the paper changes no order). A tile may read the blocks whose first key is
  not ahead of its first query. Nothing is forced, not even the own block. A
  short last block is averaged over its tokens; the authors' code pads with
  zeros and divides by 64, and adds a whole block of zeros where nothing is
  missing.

  Source: minference, MInference 1.0, Algorithm 3 (top-k 100, blocks of 64).
  """
  q, k = float64(q, k)
  group = group_size(q, k)
  rows, cols = selection.means(q, block), selection.means(k, block)
  chosen = []
  for h in range(q.shape[1]):
    chosen.append([])
    for i in range(len(rows)):
      some = {
        j: float(np.dot(rows[i, h], cols[j, h // group]))
        for j in range(len(cols))
        if j * block <= i * block + offset
      }
      chosen[-1].append(top(some, top_k))
  return chosen


def minference_search(q, k, v, patterns, *, head, criterion="output", skip=0):
  """The pattern of least damage for one head: its index, and all damages.

  `patterns` are tables [S, T] of equal cost, most often an A-shape, some
  vertical-slash ones and a block-sparse one. Damage is by criterion:
  "output", the sum of squares of what the sparse output differs from the
  dense one (Algorithm 1); "mass", the attention mass that is not recalled,
  mean over the queries from `skip` on (the authors' first code, from 2500
  on; their second counts the components that differ by more than 5e-3).
  Queries that read nothing give zeros. The first of equals wins. (Their first
  code then writes a vertical-slash head wherever another kind won.)

  Source: minference, MInference 1.0, Algorithm 1.
  """
  q, k, v = float64(q, k, v)
  group = group_size(q, k)
  one = (q[:, [head]], k[:, [head // group]], v[:, [head // group]])
  p = selection.probabilities(*one[:2])[0]
  full, _ = selection.dense(*one)
  damages = []
  for pattern in patterns:
    pattern = np.asarray(pattern) & np.tri(*np.shape(pattern), dtype=bool)
    if criterion == "mass":
      recalled = [p[s, pattern[s]].sum() for s in range(skip, len(p))]
      damages.append(1 - float(np.mean(recalled)))
    else:
      read = [[np.flatnonzero(row) for row in pattern]]
      out, _ = selection.attend(*one, read)
      damages.append(float(((out - full)[skip:] ** 2).sum()))
  return damages.index(min(damages)), damages


# --- XAttention


def antidiagonal_sums(q, k, *, stride):
  """Sums of q . k over antidiagonals, [H, ceil(S / st), ceil(T / st)].

  Entry (a, b) sums over the pairs of query a * st + st - 1 - i and key
  b * st + i, i < st: one antidiagonal of each stride x stride square.
  Tokens that are missing at the end add nothing. No scale.

  >>> q = np.array([1.0, 10.0]).reshape(2, 1, 1)
  >>> k = np.array([2.0, 3.0]).reshape(2, 1, 1)
  >>> antidiagonal_sums(q, k, stride=2).tolist()
  [[[23.0]]]
  """
  q, k = float64(q, k)
  group = group_size(q, k)
  rows, cols = -(-len(q) // stride), -(-len(k) // stride)
  out = np.zeros((q.shape[1], rows, cols))
  for h, a, b in np.ndindex(*out.shape):
    for i in range(stride):
      s, t = a * stride + stride - 1 - i, b * stride + i
      if s < len(q) and t < len(k):
        out[h, a, b] += float(np.dot(q[s, h], k[t, h // group]))
  return out


def xattention_masses(q, k, *, block=128, stride=8, norm=1.0, is_causal=True):
  """Mass of pairs of blocks, [H, nq, nk].

  The antidiagonal sums times D ** -0.5 / stride / norm, a softmax over each
  row of squares (those not ahead, a >= b), and the sum over the squares of a
  pair of blocks. So a row of a whole block sums to block / stride.

  Source: xattention, XAttention, Algorithm 1.
  """
  if block % stride:
    raise ValueError(f"stride {stride} of block {block}")
  sums = antidiagonal_sums(q, k, stride=stride)
  scale = np.shape(q)[2] ** -0.5 / stride / norm
  per = block // stride
  rows, cols = -(-sums.shape[1] // per), -(-sums.shape[2] // per)
  out = np.zeros((len(sums), rows, cols))
  for h, a in np.ndindex(*sums.shape[:2]):
    z = np.full(sums.shape[2], -np.inf)
    for b in range(len(z)):
      if not is_causal or b <= a:
        z[b] = scale * sums[h, a, b]
    for b, p in enumerate(softmax(z)):
      out[h, a // per, b // per] += p
  return out


def xattention_blocks(
  q,
  k,
  *,
  threshold=0.9,
  block=128,
  stride=8,
  norm=1.0,
  sink=True,
  diagonal=True,
  is_causal=True,
):
  """Key blocks of each block of queries: [H][nq] lists.

  The fewest blocks that hold `threshold` of the row's mass; the first block
  and the own one are forced and their mass counts, as in the authors' code
  where attention is causal (the paper takes the smallest set). In the code's
  first chunk of queries, mostly the whole prompt up to 16k tokens, the mark of
  the own blocks overwrites that of the first one: there the first block is not
  forced, and the choice ends one block late. `threshold` may be one number a
  head. The paper's settings: blocks of 128, stride 8 or
  16, 0.9, or a threshold per head from dynamic programming.

  Source: xattention, XAttention, Algorithm 1 (threshold selection).
  """
  masses = xattention_masses(
    q, k, block=block, stride=stride, norm=norm, is_causal=is_causal
  )
  shares = np.broadcast_to(threshold, len(masses))
  chosen = []
  for share, head in zip(shares.tolist(), masses):
    chosen.append([])
    for i, row in enumerate(head):
      some = {j: x for j, x in enumerate(row) if not is_causal or j <= i}
      forced = ([0] if sink else []) + ([i] if diagonal else [])
      chosen[-1].append(prefix(some, share, forced))
  return chosen


# --- AnchorAttention


def anchors(q, k, *, block=128, step=16, scale=None):
  """Each query's largest logit in the anchor region, [H, S].

  The region is the first block and, from the block before the query's group
  of `step` blocks, everything up to the query.

  Source: anchor-attention, AnchorAttention (pattern-based anchors).
  """
  q, k = float64(q, k)
  group = group_size(q, k)
  scale = q.shape[2] ** -0.5 if scale is None else scale
  out = np.full((q.shape[1], len(q)), -np.inf)
  for h, s in np.ndindex(*out.shape):
    for t in anchor_region(s, len(k), block=block, step=step):
      logit = scale * float(np.dot(q[s, h], k[t, h // group]))
      out[h, s] = max(out[h, s], logit)
  return out


def anchor_region(s, keys, *, block=128, step=16):
  """The keys that query s always reads, ascending.

  >>> anchor_region(9, 12, block=2, step=2)
  [0, 1, 6, 7, 8, 9]
  """
  local = max(s // (block * step) * block * step - block, 0)
  return [t for t in range(min(s + 1, keys)) if t < block or t >= local]


def anchor_columns(q, k, *, theta=12.0, block=128, step=16, scale=None):
  """Single keys that each group of `step` query blocks reads: [H][ng] lists.

  Candidates are the keys between the anchor region's two parts: behind the
  first block and before the block before the group. A key is kept if for some
  block of queries of the group

      mean of the anchors of its queries - mean query . key * scale <= theta

  with logits in nats (the authors' kernel has both sides in base 2). So theta
  infinite reads everything. The group's queries read the anchor region (each
  its own) and the kept keys.

  Source: anchor-attention, AnchorAttention (difference-aware stripe
  sparsity; theta 12, blocks of 128, step 16).
  """
  q, k = float64(q, k)
  group = group_size(q, k)
  scale = q.shape[2] ** -0.5 if scale is None else scale
  tops = anchors(q, k, block=block, step=step, scale=scale)
  tiles = cut(len(q), block)
  chosen = []
  for h in range(q.shape[1]):
    chosen.append([])
    for g in range(0, len(tiles), step):
      kept = set()
      for tile in tiles[g : g + step]:
        mean_q = q[list(tile), h].mean(axis=0)
        mean_anchor = tops[h, list(tile)].mean()
        for t in range(block, min(g * block - block, len(k))):
          logit = scale * float(np.dot(mean_q, k[t, h // group]))
          if mean_anchor - logit <= theta:
            kept.add(t)
      chosen[-1].append(sorted(kept))
  return chosen


def anchor_read(chosen, queries, keys, *, block=128, step=16):
  """What each query reads, [H][S]: the anchor region and its group's keys."""
  return [
    [
      sorted(
        set(anchor_region(s, keys, block=block, step=step))
        | set(rows[s // (block * step)])
      )
      for s in range(queries)
    ]
    for rows in chosen
  ]


# --- ProxyAttn


def proxy_scores(q, k, *, groups, block=128, stride=8, scale=None):
  """Block importance of each group, [G, nq, nk].

  The proxy head of a group is the mean of its heads' queries and of their
  keys. The first token of each stride window stands for it; a causal softmax
  over the kept keys, and the largest probability of each pair of blocks.
  groups[g] lists the query heads of group g; the heads of one key head must
  be in one group. The keys are averaged over the query heads, so over the
  distinct key heads.

  Source: proxyattn, ProxyAttn (unified score estimation).
  """
  q, k = float64(q, k)
  group = group_size(q, k)
  if block % stride:
    raise ValueError(f"stride {stride} of block {block}")
  scale = q.shape[2] ** -0.5 if scale is None else scale
  rows, cols = -(-len(q) // block), -(-len(k) // block)
  out = np.zeros((len(groups), rows, cols))
  for g, members in enumerate(groups):
    kv_heads = {h // group for h in members}
    if sum(h // group in kv_heads for h in range(q.shape[1])) != len(members):
      raise ValueError(f"group {members} cuts the heads of a key head")
    mean_q = q[:, list(members)].mean(axis=1)
    mean_k = k[:, [h // group for h in members]].mean(axis=1)
    for s in range(0, len(q), stride):
      at = [t for t in range(0, len(k), stride) if t <= s]
      p = softmax([scale * float(np.dot(mean_q[s], mean_k[t])) for t in at])
      for t, x in zip(at, p):
        cell = g, s // block, t // block
        out[cell] = max(out[cell], x)
  return out


def proxy_budgets(q, k, *, gamma=0.95, block=128, scale=None):
  """Number of blocks of each head, [H]: Algorithm 1 times the block count.

  The queries of the last block of each head attend to everything; the mean
  probability of each key block, divided by the sum, and the fewest blocks
  that reach gamma. (A short last block has the mean over its tokens. As
  printed the algorithm's sum begins at 0 and ends at k, one more than its
  count; the count of the smallest prefix is meant.)

  Source: proxyattn, ProxyAttn, Algorithm 1.
  """
  q, k = float64(q, k)
  start = (len(q) - 1) // block * block
  p = selection.probabilities(q[start:], k, offset=start, scale=scale)
  budgets = []
  for head in p:
    row = selection.means(head.mean(axis=0), block)
    budgets.append(len(prefix(dict(enumerate(row / row.sum())), gamma)))
  return budgets


def proxy_blocks(
  q,
  k,
  *,
  groups,
  gamma=0.95,
  block=128,
  stride=8,
  sink=False,
  diagonal=True,
  scale=None,
):
  """Key blocks of each block of queries: [H][nq] lists.

  Head h reads the best budget[h] blocks of its group's scores, among those
  up to the own one; the budget is a number of blocks for every row (the
  paper: K = b N), so that short rows read everything. The own block is
  forced, which the paper does not say.

  Source: proxyattn, ProxyAttn (sparse mask by dynamic budgets).
  """
  scores = proxy_scores(
    q, k, groups=groups, block=block, stride=stride, scale=scale
  )
  budgets = proxy_budgets(q, k, gamma=gamma, block=block, scale=scale)
  of = {h: g for g, members in enumerate(groups) for h in members}
  chosen = []
  for h in range(np.shape(q)[1]):
    chosen.append([])
    for i, row in enumerate(scores[of[h]]):
      forced = ([0] if sink else []) + ([i] if diagonal else [])
      some = {j: row[j] for j in range(min(i + 1, len(row)))}
      chosen[-1].append(top(some, budgets[h], forced))
  return chosen


# --- Pyramid Sparse Attention

SKIPPED = -1


def psa_importance(
  q, k, *, block_q, block_kv, rows=None, cols=None, scale=None
):
  """Importance of pairs of blocks, [H, nq, nk]; not causal.

  rows and cols are the positions within a block that stand for it (in the
  authors' code a random quarter of them, the same in all blocks; None: all).
  The softmax runs over the kept keys; the largest probability of each pair is
  divided by the sum over the row.

  Source: psa, PSA (for generation; for understanding it is XAttention's
  mass).
  """
  q, k = float64(q, k)
  keep_q = list(range(block_q)) if rows is None else list(rows)
  keep_k = list(range(block_kv)) if cols is None else list(cols)
  at_q = [s for s in range(len(q)) if s % block_q in keep_q]
  at_k = [t for t in range(len(k)) if t % block_kv in keep_k]
  p = selection.probabilities(q[at_q], k[at_k], is_causal=False, scale=scale)
  out = np.zeros((q.shape[1], -(-len(q) // block_q), -(-len(k) // block_kv)))
  for h, a, b in np.ndindex(*p.shape):
    cell = h, at_q[a] // block_q, at_k[b] // block_kv
    out[cell] = max(out[cell], p[h, a, b])
  return out / out.sum(axis=-1, keepdims=True)


def psa_levels_by_quota(row, ends):
  """Level of each block of a row, by rank: -1 is skipped.

  ends[l] is the share of the blocks, from the best on, that levels 0 ... l
  take together: int(ends[l] * n) blocks. The authors' default is 0.05, 0.15,
  0.25, 0.5 (and the rest skipped) for runs of 1, 2, 4, 8. Their code rounds
  the count of a level up to a multiple of 2^l * tile / block, so that whole
  tiles are filled (one tile a block: a multiple of 2^l); here it does not.

  Source: psa, PSA (levels by quota).

  >>> psa_levels_by_quota([0.1, 0.4, 0.3, 0.2], [0.25, 0.75])
  [-1, 0, 1, 1]
  """
  order = selection.ranked(dict(enumerate(row)))
  levels = [SKIPPED] * len(order)
  begin = 0
  for level, end in enumerate(ends):
    stop = min(int(len(order) * end), len(order))
    for j in order[begin:stop]:
      levels[j] = level
    begin = max(begin, stop)
  return levels


def psa_levels_by_mass(row, thresholds):
  """Level of each block by the mass of it and of all better ones.

  A block has the first level whose threshold is at least that share of the
  mass of the row, and is skipped above the last. Where the best block alone
  is above the last threshold, it gets level 0, so that no row is empty. The
  authors' code takes into every level the block that crosses its threshold,
  and at least int(0.06 * n) + 1 blocks into the first.

  Source: psa, PSA (levels by cumulative threshold).

  >>> psa_levels_by_mass([0.125, 0.5, 0.25, 0.125], [0.5, 0.75, 0.9])
  [2, 0, 1, -1]
  """
  exact = [fractions.Fraction(float(x)) for x in row]
  limits = [fractions.Fraction(str(x)) * sum(exact) for x in thresholds]
  levels = [SKIPPED] * len(exact)
  held = 0
  for rank, j in enumerate(selection.ranked(dict(enumerate(row)))):
    held += exact[j]
    found = [level for level, x in enumerate(limits) if held <= x]
    if found:
      levels[j] = found[0]
    elif rank == 0:
      levels[j] = 0
  return levels


def psa_caps(k, *, block, thresholds):
  """The coarsest level that each key block allows, [Hkv, nk].

  Level l is allowed if the mean cosine of the first and the last key of its
  runs of 2^l is above thresholds[l - 1] (strictly); the largest allowed one
  counts, also above one that is not. For runs of 2 these are the even and
  the odd keys. The thresholds are settings of a model.

  Source: psa, PSA (similarity within a block).
  """
  k = float64(k)
  out = np.zeros((k.shape[1], len(k) // block), int)
  for g, j in np.ndindex(*out.shape):
    x = k[j * block : (j + 1) * block, g]
    for level, threshold in enumerate(thresholds, start=1):
      run = 2**level
      cosines = []
      for a, b in zip(x[::run], x[run - 1 :: run]):
        norms = math.sqrt(float(np.dot(a, a)) * float(np.dot(b, b)))
        cosines.append(float(np.dot(a, b)) / max(norms, 1e-8))
      if float(np.mean(cosines)) > threshold:
        out[g, j] = level
  return out


def psa_blocks(levels, caps=None):
  """Listed blocks and their levels: [H][nq] lists of pairs.

  levels[h][i][j]; caps [Hkv, nk] lower a level, not a skip.
  """
  num_heads = len(levels)
  chosen = []
  for h, rows in enumerate(levels):
    chosen.append([])
    for row in rows:
      pairs = []
      for j, level in enumerate(row):
        if level != SKIPPED:
          if caps is not None:
            level = min(level, int(caps[h // (num_heads // len(caps))][j]))
          pairs.append((j, level))
      chosen[-1].append(pairs)
  return chosen
