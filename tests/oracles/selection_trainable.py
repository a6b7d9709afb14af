"""Reference definition of the trained selectors: what they read and give.

Conventions are those of selection.py. Where a paper and its authors' code
differ, the docstring of the method says which one this is.
"""

import itertools
import math

import numpy as np

from tests.oracles import selection
from tests.oracles.selection import float64
from tests.oracles.selection import group_size
from tests.oracles.selection import softmax
from tests.oracles.selection import top

# --- Native Sparse Attention


def nsa_compress(x, *, length=32, stride=16, phi=None):
  """Keys or values [T, Hkv, D] to one for each window, [C, Hkv, D'].

  Window c holds the positions c * stride ... c * stride + length - 1; only
  whole windows count, C = (T - length) // stride + 1. phi maps the rows
  [length, D] of one key head to [D']: in the paper a learned MLP of the rows
  with position embeddings, whose form it leaves open; None is the mean.

  Source: nsa, Native Sparse Attention, equation 7.

  >>> x = np.arange(6.0).reshape(6, 1, 1)
  >>> nsa_compress(x, length=4, stride=2).ravel().tolist()
  [1.5, 3.5]
  """
  x = float64(x)
  phi = (lambda rows: rows.mean(axis=0)) if phi is None else phi
  out = []
  for begin in range(0, len(x) - length + 1, stride):
    rows = x[begin : begin + length]
    out.append([phi(rows[:, g]) for g in range(x.shape[1])])
  return np.asarray(out) if out else np.zeros((0, *x.shape[1:]))


