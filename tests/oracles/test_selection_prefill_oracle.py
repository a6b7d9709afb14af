"""The oracle of selectors for the prompt: by hand, limits, the authors.

data/selection_authors.json has what the authors' code gives for inputs drawn
by `normal`, and where their conventions differ.
"""

import functools
import math

from absl.testing import parameterized
import numpy as np

from tests.oracles import attention
from tests.oracles import patterns
from tests.oracles import selection
from tests.oracles import selection_prefill as oracle
from tests.oracles.test_selection_oracle import authors
from tests.oracles.test_selection_oracle import normal

close = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-6)
exact = functools.partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-13)

ANCHOR = dict(block=2, step=2)
PROXY = dict(block=4, stride=2)


def inputs(seed, s=13, heads=4, kv_heads=2, d=4):
  return (
    normal(seed, s, heads, d),
    normal(seed + 1, s, kv_heads, d),
    normal(seed + 2, s, kv_heads, d),
  )


def everything(rows, heads=4):
  return [[list(range(i + 1)) for i in range(rows)]] * heads


class MInferenceTest(parameterized.TestCase):
  def test_masses(self):
    q, k, _ = inputs(0)
    p = selection.probabilities(q, k)
    vertical, slash = oracle.line_masses(q, k, last_q=5)
    exact(vertical, p[:, 8:].sum(axis=1))
    exact(vertical.sum(axis=1), 5)
    exact(slash.sum(axis=1), 5)
    exact(slash[2, 3], sum(p[2, s, s - 3] for s in range(8, 13)))
    exact(slash[2, 12], p[2, 12, 0])

  def test_planted_lines(self):
    # Queries look for key 7 and for the key 9 before them.
    s, d = 48, 64
    basis = np.eye(d)
    k = basis[np.arange(s)][:, None]
    q = 80 * basis[7] + 80 * basis[(np.arange(s) - 9) % d]
    vertical, slash = oracle.vertical_slash(
      q[:, None], k, verticals=1, slashes=1, last_q=8, first=0, recent=0
    )
    self.assertEqual((vertical, slash), ([[7]], [[9]]))
    named = patterns.stripes(s, s, verticals=[7], slashes=[9])
    p = selection.probabilities(q[:, None], k)[0]
    self.assertGreater(p[16:][named[16:]].sum() / 32, 0.95)

  def test_forced_lines(self):
    q, k, _ = inputs(3)
    vertical, slash = oracle.vertical_slash(
      q, k, verticals=4, slashes=3, last_q=4, first=2, recent=2
    )
    for a, b in zip(vertical, slash):
      self.assertContainsSubset([0, 1], a)
      self.assertContainsSubset([0, 1], b)
      self.assertLen(a, 4)
      self.assertLen(b, 3)
    lines = oracle.vertical_slash(q, k, verticals=13, slashes=13)
    self.assertEqual(lines, [[list(range(13))] * 4] * 2)

  def test_lines_to_blocks(self):
    rng = np.random.default_rng(0)
    for _ in range(10):
      s = int(rng.integers(5, 14))
      verticals = rng.choice(s, 3, replace=False).tolist()
      slashes = rng.choice(s, 2, replace=False).tolist()
      blocks, columns = oracle.lines_to_blocks(
        verticals, slashes, s, s, block_q=3, block_kv=2
      )
      listed = np.zeros((len(blocks), -(-s // 2)), bool)
      for i, row in enumerate(blocks):
        listed[i, row] = True
      read = patterns.of_blocks(listed, 3, 2, s, s)
      for i, row in enumerate(columns):
        read[3 * i : 3 * i + 3, row] = True
        self.assertFalse(listed[i, [t // 2 for t in row]].any())
      read &= patterns.causal(s, s)
      named = patterns.stripes(s, s, verticals=verticals, slashes=slashes)
      self.assertFalse((named & ~read).any())
      # A block is there for a diagonal that passes it.
      slash = patterns.diagonals(s, s, slashes)
      self.assertEqual(blocks, patterns.to_blocks(slash, 3, 2))

  def test_mean_pool_blocks(self):
    k = np.array([1, 3, 5, 5, 0, 0, 9.0]).reshape(-1, 1, 1)
    q = np.ones((7, 1, 1))
    got = oracle.mean_pool_blocks(q, k, top_k=2, block=2)
    self.assertEqual(got, [[[0], [0, 1], [0, 1], [1, 3]]])
    got = oracle.mean_pool_blocks(q, k, top_k=4, block=2)
    self.assertEqual(got, everything(4, 1))
    # Decode: the query is one block, and everything is before it.
    got = oracle.mean_pool_blocks(q[:1], k, top_k=1, block=2, offset=6)
    self.assertEqual(got, [[[3]]])

  def test_full_lines_are_dense(self):
    q, k, v = inputs(5)
    named = patterns.stripes(13, 13, verticals=range(13), slashes=[])
    index, damages = oracle.minference_search(
      q, k, v, [patterns.causal(13, 13), named], head=3
    )
    self.assertEqual(index, 0)
    exact(damages, 0)

  def test_search_finds_the_kind_of_head(self):
    s, d = 40, 48
    basis = np.eye(d)
    k = np.stack([basis[:s]] * 3, axis=1)
    own = np.arange(s)
    # What each head looks for: 3 back, 15 back, one key for 8 queries.
    sought = [np.maximum(own - 3, 0), np.maximum(own - 15, 0), own // 8 * 4]
    q = 60 * np.stack([basis[x] for x in sought], axis=1)
    v = normal(0, s, 3, 5)
    middle = np.eye(10, dtype=bool)
    for i in range(10):
      middle[i, i // 2] = True
    kinds = [
      patterns.sinks(s, s, first=2, local=4),
      patterns.stripes(s, s, verticals=[0], slashes=[0, 14, 15]),
      patterns.of_blocks(middle, 4, 4, s, s),
    ]
    for criterion in ("output", "mass"):
      found = [
        oracle.minference_search(q, k, v, kinds, head=h, criterion=criterion)[0]
        for h in range(3)
      ]
      self.assertEqual(found, [0, 1, 2])

  @authors("minference_lines")
  def test_lines_authors(self, case):
    s, heads, d = case["shape"]
    q, k = normal(0, s, heads, d), normal(1, s, heads, d)
    vertical, slash = oracle.vertical_slash(
      q, k, verticals=case["verticals"], slashes=case["slashes"]
    )
    self.assertEqual(vertical, case["vertical"])
    self.assertEqual(slash, case["slash"])

  @authors("minference_blocks")
  def test_blocks_authors(self, case):
    s, heads, d = case["shape"]
    q, k = normal(0, s, heads, d), normal(1, s, heads, d)
    got = oracle.mean_pool_blocks(
      q, k, top_k=case["top_k"], block=case["block"]
    )
    want = [
      [[j for j in row if j <= i] for i, row in enumerate(head)]
      for head in case["blocks"]
    ]
    # Theirs fill up with blocks ahead where there are fewer than top_k.
    self.assertEqual(got, want)


class XAttentionTest(parameterized.TestCase):
  def test_antidiagonals(self):
    q, k, _ = inputs(0, s=12)
    got = oracle.antidiagonal_sums(q, k, stride=4)
    z = np.einsum("shd,thd->hst", q, np.repeat(k, 2, axis=1))
    for h, a, b in np.ndindex(4, 3, 3):
      square = z[h, 4 * a : 4 * a + 4, 4 * b : 4 * b + 4]
      exact(got[h, a, b], np.fliplr(square).trace())
    # Stride 1: every product.
    exact(oracle.antidiagonal_sums(q, k, stride=1), z)

  def test_stride_one_is_the_mass(self):
    q, k, _ = inputs(2, s=12)
    got = oracle.xattention_masses(q, k, block=3, stride=1)
    p = selection.probabilities(q, k)
    exact(got, p.reshape(4, 4, 3, 4, 3).sum(axis=(2, 4)))

  def test_tail_and_rows(self):
    q, k, _ = inputs(4, s=13)
    got = oracle.xattention_masses(q, k, block=4, stride=2)
    exact(got.sum(axis=-1), [[2, 2, 2, 1]] * 4)
    exact(np.triu(got, 1), 0)
    free = oracle.xattention_masses(q, k, block=4, stride=2, is_causal=False)
    self.assertTrue((free > 0).all())
    with self.assertRaises(ValueError):
      oracle.xattention_masses(q, k, block=4, stride=3)

  def test_blocks(self):
    q, k, _ = inputs(6, s=24)
    q *= 3
    options = dict(block=4, stride=2)
    masses = oracle.xattention_masses(q, k, **options)
    choose = functools.partial(oracle.xattention_blocks, q, k, **options)
    self.assertEqual(choose(threshold=1.0), everything(6))
    self.assertEqual(
      choose(threshold=0.0), [[sorted({0, i}) for i in range(6)]] * 4
    )
    free = choose(threshold=0.7, sink=False, diagonal=False)
    forced = choose(threshold=0.7)
    for h, i in np.ndindex(4, 6):
      row = masses[h, i]
      mass = sorted(row[free[h][i]])
      self.assertGreaterEqual(sum(mass), 0.7 * row.sum())
      self.assertLess(sum(mass[1:]), 0.7 * row.sum())
      self.assertGreaterEqual(row[forced[h][i]].sum(), 0.7 * row.sum())
      self.assertContainsSubset({0, i}, forced[h][i])
    each = choose(threshold=np.array([1.0, 0.0, 0.7, 0.7]))
    self.assertEqual(each[0], everything(6)[0])
    self.assertEqual(each[2:], forced[2:])

  @authors("xattention")
  def test_authors(self, case):
    s, heads, d = case["shape"]
    q, k = 3 * normal(0, s, heads, d), normal(1, s, heads, d)
    options = dict(block=case["block"], stride=case["stride"])
    masses = oracle.xattention_masses(q, k, **options)
    close(masses, case["masses"])
    got = oracle.xattention_blocks(q, k, threshold=case["threshold"], **options)
    # Their first chunk forces less and takes more; see the note there.
    for mine, theirs in zip(got, case["blocks"]):
      self.assertEqual(mine[case["first"] :], theirs[case["first"] :])


class AnchorTest(parameterized.TestCase):
  def test_region_and_columns_cover(self):
    for s in range(16):
      region = oracle.anchor_region(s, 16, **ANCHOR)
      self.assertIn(s, region)
      begin = s // 4 * 4 - 2
      between = [t for t in range(2, begin)]
      self.assertFalse(set(region) & set(between))
      self.assertEqual(sorted(region + between), list(range(s + 1)))

  def test_by_hand(self):
    # Anchors: keys 0 and 1 give 5; the candidates of the last group are
    # 2 ... 5, and the mean query gives 4, 1, 3, 2.
    k = np.array([5, 0, 4, 1, 3, 2, 0, 0, 0, 0, 0, 0.0]).reshape(-1, 1, 1)
    q = np.ones((12, 1, 1))
    exact(oracle.anchors(q, k, **ANCHOR), 5)
    choose = functools.partial(oracle.anchor_columns, q, k, **ANCHOR)
    self.assertEqual(choose(theta=1.0), [[[], [], [2]]])
    self.assertEqual(choose(theta=2.0), [[[], [], [2, 4]]])
    self.assertEqual(choose(theta=99.0), [[[], [], [2, 3, 4, 5]]])
    self.assertEqual(choose(theta=-1.0), [[[], [], []]])

  def test_infinite_theta_is_dense(self):
    q, k, _ = inputs(0)
    chosen = oracle.anchor_columns(q, k, theta=math.inf, **ANCHOR)
    read = oracle.anchor_read(chosen, 13, 13, **ANCHOR)
    self.assertEqual(read, [[list(range(s + 1)) for s in range(13)]] * 4)
    less = None
    for theta in (-2.0, 0.0, 2.0, 4.0):
      chosen = oracle.anchor_columns(q, k, theta=theta, **ANCHOR)
      more = {(h, g, t) for h, x in enumerate(chosen)
              for g, row in enumerate(x) for t in row}  # fmt: skip
      if less is not None:
        self.assertContainsSubset(less, more)
      less = more

  def test_any_block_of_the_group_keeps(self):
    k = np.zeros((16, 1, 2))
    k[3, 0, 0] = k[4, 0, 1] = 8
    q = np.zeros((16, 1, 2))
    q[12:14, 0, 0] = q[14:, 0, 1] = 1
    chosen = oracle.anchor_columns(q, k, theta=-4.0, **ANCHOR)
    self.assertEqual(chosen[0][3], [3, 4])

  @authors("anchor")
  def test_authors(self, case):
    s, heads, d = case["shape"]
    q, k = 2 * normal(0, s, heads, d), normal(1, s, heads, d)
    got = oracle.anchor_columns(
      q, k, theta=case["theta"], block=case["block"], step=case["step"]
    )
    self.assertEqual(got, case["columns"])


class ProxyTest(parameterized.TestCase):
  def test_equal_heads_are_their_proxy(self):
    q, k, _ = inputs(0, s=14)
    q[:] = q[:, :1]
    k[:] = k[:, :1]
    one = oracle.proxy_scores(q, k, groups=[[0, 1, 2, 3]], **PROXY)
    two = oracle.proxy_scores(q, k, groups=[[0, 1], [2, 3]], **PROXY)
    each = oracle.proxy_scores(
      q, np.repeat(k, 2, 1), groups=[[0], [1], [2], [3]], **PROXY
    )
    exact(one[0], two[1])
    exact(one[0], each[3])

  def test_scores(self):
    q, k, _ = inputs(0, s=14)
    got = oracle.proxy_scores(q, k, groups=[[0, 1], [2, 3]], **PROXY)
    p = selection.probabilities(
      q[::2, 2:].mean(axis=1, keepdims=True), k[::2, 1:]
    )[0]
    self.assertEqual(p.shape, (7, 7))
    exact(got[1, 1, 0], p[2:4, :2].max())
    exact(got[1, 3, 1], p[6:, 2:4].max())
    exact(np.triu(got, 1), 0)
    with self.assertRaises(ValueError):
      oracle.proxy_scores(q, k, groups=[[0], [1, 2, 3]], **PROXY)

  def test_budgets(self):
    q, k, _ = inputs(0, s=16)
    p = selection.probabilities(q, k)[:, 12:].sum(axis=1)
    mass = p.reshape(4, 4, 4).sum(axis=-1) / 4
    got = oracle.proxy_budgets(q, k, gamma=0.8, block=4)
    for row, count in zip(mass, got):
      best = np.cumsum(np.sort(row)[::-1])
      self.assertGreaterEqual(best[count - 1], 0.8)
      self.assertTrue(count == 1 or best[count - 2] < 0.8)
    self.assertEqual(oracle.proxy_budgets(q, k, gamma=1.0, block=4), [4] * 4)
    # A head that looks at one block needs one.
    q[:, 0] = 0
    q[:, 0, 0] = 50
    k[..., 0] = 0
    k[:4, :, 0] = 5
    self.assertEqual(oracle.proxy_budgets(q, k, gamma=0.9, block=4)[0], 1)

  def test_blocks(self):
    q, k, _ = inputs(0, s=14)
    groups = [[0, 1], [2, 3]]
    got = oracle.proxy_blocks(q, k, groups=groups, gamma=1.0, **PROXY)
    self.assertEqual(got, everything(4))
    got = oracle.proxy_blocks(q, k, groups=groups, gamma=0.6, **PROXY)
    budgets = oracle.proxy_budgets(q, k, gamma=0.6, block=4)
    for head, budget in zip(got, budgets):
      for i, row in enumerate(head):
        self.assertLen(row, min(budget, i + 1))
        self.assertIn(i, row)


class PsaTest(parameterized.TestCase):
  def test_importance(self):
    q, k, _ = inputs(0, s=12)
    got = oracle.psa_importance(q, k, block_q=4, block_kv=3)
    self.assertEqual(got.shape, (4, 3, 4))
    exact(got.sum(axis=-1), 1)
    p = selection.probabilities(q, k, is_causal=False)
    largest = p[2, 4:8].reshape(4, 4, 3).max(axis=(0, 2))
    exact(got[2, 1], largest / largest.sum())
    # Sampled tokens: those of the smaller problem.
    got = oracle.psa_importance(
      q, k, block_q=4, block_kv=3, rows=[0, 3], cols=[1]
    )
    small = oracle.psa_importance(
      q[[0, 3, 4, 7, 8, 11]], k[1::3], block_q=2, block_kv=1
    )
    exact(got, small)

  def test_quota(self):
    row = np.arange(20.0)[::-1]
    got = oracle.psa_levels_by_quota(row, [0.05, 0.15, 0.25, 0.5])
    self.assertEqual(got, [0] + [1] * 2 + [2] * 2 + [3] * 5 + [-1] * 10)
    self.assertEqual(oracle.psa_levels_by_quota([1, 2], [1.0]), [0, 0])
    self.assertEqual(oracle.psa_levels_by_quota([1, 1], [0.5]), [0, -1])
    self.assertEqual(oracle.psa_levels_by_quota([1, 1], [0.0, 1.0]), [1, 1])

  def test_mass(self):
    levels = functools.partial(oracle.psa_levels_by_mass)
    row = [0.5, 0.25, 0.125, 0.125]
    self.assertEqual(levels(row, [1.0]), [0] * 4)
    self.assertEqual(levels(row, [0.5, 0.75, 0.875]), [0, 1, 2, -1])
    self.assertEqual(levels(row, [0.0, 1.0]), [1] * 4)
    self.assertEqual(levels(row, [0.2]), [0, -1, -1, -1])

  def test_caps(self):
    k = np.ones((8, 2, 3))
    k[4:, 1] = np.tile([[1.0], [-1.0]], (2, 3))
    got = oracle.psa_caps(k, block=4, thresholds=[0.5, 0.5])
    self.assertEqual(got.tolist(), [[2, 2], [2, 0]])
    pairs = oracle.psa_blocks(
      [[[2, -1], [1, 2]]] * 2 + [[[2, -1], [1, 2]]] * 2, got
    )
    self.assertEqual(pairs[0], [[(0, 2)], [(0, 1), (1, 2)]])
    self.assertEqual(pairs[3], [[(0, 2)], [(0, 1), (1, 0)]])

  def test_equal_keys_pool_exactly(self):
    # With equal keys in a run, the bias ln 2^l makes a level exact.
    q = normal(0, 1, 4, 1, 3)
    k = np.repeat(normal(1, 1, 2, 1, 3), 4, axis=1)
    v = normal(2, 1, 8, 1, 3)
    lists = np.array([[[[0, 1]]]]), np.array([[[2]]])
    options = dict(block_q=4, block_kv=4)
    want = attention.attention(q, k, v, *lists, **options).out
    for level in (1, 2):
      got = attention.attention(
        q, k, v, *lists, level=np.full((1, 1, 1, 2), level), **options
      )
      exact(got.out, want)

  @authors("psa_quota")
  def test_quota_authors(self, case):
    rows = normal(case["seed"], *case["shape"])
    for row, want in zip(rows, case["pooling"]):
      got = oracle.psa_levels_by_quota(row, case["ends"])
      self.assertEqual([0 if x < 0 else 2**x for x in got], want)

  @authors("psa_mass")
  def test_mass_authors(self, case):
    # Theirs take the block that crosses a threshold too, and 6% at least.
    rows = np.abs(normal(case["seed"], *case["shape"]))
    for row, want in zip(rows, case["pooling"]):
      mine = oracle.psa_levels_by_mass(row, case["thresholds"])
      order = np.argsort(-row, kind="stable")
      got, begin = np.zeros(len(row), int), 0
      for level in range(len(case["thresholds"])):
        within = sum(0 <= x <= level for x in mine)
        end = max(begin, min(within + 1, len(row)))
        if level == 0:
          end = max(end, int(0.06 * len(row)) + 1)
        got[order[begin:end]] = 2**level
        begin = end
      self.assertEqual(got.tolist(), want)

  @authors("psa_caps")
  def test_caps_authors(self, case):
    k = normal(case["seed"], *case["shape"])
    got = oracle.psa_caps(k, block=case["block"], thresholds=case["thresholds"])
    self.assertEqual((2**got).tolist(), case["pooling"])
