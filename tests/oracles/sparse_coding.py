"""Sparse autoencoders in float64 NumPy, with loops over rows and latents.

x [n, d] are rows of activations, `dictionary` [m, d] and `encoder` [m, d] have
a latent a row, codes z [n, m] are dense, biases are [m] (encoder) and [d].

Settled for all of them:

- Equal scores: the lowest index wins, in a batch the lowest row first. To
  compare with float32, draw inputs from a grid or look that nothing is close.
- A chosen entry whose pre-activation is not above 0 has the value 0.
- The error of a row is a sum over d, a loss the mean over rows.
- What carries no gradient (a residual, a frozen decoder, a choice) is an
  argument of its own where it can be, so that `gradient` of a loss with
  respect to another argument leaves it alone.
- A threshold that no batch has set yet is None.
"""

import fractions
import math

import numpy as np


def gradient(f, x, step=1e-6):
  """Central differences of the scalar f at x, entry by entry.

  >>> gradient(lambda x: x[0] ** 2 + 3 * x[1], np.array([2.0, 5.0])).round(6)
  array([4., 3.])
  """
  x = np.array(x, np.float64)
  out = np.zeros_like(x)
  for i in np.ndindex(x.shape):
    up, down = x.copy(), x.copy()
    up[i] += step
    down[i] -= step
    out[i] = (f(up) - f(down)) / (2 * step)
  return out


# Sparsifiers: pre [n, m] -> z [n, m].


def relu(pre):
  """max(pre, 0)."""
  return np.maximum(np.asarray(pre, np.float64), 0.0)


def best(scores, k):
  """Indices of the k largest of a list, best first; ties to the lower index.

  >>> best([1.0, 3.0, 3.0, 2.0], 3), best([1.0], 5), best([1.0], 0)
  ([1, 2, 3], [0], [])
  """
  return sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:k]


def top_k(pre, k, scores=None):
  """Of each row the k best scores (pre itself), at most k values above 0.

  >>> top_k([[1.0, -2.0, 3.0, 3.0]], 2)
  array([[0., 0., 3., 3.]])
  >>> top_k([[-1.0, -2.0, 3.0]], 2)
  array([[0., 0., 3.]])
  """
  pre = np.asarray(pre, np.float64)
  scores = pre if scores is None else np.asarray(scores, np.float64)
  z = np.zeros_like(pre)
  for row in range(len(pre)):
    for j in best(scores[row].tolist(), k):
      z[row, j] = max(pre[row, j], 0.0)
  return z


def norms(dictionary):
  """The length of each atom, [m]."""
  return np.sqrt((np.asarray(dictionary, np.float64) ** 2).sum(axis=1))


def norm_scores(pre, dictionary):
  """Llama Scope: a latent counts with the length of its atom."""
  return relu(pre) * norms(dictionary)


def gradient_scores(pre, dictionary, downstream, beta):
  """g-SAE: z + beta * z * abs(<d_j, g>), g [n, d] the downstream gradient."""
  z = relu(pre)
  scores = np.zeros_like(z)
  for row, j in np.ndindex(z.shape):
    along = abs(float(dictionary[j] @ downstream[row]))
    scores[row, j] = z[row, j] + beta * z[row, j] * along
  return scores


def mutual_choice(pre, total):
  """Of all entries of max(pre, 0) the `total` largest.

  >>> mutual_choice([[1.0, 4.0], [4.0, -1.0]], 2)
  array([[0., 4.],
         [4., 0.]])
  >>> mutual_choice([[1.0, 4.0], [4.0, -1.0]], 1)
  array([[0., 4.],
         [0., 0.]])
  """
  z = relu(pre)
  kept = best(z.ravel().tolist(), total)
  out = np.zeros(z.size)
  out[kept] = z.ravel()[kept]
  return out.reshape(z.shape)


def batch_top_k(pre, k):
  """BatchTopK: the floor(k * n) largest of n rows; k may be a float.

  >>> batch_top_k([[1.0, 4.0], [3.0, 2.0]], 1.5)
  array([[0., 4.],
         [3., 2.]])
  """
  return mutual_choice(pre, math.floor(k * len(pre)))


