"""The oracle of sparse embeddings: by hand, identities, and released code.

data/recovery_authors.json has what others' code gives for inputs drawn by
`normal`.
"""

import functools
import json
import math
import pathlib

from absl.testing import parameterized
import numpy as np
from scipy import sparse

from tests.oracles import embeddings as oracle

AUTHORS = json.loads(
  (pathlib.Path(__file__).parent / "data/recovery_authors.json").read_text()
)["results"]
exact = functools.partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-13)
# What was written down has nine digits.
near = functools.partial(np.testing.assert_allclose, rtol=1e-7, atol=1e-8)


def normal(seed, *shape):
  return np.random.default_rng(seed).standard_normal(shape)


def codes(seed, n, m, threshold=0.5):
  return np.maximum(normal(seed, n, m) - threshold, 0)


class SpladeTest(parameterized.TestCase):
  def test_closed_form(self):
    logits, valid = normal(0, 3, 5, 7), normal(1, 3, 5) > -0.5
    masked = np.where(valid[..., None], np.log1p(np.maximum(logits, 0)), 0)
    exact(oracle.splade(logits, valid), masked.max(1))

  def test_what_is_not_valid_is_not_read(self):
    logits = np.array([[[1.0, -1.0], [np.nan, np.inf]], [[5.0, 5.0]] * 2])
    got = oracle.splade(logits, [[True, False], [False, False]])
    exact(got, [[math.log(2), 0], [0, 0]])

  def test_authors(self):
    logits = normal(131, 3, 4, 6) * 2
    mask = np.array([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]], bool)
    near(oracle.splade(logits, mask), AUTHORS["splade"]["encode"])
    # The unified framework leaves out special tokens as well.
    special = np.array([[1, 0, 0, 1], [1, 0, 0, 0], [0, 0, 0, 0]], bool)
    near(oracle.splade(logits, mask & ~special), AUTHORS["lsr"]["encode"])


class FlopsTest(parameterized.TestCase):
  def test_even_is_cheaper(self):
    # The same l1; all of it in one latent costs as much as there are latents.
    even, uneven = np.eye(4), np.tile([[1.0, 0, 0, 0]], (4, 1))
    exact([oracle.l1(even), oracle.l1(uneven)], 1)
    exact([oracle.flops(even), oracle.flops(uneven)], [1 / 4, 1])

  def test_is_the_expected_number_of_multiplies(self):
    # With values of 1 it is the mean over pairs of rows of shared latents.
    z = (normal(2, 9, 6) > 0.4).astype(float)
    exact(oracle.flops(z), oracle.multiplies(z, z) / 81)
    exact(oracle.flops(-3 * z), 9 * oracle.flops(z))

  def test_authors(self):
    z = np.maximum(normal(130, 5, 8), 0)
    near(oracle.flops(z), AUTHORS["splade"]["flops"])
    near(oracle.l1(z), AUTHORS["splade"]["l1"])
    weight = oracle.weight_at(3, 0.5, 4)
    near(weight * oracle.flops(z), AUTHORS["lsr"]["flops_after_3_of_4"])
    got = [oracle.weight_at(t, 0.3, 4) for t in range(1, 7)]
    near(got, AUTHORS["splade"]["weights"])
    self.assertEqual(oracle.weight_at(0, 0.3, 4), 0)


class IndexTest(parameterized.TestCase):
  def test_by_hand(self):
    documents = [[0, 1.0, 2.0], [0, 0, 3.0], [0, 0, 0]]
    index = oracle.inverted_index(documents)
    self.assertEqual(index, {1: [(0, 1.0)], 2: [(0, 2.0), (1, 3.0)]})
    got, multiplies = oracle.search(index, [5.0, 0, -1.0], 3)
    self.assertEqual((got.tolist(), multiplies), ([-2.0, -3.0, 0.0], 2))
    got, multiplies = oracle.search(index, [5.0, 0, 0], 3)
    self.assertEqual((got.tolist(), multiplies), ([0.0] * 3, 0))

  @parameterized.parameters(0, 1)
  def test_equals_dense(self, signed):
    queries, documents = codes(3, 6, 20), codes(4, 11, 20)
    documents = documents * (np.sign(normal(5, 11, 20)) if signed else 1)
    exact(oracle.scores(queries, documents), queries @ documents.T)

  def test_multiplies(self):
    queries, documents = codes(6, 6, 20), codes(7, 11, 20)
    a, b = (queries != 0).sum(0), (documents != 0).sum(0)
    self.assertEqual(oracle.multiplies(queries, documents), (a * b).sum())
    lengths = np.diff(sparse.csc_array(documents).indptr)
    index = oracle.inverted_index(documents)
    self.assertEqual(
      [len(index.get(j, [])) for j in range(20)], lengths.tolist()
    )
    # Dense codes multiply everything.
    dense = np.ones((4, 20))
    self.assertEqual(oracle.multiplies(dense, dense), 4 * 4 * 20)


