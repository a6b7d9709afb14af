"""What the oracles of selectors share: choosing, pooling, reading.

The methods are in selection_trainable.py (NSA, MoBA, DSA, HISA, InfLLM-V2,
SeerAttention, MoA, MoSA), selection_prefill.py (MInference, XAttention,
AnchorAttention, ProxyAttn, PSA) and selection_decode.py (Quest, Double
Sparsity, TidalDecode, DELTA, SnapKV, H2O). All is NumPy in float64 with loops
over heads, queries and blocks; q [S, H, D], k [T, Hkv, D] of one sequence.

Settled for all of them:

- Query s stands at position p = s + offset, key t at t. Query head h reads
  key head h // (H // Hkv). Lists of indices are ascending.
- Equal scores: the lowest index wins. To compare with float32, draw inputs
  from a grid, or look at `gap`.
- A budget counts the forced members of a choice too; forced ones are kept
  even where there are more of them than the budget.
- A share of mass keeps the smallest prefix of the falling scores whose mass
  is at least share * total, decided in exact arithmetic of the floats, with
  the share being the decimal it prints as. Forced members come first and
  their mass counts. A share of 1 or more keeps every candidate, also those
  of no mass; a share of 0 keeps the forced ones.
- Blocks are cut from position 0; the last one may be short, and a mean or
  maximum over it is over the tokens that it has.
- The scale is D ** -0.5 where nothing else is said. Scores of zero keys: a
  query that may read nothing gives zeros and lse -inf.
"""

import fractions
import math

import numpy as np


def ranked(scores):
  """Indices of {index: score} from the best to the worst; ties ascending.

  >>> ranked({4: 1.0, 2: 1.0, 0: 0.5})
  [2, 4, 0]
  """
  return sorted(scores, key=lambda i: (-scores[i], i))


def top(scores, k, forced=()):
  """The k best of {index: score}, ascending; forced ones first.

  >>> top({0: 1.0, 1: 3.0, 2: 3.0, 3: 2.0}, 2)
  [1, 2]
  >>> top({0: 1.0, 1: 3.0, 2: 3.0, 3: 2.0}, 2, forced=[0])
  [0, 1]
  >>> top({0: 1.0, 1: 3.0}, 0, forced=[0]), top({0: 1.0}, 5)
  ([0], [0])
  """
  kept = {i for i in forced if i in scores}
  for i in ranked(scores):
    if len(kept) >= k:
      break
    kept.add(i)
  return sorted(kept)


def prefix(masses, share, forced=()):
  """The fewest of {index: mass} that hold `share` of it all, ascending.

  >>> prefix({0: 0.5, 1: 0.25, 2: 0.25}, 0.75)
  [0, 1]
  >>> prefix({0: 0.5, 1: 0.25, 2: 0.25}, 0.5, forced=[2])
  [0, 2]
  >>> prefix({0: 1.0, 1: 0.0}, 1.0), prefix({0: 1.0}, 0.0)
  ([0, 1], [])
  """
  if share >= 1:
    return sorted(masses)
  exact = {i: fractions.Fraction(float(x)) for i, x in masses.items()}
  wanted = fractions.Fraction(str(share)) * sum(exact.values())
  kept = {i for i in forced if i in masses}
  held = sum(exact[i] for i in kept)
  for i in ranked(masses):
    if held >= wanted:
      break
    if i not in kept:
      kept.add(i)
      held += exact[i]
  return sorted(kept)


def gap(scores, kept):
  """How far the worst kept score is above the best one left out.

  Infinity where nothing is left out or kept.

  >>> gap({0: 3.0, 1: 2.5, 2: 0.0}, [0, 1])
  2.5
  """
  inside = [scores[i] for i in kept if i in scores]
  outside = [x for i, x in scores.items() if i not in set(kept)]
  if not inside or not outside:
    return math.inf
  return min(inside) - max(outside)


def softmax(logits):
  """exp(z) / sum of a vector; zeros where there is nothing, or only -inf.

  >>> softmax([0.0, 0.0, -math.inf]).tolist(), softmax([]).tolist()
  ([0.5, 0.5, 0.0], [])
  """
  z = np.asarray(logits, np.float64)
  if not z.size or z.max() == -np.inf:
    return np.zeros(z.shape)
  e = np.exp(z - z.max())
  return e / e.sum()