def window_probabilities(q, pooled, *, length, stride, offset=0, scale=None):
  """Softmax over the windows that lie wholly in the past, [H, S, C].

  Window c is visible from p if c * stride + length - 1 <= p. Where none is,
  the row is zero.
  """
  q, pooled = float64(q, pooled)
  group = group_size(q, pooled)
  scale = q.shape[2] ** -0.5 if scale is None else scale
  out = np.zeros((q.shape[1], len(q), len(pooled)))
  for h, s in np.ndindex(*out.shape[:2]):
    z = [
      scale * float(np.dot(q[s, h], pooled[c, h // group]))
      if c * stride + length - 1 <= s + offset
      else -math.inf
      for c in range(len(pooled))
    ]
    out[h, s] = softmax(z)
  return out


def nsa_importance(p, blocks, *, length=32, stride=16, block=64):
  """Importance of blocks from window probabilities [C], a vector [blocks].

  Equation 9 with indices from 0: block j sums, over its pieces of `stride`
  positions, the probability of every window that holds the piece, so a
  window counts length / stride times in a block that holds it whole. (Read
  with indices from 0 as it is printed, the equation is off by one block.)
  It needs stride to divide both, and length <= block.

  Source: nsa, Native Sparse Attention, equation 9.

  >>> nsa_importance(
  ...   [1.0, 10.0, 100.0], 2, length=2, stride=1, block=2
  ... ).tolist()
  [12.0, 210.0]
  """
  if length % stride or block % stride or length > block:
    raise ValueError(f"length {length}, stride {stride}, block {block}")
  per, wide = block // stride, length // stride
  out = np.zeros(blocks)
  for j in range(blocks):
    for m in range(per):
      for n in range(wide):
        c = per * (j + 1) - 1 - m - n
        if 0 <= c < len(p):
          out[j] += p[c]
  return out


def nsa_scores(
  q, k_cmp, keys, *, length=32, stride=16, block=64, offset=0, scale=None
):
  """Importance of each block for a token and a key head, [Hkv, S, nk].

  The sum over the query heads of the group (equation 10).
  """
  p = window_probabilities(
    q, k_cmp, length=length, stride=stride, offset=offset, scale=scale
  )
  group = group_size(q, k_cmp)
  blocks = -(-keys // block)
  out = np.zeros((np.shape(k_cmp)[1], len(q), blocks))
  for h, s in np.ndindex(*p.shape[:2]):
    out[h // group, s] += nsa_importance(
      p[h, s], blocks, length=length, stride=stride, block=block
    )
  return out


def forced_blocks(own, *, initial, local):
  """The first `initial` blocks and the `local` ones up to the own one.

  >>> forced_blocks(5, initial=1, local=2), forced_blocks(0, initial=1, local=2)
  ([0, 4, 5], [0])
  """
  found = set(range(min(initial, own + 1)))
  return sorted(found | set(range(max(own - local + 1, 0), own + 1)))


def nsa_blocks(
  q,
  k_cmp,
  keys,
  *,
  top_n=16,
  length=32,
  stride=16,
  block=64,
  initial=1,
  local=2,
  offset=0,
  scale=None,
):
  """Blocks that each token reads in the selected branch: [Hkv][S] lists.

  The top_n blocks of the largest importance among those up to the token's
  own (which is read as far as the token), `initial` first and `local` last
  ones (own and previous) forced and counted. One choice for the query heads
  of a group. Defaults are the paper's: length 32, stride 16, block 64, n 16
  with 1 initial and 2 local blocks, window 512.

  Departures of code: fla-org's kernels have length = stride = block with mean
  pooling, the mean instead of the sum over the group (the same order), and
  let 1.0 stand for forced.

  Source: nsa, Native Sparse Attention, equations 8 to 12, section 4.1.
  """
  scores = nsa_scores(
    q,
    k_cmp,
    keys,
    length=length,
    stride=stride,
    block=block,
    offset=offset,
    scale=scale,
  )
  chosen = []
  for rows in scores:
    chosen.append([])
    for s, row in enumerate(rows):
      own = (s + offset) // block
      forced = forced_blocks(own, initial=initial, local=local)
      candidates = {j: row[j] for j in range(own + 1)}
      chosen[-1].append(top(candidates, top_n, forced))
  return chosen


def nsa(
  q,
  compressed,
  selected,
  sliding,
  gates,
  *,
  chosen,
  window=512,
  length=32,
  stride=16,
  block=64,
  offset=0,
  scale=None,
):
  """The gated sum of the three branches [S, H, D], and the branches.

  compressed, selected and sliding are pairs of keys and values, each branch
  having its own (the first pair after nsa_compress). gates [S, H, 3] are the
  values after the sigmoid. A token that sees no whole window gets zeros from
  the compressed branch. The window is the last `window` keys, own included.

  Source: nsa, Native Sparse Attention, equation 5.
  """
  q, gates = float64(q, gates)
  group = group_size(q, selected[0])
  k_cmp, v_cmp = float64(*compressed)
  p = window_probabilities(
    q, k_cmp, length=length, stride=stride, offset=offset, scale=scale
  )
  first = np.zeros((*q.shape[:2], v_cmp.shape[2]))
  for s, h, c in np.ndindex(*q.shape[:2], len(v_cmp)):
    first[s, h] += p[h, s, c] * v_cmp[c, h // group]
  keys = len(selected[0])
  read = selection.read_blocks(chosen, block, keys, group=group, offset=offset)
  second, _ = selection.attend(q, *selected, read, scale=scale)
  near = [
    [
      range(max(s + offset - window + 1, 0), min(s + offset + 1, keys))
      for s in range(len(q))
    ]
  ] * q.shape[1]
  third, _ = selection.attend(q, *sliding, near, scale=scale)
  branches = [first, second, third]
  out = sum(gates[..., i, None] * x for i, x in enumerate(branches))
  return out, branches


# --- MoBA and FlashMoBA


def key_convolution(k, w):
  """k_t + SiLU(sum_l w_l * k_{t - l}): a causal depthwise convolution.

  k [T, Hkv, D], w [W, Hkv, D]; w_0 meets the token's own key and keys before
  the first are zero. The result replaces the keys everywhere, in the routing
  and in the attention. The paper's widths are 3 and 5. The authors' release
  has no such layer to compare with.

  Source: flash-moba, Optimizing Mixture of Block Attention (key
  convolution).

  >>> k = np.array([1.0, 2.0]).reshape(2, 1, 1)
  >>> w = np.array([0.0, 1.0]).reshape(2, 1, 1)
  >>> key_convolution(k, w).ravel().round(6).tolist()
  [1.0, 2.731059]
  """
  k, w = float64(k, w)
  out = k.copy()
  for t in range(len(k)):
    z = np.zeros(k.shape[1:])
    for lag in range(min(len(w), t + 1)):
      z += w[lag] * k[t - lag]
    out[t] += z / (1 + np.exp(-z))
  return out


def moba_blocks(q, k, *, block, top_k, offset=0, is_causal=True):
  """Blocks that each token reads: [H][S] lists.

  The gate of a block is q . mean of its keys (no scale). The own block is
  always read and counts as one of top_k; the others are the best of the
  whole blocks before it. Every query head chooses for itself. Without
  causality the best top_k of all blocks, none forced.

  The authors' configurations: block 512 and top-k 3 in the scaling law,
  4096 and 12 at 1M; FlashMoBA: block 128, top-k 8.

  Source: moba, MoBA, equations 4 to 6; flash-moba.
  """
  q, k = float64(q, k)
  group = group_size(q, k)
  centers = selection.means(k, block)
  chosen = []
  for h in range(q.shape[1]):
    chosen.append([])
    for s in range(len(q)):
      gate = centers[:, h // group] @ q[s, h]
      own = (s + offset) // block
      if is_causal:
        candidates = {j: gate[j] for j in range(own + 1)}
        chosen[-1].append(top(candidates, top_k, [own]))
      else:
        chosen[-1].append(top(dict(enumerate(gate)), top_k))
  return chosen


def moba(q, k, v, *, block, top_k, offset=0, scale=None):
  """Attention over the union of the tokens of the chosen blocks: out, lse."""
  chosen = moba_blocks(q, k, block=block, top_k=top_k, offset=offset)
  read = selection.read_blocks(chosen, block, len(k), offset=offset)
  return selection.attend(q, k, v, read, scale=scale)


def moba_snr(difference, dim, block, *, clustered=1, cluster_difference=0.0):
  """Signal over noise of the block that holds the relevant key.

  (difference + (clustered - 1) * cluster_difference) * sqrt(dim / (2 block)):
  `difference` is the expected q . k of the relevant key less that of noise,
  for unit-norm vectors; a block that gathers m related keys adds m - 1 times
  theirs. A noise block wins with probability Phi(-SNR).

  Source: flash-moba, Optimizing Mixture of Block Attention (signal-to-noise
  ratio).

  >>> moba_snr(0.5, 64, 32)
  0.5
  """
  effective = difference + (clustered - 1) * cluster_difference
  return effective * math.sqrt(dim / (2 * block))


# --- DeepSeek Sparse Attention


def index_score(q, k, w):
  """sum_j w_j relu(q_j . k) for q [J, C], k [C], w [J].

  >>> index_score([[1.0], [-1.0]], [2.0], [3.0, 5.0])
  6.0
  """
  total = 0.0
  for row, weight in zip(q, w):
    total += weight * max(float(np.dot(row, k)), 0.0)
  return float(total)


def index_scores(q, k, w, *, offset=0):
  """The lightning indexer, [S, T]; -inf where the key lies ahead.

  q [S, J, C], k [T, C] (one key for all J index heads), w [S, J]. The
  authors' code multiplies w by C ** -0.5 * J ** -0.5, which changes no order
  but does change the softmax of the loss; give w as it enters the sum. Their
  fp8 and Hadamard rotation are left out.

  Source: deepseek-dsa, DeepSeek-V3.2, equation 1.
  """
  q, k, w = float64(q, k, w)
  out = np.full((len(q), len(k)), -np.inf)
  for s in range(len(q)):
    for t in range(min(s + offset + 1, len(k))):
      out[s, t] = index_score(q[s], k[t], w[s])
  return out


def dsa_keys(scores, *, top_k=2048):
  """Positions that each query reads, [S] lists; all heads share them.

  No position is forced, so a query need not read itself. The ReLU makes
  many scores exactly 0, so ties are common where index heads are few.

  Source: deepseek-dsa, DeepSeek-V3.2, equation 2 (top-k 2048).
  """
  return [
    top({t: x for t, x in enumerate(row) if x > -np.inf}, top_k)
    for row in np.asarray(scores)
  ]


def dsa_loss(scores, p, *, keys=None):
  """KL(target || softmax of the scores) of each query [S], and its gradient.

  The target is the sum of the attention probabilities p [H, S, T] over the
  heads, divided by its sum. With `keys`, the lists of dsa_keys, both are
  restricted to them and normalized again (the sparse stage, where p already
  is the attention over them); without, it is the dense warm-up. The paper
  sums over the queries. The gradient in the scores is softmax - target, zero
  elsewhere; the target has none.

  Source: deepseek-dsa, DeepSeek-V3.2, equations 3 and 4.
  """
  scores, p = float64(scores, p)
  losses = np.zeros(len(scores))
  slopes = np.zeros(scores.shape)
  for s in range(len(scores)):
    if keys is None:
      at = [t for t in range(scores.shape[1]) if scores[s, t] > -np.inf]
    else:
      at = list(keys[s])
    target = p[:, s, at].sum(axis=0)
    if target.sum() == 0:
      continue
    target = target / target.sum()
    student = softmax(scores[s, at])
    z = scores[s, at] - scores[s, at].max()
    log_student = z - math.log(np.exp(z).sum())
    for x, y in zip(target, log_student):
      if x > 0:
        losses[s] += x * (math.log(x) - y)
    slopes[s, at] = student - target
  return losses, slopes


def hisa_keys(q, k, w, *, block=128, top_m=64, top_k=2048, offset=0):
  """DSA's keys, looked for in the best blocks only: [S] lists, and blocks.

  The block score is the index score of the mean of the block's index keys.
  Candidates are the blocks up to the query's own; the first and the own one
  are forced and are two of the top_m (as in the authors' code, where they
  get +inf; Algorithm 1 adds them to m). A query's own block is forced, so
  that its mean may hold keys ahead does not matter. Within the chosen blocks
  the top_k keys are those of the largest index score, causal.

  Defaults of the paper: block 128, 64 blocks (8192 tokens), 2048 keys. With
  m covering all blocks it is dsa_keys.

  Source: hisa, HISA, equations 4 to 9, Algorithm 1.
  """
  q, k, w = float64(q, k, w)
  fine = index_scores(q, k, w, offset=offset)
  pooled = selection.means(k, block)
  chosen, found = [], []
  for s in range(len(q)):
    own = (s + offset) // block
    coarse = {j: index_score(q[s], pooled[j], w[s]) for j in range(own + 1)}
    chosen.append(top(coarse, top_m, [0, own]))
    candidates = selection.tokens(chosen[-1], block, len(k), s + offset)
    found.append(top({t: fine[s, t] for t in candidates}, top_k))
  return found, chosen


# --- InfLLM-V2


def infllm_scores(
  q, k, *, length=32, stride=16, block=64, offset=0, scale=None, coarse=None
):
  """Stage 1: block scores of each token and key head, [Hkv, S, nk].

  Softmax of q over the means of the windows of keys that lie wholly in the
  past, summed over the query heads of the group, then for each block the
  maximum over the windows that share a position with it (5 of them for 32,
  16, 64: the block's four and the one before). 0 where there is none.

  `coarse` = (length, stride), in the kernels (128, 64), takes the softmax's
  denominator from wider windows instead: exp(z - lse of the wide ones), so
  that the sum is no longer 1; None is exact. Where no wide window is past,
  nothing is normalized and the row is 0.

  The range of equation 7, i * 4 ... i * 4 + 4, would leave out the window
  before the block and take in one behind it; this is the kernels' range, and
  MiniCPM4's equation 1 (all windows that intersect the block). The paper
  writes no scale; the kernels have D ** -0.5. MiniCPM4 averages over the
  group, which is the same order.

  Source: infllm-v2, InfLLM-V2, equations 4 to 7, and 8 (coarse); minicpm4,
  MiniCPM4, equation 1.
  """
  q, k = float64(q, k)
  group = group_size(q, k)
  scale = q.shape[2] ** -0.5 if scale is None else scale
  pooled = nsa_compress(k, length=length, stride=stride)
  p = window_probabilities(
    q, pooled, length=length, stride=stride, offset=offset, scale=scale
  )
  if coarse is not None:
    p = coarse_probabilities(
      q,
      k,
      p,
      coarse=coarse,
      length=length,
      stride=stride,
      offset=offset,
      scale=scale,
    )
  blocks = -(-len(k) // block)
  out = np.zeros((k.shape[1], len(q), blocks))
  for g, s, j in np.ndindex(*out.shape):
    shared = p[g * group : (g + 1) * group, s].sum(axis=0)
    for c in range(len(pooled)):
      begin, end = c * stride, c * stride + length
      if begin < (j + 1) * block and end > j * block:
        out[g, s, j] = max(out[g, s, j], shared[c])
  return out


def coarse_probabilities(
  q, k, p, *, coarse, length=32, stride=16, offset=0, scale=None
):
  """Window probabilities p [H, S, C] with the denominator of wider windows.

  exp(z - lse of the windows of coarse = (length, stride)), zero where a
  window is not visible.

  Source: infllm-v2, InfLLM-V2, equation 8 (LSE approximation).
  """
  q, k = float64(q, k)
  group = group_size(q, k)
  scale = q.shape[2] ** -0.5 if scale is None else scale
  pooled = nsa_compress(k, length=length, stride=stride)
  wide = nsa_compress(k, length=coarse[0], stride=coarse[1])
  out = np.zeros(p.shape)
  for h, s in np.ndindex(*p.shape[:2]):
    z = [
      scale * float(np.dot(q[s, h], x[h // group]))
      for c, x in enumerate(wide)
      if c * coarse[1] + coarse[0] - 1 <= s + offset
    ]
    if not z:
      continue
    lse = max(z) + math.log(sum(math.exp(x - max(z)) for x in z))
    for c in range(len(pooled)):
      if p[h, s, c] > 0:
        logit = scale * float(np.dot(q[s, h], pooled[c, h // group]))
        out[h, s, c] = math.exp(logit - lse)
  return out


def infllm_blocks(
  q,
  k,
  *,
  top_k=96,
  length=32,
  stride=16,
  block=64,
  initial=1,
  local=32,
  offset=0,
  scale=None,
  coarse=None,
):
  """Stage 1's choice: blocks of each token and key head, [Hkv][S] lists.

  `initial` first and `local` last blocks (own included) are forced and count
  in top_k, which is the size of the union: the paper's 96 are 1 initial, 32
  local and 63 chosen among the remaining ones. Only blocks up to the own one
  are candidates. The kernel forces local + 1 blocks (the own one and `local`
  before it), and drops some where more are forced than fit; here all stay.

  Source: infllm-v2, InfLLM-V2, equations 2 and 3.
  """
  scores = infllm_scores(
    q,
    k,
    length=length,
    stride=stride,
    block=block,
    offset=offset,
    scale=scale,
    coarse=coarse,
  )
  chosen = []
  for rows in scores:
    chosen.append([])
    for s, row in enumerate(rows):
      own = (s + offset) // block
      forced = forced_blocks(own, initial=initial, local=local)
      chosen[-1].append(top({j: row[j] for j in range(own + 1)}, top_k, forced))
  return chosen


def infllm(q, k, v, *, dense_length=8192, offset=0, block=64, **options):
  """Stage 2: attention over the chosen blocks, out and lse.

  One softmax over everything that is read (no gates, no compressed branch).
  Up to dense_length keys (8192 in MiniCPM4's configuration) it is dense
  attention.
  """
  scale = options.get("scale")
  if len(k) <= dense_length:
    return selection.dense(q, k, v, offset=offset, scale=scale)
  chosen = infllm_blocks(q, k, block=block, offset=offset, **options)
  read = selection.read_blocks(
    chosen, block, len(k), group=group_size(q, k), offset=offset
  )
  return selection.attend(q, k, v, read, scale=scale)


# --- SeerAttention


def rope(x, positions, *, base=10000.0):
  """Rotary embedding of the halves: x [n, ..., D], positions [n].

  Component i pairs with i + D / 2 and turns by p * base ** (-2 i / D).

  >>> rope(np.array([[1.0, 0.0]]), [math.pi / 2]).round(12).tolist()
  [[0.0, 1.0]]
  """
  x = float64(x)
  half = x.shape[-1] // 2
  out = np.zeros(x.shape)
  for n, p in enumerate(positions):
    for i in range(half):
      angle = p * base ** (-i / half)
      a, b = x[n, ..., i], x[n, ..., i + half]
      out[n, ..., i] = a * math.cos(angle) - b * math.sin(angle)
      out[n, ..., i + half] = b * math.cos(angle) + a * math.sin(angle)
  return out


def pooled_features(x, block, kinds):
  """Poolings over blocks, one after the other: [n, H, len(kinds) * D].

  >>> x = np.array([1.0, 3.0, 5.0]).reshape(3, 1, 1)
  >>> pooled_features(x, 2, ("max", "min", "avg"))[:, 0].tolist()
  [[3.0, 1.0, 2.0], [5.0, 5.0, 5.0]]
  """
  take = {"max": np.max, "min": np.min, "avg": np.mean}
  x = float64(x)
  return np.stack(
    [
      np.concatenate([take[kind](x[list(run)], axis=0) for kind in kinds], -1)
      for run in selection.cut(len(x), block)
    ]
  )


def seer_gate(
  q,
  k,
  w_q,
  w_k,
  *,
  block=64,
  q_pool=("avg",),
  k_pool=("max", "min", "avg"),
  base=10000.0,
  is_causal=True,
):
  """Logits of the gate, [H, nq, nk]; -inf for blocks ahead.

  q, k are taken before their position embedding. w_q [H, len(q_pool) * D, G],
  w_k [Hkv, len(k_pool) * D, G]: a linear map for each head. Both results get
  a rotary embedding at the position of the block's first token, i * block
  (base None: none), and the product is scaled by G ** -0.5. The gate's
  probabilities are the softmax of a row. The paper has a reduced base,
  theta / block; the authors' code keeps the model's base, as here.

  Source: seer-attention, SeerAttention, equation 1 (Q average, K max, min
  and average, block 64).
  """
  q, k, w_q, w_k = float64(q, k, w_q, w_k)
  group = group_size(q, k)
  rows = np.einsum("nhi,hio->nho", pooled_features(q, block, q_pool), w_q)
  cols = np.einsum("nhi,hio->nho", pooled_features(k, block, k_pool), w_k)
  if base is not None:
    rows = rope(rows, [i * block for i in range(len(rows))], base=base)
    cols = rope(cols, [j * block for j in range(len(cols))], base=base)
  out = np.full((q.shape[1], len(rows), len(cols)), -np.inf)
  for h, i, j in np.ndindex(*out.shape):
    if not is_causal or j <= i:
      dot = float(np.dot(rows[i, h], cols[j, h // group]))
      out[h, i, j] = dot * w_q.shape[2] ** -0.5
  return out


def seer_target(q, k, *, block=64, offset=0, is_causal=True, scale=None):
  """What the gate is trained for, [H, nq, nk]: rows that sum to 1.

  The largest attention probability in each pair of blocks, divided by the sum
  of the row (the division is in the authors' code only; equation 2 stops
  before it). q and k with their position embedding.

  Source: seer-attention, SeerAttention, equation 2.
  """
  p = selection.probabilities(
    q, k, offset=offset, is_causal=is_causal, scale=scale
  )
  rows = selection.cut(p.shape[1], block)
  cols = selection.cut(p.shape[2], block)
  out = np.zeros((len(p), len(rows), len(cols)))
  for h, i, j in np.ndindex(*out.shape):
    out[h, i, j] = max(p[h, s, t] for s in rows[i] for t in cols[j])
  total = out.sum(axis=-1, keepdims=True)
  return np.divide(out, total, out=np.zeros_like(out), where=total > 0)


def seer_loss(logits, target):
  """KL(target || softmax of the gate) of each row, [H, nq].

  How rows are averaged is the caller's: the authors' code divides the sum by
  the number of all elements, and leaves out the first quarter of the rows.

  Source: seer-attention, SeerAttention, equation 2.
  """
  logits, target = float64(logits, target)
  out = np.zeros(logits.shape[:2])
  for h, i in np.ndindex(*out.shape):
    z = logits[h, i]
    lse = z.max() + math.log(np.exp(z - z.max()).sum())
    for x, y in zip(target[h, i], z - lse):
      if x > 0:
        out[h, i] += x * (math.log(x) - y)
  return out


def seer_blocks(logits, *, top_k=None, threshold=None, dense_rows=0):
  """Blocks that each block of queries reads: [H][nq] lists.

  Either the top_k blocks, or those whose probability is above `threshold`
  (strictly). Blocks ahead (-inf) are never chosen. The own block is forced,
  so that every query reads itself; the authors' code forces nothing, and
  reads everything in the last two rows under an option (dense_rows).
  Their ratio of nonzeros r is top_k = max(1, int((1 - sqrt(1 - r)) * n)).

  Source: seer-attention, SeerAttention, equations 3 and 4.
  """
  logits = float64(logits)
  chosen = []
  for head in logits:
    chosen.append([])
    for i, row in enumerate(head):
      some = {j: x for j, x in enumerate(row) if x > -np.inf}
      if i >= len(head) - dense_rows:
        chosen[-1].append(sorted(some))
      elif top_k is not None:
        chosen[-1].append(top(some, top_k, [i]))
      else:
        p = softmax(row)
        chosen[-1].append(sorted(j for j in some if p[j] > threshold or j == i))
  return chosen


# --- Mixture of Sparse Attention: spans by gradient profiles


def moa_influence(a, slope):
  """How much the loss grows if an entry of the attention is masked, [S, T].

  a is a head's attention [S, T], slope the loss's gradient in it. Masking
  entry j of a row multiplies the others by 1 / (1 - a_j); to first order in
  the changes the loss grows by a_j / (1 - a_j) * (sum_n slope_n a_n - slope_j).
  Where a_j is 1 the row is left with nothing: -slope_j.

  Source: moa-sparse-attention, MoA (influence of masking).

  >>> moa_influence([[0.5, 0.5]], [[2.0, 0.0]]).tolist()
  [[-1.0, 1.0]]
  """
  a, slope = float64(a, slope)
  out = np.zeros(a.shape)
  for s in range(len(a)):
    total = float(np.dot(slope[s], a[s]))
    for t in range(a.shape[1]):
      if a[s, t] == 1:
        out[s, t] = -slope[s, t]
      elif a[s, t] > 0:
        out[s, t] = a[s, t] / (1 - a[s, t]) * (total - slope[s, t])
  return out


def moa_span(alpha, beta, length):
  """The span alpha + beta * length, a whole number in 1 ... length.

  >>> moa_span(2, 0.25, 16), moa_span(99, 0, 16)
  (6, 16)
  """
  return int(min(max(math.floor(alpha + beta * length), 1), length))


def moa_damage(influence, span, *, sinks):
  """The influence of everything that sinks and a window of `span` leave out."""
  influence = float64(influence)
  total = 0.0
  for s in range(len(influence)):
    for t in range(min(s + 1, influence.shape[1])):
      if t >= sinks and s - t >= span:
        total += influence[s, t]
  return total


def moa_spans(influences, options, *, density, sinks=64):
  """The best (alpha, beta) of each head by trying everything: indices [H].

  influences[n][h] is the profile of head h at the n-th length; `density[n]`
  bounds the mean over heads of span / length there. The damage is summed over
  lengths. Among equals the first in the order of the product of options. The
  paper solves a mixed-integer program for each length's damage as an
  objective of its own, and picks among the Pareto front by validation; its
  code works on blocks of 64.

  Returns None where no choice is within the budget.

  Source: moa-sparse-attention, MoA (choice of spans).
  """
  lengths = [len(x[0]) for x in influences]
  num_heads = len(influences[0])
  damage = {
    (n, h, o): moa_damage(
      influences[n][h], moa_span(*options[o], lengths[n]), sinks=sinks
    )
    for n in range(len(lengths))
    for h in range(num_heads)
    for o in range(len(options))
  }
  best, chosen = math.inf, None
  for picks in itertools.product(range(len(options)), repeat=num_heads):
    within = all(
      sum(moa_span(*options[o], n) for o in picks) <= d * n * num_heads
      for n, d in zip(lengths, density)
    )
    total = math.fsum(
      damage[n, h, o] for n in range(len(lengths)) for h, o in enumerate(picks)
    )
    if within and total < best:
      best, chosen = total, list(picks)
  return chosen


# --- Mixture of Sparse Attention: experts choose tokens


def mosa_tokens(scores, *, k, include_first=False):
  """Tokens that each head takes, [H] lists: the k best of scores [T, H].

  At least 2 and at most T tokens, as in the authors' code, where
  k = T // sparsity. With include_first token 0 is one of the k.

  Source: mosa-expert-choice-attention, Mixture of Sparse Attention.
  """
  scores = float64(scores)
  k = min(max(k, 2), len(scores))
  first = [0] if include_first else []
  return [top(dict(enumerate(column)), k, first) for column in scores.T]


def mosa(scores, q, k, v, *, chosen, scale=None):
  """Each head's attention among its tokens, times its score: [T, H, Dv].

  scores [T, H] are the router's, after the sigmoid; q, k, v [T, H, D] of all
  tokens, with their position embeddings at the original positions. A token
  reads those of its head that stand at its position or before; tokens that a
  head did not take get zero from it. The output projection and the dense
  heads beside it are the caller's.

  Source: mosa-expert-choice-attention, Mixture of Sparse Attention.
  """
  scores = float64(scores)
  read = [
    [[t for t in kept if t <= s] if s in kept else [] for s in range(len(q))]
    for kept in chosen
  ]
  out, _ = selection.attend(q, k, v, read, scale=scale)
  return out * scores[..., None]