def running_threshold(threshold, z, rate=0.01):
  """The mean of the smallest positive value kept; None is not yet set.

  >>> t = running_threshold(None, np.array([[0.0, 2.0], [4.0, 0.0]]))
  >>> t, running_threshold(t, np.array([[3.0]])), running_threshold(t, [[0]])
  (2.0, 2.01, 2.0)
  """
  positive = [float(v) for v in np.ravel(z) if v > 0]
  if not positive:
    return threshold
  if threshold is None:
    return min(positive)
  return (1 - rate) * threshold + rate * min(positive)


def at_threshold(pre, threshold):
  """What a trained BatchTopK gives: pre where it is above the threshold."""
  pre = np.asarray(pre, np.float64)
  return np.where(pre > threshold, pre, 0.0)


def feature_choice(pre, counts):
  """Of column j the counts[j] largest of max(pre, 0), ties to the lower row.

  >>> feature_choice([[1.0, 2.0], [3.0, 1.0], [3.0, 5.0]], [1, 2])
  array([[0., 2.],
         [3., 0.],
         [0., 5.]])
  """
  z = relu(pre)
  out = np.zeros_like(z)
  for j, count in enumerate(counts):
    for row in best(z[:, j].tolist(), int(count)):
      out[row, j] = z[row, j]
  return out


def zipf_shares(total, latents, *, exponent, offset, most):
  """Shares in proportion to (i + offset) ** -exponent, none above `most`.

  What a full latent cannot take goes to the others in proportion, again and
  again until nobody is above. Exact (fractions) for a whole exponent.

  >>> [str(x) for x in zipf_shares(11, 3, exponent=1, offset=0, most=99)]
  ['6', '3', '2']
  >>> [str(x) for x in zipf_shares(11, 3, exponent=1, offset=0, most=4)]
  ['4', '4', '3']
  """
  weights = []
  for i in range(1, latents + 1):
    base = fractions.Fraction(i) + fractions.Fraction(offset)
    if float(exponent).is_integer():
      weights.append(base ** -int(exponent))
    else:
      weights.append(fractions.Fraction(float(base) ** -exponent))
  left = fractions.Fraction(min(total, latents * most))
  full = set()
  while True:
    free = [i for i in range(latents) if i not in full]
    rest = left - len(full) * most
    mass = sum(weights[i] for i in free)
    shares = [
      fractions.Fraction(most) if i in full else rest * weights[i] / mass
      for i in range(latents)
    ]
    over = {i for i in free if shares[i] > most}
    if not over:
      return shares
    full |= over


def zipf_counts(total, latents, *, exponent, offset, most):
  """`zipf_shares` as integers of the same sum, by the largest remainder.

  >>> zipf_counts(10, 4, exponent=1, offset=0, most=99)
  [5, 2, 2, 1]
  >>> zipf_counts(7, 4, exponent=0, offset=0, most=99)
  [2, 2, 2, 1]
  >>> zipf_counts(99, 3, exponent=1, offset=0, most=4)
  [4, 4, 4]
  """
  shares = zipf_shares(
    total, latents, exponent=exponent, offset=offset, most=most
  )
  counts = [math.floor(share) for share in shares]
  missing = min(total, latents * most) - sum(counts)
  for i in best([s - c for s, c in zip(shares, counts)], missing):
    counts[i] += 1
  return counts


def group_max(pre, k):
  """Of each of k groups of neighbors the largest of max(pre, 0) (sparsify).

  >>> group_max([[1.0, 2.0, -1.0, -2.0, 3.0, 3.0]], 3)
  array([[0., 2., 0., 0., 3., 0.]])
  """
  z = relu(pre)
  size = z.shape[1] // k
  groups = z.reshape(-1, size)
  return top_k(groups, 1).reshape(z.shape)


def rectangle(u):
  """1 strictly inside (-1/2, 1/2), else 0."""
  return (np.abs(u) < 0.5).astype(np.float64)


