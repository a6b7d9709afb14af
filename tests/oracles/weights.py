"""Reference definitions of mask updates and weight updates, one layer each.

Everything here is NumPy in float64 with plain loops over scalars. Weights,
gradients and masks are [in, out]. Among equal scores the lower row-major
index is preferred, for being kept and for being grown.
"""

import itertools
import math

import numpy as np

from tests.oracles import select


def _positions(mask):
  return [i for i in np.ndindex(*mask.shape) if mask[i]]


def _best(scores, positions, k):
  """The k of `positions` with the largest scores, ties to the earlier."""
  values = np.array([float(scores[i]) for i in positions])
  if k > len(positions):
    raise ValueError(f"{k} wanted of {len(positions)}")
  chosen = select.top_k_mask([values], k)[0]
  return [p for p, yes in zip(positions, chosen, strict=True) if yes]


def _to_mask(positions, shape):
  mask = np.zeros(shape, dtype=bool)
  for i in positions:
    mask[i] = True
  return mask


def _count(density, size):
  """density * size, rounded half up. The papers leave the rounding open."""
  return math.floor(density * size + 0.5)


def _drop_and_grow(w, mask, drop, scores, regrow_dropped):
  """Drops the smallest |w|, grows the largest scores; returns a mask.

  With regrow_dropped, whatever is inactive after the drop may grow. Without,
  the weights just dropped come last: they return only when the positions
  that were inactive before do not suffice, so that the count is kept.
  """
  active = _positions(mask)
  kept = _best(np.abs(w), active, len(active) - drop)
  if regrow_dropped:
    free = _positions(~_to_mask(kept, mask.shape))
    grown = _best(scores, free, drop)
  else:
    free = _positions(~mask)
    grown = _best(scores, free, min(drop, len(free)))
    dropped = [i for i in active if i not in kept]
    grown += _best(scores, dropped, drop - len(grown))
  return _to_mask(kept + grown, mask.shape)


def rigl_update(w, grad, mask, drop, regrow_dropped=True):
  """RigL's mask update. Evci et al. 2020 (arXiv 1911.11134), Algorithm 1.

  Drops the `drop` active weights of smallest |w|, then activates the `drop`
  positions of largest |grad| that are not active after the drop. In the
  paper the grow candidates are the complement of "active without dropped",
  so a weight just dropped may return (regrow_dropped=True).

  Active |w|: 4, 1, 3; the 1 at (0, 1) goes. Its |grad| 9 is the largest
  outside of the kept two, otherwise (1, 1) with 5 follows.

  >>> w = np.array([[4.0, -1.0], [-3.0, 0.0], [0.0, 0.0]])
  >>> g = np.array([[9.0, -9.0], [9.0, -5.0], [2.0, 5.0]])
  >>> m = np.array([[1, 1], [1, 0], [0, 0]], dtype=bool)
  >>> rigl_update(w, g, m, 1).astype(int).tolist()
  [[1, 1], [1, 0], [0, 0]]
  >>> rigl_update(w, g, m, 1, regrow_dropped=False).astype(int).tolist()
  [[1, 0], [1, 1], [0, 0]]
  """
  return _drop_and_grow(w, mask, drop, np.abs(grad), regrow_dropped)


def set_update(w, mask, drop, random_scores, regrow_dropped=True):
  """SET's mask update with given random scores in the place of gradients.

  Mocanu et al. 2018 (Nature Communications 9:2383), Algorithm 1, with the
  smallest |w| dropped as in the RigL paper's account of SET. (SET itself
  drops a share of the smallest positive and a share of the largest negative
  weights, each sign apart: `set_signed_drop`.)

  >>> w = np.array([[4.0, -1.0], [-3.0, 0.0]])
  >>> m = np.array([[1, 1], [1, 0]], dtype=bool)
  >>> r = np.array([[0.9, 0.2], [0.8, 0.5]])
  >>> set_update(w, m, 1, r).astype(int).tolist()
  [[1, 0], [1, 1]]
  """
  return _drop_and_grow(w, mask, drop, random_scores, regrow_dropped)


