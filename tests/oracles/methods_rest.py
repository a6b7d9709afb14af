"""Reference definitions of the remaining methods of sparse weights.

Everything here is NumPy in float64 with plain loops over scalars. Weights,
gradients and masks are [inputs, outputs]; among equal scores the lower
row-major index is kept.
"""

import itertools
import math

import numpy as np

from tests.oracles import select
from tests.oracles import weights


def rounded(density, size):
  """density * size, rounded half up."""
  return math.floor(density * size + 0.5)


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


def _masked(w, mask):
  out = np.zeros(w.shape)
  for i in np.ndindex(*w.shape):
    if mask[i]:
      out[i] = float(w[i])
  return out


# RigL with its union of masks.


def rigl_run(mask, steps, regrow_dropped=True):
  """All masks of a RigL run; `steps` is a list of (weights, gradient, drop).

  Evci et al. 2020 (arXiv 1911.11134), Algorithm 1, one layer; the first mask
  is in the list.

  >>> w, g = np.array([[2.0, 1.0, 0.0]]), np.array([[0.0, 0.0, 5.0]])
  >>> run = rigl_run(np.array([[True, True, False]]), [(w, g, 1)])
  >>> [m.astype(int).tolist() for m in run]
  [[[1, 1, 0]], [[1, 0, 1]]]
  """
  masks = [mask]
  for w, grad, drop in steps:
    masks.append(weights.rigl_update(w, grad, masks[-1], drop, regrow_dropped))
  return masks


def ever_active(masks):
  """Union of one layer's masks over time.

  Liu et al. 2021 (arXiv 2102.02887): R_s is the share of it, over all layers
  (`weights.explored_share`); the authors' code starts with the first mask.

  >>> ever_active([np.array([1, 0, 0]), np.array([0, 0, 1])]).tolist()
  [True, False, True]
  """
  union = np.zeros(masks[0].shape, dtype=bool)
  for i in np.ndindex(*union.shape):
    union[i] = any(bool(m[i]) for m in masks)
  return union


# BDWP: two N:M masks of one weight.


def bdwp_masks(w, n, m):
  """The forward and the backward mask, n kept of every m.

  Fang et al. 2023 (arXiv 2309.13015), bidirectional weight pruning: groups
  run along the axis each product sums over, so along the inputs for
  Y = X W and along the outputs for dX = dY W'.

  >>> w = np.array([[4.0, 3.0], [1.0, 2.0]])
  >>> forward, backward = bdwp_masks(w, 1, 2)
  >>> forward.astype(int).tolist(), backward.astype(int).tolist()
  ([[1, 1], [0, 0]], [[1, 0], [0, 1]])
  """
  size = np.abs(w)
  return select.nm_mask(size, n, m, 0), select.nm_mask(size, n, m, 1)


def bdwp_forward(x, w, n, m):
  """X times the weights pruned along the inputs.

  >>> w = np.array([[4.0, 3.0], [1.0, 2.0]])
  >>> bdwp_forward(np.array([[1.0, 1.0]]), w, 1, 2).tolist()
  [[4.0, 3.0]]
  """
  return matmul(x, _masked(w, bdwp_masks(w, n, m)[0]))


def bdwp_gradients(x, w, dy, n, m):
  """dX = dY times the weights pruned along the outputs, dW = X' dY dense.

  dX = [4 * 1 + 0, 0 + 2 * 10]; every weight has a gradient.

  >>> w = np.array([[4.0, 3.0], [1.0, 2.0]])
  >>> x, dy = np.array([[1.0, 5.0]]), np.array([[1.0, 10.0]])
  >>> dx, dw = bdwp_gradients(x, w, dy, 1, 2)
  >>> dx.tolist(), dw.tolist()
  ([[4.0, 20.0]], [[1.0, 10.0], [5.0, 50.0]])
  """
  backward = _masked(w, bdwp_masks(w, n, m)[1])
  return matmul(dy, backward.T), matmul(x.T, dy)


