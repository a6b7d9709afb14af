"""Reference definitions of choosing a layer's weights after training.

Everything here is NumPy in float64 with plain loops. A kernel is w [K, N],
inputs by outputs, y = x @ w; the papers write [outputs, inputs]. A mask is
bool [K, N], True where a weight is kept. `second` is x.T @ x / rows.

Papers: SparseGPT, Frantar and Alistarh 2023 (arXiv 2301.00774); Wanda, Sun et
al. 2023 (2306.11695); DSnoT, Zhang et al. 2023 (2310.08915); OWL, Yin et al.
2023 (2310.05175).

What the papers leave open, or their code does otherwise, and is settled here:
- Of equal scores the lowest index keeps its place, so the highest is pruned
  first, in every function. (Wanda's and DSnoT's code prune the lowest first;
  of equal scores in a group of m theirs leaves it to the library.)
- n:m keeps n of every m. (Their code's n is the number pruned.)
- A density is met exactly: round(density * size) are kept, halves to even; for
  `sparsegpt`, round((1 - density) * size) of a block are pruned, or with blocks
  of weights round(density * their number) are kept. (Wanda's and
  DSnoT's code prune int(sparsity * K) of an output; SparseGPT's, and Wanda's
  for magnitude, int(sparsity * size) and everything up to the next score, which
  is one more without ties.)
- A dead input of `sparsegpt` has H_ii = 1 in units of `second`, so it counts in
  the mean of the damping; there the scale of `second` matters, and nowhere
  else. (Theirs is 2 * x.T @ x / sequences.)
- Where a dead input's weight is not chosen to be pruned, the mask is True and
  the weight 0 nonetheless.
- `dsnot`: see there. `owl`: see there.
"""

import dataclasses
import math

import numpy as np

from tests.oracles import select


def _float64(x):
  return np.asarray(x).astype(np.float64)


@dataclasses.dataclass
class Statistics:
  """What `statistics` returns, of the inputs of one layer."""

  count: int
  mean: np.ndarray  # [K]
  second: np.ndarray  # [K, K], the mean of x x^T
  variance: np.ndarray  # [K], of the population


def statistics(x):
  """The statistics of inputs x [rows, K].

  >>> s = statistics([[1.0, 0.0], [3.0, 2.0]])
  >>> s.count, s.mean.tolist(), s.variance.tolist()
  (2, [2.0, 1.0], [1.0, 1.0])
  >>> s.second.tolist()
  [[5.0, 3.0], [3.0, 2.0]]
  """
  x = _float64(x)
  rows, inputs = x.shape
  mean = np.zeros(inputs)
  second = np.zeros((inputs, inputs))
  variance = np.zeros(inputs)
  for i in range(inputs):
    mean[i] = math.fsum(x[:, i]) / rows
    for j in range(inputs):
      second[i, j] = math.fsum(x[:, i] * x[:, j]) / rows
  for i in range(inputs):
    variance[i] = second[i, i] - mean[i] ** 2
  return Statistics(rows, mean, second, variance)


