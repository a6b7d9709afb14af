"""The oracle of the remaining methods: brute force, differences, NumPy.

data/methods_rest_authors.json has what the methods' authors' code gives for
networks drawn by `network` and for numbers drawn by `normal`.
"""

import functools
import itertools
import json
import math
import pathlib

from absl.testing import parameterized
import numpy as np

from tests.oracles import methods_rest as oracle
from tests.oracles import select
from tests.oracles import weights

AUTHORS = json.loads(
  (pathlib.Path(__file__).parent / "data/methods_rest_authors.json").read_text()
)["results"]
exact = functools.partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-13)
# The authors' numbers are written with twelve digits.
printed = functools.partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-11)


def normal(seed, *shape):
  return np.random.default_rng(seed).standard_normal(shape)


def network(seed, sizes):
  """Kernels; a bias is drawn after each, as for the authors' numbers."""
  rng = np.random.default_rng(seed)
  kernels = []
  for n, m in itertools.pairwise(sizes):
    kernels.append(rng.standard_normal((n, m)))
    rng.standard_normal(m)
  return kernels


class RigLTest(parameterized.TestCase):
  @parameterized.parameters(True, False)
  def test_union(self, regrow_dropped):
    mask = normal(0, 4, 5) > 0.6
    steps = [
      (normal(10 + t, 4, 5), normal(20 + t, 4, 5), t % 3) for t in range(6)
    ]
    run = oracle.rigl_run(mask, steps, regrow_dropped)
    self.assertLen(run, 7)
    self.assertEqual({int(m.sum()) for m in run}, {int(mask.sum())})
    union = functools.reduce(np.logical_or, run)
    np.testing.assert_array_equal(oracle.ever_active(run), union)
    exact(weights.explored_share(run), union.mean())
    self.assertGreater(union.sum(), mask.sum())


class BdwpTest(parameterized.TestCase):
  @parameterized.parameters((1, 2), (2, 4), (4, 4))
  def test_against_numpy(self, n, m):
    x, w, dy = normal(0, 3, 8), normal(1, 8, 4), normal(2, 3, 4)
    forward = np.zeros((8, 4), bool)
    backward = np.zeros((8, 4), bool)
    for j in range(4):
      for g in range(0, 8, m):
        forward[g + np.argsort(-abs(w[g : g + m, j]))[:n], j] = True
    for i in range(8):
      for g in range(0, 4, m):
        backward[i, g + np.argsort(-abs(w[i, g : g + m]))[:n]] = True
    exact(oracle.bdwp_forward(x, w, n, m), x @ (w * forward))
    dx, dw = oracle.bdwp_gradients(x, w, dy, n, m)
    exact(dx, dy @ (w * backward).T)
    exact(dw, x.T @ dy)

  def test_the_masks_differ(self):
    forward, backward = oracle.bdwp_masks(normal(1, 8, 4), 2, 4)
    self.assertTrue((forward != backward).any())


class IssPTest(parameterized.TestCase):
  @parameterized.parameters(0.0, 0.5, 1.0)
  def test_steps_against_numpy(self, factor):
    w, updates = normal(0, 3, 5), [normal(1 + t, 3, 5) for t in range(5)]
    got, masks = oracle.iss_p_run(w, updates, 0.6, factor, 3)
    for t, u in enumerate(updates):
      w = w + u
      if t <= 3:
        order = np.argsort(-abs(w).ravel(), kind="stable")
        mask = np.zeros(15, bool)
        mask[order[:6]] = True
        mask = mask.reshape(3, 5)
      w = w * np.where(mask, 1, factor if t < 3 else 0)
      exact(got[t], w)
      np.testing.assert_array_equal(masks[t], mask)

  def test_factor_zero_is_hard_thresholding_and_one_is_dense(self):
    w, updates = normal(0, 3, 5), [normal(1 + t, 3, 5) for t in range(4)]
    hard, masks = oracle.iss_p_run(w, updates, 0.6, 0.0, 9)
    self.assertEqual([(h != 0).sum() for h in hard], [6] * 4)
    dense, _ = oracle.iss_p_run(w, updates, 0.6, 1.0, 9)
    exact(dense[-1], w + sum(updates))
    self.assertFalse(np.signbit(hard[0][~masks[0]]).any())

  def test_counts_of_the_authors(self):
    for size in (7, 40, 1000):
      for sparsity, count in AUTHORS[f"iss_{size}"].items():
        w = normal(16, size)
        kept = oracle.iss_p_mask(w, float(sparsity), "authors")
        self.assertEqual(size - kept.sum(), count)
    pruned = np.flatnonzero(~oracle.iss_p_mask(normal(16, 40), 0.7, "authors"))
    self.assertEqual(pruned.tolist(), AUTHORS["iss_pruned_40"])


