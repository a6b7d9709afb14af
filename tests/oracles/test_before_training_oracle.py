"""The oracle of masks before training: differences, paths, authors' code.

data/before_training_authors.json has what the methods' authors' code gives
for networks drawn by `network` and data drawn by `data`.
"""

import functools
import itertools
import json
import math
import pathlib

from absl.testing import parameterized
import numpy as np

from tests.oracles import before_training as oracle

AUTHORS = json.loads(
  (
    pathlib.Path(__file__).parent / "data/before_training_authors.json"
  ).read_text()
)["results"]
exact = functools.partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-13)
# The authors' numbers are written with twelve digits.
printed = functools.partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-11)
# Central differences of step 1e-5: 1e-10 of truncation, 1e-11 of rounding.
near = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-8)


def network(seed, sizes, bias=True):
  rng = np.random.default_rng(seed)
  layers = []
  for n, m in itertools.pairwise(sizes):
    layer = {"kernel": rng.standard_normal((n, m))}
    if bias:
      layer["bias"] = rng.standard_normal(m)
    layers.append(layer)
  return layers


def data(seed, rows, inputs, classes, loss):
  rng = np.random.default_rng(seed)
  x = rng.standard_normal((rows, inputs))
  if loss == "cross_entropy":
    return x, rng.integers(0, classes, rows)
  return x, rng.standard_normal((rows, classes))


CASES = parameterized.product(
  sizes=((3, 2), (3, 4, 2), (2, 3, 1, 2)),
  activation=("tanh", "relu"),
  loss=("cross_entropy", "squared"),
  temperature=(1, 3.0),
)


class DerivativesTest(parameterized.TestCase):
  @CASES
  def test_gradients_are_differences(
    self, sizes, activation, loss, temperature
  ):
    layers = network(0, sizes)
    x, y = data(1, 3, sizes[0], sizes[-1], loss)
    how = {"activation": activation, "loss": loss, "temperature": temperature}
    got = oracle.gradients(layers, x, y, **how)
    for depth, layer in enumerate(layers):
      for name, w in layer.items():
        for i in np.ndindex(*w.shape):
          value, ends = w[i], []
          for sign in (1, -1):
            w[i] = value + sign * 1e-5
            ends.append(oracle.loss_value(layers, x, y, **how))
          w[i] = value
          near(got[depth][name][i], (ends[0] - ends[1]) / 2e-5)

  @CASES
  def test_hessian_products_are_differences(
    self, sizes, activation, loss, temperature
  ):
    layers, v = network(0, sizes), network(2, sizes)
    x, y = data(1, 3, sizes[0], sizes[-1], loss)
    how = {"activation": activation, "loss": loss, "temperature": temperature}
    got = oracle.hessian_vector(layers, v, x, y, **how)
    want = oracle.hessian_vector_differences(layers, v, x, y, **how)
    for a, b in zip(got, want, strict=True):
      for name in a:
        np.testing.assert_allclose(a[name], b[name], rtol=1e-7, atol=1e-7)

  def test_a_line_has_its_own_formula(self):
    """Least squares: gradient 2 X'(XW - Y) / n, Hessian 2 X'X / n."""
    layers, v = network(0, (3, 2), bias=False), network(1, (3, 2), bias=False)
    x, y = data(2, 5, 3, 2, "squared")
    w = layers[0]["kernel"]
    exact(
      oracle.gradients(layers, x, y)[0]["kernel"], 2 * x.T @ (x @ w - y) / 5
    )
    exact(
      oracle.hessian_vector(layers, v, x, y)[0]["kernel"],
      2 * x.T @ x @ v[0]["kernel"] / 5,
    )

  def test_cross_entropy_of_numbers_far_apart(self):
    layers = [{"kernel": np.array([[1000.0, 0.0]])}]
    one = np.array([[1.0]])
    got = oracle.loss_value(layers, one, np.array([1]), loss="cross_entropy")
    self.assertEqual(got, 1000.0)


