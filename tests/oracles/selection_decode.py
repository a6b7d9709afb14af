"""Reference definition of selectors over a cache of keys.

Conventions are those of selection.py: q [S, H, D] are the queries, k
[T, Hkv, D] the cache, and query s stands at position s + offset and sees the
keys up to there; one decode step is S = 1 and offset = T - 1.
"""

import math

import numpy as np

from tests.oracles import selection
from tests.oracles.selection import cut
from tests.oracles.selection import float64
from tests.oracles.selection import group_size
from tests.oracles.selection import softmax
from tests.oracles.selection import top

# --- Quest


def quest_scores(q, k, *, page=16, offset=0):
  """Upper bounds of q . k within each page, [H, S, pages]; -inf ahead.

  sum_d max(q_d * least_d, q_d * most_d), least and most being taken over the
  keys of the page that the query sees. No scale.

  Source: quest, Quest (criticality of a page).

  >>> q = np.array([2.0, -1.0]).reshape(1, 1, 2)
  >>> k = np.array([[1.0, 5.0], [3.0, 4.0]]).reshape(2, 1, 2)
  >>> quest_scores(q, k, page=2, offset=1).tolist()
  [[[2.0]]]
  """
  q, k = float64(q, k)
  group = group_size(q, k)
  pages = cut(len(k), page)
  out = np.full((q.shape[1], len(q), len(pages)), -np.inf)
  for h, s, j in np.ndindex(*out.shape):
    seen = [t for t in pages[j] if t <= s + offset]
    if seen:
      rows = k[seen, h // group]
      least, most = rows.min(axis=0), rows.max(axis=0)
      bound = np.maximum(q[s, h] * least, q[s, h] * most)
      out[h, s, j] = math.fsum(bound)
  return out


def quest_pages(q, k, *, pages, page=16, last=0, offset=0):
  """Pages that each query reads: [H][S] lists.

  The best `pages` of those it sees, the newest `last` forced and counted.
  The paper and the authors' evaluation code force none (the latter takes at
  least 3 pages: max(3, budget // page)); their kernels always read the page
  that is being filled: last=1. Every query head chooses for itself. The first
  two layers are dense.

  Source: quest, Quest (page 16).
  """
  scores = quest_scores(q, k, page=page, offset=offset)
  chosen = []
  for rows in scores:
    chosen.append([])
    for s, row in enumerate(rows):
      own = (s + offset) // page
      newest = range(max(own - last + 1, 0), own + 1)
      some = {j: row[j] for j in range(min(own + 1, len(row)))}
      chosen[-1].append(top(some, pages, newest))
  return chosen


# --- Double Sparsity


def heavy_channels(q, k, *, r):
  """The r channels of each query head with the largest mean of abs(q_c k_c).

  Calibration: q [N, H, D] and k [N, Hkv, D] of the same N tokens, after the
  position embedding; each query meets the key of its own position, as in the
  authors' code. (Their hook reshapes [heads, tokens] to [tokens, heads], so
  with more than one head it averages over both.) Ascending lists [H].

  Source: double-sparsity, Post-Training Sparse Attention with Double
  Sparsity (offline calibration).

  >>> q = np.array([[1.0, -3.0, 1.0]]).reshape(1, 1, 3)
  >>> heavy_channels(q, np.ones((1, 1, 3)), r=2)
  [[0, 1]]
  """
  q, k = float64(q, k)
  group = group_size(q, k)
  found = []
  for h in range(q.shape[1]):
    mean = np.abs(q[:, h] * k[:, h // group]).mean(axis=0)
    found.append(top(dict(enumerate(mean)), r))
  return found


def double_sparsity_keys(q, k, *, channels, top_k, offset=0):
  """Positions that each query reads: [H][S] lists.

  The best top_k by the product over the head's channels alone. The scale
  changes no order. The paper keeps 1/16 of the channels and of the tokens,
  and the labels in 4 bits (left out here); its first two layers are dense.

  Source: double-sparsity, Post-Training Sparse Attention with Double
  Sparsity (token sparsity by label cache).
  """
  q, k = float64(q, k)
  group = group_size(q, k)
  chosen = []
  for h in range(q.shape[1]):
    at = list(channels[h])
    chosen.append([])
    for s in range(len(q)):
      some = {
        t: float(np.dot(q[s, h, at], k[t, h // group, at]))
        for t in range(min(s + offset + 1, len(k)))
      }
      chosen[-1].append(top(some, top_k))
  return chosen


# --- Choices that layers share


def exact_keys(q, k, *, top_k, offset=0):
  """Positions of the largest logits: [H][S] lists. TidalDecode's selection.

  Source: tidal-decode, TidalDecode (token selection layer).
  """
  channels = [range(np.shape(q)[2])] * np.shape(q)[1]
  return double_sparsity_keys(
    q, k, channels=channels, top_k=top_k, offset=offset
  )


def tidal_layers(layers, *, dense=2, again=(9,)):
  """What each layer does in a decode step: "dense", "select" or "reuse".

  The first `dense` layers are dense; the next one and those of `again` attend
  to everything and keep their heads' best positions; the others read the
  positions that were kept last, head by head. Prefill is dense. The authors:
  2 dense layers, one re-selection, at layer 7, 13 or 14 by model.

  Source: tidal-decode, TidalDecode (position persistent sparse attention).

  >>> tidal_layers(6, again=(4,))
  ['dense', 'dense', 'select', 'reuse', 'select', 'reuse']
  """
  kinds = []
  for layer in range(layers):
    if layer < dense:
      kinds.append("dense")
    else:
      fresh = layer == dense or layer in again
      kinds.append("select" if fresh else "reuse")
  return kinds


def delta_scores(q, k, *, page=16, offset=0, scale=None):
  """Page scores of each query, [S, pages]: one choice for all heads.

  The sum over the page's tokens of the largest probability that any query
  head gives the token.

  Source: delta, DELTA (unified head selection).
  """
  p = selection.probabilities(q, k, offset=offset, scale=scale)
  most = p.max(axis=0)
  pages = cut(np.shape(k)[0], page)
  out = np.zeros((len(most), len(pages)))
  for s, j in np.ndindex(*out.shape):
    out[s, j] = math.fsum(most[s, list(pages[j])])
  return out


def delta_pages(q, k, *, pages, page=16, recent=1, offset=0, scale=None):
  """Pages that the layers after a selection layer read: [S] lists.

  The best `pages` with the newest `recent` forced and counted, as in the
  authors' selector (whose tie rule is the lowest page too). The selection
  layers themselves attend to everything: the roles are those of tidal_layers,
  with more selection layers.

  Source: delta, DELTA (stable recency window).
  """
  scores = delta_scores(q, k, page=page, offset=offset, scale=scale)
  chosen = []
  for s, row in enumerate(scores):
    own = (s + offset) // page
    newest = range(max(own - recent + 1, 0), own + 1)
    some = {j: row[j] for j in range(min(own + 1, len(row)))}
    chosen.append(top(some, pages, newest))
  return chosen


# --- Caches that shrink


def snapkv_scores(q, k, *, window=32, kernel=5, pool="avg", scale=None):
  """Smoothed mass of the prefix, [H, T - window].

  The causal softmax of the last `window` queries, summed over them for each
  key before the window, then an average or a maximum over `kernel` neighbours
  (odd, centered). Beyond the ends of the prefix are zeros, which the average
  counts and the maximum does not see.

  Source: snapkv, SnapKV (observation window and pooling).
  """
  q, k = float64(q, k)
  if kernel % 2 == 0 or len(q) > len(k) or len(q) < window:
    raise ValueError(f"kernel {kernel}, queries {len(q)}, keys {len(k)}")
  start = len(q) - window
  offset = len(k) - len(q)
  p = selection.probabilities(q[start:], k, offset=offset + start, scale=scale)
  mass = p.sum(axis=1)[:, : len(k) - window]
  out = np.zeros(mass.shape)
  side = kernel // 2
  for h, t in np.ndindex(*mass.shape):
    near = mass[h, max(t - side, 0) : t + side + 1]
    out[h, t] = near.max() if pool == "max" else near.sum() / kernel
  return out


def snapkv_keep(
  q,
  k,
  *,
  capacity,
  window=32,
  kernel=5,
  pool="avg",
  shared=False,
  scale=None,
):
  """Positions that stay after the prompt, [H] or [Hkv] ascending lists.

  The capacity - window best of the prefix, and the whole window; everything
  where there are no more keys than the capacity. In the paper every query
  head has a cache of its own; `shared` sums the scores over the query heads
  of a group and keeps one for each key head.

  The paper's settings: window 16 or 32, kernel 5 or 7 with max pooling,
  capacity 1024 to 4096; the authors' code has average pooling by default,
  kernel 5, window 32 and capacity 2048.

  Source: snapkv, SnapKV (observation window and pooling).
  """
  group = group_size(q, k)
  rows = np.shape(k)[1] if shared else np.shape(q)[1]
  length = len(k)
  if length <= capacity:
    return [list(range(length)) for _ in range(rows)]
  if capacity < window:
    raise ValueError(f"capacity {capacity}, window {window}")
  scores = snapkv_scores(
    q, k, window=window, kernel=kernel, pool=pool, scale=scale
  )
  if shared:
    scores = scores.reshape(rows, group, -1).sum(axis=1)
  newest = list(range(length - window, length))
  return [
    top(dict(enumerate(row)), capacity - window) + newest for row in scores
  ]


def h2o_start(q, k, *, heavy, recent, scale=None):
  """State after a prompt: for each query head {position: accumulated mass}.

  The dense causal attention of the prompt, summed over its queries; then the
  newest `recent` keys stay and the `heavy` best of the others.

  Source: snapkv (its second system), H2O, Algorithm 1.
  """
  p = selection.probabilities(q, k, scale=scale)
  states = []
  for head in p:
    scores = {t: math.fsum(head[:, t]) for t in range(head.shape[1])}
    states.append(_h2o_evict(scores, heavy, recent))
  return states


def h2o_step(states, q, k, *, position, heavy, recent, scale=None):
  """One decode step: the new states, and the positions that were read, [H].

  q [H, D] stands at `position`, and k [T, Hkv, D] holds its key. It reads
  what is kept and itself; its probabilities are added, and then the cache is
  cut as in h2o_start. What was evicted never returns. So a step reads
  heavy + recent + 1 keys. (That is the authors' cache that really drops; their
  simulation by masks counts the new key in `recent` and skips one.)
  """
  q, k = float64(q, k)
  group = group_size(q[None], k)
  scale = q.shape[1] ** -0.5 if scale is None else scale
  new, read = [], []
  for h, state in enumerate(states):
    at = sorted(state) + [position]
    p = softmax([scale * float(np.dot(q[h], k[t, h // group])) for t in at])
    scores = {t: state.get(t, 0.0) + float(x) for t, x in zip(at, p)}
    new.append(_h2o_evict(scores, heavy, recent))
    read.append(at)
  return new, read


def _h2o_evict(scores, heavy, recent):
  if len(scores) <= heavy + recent:
    return scores
  order = sorted(scores)
  newest = order[len(order) - recent :]
  rest = {t: scores[t] for t in order[: len(order) - recent]}
  return {t: scores[t] for t in top(rest, heavy) + newest}
