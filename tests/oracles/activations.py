"""Reference definitions of sparse activations.

Everything here is NumPy in float64 with plain loops over scalars. Tokens are
rows: activations are [tokens, neurons], weights [inputs, outputs]. Among
equal values the lower index is kept.
"""

import itertools
import math

import numpy as np

from tests.oracles import select


def matmul(a, b):
  """a @ b, entry by entry.

  >>> matmul(np.array([[1.0, 2.0]]), np.array([[3.0], [4.0]])).tolist()
  [[11.0]]
  """
  out = np.zeros((a.shape[0], b.shape[1]))
  for i in range(a.shape[0]):
    for j in range(b.shape[1]):
      for k in range(a.shape[1]):
        out[i, j] += float(a[i, k]) * float(b[k, j])
  return out


def each(function, *arrays):
  """function of every entry.

  >>> each(
  ...   lambda a, b: a * b, np.array([2.0, 3.0]), np.array([5.0, 7.0])
  ... ).tolist()
  [10.0, 21.0]
  """
  out = np.zeros(arrays[0].shape)
  for i in np.ndindex(*out.shape):
    out[i] = function(*(float(a[i]) for a in arrays))
  return out


def sigmoid(a):
  """1 / (1 + exp(-a)).

  >>> sigmoid(0.0), round(sigmoid(-1000.0), 6)
  (0.5, 0.0)
  """
  if a >= 0:
    return 1 / (1 + math.exp(-a))
  return math.exp(a) / (1 + math.exp(a))


def relu(a):
  """max(a, 0).

  >>> relu(-2.0), relu(2.0)
  (0.0, 2.0)
  """
  return max(a, 0.0)


def silu(a):
  """a sigmoid(a).

  >>> silu(0.0), round(silu(1.0), 6)
  (0.0, 0.731059)
  """
  return a * sigmoid(a)


def normal_cdf(z):
  """P(Z <= z), Z standard normal.

  >>> normal_cdf(0.0), round(normal_cdf(1.959964), 6)
  (0.5, 0.975)
  """
  return 0.5 * math.erfc(-z / math.sqrt(2))


def gelu(a, approximate=False):
  """a P(Z <= a); approximate is the form with tanh that Gemma uses.

  >>> round(gelu(1.0), 6), round(gelu(1.0, True), 6)
  (0.841345, 0.841192)
  """
  if not approximate:
    return a * normal_cdf(a)
  inner = math.sqrt(2 / math.pi) * (a + 0.044715 * a**3)
  return 0.5 * a * (1 + math.tanh(inner))


def normal_quantile(p):
  """z with normal_cdf(z) = p, by bisection; -inf at 0, inf at 1.

  >>> round(normal_quantile(0.975), 6), normal_quantile(1.0)
  (1.959964, inf)
  """
  if p <= 0:
    return -math.inf
  if p >= 1:
    return math.inf
  if p > 0.5:  # Where the probability itself has few digits left.
    return -normal_quantile(1 - p)
  low, high = -40.0, 0.0
  for _ in range(200):
    middle = (low + high) / 2
    if normal_cdf(middle) < p:
      low = middle
    else:
      high = middle
  return (low + high) / 2


# Meters.


def density(a, threshold=0.0):
  """Share of entries above the threshold in size.

  Li et al. 2022 (arXiv 2210.06313): the percentage of nonzero entries of the
  activation map after ReLU, averaged over the tokens. NaN
  counts as zero here.

  >>> density(np.array([[0.0, 2.0, -1.0, 0.0]]))
  0.5
  >>> density(np.array([[0.0, 2.0, -1.0, 0.0]]), 1.0)
  0.25
  """
  found = 0
  for i in np.ndindex(*a.shape):
    found += abs(float(a[i])) > threshold
  return found / a.size


def token_density(a, threshold=0.0):
  """`density` of each token.

  >>> token_density(np.array([[0.0, 2.0], [1.0, 1.0]])).tolist()
  [0.5, 1.0]
  """
  return np.array([density(row, threshold) for row in a])


def neuron_density(a, threshold=0.0):
  """Share of the tokens at which each neuron fires.

  >>> neuron_density(np.array([[0.0, 2.0], [1.0, 1.0]])).tolist()
  [0.5, 1.0]
  """
  return np.array([density(column, threshold) for column in a.T])


def joint_density(a, threshold=0.0):
  """Share of the neurons that fire at one of the tokens at least.

  What a batch that shares its weights must load: one minus the agg_sparsity
  of Lee et al.'s code (CATS, arXiv 2404.08763).

  >>> joint_density(np.array([[0.0, 2.0, 0.0], [1.0, 1.0, 0.0]]))
  0.6666666666666666
  """
  found = [float(d) > 0 for d in neuron_density(a, threshold)]
  return sum(found) / len(found)


