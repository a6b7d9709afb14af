"""Reference definitions of masks that are chosen before training.

Everything here is NumPy in float64 with plain loops over scalars. A network
is a list of dense layers {"kernel": [inputs, outputs], "bias": [outputs]},
the bias left out where a layer has none; the activation stands between the
layers, not after the last. Derivatives are written out by hand.
"""

import math

import numpy as np

from tests.oracles import select


def _act(name, z):
  """Value, slope and curvature of the activation at z (relu: 0 at 0)."""
  if name == "relu":
    return (z, 1.0, 0.0) if z > 0 else (0.0, 0.0, 0.0)
  if name == "tanh":
    t = math.tanh(z)
    return t, 1 - t * t, -2 * t * (1 - t * t)
  if name == "linear":
    return z, 1.0, 0.0
  raise ValueError(f"unknown activation {name}")


def _row_forward(layers, row, activation):
  """Inputs and pre-activations of every layer for one row."""
  inputs, sums = [[float(v) for v in row]], []
  for depth, layer in enumerate(layers):
    w = layer["kernel"]
    z = []
    for j in range(w.shape[1]):
      total = float(layer["bias"][j]) if "bias" in layer else 0.0
      for i in range(w.shape[0]):
        total += inputs[-1][i] * float(w[i, j])
      z.append(total)
    sums.append(z)
    if depth + 1 < len(layers):
      inputs.append([_act(activation, v)[0] for v in z])
  return inputs, sums


def outputs(layers, x, activation="tanh"):
  """The network's outputs, [rows, outputs of the last layer].

  2 * 3 + 1 = 7 and 2 * -1 = -2, which relu cuts; 7 * 0.5 + 0 = 3.5.

  >>> layers = [
  ...   {"kernel": np.array([[3.0, -1.0]]), "bias": np.array([1.0, 0.0])},
  ...   {"kernel": np.array([[0.5], [9.0]])},
  ... ]
  >>> outputs(layers, np.array([[2.0]]), "relu").tolist()
  [[3.5]]
  """
  return np.array([_row_forward(layers, r, activation)[1][-1] for r in x])


def _softmax(z):
  top = max(z)
  e = [math.exp(v - top) for v in z]
  return [v / sum(e) for v in e]


def _row_loss(z, target, loss, temperature):
  z = [v / temperature for v in z]
  if loss == "cross_entropy":
    top = max(z)
    return top + math.log(sum(math.exp(v - top) for v in z)) - z[int(target)]
  if loss == "squared":
    return sum((v - float(t)) ** 2 for v, t in zip(z, target, strict=True))
  raise ValueError(f"unknown loss {loss}")


def loss_value(layers, x, y, activation="tanh", loss="squared", temperature=1):
  """Mean over the rows of softmax cross-entropy or of the squared distance.

  "cross_entropy": y holds class numbers. "squared": y is like the outputs,
  and the squares are summed over a row, without a half. The outputs are
  divided by `temperature` first.

  >>> layers = [{"kernel": np.array([[1.0, 3.0]])}]
  >>> x = np.array([[1.0], [2.0]])
  >>> loss_value(layers, x, np.array([[0.0, 1.0], [2.0, 6.0]]))
  2.5
  >>> even = [{"kernel": np.zeros((1, 4))}]
  >>> got = loss_value(even, x, np.array([0, 3]), loss="cross_entropy")
  >>> round(got - math.log(4), 12)
  0.0
  """
  rows = outputs(layers, x, activation)
  total = 0.0
  for z, target in zip(rows, y, strict=True):
    total += _row_loss(z.tolist(), target, loss, temperature)
  return total / len(rows)


