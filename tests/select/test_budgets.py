"""Budgets and roundings: against the oracles, and what they promise."""

import math

from absl.testing import parameterized
from hypothesis import given
from hypothesis import strategies as st

from sparsejax.select import budgets
from tests.oracles import before_training
from tests.oracles import select as oracle

DIMS = st.integers(1, 40)
SHAPES = st.lists(
  st.tuples(DIMS, DIMS) | st.tuples(DIMS, DIMS, DIMS, DIMS),
  min_size=1,
  max_size=6,
).map(lambda shapes: {f"layers/{i}": s for i, s in enumerate(shapes)})
DENSITIES = st.floats(0.01, 1) | st.sampled_from([0.0, 0.1, 0.5, 1.0])
NAMES = (
  "uniform",
  "uniform_plus",
  "er",
  "erk",
  "erk_plus",
  "balanced",
  "pyramidal",
)


def total(shapes, densities):
  return math.fsum(d * math.prod(shapes[n]) for n, d in densities.items())


def wanted(shapes, density):
  return density * sum(math.prod(s) for s in shapes.values())


class BudgetsTest(parameterized.TestCase):
  @parameterized.parameters(*NAMES)
  @given(shapes=SHAPES, density=DENSITIES)
  def test_equals_oracle(self, name, shapes, density):
    near = before_training if name in ("balanced", "pyramidal") else oracle
    try:
      want = getattr(near, name)(shapes, density)
    except ValueError:
      with self.assertRaisesRegex(ValueError, "^density is too low"):
        budgets.BUDGETS[name](shapes, density)
      return
    got = budgets.BUDGETS[name](shapes, density)
    self.assertEqual(list(got), list(shapes))
    for n in shapes:
      self.assertAlmostEqual(got[n], want[n], delta=1e-9)

  @parameterized.parameters(*NAMES)
  @given(shapes=SHAPES, density=DENSITIES)
  def test_meets_the_density_within_caps(self, name, shapes, density):
    try:
      got = budgets.BUDGETS[name](shapes, density)
    except ValueError:  # only where the layers to be dense are too many
      self.assertIn(name, ("uniform_plus", "erk_plus"))
      return
    target = wanted(shapes, density)
    self.assertAlmostEqual(total(shapes, got), target, delta=1e-9 * target)
    for d in got.values():
      self.assertBetween(d, 0, 1)

  @given(shapes=SHAPES, density=DENSITIES, more=st.floats(0, 0.5))
  def test_more_density_is_more_everywhere(self, shapes, density, more):
    for name in ("er", "erk", "balanced", "pyramidal"):
      low = budgets.BUDGETS[name](shapes, density)
      high = budgets.BUDGETS[name](shapes, min(1.0, density + more))
      for n in shapes:
        self.assertLessEqual(low[n], high[n] + 1e-9)

  @given(shapes=SHAPES, density=st.floats(0.05, 0.95))
  def test_density_follows_the_share(self, shapes, density):
    got = budgets.erk(shapes, density)
    raw = {n: sum(s) / math.prod(s) for n, s in shapes.items()}
    below = [got[n] / raw[n] for n in shapes if got[n] < 1]
    for scale in below:
      self.assertAlmostEqual(scale, below[0], delta=1e-9 * scale)
    for n in shapes:
      if got[n] == 1 and below:  # a capped layer asked for at least as much
        self.assertGreaterEqual(below[0] * raw[n], 1 - 1e-9)

  def test_uniform_plus(self):
    shapes = {"first": (2, 10), "middle": (14, 20), "last": (10, 10)}
    got = budgets.uniform_plus(shapes, 0.2)
    self.assertEqual((got["first"], got["last"]), (1.0, 0.2))
    got = budgets.uniform_plus(shapes, 0.525)
    self.assertEqual(got, {"first": 1.0, "middle": 0.5, "last": 0.5})

  @parameterized.parameters(2, 3, 5)
  def test_uniform_plus_of_few_layers(self, count):
    shapes = {str(i): (4, 8 * 4**i) for i in range(count)}
    got = budgets.uniform_plus(shapes, 0.6)
    self.assertEqual(got["0"], 1.0)
    rest = [got[n] for n in list(shapes)[1:]]
    self.assertLen(set(rest), 1)
    self.assertAlmostEqual(total(shapes, got), wanted(shapes, 0.6))
    with self.assertRaisesRegex(ValueError, "^density is too low"):
      budgets.uniform_plus(shapes, 1 / 4**count)

  def test_erk_plus_keeps_the_last_layer_dense(self):
    shapes = {"a": (2, 2), "b": (20, 20), "c": (4, 28)}
    got = budgets.erk_plus(shapes, 162 / 516)
    self.assertEqual(got["c"], 1.0)
    self.assertAlmostEqual(got["b"], 0.115)

  @given(shapes=SHAPES, density=st.floats(0.05, 0.95))
  def test_balanced_gives_all_that_it_can(self, shapes, density):
    got = budgets.balanced(shapes, density)
    kept = {n: d * math.prod(shapes[n]) for n, d in got.items()}
    most = max(kept.values())
    for n, k in kept.items():  # less than the others only where there is less
      self.assertAlmostEqual(k, min(most, math.prod(shapes[n])), delta=1e-9 * k)

  def test_balanced_meets_the_density_where_the_authors_code_does_not(self):
    shapes = {"a": (2, 2), "b": (4, 4)}
    self.assertEqual(budgets.balanced(shapes, 0.5), {"a": 1.0, "b": 0.375})
    missed = before_training.balanced(shapes, 0.5, redistribute=False)
    self.assertEqual(missed, {"a": 1.0, "b": 0.3125})

  @given(shapes=SHAPES, density=st.floats(0.05, 0.95))
  def test_pyramidal_falls_by_one_factor(self, shapes, density):
    got = list(budgets.pyramidal(shapes, density).values())
    for i, d in enumerate(got):
      self.assertAlmostEqual(d, got[0] ** (i + 1), delta=1e-12)

  def test_pyramidal_follows_the_order_of_layers(self):
    got = budgets.pyramidal({"z": (2, 2), "a": (4, 4)}, 0.3)
    self.assertEqual(got, {"z": 0.5, "a": 0.25})  # 4 / 2 + 16 / 4 = 0.3 * 20

  def test_a_density_that_the_dense_layers_just_fit(self):
    # 0.29 * 100 is 28.999... in floating point, and 29 weights fit.
    got = budgets.erk_plus({"a": (71, 1), "b": (29, 1)}, 0.29)
    self.assertEqual(got["b"], 1.0)
    self.assertAlmostEqual(got["a"], 0.0)

  @parameterized.parameters(*NAMES)
  def test_no_and_all_weights(self, name):
    shapes = {"a": (3, 3, 4, 8), "b": (8, 16), "c": (16, 2)}
    full = budgets.BUDGETS[name](shapes, 1.0)
    self.assertEqual(full, dict.fromkeys(shapes, 1.0))
    self.assertEqual(budgets.BUDGETS[name]({}, 0.5), {})
    if name not in ("uniform_plus", "erk_plus"):
      none = budgets.BUDGETS[name](shapes, 0.0)
      self.assertEqual(none, dict.fromkeys(shapes, 0.0))

  @parameterized.parameters(*NAMES)
  def test_empty_layers_change_nothing(self, name):
    shapes = {"a": (8, 16), "b": (0, 16), "c": (16, 4)}
    got = budgets.BUDGETS[name](shapes, 0.75)
    self.assertAlmostEqual(total(shapes, got), wanted(shapes, 0.75))

  @parameterized.parameters(*NAMES)
  def test_density_outside_zero_to_one(self, name):
    for density in (-0.1, 1.1, math.nan, math.inf):
      with self.assertRaisesRegex(ValueError, r"^density must be in \[0, 1\]"):
        budgets.BUDGETS[name]({"a": (4, 4), "b": (8, 8)}, density)

  def test_names(self):
    self.assertEqual(tuple(budgets.BUDGETS), NAMES)