def set_signed_drop(w, mask, share):
  """SET's own removal: what stays of the active weights, each sign apart.

  Mocanu et al. 2018, Algorithm 1: a share of the smallest positive weights
  and a share of the largest (closest to zero) negative ones are removed.
  floor(share * count) of each sign is this file's choice.

  >>> w = np.array([[4.0, 0.5], [-3.0, -2.0]])
  >>> set_signed_drop(w, np.ones((2, 2), bool), 0.5).astype(int).tolist()
  [[1, 0], [1, 0]]
  """
  active = _positions(mask)
  kept = [i for i in active if w[i] == 0]
  for sign in (1, -1):
    mine = [i for i in active if sign * w[i] > 0]
    kept += _best(np.abs(w), mine, len(mine) - math.floor(share * len(mine)))
  return _to_mask(kept, mask.shape)


def dst_ee_scores(grad, visits, step, c, epsilon):
  """DST-EE's acquisition. Huang et al. 2023 (arXiv 2211.16667).

  |grad| + c * ln(t) / (N + epsilon), t the training iteration (from 1), N
  how many mask rounds found the position active.

  >>> s = dst_ee_scores(np.array([[-2.0]]), np.array([[3]]), 1, 5.0, 1.0)
  >>> s.tolist()
  [[2.0]]
  """
  scores = np.zeros(grad.shape)
  for i in np.ndindex(*grad.shape):
    bonus = c * math.log(step) / (float(visits[i]) + epsilon)
    scores[i] = abs(float(grad[i])) + bonus
  return scores


def dst_ee_update(
  w, grad, mask, drop, visits, step, c, epsilon, regrow_dropped=True
):
  """DST-EE's mask update; returns the new mask and the new visits.

  Huang et al. 2023, Algorithm 1. Visits begin as the initial mask (each
  active position counted once) and the new mask is added after the update,
  so that visits counts the masks, first and last included, that hold i.
  c=0 is RigL.

  ln 3 = 1.0986: (1, 0) scores 0.5 + 1.0986 / 1, (1, 1) 1 + 1.0986 / 3.

  >>> w = np.array([[4.0, 1.0], [0.0, 0.0]])
  >>> g = np.array([[0.0, 0.0], [0.5, 1.0]])
  >>> m = np.array([[1, 1], [0, 0]], dtype=bool)
  >>> n = np.array([[3, 3], [0, 2]])
  >>> new, visits = dst_ee_update(w, g, m, 1, n, 3, 1.0, 1.0)
  >>> new.astype(int).tolist(), visits.tolist()
  ([[1, 0], [1, 0]], [[4, 3], [1, 2]])
  >>> dst_ee_update(w, g, m, 1, n, 3, 0.0, 1.0)[0].astype(int).tolist()
  [[1, 0], [0, 1]]
  """
  scores = dst_ee_scores(grad, visits, step, c, epsilon)
  new = _drop_and_grow(w, mask, drop, scores, regrow_dropped)
  return new, visits + new.astype(visits.dtype)


