"""Reference definitions of fine-tuning that changes few parameters.

Everything here is NumPy in float64 with plain loops over scalars. Weights are
[inputs, outputs], inputs are rows. A model is a list of arrays. Among equal
scores the earlier array, then the lower row-major index is kept.
"""

import math

import numpy as np

from tests.oracles import select
from tests.oracles.activations import matmul
from tests.oracles.activations import silu
from tests.oracles.activations import singular_values

# LoRA.


def lora_delta(a, b, alpha, root=False):
  """alpha / r * a b, r the rank; alpha / sqrt(r) with `root` (rsLoRA).

  Hu et al. 2021 (arXiv 2106.09685); a is [inputs, r], b [r, outputs].

  >>> lora_delta(np.array([[1.0], [2.0]]), np.array([[3.0]]), 2.0).tolist()
  [[6.0], [12.0]]
  """
  r = a.shape[1]
  scale = alpha / (math.sqrt(r) if root else r)
  out = matmul(a, b)
  for i in np.ndindex(*out.shape):
    out[i] *= scale
  return out


def lora(x, w, a, b, alpha):
  """x w + alpha / r * (x a) b.

  >>> x, w = np.array([[1.0, 1.0]]), np.zeros((2, 1))
  >>> lora(x, w, np.array([[1.0], [2.0]]), np.array([[3.0]]), 2.0).tolist()
  [[18.0]]
  """
  out = matmul(x, w)
  low = matmul(matmul(x, a), b)
  for i in np.ndindex(*out.shape):
    out[i] += alpha / a.shape[1] * low[i]
  return out


def lora_merge(w, a, b, alpha):
  """w + alpha / r * a b.

  >>> lora_merge(
  ...   np.ones((1, 1)), np.ones((1, 1)), np.ones((1, 1)), 3.0
  ... ).tolist()
  [[4.0]]
  """
  out = lora_delta(a, b, alpha)
  for i in np.ndindex(*out.shape):
    out[i] += float(w[i])
  return out


def lora_gradients(x, w, a, b, alpha, cotangent):
  """Gradients with respect to x, a and b; w is frozen.

  da = s x' (g b'), db = s (x a)' g, dx = g w' + s g b' a'.

  >>> one = np.ones((1, 1))
  >>> g = lora_gradients(2 * one, 3 * one, 5 * one, 7 * one, 1.0, one)
  >>> [float(v[0, 0]) for v in g]
  [38.0, 14.0, 10.0]
  """
  s = alpha / a.shape[1]
  through = matmul(cotangent, b.T)
  dx = matmul(cotangent, w.T) + s * matmul(through, a.T)
  return dx, s * matmul(x.T, through), s * matmul(matmul(x, a).T, cotangent)


def lora_dropout_delta(a, b, alpha, inputs, outputs, rescale=None):
  """The sampled delta: diag(inputs) a b diag(outputs), times alpha / r.

  Lin et al. 2024 (arXiv 2404.09610): Bernoulli masks of the inputs and the
  outputs, never of the rank, so an entry stays with (1 - p)^2. With `rescale`
  the rate p of both, what is kept is divided by (1 - p)^2.

  >>> a, b = np.array([[1.0], [2.0]]), np.array([[1.0, 10.0]])
  >>> m = np.array([True, False])
  >>> lora_dropout_delta(a, b, 1.0, m, np.array([True, True])).tolist()
  [[1.0, 10.0], [0.0, 0.0]]
  >>> lora_dropout_delta(a, b, 1.0, m, m, rescale=0.5).tolist()
  [[4.0, 0.0], [0.0, 0.0]]
  """
  full = lora_delta(a, b, alpha)
  out = np.zeros(full.shape)
  for i, o in np.ndindex(*full.shape):
    if inputs[i] and outputs[o]:
      out[i, o] = full[i, o]
      if rescale is not None:
        out[i, o] /= (1 - rescale) ** 2
  return out