class ScoresTest(parameterized.TestCase):
  def test_snip_is_the_derivative_by_the_mask(self):
    layers = network(3, (3, 4, 2))
    x, y = data(1, 3, 3, 2, "cross_entropy")
    how = {"activation": "tanh", "loss": "cross_entropy"}
    got = oracle.snip_scores(layers, x, y, **how)
    for depth, layer in enumerate(layers):
      w = layer["kernel"]
      for i in np.ndindex(*w.shape):
        value, ends = w[i], []
        for c in (1 + 1e-5, 1 - 1e-5):
          w[i] = c * value
          ends.append(oracle.loss_value(layers, x, y, **how))
        w[i] = value
        near(got[depth]["kernel"][i], abs(ends[0] - ends[1]) / 2e-5)

  def test_normalized_snip_sums_to_one_and_keeps_the_order(self):
    layers = network(3, (3, 4, 2))
    x, y = data(1, 3, 3, 2, "squared")
    plain = oracle.kernels(oracle.snip_scores(layers, x, y))
    shares = oracle.kernels(oracle.snip_scores(layers, x, y, normalize=True))
    exact(sum(s.sum() for s in shares), 1.0)
    for keep in (0, 1, 7, 20):
      for a, b in zip(
        oracle.global_masks(plain, keep),
        oracle.global_masks(shares, keep),
        strict=True,
      ):
        np.testing.assert_array_equal(a, b)

  @parameterized.parameters("tanh", "relu")
  def test_grasp_is_half_the_slope_of_the_gradient_norm(self, activation):
    """d/dc of |g|^2 / 2 with w * c at c = 1 is w * (H g)."""
    layers = network(3, (3, 4, 2))
    x, y = data(1, 3, 3, 2, "cross_entropy")
    how = {"activation": activation, "loss": "cross_entropy"}

    def norm(biases):
      grads = oracle.gradients(layers, x, y, **how)
      names = ("kernel", "bias") if biases else ("kernel",)
      return sum((g[n] ** 2).sum() for g in grads for n in names) / 2

    for biases in (False, True):
      got = oracle.grasp_scores(layers, x, y, biases=biases, **how)
      for depth, layer in enumerate(layers):
        w = layer["kernel"]
        for i in np.ndindex(*w.shape):
          value, ends = w[i], []
          for c in (1 + 1e-5, 1 - 1e-5):
            w[i] = c * value
            ends.append(norm(biases))
          w[i] = value
          near(got[depth]["kernel"][i], (ends[0] - ends[1]) / 2e-5)

  def test_removing_what_grasp_removes_keeps_the_gradient(self):
    """To first order a removal changes |g|^2 by -2 w (H g)."""
    rng = np.random.default_rng(0)
    a = rng.standard_normal((6, 3))
    layers = [{"kernel": 1e-4 * rng.standard_normal((3, 1))}]
    y = rng.standard_normal((6, 1))
    scores = oracle.grasp_scores(layers, a, y)[0]["kernel"]
    before = (oracle.gradients(layers, a, y)[0]["kernel"] ** 2).sum()
    for i in range(3):
      pruned = layers[0]["kernel"].copy()
      pruned[i] = 0
      after = oracle.gradients([{"kernel": pruned}], a, y)[0]["kernel"]
      # The rest is of second order, 1e-8 times the curvature squared.
      np.testing.assert_allclose(
        (after**2).sum() - before, -2 * scores[i, 0], rtol=0, atol=1e-6
      )


def paths(layers, masks=None):
  """Sum of products along all paths through each weight, by listing them."""
  weights = [np.abs(layer["kernel"]) for layer in layers]
  if masks is not None:
    weights = [w * m for w, m in zip(weights, masks, strict=True)]
  scores = [np.zeros(w.shape) for w in weights]
  widths = [w.shape[0] for w in weights] + [weights[-1].shape[1]]
  for start in range(len(widths)):
    # A path begins at an input, or at a bias with that bias's size.
    for units in itertools.product(*[range(n) for n in widths[start:]]):
      flow = 1.0
      if start:
        if "bias" not in layers[start - 1]:
          continue
        flow = abs(layers[start - 1]["bias"][units[0]])
      edges = list(itertools.pairwise(units))
      for depth, edge in enumerate(edges):
        flow *= weights[start + depth][edge]
      for depth, edge in enumerate(edges):
        scores[start + depth][edge] += flow
  return scores