# ISS-P.


def iss_p_mask(w, sparsity, rule="nearest"):
  """What ISS-P leaves as it is: the largest sizes of one layer.

  Wang et al. 2023 (arXiv 2303.09650): weights are ranked by size in each
  layer by itself. "nearest" keeps (1 - sparsity) * size, rounded half up.
  "authors": their code shrinks ceil(sparsity * size), at most
  int(0.995 * size), and leaves ties to an unstable sort.

  >>> w = np.array([[0.1, -4.0, 2.0, -0.5]])
  >>> iss_p_mask(w, 0.5).astype(int).tolist()
  [[0, 1, 1, 0]]
  >>> iss_p_mask(w, 0.6).astype(int).tolist()
  [[0, 1, 1, 0]]
  >>> iss_p_mask(w, 0.6, "authors").astype(int).tolist()
  [[0, 1, 0, 0]]
  """
  if rule == "nearest":
    keep = rounded(1 - sparsity, w.size)
  else:
    keep = w.size - min(math.ceil(sparsity * w.size), int(0.995 * w.size))
  return select.top_k_mask([np.abs(w)], keep)[0]


def iss_p_step(w, update, sparsity, factor, rule="nearest"):
  """One step of the pruning stage; returns the weights and what was left.

  Wang et al. 2023: after the optimizer's step the weights are ranked anew
  and the lowest are multiplied by `factor` (0.99 by default in the authors'
  code, 0.95 in its commands). The share pruned is constant from the first
  iteration. factor 0 is iterative hard thresholding, 1 dense training.

  1 + 1 = 2, 3 - 2.5 = 0.5: the second is now the smaller.

  >>> w, u = np.array([[1.0, 3.0]]), np.array([[1.0, -2.5]])
  >>> new, kept = iss_p_step(w, u, 0.5, 0.5)
  >>> new.tolist(), kept.tolist()
  ([[2.0, 0.25]], [[True, False]])
  """
  moved = np.zeros(w.shape)
  for i in np.ndindex(*w.shape):
    moved[i] = float(w[i]) + float(update[i])
  kept = iss_p_mask(moved, sparsity, rule)
  out = np.zeros(w.shape)
  for i in np.ndindex(*w.shape):
    if kept[i]:
      out[i] = moved[i]
    elif factor:
      out[i] = factor * moved[i]
  return out, kept


def iss_p_run(w, updates, sparsity, factor, until, rule="nearest"):
  """Weights and masks after each step, steps counted from 0.

  Wang et al. 2023: steps before `until` shrink. Step `until` ranks a last
  time, after its update, and what is not kept becomes 0; from there on the
  mask is fixed (fine-tuning). Updates are given, so they do not depend on
  the weights.

  >>> w, u = np.array([[1.0, 3.5]]), np.array([[1.0, -1.0]])
  >>> ws, masks = iss_p_run(w, [u, u, u, u], 0.5, 0.5, 2)
  >>> [v.tolist() for v in ws]
  [[[1.0, 2.5]], [[2.0, 0.75]], [[3.0, 0.0]], [[4.0, 0.0]]]
  >>> [m.astype(int).tolist() for m in masks]
  [[[0, 1]], [[1, 0]], [[1, 0]], [[1, 0]]]
  """
  history, masks = [], []
  for t, update in enumerate(updates):
    if t <= until:
      w, mask = iss_p_step(
        w, update, sparsity, factor if t < until else 0.0, rule
      )
    else:
      w = _masked(w + update, mask)
    history.append(w)
    masks.append(mask)
  return history, masks


# HyperSparse.

# tanh has its largest change of slope at atanh(1 / sqrt(3)) = 0.65848: the
# third derivative is zero there. The paper and the code print 0.6585.
HYPERSPARSE_CONSTANT = 0.6585


