"""The oracle of sparse activations: NumPy, brute force, differences.

data/activations_authors.json has what the authors' code gives for numbers
drawn by `normal`.
"""

import functools
import itertools
import json
import math
import pathlib
import statistics

from absl.testing import parameterized
import numpy as np

from tests.oracles import activations as oracle
from tests.oracles import routing

AUTHORS = json.loads(
  (pathlib.Path(__file__).parent / "data/activations_authors.json").read_text()
)["results"]
exact = functools.partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-13)
# The authors' numbers are written with twelve digits.
printed = functools.partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-11)
# Central differences of step 1e-5: truncation and rounding near 1e-9.
close = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-7)


def normal(seed, *shape):
  return np.random.default_rng(seed).standard_normal(shape)


def differences(function, array, step=1e-5):
  """Central differences; the array is changed in place and put back."""
  out = np.zeros(array.shape)
  for i in np.ndindex(*array.shape):
    middle = array[i]
    array[i] = middle + step
    above = function(array)
    array[i] = middle - step
    below = function(array)
    array[i] = middle
    out[i] = (above - below) / (2 * step)
  return out


class MeterTest(parameterized.TestCase):
  @parameterized.parameters(0.0, 0.3, 5.0)
  def test_against_numpy(self, threshold):
    a = normal(0, 7, 5) * (normal(1, 7, 5) > 0)
    fires = np.abs(a) > threshold
    exact(oracle.density(a, threshold), fires.mean())
    exact(oracle.token_density(a, threshold), fires.mean(1))
    exact(oracle.neuron_density(a, threshold), fires.mean(0))
    exact(oracle.joint_density(a, threshold), fires.any(0).mean())

  def test_nan_does_not_fire(self):
    self.assertEqual(oracle.density(np.array([math.nan, 1.0])), 0.5)


class FunctionTest(parameterized.TestCase):
  def test_quantile(self):
    for p in (1e-12, 0.01, 0.3, 0.5, 0.92, 1 - 1e-9):
      found = statistics.NormalDist().inv_cdf(p)
      np.testing.assert_allclose(
        oracle.normal_quantile(p), found, rtol=1e-9, atol=1e-12
      )
    self.assertEqual(oracle.normal_quantile(0.0), -math.inf)

  def test_activations(self):
    for z in (-40.0, -1.5, 0.0, 0.7, 40.0):
      for name in ("silu", "gelu"):
        found = routing.activate(z, name)
        other = oracle.gelu(z, True) if name == "gelu" else oracle.silu(z)
        options = [other, oracle.gelu(z)] if name == "gelu" else [other]
        self.assertLess(min(abs(found - o) for o in options), 1e-12)


class TopKTest(parameterized.TestCase):
  @parameterized.parameters(0, 1, 3, 6)
  def test_against_sorting(self, k):
    a = normal(1, 4, 6)
    out = oracle.top_k(a, k)
    for row, new in zip(a, out, strict=True):
      keep = np.argsort(-row, kind="stable")[:k]
      exact(new[keep], row[keep])
      self.assertEqual((new != 0).sum(), k)

  def test_gradient(self):
    a, g = normal(1, 3, 5), normal(2, 3, 5)
    for by in ("value", "magnitude"):
      numeric = differences(
        lambda a, by=by: (oracle.top_k(a, 2, by) * g).sum(), a
      )
      close(oracle.top_k_gradient(a, 2, g, by), numeric)

  def test_ffn(self):
    x, w_in, w_out = normal(0, 3, 4), normal(1, 4, 6), normal(2, 6, 2)
    b_in, b_out = normal(3, 6), normal(4, 2)
    hidden = np.maximum(x @ w_in + b_in, 0)
    dense = oracle.top_k_ffn(x, w_in, b_in, w_out, b_out, 6)
    exact(dense, hidden @ w_out + b_out)
    sparse = oracle.top_k_ffn(x, w_in, b_in, w_out, b_out, 2)
    exact(sparse, oracle.top_k(hidden, 2) @ w_out + b_out)
    # Gathering the columns and rows of the kept neurons.
    for t in range(3):
      keep = np.argsort(-hidden[t], kind="stable")[:2]
      row = np.maximum(x[t] @ w_in[:, keep] + b_in[keep], 0)
      exact(sparse[t], row @ w_out[keep] + b_out)


