"""Reference definitions of selections, budgets, schedules and patterns.

Everything here is NumPy in float64 with plain loops over scalars. It is
written from the papers, to be read next to them and to be compared against.
"""

import math

import numpy as np


def _rank_key(value):
  """Sort key: larger first, +0.0 ties -0.0, NaN after everything else."""
  if value != value:
    return (1, 0.0)
  return (0, -value)


def _in_order(arrays):
  """All (key, array, flat index, value), best first, ties by position."""
  entries = []
  for a, array in enumerate(arrays):
    for i, value in enumerate(np.asarray(array).ravel().tolist()):
      entries.append((_rank_key(value), a, i, value))
  entries.sort(key=lambda entry: entry[:3])
  return entries


def top_k_mask(arrays, k):
  """Marks the k largest entries of a list of arrays taken together.

  Definition: descending value; ties to the earlier array, then to the lower
  row-major index; +0.0 and -0.0 tie; NaN ranks below -inf.

  >>> a = np.array([[1.0, 3.0], [3.0, 2.0]])
  >>> b = np.array([3.0, float("nan"), -math.inf])
  >>> [m.astype(int).tolist() for m in top_k_mask([a, b], 2)]
  [[[0, 1], [1, 0]], [0, 0, 0]]
  >>> [m.astype(int).tolist() for m in top_k_mask([a, b], 6)]
  [[[1, 1], [1, 1]], [1, 0, 1]]
  >>> top_k_mask([np.array([-0.0, 0.0])], 1)[0].tolist()
  [True, False]
  """
  entries = _in_order(arrays)
  if not 0 <= k <= len(entries):
    raise ValueError(f"k={k} is not in [0, {len(entries)}]")
  masks = [np.zeros(np.asarray(a).size, dtype=bool) for a in arrays]
  for _, a, i, _ in entries[:k]:
    masks[a][i] = True
  return [
    m.reshape(np.asarray(a).shape) for m, a in zip(masks, arrays, strict=True)
  ]


def kth_largest(arrays, k):
  """The value of the k-th entry in the order of `top_k_mask`; +inf for k=0.

  >>> kth_largest([np.array([5.0, 1.0]), np.array([4.0, 4.0])], 3)
  4.0
  >>> kth_largest([np.array([5.0])], 0)
  inf
  >>> kth_largest([np.array([float("nan"), -math.inf])], 1)
  -inf
  """
  if k == 0:
    return math.inf
  return _in_order(arrays)[k - 1][3]


def nm_mask(scores, n, m, axis):
  """Keeps n of every m consecutive entries along `axis`.

  Zhou et al. 2021 (arXiv 2102.04010), section 3; ties to the lowest index.

  >>> s = np.array([[1.0, 4.0, 2.0, 3.0, 7.0, 7.0, 7.0, 0.0]])
  >>> nm_mask(s, 2, 4, 1).astype(int).tolist()
  [[0, 1, 0, 1, 1, 1, 0, 0]]
  >>> nm_mask(np.array([[1.0, 5.0], [2.0, 4.0]]), 1, 2, 0).astype(int).tolist()
  [[0, 1], [1, 0]]
  """
  scores = np.asarray(scores)
  axis = axis % scores.ndim
  length = scores.shape[axis]
  if length % m or not 0 <= n <= m:
    raise ValueError(f"cannot keep {n} of {m} along {length}")
  mask = np.zeros(scores.shape, dtype=bool)
  rest = scores.shape[:axis] + scores.shape[axis + 1 :]
  for other in np.ndindex(*rest):
    for start in range(0, length, m):
      at = [other[:axis] + (start + j,) + other[axis:] for j in range(m)]
      order = sorted(range(m), key=lambda j: (_rank_key(scores[at[j]]), j))
      for j in order[:n]:
        mask[at[j]] = True
  return mask


