"""Rules against plain Python, pair by pair and tile by tile."""

import itertools
import operator

from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np

import pallas_kernels as pk
from pallas_kernels import rules
from tests.kernels import problem


def causal(q, k):
  return k <= q


def window(left, right=0):
  return lambda q, k: q - left <= k <= q + right


def both(*fs):
  return lambda q, k: all(f(q, k) for f in fs)


def one_of(*fs):
  return lambda q, k: any(f(q, k) for f in fs)


def even(q, k):  # without classify
  return (q + k) % 2 == 0


CAUSAL, NEAR = pk.Causal(), pk.Window(2, 1)
# The rule, what it means, and whether classify is exact for ranges.
RULES = dict(
  causal=(CAUSAL, causal, True),
  window=(NEAR, window(2, 1), True),
  window_left=(pk.Window(3), window(3), True),
  window_itself=(pk.Window(0), window(0), True),
  window_right=(pk.Window(left=0, right=4), window(0, 4), True),
  and_=(CAUSAL & NEAR, both(causal, window(2, 1)), False),
  or_=(CAUSAL | NEAR, one_of(causal, window(2, 1)), False),
  nested=(
    (CAUSAL & pk.Window(1)) | (pk.Window(0, 3) & NEAR),
    one_of(both(causal, window(1)), both(window(0, 3), window(2, 1))),
    False,
  ),
  user=(even, even, False),
  user_and=(CAUSAL & even, both(causal, even), False),
  user_or=(CAUSAL | even, one_of(causal, even), False),
)
SPAN = np.arange(-4, 9)


def tiles():
  """Sets of positions: all short ranges, and sets with gaps."""
  ranges = [
    tuple(range(a, a + n)) for a in SPAN for n in (1, 2, 4) if a + n <= 9
  ]
  return ranges, [(-4, 0), (0, 5, 8), (3, 1, -2), (7, 7), (2, 4, 6)]