class StatisticalTopKTest(parameterized.TestCase):
  @parameterized.parameters(
    ("gemma_a", 1, (3, 20), 5), ("gemma_b", 2, (2, 7), 3.5)
  )
  def test_against_gemma(self, name, seed, shape, k):
    # Its quantile is a float32 number.
    near = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6)
    a, g = normal(seed, *shape), normal(seed + 10, *shape)
    near(oracle.statistical_top_k(a, k).ravel(), AUTHORS[name])
    near(
      oracle.statistical_top_k_gradient(a, k, g).ravel(),
      AUTHORS[f"{name}_gradient"],
    )

  @parameterized.parameters((1, 0), (4, 0), (4, 1), (7, 1))
  def test_gradient(self, k, ddof):
    a, g = normal(3, 2, 8), normal(4, 2, 8)
    numeric = differences(
      lambda a: (oracle.statistical_top_k(a, k, ddof) * g).sum(), a
    )
    close(oracle.statistical_top_k_gradient(a, k, g, ddof), numeric)

  @parameterized.parameters(80, 200, 500)
  def test_count_on_gaussian_inputs(self, k):
    a = 3 + 2 * normal(5, 20, 1000)
    count = (oracle.statistical_top_k(a, k) > 0).sum(1).mean()
    # The count's deviation is at most sqrt(k) a row, the mean has 20 rows.
    self.assertLess(abs(count - k), 3 * math.sqrt(k / 20))

  def test_thresholds(self):
    a = normal(6, 9)
    for ddof in (0, 1):
      found = oracle.statistical_threshold(a, 3, ddof)
      quantile = statistics.NormalDist().inv_cdf(1 - 3 / 9)
      np.testing.assert_allclose(
        found, a.mean() + a.std(ddof=ddof) * quantile, rtol=1e-9
      )

  def test_scale_and_shift(self):
    a = normal(7, 2, 9)
    exact(
      oracle.statistical_top_k(5 * a + 3, 2), 5 * oracle.statistical_top_k(a, 2)
    )

  def test_constant_row(self):
    a = np.full((1, 4), 2.0)
    self.assertEqual(oracle.statistical_top_k(a, 1).tolist(), [[0.0] * 4])

  def test_spark_ffn(self):
    x, k1, k2 = normal(0, 2, 6), normal(1, 2, 9), normal(2, 4, 9)
    v = normal(3, 9, 5)
    scores = x[:, :2] @ k1
    quantile = statistics.NormalDist().inv_cdf(1 - 3 / 9)
    limit = scores.mean(1, keepdims=True)
    limit = limit + quantile * scores.std(1, keepdims=True)
    soft = np.maximum(scores - limit, 0)
    gate = soft * np.vectorize(oracle.normal_cdf)(soft)
    y = oracle.spark_ffn(x, k1, k2, v, 3)
    np.testing.assert_allclose(y, (gate * (x[:, 2:] @ k2)) @ v, rtol=1e-9)
    for t in range(2):  # Only the neurons that fire.
      on = np.flatnonzero(soft[t])
      row = gate[t, on] * (x[t, 2:] @ k2[:, on])
      np.testing.assert_allclose(y[t], row @ v[on], rtol=1e-9)