def block_mask(scores, block, k):
  """Keeps the k blocks with the largest mean score, whole.

  Definition: a block's score is the mean of its entries (correctly rounded
  sum); ties to the lower block row, then block column.

  >>> s = np.array([[1.0, 1.0, 0.0, 9.0], [1.0, 1.0, 0.0, 0.0]])
  >>> block_mask(s, (2, 2), 1).astype(int).tolist()
  [[0, 0, 1, 1], [0, 0, 1, 1]]
  >>> block_mask(s, (1, 2), 3).astype(int).tolist()
  [[1, 1, 1, 1], [1, 1, 0, 0]]
  """
  scores = np.asarray(scores, dtype=np.float64)
  height, width = block
  rows, cols = scores.shape
  if rows % height or cols % width:
    raise ValueError(f"block {block} does not divide {scores.shape}")
  means = np.zeros((rows // height, cols // width))
  for i in range(rows // height):
    for j in range(cols // width):
      values = [
        float(scores[i * height + a, j * width + b])
        for a in range(height)
        for b in range(width)
      ]
      means[i, j] = math.fsum(values) / len(values)
  kept = top_k_mask([means], k)[0]
  mask = np.zeros(scores.shape, dtype=bool)
  for i in range(rows):
    for j in range(cols):
      mask[i, j] = kept[i // height, j // width]
  return mask


def channel_mask(scores, axis, k):
  """Keeps the k slices along `axis` with the largest mean score, whole.

  >>> s = np.array([[1.0, 5.0, 3.0], [1.0, 0.0, 3.0]])
  >>> channel_mask(s, 1, 1).astype(int).tolist()
  [[0, 0, 1], [0, 0, 1]]
  >>> channel_mask(s, 0, 1).astype(int).tolist()
  [[1, 1, 1], [0, 0, 0]]
  """
  scores = np.asarray(scores, dtype=np.float64)
  axis = axis % scores.ndim
  values = [[] for _ in range(scores.shape[axis])]
  for index in np.ndindex(*scores.shape):
    values[index[axis]].append(float(scores[index]))
  means = np.array([math.fsum(v) / len(v) for v in values])
  kept = top_k_mask([means], k)[0]
  mask = np.zeros(scores.shape, dtype=bool)
  for index in np.ndindex(*scores.shape):
    mask[index] = kept[index[axis]]
  return mask


def constant_fan_in_mask(scores, fan_in):
  """Keeps the `fan_in` largest scores of each output, scores [in, out].

  Lasby et al. 2023 (SRigL, arXiv 2305.02299), constant fan-in constraint.

  >>> s = np.array([[1.0, 9.0], [2.0, 9.0], [3.0, 9.0]])
  >>> constant_fan_in_mask(s, 2).astype(int).tolist()
  [[0, 1], [1, 1], [1, 0]]
  """
  scores = np.asarray(scores)
  mask = np.zeros(scores.shape, dtype=bool)
  for j in range(scores.shape[1]):
    mask[:, j] = top_k_mask([scores[:, j]], fan_in)[0]
  return mask


# Budgets: shapes (in the order of the model) and a density give densities.


def _size(shape):
  size = 1
  for dim in shape:
    size *= dim
  return size


def _scaled(shapes, raw, density, fixed=()):
  """Densities proportional to `raw`, capped at 1, meeting the total.

  Solves sum_l size_l * min(1, eps * raw_l) = density * sum_l size_l by
  capping the layer with the largest raw value while eps * raw exceeds one.
  `fixed` names layers that are dense from the start.
  """
  if not 0 <= density <= 1:
    raise ValueError(f"density {density} is not in [0, 1]")
  budget = density * sum(_size(s) for s in shapes.values())
  dense = set(fixed)
  while True:
    left = budget - sum(_size(shapes[name]) for name in dense)
    free = [name for name in shapes if name not in dense]
    if left < -1e-9 * budget:
      raise ValueError("the dense layers alone exceed the budget")
    if not free:
      return {name: 1.0 for name in shapes}
    eps = max(left, 0.0) / sum(_size(shapes[n]) * raw[n] for n in free)
    largest = max(raw[name] for name in free)
    if eps * largest <= 1:
      return {n: 1.0 if n in dense else eps * raw[n] for n in shapes}
    dense.update(name for name in free if raw[name] == largest)


def uniform(shapes, density):
  """The same density everywhere.

  >>> uniform({"a": (4, 5), "b": (2, 3)}, 0.25)
  {'a': 0.25, 'b': 0.25}
  """
  return {name: float(density) for name in shapes}


def uniform_plus(shapes, density):
  """First layer dense, last layer at least 20% dense, the others equal.

  Gale et al. 2019 (arXiv 1902.09574), as "uniform+" in Liu et al. 2022
  (arXiv 2202.02643): the first layer is dense and the last at most 80%
  sparse. Here the other layers are rescaled so that the total is met.

  Budget 80 of 400; 20 for the first and 0.2 * 100 for the last leave 40 of
  280:

  >>> shapes = {"a": (2, 10), "b": (14, 20), "c": (10, 10)}
  >>> [round(d, 6) for d in uniform_plus(shapes, 0.2).values()]
  [1.0, 0.142857, 0.2]

  Budget 210; 20 for the first leave 190 of 380, which is above 20%:

  >>> list(uniform_plus(shapes, 0.525).values())
  [1.0, 0.5, 0.5]
  """
  names = list(shapes)
  sizes = [_size(shapes[name]) for name in names]
  left = density * sum(sizes) - sizes[0]
  rest, last = sizes[1:], None
  if left < 0:
    raise ValueError("the dense first layer alone exceeds the budget")
  if not rest:
    return {names[0]: 1.0}
  value = left / sum(rest)
  if value < 0.2:
    last = 0.2
    left -= 0.2 * rest[-1]
    if left < 0 or len(rest) == 1:
      raise ValueError("20% of the last layer does not fit the budget")
    value = left / sum(rest[:-1])
  densities = {name: value for name in names}
  densities[names[0]] = 1.0
  if last is not None:
    densities[names[-1]] = last
  return densities


def er(shapes, density):
  """Erdos-Renyi: density proportional to (in + out) / (in * out).

  Mocanu et al. 2018 (SET); Evci et al. 2020 (RigL, arXiv 1911.11134),
  section 3, with a kernel [kh, kw, in, out] scored by in and out only.

  Raw values 20/100 and 40/400 give 20 eps + 40 eps = 0.12 * 500, eps = 1:

  >>> got = er({"a": (10, 10), "b": (20, 20)}, 0.12)
  >>> [round(d, 9) for d in got.values()]
  [0.2, 0.1]

  Kernel: raw 4/4 on 36 entries and 8/16 on 16 entries; 36 + 8 = 44 at eps=1:

  >>> got = er({"a": (3, 3, 2, 2), "b": (4, 4)}, 22 / 52)
  >>> [round(d, 9) for d in got.values()]
  [0.5, 0.25]
  """
  raw = {}
  for name, shape in shapes.items():
    raw[name] = (shape[-2] + shape[-1]) / (shape[-2] * shape[-1])
  return _scaled(shapes, raw, density)


def erk(shapes, density):
  """Erdos-Renyi-Kernel: density proportional to sum(dims) / prod(dims).

  Evci et al. 2020 (RigL), section 3, (in + out + w + h)/(in * out * w * h).
  A layer whose density would exceed one is dense, the rest is rescaled.

  Kernel sum 10 and matrix sum 8, so 10 eps + 8 eps = 9 at eps = 0.5:

  >>> got = erk({"a": (3, 3, 2, 2), "b": (4, 4)}, 9 / 52)
  >>> [round(d, 9) for d in got.values()]
  [0.138888889, 0.25]

  Capping: 4 + 40 = 44 units for 50 of 404; eps = 50/44 > 1 caps the first at
  1 (raw 4/4), then 40 eps = 46:

  >>> got = erk({"a": (2, 2), "b": (20, 20)}, 50 / 404)
  >>> [round(d, 9) for d in got.values()]
  [1.0, 0.115]
  """
  raw = {name: sum(s) / _size(s) for name, s in shapes.items()}
  return _scaled(shapes, raw, density)


def erk_plus(shapes, density):
  """ERK with the last layer dense and the same total.

  Liu et al. 2022 (arXiv 2202.02643), "ERK+".

  Budget 162 of 516; the last takes 112, which leaves `erk`'s 50 = 4 + 46:

  >>> got = erk_plus({"a": (2, 2), "b": (20, 20), "c": (4, 28)}, 162 / 516)
  >>> [round(d, 9) for d in got.values()]
  [1.0, 0.115, 1.0]
  """
  raw = {name: sum(s) / _size(s) for name, s in shapes.items()}
  return _scaled(shapes, raw, density, fixed=[list(shapes)[-1]])


def largest_remainder(quotas, total):
  """Integers near the quotas that sum to `total` (Hamilton's method).

  Floors, then one more to the largest fractional parts; ties to the earlier.

  >>> largest_remainder([1.5, 2.25, 0.25], 4)
  [2, 2, 0]
  >>> largest_remainder([0.5, 0.5, 1.0], 2)
  [1, 0, 1]
  """
  counts = [math.floor(q) for q in quotas]
  extra = total - sum(counts)
  if not 0 <= extra <= len(counts):
    raise ValueError(f"quotas {quotas} do not sum to {total}")
  order = sorted(range(len(counts)), key=lambda i: (counts[i] - quotas[i], i))
  for i in order[:extra]:
    counts[i] += 1
  return counts


# Schedules at one step.


def _progress(step, begin, end):
  """(step - begin) / (end - begin), held at 0 before and at 1 after."""
  if step <= begin:
    return 0.0
  if step >= end:
    return 1.0
  return (step - begin) / (end - begin)


def cubic(step, initial, final, begin, end):
  """Zhu & Gupta 2017 (arXiv 1710.01878), Eq. (1), end = t0 + n * dt.

  >>> [cubic(t, 0.0, 0.8, 10, 30) for t in (0, 10, 20, 30, 99)]
  [0.0, 0.0, 0.7000000000000001, 0.8, 0.8]
  """
  left = 1 - _progress(step, begin, end)
  return final + (initial - final) * left**3


def cosine(step, initial, end):
  """RigL's drop fraction f_decay, Evci et al. 2020 (arXiv 1911.11134).

  initial / 2 * (1 + cos(pi * step / end)), zero from `end` on.

  >>> [round(cosine(t, 0.3, 100), 12) for t in (0, 50, 100, 200)]
  [0.3, 0.15, 0.0, 0.0]
  """
  if step >= end:
    return 0.0
  return initial / 2 * (1 + math.cos(math.pi * step / end))


def inverse_power(step, initial, end, power):
  """Alternative drop fractions of Evci et al. 2020 (appendix on f_decay).

  initial * (1 - step / end)^power: 0 is constant, 1 linear.

  >>> [inverse_power(t, 0.5, 100, 1) for t in (0, 50, 100)]
  [0.5, 0.25, 0.0]
  >>> inverse_power(50, 0.5, 100, 3)
  0.0625
  """
  return initial * (1 - _progress(step, 0, end)) ** power


def linear(step, initial, final, begin, end):
  """Straight line from initial to final, held outside of [begin, end].

  >>> [linear(t, 0.0, 0.8, 10, 30) for t in (0, 20, 30, 99)]
  [0.0, 0.4, 0.8, 0.8]
  """
  return initial + (final - initial) * _progress(step, begin, end)


def exponential(step, initial, rate, begin=0):
  """initial * exp(-rate * (step - begin)), held before `begin`.

  Bambhaniya et al. 2024 (arXiv 2402.04744), MdGf-Exponential, initial = 1.

  >>> exponential(3, 1.0, 0.5, begin=1) == math.exp(-1)
  True
  """
  return initial * math.exp(-rate * max(step - begin, 0))


def stepwise(step, values, begin, end):
  """values[i] in the i-th of len(values) equal frames of [begin, end).

  Bambhaniya et al. 2024, SdGf: equal intervals, one pattern in each; a frame
  starts at begin + floor(i * (end - begin) / len(values)), the last goes on.

  >>> [stepwise(t, "abc", 10, 20) for t in (0, 12, 13, 15, 16, 50)]
  ['a', 'a', 'b', 'b', 'c', 'c']
  """
  now = values[0]
  for i, value in enumerate(values):
    if step >= begin + math.floor(i * (end - begin) / len(values)):
      now = value
  return now


# Static patterns.


def flat_block_butterfly_mask(blocks, max_stride, block=1):
  """Flat block butterfly mask of [blocks * block, blocks * block].

  Dao et al. 2021 (Pixelated Butterfly, arXiv 2112.00029), flat butterfly of
  maximum stride K: I + B_2 + B_4 + ... + B_K, where factor B_s joins i with
  i xor s/2. So block (i, j) is present when i == j or i ^ j is one of
  1, 2, ..., K/2. K=1 is block diagonal, K=blocks the whole butterfly.

  >>> flat_block_butterfly_mask(4, 4).astype(int).tolist()
  [[1, 1, 1, 0], [1, 1, 0, 1], [1, 0, 1, 1], [0, 1, 1, 1]]
  >>> flat_block_butterfly_mask(4, 2).astype(int).tolist()
  [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]
  >>> flat_block_butterfly_mask(2, 1, block=2).astype(int).tolist()
  [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]
  """
  distances = [0]
  stride = 2
  while stride <= max_stride:
    distances.append(stride // 2)
    stride *= 2
  size = blocks * block
  mask = np.zeros((size, size), dtype=bool)
  for i in range(size):
    for j in range(size):
      mask[i, j] = ((i // block) ^ (j // block)) in distances
  return mask


def stretch_mask(mask, shape):
  """A square pattern repeated entry by entry to a rectangle.

  Dao et al. 2021, butterfly for rectangular weights: entry (i, j) reads
  (i * n // rows, j * n // cols); the square side divides both sides.

  >>> stretch_mask(np.eye(2, dtype=bool), (2, 4)).astype(int).tolist()
  [[1, 1, 0, 0], [0, 0, 1, 1]]
  """
  n = mask.shape[0]
  rows, cols = shape
  if rows % n or cols % n:
    raise ValueError(f"side {n} does not divide {shape}")
  out = np.zeros(shape, dtype=bool)
  for i in range(rows):
    for j in range(cols):
      out[i, j] = mask[i * n // rows, j * n // cols]
  return out