class SynFlowTest(parameterized.TestCase):
  @parameterized.parameters(False, True)
  def test_scores_are_sums_over_paths(self, bias):
    layers = network(0, (2, 3, 2, 2), bias)
    rng = np.random.default_rng(1)
    masks = [rng.random(w.shape) < 0.7 for w in oracle.kernels(layers)]
    for m in (None, masks):
      got = oracle.kernels(oracle.synflow_scores(layers, m))
      for a, b in zip(got, paths(layers, m), strict=True):
        exact(a, b)

  def test_flow_is_conserved(self):
    """Each layer's scores sum to R; each hidden unit's in and out agree."""
    layers = network(0, (4, 5, 3, 2), bias=False)
    scores = oracle.kernels(oracle.synflow_scores(layers))
    sums = [s.sum() for s in scores]
    exact(sums, sums[0])
    for a, b in itertools.pairwise(scores):
      exact(a.sum(0), b.sum(1))

  @parameterized.parameters("nearest", "authors")
  def test_no_layer_dies_as_long_as_weights_suffice(self, rule):
    """20 weights of 3 layers down to 3: a path, one weight a layer."""
    layers = network(0, (3, 2, 2, 5), bias=False)
    history = oracle.synflow_masks(layers, 3 / 20, 100, rule=rule)
    for before, after in itertools.pairwise(history):
      for a, b in zip(before, after, strict=True):
        self.assertFalse((b & ~a).any())
    self.assertEqual([m.sum() for m in history[-1]], [1, 1, 1])
    for a, b in itertools.pairwise(history[-1]):
      np.testing.assert_array_equal(a.any(0), b.any(1))

  def test_what_is_pruned_stays_pruned_among_zeros(self):
    layers = [{"kernel": np.array([[1.0, 0.0]])}, {"kernel": np.zeros((2, 1))}]
    first, second = oracle.synflow_masks(layers, 0, 2, counts=[2, 1])
    self.assertEqual(
      [m.astype(int).tolist() for m in first], [[[1, 1]], [[0], [0]]]
    )
    self.assertEqual(
      [m.astype(int).tolist() for m in second], [[[1, 0]], [[0], [0]]]
    )

  def test_the_schedule_is_geometric_and_ends_at_the_density(self):
    got = oracle.synflow_densities(0.001, 100)
    exact(got[-1], 0.001)
    exact(np.divide(got[1:], got[:-1]), 0.001**0.01)
    self.assertEqual(oracle.synflow_keeps(1000, 0.001, 100)[-1], 1)


SHAPES = {"a": (3, 3, 2, 4), "b": (5, 7), "c": (2, 2), "d": (40, 3)}


class BudgetsTest(parameterized.TestCase):
  @parameterized.parameters(0.01, 0.1, 0.5, 0.9, 1.0)
  def test_totals_are_met(self, density):
    for rule in (oracle.balanced, oracle.pyramidal):
      got = rule(SHAPES, density)
      sizes = [math.prod(s) for s in SHAPES.values()]
      kept = sum(d * n for d, n in zip(got.values(), sizes, strict=True))
      exact(kept, density * sum(sizes))
      self.assertLessEqual(max(got.values()), 1.0)

  def test_balanced_layers_hold_as_many_unless_full(self):
    got = oracle.balanced(SHAPES, 0.5)
    kept = [got[k] * math.prod(s) for k, s in SHAPES.items()]
    self.assertEqual(kept[1:3], [35.0, 4.0])
    exact(kept[0], kept[3])

  def test_the_authors_balanced_misses_the_total(self):
    got = oracle.balanced(SHAPES, 0.5, redistribute=False)
    share = 0.5 * (72 + 35 + 4 + 120) / 4
    exact(
      list(got.values()),
      [share / 72, share / 35 if share < 35 else 1, 1, share / 120],
    )

  def test_pyramidal_is_the_root_of_its_polynomial(self):
    got = list(oracle.pyramidal(SHAPES, 0.2).values())
    roots = np.roots([120, 4, 35, 72, -0.2 * 231])
    root = [r.real for r in roots if abs(r.imag) < 1e-12 and 0 < r.real < 1]
    self.assertLen(root, 1)
    exact(got, [root[0] ** k for k in (1, 2, 3, 4)])