class ThresholdTest(parameterized.TestCase):
  @parameterized.parameters(0.0, 0.1, 0.5, 0.93, 1.0)
  def test_meets_the_target(self, sparsity):
    a = normal(0, 10, 7)
    limit = oracle.kth_smallest(a, sparsity)
    out = oracle.apply_threshold(a, limit)
    self.assertEqual((out == 0).sum(), math.floor(70 * sparsity + 0.5))
    exact(out, np.where(np.abs(a) > limit, a, 0))

  def test_held_out(self):
    limit = oracle.kth_smallest(normal(1, 4000), 0.6)
    out = oracle.apply_threshold(normal(2, 4000), limit)
    # Both samples' deviations are sqrt(0.24 / 4000); four of their sum.
    self.assertLess(abs((out == 0).mean() - 0.6), 4 * math.sqrt(0.48 / 4000))

  def test_zero_changes_nothing(self):
    a = np.array([[0.0, -1e-300, 2.0]])
    np.testing.assert_array_equal(oracle.apply_threshold(a, 0.0), a)

  def test_equal_entries(self):
    a = np.round(normal(4, 9, 5))
    for keep_equal, kept in ((False, abs(a) > 1), (True, abs(a) >= 1)):
      out = oracle.apply_threshold(a, 1.0, keep_equal)
      np.testing.assert_array_equal(out, np.where(kept, a, 0))

  @parameterized.parameters(0.05, 0.5, 0.81)
  def test_histogram(self, sparsity):
    sizes = np.abs(normal(3, 5000))
    counts, edges = np.histogram(sizes, bins=400, range=(0, 6))
    found = oracle.histogram_threshold(edges, counts, sparsity)
    # Within one bin of the sorted values.
    self.assertLess(abs(found - oracle.kth_smallest(sizes, sparsity)), 6 / 400)

  def test_teal(self):
    a = np.sort(normal(3, 2000))
    inner = np.linspace(a[20], a[-20], 49)
    edges = np.concatenate([[a[0]], inner, [a[-1]]])
    counts = np.histogram(a, bins=edges)[0]
    centers = (edges[:-1] + edges[1:]) / 2
    found = [
      oracle.teal_threshold(centers, counts, s)
      for s in (0.1, 0.25, 0.4, 0.5, 0.9)
    ]
    printed(found, AUTHORS["teal"])

  def test_cats(self):
    edges = np.linspace(0, 4, 41)
    counts = np.histogram(abs(normal(4, 500)), bins=edges)[0]
    found = [
      oracle.cats_threshold(edges, counts, s)
      for s in (0.1, 0.3, 0.5, 0.7, 0.95)
    ]
    printed(found, AUTHORS["cats"])

  def test_greedy(self):
    """Errors that are convex and add up: greedy is the best of all splits."""
    slopes = np.abs(normal(5, 3))
    error = lambda s: sum(c * v**2 for c, v in zip(slopes, s, strict=True))
    found = oracle.greedy_sparsities([1, 1, 1], 0.5, 0.125, error)
    grid = itertools.product(np.arange(9) / 8, repeat=3)
    best = min((s for s in grid if sum(s) == 1.5), key=error)
    exact(found, best)
    # Sizes: every step saves the same, and the target is reached.
    sizes = [1, 4, 2]
    found = oracle.greedy_sparsities(sizes, 0.3, 0.1, error)
    saved = np.array(found) * sizes
    exact(saved / 0.1, np.round(saved / 0.1), atol=1e-9)
    self.assertBetween(saved.sum() / 7, 0.3 - 1e-12, 0.3 + 0.1 / 7)

  def test_mlps(self):
    x = normal(0, 3, 4)
    gate, up, down = normal(1, 4, 6), normal(2, 4, 6), normal(3, 6, 2)
    silu = lambda z: z / (1 + np.exp(-z))
    exact(
      oracle.teal_mlp(x, gate, up, down, 0.0, 0.0, 0.0),
      (silu(x @ gate) * (x @ up)) @ down,
    )
    cut = lambda a, t: np.where(np.abs(a) > t, a, 0)
    hidden = silu(cut(x, 0.5) @ gate) * (cut(x, 0.2) @ up)
    exact(
      oracle.teal_mlp(x, gate, up, down, 0.5, 0.2, 0.7), cut(hidden, 0.7) @ down
    )
    limits = np.abs(normal(4, 6))
    for limit in (0.3, limits):
      hidden = cut(silu(x @ gate), limit) * (x @ up)
      exact(oracle.cats_mlp(x, gate, up, down, limit), hidden @ down)


class ChessTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.gate = normal(5, 9, 6)
    self.up = normal(6, 9, 6) * np.array([1.0, 2, 3, 0.1, 0.5, 1])

  def test_against_the_authors(self):
    for name, sparsity in (("chess", 0.5), ("chess_third", 1 / 3)):
      found = oracle.chess_thresholds(self.gate, self.up, sparsity, "down")
      printed(found, AUTHORS[name])

  def test_sparsity_and_error(self):
    limits = oracle.chess_thresholds(self.gate, self.up, 0.5)
    out = oracle.apply_threshold(self.gate, limits * (1 + 1e-12))
    self.assertEqual((out == 0).sum(), 27)
    one = oracle.kth_smallest(self.gate, 0.5)
    uniform = oracle.apply_threshold(self.gate, one)
    self.assertEqual((uniform == 0).sum(), 27)
    error = lambda kept: (((self.gate - kept) * self.up) ** 2).sum()
    self.assertLess(error(out), error(uniform))

  def test_silent_neuron(self):
    up = self.up.copy()
    up[:, 2] = 0
    self.assertEqual(oracle.chess_thresholds(self.gate, up, 0.5)[2], math.inf)
    # At sparsity 0 nothing is cut.
    exact(oracle.chess_thresholds(self.gate, up, 0.0), np.zeros(6))