class AnnealingTest(parameterized.TestCase):
  def test_ends_and_steps(self):
    ks = [oracle.k_at(i, 64, 2, 62) for i in range(70)]
    self.assertEqual(ks[:63], list(range(64, 1, -1)))
    self.assertEqual(set(ks[62:]), {2})
    self.assertEqual([oracle.k_at(i, 3, 3, 5) for i in range(8)], [3] * 8)
    self.assertEqual(oracle.k_at(0, 9, 2, 0), 2)
    # Upwards too; halves go to the even one.
    self.assertEqual(
      [oracle.k_at(i, 1, 4, 6) for i in range(7)], [1, 2, 2, 2, 3, 4, 4]
    )

  def test_authors(self):
    ks = [oracle.k_at(i, 64, 2, 70) for i in range(80)]
    self.assertEqual(ks, AUTHORS["csrv2"]["k"])
    ks = [oracle.k_at(i, 33, 4, 40) for i in range(45)]
    self.assertEqual(ks, AUTHORS["csrv2"]["k_odd"])


class ContrastTest(parameterized.TestCase):
  def test_by_hand(self):
    # Two labels on two axes: s is e^5 with its own and 1 with the two others.
    z = np.array([[1.0, 0], [2.0, 0], [0, 1.0], [0, 3.0]])
    want = -math.log(math.exp(5) / (math.exp(5) + 2))
    for outside in (False, True):
      exact(oracle.contrast(z, [0, 0, 1, 1], 0.2, outside), want)
    # One label: inside of the logarithm nothing is left to gain.
    exact(oracle.contrast(z, [0] * 4), 0)
    self.assertGreater(oracle.contrast(z, [0] * 4, outside=True), 1)

  def test_alone(self):
    z = np.abs(normal(8, 5, 6))
    exact(oracle.contrast(z, range(5)), 0)
    # A row without a positive is a negative of others but has no term.
    unit = z / np.linalg.norm(z, axis=-1, keepdims=True)
    s = np.exp(unit @ unit.T / 0.2)
    others = s.sum(-1) - np.diag(s)
    want = -np.log([s[0, 1] / others[0], s[1, 0] / others[1]]).mean()
    exact(oracle.contrast(z, [0, 0, 1, 2, 3]), want)

  def test_scale_and_zero_codes(self):
    z, labels = codes(9, 6, 5), [0, 1, 0, 1, 0, 1]
    a = oracle.contrast(z, labels)
    exact(oracle.contrast(z * np.arange(1, 7)[:, None], labels), a)
    z[2] = 0
    self.assertTrue(math.isfinite(oracle.contrast(z, labels)))
    # All codes zero: every cosine is 0.
    exact(oracle.contrast(0 * z, labels), -math.log(2 / 5))

  def test_inside_is_never_more(self):
    # Jensen: log of a sum is at least the mean of logs.
    z, labels = codes(10, 9, 7), [0, 0, 0, 1, 1, 1, 2, 2, 2]
    inside = oracle.contrast(z, labels)
    self.assertLess(inside, oracle.contrast(z, labels, outside=True))

  def test_authors(self):
    z = np.array(AUTHORS["csrv2"]["code"])
    labels = np.array([0, 1, 0, 2, 1, 0, 3, 2, 1])
    two, both = np.tile(z, (2, 1)), np.tile(labels, 2)
    near(oracle.contrast(two, both), AUTHORS["csrv2"]["contrast_twice"])
    alone = np.tile(np.arange(9), 2)
    near(oracle.contrast(two, alone), AUTHORS["csrv2"]["contrast_self"])
    # Khosla's, by pytorch-metric-learning.
    got = oracle.contrast(two, both, 0.2, outside=True)
    near(got, AUTHORS["supcon"]["twice"])
    got = oracle.contrast(
      normal(144, 8, 6), [0, 0, 1, 1, 1, 2, 2, 0], 0.1, outside=True
    )
    near(got, AUTHORS["supcon"]["dense"])


