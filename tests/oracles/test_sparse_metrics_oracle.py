"""The oracle of metrics on codes: by hand, identities, and released code.

data/recovery_authors.json has what others' code gives for inputs drawn by
`normal` and `absorption_inputs`, and where their definitions differ.
"""

import functools
import json
import math
import pathlib

from absl.testing import parameterized
import numpy as np
from scipy import optimize
from sklearn import metrics as sklearn_metrics

from tests.oracles import sparse_metrics as oracle

AUTHORS = json.loads(
  (pathlib.Path(__file__).parent / "data/recovery_authors.json").read_text()
)["results"]
exact = functools.partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-13)
# What was written down has nine digits, float32 six or seven.
near = functools.partial(np.testing.assert_allclose, rtol=5e-6, atol=5e-6)


def normal(seed, *shape):
  return np.random.default_rng(seed).standard_normal(shape)


def absorption_inputs(seed, n=60, m=12, d=6):
  """Codes whose two latents nearest to the probe are often silent."""
  rng = np.random.default_rng(seed)
  dictionary = rng.standard_normal((m, d))
  dictionary /= np.linalg.norm(dictionary, axis=-1, keepdims=True)
  probe = rng.standard_normal(d)
  main = np.argsort(-(dictionary @ probe))[:2].tolist()
  z = np.maximum(rng.standard_normal((n, m)) - 0.6, 0)
  z[np.ix_(rng.random(n) < 0.6, main)] = 0
  x = z @ dictionary + 0.1 * rng.standard_normal((n, d))
  present = rng.random(n) < 0.8
  return x, z, dictionary, probe, present, main


class SparsityTest(parameterized.TestCase):
  def test_by_hand(self):
    z = np.array([[1.0, 0, 0, 2], [0, 0, -1, 1], [0, 0, 0, 3], [0, 0, 0, 4]])
    exact(oracle.l0(z), 6 / 4)
    share = oracle.density(z)
    exact(share, [0.25, 0, 0.25, 1])
    exact(share.sum(), oracle.l0(z))
    exact(oracle.dead_fraction(share), 0.25)
    exact(oracle.dead_fraction(share, 0.25), 0.75)
    exact(oracle.dense_fraction(share), 0.75)
    exact(oracle.dense_fraction(share, 0.25), 0.25)
    exact(oracle.dense_fraction(share, 1.0), 0)

  def test_smallest_values_count(self):
    self.assertEqual(oracle.l0([[1e-300, -1e-300, -0.0]]), 2)

  def test_authors(self):
    z = np.maximum(normal(122, 50, 9) - 0.5, 0)
    z[:, 3] = 0
    near(oracle.l0(z), AUTHORS["dictionary_learning"]["l0"])
    share = oracle.density(z)
    near(
      1 - oracle.dead_fraction(share),
      AUTHORS["dictionary_learning"]["frac_alive"],
    )
    near(share, AUTHORS["saebench_core"]["feature_density"])


