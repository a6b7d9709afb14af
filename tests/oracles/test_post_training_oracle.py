"""The oracle of post-training choices: algebra, sums by hand, and the authors.

data/post_training_authors.json has what the authors' own code chooses for
`inputs_and_weights`, and which of their conventions differ.
"""

import itertools
import json
import pathlib

from absl.testing import parameterized
import numpy as np

from tests.oracles import post_training as oracle

AUTHORS = json.loads(
  (
    pathlib.Path(__file__).parent / "data/post_training_authors.json"
  ).read_text()
)
RESULTS = AUTHORS["results"]
DEAD = (3, 40)
NMS = ((1, 2), (2, 4), (1, 4), (3, 4), (4, 8))


def inputs_and_weights():
  """x [256, 64], correlated and with means that are not zero; w [64, 48]."""
  rng = np.random.default_rng(0)
  x = rng.standard_normal((256, 64)) @ rng.standard_normal((64, 64)) / 8
  x = (x + 0.5 * rng.standard_normal(64)) * np.exp(rng.standard_normal(64))
  w = rng.standard_normal((64, 48))
  return x.astype(np.float32), w.astype(np.float32)


def small_layer(seed, inputs=16, outputs=6, rows=40, dead=()):
  """(w, the statistics of correlated inputs)."""
  rng = np.random.default_rng(seed)
  x = rng.standard_normal((rows, inputs)) + rng.standard_normal((rows, 1))
  x = x * np.exp(rng.standard_normal(inputs)) + rng.standard_normal(inputs)
  x[:, list(dead)] = 0.0
  return rng.standard_normal((inputs, outputs)), oracle.statistics(x)


def authors_layer():
  """(w, x, second, mean, variance) of `inputs_and_weights`, in float64."""
  x, w = (np.asarray(a, np.float64) for a in inputs_and_weights())
  second = x.T @ x / len(x)
  mean = x.mean(0)
  return w, x, second, mean, second.diagonal() - mean**2


def authors_mask(name):
  bits = np.frombuffer(bytes.fromhex(RESULTS[name]["kept"]), np.uint8)
  return np.unpackbits(bits).reshape(64, 48).astype(bool)


def cases(kind):
  return [n.split("/")[1] for n in RESULTS if n.split("/")[0] == kind]


class StatisticsTest(parameterized.TestCase):
  def test_equal_to_whole_arrays(self):
    x = np.random.default_rng(1).standard_normal((30, 5)) + 2.0
    got = oracle.statistics(x)
    self.assertEqual(got.count, 30)
    np.testing.assert_allclose(got.mean, x.mean(0), rtol=1e-13)
    np.testing.assert_allclose(got.second, x.T @ x / 30, rtol=1e-13)
    np.testing.assert_allclose(got.variance, x.var(0), rtol=1e-11)


class MaskTest(parameterized.TestCase):
  def test_wanda_by_hand(self):
    # Root mean squares 1, 2, 3, 4.
    second = np.diag([1.0, 4.0, 9.0, 16.0]) + 0.25 * (1.0 - np.eye(4))
    w = [[-7.0, 1.0], [3.0, -1.0], [2.0, 1.0], [-1.0, 0.0]]
    scores = oracle.wanda_scores(w, second)
    self.assertEqual(
      scores.tolist(), [[7.0, 1.0], [6.0, 2.0], [6.0, 3.0], [4.0, 0.0]]
    )
    expected = {
      # 6 and 6 tie in the first output: input 1 is kept.
      ("output", 0.5): [[1, 0], [1, 1], [0, 1], [0, 0]],
      ("tensor", 0.5): [[1, 0], [1, 0], [1, 0], [1, 0]],
      ("tensor", 0.25): [[1, 0], [1, 0], [0, 0], [0, 0]],
      (("nm", 1, 2), None): [[1, 0], [0, 1], [1, 1], [0, 0]],
      (("nm", 1, 4), None): [[1, 0], [0, 0], [0, 1], [0, 0]],
      (("nm", 3, 4), None): [[1, 1], [1, 1], [1, 1], [0, 0]],
      # Sums 16 and 13.
      (("blocks", 2, 2), 0.5): [[1, 1], [1, 1], [0, 0], [0, 0]],
      # Sums 13, 3, 10, 3: the tie goes to the upper block.
      (("blocks", 2, 1), 0.75): [[1, 1], [1, 1], [1, 0], [1, 0]],
    }
    for (structure, density), mask in expected.items():
      got = oracle.wanda_mask(w, second, density, structure)
      self.assertEqual(got.astype(int).tolist(), mask, (structure, density))

  def test_ties_and_halves(self):
    ones = np.ones((5, 2))
    # round(2.5) and round(7.5), halves to even.
    got = oracle.magnitude_mask(ones, 0.5, "output")
    self.assertEqual(got.astype(int).T.tolist(), [[1, 1, 0, 0, 0]] * 2)
    got = oracle.magnitude_mask(ones, 0.75, "tensor")
    self.assertEqual(got.astype(int).ravel().tolist(), [1] * 8 + [0] * 2)
    got = oracle.magnitude_mask(-np.ones((4, 1)), None, ("nm", 2, 4))
    self.assertEqual(got.astype(int).ravel().tolist(), [1, 1, 0, 0])

  def test_unit_norms_are_magnitude(self):
    w, _ = small_layer(2)
    correlated = 0.5 * np.ones((16, 16)) + 0.5 * np.eye(16)
    for structure in ("tensor", "output", ("nm", 2, 4), ("blocks", 4, 2)):
      np.testing.assert_array_equal(
        oracle.wanda_mask(w, correlated, 0.5, structure),
        oracle.magnitude_mask(w, 0.5, structure),
      )

  def test_uneven_groups_are_refused(self):
    for structure in (("nm", 1, 4), ("blocks", 4, 1), ("blocks", 1, 4)):
      with self.assertRaises(ValueError):
        oracle.magnitude_mask(np.ones((6, 6)), 0.5, structure)