def hypersparse_s(arrays, sparsity):
  """s = 0.6585 / size of the weight at the pruning rate, over all arrays.

  Glandorf et al. 2023 (arXiv 2308.07163); authors' code: sizes in ascending
  order, position floor(sparsity * count) from 0.

  Sizes 1, 2, 3, 4; position 2 holds 3:

  >>> s = hypersparse_s([np.array([[4.0, -1.0]]), np.array([3.0, 2.0])], 0.5)
  >>> round(s * 3, 12)
  0.6585
  """
  sizes = sorted(abs(float(v)) for a in arrays for v in np.ravel(a))
  return HYPERSPARSE_CONSTANT / sizes[math.floor(sparsity * len(sizes))]


def hypersparse_penalty(arrays, sparsity, frozen=None):
  """The loss: sum |w| * (sum tanh(s |w|) / A) - sum |w|, its value is 0.

  Glandorf et al. 2023 (arXiv 2308.07163), with A = sum tanh(s |w|) and s
  taken as constants when it is differentiated (the code detaches both).
  They come from `frozen`, by default the arrays themselves; then the value
  is always 0 and only the gradient says anything.

  tanh(0.6585) = 0.57736, tanh(1.317) = 0.86604; one weight of 2 with A and
  s of the weight 1: 2 * (0.86604 / 0.57736) - 2.

  >>> hypersparse_penalty([np.array([3.0, -1.0])], 0.5)
  0.0
  >>> one, two = [np.array([1.0])], [np.array([2.0])]
  >>> round(hypersparse_penalty(two, 0.0, one), 6)
  0.999964
  """
  frozen = arrays if frozen is None else frozen
  s = hypersparse_s(frozen, sparsity)
  normal = sum(
    math.tanh(s * abs(float(v))) for a in frozen for v in np.ravel(a)
  )
  sizes = [abs(float(v)) for a in arrays for v in np.ravel(a)]
  flow = sum(math.tanh(s * v) for v in sizes)
  return sum(v * (flow / normal) for v in sizes) - sum(sizes)


def hypersparse_gradient(arrays, sparsity):
  """Closed form: sign(w) * s / cosh(s w)^2 * sum |w| / sum tanh(s |w|).

  Glandorf et al. 2023, the gradient of the penalty; sign(0) = 0. All arrays
  share one s, one sum |w| and one sum of tanh.

  One weight 1: s = 0.6585 and tanh(s) = 0.57736, nearly 1 / sqrt(3), so
  (1 - 0.57736^2) * 0.6585 / 0.57736.

  >>> got = hypersparse_gradient([np.array([-1.0])], 0.0)
  >>> got[0].round(5).tolist()
  [-0.76033]
  """
  s = hypersparse_s(arrays, sparsity)
  sizes = [abs(float(v)) for a in arrays for v in np.ravel(a)]
  factor = sum(sizes) / sum(math.tanh(s * v) for v in sizes)
  grads = []
  for a in arrays:
    g = np.zeros(np.shape(a))
    for i in np.ndindex(*g.shape):
      v = float(a[i])
      slope = s / math.cosh(s * v) ** 2
      g[i] = (v > 0) * slope * factor - (v < 0) * slope * factor
    grads.append(g)
  return grads


def hypersparse_strength(epoch, initial=5e-4, rate=1.05, begin=60):
  """ART's weight of the penalty, lambda = initial * rate ** (epoch - begin).

  Glandorf et al. 2023; the defaults are those that the authors' README
  names (their parser's default of `initial` is 5e-6).

  >>> round(hypersparse_strength(61) / 5e-4, 12)
  1.05
  """
  return initial * rate ** (epoch - begin)


# Pixelfly.