class FidelityTest(parameterized.TestCase):
  def test_explained_variance(self):
    x, x_hat = normal(0, 20, 5), normal(1, 20, 5)
    want = sklearn_metrics.r2_score(x, x_hat, multioutput="variance_weighted")
    exact(oracle.explained_variance(x, x_hat), want)
    exact(oracle.explained_variance(x, x), 1)
    mean = np.broadcast_to(x.mean(0), x.shape)
    exact(oracle.explained_variance(x, mean), 0, atol=1e-12)
    # About the mean, not about zero.
    exact(oracle.explained_variance(x + 9, x_hat + 9), want)
    # A ratio of sums is not a mean of ratios.
    rows = ((x - x_hat) ** 2).sum(-1) / ((x - x.mean(0)) ** 2).sum(-1)
    self.assertGreater(abs(1 - rows.mean() - want), 0.01)
    exact(
      oracle.normalized_error(x, x_hat),
      oracle.squared_error(x, x_hat) / oracle.squared_error(x, mean),
    )

  def test_nothing_varies(self):
    one = np.ones((3, 2))
    self.assertTrue(math.isnan(oracle.explained_variance(one, one)))
    self.assertEqual(oracle.explained_variance(one, 2 * one), -math.inf)

  def test_loss_recovered(self):
    self.assertEqual(oracle.loss_recovered(2.0, 2.0, 9.0), 1)
    self.assertEqual(oracle.loss_recovered(2.0, 9.0, 9.0), 0)
    self.assertEqual(oracle.loss_recovered(2.0, 1.0, 3.0), 2)
    self.assertTrue(math.isnan(oracle.loss_recovered(2.0, 2.0, 2.0)))

  def test_shrinkage(self):
    x = normal(2, 30, 4)
    exact(oracle.shrinkage(x, 0.7 * x), 0.7)
    # 1 / gamma is the factor that brings x_hat closest: Gated SAE, equation 10.
    y = x + 0.3 * normal(3, 30, 4)
    gamma = oracle.shrinkage(x, y)
    factors = np.linspace(0.5, 1.5, 100001)
    far = factors**2 * (y**2).sum() - 2 * factors * (x * y).sum()
    np.testing.assert_allclose(factors[far.argmin()], 1 / gamma, atol=1e-5)

  def test_authors(self):
    x, e = normal(120, 50, 6), normal(121, 50, 6)
    x_hat = 0.8 * x + 0.2 * e + 0.1
    for name in ("dictionary_learning", "saebench_core"):
      want = AUTHORS[name]["relative_reconstruction_bias"]
      near(oracle.shrinkage(x, x_hat), want)
    # With a residual of mean 0 dictionary_learning's is ours, otherwise better.
    centered = x + 0.3 * (e - e.mean(0))
    want = AUTHORS["dictionary_learning"]["centered"]
    near(oracle.explained_variance(x, centered), want)
    want = AUTHORS["dictionary_learning"]["frac_variance_explained"]
    near(1 - np.var(x - x_hat, 0).sum() / np.var(x, 0).sum(), want)
    self.assertLess(oracle.explained_variance(x, x_hat), want - 1e-3)
    # SAEBench's takes something else for the variance.
    error = oracle.squared_error(x, x_hat)
    spread = (x**2).sum(-1).mean() - (x**2).mean() ** 2
    near(1 - error / spread, AUTHORS["saebench_core"]["explained_variance"])
    rows = ((x - x_hat) ** 2).sum(-1) / ((x - x.mean(0)) ** 2).sum(-1)
    near(1 - rows.mean(), AUTHORS["saebench_core"]["explained_variance_legacy"])


class MccTest(parameterized.TestCase):
  @parameterized.parameters((5, 5), (6, 4), (3, 6), (1, 4), (7, 1))
  def test_assignment(self, m, truth):
    a, b = normal(m, m, 4), normal(10 + truth, truth, 4)
    size = np.abs(oracle.cosines(a, b))
    pairs = optimize.linear_sum_assignment(size, maximize=True)
    exact(oracle.mcc(a, b), size[pairs].mean())
    exact(oracle.mcc(a, b), oracle.mcc(b, a))

  def test_invariances(self):
    a = normal(20, 5, 4)
    shuffled = -3.0 * a[[4, 2, 0, 1, 3]]
    exact(oracle.mcc(shuffled, a), 1)
    exact(oracle.mcc(a[:3], a), 1)
    exact(oracle.mcc(np.eye(4)[:2], np.eye(4)[2:]), 0)

  def test_greedy_would_be_worse(self):
    # Row 0 prefers column 0, and so does row 1, which has nothing else.
    a = [[1.0, 0.9, 0.0], [1.0, 0.0, 0.0]]
    b = [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]
    one, other = 1 / math.sqrt(1.81), 0.9 / math.sqrt(1.81)
    exact(oracle.cosines(a, b), [[one, other], [1, 0]])
    exact(oracle.mcc(a, b), (1 + other) / 2)

  def test_one_to_one(self):
    exact(oracle.mcc([[1.0, 0], [1.0, 0]], np.eye(2)), 0.5)

  def test_zero_atom(self):
    exact(oracle.mcc([[0.0, 0], [1.0, 0]], np.eye(2)), 0.5)