def _row_slope(z, target, loss, temperature, rows):
  """Derivative of one row's part of the loss by that row's outputs."""
  scaled = [v / temperature for v in z]
  if loss == "cross_entropy":
    p = _softmax(scaled)
    d = [p[k] - (1.0 if k == int(target) else 0.0) for k in range(len(p))]
  elif loss == "squared":
    d = [2 * (v - float(t)) for v, t in zip(scaled, target, strict=True)]
  else:
    raise ValueError(f"unknown loss {loss}")
  return [v / (temperature * rows) for v in d]


def _zeros(layers):
  return [{k: np.zeros(v.shape) for k, v in layer.items()} for layer in layers]


def gradients(layers, x, y, activation="tanh", loss="squared", temperature=1):
  """Gradient of `loss_value` by every kernel and bias, by hand.

  (1 * 3 - 1) = 2, its square has slope 4; by the bias 4, by the kernel 4 * 1.

  >>> layers = [{"kernel": np.array([[3.0]]), "bias": np.array([0.0])}]
  >>> got = gradients(layers, np.array([[1.0]]), np.array([[1.0]]))
  >>> got[0]["kernel"].tolist(), got[0]["bias"].tolist()
  ([[4.0]], [4.0])
  """
  total = _zeros(layers)
  for row, target in zip(x, y, strict=True):
    inputs, sums = _row_forward(layers, row, activation)
    slope = _row_slope(sums[-1], target, loss, temperature, len(x))
    for depth in reversed(range(len(layers))):
      w = layers[depth]["kernel"]
      back = [0.0] * w.shape[0]
      for j in range(w.shape[1]):
        if "bias" in layers[depth]:
          total[depth]["bias"][j] += slope[j]
        for i in range(w.shape[0]):
          total[depth]["kernel"][i, j] += slope[j] * inputs[depth][i]
          back[i] += slope[j] * float(w[i, j])
      if depth:
        slope = [
          back[i] * _act(activation, sums[depth - 1][i])[1]
          for i in range(len(back))
        ]
  return total


def hessian_vector(
  layers, v, x, y, activation="tanh", loss="squared", temperature=1
):
  """The Hessian of `loss_value` times v, v like `layers`, exactly.

  Every line of `gradients` is differentiated along v (Pearlmutter 1994,
  "Fast Exact Multiplication by the Hessian").

  Loss (w - 1)^2 at x = 1 has curvature 2:

  >>> layers = [{"kernel": np.array([[3.0]])}]
  >>> v = [{"kernel": np.array([[5.0]])}]
  >>> one = np.array([[1.0]])
  >>> hessian_vector(layers, v, one, one)[0]["kernel"].tolist()
  [[10.0]]
  """
  total = _zeros(layers)
  for row, target in zip(x, y, strict=True):
    inputs, sums = _row_forward(layers, row, activation)
    # Forward: d_ stands for the derivative along v.
    d_inputs, d_sums = [[0.0] * len(row)], []
    for depth, layer in enumerate(layers):
      w, dw = layer["kernel"], v[depth]["kernel"]
      dz = []
      for j in range(w.shape[1]):
        s = float(v[depth]["bias"][j]) if "bias" in layer else 0.0
        for i in range(w.shape[0]):
          s += d_inputs[-1][i] * float(w[i, j])
          s += inputs[depth][i] * float(dw[i, j])
        dz.append(s)
      d_sums.append(dz)
      d_inputs.append(
        [
          _act(activation, z)[1] * d
          for z, d in zip(sums[depth], dz, strict=True)
        ]
      )
    # The loss.
    slope = _row_slope(sums[-1], target, loss, temperature, len(x))
    scale = 1 / (temperature * temperature * len(x))
    dz = d_sums[-1]
    if loss == "cross_entropy":
      p = _softmax([z / temperature for z in sums[-1]])
      mean = sum(a * b for a, b in zip(p, dz, strict=True))
      d_slope = [p[k] * (dz[k] - mean) * scale for k in range(len(p))]
    else:
      d_slope = [2 * d * scale for d in dz]
    # Backward.
    for depth in reversed(range(len(layers))):
      w, dw = layers[depth]["kernel"], v[depth]["kernel"]
      back = [0.0] * w.shape[0]
      d_back = [0.0] * w.shape[0]
      for j in range(w.shape[1]):
        if "bias" in layers[depth]:
          total[depth]["bias"][j] += d_slope[j]
        for i in range(w.shape[0]):
          total[depth]["kernel"][i, j] += d_slope[j] * inputs[depth][i]
          total[depth]["kernel"][i, j] += slope[j] * d_inputs[depth][i]
          back[i] += slope[j] * float(w[i, j])
          d_back[i] += d_slope[j] * float(w[i, j]) + slope[j] * float(dw[i, j])
      if depth:
        z, dz = sums[depth - 1], d_sums[depth - 1]
        slope, d_slope = [], []
        for i in range(len(back)):
          _, first, second = _act(activation, z[i])
          slope.append(back[i] * first)
          d_slope.append(d_back[i] * first + back[i] * second * dz[i])
  return total