# Top-k activations.


def top_k(a, k, by="value"):
  """Each token keeps its k largest entries, the rest is zero.

  Li et al. 2022 (arXiv 2210.06313): a top-k thresholding after
  the ReLU, where largest in value and largest in size are the same. Ties go
  to the lower index.

  >>> top_k(np.array([[1.0, 3.0, 3.0, 2.0]]), 2).tolist()
  [[0.0, 3.0, 3.0, 0.0]]
  >>> top_k(np.array([[1.0, -3.0, 0.5]]), 1).tolist()
  [[1.0, 0.0, 0.0]]
  >>> top_k(np.array([[1.0, -3.0, 0.5]]), 1, "magnitude").tolist()
  [[0.0, -3.0, 0.0]]
  """
  out = np.zeros(a.shape)
  for t in range(a.shape[0]):
    mask = select.top_k_mask([abs(a[t]) if by == "magnitude" else a[t]], k)[0]
    for i in range(a.shape[1]):
      if mask[i]:
        out[t, i] = float(a[t, i])
  return out


def top_k_gradient(a, k, cotangent, by="value"):
  """The cotangent where `top_k` keeps the entry, zero elsewhere.

  >>> g = np.array([[5.0, 7.0, 9.0]])
  >>> top_k_gradient(np.array([[1.0, 3.0, 2.0]]), 2, g).tolist()
  [[0.0, 7.0, 9.0]]
  """
  out = np.zeros(a.shape)
  for t in range(a.shape[0]):
    mask = select.top_k_mask([abs(a[t]) if by == "magnitude" else a[t]], k)[0]
    for i in range(a.shape[1]):
      if mask[i]:
        out[t, i] = float(cotangent[t, i])
  return out


def top_k_ffn(x, w_in, b_in, w_out, b_out, k):
  """top_k(relu(x w_in + b_in)) w_out + b_out.

  Li et al. 2022 (arXiv 2210.06313), Top-k Transformer. At most k neurons
  fire; where the ReLU leaves fewer, fewer.

  >>> x, w = np.array([[1.0, 2.0]]), np.eye(2)
  >>> zero = np.zeros(2)
  >>> top_k_ffn(x, w, zero, w, zero, 1).tolist()
  [[0.0, 2.0]]
  """
  hidden = matmul(x, w_in)
  for t, j in np.ndindex(*hidden.shape):
    hidden[t, j] = relu(hidden[t, j] + float(b_in[j]))
  out = matmul(top_k(hidden, k), w_out)
  for t, j in np.ndindex(*out.shape):
    out[t, j] += float(b_out[j])
  return out


# Statistical top-k.


def statistical_threshold(row, k, ddof=0):
  """mean + std * quantile(1 - k / d) of one token.

  You et al. 2025 (arXiv 2506.06644), statistical top-k. The
  variance is divided by d - ddof: 0 is what Gemma 3n's code does
  (unbiased=False), 1 is the sample variance. k = d gives -inf, k = 0 inf.

  >>> statistical_threshold(np.array([1.0, 2.0, 3.0, 4.0]), 2)
  2.5
  >>> statistical_threshold(np.array([1.0, 2.0]), 2)
  -inf
  """
  d = len(row)
  quantile = normal_quantile(1 - k / d)
  if math.isinf(quantile):
    return quantile
  mean = sum(float(v) for v in row) / d
  variance = sum((float(v) - mean) ** 2 for v in row) / (d - ddof)
  return mean + math.sqrt(variance) * quantile


def statistical_top_k(a, k, ddof=0, soft=True):
  """What exceeds the threshold of its token.

  Soft: max(a - threshold, 0), as the paper and Gemma 3n have it, so that the
  result is continuous. Hard keeps the value. Entries equal to the threshold
  are zero.

  With mean 2.5 and k / d = 1 / 2 the threshold is the mean.

  >>> a = np.array([[1.0, 2.0, 3.0, 4.0]])
  >>> statistical_top_k(a, 2).tolist()
  [[0.0, 0.0, 0.5, 1.5]]
  >>> statistical_top_k(a, 2, soft=False).tolist()
  [[0.0, 0.0, 3.0, 4.0]]
  """
  out = np.zeros(a.shape)
  for t in range(a.shape[0]):
    threshold = statistical_threshold(a[t], k, ddof)
    for i in range(a.shape[1]):
      if float(a[t, i]) > threshold:
        out[t, i] = float(a[t, i]) - (threshold if soft else 0)
  return out