def srigl_update(
  w,
  grad,
  mask,
  drop,
  gamma,
  target_fan_in,
  regrow_dropped=True,
  integer_threshold=False,
):
  """SRigL's mask update; returns (mask, live outputs, new fan-in).

  Lasby et al. 2023 (arXiv 2305.02299), section 3, the steps of "SRigL".

  Budget 3 * 2 = 6. Kept are 5, 4, 3, 2; the largest gradients 9 and 8 are in
  output 0, so the salient counts are 4, 2, 0 and output 2 falls below
  0.5 * 2. Then k' = 6 // 2 = 3, one regrown in each:

  >>> w = np.array([[5.0, 3, 1], [4, 2, 0.5], [0, 0, 0], [0, 0, 0]])
  >>> g = np.array([[0, 0, 0.1], [0, 0, 0.1], [9, 1, 0], [8, 0, 0]])
  >>> m = w != 0
  >>> new, live, fan_in = srigl_update(w, g, m, 2, 0.5, 2)
  >>> new.astype(int).tolist(), live, fan_in
  ([[1, 1, 0], [1, 1, 0], [1, 1, 0], [0, 0, 0]], [0, 1], 3)

  Without ablation output 2 loses both and regrows both:

  >>> srigl_update(w, g, m, 2, 0.0, 2)[0].astype(int).tolist()
  [[1, 1, 1], [1, 1, 1], [0, 0, 0], [0, 0, 0]]
  >>> new, _, _ = srigl_update(w, g, m, 2, 0.0, 2, regrow_dropped=False)
  >>> new.astype(int).tolist()
  [[1, 1, 0], [1, 1, 0], [0, 0, 1], [0, 0, 1]]

  A column with more survivors than k' keeps its largest, the rest regrows
  elsewhere:

  >>> w = np.array([[5.0, 0], [4, 0], [3, 1]])
  >>> g = np.array([[0.0, 1], [0, 2], [0, 0]])
  >>> srigl_update(w, g, w != 0, 1, 0.0, 2)[0].astype(int).tolist()
  [[1, 1], [1, 1], [0, 0]]
  """
  inputs, outputs = w.shape
  budget = target_fan_in * outputs
  active = _positions(mask)
  keep = len(active) - drop
  size = np.abs(w)
  slope = np.abs(grad)

  # Salient: kept by magnitude, or among the `drop` largest gradients of what
  # is then inactive. Room: the paper takes gradients of pruned weights (just
  # dropped ones are pruned in the step itself, as in RigL: regrow_dropped);
  # the authors' code ranks the gradients of all positions and takes the
  # union with the kept ones, which may count fewer.
  kept = _best(size, active, keep)
  free = _positions(~_to_mask(kept, mask.shape) if regrow_dropped else ~mask)
  salient = kept + _best(slope, free, min(drop, len(free)))
  counts = [sum(1 for i in salient if i[1] == j) for j in range(outputs)]

  # Ablation: fewer than gamma * k salient, k being the fan-in before any
  # ablation. Room: the authors' code compares with max(1, floor(gamma * k)),
  # here integer_threshold. Outputs ablated before may return if salient.
  threshold = gamma * target_fan_in - 1e-9
  if integer_threshold and gamma > 0:
    threshold = max(1, math.floor(gamma * target_fan_in + 1e-9))
  # Enough outputs stay to hold the budget (authors' code): the threshold is
  # lowered to the count of the output that is needed last; its ties stay.
  needed = min(budget // inputs, outputs - 1)
  threshold = min(threshold, sorted(counts, reverse=True)[needed])
  live = [j for j in range(outputs) if counts[j] >= threshold]

  # Room: what k' * live leaves of the budget is unused (authors' code).
  fan_in = min(budget // len(live), inputs)

  # Prune over the whole layer. Room: ablated weights count as pruned, so
  # `keep` is taken of the live outputs' active weights (authors' code).
  left = [i for i in active if i[1] in live]
  survivors = _best(size, left, min(keep, len(left)))
  chosen = []
  for j in live:
    mine = [i for i in survivors if i[1] == j]
    # Room: more survivors than k'; the paper is silent, the largest stay.
    mine = _best(size, mine, min(fan_in, len(mine)))
    column = [(i, j) for i in range(inputs)]
    first = [i for i in column if i not in mine]
    last = []
    if not regrow_dropped:
      last = [i for i in first if mask[i]]
      first = [i for i in first if not mask[i]]
    missing = fan_in - len(mine)
    grown = _best(slope, first, min(missing, len(first)))
    grown += _best(slope, last, missing - len(grown)) if last else []
    chosen += mine + grown
  return _to_mask(chosen, mask.shape), live, fan_in


def top_kast_masks(w, density, backward_density):
  """Top-KAST's forward set A and backward set B, one layer.

  Jayakumar et al. 2020 (arXiv 2106.03517), sparse forward and backward: A is
  the top D share of |w| in the layer, B the top D + M = backward_density.

  >>> w = np.array([[4.0, -3.0], [2.0, 1.0]])
  >>> a, b = top_kast_masks(w, 0.25, 0.75)
  >>> a.astype(int).tolist(), b.astype(int).tolist()
  ([[1, 0], [0, 0]], [[1, 1], [1, 0]])
  """
  size = np.abs(w)
  forward = select.top_k_mask([size], _count(density, w.size))[0]
  backward = select.top_k_mask([size], _count(backward_density, w.size))[0]
  return forward, backward


def top_kast_step(w, grad, density, backward_density, lr, decay, penalty="l2"):
  """One SGD step of Top-KAST; `grad` is taken at w masked to A.

  Jayakumar et al. 2020, its update and exploration regularization: the
  penalty has weight 1 on A, 1 / D on B without A, 0 elsewhere, and
  everything outside of B stays. The text names it L2, the formula prints
  |w|: penalty "l2" is decay / 2 * weight * w^2 with gradient
  decay * weight * w, penalty "l1" is decay * weight * |w|.

  A = {4}, B = {4, -3}, D = 1/4: 4 - 0.5 * (1 + 0.1 * 4) = 3.3 and
  -3 - 0.5 * (2 - 0.1 * 4 * 3) = -3.4.

  >>> w = np.array([[4.0, -3.0], [2.0, 1.0]])
  >>> g = np.array([[1.0, 2.0], [7.0, 7.0]])
  >>> top_kast_step(w, g, 0.25, 0.5, 0.5, 0.1).round(12).tolist()
  [[3.3, -3.4], [2.0, 1.0]]
  """
  forward, backward = top_kast_masks(w, density, backward_density)
  new = np.array(w, dtype=np.float64)
  for i in np.ndindex(*w.shape):
    if not backward[i]:
      continue
    weight = 1.0 if forward[i] else 1.0 / density
    value = float(w[i]) if penalty == "l2" else float(np.sign(w[i]))
    new[i] = float(w[i]) - lr * (float(grad[i]) + decay * weight * value)
  return new


def sr_ste_step(w, grad, n, m, axis, lr, decay):
  """One SGD step of SR-STE; `grad` is taken at the n:m pruned weights.

  Zhou et al. 2021 (arXiv 2102.04010), the update with the sparse-refined
  term: w - lr * (grad + decay * (1 - mask) * w). decay=0 is plain STE.

  2:4 keeps 4 and 3: 1 - 0.5 * (1 + 0.2 * 1) = 0.4, 2 - 0.5 * 1.4 = 1.3.

  >>> w = np.array([[1.0], [2.0], [3.0], [4.0]])
  >>> sr_ste_step(w, np.ones((4, 1)), 2, 4, 0, 0.5, 0.2).round(12).tolist()
  [[0.4], [1.3], [2.5], [3.5]]
  """
  mask = select.nm_mask(np.abs(w), n, m, axis)
  new = np.array(w, dtype=np.float64)
  for i in np.ndindex(*w.shape):
    refined = 0.0 if mask[i] else decay * float(w[i])
    new[i] = float(w[i]) - lr * (float(grad[i]) + refined)
  return new


def sad(masks):
  """Sparse Architecture Divergence along a run: flips between checkpoints.

  Zhou et al. 2021, SAD of two checkpoints is the L1 distance of their masks,
  a count; here summed over consecutive ones. Divide by the size for a rate.

  >>> sad([np.array([1, 0, 1]), np.array([0, 1, 1]), np.array([0, 1, 0])])
  3
  """
  flips = 0
  for before, after in itertools.pairwise(masks):
    for i in np.ndindex(*before.shape):
      flips += int(bool(before[i]) != bool(after[i]))
  return flips


def mask_decay_forward(w, mask, beta):
  """MdGf's weights: as they are where kept, times beta where pruned.

  Bambhaniya et al. 2024 (arXiv 2402.04744), mask decay gradient flow.

  >>> w = np.array([[4.0, 2.0]])
  >>> mask_decay_forward(w, np.array([[True, False]]), 0.25).tolist()
  [[4.0, 0.5]]
  """
  out = np.array(w, dtype=np.float64)
  for i in np.ndindex(*w.shape):
    if not mask[i]:
      out[i] = beta * float(w[i])
  return out


def mask_decay_gradient(grad, mask, beta, straight_through=False):
  """MdGf's gradient of the weights from that of the decayed weights.

  Bambhaniya et al. 2024: gradient flows to a pruned weight by its decayed
  mask, so beta * grad there, which is the derivative of the forward rule
  with the mask held constant. (The authors' code passes grad unchanged to
  every weight, also once beta is 0: straight_through.)

  >>> g = np.array([[3.0, 8.0]])
  >>> mask_decay_gradient(g, np.array([[True, False]]), 0.25).tolist()
  [[3.0, 2.0]]
  """
  out = np.array(grad, dtype=np.float64)
  for i in np.ndindex(*grad.shape):
    if not mask[i] and not straight_through:
      out[i] = beta * float(grad[i])
  return out


def mask_decay_beta(step, rate, kind, begin=0):
  """MdGf's beta: linear max(1 - rate * t, 0) or exponential exp(-rate * t).

  Bambhaniya et al. 2024, MdGf-Linear and MdGf-Exponential; t counts from
  `begin`, the end of dense training, before which beta is 1. In the final
  fine-tuning phase the mask is binary whatever beta is (caller's business).

  >>> [mask_decay_beta(t, 0.25, "linear", begin=2) for t in (0, 2, 3, 9)]
  [1.0, 1.0, 0.75, 0.0]
  >>> mask_decay_beta(4, 0.5, "exponential", begin=2) == math.exp(-1)
  True
  """
  t = max(step - begin, 0)
  if kind == "linear":
    return max(1.0 - rate * t, 0.0)
  if kind == "exponential":
    return math.exp(-rate * t)
  raise ValueError(f"unknown kind {kind}")


def structure_decay_patterns(n, m, kind, stages=4):
  """SdGf's sequence of (n, m) patterns after the dense phase.

  Bambhaniya et al. 2024. Stepwise: m-1:m, then m/2:m, m/4:m, ... to n:m.
  Geometric: n and m are both halved from stage to stage down to n:m, and
  the authors' code has 4 stages, from 8n:8m. Every pattern has the length of
  an equal interval. Where n is no m / 2^i (the paper's cases are), the last
  step here is n:m itself.

  >>> structure_decay_patterns(1, 8, "stepwise")
  [(7, 8), (4, 8), (2, 8), (1, 8)]
  >>> structure_decay_patterns(2, 4, "stepwise")
  [(3, 4), (2, 4)]
  >>> structure_decay_patterns(3, 8, "stepwise")
  [(7, 8), (4, 8), (3, 8)]
  >>> structure_decay_patterns(1, 8, "geometric")
  [(8, 64), (4, 32), (2, 16), (1, 8)]
  """
  if kind == "geometric":
    scales = [2**i for i in range(stages - 1, -1, -1)]
    return [(scale * n, scale * m) for scale in scales]
  if kind != "stepwise":
    raise ValueError(f"unknown kind {kind}")
  kept = [m - 1] if m - 1 > n else []
  now = m // 2
  while now > n:
    if now < m - 1:
      kept.append(now)
    now //= 2
  return [(k, m) for k in kept + [n]]


def gradual_magnitude_mask(w, sparsity):
  """Masks the smallest |w| of a layer to the given sparsity.

  Zhu & Gupta 2017 (arXiv 1710.01878), section 3; the sparsity comes from
  `select.cubic`. The number kept is (1 - sparsity) * size rounded half up.

  >>> w = np.array([[4.0, -1.0], [0.5, -3.0]])
  >>> gradual_magnitude_mask(w, 0.5).astype(int).tolist()
  [[1, 0], [0, 1]]
  """
  kept = _count(1 - sparsity, w.size)
  return select.top_k_mask([np.abs(w)], kept)[0]


def explored_share(masks):
  """ITOP's rate R_s: ever active over all positions, masks in time order.

  Liu et al. 2021 (arXiv 2102.02887), In-Time Over-Parameterization rate. An
  element is one array or the list of a model's arrays; the share is of all
  positions of all layers together, and the first mask counts.

  >>> explored_share([np.array([1, 0, 0, 0]), np.array([0, 1, 0, 0])])
  0.5
  >>> one = [np.array([1]), np.array([0, 0, 0])]
  >>> two = [np.array([1]), np.array([0, 1, 0])]
  >>> explored_share([one, two])
  0.5
  """
  times = [m if isinstance(m, list) else [m] for m in masks]
  ever = total = 0
  for layer in range(len(times[0])):
    for i in np.ndindex(*times[0][layer].shape):
      total += 1
      ever += int(any(bool(time[layer][i]) for time in times))
  return ever / total


# Training FLOPs a step and example; `dense` and `sparse` are forward FLOPs.


def dense_training_flops(dense):
  """Forward plus a backward of twice that. Evci et al. 2020, appendix.

  >>> dense_training_flops(10)
  30
  """
  return 3 * dense


def static_training_flops(sparse):
  """A fixed sparsity, also SET and SNIP. Evci et al. 2020, appendix.

  >>> static_training_flops(4)
  12
  """
  return 3 * sparse


def rigl_training_flops(dense, sparse, every):
  """RigL's average step. Evci et al. 2020, appendix on training FLOPs.

  (3 * sparse * every + 2 * sparse + dense) / (every + 1): the dense weight
  gradient, one sparse pass in size, is made once in every + 1 steps.

  3 * 2 * 4 = 24, plus 2 * 2 + 11 = 15, is 39; over 5:

  >>> rigl_training_flops(11, 2, 4)
  7.8
  """
  return (3 * sparse * every + 2 * sparse + dense) / (every + 1)


def gradual_training_flops(dense, sparsities):
  """Gradual pruning: the mean of 3 * dense * (1 - s_t) over all steps.

  Evci et al. 2020, appendix: E_t[3 * f_D * (1 - s_t)].

  >>> gradual_training_flops(10, [0.0, 0.5, 0.75, 0.75])
  15.0
  """
  flops = [3 * dense * (1 - s) for s in sparsities]
  return math.fsum(flops) / len(flops)