def lora_ensemble(x, w, a, b, alpha, masks, rescale=None):
  """The mean output over pairs of masks.

  Lin et al. 2024, test-time ensemble: the predictions are averaged.

  >>> one, on, off = np.ones((1, 1)), np.array([True]), np.array([False])
  >>> lora_ensemble(one, one, one, one, 1.0, [(on, on), (on, off)]).tolist()
  [[1.5]]
  """
  out = np.zeros((x.shape[0], w.shape[1]))
  for inputs, outputs in masks:
    delta = lora_dropout_delta(a, b, alpha, inputs, outputs, rescale)
    one = matmul(x, w) + matmul(x, delta)
    for i in np.ndindex(*out.shape):
      out[i] += one[i] / len(masks)
  return out


# Mixtures of LoRA.


def softmax(z):
  """exp(z) over its sum.

  >>> softmax([0.0, 0.0])
  [0.5, 0.5]
  """
  top = max(z)
  total = sum(math.exp(v - top) for v in z)
  return [math.exp(v - top) / total for v in z]


def top_k_gates(logits, k, normalize=False):
  """Softmax over all experts, zero outside of the k largest of each token.

  >>> g = top_k_gates(np.array([[0.0, 0.0, -1.0]]), 1, normalize=True)
  >>> g.tolist()
  [[1.0, 0.0, 0.0]]
  """
  out = np.zeros(logits.shape)
  for t in range(logits.shape[0]):
    p = softmax([float(z) for z in logits[t]])
    kept = select.top_k_mask([np.array(p)], k)[0]
    total = sum(v for v, m in zip(p, kept, strict=True) if m)
    for e, value in enumerate(p):
      if kept[e]:
        out[t, e] = value / total if normalize else value
  return out


def lora_moe(x, w, a, b, alpha, gates):
  """x w + sum over experts of gate * alpha / r * (x a_e) b_e.

  a is [experts, inputs, r], b [experts, r, outputs], gates [tokens, experts]
  with zeros for what is not chosen.

  >>> x, w = np.ones((1, 1)), np.zeros((1, 1))
  >>> a, b = np.ones((2, 1, 1)), np.array([[[2.0]], [[5.0]]])
  >>> lora_moe(x, w, a, b, 1.0, np.array([[0.0, 0.5]])).tolist()
  [[2.5]]
  """
  out = matmul(x, w)
  for t in range(x.shape[0]):
    for e in range(a.shape[0]):
      gate = float(gates[t, e])
      if gate:
        row = matmul(matmul(x[t : t + 1], a[e]), b[e])[0]
        for o in range(out.shape[1]):
          out[t, o] += gate * alpha / a.shape[2] * row[o]
  return out


def octavius_gates(embeddings, w, valid=None, eps=1e-9):
  """One gate per sample: the two best experts of the mean logits.

  Chen et al. 2023 (arXiv 2311.02684); the authors' code: softmax of the mean
  over the tokens of x w, the two largest divided by their sum plus eps. It
  averages the padding, too; here `valid` [samples, tokens] can leave it out.
  `embeddings` is [samples, tokens, dim], w [dim, experts].

  >>> x = np.array([[[1.0], [3.0]]])
  >>> g = octavius_gates(x, np.array([[0.0, 0.0, -9.0]]))
  >>> [round(float(v), 6) for v in g[0]]
  [0.5, 0.5, 0.0]
  """
  samples, tokens, dim = embeddings.shape
  out = np.zeros((samples, w.shape[1]))
  for s in range(samples):
    rows = [t for t in range(tokens) if valid is None or valid[s, t]]
    logits = []
    for e in range(w.shape[1]):
      total = 0.0
      for t in rows:
        for d in range(dim):
          total += float(embeddings[s, t, d]) * float(w[d, e])
      logits.append(total / len(rows))
    p = softmax(logits)
    kept = select.top_k_mask([np.array(p)], 2)[0]
    total = sum(v for v, m in zip(p, kept, strict=True) if m) + eps
    for e, value in enumerate(p):
      if kept[e]:
        out[s, e] = value / total
  return out