def statistical_top_k_gradient(a, k, cotangent, ddof=0):
  """The gradient of the soft form, through the mean and the deviation too.

  d threshold / d a_j = 1 / d + quantile (a_j - mean) / ((d - ddof) std); each
  kept entry gives its cotangent and takes its share of the threshold's.

  Threshold 2.5, two kept entries with cotangents 1 and 3, quantile 0:

  >>> a, g = np.array([[1.0, 2.0, 3.0, 4.0]]), np.array([[9.0, 9.0, 1.0, 3.0]])
  >>> statistical_top_k_gradient(a, 2, g).tolist()
  [[-1.0, -1.0, 0.0, 2.0]]
  """
  out = np.zeros(a.shape)
  d = a.shape[1]
  quantile = normal_quantile(1 - k / d)
  for t in range(a.shape[0]):
    threshold = statistical_threshold(a[t], k, ddof)
    mean = sum(float(v) for v in a[t]) / d
    variance = sum((float(v) - mean) ** 2 for v in a[t]) / (d - ddof)
    kept = [i for i in range(d) if float(a[t, i]) > threshold]
    total = sum(float(cotangent[t, i]) for i in kept)
    for j in range(d):
      slope = 1 / d
      if quantile != 0 and variance > 0:
        slope += (
          quantile
          * (float(a[t, j]) - mean)
          / ((d - ddof) * math.sqrt(variance))
        )
      out[t, j] = -total * slope
      if j in kept:
        out[t, j] += float(cotangent[t, j])
  return out


def spark_ffn(x, k1, k2, v, k, ddof=0, approximate=False):
  """(GELU(statistical_top_k(x[:r] k1)) * (x[r:] k2)) v.

  You et al. 2025 (arXiv 2506.06644), Spark FFN: the first r inputs predict
  which neurons fire, and weigh them; the others give their values. k1 is
  [r, neurons], k2 [d - r, neurons], v [neurons, d].

  r = 1; the predictor's scores 1, 2, 3, 4 leave 0, 0, 0.5 and 1.5.

  >>> x = np.array([[1.0, 10.0]])
  >>> k1 = np.array([[1.0, 2.0, 3.0, 4.0]])
  >>> y = spark_ffn(x, k1, np.ones((1, 4)), np.eye(4), 2)
  >>> [round(float(z), 6) for z in y[0]]
  [0.0, 0.0, 3.457312, 13.997892]
  """
  r = k1.shape[0]
  scores = statistical_top_k(matmul(x[:, :r], k1), k, ddof)
  values = matmul(x[:, r:], k2)
  hidden = each(lambda s, u: gelu(s, approximate) * u, scores, values)
  return matmul(hidden, v)


# Thresholds from calibration.


def kth_smallest(values, sparsity, rounding="nearest"):
  """The threshold: the size of the k-th smallest entry, 0 for k = 0.

  k is sparsity * count, rounded half up, or rounded down as CHESS' and
  R-Sparse's code do. With `apply_threshold` exactly k of distinct
  entries become zero.

  >>> a = np.array([[3.0, -1.0, 2.0, -4.0]])
  >>> kth_smallest(a, 0.5), kth_smallest(a, 0.0)
  (2.0, 0.0)
  >>> kth_smallest(a, 0.4), kth_smallest(a, 0.4, "down")
  (2.0, 1.0)
  """
  sizes = sorted(abs(float(values[i])) for i in np.ndindex(*values.shape))
  k = math.floor(sparsity * len(sizes) + (0.5 if rounding == "nearest" else 0))
  return sizes[k - 1] if k > 0 else 0.0


def apply_threshold(a, threshold, keep_equal=False):
  """Zero where the size is at most the threshold.

  TEAL (Liu et al. 2024, arXiv 2408.14690) and R-Sparse's code keep what is
  above; CHESS' code keeps what is equal, too. At threshold 0 nothing changes.
  `threshold` is a number or one for each neuron.

  >>> apply_threshold(np.array([[3.0, -1.0, -2.0]]), 2.0).tolist()
  [[3.0, 0.0, 0.0]]
  >>> apply_threshold(np.array([[3.0, -1.0, -2.0]]), 2.0, True).tolist()
  [[3.0, 0.0, -2.0]]
  """
  limits = np.broadcast_to(threshold, a.shape)
  out = np.zeros(a.shape)
  for i in np.ndindex(*a.shape):
    size, limit = abs(float(a[i])), float(limits[i])
    if size > limit or (keep_equal and size == limit):
      out[i] = float(a[i])
  return out


def histogram_threshold(edges, counts, sparsity):
  """Where the histogram of sizes reaches the sparsity, linear in its bin.

  `edges` are one more than `counts` and begin at 0.

  Half of 4 is one of the first bin and one of the two in the second.

  >>> histogram_threshold([0.0, 1.0, 2.0, 3.0], [1, 2, 1], 0.5)
  1.5
  >>> histogram_threshold([0.0, 1.0, 2.0, 3.0], [1, 2, 1], 0.0)
  0.0
  """
  target = sparsity * sum(counts)
  before = 0.0
  for i, count in enumerate(counts):
    if count > 0 and before + count >= target:
      return edges[i] + (edges[i + 1] - edges[i]) * (target - before) / count
    before += count
  return edges[-1]