def jump_relu(pre, theta):
  """pre where it is above its latent's theta, else 0 (theta itself: 0).

  >>> jump_relu([[1.0, 2.0, -3.0]], [1.0, 1.0, -4.0])
  array([[ 0.,  2., -3.]])
  """
  return at_threshold(pre, np.asarray(theta, np.float64))


def step(pre, theta):
  """1 where pre is above theta."""
  return (np.asarray(pre) > np.asarray(theta)).astype(np.float64)


def jump_relu_gradient(pre, theta, bandwidth, pull):
  """What `pull` [n, m] on z gives: (to pre [n, m], to theta [m])."""
  to_pre, to_theta = np.zeros(np.shape(pre)), np.zeros(np.shape(theta))
  for row, j in np.ndindex(np.shape(pre)):
    p, t, g = pre[row][j], theta[j], pull[row][j]
    to_pre[row, j] = g if p > t else 0.0
    to_theta[j] -= g * t / bandwidth * rectangle((p - t) / bandwidth)
  return to_pre, to_theta


def step_gradient(pre, theta, bandwidth, pull):
  """The same of `step`: pre gets nothing."""
  to_theta = np.zeros(np.shape(theta))
  for row, j in np.ndindex(np.shape(pre)):
    p, t, g = pre[row][j], theta[j], pull[row][j]
    to_theta[j] -= g / bandwidth * rectangle((p - t) / bandwidth)
  return np.zeros(np.shape(pre)), to_theta


def l0_loss(pre, theta):
  """Mean over rows of how many latents are above their theta."""
  return float(step(pre, theta).sum(axis=1).mean())


def gated(pre, gate_bias, log_scale, magnitude_bias):
  """Gated SAE; pre is the gate, with `gate_bias` in it.

  >>> one = np.ones(2)
  >>> gated([[2.0, -1.0]], 0.5 * one, np.log(2) * one, one)
  array([[4., 0.]])
  """
  pre = np.asarray(pre, np.float64)
  z = np.zeros_like(pre)
  for row, j in np.ndindex(pre.shape):
    bare = pre[row, j] - gate_bias[j]
    magnitude = math.exp(log_scale[j]) * bare + magnitude_bias[j]
    if pre[row, j] > 0:
      z[row, j] = max(magnitude, 0.0)
  return z


# Encoders.


def pre_activations(x, encoder, encoder_bias, center=None):
  """(x - center) encoder^T + encoder_bias; center is the decoder's bias."""
  x = np.asarray(x, np.float64)
  center = np.zeros(x.shape[1]) if center is None else center
  out = np.zeros((len(x), len(encoder)))
  for row, j in np.ndindex(out.shape):
    out[row, j] = (x[row] - center) @ encoder[j] + encoder_bias[j]
  return out


def matching_pursuit(x, dictionary, bias, k):
  """MP-SAE: (z [n, m], chosen [n, k], residual [n, d]), atoms of length 1.

  The largest correlation, not the largest magnitude; a coefficient may be
  negative (all correlations are) and an atom may come again.
  """
  z = np.zeros((len(x), len(dictionary)))
  residual = np.asarray(x, np.float64) - bias
  chosen = np.zeros((len(x), k), int)
  for row in range(len(x)):
    for t in range(k):
      scores = [float(atom @ residual[row]) for atom in dictionary]
      (j,) = best(scores, 1)
      chosen[row, t] = j
      z[row, j] += scores[j]
      residual[row] = residual[row] - scores[j] * dictionary[j]
  return z, chosen, residual


def ista(x, dictionary, weight, steps, step_size=None):
  """Nonnegative ISTA from 0 on 1/2 ||x - z W||^2 + weight * sum z."""
  dictionary = np.asarray(dictionary, np.float64)
  if step_size is None:
    step_size = 1 / np.linalg.eigvalsh(dictionary @ dictionary.T).max()
  z = np.zeros((len(x), len(dictionary)))
  for _ in range(steps):
    slope = (z @ dictionary - x) @ dictionary.T
    z = np.maximum(z - step_size * slope - step_size * weight, 0.0)
  return z