def sira_gates(logits, k, capacity=None, keep=None, normalize=False):
  """Gates after expert dropout, top-k and capacity.

  Zhu et al. 2023 (arXiv 2311.09179): a softmax router, of whose gates some
  are zeroed before the top k (`keep` is False there; None at evaluation), and
  experts that take at most `capacity` tokens. A zeroed gate is never chosen,
  so a token may have fewer than k. Left open there and settled here: all
  first choices come before the second ones, then the order of the tokens;
  with `normalize` the chosen gates of a token sum to one before the capacity.

  Both tokens want expert 0, which has room for one.

  >>> logits = np.array([[1.0, 0.0], [1.0, 0.0]])
  >>> g = sira_gates(logits, 1, capacity=1)
  >>> [[round(float(v), 6) for v in row] for row in g]
  [[0.731059, 0.0], [0.0, 0.0]]
  >>> g = sira_gates(logits, 1, keep=np.array([[False, True], [True, True]]))
  >>> [[round(float(v), 6) for v in row] for row in g]
  [[0.0, 0.268941], [0.731059, 0.0]]
  """
  tokens, experts = logits.shape
  choices = []
  for t in range(tokens):
    p = softmax([float(z) for z in logits[t]])
    may = [e for e in range(experts) if keep is None or keep[t, e]]
    chosen = sorted(may, key=lambda e, p=p: (-p[e], e))[:k]
    total = sum(p[e] for e in chosen)
    choices.append([(e, p[e] / total if normalize else p[e]) for e in chosen])
  out = np.zeros(logits.shape)
  load = [0] * experts
  for rank in range(k):
    for t in range(tokens):
      if rank < len(choices[t]):
        e, gate = choices[t][rank]
        if capacity is None or load[e] < capacity:
          load[e] += 1
          out[t, e] = gate
  return out


# Masked fine-tuning.


def trained_count(masks):
  """How many entries are trained.

  >>> trained_count([np.array([True, False]), np.array([True])])
  2
  """
  return sum(int(bool(m[i])) for m in masks for i in np.ndindex(*m.shape))


def masked_adamw(
  leaves,
  masks,
  gradients,
  rate,
  decays=(0.9, 0.999),
  eps=1e-8,
  weight_decay=0.0,
):
  """AdamW of the trained entries alone; returns leaves and (m, v).

  Loshchilov and Hutter 2017 (arXiv 1711.05101), as Optax has it: the decay is
  added to the direction, before the rate. m and v are lists of one number for
  each trained entry, array after array in row-major order: nothing is kept,
  and nothing decays, for an entry that is not trained. `gradients` is a list
  of steps.

  The first step of Adam is the rate times the sign.

  >>> w, mask = np.array([1.0, 2.0]), np.array([False, True])
  >>> (new,), (m, v) = masked_adamw([w], [mask], [[np.array([3.0, 4.0])]], 0.5)
  >>> new.tolist(), [round(z, 6) for z in m], [round(z, 6) for z in v]
  ([1.0, 1.50000000125], [0.4], [0.016])
  """
  where = [
    (n, i) for n, mask in enumerate(masks) for i in np.ndindex(*mask.shape)
  ]
  where = [(n, i) for n, i in where if masks[n][i]]
  out = [np.array(leaf, np.float64) for leaf in leaves]
  m, v = [0.0] * len(where), [0.0] * len(where)
  for step, gradient in enumerate(gradients, 1):
    for place, (n, i) in enumerate(where):
      g = float(gradient[n][i])
      m[place] = decays[0] * m[place] + (1 - decays[0]) * g
      v[place] = decays[1] * v[place] + (1 - decays[1]) * g * g
      first = m[place] / (1 - decays[0] ** step)
      second = v[place] / (1 - decays[1] ** step)
      direction = first / (math.sqrt(second) + eps)
      out[n][i] -= rate * (direction + weight_decay * out[n][i])
  return out, (m, v)


# FISH masks.


def fisher(gradients):
  """Mean over examples of the squared gradients of log p(y | x).

  Sung et al. 2021 (arXiv 2111.09839), the empirical Fisher: `gradients` is a
  list of examples, each a list of arrays; squares of single examples, never
  of their sum.

  >>> [f.tolist() for f in fisher([[np.array([1.0])], [np.array([-3.0])]])]
  [[5.0]]
  """
  out = [np.zeros(g.shape) for g in gradients[0]]
  for example in gradients:
    for n, g in enumerate(example):
      for i in np.ndindex(*g.shape):
        out[n][i] += float(g[i]) ** 2 / len(gradients)
  return out