def cats_threshold(edges, counts, sparsity):
  """CATS' code: the lower edge of the first bin that ends above the sparsity.

  Lee et al. 2024 (arXiv 2404.08763), get_threshold: searchsorted, side right.

  >>> cats_threshold([0.0, 1.0, 2.0, 3.0], [1, 2, 1], 0.5)
  1.0
  >>> cats_threshold([0.0, 1.0, 2.0, 3.0], [1, 2, 1], 0.75)
  2.0
  """
  total = sum(counts)
  reached = 0.0
  for i, count in enumerate(counts):
    reached += count / total
    if reached > sparsity:
      return edges[i]
  return edges[len(counts)]


def teal_threshold(centers, counts, sparsity):
  """TEAL's code: the (1 + sparsity) / 2 quantile of the signed values.

  Liu et al. 2024 (arXiv 2408.14690), Distribution.icdf: it takes the values
  for symmetric about zero, and interpolates between the centers of the bins.

  Of 4 counts the target is 3: all of the bin at 1.

  >>> teal_threshold([-1.5, -0.5, 0.5, 1.5], [1, 1, 1, 1], 0.5)
  0.5
  """
  target = (0.5 + sparsity / 2) * sum(counts)
  if sparsity == 0:
    return 0.0
  reached = []
  for count in counts:
    reached.append((reached[-1] if reached else 0) + count)
  for i in range(len(counts)):
    if reached[i] >= target:
      if i == 0:
        return centers[0]
      share = (target - reached[i - 1]) / (reached[i] - reached[i - 1])
      return centers[i - 1] + share * (centers[i] - centers[i - 1])
  return centers[-1]


def teal_mlp(x, w_gate, w_up, w_down, t_gate, t_up, t_down):
  """A gated MLP whose three products have thresholds at their inputs.

  Liu et al. 2024 (arXiv 2408.14690): each matrix has a threshold
  of its own, also the two that read the same input.

  >>> x, one = np.array([[3.0, 1.0]]), np.eye(2)
  >>> y = teal_mlp(x, one, one, one, 2.0, 0.0, 0.0)
  >>> [round(float(v), 6) for v in y[0]]
  [8.573167, 0.0]
  """
  gate = each(silu, matmul(apply_threshold(x, t_gate), w_gate))
  up = matmul(apply_threshold(x, t_up), w_up)
  hidden = each(lambda a, b: a * b, gate, up)
  return matmul(apply_threshold(hidden, t_down), w_down)


def greedy_sparsities(sizes, target, step, error):
  """One sparsity for each matrix of a block, raised where it hurts least.

  Liu et al. 2024 (arXiv 2408.14690); the authors' code: until the mean,
  weighed by size, reaches the target, of all matrices below 1 the one whose
  next step leaves the least error(sparsities) takes it; a matrix's step is
  `step` over its size, so that all steps save the same.

  The second matrix is twice as large and its error the smaller.

  >>> greedy_sparsities([1, 2], 0.5, 0.5, lambda s: 3 * s[0] + s[1])
  [0.0, 0.75]
  """
  out = [0.0] * len(sizes)
  mean = lambda: (
    sum(s * n for s, n in zip(out, sizes, strict=True)) / sum(sizes)
  )
  while mean() < target:
    best = None
    for i, size in enumerate(sizes):
      if out[i] < 1:
        trial = out[:i] + [out[i] + step / size] + out[i + 1 :]
        found = error(trial)
        if best is None or found < best[0]:
          best = found, trial
    out = best[1]
  return out


def cats_mlp(x, w_gate, w_up, w_down, threshold):
  """A gated MLP with a threshold after the gate's SiLU.

  Lee et al. 2024 (arXiv 2404.08763). `threshold` may be one for
  each neuron, which is CHESS.

  >>> x, one = np.array([[3.0, 1.0]]), np.eye(2)
  >>> y = cats_mlp(x, one, one, one, 1.0)
  >>> [round(float(v), 6) for v in y[0]]
  [8.573167, 0.0]
  """
  gate = apply_threshold(each(silu, matmul(x, w_gate)), threshold)
  hidden = each(lambda a, b: a * b, gate, matmul(x, w_up))
  return matmul(hidden, w_down)