class RulesTest(parameterized.TestCase):
  @parameterized.named_parameters((n, *row) for n, row in RULES.items())
  def test_means_what_it_says(self, rule, plain, _):
    table = problem.jit(lambda q, k: rule(q[:, None], k))(SPAN, SPAN)
    want = [[plain(int(q), int(k)) for k in SPAN] for q in SPAN]
    self.assertEqual(table.dtype, bool)
    np.testing.assert_array_equal(table, want)

  @parameterized.named_parameters((n, *row) for n, row in RULES.items())
  def test_classify_agrees_with_brute_force(self, rule, plain, exact):
    ranges, scattered = tiles()
    pairs = [*itertools.product(ranges, ranges)]
    pairs += itertools.product(scattered, ranges + scattered)
    pairs += itertools.product(ranges, scattered)
    bounds = [(min(q), max(q), min(k), max(k)) for q, k in pairs]
    bounds = np.asarray(bounds, np.int32).T
    got = problem.jit(lambda *b: rules.classify(rule, *b))(*bounds)
    self.assertEqual((got.dtype, got.shape), (jnp.int32, (len(pairs),)))
    table = {(q, k): plain(int(q), int(k)) for q in SPAN for k in SPAN}
    in_range = len(ranges) ** 2
    for i, (q, k) in enumerate(pairs):
      found = [table[pair] for pair in itertools.product(q, k)]
      want = rules.PARTIAL
      if all(found):
        want = rules.WHOLE
      if not any(found):
        want = rules.SKIP
      # PARTIAL is always right, if slow.
      allowed = (want,) if exact and i < in_range else (want, rules.PARTIAL)
      self.assertIn(int(got[i]), allowed, (q, k))

  def test_combinations_are_told_apart_from_their_parts(self):
    """What `&` and `|` can tell of a tile, they do."""
    tile = dict(q_min=4, q_max=5, k_min=0, k_max=3)

    def classify(rule, **changed):
      return int(rules.classify(rule, **tile | changed))

    self.assertEqual(classify(CAUSAL & pk.Window(9)), rules.WHOLE)
    self.assertEqual(classify(CAUSAL & pk.Window(0)), rules.SKIP)
    self.assertEqual(classify(CAUSAL & pk.Window(2)), rules.PARTIAL)
    self.assertEqual(classify(CAUSAL | pk.Window(0)), rules.WHOLE)
    self.assertEqual(
      classify(CAUSAL | pk.Window(2), k_min=8, k_max=9), rules.SKIP
    )
    self.assertEqual(classify(CAUSAL & even), rules.PARTIAL)
    self.assertEqual(classify(pk.Window(0) & even), rules.SKIP)
    self.assertEqual(classify(CAUSAL | even), rules.WHOLE)

  @parameterized.parameters(CAUSAL, NEAR, CAUSAL & NEAR, CAUSAL | NEAR, even)
  def test_classify_broadcasts(self, rule):
    q = jnp.arange(6).reshape(2, 3, 1)
    got = rules.classify(rule, q, q + 1, jnp.arange(4), 5)
    self.assertEqual((got.shape, got.dtype), ((2, 3, 4), jnp.int32))

  def test_equal_rules_are_equal(self):
    same = [
      (pk.Causal(), pk.Causal()),
      (pk.Window(3), pk.Window(left=3, right=0)),
      (pk.Causal() & pk.Window(3), pk.Causal() & pk.Window(3)),
      (pk.Causal() | even, pk.Causal() | even),
    ]
    for a, b in same:
      self.assertEqual(a, b)
      self.assertEqual(hash(a), hash(b))
    different = [CAUSAL, pk.Window(3), pk.Window(3, 1), CAUSAL & NEAR]
    different += [CAUSAL | NEAR, CAUSAL & even]
    self.assertLen(set(different), len(different))

  def test_classes_are_ordered(self):
    self.assertEqual((rules.SKIP, rules.PARTIAL, rules.WHOLE), (0, 1, 2))

  @parameterized.parameters(
    (dict(left=-1), "^left is -1; it must be an integer"),
    (dict(left=1, right=-2), "^right is -2; it must be an integer"),
    (dict(left=True), "^left is True; it must be an integer"),
    (dict(left=1.5), "^left is 1.5; it must be an integer"),
  )
  def test_bad_windows(self, settings, message):
    with self.assertRaisesRegex(ValueError, message):
      pk.Window(**settings)

  def test_a_window_of_numpys_integers(self):
    self.assertEqual(pk.Window(np.int64(3)), pk.Window(3))
    self.assertIs(type(pk.Window(np.int64(3)).left), int)

  @parameterized.parameters(None, pk.Causal, 3)
  def test_joins_with_what_is_no_rule(self, other):
    for join in (operator.and_, operator.or_):
      with self.assertRaisesRegex(ValueError, "of a rule and"):
        join(CAUSAL, other)

  @parameterized.parameters(
    (pk.Causal, r"rule is .*callable.* Did you mean Causal\(\)\?"),
    ([1], r"^rule is \[1\]; it must be callable"),
    (lambda q: q > 0, "^rule is .* must give bools: .*positional"),
    (lambda q, k: q - k, "^rule is .*, which gives int32; .* must give bools"),
    (lambda q, k: q > k and k > 3, "^rule is .*takes the truth of an array"),
  )
  def test_what_is_no_rule(self, rule, message):
    with self.assertRaisesRegex(ValueError, message):
      rules.check(rule)

  @parameterized.parameters(operator.and_, operator.or_)
  def test_far_apart_positions(self, join):
    """Offsets of a long context, and negative ones."""
    rule = join(CAUSAL, pk.Window(10, 10))
    far = 2**30
    for q, k in [(far, -far + 1), (-far, far - 1), (far, far - 5)]:
      plain = all if join is operator.and_ else any
      want = plain((k <= q, q - 10 <= k <= q + 10))
      self.assertEqual(bool(rule(jnp.int32(q), jnp.int32(k))), want)
      got = int(rules.classify(rule, q, q, k, k))
      self.assertEqual(got, rules.WHOLE if want else rules.SKIP)

  @parameterized.parameters(
    (pk.Window(2**31 - 1), 7, 0, True),
    (pk.Window(2**31 - 1), 0, 7, False),
  )
  def test_windows_without_a_beginning(self, rule, q, k, want):
    self.assertEqual(bool(jax.jit(rule)(q, k)), want)
    got = int(rules.classify(rule, *map(jnp.int32, (q, q, k, k))))
    self.assertEqual(got, rules.WHOLE if want else rules.SKIP)