QUOTAS = st.lists(
  st.integers(0, 5000).map(lambda i: i / 8)
  | st.floats(0, 1000).map(lambda q: round(q, 3)),
  max_size=8,
).map(lambda quotas: {str(i): q for i, q in enumerate(quotas)})


class LargestRemainderTest(parameterized.TestCase):
  @given(quotas=QUOTAS)
  def test_equals_oracle(self, quotas):
    got = budgets.largest_remainder(quotas)
    whole = round(math.fsum(quotas.values()), 6)
    want = oracle.largest_remainder(
      [round(q, 6) for q in quotas.values()], round(whole)
    )
    self.assertEqual(list(got.values()), want)

  @given(quotas=QUOTAS)
  def test_sum_and_distance(self, quotas):
    got = budgets.largest_remainder(quotas)
    self.assertEqual(list(got), list(quotas))
    self.assertEqual(sum(got.values()), round(sum(quotas.values())))
    for n, q in quotas.items():
      self.assertIsInstance(got[n], int)
      self.assertLess(abs(got[n] - q), 1)  # so a whole quota is met

  @given(
    sizes=st.lists(st.integers(1, 10**6), min_size=1, max_size=6),
    hundredths=st.integers(0, 100),
  )
  def test_exact_quotas_are_not_changed_by_rounding(self, sizes, hundredths):
    density = hundredths / 100
    quotas = {str(i): density * 100 * s for i, s in enumerate(sizes)}
    got = budgets.largest_remainder(quotas)
    self.assertEqual(list(got.values()), [hundredths * s for s in sizes])

  @given(quotas=QUOTAS)
  def test_the_larger_remainder_is_rounded_up_first(self, quotas):
    got = budgets.largest_remainder(quotas)
    up = [n for n, q in quotas.items() if got[n] > q]
    down = [n for n, q in quotas.items() if got[n] < q]
    for a in up:
      for b in down:
        left, right = quotas[a] % 1, quotas[b] % 1
        self.assertGreaterEqual(left, right - 1e-6)

  def test_ties_go_to_the_earlier_name(self):
    got = budgets.largest_remainder({"z": 0.5, "a": 0.5, "m": 1.0})
    self.assertEqual(got, {"z": 1, "a": 0, "m": 1})