def hessian_vector_differences(layers, v, x, y, *, step=1e-5, **kwargs):
  """The same by central differences of `gradients`; exact to about step^2.

  >>> layers = [{"kernel": np.array([[3.0]])}]
  >>> v = [{"kernel": np.array([[5.0]])}]
  >>> one = np.array([[1.0]])
  >>> got = hessian_vector_differences(layers, v, one, one)
  >>> round(float(got[0]["kernel"][0, 0]), 6)
  10.0
  """
  ends = []
  for sign in (1, -1):
    moved = [
      {k: layer[k] + sign * step * v[d][k] for k in layer}
      for d, layer in enumerate(layers)
    ]
    ends.append(gradients(moved, x, y, **kwargs))
  return [
    {k: (ends[0][d][k] - ends[1][d][k]) / (2 * step) for k in layer}
    for d, layer in enumerate(layers)
  ]


def kernels(tree):
  """The kernels of a network (or of scores, masks like it), in order."""
  return [layer["kernel"] for layer in tree]


# Scores. The larger is kept first.


def snip_scores(layers, x, y, *, normalize=False, **kwargs):
  """SNIP's connection sensitivity, the size of weight times gradient.

  Lee et al. 2019 (arXiv 1810.02340), section 4: the derivative of the
  loss by a mask c at c = 1 is g * w; sizes are divided by their sum over all
  (`normalize`), which changes no order. Here of kernels and biases both; the
  sum is over the kernels.

  Sums 3 * 1 = 3, target 1, slope 4: 4 * 3 of the kernel, 4 * 0 of the bias.

  >>> layers = [{"kernel": np.array([[3.0]]), "bias": np.array([0.0])}]
  >>> got = snip_scores(layers, np.array([[1.0]]), np.array([[1.0]]))
  >>> got[0]["kernel"].tolist(), got[0]["bias"].tolist()
  ([[12.0]], [0.0])
  """
  grads = gradients(layers, x, y, **kwargs)
  scores = _zeros(layers)
  for depth, layer in enumerate(layers):
    for name, w in layer.items():
      for i in np.ndindex(*w.shape):
        g = float(grads[depth][name][i])
        scores[depth][name][i] = abs(g * float(w[i]))
  if normalize:
    total = sum(float(s.sum()) for s in kernels(scores))
    scores = [{k: v / total for k, v in s.items()} for s in scores]
  return scores