def float64(*arrays):
  """The arrays, exact, in float64."""
  out = [np.asarray(x).astype(np.float64) for x in arrays]
  return out if len(out) > 1 else out[0]


def group_size(q, k):
  """Query heads per key head.

  >>> group_size(np.zeros((1, 6, 2)), np.zeros((1, 2, 2)))
  3
  """
  heads, kv_heads = q.shape[1], k.shape[1]
  if heads % kv_heads:
    raise ValueError(f"{heads} query heads over {kv_heads} key heads")
  return heads // kv_heads


def cut(length, block):
  """The blocks of `length` positions, as ranges.

  >>> cut(5, 2)
  [range(0, 2), range(2, 4), range(4, 5)]
  """
  return [range(i, min(i + block, length)) for i in range(0, length, block)]


def means(x, block):
  """Means over blocks of positions, [T, ...] to [n, ...].

  >>> means(np.array([1.0, 3.0, 7.0]), 2).tolist()
  [2.0, 7.0]
  """
  return np.stack([x[list(run)].mean(axis=0) for run in cut(len(x), block)])


def probabilities(q, k, *, offset=0, is_causal=True, scale=None):
  """Dense attention probabilities, [H, S, T]."""
  q, k = float64(q, k)
  group = group_size(q, k)
  scale = q.shape[2] ** -0.5 if scale is None else scale
  out = np.zeros((q.shape[1], len(q), len(k)))
  for h, s in np.ndindex(*out.shape[:2]):
    z = np.full(len(k), -np.inf)
    for t in range(len(k)):
      if not is_causal or t <= s + offset:
        z[t] = scale * float(np.dot(q[s, h], k[t, h // group]))
    out[h, s] = softmax(z)
  return out


def attend(q, k, v, read, *, scale=None):
  """Attention over lists of keys: out [S, H, Dv], lse [S, H].

  read[h][s] lists the positions that query s of head h reads.

  >>> q = np.ones((1, 1, 1))
  >>> k = np.log([1.0, 3.0, 9.0]).reshape(3, 1, 1)
  >>> v = np.array([4.0, 8.0, 9.0]).reshape(3, 1, 1)
  >>> out, lse = attend(q, k, v, [[[0, 1]]])
  >>> out.round(12).tolist(), np.exp(lse).round(12).tolist()
  ([[[7.0]]], [[4.0]])
  """
  q, k, v = float64(q, k, v)
  group = group_size(q, k)
  scale = q.shape[2] ** -0.5 if scale is None else scale
  out = np.zeros((*q.shape[:2], v.shape[2]))
  lse = np.full(q.shape[:2], -np.inf)
  for s, h in np.ndindex(*q.shape[:2]):
    keys = list(read[h][s])
    if not keys:
      continue
    z = np.array(
      [scale * float(np.dot(q[s, h], k[t, h // group])) for t in keys]
    )
    lse[s, h] = z.max() + math.log(np.exp(z - z.max()).sum())
    for p, t in zip(softmax(z), keys):
      out[s, h] += p * v[t, h // group]
  return out, lse


def tokens(blocks, block, keys, last=None):
  """The positions in `blocks` of keys, those up to `last`.

  >>> tokens([0, 2], 2, 5, last=4), tokens([1], 2, 5, last=2)
  ([0, 1, 4], [2])
  """
  return [
    t
    for j in blocks
    for t in range(j * block, min((j + 1) * block, keys))
    if last is None or t <= last
  ]


def read_blocks(chosen, block, keys, *, group=1, offset=0):
  """What each query reads, causal: lists [H][S] from blocks [G][S].

  `group` query heads share the choice of one entry of `chosen`.
  """
  return [
    [tokens(blocks, block, keys, s + offset) for s, blocks in enumerate(rows)]
    for rows in chosen
    for _ in range(group)
  ]


def read_tiles(chosen, block_q, block_kv, queries, keys, *, offset=0):
  """The same from blocks per block of queries, [H][nq]; causal."""
  return [
    [
      tokens(rows[s // block_q], block_kv, keys, s + offset)
      for s in range(queries)
    ]
    for rows in chosen
  ]


def dense(q, k, v, *, offset=0, scale=None):
  """Causal attention over everything: out, lse."""
  read = [[range(min(s + offset + 1, len(k))) for s in range(len(q))]]
  return attend(q, k, v, read * np.shape(q)[1], scale=scale)