def log_likelihood_gradient(x, y, w):
  """d log softmax(x w)[y] / d w of one example, x a vector.

  >>> log_likelihood_gradient(np.array([2.0]), 1, np.zeros((1, 2))).tolist()
  [[-1.0, 1.0]]
  """
  logits = matmul(x[None], w)[0]
  p = softmax([float(z) for z in logits])
  out = np.zeros(w.shape)
  for i, c in np.ndindex(*w.shape):
    out[i, c] = float(x[i]) * ((1.0 if c == y else 0.0) - p[c])
  return out


def logistic_fisher(xs, w, labels=None):
  """The diagonal Fisher of softmax regression, in closed form.

  E over y of the square is x_i^2 p_c (1 - p_c), averaged over the examples;
  with labels x_i^2 (1[y = c] - p_c)^2.

  >>> logistic_fisher(np.array([[2.0]]), np.zeros((1, 2))).tolist()
  [[1.0, 1.0]]
  """
  out = np.zeros(w.shape)
  for n, x in enumerate(xs):
    p = softmax([float(z) for z in matmul(x[None], w)[0]])
    for i, c in np.ndindex(*w.shape):
      spread = p[c] * (1 - p[c])
      if labels is not None:
        spread = ((1.0 if c == labels[n] else 0.0) - p[c]) ** 2
      out[i, c] += float(x[i]) ** 2 * spread / len(xs)
  return out


def fish_mask(scores, k, always=()):
  """The k entries of largest Fisher information, over all arrays together.

  Sung et al. 2021 (arXiv 2111.09839): a fixed mask. The authors' code
  trains the arrays in `always` (the new head) whole, and takes their size
  from k.

  >>> scores = [np.array([1.0, 4.0]), np.array([3.0, 2.0])]
  >>> [m.astype(int).tolist() for m in fish_mask(scores, 2)]
  [[0, 1], [1, 0]]
  >>> [m.astype(int).tolist() for m in fish_mask(scores, 3, always=(0,))]
  [[1, 1], [1, 0]]
  """
  rest = [n for n in range(len(scores)) if n not in always]
  left = k - sum(scores[n].size for n in always)
  chosen = select.top_k_mask([scores[n] for n in rest], left)
  masks = [np.ones(s.shape, dtype=bool) for s in scores]
  for n, mask in zip(rest, chosen, strict=True):
    masks[n] = mask
  return masks


# LT-SFT.


def most_changed(before, after, k, already=None):
  """The k entries that changed most, over all arrays together.

  Ansell et al. 2022 (arXiv 2110.07560). `already` are masks that are kept and
  to which k are added (the authors' iterations). Exactly k here; the authors'
  code takes all that reach the k-th size.

  >>> before, after = [np.zeros(3)], [np.array([1.0, -3.0, 2.0])]
  >>> most_changed(before, after, 1)[0].astype(int).tolist()
  [0, 1, 0]
  >>> most_changed(before, after, 1, [np.array([0, 1, 0])])[0].astype(
  ...   int
  ... ).tolist()
  [0, 1, 1]
  """
  sizes = []
  for n, (old, new) in enumerate(zip(before, after, strict=True)):
    size = np.zeros(old.shape)
    for i in np.ndindex(*old.shape):
      size[i] = abs(float(new[i]) - float(old[i]))
      if already is not None and already[n][i]:
        size[i] = -math.inf
    sizes.append(size)
  masks = select.top_k_mask(sizes, k)
  if already is None:
    return masks
  out = []
  for mask, old in zip(masks, already, strict=True):
    out.append(np.logical_or(mask, np.asarray(old, dtype=bool)))
  return out


def distance_penalty(before, leaves, strength):
  """strength * (sum of |leaf - before|) / number of parameters.

  Ansell et al. 2022, the L1 regularizer, as the authors' code divides it.

  >>> distance_penalty([np.zeros(4)], [np.array([1.0, -3.0, 0.0, 0.0])], 2.0)
  2.0
  """
  total, count = 0.0, 0
  for old, new in zip(before, leaves, strict=True):
    count += old.size
    for i in np.ndindex(*old.shape):
      total += abs(float(new[i]) - float(old[i]))
  return strength * total / count