def grasp_scores(layers, x, y, *, biases=False, **kwargs):
  """GraSP's w * (H g), by which what is largest is kept.

  Wang et al. 2020 (arXiv 2002.07376), section 4: S(-w) = -w * (H g); the
  highest of these are removed (Algorithm 1), so the lowest of them, which
  are the largest of w * (H g), stay. In the authors' code H and g are those
  of the kernels alone and the logits are divided by T = 200 (`temperature`);
  with `biases`, the biases are parameters as well: their part of g enters.

  Loss (w - 1)^2 at w = 3: g = 4, H = 2, so 3 * 8.

  >>> layers = [{"kernel": np.array([[3.0]])}]
  >>> one = np.array([[1.0]])
  >>> grasp_scores(layers, one, one)[0]["kernel"].tolist()
  [[24.0]]
  """
  grads = gradients(layers, x, y, **kwargs)
  if not biases:
    for layer in grads:
      if "bias" in layer:
        layer["bias"][:] = 0.0
  product = hessian_vector(layers, grads, x, y, **kwargs)
  scores = _zeros(layers)
  for depth, layer in enumerate(layers):
    for name, w in layer.items():
      for i in np.ndindex(*w.shape):
        scores[depth][name][i] = float(w[i]) * float(product[depth][name][i])
  return scores


def synflow_scores(layers, masks=None, activation="relu"):
  """SynFlow's scores w * dR / dw of the network of absolute values.

  Tanaka et al. 2020 (arXiv 2006.05467), Algorithm 1: R is the
  sum of the outputs for an input of ones, every parameter replaced by its
  absolute value. In the authors' code this goes for biases too, which flow
  into R, are not scored for pruning (by default) and not masked; pruned
  weights stand as zeros, so their score is 0. `masks`: one array a layer.

  |2| * |3| = 6 is the only path through either weight:

  >>> layers = [{"kernel": np.array([[-2.0]])}, {"kernel": np.array([[3.0]])}]
  >>> [s["kernel"].tolist() for s in synflow_scores(layers)]
  [[[6.0]], [[6.0]]]
  >>> masks = [np.array([[True]]), np.array([[False]])]
  >>> [s["kernel"].tolist() for s in synflow_scores(layers, masks)]
  [[[0.0]], [[0.0]]]

  A bias of -5 adds 5 to what the second weight sees, 3 * (2 + 5):

  >>> layers[0]["bias"] = np.array([-5.0])
  >>> [s["kernel"].tolist() for s in synflow_scores(layers)]
  [[[6.0]], [[21.0]]]
  """
  net = []
  for depth, layer in enumerate(layers):
    positive = {name: np.abs(w) for name, w in layer.items()}
    if masks is not None:
      positive["kernel"] = np.where(masks[depth], positive["kernel"], 0.0)
    net.append(positive)
  ones = [1.0] * net[0]["kernel"].shape[0]
  inputs, sums = _row_forward(net, ones, activation)
  slope = [1.0] * len(sums[-1])
  scores = _zeros(net)
  for depth in reversed(range(len(net))):
    w = net[depth]["kernel"]
    back = [0.0] * w.shape[0]
    for j in range(w.shape[1]):
      if "bias" in net[depth]:
        scores[depth]["bias"][j] = slope[j] * float(net[depth]["bias"][j])
      for i in range(w.shape[0]):
        flow = slope[j] * float(w[i, j])
        scores[depth]["kernel"][i, j] = flow * inputs[depth][i]
        back[i] += flow
    if depth:
      slope = [
        back[i] * _act(activation, sums[depth - 1][i])[1]
        for i in range(len(back))
      ]
  return scores


# Masks.


def global_masks(scores, keep):
  """The `keep` largest of all arrays together, ties to the earlier position.

  >>> scores = [np.array([[1.0, 2.0]]), np.array([[2.0, 2.0]])]
  >>> [m.astype(int).tolist() for m in global_masks(scores, 2)]
  [[[0, 1]], [[1, 0]]]
  """
  return select.top_k_mask(scores, keep)


def rounded(density, size):
  """density * size, rounded half up."""
  return math.floor(density * size + 0.5)


def synflow_densities(density, rounds):
  """SynFlow's exponential schedule: density ** (k / rounds), k = 1, 2, ...

  Tanaka et al. 2020, Algorithm 1. (In the authors' code the variable named
  sparsity is the density.)

  >>> [round(d, 12) for d in synflow_densities(0.01, 4)]
  [0.316227766017, 0.1, 0.031622776602, 0.01]
  """
  return [density ** ((k + 1) / rounds) for k in range(rounds)]