def chess_thresholds(gate, up, sparsity, rounding="nearest"):
  """A threshold for each neuron, of the activated gate.

  He et al. 2024 (arXiv 2409.01366): the importance of a gate is
  its size times the mean size of its neuron's up-projection; T is their
  quantile over all neurons, and t_i = T / E|up_i|. A neuron whose up is
  always zero has inf, or 0 where T is 0 (the authors' code has NaN there).

  E|up| = (4, 1); importances 4, 2, 8 and 3: T at one half is 3.

  >>> gate = np.array([[1.0, 2.0], [-2.0, 3.0]])
  >>> up = np.array([[4.0, 1.0], [-4.0, -1.0]])
  >>> chess_thresholds(gate, up, 0.5).tolist()
  [0.75, 3.0]
  """
  tokens, neurons = gate.shape
  means = [
    sum(abs(float(up[t, i])) for t in range(tokens)) / tokens
    for i in range(neurons)
  ]
  scores = np.zeros(gate.shape)
  for t, i in np.ndindex(*gate.shape):
    scores[t, i] = abs(float(gate[t, i])) * means[i]
  limit = kth_smallest(scores, sparsity, rounding)
  out = np.zeros(neurons)
  for i in range(neurons):
    if limit > 0:
      out[i] = limit / means[i] if means[i] > 0 else math.inf
  return out


# R-Sparse.


def singular_values(w):
  """(u, s, v) with w = u diag(s) v', s falling, by one-sided Jacobi rotations.

  >>> u, s, v = singular_values(np.array([[3.0, 0.0], [0.0, -4.0]]))
  >>> s.tolist()
  [4.0, 3.0]
  """
  rows, columns = w.shape
  if rows < columns:
    u, s, v = singular_values(w.T)
    return v, s, u
  a = np.array(w, np.float64)
  v = np.eye(columns)
  for _ in range(60):
    largest = 0.0
    for p in range(columns):
      for q in range(p + 1, columns):
        alpha = sum(a[i, p] ** 2 for i in range(rows))
        beta = sum(a[i, q] ** 2 for i in range(rows))
        gamma = sum(a[i, p] * a[i, q] for i in range(rows))
        if abs(gamma) <= 1e-16 * math.sqrt(alpha * beta) or gamma == 0:
          continue
        largest = max(largest, abs(gamma) / math.sqrt(alpha * beta))
        zeta = (beta - alpha) / (2 * gamma)
        tangent = math.copysign(1, zeta) / (abs(zeta) + math.hypot(1, zeta))
        cosine = 1 / math.hypot(1, tangent)
        sine = cosine * tangent
        for m in (a, v):
          for i in range(m.shape[0]):
            first, second = m[i, p], m[i, q]
            m[i, p] = cosine * first - sine * second
            m[i, q] = sine * first + cosine * second
    if largest < 1e-15:
      break
  norms = [
    math.sqrt(sum(a[i, j] ** 2 for i in range(rows))) for j in range(columns)
  ]
  order = sorted(range(columns), key=lambda j: -norms[j])
  u = np.zeros((rows, columns))
  for place, j in enumerate(order):
    for i in range(rows):
      u[i, place] = a[i, j] / norms[j] if norms[j] > 0 else 0.0
  return u, np.array([norms[j] for j in order]), v[:, order]


def low_rank(w, rank):
  """The best approximation of w of that rank.

  >>> low_rank(np.diag([3.0, 4.0]), 1).tolist()
  [[0.0, 0.0], [0.0, 4.0]]
  """
  u, s, v = singular_values(w)
  out = np.zeros(w.shape)
  for i, j in np.ndindex(*w.shape):
    for r in range(rank):
      out[i, j] += u[i, r] * s[r] * v[j, r]
  return out


def r_sparse_scale(w):
  """The norm of each input's row of w [inputs, outputs].

  Zhang et al. 2025 (arXiv 2504.19449): the code takes the rows of v diag(s),
  which have the same norms.

  >>> r_sparse_scale(np.array([[3.0, 4.0], [0.0, 2.0]])).tolist()
  [5.0, 2.0]
  """
  return np.array([math.sqrt(sum(float(e) ** 2 for e in row)) for row in w])


def r_sparse(x, w, threshold, rank, scale=None, bias=None):
  """(x * m) w + (x * (1 - m)) low_rank(w), m where |scale * x| > threshold.

  Zhang et al. 2025 (arXiv 2504.19449). scale None is ones, which the code
  uses where no budget goes to the rank. The bias is added once.

  >>> x, w = np.array([[1.0, 2.0]]), np.diag([3.0, 4.0])
  >>> r_sparse(x, w, 1.0, 0).tolist()
  [[0.0, 8.0]]
  >>> r_sparse(x, w, 5.0, 1).tolist()
  [[0.0, 8.0]]
  >>> r_sparse(x, w, 5.0, 2).tolist()
  [[3.0, 8.0]]
  """
  scale = np.ones(w.shape[0]) if scale is None else scale
  kept, rest = np.zeros(x.shape), np.zeros(x.shape)
  for t, i in np.ndindex(*x.shape):
    strong = abs(float(scale[i]) * float(x[t, i])) > threshold
    (kept if strong else rest)[t, i] = float(x[t, i])
  out = matmul(kept, w) + matmul(rest, low_rank(w, rank))
  for t, j in np.ndindex(*out.shape):
    out[t, j] += 0.0 if bias is None else float(bias[j])
  return out