class RSparseTest(parameterized.TestCase):
  @parameterized.parameters(((5, 3),), ((3, 5),), ((4, 4),), ((1, 4),))
  def test_singular_values(self, shape):
    w = normal(0, *shape)
    u, s, v = oracle.singular_values(w)
    exact(s, np.linalg.svd(w, compute_uv=False))
    exact((u * s) @ v.T, w)
    for rank in range(min(shape) + 1):
      a, b, c = np.linalg.svd(w, full_matrices=False)
      exact(oracle.low_rank(w, rank), (a[:, :rank] * b[:rank]) @ c[:rank])

  def test_against_the_authors(self):
    w = normal(7, 5, 8).T
    scale = oracle.r_sparse_scale(w)
    printed(scale, AUTHORS["r_sparse_scale"])
    calibration = normal(8, 11, 8) * scale
    limit = oracle.kth_smallest(calibration, 0.7, "down")
    printed(limit, AUTHORS["r_sparse_threshold"][0])
    out = oracle.r_sparse(normal(9, 3, 8), w, limit, 2, scale)
    printed(out.ravel(), AUTHORS["r_sparse"])

  def test_limits(self):
    x, w, bias = normal(0, 3, 6), normal(1, 6, 4), normal(2, 4)
    exact(oracle.r_sparse(x, w, 0.0, 0, bias=bias), x @ w + bias)
    exact(oracle.r_sparse(x, w, 1.0, 4, bias=bias), x @ w + bias)
    exact(oracle.r_sparse(x, w, math.inf, 0, bias=bias), np.tile(bias, (3, 1)))

  def test_budget(self):
    for share in (0.0, 0.3, 1.0):
      channels, rank, sparsity = oracle.r_sparse_budget(64, 48, 0.5, share)
      self.assertLessEqual(channels * 48 + rank * (64 + 48), 64 * 48 / 2)
      self.assertGreater(channels * 48 + (rank + 1) * 112 + 48, 64 * 48 / 2)
      exact(sparsity, 1 - share / 2)


class DeftTest(parameterized.TestCase):
  @parameterized.parameters("tanh", "square")
  def test_gradient(self, form):
    layers = [normal(0, 2, 5), normal(1, 2, 3)]
    loss = lambda *_: oracle.density_loss(layers, form, 2.0, 0.1)
    found = oracle.density_loss_gradient(layers, form, 2.0, 0.1)
    for a, g in zip(layers, found, strict=True):
      close(g, differences(loss, a))

  def test_against_the_authors(self):
    layers = [normal(11, 2, 3, 5) * 0.01, normal(12, 2, 3, 4) * 0.001]
    printed(oracle.density_loss(layers, "square"), AUTHORS["deft"][0])
    found = oracle.density_loss_gradient(layers, "square")
    printed(
      np.concatenate([g.ravel() for g in found]), AUTHORS["deft_gradient"]
    )

  def test_limit_is_the_density(self):
    a = np.maximum(normal(2, 4, 6), 0)
    exact(oracle.density_loss([a], sharpness=1e9), oracle.density(a))
    exact(oracle.density_loss([a], "square", eps=1e-30), oracle.density(a))