def choose(scores, density, structure):
  """The mask of the highest scores [K, N].

  `structure` is "tensor", "output" (each output keeps as many), ("nm", n, m)
  (of each m consecutive inputs of an output the n best; without density) or
  ("blocks", bk, bn) (whole blocks, by the sum of their scores).

  >>> s = [[1.0, 5.0], [2.0, 6.0], [3.0, 7.0], [3.0, 8.0]]
  >>> choose(s, 0.5, "tensor").astype(int).tolist()
  [[0, 1], [0, 1], [0, 1], [0, 1]]
  >>> choose(s, 0.25, "output").astype(int).tolist()
  [[0, 0], [0, 0], [1, 0], [0, 1]]
  >>> choose(s, None, ("nm", 1, 2)).astype(int).tolist()
  [[0, 0], [1, 1], [1, 0], [0, 1]]
  >>> choose(s, 0.5, ("blocks", 2, 1)).astype(int).tolist()
  [[0, 1], [0, 1], [0, 1], [0, 1]]
  """
  scores = _float64(scores)
  inputs, outputs = scores.shape
  mask = np.zeros(scores.shape, bool)
  if structure == "tensor":
    return select.top_k_mask([scores], round(density * scores.size))[0]
  if structure == "output":
    for j in range(outputs):
      k = round(density * inputs)
      mask[:, j] = select.top_k_mask([scores[:, j]], k)[0]
    return mask
  kind, a, b = structure
  if kind == "nm":
    for start in _groups(inputs, b):
      for j in range(outputs):
        group = scores[start : start + b, j]
        mask[start : start + b, j] = select.top_k_mask([group], a)[0]
    return mask
  if kind != "blocks" or inputs % a or outputs % b:
    raise ValueError(f"{structure} of {scores.shape}")
  sums = np.zeros((inputs // a, outputs // b))
  for p, q in np.ndindex(*sums.shape):
    sums[p, q] = math.fsum(scores[p * a : p * a + a, q * b : q * b + b].flat)
  kept = select.top_k_mask([sums], round(density * sums.size))[0]
  for i, j in np.ndindex(*mask.shape):
    mask[i, j] = kept[i // a, j // b]
  return mask


def _groups(inputs, m):
  if inputs % m:
    raise ValueError(f"{inputs} inputs in groups of {m}")
  return range(0, inputs, m)


def magnitude_mask(w, density, structure):
  """`choose` of |w|.

  >>> magnitude_mask([[1.0, -3.0], [-2.0, 0.0]], 0.5, "tensor").tolist()
  [[False, True], [True, False]]
  """
  return choose(np.abs(_float64(w)), density, structure)


def wanda_scores(w, second):
  """|w_ij| times the root mean square of input i.

  >>> wanda_scores([[1.0, -3.0], [-2.0, 0.5]], [[16.0, 9.0], [9.0, 9.0]])
  array([[ 4. , 12. ],
         [ 6. ,  1.5]])
  """
  w, second = _float64(w), _float64(second)
  scores = np.zeros(w.shape)
  for i, j in np.ndindex(*w.shape):
    scores[i, j] = abs(w[i, j]) * math.sqrt(second[i, i])
  return scores


def wanda_mask(w, second, density, structure="output"):
  """`choose` of `wanda_scores`."""
  return choose(wanda_scores(w, second), density, structure)


def damped(second, damping):
  """(The Hessian to invert, bool [K] of dead inputs).

  >>> damped([[3.0, 1.0], [1.0, 5.0]], 0.5)[0].tolist()
  [[5.0, 1.0], [1.0, 7.0]]
  >>> h, dead = damped([[3.0, 0.0], [0.0, 0.0]], 0.5)
  >>> h.tolist(), dead.tolist()
  ([[4.0, 0.0], [0.0, 2.0]], [False, True])
  """
  hessian = _float64(second).copy()
  inputs = len(hessian)
  dead = np.zeros(inputs, bool)
  for i in range(inputs):
    if hessian[i, i] == 0:
      dead[i] = True
      hessian[i, i] = 1.0
  added = damping * math.fsum(hessian.diagonal()) / inputs
  for i in range(inputs):
    hessian[i, i] += added
  return hessian, dead


def sparsegpt(
  w, second, density=None, *, nm=None, blocks=None, block=128, damping=0.01
):
  """(The new weights, their mask), with `density` or with nm = (n, m).

  With a density and blocks = (bk, bn), of the [bk, bn] blocks of a strip of
  `block` inputs those of the largest sums of scores are kept, and
  round(density * their number) of them. They are chosen when the strip begins,
  as single weights are; so a strip must be whole groups of bk inputs.

  An error is put onto all later inputs at once. To put it onto those of the
  same block, and the errors of a block together onto the rest, as one does for
  speed, is the same sum: no choice reads a weight of a later block.

  With H = I nothing is moved, and the score is w^2:

  >>> w = np.array([[1.0, 4.0], [3.0, 2.0]])
  >>> sparsegpt(w, np.eye(2), 0.5, damping=0.0)[0].tolist()
  [[0.0, 4.0], [3.0, 0.0]]
  >>> sparsegpt(w, np.eye(2), 0.5, block=1, damping=0.0)[0].tolist()
  [[0.0, 4.0], [3.0, 0.0]]
  >>> sparsegpt(w, np.eye(2), nm=(1, 2), damping=0.0)[0].tolist()
  [[0.0, 4.0], [3.0, 0.0]]

  One of two inputs that are almost the same takes over the other's weight:

  >>> h = np.array([[1.0, 1.0], [1.0, 1.0 + 1e-9]])
  >>> new, mask = sparsegpt([[1.0], [2.0]], h, nm=(1, 2), damping=0.0)
  >>> new.round(6).tolist(), mask.tolist()
  ([[0.0], [3.0]], [[False], [True]])

  Sums of 5, 20, 9 and 9, then the same in strips of one input:

  >>> w = np.array([[1.0, 2.0, 4.0, 2.0], [3.0, 0.0, 0.0, 3.0]])
  >>> sparsegpt(w, np.eye(2), 0.5, blocks=(1, 2))[1].astype(int).tolist()
  [[0, 0, 1, 1], [1, 1, 0, 0]]
  >>> sparsegpt(w, np.eye(2), 0.5, blocks=(1, 2), block=1)[0].tolist()
  [[0.0, 0.0, 4.0, 2.0], [3.0, 0.0, 0.0, 0.0]]
  """
  w = _float64(w).copy()
  inputs, outputs = w.shape
  if (density is None) == (nm is None) or (blocks and nm):
    raise ValueError(f"density {density}, nm {nm}, blocks {blocks}")
  if blocks is not None:
    _groups(inputs, blocks[0])
    if min(block, inputs) % blocks[0] or outputs % blocks[1]:
      raise ValueError(f"{blocks} of strips of {block} inputs of {w.shape}")
  if nm is not None:
    _groups(inputs, nm[1])
    if min(block, inputs) % nm[1]:
      raise ValueError(f"blocks of {block} inputs, groups of {nm[1]}")
  hessian, dead = damped(second, damping)
  w[dead] = 0.0
  # inv(H) = L L^T with L lower; U = L^T.
  upper = np.linalg.cholesky(np.linalg.inv(hessian)).T
  mask = np.ones(w.shape, bool)
  for i in range(inputs):
    if nm is None and i % block == 0:
      end = min(i + block, inputs)
      scores = _saliency(w, upper, i, end)
      if blocks is not None:
        mask[i:end] = choose(scores, density, ("blocks", *blocks))
      else:
        pruned = round((1 - density) * scores.size)
        mask[i:end] = select.top_k_mask([scores], scores.size - pruned)[0]
    if nm is not None and i % nm[1] == 0:
      scores = _saliency(w, upper, i, i + nm[1])
      mask[i : i + nm[1]] = choose(scores, None, ("nm", *nm))
    for j in range(outputs):
      if not mask[i, j]:
        error = w[i, j] / upper[i, i]
        w[i + 1 :, j] -= error * upper[i, i + 1 :]
        w[i, j] = 0.0
  return w, mask


def _saliency(w, upper, start, end):
  """w^2 / U_ii^2 of the inputs start:end."""
  scores = np.zeros((end - start, w.shape[1]))
  for i, j in np.ndindex(*scores.shape):
    row = start + i
    scores[i, j] = w[row, j] ** 2 / upper[row, row] ** 2
  return scores


def column_by_column_obs(w, second, mask, *, damping=0.01):
  """The weights after pruning by `mask`, input by input in order.

  The optimal brain surgeon (Hassibi and Stork 1992), of each output alone: to
  make w_i zero, the inputs that are not yet passed move by
  -w_i / G_ii * G[:, i] with G the inverse of their own Hessian. A passed input
  stays as it is.

  >>> h = [[2.0, 1.0], [1.0, 2.0]]
  >>> m = [[False], [True]]
  >>> column_by_column_obs([[4.0], [1.0]], h, m, damping=0.0).tolist()
  [[0.0], [3.0]]
  """
  w = _float64(w).copy()
  mask = np.asarray(mask)
  hessian, dead = damped(second, damping)
  w[dead] = 0.0
  inputs, outputs = w.shape
  for i in range(inputs):
    inverse = np.linalg.inv(hessian[i:, i:])
    for j in range(outputs):
      if not mask[i, j]:
        w[i:, j] -= w[i, j] / inverse[0, 0] * inverse[:, 0]
        w[i, j] = 0.0
  return w


def reconstruction_error(w, new, second):
  """The mean over rows of |x @ (w - new)|^2.

  >>> reconstruction_error([[1.0], [2.0]], [[0.0], [4.0]], np.eye(2))
  5.0
  """
  difference = _float64(w) - _float64(new)
  total = 0.0
  for j in range(difference.shape[1]):
    total += difference[:, j] @ _float64(second) @ difference[:, j]
  return float(total)


@dataclasses.dataclass
class Swap:
  """One step of `dsnot_swaps`."""

  regrown: int
  pruned: int
  error: float  # afterwards


def expected_error(w, mask, mean):
  """[N]: of each output, the sum of w * mean over what is pruned.

  >>> expected_error([[2.0], [3.0]], [[True], [False]], [1.0, -1.0]).tolist()
  [-3.0]
  """
  w, mean, mask = _float64(w), _float64(mean), np.asarray(mask)
  errors = np.zeros(w.shape[1])
  for i, j in np.ndindex(*w.shape):
    if not mask[i, j]:
      errors[j] += w[i, j] * mean[i]
  return errors


def dsnot_swaps(
  w,
  mask,
  mean,
  variance,
  second,
  *,
  cycles=50,
  threshold=0.1,
  power=1,
  m=None,
  stop_at_flip=True,
  any_sign=False,
):
  """A list of `Swap` for each output.

  As in the authors' code for masks without groups, with its option to keep the
  sign: the expected error e of an output is the sum of w_i * mean_i over its
  pruned weights. A cycle regrows the pruned weight of the largest
  sign(e) * w_i * mean_i / variance_i ** power, and prunes, of the kept weights
  with sign(e) * w_i * mean_i < 0, the one of the lowest Wanda score; both make
  |e| smaller. It ends with |e| < threshold, or after `cycles` of them.

  What is settled here, partly otherwise than in their code:
  - The threshold is looked at before each cycle, and before the first.
  - Both choices read the sign of e before the cycle.
  - A cycle that would turn the sign of e is not done, and the output is
    finished; another pair is not looked for. One that makes e zero is done.
    So |e| never increases.
  - Where nothing can be regrown with sign(e) * w_i * mean_i > 0, or nothing can
    be pruned, the output is finished.
  - A weight is moved once: what was regrown is not pruned again, and the other
    way round. (With the sign of e constant it would not be anyway.)
  - An input that varies not at all (variance 0, or below it from rounding) is
    the first choice to regrow, unless power is 0.
  - Ties: the lowest index is regrown, the highest is pruned.
  - With groups of m inputs, both weights are of one group: the choice to regrow
    is among groups that have something to prune.

  The authors' code is followed with these: stop_at_flip=False goes on when the
  sign turns, and so |e| may increase (what their code does by default, but not
  in groups); any_sign=True prunes the lowest Wanda score whatever the sign of
  its w * mean (what it does in groups). Its e is rows per sequence times this
  one, and so is its threshold.

  e = 6 in the beginning; input 0 has more of it, input 1 varies less:

  >>> w = np.array([[4.0], [2.0], [1.0], [-1.0], [-2.0]])
  >>> kept = np.array([[False], [False], [True], [True], [True]])
  >>> ones = np.ones(5)
  >>> varying = np.array([4.0, 1.0, 1.0, 1.0, 1.0])
  >>> dsnot_swaps(w, kept, ones, varying, np.eye(5))
  [[Swap(regrown=1, pruned=3, error=3.0)]]
  >>> dsnot_swaps(w, kept, ones, varying, np.eye(5), power=0)
  [[Swap(regrown=0, pruned=3, error=1.0)]]
  """
  w, mean, variance = _float64(w), _float64(mean), _float64(variance)
  mask = np.asarray(mask)
  inputs, outputs = w.shape
  wanda = wanda_scores(w, second)
  errors = expected_error(w, mask, mean)
  m = inputs if m is None else m
  all_swaps = []
  for j in range(outputs):
    error = float(errors[j])
    swaps = []
    moved = set()
    for _ in range(cycles):
      if abs(error) < threshold:
        break
      sign = float(np.sign(error))
      prunable = {}  # of each group, the inputs that may be pruned
      for start in _groups(inputs, m):
        prunable[start // m] = [
          i
          for i in range(start, start + m)
          if mask[i, j]
          and i not in moved
          and (any_sign or sign * w[i, j] * mean[i] < 0)
        ]
      regrowable = [
        i
        for i in range(inputs)
        if not mask[i, j]
        and i not in moved
        and sign * w[i, j] * mean[i] > 0
        and prunable[i // m]
      ]
      if not regrowable:
        break
      regrown = regrowable[0]
      for i in regrowable:
        if _worth(w, mean, variance, power, i, j) > _worth(
          w, mean, variance, power, regrown, j
        ):
          regrown = i
      pruned = prunable[regrown // m][0]
      for i in prunable[regrown // m]:
        if wanda[i, j] <= wanda[pruned, j]:
          pruned = i
      after = (
        error - w[regrown, j] * mean[regrown] + w[pruned, j] * mean[pruned]
      )
      if stop_at_flip and sign * after < 0:
        break
      error = float(after)
      moved |= {regrown, pruned}
      swaps.append(Swap(regrown, pruned, error))
    all_swaps.append(swaps)
  return all_swaps


def _worth(w, mean, variance, power, i, j):
  """|w * mean| / variance ** power."""
  divisor = max(float(variance[i]), 0.0) ** power
  value = abs(float(w[i, j] * mean[i]))
  return value / divisor if divisor else math.inf


def dsnot(w, mask, mean, variance, second, **options):
  """The mask after all swaps; `options` are those of `dsnot_swaps`.

  The first swap takes e from 5 to 1. With one pruned weight there is none that
  keeps the sign.

  >>> w = np.array([[3.0], [2.0], [-1.0]])
  >>> ones = np.ones(3)
  >>> kept = np.array([[False], [False], [True]])
  >>> dsnot(w, kept, ones, ones, np.eye(3)).ravel().tolist()
  [True, False, False]
  >>> kept = np.array([[False], [True], [True]])
  >>> dsnot(w, kept, ones, ones, np.eye(3)).ravel().tolist()
  [False, True, True]
  """
  mask = np.asarray(mask).copy()
  swaps = dsnot_swaps(w, mask, mean, variance, second, **options)
  for j in range(mask.shape[1]):
    for swap in swaps[j]:
      mask[swap.regrown, j] = True
      mask[swap.pruned, j] = False
  return mask


def outlier_share(scores, outlier=5.0):
  """The share of scores above `outlier` times their mean.

  >>> outlier_share([[1.0, 1.0, 2.0], [0.0, 0.0, 8.0]], 4.0)
  0.0
  >>> outlier_share([[1.0, 1.0, 1.0], [0.0, 0.0, 9.0]], 4.0) * 6
  1.0
  """
  scores = _float64(scores)
  mean = math.fsum(scores.flat) / scores.size
  count = 0
  for score in scores.flat:
    if score > outlier * mean:
      count += 1
  return count / scores.size


def owl(scores, sparsity, *, lam=0.08, outlier=5.0):
  """The sparsity of each layer, from the Wanda scores of each.

  Before the shift they are in [sparsity - lam, sparsity + lam], and fall with
  the layer's share of outliers. The shift makes their mean, weighted by the
  sizes of layers, the sparsity; afterwards the interval is as wide but may lie
  elsewhere. They are not clipped, be it to the interval or to [0, 1].

  What is settled here:
  - The paper only asks that a sparsity is proportional to 1 - share, in the
    interval, with a given mean; the linear map is of the authors' code.
  - Their code's mean counts each layer alike (a layer is a transformer block
    with all its kernels' scores taken together), and it replaces a sparsity
    that is not above 0 by 0.01.
  - Where all shares are equal, so are the sparsities (theirs: NaN).

  >>> a = [1.0] * 15 + [9.0]
  >>> b = [1.0] * 16
  >>> owl([a, b], 0.5, lam=0.25, outlier=4.0)
  [0.25, 0.75]
  >>> owl([a, [1.0] * 48], 0.5, lam=0.25, outlier=4.0)
  [0.125, 0.625]
  >>> owl([b, b], 0.5)
  [0.5, 0.5]
  """
  shares = [outlier_share(s, outlier) for s in scores]
  sizes = [np.size(s) for s in scores]
  spread = max(shares) - min(shares)
  if spread == 0:
    return [float(sparsity)] * len(shares)
  sparsities = []
  for share in shares:
    sparsities.append(sparsity + lam - 2 * lam * (share - min(shares)) / spread)
  mean = math.fsum(a * b for a, b in zip(sizes, sparsities)) / sum(sizes)
  return [s + sparsity - mean for s in sparsities]