class SparseGPTTest(parameterized.TestCase):
  @parameterized.product(block=(16, 128, 4, 5), dead=((), (2, 9)))
  def test_equal_to_direct_obs(self, block, dead):
    w, stats = small_layer(3, dead=dead)
    choices = [{"density": d} for d in (0.1, 0.5, 0.8, 1.0)]
    if block != 5:
      choices += [{"nm": nm} for nm in NMS if nm[1] <= block]
    for choice in choices:
      new, mask = oracle.sparsegpt(w, stats.second, block=block, **choice)
      direct = oracle.column_by_column_obs(w, stats.second, mask)
      np.testing.assert_allclose(new, direct, rtol=1e-9, atol=1e-11)
      self.assertTrue((new[~mask] == 0).all())
      self.assertTrue((new[list(dead)] == 0).all())

  def test_direct_obs_is_the_best_of_what_may_move(self):
    # After input i the later ones minimise the error given those up to i.
    w, stats = small_layer(4, inputs=6, outputs=1)
    hessian, _ = oracle.damped(stats.second, 0.01)
    for pattern in itertools.product((False, True), repeat=6):
      mask = np.array(pattern)[:, None]
      for i in range(1, 6):
        # Nothing is pruned from i on.
        upto = mask | (np.arange(6) >= i)[:, None]
        new = oracle.column_by_column_obs(w, stats.second, upto)
        change = new[:i] - w[:i]
        best = w[i:] - np.linalg.solve(
          hessian[i:, i:], hessian[i:, :i] @ change
        )
        np.testing.assert_allclose(new[i:], best, rtol=1e-9, atol=1e-11)

  @parameterized.parameters(128, 4)
  def test_counts(self, block):
    w, stats = small_layer(5, inputs=16, outputs=5)
    for density in (0.0, 0.3, 0.5, 0.77, 1.0):
      _, mask = oracle.sparsegpt(w, stats.second, density, block=block)
      for start in range(0, 16, block):
        part = mask[start : start + block]
        self.assertEqual((~part).sum(), round((1 - density) * part.size))
    for n, m in NMS:
      if m <= block:
        _, mask = oracle.sparsegpt(w, stats.second, nm=(n, m), block=block)
        kept = mask.reshape(16 // m, m, 5).sum(1)
        np.testing.assert_array_equal(kept, np.full(kept.shape, n))

  @parameterized.product(
    blocks=((1, 1), (2, 3), (4, 1), (4, 2), (8, 6)),
    block=(16, 128, 8),
    dead=((), (2, 9)),
  )
  def test_blocks(self, blocks, block, dead):
    w, stats = small_layer(9, dead=dead)
    bk, bn = blocks
    for density in (0.0, 0.3, 0.5, 0.77, 1.0):
      choice = dict(blocks=blocks, block=block)
      new, mask = oracle.sparsegpt(w, stats.second, density, **choice)
      direct = oracle.column_by_column_obs(w, stats.second, mask)
      np.testing.assert_allclose(new, direct, rtol=1e-9, atol=1e-11)
      whole = mask.reshape(16 // bk, bk, 6 // bn, bn).swapaxes(1, 2)
      np.testing.assert_array_equal(whole.all((2, 3)), whole.any((2, 3)))
      # The first strip is chosen by the weights as they come.
      hessian, _ = oracle.damped(stats.second, 0.01)
      upper = np.linalg.cholesky(np.linalg.inv(hessian)).T
      strip = min(block, 16)
      came = np.where(np.isin(np.arange(16), dead)[:, None], 0.0, w)[:strip]
      scores = (came / upper.diagonal()[:strip, None]) ** 2
      chosen = oracle.choose(scores, density, ("blocks", *blocks))
      np.testing.assert_array_equal(mask[:strip], chosen)
      for start in range(0, 16, strip):
        number = strip // bk * (6 // bn)
        self.assertEqual(
          mask[start : start + strip].sum(), round(density * number) * bk * bn
        )

  def test_blocks_of_one_are_weights(self):
    w, stats = small_layer(10)
    for density in (0.25, 0.5, 0.75):
      one = oracle.sparsegpt(w, stats.second, density, block=8)
      two = oracle.sparsegpt(w, stats.second, density, blocks=(1, 1), block=8)
      np.testing.assert_array_equal(one[0], two[0])

  def test_blocks_by_hand(self):
    # 2.5 blocks are 2. Two sums tie: the upper one is kept.
    w = np.array([[3.0], [1.0], [2.0], [1.0], [2.0]])
    _, mask = oracle.sparsegpt(w, np.eye(5), 0.5, blocks=(1, 1))
    self.assertEqual(mask.astype(int).ravel().tolist(), [1, 0, 1, 0, 0])
    # Two inputs that are almost the same: what the first strip loses comes to
    # the second before that is chosen, and its first block is then the larger.
    w = np.array([[1.0, 0.0, 3.0], [1.0, 1.5, 0.0]])
    second = np.array([[1.0, 1.0], [1.0, 1.0 + 1e-9]])
    options = dict(blocks=(1, 1), block=1, damping=0.0)
    new, mask = oracle.sparsegpt(w, second, 1 / 3, **options)
    self.assertEqual(mask.astype(int).tolist(), [[0, 0, 1], [1, 0, 0]])
    np.testing.assert_allclose(new[1], [2.0, 0.0, 0.0], rtol=1e-6)

  def test_blocks_that_do_not_fit_are_refused(self):
    w, stats = small_layer(8)
    for options in (
      dict(density=0.5, blocks=(3, 1)),
      dict(density=0.5, blocks=(2, 4)),
      dict(density=0.5, blocks=(4, 2), block=6),
      dict(blocks=(4, 2)),
      dict(blocks=(4, 2), nm=(2, 4)),
      dict(density=0.5, blocks=(4, 2), nm=(2, 4)),
    ):
      with self.assertRaises(ValueError):
        oracle.sparsegpt(w, stats.second, **options)

  def test_ties_keep_the_lowest_index(self):
    ones = np.ones((4, 2))
    for choice in ({"density": 0.375}, {"nm": (1, 4)}):
      _, mask = oracle.sparsegpt(ones, np.eye(4), **choice)
      expected = [1, 1, 1, 0, 0, 0, 0, 0] if "density" in choice else [1, 1]
      expected += [0] * (8 - len(expected))
      self.assertEqual(mask.astype(int).ravel().tolist(), expected)

  def test_without_correlation_nothing_moves(self):
    w, stats = small_layer(6)
    second = np.diag(stats.second.diagonal())
    for damping in (0.0, 0.01):
      new, mask = oracle.sparsegpt(w, second, 0.5, damping=damping)
      np.testing.assert_array_equal(new, np.where(mask, w, 0.0))
    # And undamped the scores are the squares of Wanda's.
    _, mask = oracle.sparsegpt(w, second, 0.5, damping=0.0)
    wanda = oracle.wanda_mask(w, second, 0.5, "tensor")
    np.testing.assert_array_equal(mask, wanda)

  def test_scale_matters_only_with_dead_inputs(self):
    for dead, same in (((), True), ((2, 9), False)):
      w, stats = small_layer(7, dead=dead)
      one, _ = oracle.sparsegpt(w, stats.second, 0.5, damping=0.1)
      two, _ = oracle.sparsegpt(w, 64.0 * stats.second, 0.5, damping=0.1)
      self.assertEqual(np.allclose(one, two, rtol=1e-9, atol=1e-12), same)

  @parameterized.parameters(*range(10, 20))
  def test_better_than_without_an_update(self, seed):
    w, stats = small_layer(seed, inputs=32, outputs=12, rows=100)
    choices = [(0.5, None, "tensor"), (0.3, None, "tensor")]
    choices += [(None, nm, ("nm", *nm)) for nm in ((2, 4), (1, 4))]
    for density, nm, structure in choices:
      new, mask = oracle.sparsegpt(w, stats.second, density, nm=nm)
      error = oracle.reconstruction_error(w, new, stats.second)
      for other in (
        np.where(mask, w, 0.0),
        np.where(oracle.magnitude_mask(w, density, structure), w, 0.0),
        np.where(
          oracle.wanda_mask(w, stats.second, density, structure), w, 0.0
        ),
      ):
        self.assertLess(
          error, oracle.reconstruction_error(w, other, stats.second)
        )

  def test_groups_across_blocks_are_refused(self):
    w, stats = small_layer(8)
    for block in (2, 6):
      with self.assertRaises(ValueError):
        oracle.sparsegpt(w, stats.second, nm=(2, 4), block=block)
    with self.assertRaises(ValueError):
      oracle.sparsegpt(w[:6], stats.second[:6, :6], nm=(2, 4))

  @parameterized.parameters(cases("sparsegpt"))
  def test_authors(self, case):
    result = RESULTS[f"sparsegpt/{case}"]
    options = result["arguments"]
    w, x, second, *_ = authors_layer()
    if case == "dead":
      x[:, list(DEAD)] = 0.0
      second = 2.0 * x.T @ x
    block = options.get("blocksize", 128)
    if "prunem" in options:
      m = options["prunem"]
      choice = {"nm": (m - options["prunen"], m)}
    else:
      size = min(block, 64) * 48
      choice = {"density": 1 - (int(size * options["sparsity"]) + 1) / size}
    new, mask = oracle.sparsegpt(w, second, block=block, **choice)
    np.testing.assert_array_equal(mask, authors_mask(f"sparsegpt/{case}"))
    if "output_0" in result:
      np.testing.assert_allclose(new[:, 0], result["output_0"], atol=1e-5)


class DSnoTTest(parameterized.TestCase):
  @parameterized.product(m=(None, 4, 8), power=(0, 0.5, 1), seed=(20, 21))
  def test_error_falls_and_counts_stay(self, m, power, seed):
    w, stats = small_layer(seed, inputs=48, outputs=48, rows=60)
    structure = ("nm", m // 2, m) if m else "output"
    start = oracle.wanda_mask(w, stats.second, 0.5, structure)
    layer = (w, start, stats.mean, stats.variance, stats.second)
    options = dict(threshold=0.01, power=power, m=m)
    errors = oracle.expected_error(w, start, stats.mean)
    mask = start.copy()
    all_swaps = oracle.dsnot_swaps(*layer, **options)
    self.assertGreater(sum(map(len, all_swaps)), 16)
    for j, swaps in enumerate(all_swaps):
      error = errors[j]
      for swap in swaps:
        self.assertGreaterEqual(abs(error), 0.01)
        self.assertLess(abs(swap.error), abs(error))
        self.assertGreaterEqual(swap.error * error, 0)
        self.assertTrue(mask[swap.pruned, j] and not mask[swap.regrown, j])
        mask[swap.pruned, j], mask[swap.regrown, j] = False, True
        error = oracle.expected_error(w, mask, stats.mean)[j]
        np.testing.assert_allclose(swap.error, error, atol=1e-12)
    np.testing.assert_array_equal(oracle.dsnot(*layer, **options), mask)
    groups = (48 // (m or 48), m or 48, 48)
    np.testing.assert_array_equal(
      mask.reshape(groups).sum(1), start.reshape(groups).sum(1)
    )

  def test_better_than_random_swaps(self):
    w, stats = small_layer(22, inputs=48, outputs=24, rows=100)
    start = oracle.wanda_mask(w, stats.second, 0.5)
    layer = (w, start, stats.mean, stats.variance, stats.second)
    mask = oracle.dsnot(*layer, threshold=0.01)
    swaps = oracle.dsnot_swaps(*layer, threshold=0.01)
    rng = np.random.default_rng(23)
    random = start.copy()
    for j in range(24):
      k = len(swaps[j])
      random[rng.choice(np.flatnonzero(start[:, j]), k, False), j] = False
      random[rng.choice(np.flatnonzero(~start[:, j]), k, False), j] = True
    size = lambda m: np.abs(oracle.expected_error(w, m, stats.mean)).mean()
    self.assertLess(size(mask), size(start))
    self.assertLess(size(mask), size(random))

  def test_by_hand(self):
    # Pruned: 0, 1, 2; e = 5 + 4 - 1 = 8. Kept: 3, 4, 5, 6.
    w = np.array([[5.0], [4.0], [-1.0], [-1.0], [-1.0], [1.0], [-0.5]])
    mask = np.arange(7)[:, None] >= 3
    ones = np.ones(7)

    def swaps(second, **options):
      (got,) = oracle.dsnot_swaps(w, mask, ones, ones, second, **options)
      return [(s.regrown, s.pruned, s.error) for s in got]

    # 6 has the lowest score; then e = 2.5, and regrowing 1 would turn it.
    self.assertEqual(swaps(np.eye(7)), [(0, 6, 2.5)])
    # 3 and 4 tie before 6: the later one goes.
    second = np.diag([1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 16.0])
    self.assertEqual(swaps(second), [(0, 4, 2.0)])
    # 5 is the lowest, but to prune it would not make e smaller.
    second = np.diag([1.0, 1.0, 1.0, 1.0, 1.0, 0.01, 1.0])
    self.assertEqual(swaps(second), [(0, 6, 2.5)])
    self.assertEqual(swaps(second, any_sign=True), [(0, 5, 4.0)])
    # Past the turn: 1 and 4 to -2.5; then 2 comes back, 5 goes, to -0.5.
    self.assertEqual(
      swaps(np.eye(7), stop_at_flip=False),
      [(0, 6, 2.5), (1, 4, -2.5), (2, 5, -0.5)],
    )
    self.assertEqual(swaps(np.eye(7), cycles=0), [])
    self.assertEqual(swaps(np.eye(7), threshold=8.0), [(0, 6, 2.5)])
    self.assertEqual(swaps(np.eye(7), threshold=8.5), [])

  def test_to_zero(self):
    w = np.array([[3.0], [1.0], [-1.0], [-1.0]])
    mask = np.array([[False], [False], [True], [True]])
    got = oracle.dsnot_swaps(w, mask, np.ones(4), np.ones(4), np.eye(4))
    self.assertEqual(got, [[oracle.Swap(0, 3, 0.0)]])

  def test_groups(self):
    # The first group has the best to regrow, but nothing to prune for it.
    w = np.array([[9.0], [1.0], [5.0], [-1.0]])
    mask = np.array([[False], [True], [False], [True]])
    layer = (w, mask, np.ones(4), np.ones(4), np.eye(4))
    self.assertEqual(oracle.dsnot_swaps(*layer), [[oracle.Swap(0, 3, 4.0)]])
    self.assertEqual(
      oracle.dsnot_swaps(*layer, m=2), [[oracle.Swap(2, 3, 8.0)]]
    )

  def test_inputs_that_do_not_vary_come_first(self):
    w = np.array([[9.0], [1.0], [0.5], [-1.0]])
    mask = np.array([[False], [False], [False], [True]])
    variance = np.array([1.0, -1e-9, 0.0, 1.0])
    layer = (w, mask, np.ones(4), variance, np.eye(4))
    self.assertEqual(oracle.dsnot_swaps(*layer)[0][0].regrown, 1)
    self.assertEqual(oracle.dsnot_swaps(*layer, power=0)[0][0].regrown, 0)

  @parameterized.parameters(cases("dsnot"))
  def test_authors(self, case):
    options = RESULTS[f"dsnot/{case}"]["arguments"]
    w, _, second, mean, variance = authors_layer()
    m = options.get("prune_m")
    structure = ("nm", m - options["prune_n"], m) if m else "output"
    if options["initial_method"] == "wanda":
      start = oracle.wanda_mask(w, second, 0.5, structure)
    else:
      start = oracle.magnitude_mask(w, 0.5, structure)
    mask = oracle.dsnot(
      w,
      start,
      mean,
      variance,
      second,
      cycles=options["max_cycle_time"],
      threshold=options["update_threshold"] / 256,
      power=options["pow_of_var_regrowing"],
      m=m,
      stop_at_flip=m is not None or not options["without_same_sign"],
      any_sign=m is not None,
    )
    self.assertGreater((mask != start).sum(), 48)
    np.testing.assert_array_equal(mask, authors_mask(f"dsnot/{case}"))


class OWLTest(parameterized.TestCase):
  def scores(self):
    rng = np.random.default_rng(30)
    sizes = ((8, 8), (16, 8), (4, 4), (32, 32))
    return [np.exp(p * rng.standard_normal(s)) for p, s in enumerate(sizes, 1)]

  @parameterized.product(sparsity=(0.5, 0.7), lam=(0.02, 0.08, 0.2))
  def test_mean_width_and_order(self, sparsity, lam):
    scores = self.scores()
    got = oracle.owl(scores, sparsity, lam=lam, outlier=3.0)
    sizes = [s.size for s in scores]
    np.testing.assert_allclose(
      np.dot(got, sizes), sparsity * sum(sizes), rtol=1e-12
    )
    np.testing.assert_allclose(max(got) - min(got), 2 * lam, rtol=1e-12)
    shares = [oracle.outlier_share(s, 3.0) for s in scores]
    self.assertEqual(
      np.argsort(shares).tolist(), np.argsort(got)[::-1].tolist()
    )

  def test_by_hand(self):
    # Means 1, 2, 1; above twice that: 1/8, 2/8, none.
    scores = [
      [3.0, 0.0, 2.0, 1.0, 1.0, 1.0, 0.0, 0.0],
      [8.0, 8.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0],
      [1.0] * 8,
    ]
    shares = [oracle.outlier_share(s, 2.0) for s in scores]
    self.assertEqual(shares, [0.125, 0.25, 0.0])
    got = oracle.owl(scores, 0.5, lam=0.25, outlier=2.0)
    self.assertEqual(got, [0.5, 0.25, 0.75])
    # The last layer four times as large: the mean was 0.625 before the shift.
    scores[2] *= 4
    got = oracle.owl(scores, 0.5, lam=0.25, outlier=2.0)
    self.assertEqual(got, [0.375, 0.125, 0.625])

  @parameterized.parameters(cases("owl"))
  def test_authors(self, case):
    result = RESULTS[f"owl/{case}"]
    options = result["arguments"]
    w, _, second, *_ = authors_layer()
    scores = [oracle.wanda_scores(w * np.abs(w) ** p, second) for p in range(4)]
    shares = [oracle.outlier_share(s, options["Hyper_m"]) for s in scores]
    np.testing.assert_allclose(
      np.multiply(shares, 100), result["outlier_percent"], rtol=1e-12
    )
    got = oracle.owl(
      scores,
      options["sparsity_ratio"],
      lam=options["Lamda"],
      outlier=options["Hyper_m"],
    )
    np.testing.assert_allclose(
      np.subtract(1, got), result["density"], rtol=1e-12
    )


class AuthorsTest(parameterized.TestCase):
  def test_the_input_is_theirs(self):
    x, w = inputs_and_weights()
    np.testing.assert_allclose(x.sum(dtype=float), AUTHORS["sums"]["x"])
    np.testing.assert_allclose(w.sum(dtype=float), AUTHORS["sums"]["w"])

  @parameterized.parameters(cases("prune_wanda"))
  def test_wanda(self, case):
    options = RESULTS[f"prune_wanda/{case}"]["arguments"]
    w, _, second, *_ = authors_layer()
    if "prune_m" in options:
      m = options["prune_m"]
      choice = (None, ("nm", m - options["prune_n"], m))
    else:
      choice = ((64 - int(64 * options["sparsity_ratio"])) / 64, "output")
    mask = oracle.wanda_mask(w, second, *choice)
    np.testing.assert_array_equal(mask, authors_mask(f"prune_wanda/{case}"))

  @parameterized.parameters(cases("prune_magnitude"))
  def test_magnitude(self, case):
    options = RESULTS[f"prune_magnitude/{case}"]["arguments"]
    w, *_ = authors_layer()
    if "prune_m" in options:
      m = options["prune_m"]
      choice = (None, ("nm", m - options["prune_n"], m))
    else:
      pruned = int(w.size * options["sparsity_ratio"]) + 1
      choice = ((w.size - pruned) / w.size, "tensor")
    mask = oracle.magnitude_mask(w, *choice)
    np.testing.assert_array_equal(mask, authors_mask(f"prune_magnitude/{case}"))