class HyperSparseTest(parameterized.TestCase):
  @parameterized.parameters(0.0, 0.5, 0.9)
  def test_gradient_is_differences(self, sparsity):
    arrays = network(15, (3, 4, 2))
    got = oracle.hypersparse_gradient(arrays, sparsity)
    frozen = [a.copy() for a in arrays]
    for g, a in zip(got, arrays, strict=True):
      for i in np.ndindex(*a.shape):
        value, ends = a[i], []
        for step in (1e-5, -1e-5):
          a[i] = value + step
          ends.append(oracle.hypersparse_penalty(arrays, sparsity, frozen))
        a[i] = value
        # Truncation 1e-10 times a third derivative below 100.
        np.testing.assert_allclose(
          g[i], (ends[0] - ends[1]) / 2e-5, rtol=0, atol=1e-7
        )

  @parameterized.parameters(0.0, 0.5, 0.9)
  def test_authors(self, sparsity):
    want = AUTHORS[f"hypersparse_{sparsity}"]
    got = oracle.hypersparse_gradient(network(15, (3, 4, 2)), sparsity)
    for g, auto, closed in zip(
      got, want["autograd"], want["closed"], strict=True
    ):
      printed(g, auto)
      printed(g, closed)
    penalty = oracle.hypersparse_penalty(network(15, (3, 4, 2)), sparsity)
    self.assertAlmostEqual(penalty, 0.0, places=12)

  def test_the_constant_is_the_turning_point_of_the_slope(self):
    turning = math.atanh(1 / math.sqrt(3))
    self.assertAlmostEqual(oracle.HYPERSPARSE_CONSTANT, turning, places=4)

  def test_small_weights_are_pressed_harder(self):
    w = np.sort(np.abs(normal(0, 50)))
    slope = oracle.hypersparse_gradient([w], 0.8)[0]
    self.assertTrue((np.diff(slope) < 0).all())
    # At the quantile the slope has fallen to 2/3 of that at zero.
    flat = oracle.hypersparse_gradient([np.append(w, 1e-12)], 0.8)[0]
    s = oracle.hypersparse_s([np.append(w, 1e-12)], 0.8)
    at = int(np.argmin(abs(w - 0.6585 / s)))
    np.testing.assert_allclose(flat[at] / flat[-1], 2 / 3, atol=1e-4)

  def test_zero_has_no_slope(self):
    got = oracle.hypersparse_gradient([np.array([0.0, 1.0])], 0.5)[0]
    self.assertEqual(got[0], 0.0)


class PixelflyTest(parameterized.TestCase):
  @parameterized.parameters((1, 1), (2, 1), (8, 1), (8, 4), (16, 16))
  def test_partners_are_the_mask(self, blocks, stride):
    mask = select.flat_block_butterfly_mask(blocks, stride)
    for i in range(blocks):
      self.assertEqual(
        oracle.butterfly_partners(i, stride), np.flatnonzero(mask[i]).tolist()
      )
    present = oracle.pixelfly_blocks(blocks, blocks, stride)
    self.assertLen(present, blocks * (int(math.log2(stride)) + 1))

  def test_layouts_of_the_authors(self):
    """butterfly_SIDE_FACTORS_BLOCK_OUT_IN, [outputs, inputs] in blocks."""
    for name, want in AUTHORS.items():
      if not name.startswith("butterfly"):
        continue
      side, factors, block, outputs, inputs = map(int, name.split("_")[1:])
      want = np.array([[c == "1" for c in row] for row in want])
      rows, columns = inputs // block, outputs // block
      self.assertEqual(min(rows, columns), side)
      got = np.zeros((rows, columns), bool)
      for at in oracle.pixelfly_blocks(rows, columns, 2**factors):
        got[at] = True
      np.testing.assert_array_equal(got.T, want)

  def test_matrix_against_numpy(self):
    u, v = normal(0, 4, 3), normal(1, 8, 3)
    present = oracle.pixelfly_blocks(2, 4)
    blocks = {at: normal(2 + k, 2, 2) for k, at in enumerate(present)}
    dense = np.zeros((4, 8))
    for (i, j), b in blocks.items():
      dense[2 * i : 2 * i + 2, 2 * j : 2 * j + 2] = b
    got = oracle.pixelfly_matrix(blocks, (4, 8), 0.3, u, v)
    exact(got, 0.3 * dense + 0.7 * u @ v.T)

  def test_the_sum_approximates_the_product_to_second_order(self):
    masks = [oracle.butterfly_factor_mask(8, s) for s in (8, 4, 2)]
    flat = select.flat_block_butterfly_mask(8, 8)
    np.testing.assert_array_equal(np.logical_or.reduce(masks), flat)
    factors = [normal(k, 8, 8) * m for k, m in enumerate(masks)]
    errors = []
    for scale in (1e-2, 1e-3):
      product = oracle.residual_product(factors, scale)
      first = oracle.residual_first_order(factors, scale)
      self.assertFalse((first != 0)[~flat].any())
      errors.append(np.linalg.norm(product - first))
      bound = oracle.residual_error_bound(factors, scale)
      self.assertLessEqual(errors[-1], bound)
    # Ten times less is a hundred times less error, up to the third order.
    np.testing.assert_allclose(errors[0] / errors[1], 100, rtol=0.1)
    exact(
      oracle.residual_product(factors, 0.5),
      np.linalg.multi_dot([np.eye(8) + 0.5 * b for b in factors]),
    )