def synflow_keeps(size, density, rounds, rule="nearest"):
  """How many weights stay after each round.

  "nearest" rounds density * size half up. "authors" removes
  floor((1 - density) * size), so at most one more stays.

  >>> synflow_keeps(10, 0.25, 2)
  [5, 3]
  >>> synflow_keeps(10, 0.27, 1), synflow_keeps(10, 0.21, 1, "authors")
  ([3], [3])
  """
  densities = synflow_densities(density, rounds)
  if rule == "nearest":
    return [rounded(d, size) for d in densities]
  return [size - math.floor((1 - d) * size) for d in densities]


def synflow_masks(
  layers, density, rounds, activation="relu", rule="nearest", counts=None
):
  """The kernels' masks after each round of SynFlow, all layers together.

  Tanaka et al. 2020, Algorithm 1: every round scores the network as pruned
  so far. What is pruned stays pruned, also where scores of active weights
  are 0 too (a path that is cut elsewhere). Room: the authors' code removes
  every score at or below the threshold, so ties go together and the count
  may be missed; here the count is exact and ties go to the earlier position.

  Flows 6 = 2 * 3 and 5 = 1 * 5 through two hidden units; with 2 of 4 kept,
  by one round or by two, the stronger path stays whole.

  >>> layers = [
  ...   {"kernel": np.array([[2.0, -1.0]])},
  ...   {"kernel": np.array([[-3.0], [5.0]])},
  ... ]
  >>> [m.astype(int).tolist() for m in synflow_masks(layers, 0.5, 1)[-1]]
  [[[1, 0]], [[1], [0]]]
  """
  shapes = [w.shape for w in kernels(layers)]
  masks = [np.ones(s, dtype=bool) for s in shapes]
  size = sum(m.size for m in masks)
  history = []
  for keep in counts or synflow_keeps(size, density, rounds, rule):
    scores = kernels(synflow_scores(layers, masks, activation))
    live = [np.where(m, s, -math.inf) for m, s in zip(masks, scores)]
    masks = global_masks(live, keep)
    history.append(masks)
  return history


# Layer budgets: shapes by name -> densities by name.


def balanced(shapes, density, redistribute=True):
  """Every layer keeps the same number of weights.

  Gadhikar et al. 2023 (arXiv 2210.02412), "balanced", from the authors'
  code: X = density * total / layers weights in each layer, a layer smaller
  than X being dense. The code leaves what such a layer cannot take unused,
  so the total is missed (redistribute=False). With redistribute the other
  layers share it, again equally, until nothing exceeds 1, and the total is
  met.

  Total 20 * 0.5 = 10 of two layers, 5 each, but the first holds 4:

  >>> shapes = {"a": (2, 2), "b": (4, 4)}
  >>> balanced(shapes, 0.5)
  {'a': 1.0, 'b': 0.375}
  >>> balanced(shapes, 0.5, redistribute=False)
  {'a': 1.0, 'b': 0.3125}
  >>> balanced(shapes, 0.3)
  {'a': 0.75, 'b': 0.1875}
  """
  sizes = {name: math.prod(shape) for name, shape in shapes.items()}
  budget = density * sum(sizes.values())
  full = []
  while True:
    free = [name for name in sizes if name not in full]
    if not free:
      return {name: 1.0 for name in sizes}
    left = budget - sum(sizes[name] for name in full)
    share = left / len(free)
    over = [name for name in free if share > sizes[name]]
    if not over or not redistribute:
      return {
        name: 1.0 if name in full else min(1.0, share / sizes[name])
        for name in sizes
      }
    full += over