def butterfly_partners(i, max_stride):
  """Block columns of block row i: i and i xor 1, 2, 4 ... max_stride / 2.

  Dao et al. 2022 (arXiv 2112.00029), flat block butterfly of maximum stride;
  the mask is `select.flat_block_butterfly_mask`.

  >>> butterfly_partners(5, 8)
  [1, 4, 5, 7]
  """
  partners, distance = {i}, 1
  while 2 * distance <= max_stride:
    partners.add(i ^ distance)
    distance *= 2
  return sorted(partners)


def pixelfly_blocks(rows, columns, max_stride=None):
  """Present blocks of a layer of rows x columns blocks, row-major.

  A layer that is not square has the square pattern of its shorter side
  stretched over the longer one (Dao et al. 2022; authors' code repeats the
  rows or columns of the pattern): block (i, j) is there when
  (i * side // rows, j * side // columns) is. The side is a power of two and
  divides both. max_stride None is the whole side.

  >>> pixelfly_blocks(2, 4, 1)
  [(0, 0), (0, 1), (1, 2), (1, 3)]
  >>> len(pixelfly_blocks(8, 8)), 8 * (3 + 1)
  (32, 32)
  """
  side = min(rows, columns)
  if side & (side - 1) or rows % side or columns % side:
    raise ValueError(f"{rows} x {columns} blocks")
  max_stride = side if max_stride is None else max_stride
  present = []
  for i in range(rows):
    for j in range(columns):
      if j * side // columns in butterfly_partners(
        i * side // rows, max_stride
      ):
        present.append((i, j))
  return present


def pixelfly_matrix(blocks, shape, gamma, u, v):
  """gamma * B + (1 - gamma) * U V', entry by entry, [inputs, outputs].

  Dao et al. 2022, section 3; gamma is learned. (The authors'
  code has a gate sigmoid(x . g) for each input row in its place, or 1/2.)
  `blocks` maps (block row, block column) to a square array; U is [inputs,
  rank], V is [outputs, rank].

  0.25 * 8 + 0.75 * 2 * 2 = 5 where the block is, 3 elsewhere:

  >>> two = np.array([[2.0], [2.0]])
  >>> blocks = {(0, 0): np.array([[8.0]])}
  >>> pixelfly_matrix(blocks, (2, 2), 0.25, two, two).tolist()
  [[5.0, 3.0], [3.0, 3.0]]
  """
  out = np.zeros(shape)
  for i in range(shape[0]):
    for j in range(shape[1]):
      low = sum(float(u[i, k]) * float(v[j, k]) for k in range(u.shape[1]))
      out[i, j] = (1 - gamma) * low
  for (row, column), block in blocks.items():
    size = block.shape[0]
    for a in range(size):
      for b in range(size):
        out[row * size + a, column * size + b] += gamma * float(block[a, b])
  return out