class SparseIftTest(parameterized.TestCase):
  @parameterized.product(
    inputs=(1, 3, 16, 40), outputs=(1, 7, 24), sparsity=(0.0, 0.5, 0.75, 0.9)
  )
  def test_counts_stay_near_the_dense_one(self, inputs, outputs, sparsity):
    dense = inputs * outputs
    counts = {
      "parallel": oracle.parallel_count(inputs, outputs, sparsity)[1],
      "factorized": oracle.factorized_count(inputs, outputs, sparsity),
      "doped": oracle.doped_count(inputs, outputs, sparsity),
    }
    for kind, count in counts.items():
      below, above = oracle.ift_slack(inputs, outputs, sparsity, kind)
      self.assertBetween(count, dense - below, dense + above)

  def test_no_sparsity_is_the_dense_layer(self):
    self.assertEqual(oracle.parallel_count(5, 7, 0.0), (1, 35))
    self.assertEqual(oracle.doped_rank(5, 7, 0.0), 0)
    self.assertEqual(oracle.doped_count(5, 7, 0.0), 35)
    self.assertEqual(oracle.wide_width(13, 0.0), 13)
    self.assertEqual(oracle.wide_hidden_at_sparsity(13, 0.0), 13)

  @parameterized.parameters(0.5, 0.75, 0.9, 0.99)
  def test_wide_chains_keep_their_count(self, sparsity):
    widths = [10, 64, 64, 5]
    k = [oracle.wide_width(w, sparsity) for w in widths[1:3]]
    wide = [10, *k, 5]
    densities = oracle.wide_densities(widths, wide)
    shapes = list(itertools.pairwise(wide))
    count = oracle.nonzero_count(shapes, densities)
    self.assertAlmostEqual(
      count, oracle.dense_count(widths), delta=len(shapes) / 2
    )
    # int() of the width: at most 1 in 64 of it, twice.
    np.testing.assert_allclose(densities[1], 1 - sparsity, rtol=2 / 64)

  def test_two_layers_of_fixed_ends(self):
    for sparsity in (0.5, 0.75, 0.9):
      wide = oracle.wide_hidden_at_sparsity(20, sparsity)
      exact((1 - sparsity) * (6 + 9) * wide, (6 + 9) * 20)

  def test_authors_widths_of_3x3_convolutions(self):
    """A 3 x 3 convolution has nine times the inputs."""
    for fan_in, fan_out, sparsity, inner, rank in AUTHORS["sparse_ift_conv3x3"]:
      self.assertEqual(
        oracle.factorized_inner(9 * fan_in, fan_out, sparsity), inner
      )
      self.assertEqual(oracle.doped_rank(9 * fan_in, fan_out, sparsity), rank)

  def test_forwards_against_numpy(self):
    x, u, v, w = (
      normal(0, 3, 4),
      normal(1, 4, 2),
      normal(2, 2, 5),
      normal(3, 4, 5),
    )
    exact(oracle.doped_forward(x, w, u, v), x @ (w + u @ v))
    exact(oracle.factorized_forward(x, u, v), x @ u @ v)
    exact(oracle.factorized_forward(x, u, v, math.tanh), np.tanh(x @ u) @ v)
    exact(oracle.parallel_forward(x, [w, -2 * w]), -x @ w)
    exact(
      oracle.parallel_forward(x, [w, -w], lambda t: max(t, 0.0)), abs(x @ w)
    )


def relu(v):
  return max(v, 0.0)