class Csrv2Test(parameterized.TestCase):
  def inputs(self):
    x, encoder = normal(140, 9, 5), normal(141, 14, 5)
    encoder_bias, bias = 0.1 * normal(142, 14), 0.3 * normal(143, 5)
    return x, encoder, encoder_bias, bias

  def test_code(self):
    pre = np.array([[1.0, 3.0, 3.0, -1.0], [-1.0, -2.0, 0.5, -3.0]])
    exact(oracle.top_k(pre, 1), [[0, 3, 0, 0], [0, 0, 0.5, 0]])
    exact(oracle.top_k(pre, 2), [[0, 3, 3, 0], [0, 0, 0.5, 0]])
    exact(oracle.top_k(pre, 4), np.maximum(pre, 0))
    exact(oracle.top_k(np.maximum(pre, 0), 2), oracle.top_k(pre, 2))

  def test_auxiliary(self):
    residual, dictionary = normal(11, 6, 3), normal(12, 5, 3)
    pre = np.abs(normal(13, 6, 5)) + 0.1
    self.assertEqual(
      oracle.auxiliary(pre, residual, dictionary, [False] * 5, 2), 0
    )
    # One dead latent of two: half of how it explains the residual.
    dead = [False, False, True, False, False]
    e_hat = pre[:, [2]] * dictionary[2]
    spread = ((residual - residual.mean(0)) ** 2).sum()
    want = ((residual - e_hat) ** 2).sum() / spread
    exact(oracle.auxiliary(pre, residual, dictionary, dead, 2), want / 2)
    got = oracle.auxiliary(pre, residual, dictionary, dead, 2, scaled=False)
    exact(got, want)
    exact(oracle.auxiliary(pre, residual, dictionary, dead, 1), want)
    # A dead latent below 0 gives nothing.
    got = oracle.auxiliary(-pre, residual, dictionary, dead, 1)
    exact(got, (residual**2).sum() / spread)
    # What is explained costs nothing.
    exact(oracle.auxiliary(pre, e_hat, dictionary, dead, 1), 0)
    exact(oracle.auxiliary(pre, np.ones((6, 3)), dictionary, dead, 1), 0)

  def test_authors(self):
    x, encoder, encoder_bias, bias = self.inputs()
    want = AUTHORS["csrv2"]
    pre = oracle.pre_activations(x, encoder, encoder_bias, bias)
    near(oracle.top_k(pre, 2), want["code"])
    self.assertGreaterEqual(sum(want["dead_after"]), 3)
    got = oracle.csrv2_loss(
      x,
      encoder,
      encoder_bias,
      encoder,
      bias,
      [0, 1, 0, 2, 1, 0, 3, 2, 1],
      want["dead_after"],
      2,
      k_aux=3,
      multi=1 / 8,
      center=bias,
      twice=True,
    )
    near(got["error"] / 5, want["error_over_d"])
    near(got["multi"] / 5, want["multi_over_d"])
    near(got["auxiliary"], want["auxiliary"])
    near(got["contrast"], want["contrast_twice"])
    total = (
      5 * want["error_over_d"]
      + 5 / 8 * want["multi_over_d"]
      + want["auxiliary"] / 32
      + 0.1 * want["contrast_twice"]
    )
    near(got["total"], total)

  def test_plain(self):
    x, encoder, encoder_bias, bias = self.inputs()
    labels, dead = [0, 1, 0, 2, 1, 0, 3, 2, 1], [False] * 14
    got = oracle.csrv2_loss(
      x, encoder, encoder_bias, encoder, bias, labels, dead, 2, k_aux=3
    )
    z = oracle.top_k(x @ encoder.T + encoder_bias, 2)
    error = ((x - z @ encoder - bias) ** 2).sum() / 9
    contrast = oracle.contrast(z, labels)
    exact(got["total"], error + 0.1 * contrast)
    self.assertEqual(got["auxiliary"], 0)