class RandomTest(parameterized.TestCase):
  def test_counts(self):
    rng = np.random.default_rng(0)
    numbers = rng.random((50, 40))
    self.assertEqual(oracle.random_mask(numbers, 333).sum(), 333)
    low, high = oracle.binomial_range(2000, 0.3)
    self.assertBetween(oracle.bernoulli_mask(numbers, 0.3).sum(), low, high)
    self.assertEqual(oracle.bernoulli_mask(numbers, 0.0).sum(), 0)
    self.assertEqual(oracle.bernoulli_mask(numbers, 1.0).sum(), 2000)

  def test_rescaled_weights_have_the_variance_of_their_fan_in(self):
    """Sum of squares of ones: every live output's is the number of inputs."""
    rng = np.random.default_rng(0)
    mask = rng.random((3, 3, 4, 6)) < 0.3
    mask[..., 2] = False
    got = oracle.rescale_fan_in(np.ones(mask.shape), mask)
    want = np.full(6, 36.0)
    want[2] = 0
    exact((got**2).sum((0, 1, 2)), want)
    self.assertFalse(got[~mask].any())
    exact(oracle.rescale_fan_in(got, np.ones(mask.shape, bool)), got)


def keep_at_or_below(scores, remove):
  """GraSP's code: of all scores (to be removed first) the rest and one."""
  values = sorted((v for s in scores for v in s.ravel()), reverse=True)
  return [s <= values[remove - 1] for s in scores]


class AuthorsTest(parameterized.TestCase):
  @parameterized.parameters("tanh", "relu")
  def test_snip_and_grasp_of_synaptic_flow(self, activation):
    layers = network(10, (3, 5, 4))
    x, y = data(11, 6, 3, 4, "cross_entropy")
    how = {"activation": activation, "loss": "cross_entropy"}
    got = oracle.snip_scores(layers, x, y, normalize=True, **how)
    want = AUTHORS[f"synflow_repo_snip_{activation}"]
    for a, b in zip(oracle.kernels(got), want, strict=True):
      printed(a, b)
    got = oracle.kernels(
      oracle.grasp_scores(layers, x, y, temperature=200, **how)
    )
    total = abs(sum(s.sum() for s in got)) + 1e-10
    want = AUTHORS[f"synflow_repo_grasp_{activation}"]
    for a, b in zip(got, want, strict=True):
      np.testing.assert_allclose(a / total, b, rtol=1e-8, atol=1e-10)

  @parameterized.parameters("tanh", "relu")
  def test_masks_of_grasp(self, activation):
    layers = network(14, (3, 5, 2))
    x, y = data(13, 40, 3, 2, "cross_entropy")
    want = AUTHORS[f"grasp_{activation}"]
    np.testing.assert_array_equal(y[want["rows"]], want["labels"])
    scores = oracle.grasp_scores(
      layers,
      x[want["rows"]],
      y[want["rows"]],
      activation=activation,
      loss="cross_entropy",
      temperature=200,
    )
    removed_first = [-s for s in oracle.kernels(scores)]
    for a, b in zip(
      keep_at_or_below(removed_first, 15), want["masks"], strict=True
    ):
      np.testing.assert_array_equal(a, np.array(b, dtype=bool))
    if activation == "tanh":  # With relu there are ties at zero.
      for a, b in zip(
        oracle.global_masks(oracle.kernels(scores), 11),
        want["masks"],
        strict=True,
      ):
        np.testing.assert_array_equal(a, np.array(b, dtype=bool))

  @parameterized.parameters(False, True)
  def test_synflow(self, bias):
    layers = network(12, (4, 6, 5, 3), bias)
    got = oracle.kernels(oracle.synflow_scores(layers))
    want = AUTHORS[f"synflow_scores_bias{bias}"]
    for a, b in zip(got, want, strict=True):
      printed(a, b)
    history = oracle.synflow_masks(layers, 0.2, 10, rule="authors")
    want = AUTHORS[f"synflow_masks_bias{bias}"]
    for masks, kept in zip(history, want["kept"], strict=True):
      self.assertEqual([m.sum() for m in masks], kept)
    for at, name in ((-1, "last"), (2, "third")):
      for a, b in zip(history[at], want[name], strict=True):
        np.testing.assert_array_equal(a, np.array(b, dtype=bool))

  def test_pyramidal(self):
    shapes = {"a": (20, 30), "b": (30, 10), "c": (10, 7)}
    for density, want in AUTHORS["pyramidal"].items():
      got = oracle.pyramidal(shapes, float(density))
      printed(list(got.values()), want)