def pyramidal(shapes, density):
  """Densities q, q^2, q^3, ... from the first layer to the last.

  Gadhikar et al. 2023 (arXiv 2210.02412), "pyramidal"; in the authors' code
  q is the root in (0, 1) of sum over l of size_l q^l = density * total,
  l = 1, 2, ... Here it is found by bisection; density 1 gives ones.

  4 q + 16 q^2 = 6 at q = 1/2:

  >>> shapes = {"a": (2, 2), "b": (4, 4)}
  >>> {name: round(d, 12) for name, d in pyramidal(shapes, 6 / 20).items()}
  {'a': 0.5, 'b': 0.25}
  """
  sizes = [math.prod(shape) for shape in shapes.values()]
  budget = density * sum(sizes)
  low, high = 0.0, 1.0
  for _ in range(200):
    q = (low + high) / 2
    if sum(size * q ** (i + 1) for i, size in enumerate(sizes)) < budget:
      low = q
    else:
      high = q
  return {name: high ** (i + 1) for i, name in enumerate(shapes)}


# Random masks, with the random numbers given.


def random_mask(numbers, count):
  """Exactly `count` active: those with the largest random numbers.

  >>> random_mask(np.array([[0.2, 0.9], [0.5, 0.1]]), 2).astype(int).tolist()
  [[0, 1], [1, 0]]
  """
  return select.top_k_mask([numbers], count)[0]


def bernoulli_mask(numbers, density):
  """Each active by itself with probability `density`; uniform numbers given.

  Gadhikar et al. 2023, section 2: Erdos-Renyi masks are independent
  Bernoulli draws. Active where the number is below the density, so that 0
  gives none and 1 all.

  >>> bernoulli_mask(np.array([0.2, 0.9, 0.5]), 0.5).astype(int).tolist()
  [1, 0, 0]
  """
  mask = np.zeros(np.shape(numbers), dtype=bool)
  for i in np.ndindex(*mask.shape):
    mask[i] = float(numbers[i]) < density
  return mask


def binomial_range(size, density, deviations=5.0):
  """Bounds of a Bernoulli mask's count: mean -+ standard deviations.

  >>> binomial_range(100, 0.5, 2)
  (40.0, 60.0)
  """
  width = deviations * math.sqrt(size * density * (1 - density))
  return size * density - width, size * density + width


def sparsities(masks):
  """Share of masked weights by name.

  >>> sparsities({"a": np.array([[1, 0], [0, 0]], bool), "b": np.ones(3, bool)})
  {'a': 0.75, 'b': 0.0}
  """
  shares = {}
  for name, mask in masks.items():
    masked = sum(1 for i in np.ndindex(*mask.shape) if not mask[i])
    shares[name] = masked / mask.size
  return shares


def rescale_fan_in(w, mask):
  """Weights scaled to the inputs that each output really has; [..., outputs].

  Evci et al. 2022 (arXiv 2010.03533), section 3: the variance of a dense
  initialization is inversely proportional to the fan-in, and each output
  has a fan-in of its own under a mask. A weight drawn for the dense fan-in
  is multiplied by sqrt(inputs / active inputs of its output); masked weights
  are 0.0. All axes but the last are inputs.

  Output 0 keeps 1 of 4: times 2; output 1 keeps 4 of 4; output 2 none.

  >>> w = np.ones((4, 3))
  >>> m = np.array([[1, 1, 0], [0, 1, 0], [0, 1, 0], [0, 1, 0]], dtype=bool)
  >>> rescale_fan_in(w, m).tolist()
  [[2.0, 1.0, 0.0], [0.0, 1.0, 0.0], [0.0, 1.0, 0.0], [0.0, 1.0, 0.0]]
  """
  out = np.zeros(w.shape)
  for j in range(w.shape[-1]):
    places = list(np.ndindex(*w.shape[:-1]))
    active = [p for p in places if mask[(*p, j)]]
    for p in active:
      scale = math.sqrt(len(places) / len(active))
      out[(*p, j)] = float(w[(*p, j)]) * scale
  return out