class DeadNeuronsTest(parameterized.TestCase):
  @parameterized.product(
    seed=(0, 1, 2, 3),
    density=(0.0, 0.1, 0.25, 0.5, 1.0),
    activation=(relu, math.tanh, math.exp),
  )
  def test_the_function_stays_and_nothing_is_dead(
    self, seed, density, activation
  ):
    rng = np.random.default_rng(seed)
    layers, masks = [], []
    for n, m in itertools.pairwise((3, 6, 1 + seed, 5, 2)):
      # exp of larger weights leaves the numbers that can be compared.
      kernel = 0.3 * rng.standard_normal((n, m))
      layers.append({"kernel": kernel, "bias": rng.standard_normal(m)})
      masks.append(rng.random((n, m)) < density)
    x = rng.standard_normal((4, 3))
    small, small_masks, kept = oracle.remove_dead_neurons(
      layers, masks, activation
    )
    exact(
      oracle.chain(small, small_masks, x, activation),
      oracle.chain(layers, masks, x, activation),
    )
    for before, after in itertools.pairwise(small_masks):
      self.assertTrue(before.any(0).all())
      self.assertTrue(after.any(1).all())
    for d, places in enumerate(kept):
      inputs = kept[d - 1] if d else list(range(3))
      np.testing.assert_array_equal(
        small[d]["kernel"], layers[d]["kernel"][np.ix_(inputs, places)]
      )
      np.testing.assert_array_equal(
        small_masks[d], masks[d][np.ix_(inputs, places)]
      )
    if density == 1:
      self.assertEqual([len(k) for k in kept], [6, 1 + seed, 5])
    if density == 0:
      self.assertEqual([len(k) for k in kept], [0, 0, 0])

  def test_constants_run_on_to_a_fixed_point(self):
    """One cut in front makes all of a line constant: only biases remain."""
    one = np.array([[1.0]])
    layers = [
      {"kernel": 2 * one, "bias": np.array([float(b)])} for b in (1, 2, 3)
    ]
    masks = [one == 0, one == 1, one == 1]
    small, _, kept = oracle.remove_dead_neurons(layers, masks, relu)
    self.assertEqual(kept, [[], []])
    self.assertEqual(small[2]["kernel"].shape, (0, 1))
    # relu(1) * 2 + 2 = 4, relu(4) * 2 + 3 = 11.
    self.assertEqual(small[2]["bias"].tolist(), [11.0])

  def test_what_nobody_reads_goes_backwards(self):
    one = np.array([[1.0]])
    layers = [{"kernel": one, "bias": np.array([1.0])} for _ in range(3)]
    masks = [one == 1, one == 1, one == 0]
    small, _, kept = oracle.remove_dead_neurons(layers, masks, relu)
    self.assertEqual(kept, [[], []])
    self.assertEqual(small[2]["bias"].tolist(), [1.0])


class TicketsTest(parameterized.TestCase):
  @parameterized.parameters((1, 0.2), (7, 0.5), (100, 0.2), (333, 0.37))
  def test_counts(self, size, share):
    counts = oracle.imp_counts(size, share, 6)
    run = oracle.imp_run([normal(k, size) for k in range(6)], share)
    self.assertEqual([m.sum() for m in run], counts)
    for n, count in enumerate(counts, 1):
      slack = oracle.imp_count_slack(share, n)
      self.assertAlmostEqual(count, size * (1 - share) ** n, delta=slack + 1e-9)

  def test_what_goes_is_the_smallest_of_what_is_left(self):
    trained = [normal(k, 4, 6) for k in range(4)]
    before = np.ones((4, 6), bool)
    for w, after in zip(trained, oracle.imp_run(trained, 0.3), strict=True):
      self.assertFalse((after & ~before).any())
      gone = before & ~after
      self.assertLess(abs(w[gone]).max(), abs(w[after]).min())
      before = after

  def test_masks_of_the_authors(self):
    w = normal(17, 6, 5)
    run = oracle.imp_run([w, 2 * w, 3 * w], 0.2, "authors")
    for a, b in zip(run, AUTHORS["lottery"], strict=True):
      np.testing.assert_array_equal(a, np.array(b, bool))

  def test_rewinding_and_averaging_keep_the_zeros(self):
    mask = normal(0, 3, 4) > 0
    copies = [oracle.rewind(normal(k, 3, 4), mask) for k in (1, 2, 3)]
    for k, c in zip((1, 2, 3), copies, strict=True):
      np.testing.assert_array_equal(c[mask], normal(k, 3, 4)[mask])
      self.assertFalse(c[~mask].any())
    average = oracle.soup(copies)
    exact(average, np.mean(copies, axis=0))
    np.testing.assert_array_equal(average != 0, mask)
    exact(oracle.soup(copies[:1]), copies[0])