class GatedAttentionTest(parameterized.TestCase):
  def test_attention(self):
    q, k, v = normal(13, 5, 4, 3), normal(14, 5, 2, 3), normal(15, 5, 2, 3)
    out, weights = oracle.attention(q, k, v)
    printed(out.ravel(), AUTHORS["sdpa"])
    exact(weights.sum(-1), np.ones((4, 5)))
    exact(oracle.first_key_mass(weights), weights[:, 1:, 0].mean())

  @parameterized.parameters(((4, 3, 2),), ((4, 3),))
  def test_gate(self, shape):
    y, x, w, g = normal(0, 5, 3, 2), normal(1, 5, 4), normal(2, *shape), 0
    g, bias = normal(3, 5, 3, 2), normal(4, *shape[1:])
    spec = "tm,mhd->thd" if len(shape) == 3 else "tm,mh->th"
    score = np.einsum(spec, x, w) + bias
    gate = 1 / (1 + np.exp(-(score if len(shape) == 3 else score[..., None])))
    exact(oracle.output_gate(y, x, w, bias), y * gate)
    found = oracle.output_gate_gradient(y, x, w, g, bias)
    for array, gradient in zip((y, x, w), found, strict=True):
      loss = lambda _: (oracle.output_gate(y, x, w, bias) * g).sum()
      close(gradient, differences(loss, array))

  def test_open_gate(self):
    y, x = normal(0, 2, 3, 2), normal(1, 2, 4)
    open_ = oracle.output_gate(y, x, np.zeros((4, 3)), np.full(3, 60.0))
    exact(open_, y)


class StochasticTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.a = normal(0, 3)
    table = normal(1, 8)
    self.loss = lambda h: table[int(4 * h[0] + 2 * h[1] + h[2])]

  def test_exact_gradient(self):
    numeric = differences(lambda a: oracle.expected_loss(self.loss, a), self.a)
    close(oracle.exact_gradient(self.loss, self.a), numeric)

  def test_reinforce_is_unbiased(self):
    for baseline in (0.0, 2.5, normal(2, 3)):
      mean, _ = oracle.reinforce_moments(self.loss, self.a, baseline)
      exact(mean, oracle.exact_gradient(self.loss, self.a))

  def test_best_baseline(self):
    best = oracle.optimal_baseline(self.loss, self.a)
    _, least = oracle.reinforce_moments(self.loss, self.a, best)
    for shift in (-1e-3, 1e-3, 1.0):
      _, more = oracle.reinforce_moments(self.loss, self.a, best + shift)
      self.assertTrue((more > least).all())
    _, none = oracle.reinforce_moments(self.loss, self.a, 0.0)
    self.assertTrue((none >= least).all())

  def test_sampled_gates(self):
    a = np.full(4000, 0.4)
    gates = oracle.bernoulli_gate(
      a, np.random.default_rng(3).uniform(size=4000)
    )
    self.assertEqual(set(gates.tolist()), {0.0, 1.0})
    p = oracle.sigmoid(0.4)
    # Four deviations.
    self.assertLess(abs(gates.mean() - p), 4 * math.sqrt(p * (1 - p) / 4000))

  def test_straight_through(self):
    g = normal(4, 3)
    exact(oracle.straight_through(self.a, g), g)
    p = 1 / (1 + np.exp(-self.a))
    exact(oracle.straight_through(self.a, g, True), g * p * (1 - p))

  def test_stochastic_times_smooth(self):
    grid = (np.arange(20000) + 0.5) / 20000
    for a in (-1.0, 0.3):
      h, slope = oracle.stochastic_times_smooth(np.full(20000, a), grid)
      p = oracle.sigmoid(a)
      # A grid of 20000 misses the share by at most one of them.
      self.assertLess(abs(h.mean() - p), 1e-4)
      self.assertLess(abs(slope.mean() - p * (1 - p) / 2), 1e-4)

  def test_noisy_rectifier(self):
    a, noise = normal(5, 50), normal(6, 50)
    h, slope = oracle.noisy_rectifier(a, noise)
    exact(h, np.maximum(a + noise, 0))
    exact(slope, (a + noise > 0).astype(float))

  def test_gated_blocks(self):
    blocks, gates = normal(7, 4, 3, 2), (normal(8, 4, 3) > 0).astype(float)
    exact(
      oracle.gated_blocks(blocks, gates), np.einsum("tbd,tb->td", blocks, gates)
    )
    broken = np.where(gates[..., None] > 0, blocks, math.nan)
    self.assertTrue(np.isfinite(oracle.gated_blocks(broken, gates)).all())

  @parameterized.parameters("square", "kl")
  def test_rate_penalty(self, form):
    at = lambda r: oracle.rate_penalty(np.full((3, 2), r), 0.2, form)
    self.assertLess(abs(at(0.2)), 1e-15)
    self.assertGreater(at(0.1), 0)
    self.assertGreater(at(0.5), at(0.3))