def r_sparse_budget(inputs, outputs, sparsity, share):
  """(channels, rank, sparsity of the channels) of one budget.

  The authors' code, set_threshold_r_sparse: (1 - sparsity) of the weights may
  be read; `share` of them as whole rows of w, the rest as factors of rank
  (inputs + outputs) numbers each, all rounded down.

  40 of 80 weights: 2 rows of 8 and (40 - 16) // 18 ranks.

  >>> r_sparse_budget(10, 8, 0.5, 0.4)
  (2, 1, 0.8)
  """
  channels = int(inputs * (1 - sparsity) * share)
  left = inputs * outputs * (1 - sparsity) - channels * outputs
  return channels, int(left / (inputs + outputs)), 1 - (1 - sparsity) * share


# DEFT.


def density_loss(layers, form="tanh", sharpness=20.0, eps=1e-7):
  """The mean over layers of a smooth share of nonzero entries.

  Runwal et al. 2024 (arXiv 2402.01911). "square": a^2 / (a^2 + eps), the
  authors' code, eps = 1e-7. "tanh": tanh(sharpness * |a|); the paper's own
  equation could not be read. Each layer counts the same, whatever its width.

  >>> density_loss([np.array([[0.0, 1.0]])], "square", eps=1.0)
  0.25
  >>> round(density_loss([np.array([[0.0, 1.0]])], sharpness=1.0), 6)
  0.380797
  """
  means = []
  for a in layers:
    total = 0.0
    for i in np.ndindex(*a.shape):
      v = float(a[i])
      if form == "tanh":
        total += math.tanh(sharpness * abs(v))
      else:
        total += v * v / (v * v + eps)
    means.append(total / a.size)
  return sum(means) / len(means)


def density_loss_gradient(layers, form="tanh", sharpness=20.0, eps=1e-7):
  """The gradient of `density_loss`; 0 at an activation of 0.

  >>> density_loss_gradient([np.array([[0.0, 1.0]])], "square", eps=1.0)[
  ...   0
  ... ].tolist()
  [[0.0, 0.25]]
  """
  out = []
  for a in layers:
    g = np.zeros(a.shape)
    for i in np.ndindex(*a.shape):
      v = float(a[i])
      if v == 0:
        continue
      if form == "tanh":
        slope = sharpness * (1 - math.tanh(sharpness * abs(v)) ** 2)
        g[i] = math.copysign(slope, v)
      else:
        g[i] = 2 * v * eps / (v * v + eps) ** 2
      g[i] /= a.size * len(layers)
    out.append(g)
  return out


# Output-gated attention.