class AbsorptionTest(parameterized.TestCase):
  def simple(self):
    """Latent 0 is "starts with S", 1 is "snake" and has some of it."""
    dictionary = np.array([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
    z = np.array(
      [
        [1.0, 0.0, 0.0],  # the main latent
        [0.0, 2.0, 0.0],  # absorbed: 1.2 of 1.2
        [0.1, 2.0, 0.0],  # the main one fires a little
        [0.0, 0.0, 2.0],  # nothing carries it
        [0.0, 2.0, 0.0],  # absorbed, but not present
      ]
    )
    return z @ dictionary, z, dictionary, np.array([2.0, 0.0])

  def test_by_hand(self):
    x, z, dictionary, probe = self.simple()
    present = [True, True, True, True, False]
    got = oracle.absorbed(x, z, dictionary, probe, present, [0])
    self.assertEqual(got.tolist(), [False, True, False, False, False])
    exact(oracle.absorption(x, z, dictionary, probe, present, [0]), 1 / 4)
    # Row 2: total 1.3, 0.1 by the main latent and 1.2 by the other.
    want = [0, 1, 1.2 / 1.3, 0]
    got = oracle.absorption_fraction(x, z, dictionary, probe, present, [0])
    exact(got, np.mean(want))

  @parameterized.parameters((2.9, 1), (3.1, 0), (-1.0, 0), (0.0, 0))
  def test_share(self, total, want):
    # 1.2 is 0.4 of 3.
    x, z, dictionary, probe = self.simple()
    x[1] = [total, 0]
    present = [False, True, False, False, False]
    exact(oracle.absorption(x, z, dictionary, probe, present, [0]), want)

  def test_cosine(self):
    x, z, dictionary, probe = self.simple()
    args = (x, z, dictionary, probe, [True] * 5, [0])
    exact(oracle.absorption(*args, cosine_threshold=0.59), 2 / 5)
    exact(oracle.absorption(*args, cosine_threshold=0.61), 0)

  def test_units_do_not_matter(self):
    x, z, dictionary, probe, present, main = absorption_inputs(100)
    want = oracle.absorbed(x, z, dictionary, probe, present, main)
    self.assertTrue(want.any())
    scale = np.exp(normal(0, len(dictionary)))
    got = oracle.absorbed(
      x, z / scale, dictionary * scale[:, None], 7 * probe, present, main
    )
    self.assertEqual(got.tolist(), want.tolist())

  def test_a_main_latent_absorbs_nothing(self):
    x, z, dictionary, probe = self.simple()
    present = [True] * 5
    exact(oracle.absorption(x, z, dictionary, probe, present, [0, 1]), 0)
    # Not even with 0 of nothing.
    rows = oracle.absorbed(
      x, 0 * z, dictionary, probe, present, [0, 1], share_threshold=0.0
    )
    self.assertFalse(rows.any())
    # No main latent: whoever carries it does so in the place of nobody.
    exact(oracle.absorption(x, z, dictionary, probe, present, []), 4 / 5)
    exact(oracle.absorption(x, z, dictionary, probe, present, [0, 1, 2]), 0)

  def test_nobody_there(self):
    x, z, dictionary, probe = self.simple()
    for rate in (oracle.absorption, oracle.absorption_fraction):
      self.assertTrue(
        math.isnan(rate(x, z, dictionary, probe, [False] * 5, [0]))
      )

  def test_fraction_in_limits(self):
    x, z, dictionary, probe, present, main = absorption_inputs(116)
    rows = oracle.absorbed(x, z, dictionary, probe, present, main)
    shares = [
      oracle.absorption_fraction(
        x[i : i + 1], z[i : i + 1], dictionary, probe, [True], main
      )
      for i in range(len(x))
    ]
    self.assertTrue(all(0 <= s <= 1 for s in shares))
    # With one helper and the same thresholds what is fully absorbed is 1.
    same = [
      oracle.absorption_fraction(
        x[i : i + 1],
        z[i : i + 1],
        dictionary,
        probe,
        [True],
        main,
        cosine_threshold=0.025,
        most=1,
      )
      for i in range(len(x))
      if rows[i]
    ]
    exact(same, 1)

  @parameterized.parameters(
    ("default", 100, {}, {}),
    (
      "strict",
      116,
      {"cosine_threshold": 0.3, "share_threshold": 0.6},
      {"share_threshold": 0.6},
    ),
    (
      "one_helper",
      110,
      {"share_threshold": 0.2},
      {"cosine_threshold": 0.2, "share_threshold": 0.2, "most": 1},
    ),
  )
  def test_saebench(self, name, seed, full, partial):
    want = AUTHORS["saebench_absorption"][name]
    args = absorption_inputs(seed)
    x, z, dictionary, probe, present, main = args
    rows = oracle.absorbed(*args, **full)
    self.assertEqual(np.flatnonzero(rows).tolist(), want["absorbed"])
    near(oracle.absorption(*args, **full), want["rate"])
    near(oracle.absorption_fraction(*args, **partial), want["fraction"])
    each = [
      oracle.absorption_fraction(
        x[i : i + 1], z[i : i + 1], dictionary, probe, [True], main, **partial
      )
      for i in np.flatnonzero(present)
    ]
    near(each, want["fractions"])


class DescriptionLengthTest(parameterized.TestCase):
  def test_entropy(self):
    exact(oracle.entropy([1] * 8), 3)
    exact(oracle.entropy([3, 1]), 2 - 0.75 * math.log2(3))
    exact(oracle.entropy([0, 4, 0]), 0)

  def test_by_hand(self):
    # Latent 0: active in half of the rows, in two bins evenly: 1 + 1 / 2.
    # Latent 1: always active, one bin: 0. Latent 2: never: 0.
    z = np.array([[0.3, 2.2, 0], [0.8, 2.4, 0], [0, 2.1, 0], [0, 2.3, 0]])
    exact(oracle.description_length(z, 0.5), 1.5)
    exact(oracle.description_length(z, 100.0), 1)
    # Bins are half open, and negative values have theirs.
    exact(oracle.description_length([[-0.1], [0.1]], 1.0), 1)
    exact(oracle.description_length([[0.5], [1.0]], 0.5), 1)
    exact(oracle.description_length([[0.5], [0.75]], 0.5), 0)

  def test_adds_over_latents_and_grows_with_precision(self):
    z = np.maximum(normal(30, 64, 5), 0)
    bits = [oracle.description_length(z[:, [j]], 0.3) for j in range(5)]
    exact(oracle.description_length(z, 0.3), sum(bits))
    sizes = [oracle.description_length(z, 2.0**-i) for i in range(8)]
    self.assertTrue((np.diff(sizes) >= -1e-12).all())
    # At most which of 64 rows, each of another value.
    active = (z != 0).mean(0)
    most = sum(
      oracle.entropy([a * 64, 64 - a * 64]) + a * math.log2(a * 64)
      for a in active
    )
    exact(oracle.description_length(z, 1e-9), most)

  def test_saebench(self):
    z = np.abs(normal(111, 150, 4)) + 0.05
    near(oracle.description_length(z, 0.25), AUTHORS["saebench_mdl"]["always"])
    # Their histogram has the rows that are not active too, in its first bin.
    z = np.maximum(normal(110, 200, 7) - 0.3, 0)
    z[:, 6] = 0
    z[:, 5] = np.abs(z[:, 5]) + 0.1
    bits = 0
    for column in z.T:
      counts = np.bincount(np.floor(column / 0.25).astype(int))
      share = np.mean(column > 0)
      bits += oracle.entropy([share, 1 - share]) + share * oracle.entropy(
        counts
      )
    near(bits, AUTHORS["saebench_mdl"]["bits"])