def sparse_difference(before, after, masks):
  """(index, value) of the trained entries, array by array, row-major.

  >>> d = sparse_difference(
  ...   [np.zeros((2, 2))],
  ...   [np.array([[1.0, 2.0], [3.0, 4.0]])],
  ...   [np.array([[False, True], [True, False]])],
  ... )
  >>> d
  [[(1, 2.0), (2, 3.0)]]
  """
  out = []
  for old, new, mask in zip(before, after, masks, strict=True):
    found = []
    for flat, i in enumerate(np.ndindex(*old.shape)):
      if mask[i]:
        found.append((flat, float(new[i]) - float(old[i])))
    out.append(found)
  return out


def compose(before, differences):
  """before + the sum of sparse differences.

  Ansell et al. 2022: theta = theta_0 + phi_task + phi_language.

  >>> compose([np.array([1.0, 2.0])], [[[(0, 5.0)]], [[(0, 2.0), (1, 3.0)]]])
  [array([8., 5.])]
  """
  out = [np.array(leaf, np.float64) for leaf in before]
  for difference in differences:
    for leaf, entries in zip(out, difference, strict=True):
      for flat, value in entries:
        leaf[np.unravel_index(flat, leaf.shape)] += value
  return out


# SMT.


def block_scores(gradients, block, rule="sum_abs"):
  """One score for each block of one weight, from the warm-up's gradients.

  He et al. 2024 (arXiv 2405.15525). "sum_abs": the mean over the block of the
  sum over steps of |g|. The authors' code adds up signed gradients, and has
  "abs_mean", the mean of the size of the sum, and its default "mean_abs", the
  size of the mean of the sum, where gradients in a block cancel out.

  >>> steps = [np.array([[1.0, -3.0]]), np.array([[-1.0, -1.0]])]
  >>> block_scores(steps, (1, 2)).tolist()
  [[3.0]]
  >>> block_scores(steps, (1, 2), "abs_mean").tolist()
  [[2.0]]
  >>> block_scores([np.array([[1.0, -3.0]])], (1, 2), "mean_abs").tolist()
  [[1.0]]
  """
  rows, columns = gradients[0].shape
  out = np.zeros((rows // block[0], columns // block[1]))
  for r, c in np.ndindex(*out.shape):
    total = 0.0
    for i in range(r * block[0], (r + 1) * block[0]):
      for j in range(c * block[1], (c + 1) * block[1]):
        if rule == "sum_abs":
          total += sum(abs(float(g[i, j])) for g in gradients)
        elif rule == "abs_mean":
          total += abs(sum(float(g[i, j]) for g in gradients))
        else:
          total += sum(float(g[i, j]) for g in gradients)
    out[r, c] = abs(total) / (block[0] * block[1])
  return out


def select_blocks(scores, n):
  """The n best blocks of all weights, as a list of (row, column) for each.

  The order in each list is row-major.

  >>> select_blocks([np.array([[1.0, 4.0]]), np.array([[3.0], [2.0]])], 2)
  [[(0, 1)], [(0, 0)]]
  """
  masks = select.top_k_mask(scores, n)
  return [[i for i in np.ndindex(*m.shape) if m[i]] for m in masks]


def gather_blocks(w, blocks, block):
  """The chosen blocks, [n, rows, columns].

  >>> w = np.arange(8.0).reshape(2, 4)
  >>> gather_blocks(w, [(0, 1)], (2, 2)).tolist()
  [[[2.0, 3.0], [6.0, 7.0]]]
  """
  out = np.zeros((len(blocks), *block))
  for n, (r, c) in enumerate(blocks):
    for i, j in np.ndindex(*block):
      out[n, i, j] = float(w[r * block[0] + i, c * block[1] + j])
  return out


def scatter_blocks(w, blocks, values):
  """w with the chosen blocks replaced.

  >>> scatter_blocks(
  ...   np.zeros((1, 4)), [(0, 1)], np.array([[[5.0, 6.0]]])
  ... ).tolist()
  [[0.0, 0.0, 5.0, 6.0]]
  """
  out = np.array(w, np.float64)
  block = values.shape[1:]
  for n, (r, c) in enumerate(blocks):
    for i, j in np.ndindex(*block):
      out[r * block[0] + i, c * block[1] + j] = float(values[n, i, j])
  return out


def block_gradients(x, cotangent, blocks, block):
  """The chosen blocks of x' cotangent, from slices of x and cotangent alone.

  >>> x, g = np.array([[1.0, 2.0]]), np.array([[3.0, 5.0]])
  >>> block_gradients(x, g, [(1, 0)], (1, 1)).tolist()
  [[[6.0]]]
  """
  out = np.zeros((len(blocks), *block))
  for n, (r, c) in enumerate(blocks):
    for i, j in np.ndindex(*block):
      for t in range(x.shape[0]):
        out[n, i, j] += float(x[t, r * block[0] + i]) * float(
          cotangent[t, c * block[1] + j]
        )
  return out


# S2FT.


def s2ft_order(first, second, count):
  """The order of units that makes both selections contiguous, and its slices.

  Yang et al. 2024 (arXiv 2412.06289), the authors' code: those of the first
  matrix only (v or up), those of both, those of the second only (o or down),
  then the rest ascending. `order[new] = old`; the slices are (start, end) of
  the first and the second in the new order. In each part the order is that in
  which `first`, then `second` names them.

  >>> s2ft_order([4, 1], [1, 3], 5)
  ([4, 1, 3, 0, 2], (0, 2), (1, 3))
  """
  only_first = [j for j in first if j not in second]
  both = [j for j in first if j in second]
  only_second = [j for j in second if j not in first]
  order = only_first + both + only_second
  order += [j for j in range(count) if j not in order]
  middle = len(only_first) + len(both)
  return order, (0, middle), (len(only_first), middle + len(only_second))


def permute_columns(w, order, width=1):
  """w [inputs, units * width] with its units in the new order.

  >>> permute_columns(np.array([[1.0, 2.0, 3.0, 4.0]]), [1, 0], 2).tolist()
  [[3.0, 4.0, 1.0, 2.0]]
  """
  out = np.zeros(w.shape)
  for new, old in enumerate(order):
    for i in range(w.shape[0]):
      for d in range(width):
        out[i, new * width + d] = float(w[i, old * width + d])
  return out


def permute_rows(w, order, width=1):
  """w [units * width, outputs] with its units in the new order.

  >>> permute_rows(np.array([[1.0], [2.0]]), [1, 0]).tolist()
  [[2.0], [1.0]]
  """
  return permute_columns(w.T, order, width).T


def inverse(order):
  """The order that undoes `order`.

  >>> inverse([2, 0, 1])
  [1, 2, 0]
  """
  out = [0] * len(order)
  for new, old in enumerate(order):
    out[old] = new
  return out


def gated_ffn(x, w_gate, w_up, w_down):
  """(silu(x w_gate) * (x w_up)) w_down; returns it and what w_down reads.

  >>> one = np.ones((1, 1))
  >>> y, h = gated_ffn(one, one, one, 2 * one)
  >>> round(float(y[0, 0]), 6), round(float(h[0, 0]), 6)
  (1.462117, 0.731059)
  """
  gate, up = matmul(x, w_gate), matmul(x, w_up)
  hidden = np.zeros(gate.shape)
  for i in np.ndindex(*gate.shape):
    hidden[i] = silu(gate[i]) * up[i]
  return matmul(hidden, w_down), hidden


def gated_ffn_gradients(x, w_gate, w_up, w_down, cotangent):
  """Full gradients with respect to w_up and w_down.

  >>> one = np.ones((1, 1))
  >>> up, down = gated_ffn_gradients(one, one, one, 2 * one, one)
  >>> round(float(up[0, 0]), 6), round(float(down[0, 0]), 6)
  (1.462117, 0.731059)
  """
  _, hidden = gated_ffn(x, w_gate, w_up, w_down)
  gate = matmul(x, w_gate)
  back = matmul(cotangent, w_down.T)
  for i in np.ndindex(*back.shape):
    back[i] *= silu(gate[i])
  return matmul(x.T, back), matmul(hidden.T, cotangent)


def s2ft_gradients(x, w_gate, w_up, w_down, cotangent, up_slice, down_slice):
  """Gradients of the two slices from what they alone need.

  Of the up-projection the columns of `up_slice`, of the down-projection the
  rows of `down_slice`; only these columns of what is read and of the
  backward signal are formed.

  >>> one = np.ones((1, 1))
  >>> up, down = s2ft_gradients(one, one, one, 2 * one, one, (0, 1), (0, 0))
  >>> round(float(up[0, 0]), 6), down.shape
  (1.462117, (0, 1))
  """
  up = np.zeros((x.shape[1], up_slice[1] - up_slice[0]))
  for j in range(*up_slice):
    gate = matmul(x, w_gate[:, j : j + 1])
    back = matmul(cotangent, w_down[j : j + 1].T)
    for i in range(x.shape[1]):
      for t in range(x.shape[0]):
        signal = float(back[t, 0]) * silu(float(gate[t, 0]))
        up[i, j - up_slice[0]] += float(x[t, i]) * signal
  down = np.zeros((down_slice[1] - down_slice[0], w_down.shape[1]))
  for j in range(*down_slice):
    gate = matmul(x, w_gate[:, j : j + 1])
    value = matmul(x, w_up[:, j : j + 1])
    for o in range(w_down.shape[1]):
      for t in range(x.shape[0]):
        hidden = silu(float(gate[t, 0])) * float(value[t, 0])
        down[j - down_slice[0], o] += hidden * float(cotangent[t, o])
  return up, down


# The update meter.


def update_sparsity(before, after, tolerance=1e-5):
  """Share of the entries that changed by at most the tolerance.

  Mukherjee et al. 2025 (arXiv 2505.11711): 1 - |after - before|_0 / n; the
  authors' code counts a difference up to 1e-5 as none.

  >>> before, after = np.zeros(4), np.array([0.0, 1e-5, 2e-5, -1.0])
  >>> update_sparsity([before], [after])
  0.5
  >>> update_sparsity([before], [after], 0.0)
  0.25
  """
  same, count = 0, 0
  for old, new in zip(before, after, strict=True):
    for i in np.ndindex(*old.shape):
      same += abs(float(new[i]) - float(old[i])) <= tolerance
      count += 1
  return same / count


def update_mask(before, after, tolerance=1e-5):
  """Where an entry changed by more than the tolerance.

  >>> update_mask(np.zeros(3), np.array([0.0, 1e-5, -1.0])).tolist()
  [False, False, True]
  """
  out = np.zeros(before.shape, dtype=bool)
  for i in np.ndindex(*before.shape):
    out[i] = abs(float(after[i]) - float(before[i])) > tolerance
  return out


def overlap(first, second):
  """(share of the first in the second, of the second in the first, chance).

  Mukherjee et al. 2025 report both shares. Under independence the expected
  share of the first is the second's density, and of both at once (chance) the
  product of the densities.

  >>> one, two = np.array([1, 1, 0, 0]), np.array([1, 0, 0, 0])
  >>> overlap(one, two)
  (0.5, 1.0, 0.125)
  """
  both = ones = twos = 0
  for i in np.ndindex(*first.shape):
    both += bool(first[i]) and bool(second[i])
    ones += bool(first[i])
    twos += bool(second[i])
  n = first.size
  return both / ones, both / twos, ones / n * twos / n


def update_rank(before, after, tolerance=1e-9):
  """How many singular values of the change exceed tolerance * the largest.

  >>> update_rank(np.zeros((2, 2)), np.array([[1.0, 2.0], [2.0, 4.0]]))
  1
  """
  values = singular_values(np.asarray(after) - np.asarray(before))[1]
  return sum(float(s) > tolerance * float(values[0]) for s in values)


# SparseLoCo.


def chunk_side(size, target):
  """The largest divisor of `size` that is at most `target`.

  >>> chunk_side(12, 5), chunk_side(7, 5), chunk_side(3, 5)
  (4, 1, 3)
  """
  return max(d for d in range(1, min(size, target) + 1) if size % d == 0)


def chunks(shape, target):
  """The flat indices of each chunk.

  Sarfi et al. 2025 (arXiv 2508.15706); the authors' code (CCLoco, templar): a
  matrix is cut into squares of 64 by 64, a vector into runs of 64, each side
  the largest divisor of the axis up to 64.

  >>> chunks((2, 4), 2)
  [[0, 1, 4, 5], [2, 3, 6, 7]]
  >>> chunks((6,), 4)
  [[0, 1, 2], [3, 4, 5]]
  """
  if len(shape) == 1:
    side = chunk_side(shape[0], target)
    return [list(range(s, s + side)) for s in range(0, shape[0], side)]
  height, width = (chunk_side(n, target) for n in shape)
  out = []
  for top in range(0, shape[0], height):
    for left in range(0, shape[1], width):
      out.append(
        [
          i * shape[1] + j
          for i in range(top, top + height)
          for j in range(left, left + width)
        ]
      )
  return out


def chunked_top_k(e, k, target):
  """Mask of the k largest sizes of each chunk (all of a smaller chunk).

  >>> chunked_top_k(np.array([[1.0, -2.0, 5.0, 3.0]]), 1, 2).astype(
  ...   int
  ... ).tolist()
  [[0, 1, 1, 0]]
  """
  flat = [float(v) for v in e.ravel()]
  mask = np.zeros(len(flat), dtype=bool)
  for chunk in chunks(e.shape, target):
    sizes = np.array([abs(flat[i]) for i in chunk])
    kept = select.top_k_mask([sizes], max(1, min(k, len(chunk))))[0]
    for i, keep in zip(chunk, kept, strict=True):
      mask[i] = keep
  return mask.reshape(e.shape)


def quantize(values, levels=4, sigmas=6.0):
  """(codes, table): what is sent instead of the values of one array.

  The authors' code: with c the values less their mean and s their deviation
  (divided by n - 1), code = c / (sigmas * s / levels) + levels // 2, rounded
  half to even, clipped to [0, levels). table[code] is the mean of what has
  the code, 0 + mean where nothing has. Two bits are four levels.

  Mean 0, deviation 2 and step 3: 0.67 and -0.67 round to 1 and -1.

  >>> codes, table = quantize([2.0, 2.0, -2.0, -2.0, 0.0])
  >>> codes, table
  ([3, 3, 1, 1, 2], [0.0, -2.0, 0.0, 2.0])
  """
  n = len(values)
  mean = sum(values) / n
  centered = [v - mean for v in values]
  step = 0.0
  if n > 1:
    deviation = math.sqrt(sum(c * c for c in centered) / (n - 1))
    step = sigmas * deviation / levels
  step = step if step > 0 else 1.0
  codes = []
  for c in centered:
    codes.append(min(max(round(c / step + levels // 2), 0), levels - 1))
  table = []
  for level in range(levels):
    members = [
      v for v, code in zip(centered, codes, strict=True) if code == level
    ]
    table.append(mean + (sum(members) / len(members) if members else 0.0))
  return codes, table


def send(delta, error, beta, k, target, levels=None, sigmas=6.0):
  """(sent, new error) of one replica and one array.

  Sarfi et al. 2025 (arXiv 2508.15706): e = beta * error + delta, what is sent
  is the quantized top k of each chunk, and the rest, also the quantization's
  error, stays: sent + new error = e. `levels` None sends the values.

  >>> sent, left = send(np.array([3.0, 1.0]), np.array([0.0, 4.0]), 0.5, 1, 2)
  >>> sent.tolist(), left.tolist()
  ([3.0, 0.0], [0.0, 3.0])
  """
  e = np.zeros(delta.shape)
  for i in np.ndindex(*e.shape):
    e[i] = beta * float(error[i]) + float(delta[i])
  mask = chunked_top_k(e, k, target)
  where = [i for i in np.ndindex(*e.shape) if mask[i]]
  values = [float(e[i]) for i in where]
  if levels is not None:
    codes, table = quantize(values, levels, sigmas)
    values = [table[code] for code in codes]
  sent = np.zeros(e.shape)
  for i, value in zip(where, values, strict=True):
    sent[i] = value
  return sent, e - sent


def outer_step(theta, sent, rate, average="replicas"):
  """theta - rate * the mean of what was sent.

  "replicas" divides by the number of replicas (the paper); "senders" by how
  many sent that entry (the authors' code: a scatter with the mean).

  >>> sent = [np.array([2.0, 0.0]), np.array([0.0, 0.0])]
  >>> outer_step(np.zeros(2), sent, 1.0).tolist()
  [-1.0, 0.0]
  >>> outer_step(np.zeros(2), sent, 1.0, "senders").tolist()
  [-2.0, 0.0]
  """
  out = np.array(theta, np.float64)
  for i in np.ndindex(*out.shape):
    total = sum(float(s[i]) for s in sent)
    count = len(sent)
    if average == "senders":
      count = max(1, sum(float(s[i]) != 0 for s in sent))
    out[i] -= rate * total / count
  return out