def decode(z, dictionary, bias):
  """z W + b, latent by latent."""
  out = np.zeros((len(z), np.shape(dictionary)[1])) + bias
  for row, j in np.ndindex(np.shape(z)):
    out[row] += z[row][j] * dictionary[j]
  return out


def forward(architecture, weights, x, **settings):
  """A whole autoencoder: {"pre", "z", "x_hat"}.

  `weights` has encoder [m, d], encoder_bias, dictionary [m, d_out] and bias
  [d_out]; for "jump_relu" also theta, for "gated" log_scale and
  magnitude_bias, for a skip transcoder skip [d_out, d]. `architecture` is
  "relu", "top_k" (k), "norm_top_k" (k), "batch_top_k" (k), "group_max" (k),
  "at_threshold" (threshold), "jump_relu", "gated", "matching_pursuit" (k) or
  "ista" (weight, steps); the last two have the dictionary as their encoder and
  no pre. `transcoder=True`: nothing is taken from x before the encoder.
  """
  transcoder = settings.pop("transcoder", False)
  dictionary, bias = weights["dictionary"], weights["bias"]
  center = None if transcoder else bias
  x = np.asarray(x, np.float64)
  pre = None
  if architecture == "matching_pursuit":
    z = matching_pursuit(x, dictionary, bias, **settings)[0]
  elif architecture == "ista":
    z = ista(x - bias, dictionary, **settings)
  else:
    encoder_bias = weights["encoder_bias"]
    pre = pre_activations(x, weights["encoder"], encoder_bias, center)
    if architecture == "jump_relu":
      z = jump_relu(pre, weights["theta"], **settings)
    elif architecture == "gated":
      z = gated(
        pre, encoder_bias, weights["log_scale"], weights["magnitude_bias"]
      )
    elif architecture == "norm_top_k":
      z = top_k(pre, scores=norm_scores(pre, dictionary), **settings)
    else:
      kinds = {
        "relu": relu,
        "top_k": top_k,
        "batch_top_k": batch_top_k,
        "group_max": group_max,
        "at_threshold": at_threshold,
      }
      z = kinds[architecture](pre, **settings)
  x_hat = decode(z, dictionary, bias)
  if "skip" in weights:
    x_hat = x_hat + x @ weights["skip"].T
  return {"pre": pre, "z": z, "x_hat": x_hat}


# Losses.


def squared_error(x, x_hat):
  """Mean over rows of the sum over d.

  >>> squared_error(np.zeros((2, 3)), np.ones((2, 3)))
  3.0
  """
  return float(((np.asarray(x) - x_hat) ** 2).sum(axis=1).mean())


def normalized_error(x, x_hat):
  """The share of the variance about the mean row that is left.

  A ratio of two sums over all rows, not a mean of ratios.
  """
  x = np.asarray(x, np.float64)
  error = ((x - x_hat) ** 2).sum()
  return float(error / ((x - x.mean(axis=0)) ** 2).sum())


def l1(z, dictionary):
  """Mean over rows of the sum of abs(z_j) times the length of atom j."""
  return float((np.abs(z) * norms(dictionary)).sum(axis=1).mean())


def gated_losses(x, pre, z, dictionary, bias, frozen_dictionary, frozen_bias):
  """(error, sparsity, auxiliary); the frozen ones are the same numbers."""
  via_gate = decode(relu(pre), frozen_dictionary, frozen_bias)
  return (
    squared_error(x, decode(z, dictionary, bias)),
    l1(relu(pre), dictionary),
    squared_error(x, via_gate),
  )


def dead(since_active, dead_after):
  """Which latents have not been active for `dead_after` rows, [m] bools."""
  return np.asarray(since_active) >= dead_after