def butterfly_factor_mask(n, stride):
  """Support of the butterfly factor of a stride: i with i and i xor stride/2.

  Dao et al. 2022, butterfly factor matrix: blocks of `stride` rows, each of
  four diagonal matrices.

  >>> butterfly_factor_mask(4, 4).astype(int).tolist()
  [[1, 0, 1, 0], [0, 1, 0, 1], [1, 0, 1, 0], [0, 1, 0, 1]]
  """
  mask = np.zeros((n, n), dtype=bool)
  for i in range(n):
    for j in range(n):
      same = i // stride == j // stride
      mask[i, j] = same and i % (stride // 2) == j % (stride // 2)
  return mask


def residual_product(factors, scale):
  """(I + c B_1) (I + c B_2) ... of the factors in the order given.

  Dao et al. 2022, residual form: the factor of the largest stride stands
  first.

  >>> b = [np.array([[1.0]]), np.array([[2.0]])]
  >>> residual_product(b, 0.5).tolist()
  [[3.0]]
  """
  n = factors[0].shape[0]
  out = np.eye(n)
  for b in factors:
    out = matmul(out, np.eye(n) + scale * b)
  return out


def residual_first_order(factors, scale):
  """I + c (B_1 + B_2 + ...), whose support is the flat butterfly's.

  >>> b = [np.array([[1.0]]), np.array([[2.0]])]
  >>> residual_first_order(b, 0.5).tolist()
  [[2.5]]
  """
  out = np.eye(factors[0].shape[0])
  for b in factors:
    out = out + scale * b
  return out


def residual_error_bound(factors, scale):
  """Bound of the difference in the Frobenius norm, of order scale^2.

  All products of two or more factors: prod(1 + c |B_k|) - 1 - c sum |B_k|.

  >>> residual_error_bound([np.array([[1.0]]), np.array([[2.0]])], 0.5)
  0.5
  """
  norms = [scale * math.sqrt(float((b**2).sum())) for b in factors]
  return math.prod(1 + c for c in norms) - 1 - sum(norms)


# Sparse-IFT. Thangarasa et al. 2024 (arXiv 2303.11525), section 2.2, as the
# authors' code has it for convolutions of 3 x 3, here of 1 x 1. s is the
# sparsity; counts are multiply-adds of nonzero weights for one input row,
# without biases.


def ift_scale(sparsity):
  """1 / (1 - s), rounded to an integer as the authors' code does.

  >>> [ift_scale(s) for s in (0.0, 0.5, 0.75, 0.9, 0.99)]
  [1, 2, 4, 10, 100]
  """
  return round(1 / (1 - sparsity))


def dense_count(widths):
  """Multiply-adds of a chain of dense layers.

  >>> dense_count([3, 4, 5])
  32
  """
  return sum(a * b for a, b in itertools.pairwise(widths))


def wide_width(width, sparsity, rule="authors"):
  """Sparse Wide's width, width / sqrt(1 - s), so that k^2 (1 - s) = 1.

  "authors": int(width * sqrt(round(1 / (1 - s)))). "nearest" rounds
  width / sqrt(1 - s) half up.

  >>> wide_width(64, 0.75), wide_width(64, 0.5), wide_width(64, 0.5, "nearest")
  (128, 90, 91)
  """
  if rule == "authors":
    return int(width * math.sqrt(ift_scale(sparsity)))
  return math.floor(width / math.sqrt(1 - sparsity) + 0.5)


def wide_densities(widths, wide):
  """Density of each layer of a widened chain that keeps its multiply-adds.

  Inner layers, with both sides k times as wide, come to 1 / k^2 = 1 - s; the
  first and the last, of which one side is fixed, to 1 / k = sqrt(1 - s). In
  the authors' code a whole network is widened, so only its ends differ.

  >>> wide_densities([3, 8, 8, 5], [3, 16, 16, 5])
  [0.5, 0.25, 0.5]
  """
  densities = []
  for i in range(len(widths) - 1):
    dense = widths[i] * widths[i + 1]
    densities.append(dense / (wide[i] * wide[i + 1]))
  return densities


def wide_hidden_at_sparsity(hidden, sparsity):
  """Hidden width of a block of two layers with fixed ends, all at sparsity s.

  (inputs + outputs) * hidden multiply-adds stay the same when hidden grows
  by 1 / (1 - s): with ends fixed the square root of Sparse Wide goes away.
  This follows from the count, it is not in the paper.

  >>> wide_hidden_at_sparsity(6, 0.75)
  24
  """
  return math.floor(hidden / (1 - sparsity) + 0.5)


def nonzero_count(shapes, densities):
  """Weights kept, each layer's count rounded half up.

  >>> nonzero_count([(3, 3), (2, 5)], [0.5, 0.25])
  8
  """
  return sum(
    rounded(d, math.prod(shape))
    for shape, d in zip(shapes, densities, strict=True)
  )


def parallel_count(inputs, outputs, sparsity):
  """Branches of Sparse Parallel and their nonzero multiply-adds.

  1 / (1 - s) copies of the layer, each at sparsity s, added. The number of
  branches is an integer, so s is 1/2, 2/3, 3/4, ...

  >>> parallel_count(4, 6, 0.75)
  (4, 24)
  """
  branches = ift_scale(sparsity)
  return branches, branches * rounded(1 - sparsity, inputs * outputs)


def factorized_inner(inputs, outputs, sparsity):
  """Sparse Factorized's inner width, rounded up as in the authors' code.

  [inputs, d] and [d, outputs], both at sparsity s: d = inputs * outputs /
  ((1 - s) (inputs + outputs)). At s = 0 this is a low-rank layer, not the
  dense one.

  >>> factorized_inner(8, 8, 0.75), factorized_inner(8, 8, 0.0)
  (16, 4)
  >>> factorized_inner(3, 4, 0.5)
  4
  """
  return math.ceil(inputs * outputs / ((1 - sparsity) * (inputs + outputs)))


def factorized_count(inputs, outputs, sparsity):
  """Nonzero multiply-adds; above the dense ones by the rounding up of d.

  4 of 3.43: 0.5 * (12 + 16) = 14 against 12.

  >>> factorized_count(8, 8, 0.75), factorized_count(3, 4, 0.5)
  (64, 14)
  """
  d = factorized_inner(inputs, outputs, sparsity)
  return nonzero_count([(inputs, d), (d, outputs)], [1 - sparsity] * 2)


def doped_rank(inputs, outputs, sparsity):
  """Rank of Sparse Doped's dense low-rank part, rounded down.

  s * inputs * outputs / (inputs + outputs): what the sparse matrix of
  sparsity s leaves. At s = 0 the rank is 0 and the layer dense.

  >>> doped_rank(8, 8, 0.5), doped_rank(8, 8, 0.0), doped_rank(3, 4, 0.5)
  (2, 0, 0)
  """
  return math.floor(sparsity * inputs * outputs / (inputs + outputs))


def doped_count(inputs, outputs, sparsity):
  """Nonzero multiply-adds; below the dense ones by the rounding down.

  >>> doped_count(8, 8, 0.5), doped_count(3, 4, 0.5)
  (64, 6)
  """
  rank = doped_rank(inputs, outputs, sparsity)
  sparse = rounded(1 - sparsity, inputs * outputs)
  return sparse + rank * (inputs + outputs)


def ift_slack(inputs, outputs, sparsity, kind):
  """How far a count may lie from the dense one: (below, above).

  One unit of inner width or rank, and one half for each rounded matrix.

  >>> ift_slack(3, 4, 0.5, "factorized"), ift_slack(3, 4, 0.5, "doped")
  ((1.0, 4.5), (7.5, 0.5))
  """
  if kind == "factorized":
    return 1.0, (1 - sparsity) * (inputs + outputs) + 1.0
  if kind == "doped":
    return inputs + outputs + 0.5, 0.5
  if kind == "parallel":
    half = ift_scale(sparsity) / 2
    return half, half
  raise ValueError(f"unknown kind {kind}")


def parallel_forward(x, kernels, activation=None):
  """Sum of the branches, each through the activation where there is one.

  The paper's figure has a nonlinearity in the transformation; in the
  authors' code it is a batch norm in each branch, then the sum, then relu.
  Linear branches would be one matrix.

  >>> x = np.array([[1.0]])
  >>> w = [np.array([[2.0]]), np.array([[-3.0]])]
  >>> parallel_forward(x, w).tolist()
  [[-1.0]]
  >>> parallel_forward(x, w, lambda v: max(v, 0.0)).tolist()
  [[2.0]]
  """
  total = np.zeros((x.shape[0], kernels[0].shape[1]))
  for w in kernels:
    y = matmul(x, w)
    for i in np.ndindex(*y.shape):
      total[i] += activation(float(y[i])) if activation else float(y[i])
  return total


def factorized_forward(x, u, v, activation=None):
  """(x U) V, through the activation between them where there is one.

  The authors' code has both: linear by default, batch norm and relu in its
  configuration of Sparse Factorized.

  >>> one = np.array([[1.0]])
  >>> factorized_forward(one, -one, one).tolist()
  [[-1.0]]
  >>> factorized_forward(one, -one, one, lambda t: max(t, 0.0)).tolist()
  [[0.0]]
  """
  inner = matmul(x, u)
  if activation:
    for i in np.ndindex(*inner.shape):
      inner[i] = activation(float(inner[i]))
  return matmul(inner, v)


def doped_forward(x, w, u, v):
  """x W + (x U) V, W sparse, nothing in between (authors' code).

  >>> one = np.array([[1.0]])
  >>> doped_forward(one, 2 * one, 3 * one, 4 * one).tolist()
  [[14.0]]
  """
  return matmul(x, w) + matmul(matmul(x, u), v)


# Neurons that do nothing.


def chain(layers, masks, x, activation):
  """Outputs of a chain of masked dense layers; none after the last.

  >>> layers = [{"kernel": np.array([[3.0]]), "bias": np.array([1.0])}]
  >>> chain(layers, [np.array([[True]])], np.array([[2.0]]), abs).tolist()
  [[7.0]]
  """
  for depth, (layer, mask) in enumerate(zip(layers, masks, strict=True)):
    x = matmul(x, _masked(layer["kernel"], mask)) + layer["bias"]
    if depth + 1 < len(layers):
      y = np.zeros(x.shape)
      for i in np.ndindex(*x.shape):
        y[i] = activation(float(x[i]))
      x = y
  return x


def remove_dead_neurons(layers, masks, activation):
  """Smaller layers of the same function; also masks and kept indices.

  `layers` is a list of {"kernel": [n, m], "bias": [m]}, the activation
  between them. A hidden neuron with no active input is the constant
  activation(bias); times its outgoing weights it goes into the next biases.
  A hidden neuron with no active output is read by nobody. Both are taken
  out, one at a time, until no such neuron is left. Inputs and outputs of the
  chain stay. A neuron is active by its mask, whatever the weights are.

  Neuron 1 has no inputs: relu(5) * 2 = 10 for the next bias.

  >>> layers = [
  ...   {"kernel": np.array([[1.0, 7.0]]), "bias": np.array([0.0, 5.0])},
  ...   {"kernel": np.array([[1.0], [2.0]]), "bias": np.array([0.5])},
  ... ]
  >>> masks = [np.array([[True, False]]), np.array([[True], [True]])]
  >>> relu = lambda v: max(v, 0.0)
  >>> small, small_masks, kept = remove_dead_neurons(layers, masks, relu)
  >>> [x["kernel"].tolist() for x in small], small[1]["bias"].tolist(), kept
  ([[[1.0]], [[1.0]]], [10.5], [[0]])
  """
  layers = [{k: np.array(v, float) for k, v in x.items()} for x in layers]
  masks = [np.array(m, dtype=bool) for m in masks]
  kept = [list(range(m.shape[1])) for m in masks[:-1]]

  def find():
    for depth in range(len(layers) - 1):
      for j in range(masks[depth].shape[1]):
        inputs = any(masks[depth][i, j] for i in range(masks[depth].shape[0]))
        following = masks[depth + 1]
        outputs = any(following[j, k] for k in range(following.shape[1]))
        if not inputs or not outputs:
          return depth, j, inputs
    return None

  while (dead := find()) is not None:
    depth, j, has_inputs = dead
    after = layers[depth + 1]
    if not has_inputs:
      constant = activation(float(layers[depth]["bias"][j]))
      for k in range(after["kernel"].shape[1]):
        if masks[depth + 1][j, k]:
          after["bias"][k] += constant * float(after["kernel"][j, k])
    for name, axis in (("kernel", 1), ("bias", 0)):
      layers[depth][name] = np.delete(layers[depth][name], j, axis)
    masks[depth] = np.delete(masks[depth], j, 1)
    after["kernel"] = np.delete(after["kernel"], j, 0)
    masks[depth + 1] = np.delete(masks[depth + 1], j, 0)
    del kept[depth][j]
  return layers, masks, kept


# Lottery tickets and soups.


def imp_prune(w, mask, share, rule="nearest"):
  """One round of magnitude pruning of the survivors of one layer.

  Frankle and Carbin 2019 (arXiv 1803.03635): the lowest `share` of the
  trained sizes among what is left. "nearest" removes share * survivors,
  rounded half up. "authors": their code removes what is at or below the
  size at position round(share * survivors) from 0 (half to even), so one
  more than that, and ties with it.

  >>> w = np.array([[1.0, -2.0, 3.0, -4.0, 9.0]])
  >>> m = np.array([[1, 1, 1, 1, 0]], dtype=bool)
  >>> imp_prune(w, m, 0.25).astype(int).tolist()
  [[0, 1, 1, 1, 0]]
  >>> imp_prune(w, m, 0.25, "authors").astype(int).tolist()
  [[0, 0, 1, 1, 0]]
  """
  alive = [i for i in np.ndindex(*w.shape) if mask[i]]
  new = np.zeros(w.shape, dtype=bool)
  if rule == "authors":
    cutoff = sorted(abs(float(w[i])) for i in alive)[round(share * len(alive))]
    for i in alive:
      new[i] = abs(float(w[i])) > cutoff
    return new
  keep = len(alive) - rounded(share, len(alive))
  sizes = np.array([abs(float(w[i])) for i in alive])
  for i, yes in zip(alive, select.top_k_mask([sizes], keep)[0], strict=True):
    new[i] = yes
  return new


def imp_run(trained, share, rule="nearest"):
  """Masks after each round, from all ones; trained weights of each given.

  >>> w = np.array([[1.0, 2.0, 3.0, 4.0]])
  >>> [m.astype(int).tolist() for m in imp_run([w, -w[:, ::-1]], 0.5)]
  [[[0, 0, 1, 1]], [[0, 0, 1, 0]]]
  """
  mask = np.ones(trained[0].shape, dtype=bool)
  masks = []
  for w in trained:
    mask = imp_prune(w, mask, share, rule)
    masks.append(mask)
  return masks


def imp_counts(size, share, rounds):
  """Survivors after each round; (1 - share)^n of the size but for rounding.

  >>> imp_counts(100, 0.2, 4)
  [80, 64, 51, 41]
  """
  counts = []
  for _ in range(rounds):
    size -= rounded(share, size)
    counts.append(size)
  return counts


def imp_count_slack(share, rounds):
  """How far the n-th count may lie from size * (1 - share)^n.

  Each round adds at most one half, which later rounds shrink.

  >>> imp_count_slack(0.5, 3)
  0.875
  """
  return sum(0.5 * (1 - share) ** k for k in range(rounds))


def rewind(saved, mask):
  """The weights of step j where the mask is, zeros elsewhere.

  Frankle and Carbin 2019: j = 0; Frankle et al. 2020 (arXiv 1912.05671):
  small j > 0. With other random weights in `saved` it is the control.

  >>> rewind(np.array([[5.0, 6.0]]), np.array([[False, True]])).tolist()
  [[0.0, 6.0]]
  """
  return _masked(saved, mask)


def soup(copies):
  """Average of the weights of copies that share a mask.

  Zimmer et al. 2024 (arXiv 2306.16788): m copies retrained from the same
  pruned model; a zero of all stays a zero.

  >>> soup([np.array([1.0, 0.0]), np.array([4.0, 0.0])]).tolist()
  [2.5, 0.0]
  """
  out = np.zeros(copies[0].shape)
  for i in np.ndindex(*out.shape):
    out[i] = sum(float(c[i]) for c in copies) / len(copies)
  return out