def attention(q, k, v, causal=True):
  """Softmax attention of [tokens, heads, dim]; returns output and weights.

  k and v may have fewer heads; query heads share them in consecutive groups.
  The weights are [heads, queries, keys].

  >>> q = np.zeros((2, 1, 1))
  >>> out, weights = attention(q, q, np.array([[[1.0]], [[3.0]]]))
  >>> out.ravel().tolist(), weights.tolist()
  ([1.0, 2.0], [[[1.0, 0.0], [0.5, 0.5]]])
  """
  tokens, heads, dim = q.shape
  group = heads // k.shape[1]
  weights = np.zeros((heads, tokens, k.shape[0]))
  out = np.zeros((tokens, heads, v.shape[2]))
  for h, t in np.ndindex(heads, tokens):
    logits = []
    for s in range(k.shape[0]):
      dot = sum(
        float(q[t, h, d]) * float(k[s, h // group, d]) for d in range(dim)
      )
      seen = s <= t or not causal
      logits.append(dot / math.sqrt(dim) if seen else -math.inf)
    top = max(logits)
    total = sum(math.exp(z - top) for z in logits)
    for s, z in enumerate(logits):
      weights[h, t, s] = math.exp(z - top) / total
      for d in range(v.shape[2]):
        out[t, h, d] += weights[h, t, s] * float(v[s, h // group, d])
  return out, weights


def output_gate(y, x, w, bias=None):
  """y * sigmoid(x w + bias), y the attention's output [tokens, heads, dim].

  Qiu et al. 2025 (arXiv 2505.06708), position G1. w is
  [model, heads, dim] (elementwise) or [model, heads] (headwise: one gate for
  the whole head); x is the layer's input after its norm, which q reads too.
  The authors' layers have no bias of the gate by default.

  >>> y, x = np.array([[[2.0, 4.0]]]), np.array([[1.0]])
  >>> output_gate(y, x, np.zeros((1, 1, 2))).tolist()
  [[[1.0, 2.0]]]
  >>> output_gate(y, x, np.full((1, 1), 50.0)).tolist()
  [[[2.0, 4.0]]]
  """
  out = np.zeros(y.shape)
  for t, h, d in np.ndindex(*y.shape):
    at = (h, d) if w.ndim == 3 else (h,)
    score = 0.0 if bias is None else float(bias[at])
    for m in range(x.shape[1]):
      score += float(x[t, m]) * float(w[(m, *at)])
    out[t, h, d] = float(y[t, h, d]) * sigmoid(score)
  return out


def output_gate_gradient(y, x, w, cotangent, bias=None):
  """Gradients with respect to y, x and w of `output_gate`.

  >>> y, x = np.array([[[2.0]]]), np.array([[3.0]])
  >>> g = output_gate_gradient(y, x, np.zeros((1, 1)), np.ones((1, 1, 1)))
  >>> [a.ravel().tolist() for a in g]
  [[0.5], [0.0], [1.5]]
  """
  dy, dx, dw = np.zeros(y.shape), np.zeros(x.shape), np.zeros(w.shape)
  for t, h, d in np.ndindex(*y.shape):
    at = (h, d) if w.ndim == 3 else (h,)
    score = 0.0 if bias is None else float(bias[at])
    for m in range(x.shape[1]):
      score += float(x[t, m]) * float(w[(m, *at)])
    gate, g = sigmoid(score), float(cotangent[t, h, d])
    dy[t, h, d] = g * gate
    for m in range(x.shape[1]):
      slope = g * float(y[t, h, d]) * gate * (1 - gate)
      dx[t, m] += slope * float(w[(m, *at)])
      dw[(m, *at)] += slope * float(x[t, m])
  return dy, dx, dw


def first_key_mass(weights):
  """Mean weight that the queries after the first give to the first key.

  Qiu et al. 2025 (arXiv 2505.06708) report the mean share of the first
  token; the first query, which sees nothing else, is left out here.

  >>> first_key_mass(np.array([[[1.0, 0.0], [0.25, 0.75]]]))
  0.25
  """
  found = [
    float(weights[h, t, 0])
    for h in range(weights.shape[0])
    for t in range(1, weights.shape[1])
  ]
  return sum(found) / len(found)


# Stochastic and straight-through gates.


def bernoulli_gate(a, uniform):
  """1 where uniform < sigmoid(a).

  Bengio et al. 2013 (arXiv 1308.3432), with P(h = 1) = sigmoid(a).

  >>> bernoulli_gate(np.array([0.0, 0.0]), np.array([0.4, 0.6])).tolist()
  [1.0, 0.0]
  """
  return each(lambda s, u: 1.0 if u < sigmoid(s) else 0.0, a, uniform)


def straight_through(a, cotangent, slope=False):
  """The cotangent of the gate as the one of a.

  Bengio et al. 2013 (arXiv 1308.3432): copied unchanged; with `slope`
  multiplied by the sigmoid's derivative.

  >>> straight_through(np.array([0.0]), np.array([3.0])).tolist()
  [3.0]
  >>> straight_through(np.array([0.0]), np.array([3.0]), True).tolist()
  [0.75]
  """
  if not slope:
    return each(lambda s, g: g, a, cotangent)
  return each(lambda s, g: g * sigmoid(s) * (1 - sigmoid(s)), a, cotangent)


def outcomes(a):
  """All (gates, probability).

  >>> [(h.tolist(), p) for h, p in outcomes(np.array([0.0]))]
  [([0.0], 0.5), ([1.0], 0.5)]
  """
  found = []
  for bits in itertools.product([0.0, 1.0], repeat=len(a)):
    p = 1.0
    for s, bit in zip(a, bits, strict=True):
      p *= sigmoid(float(s)) if bit else 1 - sigmoid(float(s))
    found.append((np.array(bits), p))
  return found


def expected_loss(loss, a):
  """E[loss(h)], over all outcomes.

  >>> expected_loss(lambda h: 3 * h[0], np.array([0.0]))
  1.5
  """
  return sum(p * float(loss(h)) for h, p in outcomes(a))


def exact_gradient(loss, a):
  """d E[loss] / d a_i = sigmoid'(a_i) (E[loss | h_i = 1] - E[loss | h_i = 0]).

  >>> exact_gradient(lambda h: 3 * h[0], np.array([0.0])).tolist()
  [0.75]
  """
  out = np.zeros(len(a))
  for i in range(len(a)):
    p = sigmoid(float(a[i]))
    for h, share in outcomes(a):
      given = share / (p if h[i] else 1 - p)
      sign = 1 if h[i] else -1
      out[i] += p * (1 - p) * sign * given * float(loss(h))
  return out


def reinforce(a, gates, loss, baseline):
  """(h - sigmoid(a)) (loss - baseline).

  Bengio et al. 2013 (arXiv 1308.3432): unbiased for any baseline
  that does not depend on h; one for each gate, or one number.

  >>> reinforce(np.array([0.0]), np.array([1.0]), 5.0, 1.0).tolist()
  [2.0]
  """
  baseline = np.broadcast_to(baseline, a.shape)
  return each(lambda s, h, c: (h - sigmoid(s)) * (loss - c), a, gates, baseline)


def optimal_baseline(loss, a):
  """E[(h_i - p_i)^2 loss] / E[(h_i - p_i)^2], for each gate.

  Bengio et al. 2013 (arXiv 1308.3432): the baseline of least variance.

  >>> optimal_baseline(lambda h: 3 * h[0], np.array([0.0])).tolist()
  [1.5]
  """
  out = np.zeros(len(a))
  for i in range(len(a)):
    p = sigmoid(float(a[i]))
    above = sum(q * (h[i] - p) ** 2 * float(loss(h)) for h, q in outcomes(a))
    below = sum(q * (h[i] - p) ** 2 for h, q in outcomes(a))
    out[i] = above / below
  return out


def reinforce_moments(loss, a, baseline):
  """Mean and variance of `reinforce`, over all outcomes.

  >>> mean, variance = reinforce_moments(
  ...   lambda h: 3 * h[0], np.array([0.0]), 1.5
  ... )
  >>> mean.tolist(), variance.tolist()
  ([0.75], [0.0])
  """
  mean, square = np.zeros(len(a)), np.zeros(len(a))
  for h, p in outcomes(a):
    g = reinforce(a, h, float(loss(h)), baseline)
    for i in range(len(a)):
      mean[i] += p * g[i]
      square[i] += p * g[i] ** 2
  return mean, each(lambda s, m: s - m * m, square, mean)


def stochastic_times_smooth(a, uniform):
  """h = b sqrt(p) and dh / da with b constant; P(b = 1) = sqrt(p).

  Bengio et al. 2013 (arXiv 1308.3432): p = sigmoid(a), so E[h] = p. As only the
  smooth factor has a derivative, dh / da = b sqrt(p) (1 - p) / 2, whose mean
  is half of dp / da.

  >>> h, slope = stochastic_times_smooth(np.zeros(2), np.array([0.7, 0.8]))
  >>> [round(float(v), 6) for v in h], [round(float(v), 6) for v in slope]
  ([0.707107, 0.0], [0.176777, 0.0])
  """
  h, slope = np.zeros(a.shape), np.zeros(a.shape)
  for i in np.ndindex(*a.shape):
    p = sigmoid(float(a[i]))
    if float(uniform[i]) < math.sqrt(p):
      h[i] = math.sqrt(p)
      slope[i] = math.sqrt(p) * (1 - p) / 2
  return h, slope


def noisy_rectifier(a, noise):
  """max(0, a + noise) and its derivative, 1 where it is positive.

  Bengio et al. 2013 (arXiv 1308.3432).

  >>> h, slope = noisy_rectifier(np.array([1.0, 1.0]), np.array([1.0, -2.0]))
  >>> h.tolist(), slope.tolist()
  ([2.0, 0.0], [1.0, 0.0])
  """
  h = each(lambda s, n: relu(s + n), a, noise)
  return h, each(lambda s, n: 1.0 if s + n > 0 else 0.0, a, noise)


def gated_blocks(blocks, gates):
  """Sum over blocks of gate times block; blocks is [tokens, blocks, dim].

  >>> gated_blocks(np.array([[[1.0], [2.0]]]), np.array([[0.0, 1.0]])).tolist()
  [[2.0]]
  """
  out = np.zeros((blocks.shape[0], blocks.shape[2]))
  for t, b, d in np.ndindex(*blocks.shape):
    if float(gates[t, b]):
      out[t, d] += float(gates[t, b]) * float(blocks[t, b, d])
  return out


def rate_penalty(probabilities, target, form="square"):
  """Sum over gates of how far the mean rate is from the target.

  "square": (rate - target)^2. "kl": KL(target || rate) of two coins. The
  paper's own penalty could not be read; both have their minimum, 0, at the
  target.

  >>> rate_penalty(np.array([[0.25, 0.5], [0.75, 0.0]]), 0.25)
  0.0625
  >>> rate_penalty(np.array([[0.5], [0.5]]), 0.5, "kl")
  0.0
  """
  total = 0.0
  for column in probabilities.T:
    rate = sum(float(p) for p in column) / len(column)
    if form == "square":
      total += (rate - target) ** 2
    else:
      total += target * math.log(target / rate)
      total += (1 - target) * math.log((1 - target) / (1 - rate))
  return total