def dead_auxiliary(error, pre, dictionary, is_dead, k_aux=None):
  """AuxK: the dead latents' share in the residual, without a bias.

  error [n, d] is x - x_hat and carries no gradient.
  """
  error = np.asarray(error, np.float64)
  pre = np.asarray(pre, np.float64)
  k_aux = error.shape[1] // 2 if k_aux is None else k_aux
  candidates = [j for j in range(pre.shape[1]) if is_dead[j]]
  if not candidates or not k_aux:
    return 0.0
  z = np.zeros_like(pre)
  for row in range(len(pre)):
    scores = [float(pre[row, j]) for j in candidates]
    for i in best(scores, k_aux):
      z[row, candidates[i]] = max(scores[i], 0.0)
  left = error - decode(z, dictionary, np.zeros(error.shape[1]))
  spread = error - error.mean(axis=0)
  scale = min(1.0, len(candidates) / k_aux)
  return float(scale * (left**2).sum() / (spread**2).sum())


def under_used(counts, expected):
  """Latents that fire less than a latent of their rank should, [m] bools.

  counts [m] are ranked from the most used (ties to the lower index) and
  compared with `expected` [m], which falls. Our reading of the paper's tail of
  under-used features; with expected = 1 everywhere these are the dead ones.

  >>> under_used([5, 0, 9, 2], [8, 4, 3, 1])
  array([False,  True, False,  True])
  """
  out = np.zeros(len(counts), bool)
  for rank, j in enumerate(best(list(counts), len(counts))):
    out[j] = counts[j] < expected[rank]
  return out


def zipf_auxiliary(error, pre, dictionary, counts, expected, k_aux=None):
  """`dead_auxiliary` of the latents that are under-used."""
  return dead_auxiliary(
    error, pre, dictionary, under_used(counts, expected), k_aux
  )


def nested_prefixes(x, z, dictionary, bias, sizes):
  """Matryoshka: the errors of the first m_i latents alone, summed."""
  return sum(
    squared_error(x, decode(z[:, :size], dictionary[:size], bias))
    for size in sizes
  )


def nested_budgets(x, pre, dictionary, bias, budgets, weights):
  """MSAE: the weighted errors of TopK at each budget, summed."""
  return sum(
    weight * squared_error(x, decode(top_k(pre, k), dictionary, bias))
    for k, weight in zip(budgets, weights, strict=True)
  )


def all_budgets(x, z, dictionary, bias, k):
  """HierarchicalTopK: the mean error of a row's j largest values, j = 1..k.

  z has at most k values above 0 a row; where it has fewer, the later budgets
  have the same reconstruction.
  """
  return sum(
    squared_error(x, decode(top_k(z, j), dictionary, bias))
    for j in range(1, k + 1)
  ) / float(k)


def orthogonality(dictionary, permutation, chunks):
  """OrtSAE: the mean square of an atom's largest cosine in its chunk.

  The atoms in the order of `permutation` are cut into `chunks` equal parts.
  The largest cosine, not the largest magnitude; it may be negative.

  >>> orthogonality(np.eye(4), [0, 2, 1, 3], 2)
  0.0
  >>> orthogonality(
  ...   [[1.0, 0.0], [5.0, 0.0], [0.0, 1.0], [0.0, 2.0]], range(4), 2
  ... )
  1.0
  """
  w = np.asarray(dictionary, np.float64)
  permutation = list(permutation)
  size, rest = divmod(len(w), chunks)
  if rest or size < 2:
    raise ValueError(f"{len(w)} atoms in {chunks} chunks")
  total = 0.0
  for start in range(0, len(w), size):
    chunk = permutation[start : start + size]
    for i in chunk:
      cosines = [
        w[i] @ w[j] / math.sqrt((w[i] @ w[i]) * (w[j] @ w[j]))
        for j in chunk
        if j != i
      ]
      total += max(cosines) ** 2
  return float(total / len(w))


def flops(z):
  """The sum over latents of the squared mean of abs(z) over rows.

  >>> flops([[2.0, 0.0], [0.0, 2.0]]), flops([[2.0, 0.0], [2.0, 0.0]])
  (2.0, 4.0)
  """
  return float((np.abs(np.asarray(z)).mean(axis=0) ** 2).sum())
