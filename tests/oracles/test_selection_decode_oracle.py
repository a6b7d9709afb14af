"""The oracle of selectors over a cache: by hand, limits, the authors.

data/selection_authors.json has what the authors' code gives for inputs drawn
by `normal`, and where their conventions differ.
"""

import functools
import itertools

from absl.testing import parameterized
import numpy as np

from tests.oracles import selection
from tests.oracles import selection_decode as oracle
from tests.oracles.test_selection_oracle import authors
from tests.oracles.test_selection_oracle import normal

close = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-6)
exact = functools.partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-13)


def inputs(seed, s=1, t=21, heads=4, kv_heads=2, d=4):
  return normal(seed, s, heads, d), normal(seed + 1, t, kv_heads, d)


class QuestTest(parameterized.TestCase):
  def test_bounds_every_logit(self):
    q, k = inputs(0, s=21)
    got = oracle.quest_scores(q, k, page=4)
    z = np.einsum("shd,thd->hst", q, np.repeat(k, 2, axis=1))
    for h, s, t in np.ndindex(*z.shape):
      if t <= s:
        self.assertGreaterEqual(got[h, s, t // 4], z[h, s, t] - 1e-12)
      elif t // 4 > s // 4:
        self.assertEqual(got[h, s, t // 4], -np.inf)
    # Pages of one key: the logit.
    one = oracle.quest_scores(q, k, page=1)
    exact(one[:, -1], z[:, -1])

  def test_pages(self):
    q, k = inputs(2)
    every = oracle.quest_pages(q, k, pages=6, page=4, offset=20)
    self.assertEqual(every, [[[0, 1, 2, 3, 4, 5]]] * 4)
    scores = oracle.quest_scores(q, k, page=4, offset=20)
    got = oracle.quest_pages(q, k, pages=2, page=4, offset=20)
    for h in range(4):
      want = np.argsort(-scores[h, 0])[:2]
      self.assertEqual(got[h][0], sorted(want.tolist()))
    newest = oracle.quest_pages(q, k, pages=2, page=4, last=1, offset=20)
    self.assertTrue(all(5 in head[0] for head in newest))
    self.assertTrue(all(len(head[0]) == 2 for head in newest))

  @authors("quest")
  def test_authors(self, case):
    t, heads, d = case["shape"]
    q, k = normal(0, 1, heads, d), normal(1, t, heads, d)
    got = oracle.quest_pages(
      q, k, pages=case["pages"], page=case["page"], offset=t - 1
    )
    self.assertEqual([head[0] for head in got], case["chosen"])


class DoubleSparsityTest(parameterized.TestCase):
  def test_channels(self):
    q, k = inputs(0, s=30, t=30, d=8)
    k[..., 5] *= 30
    q[:, 2, 1] *= 40
    got = oracle.heavy_channels(q, k, r=2)
    self.assertTrue(all(5 in head for head in got))
    self.assertEqual(got[2], [1, 5])
    self.assertEqual(oracle.heavy_channels(q, k, r=8), [list(range(8))] * 4)

  def test_all_channels_are_exact(self):
    q, k = inputs(2)
    full = [range(4)] * 4
    got = oracle.double_sparsity_keys(q, k, channels=full, top_k=5, offset=20)
    z = np.einsum("hd,thd->ht", q[0], np.repeat(k, 2, axis=1))
    for h in range(4):
      self.assertEqual(got[h][0], sorted(np.argsort(-z[h])[:5].tolist()))
    self.assertEqual(oracle.exact_keys(q, k, top_k=5, offset=20), got)
    every = oracle.double_sparsity_keys(
      q, k, channels=[[0]] * 4, top_k=21, offset=20
    )
    self.assertEqual(every, [[list(range(21))]] * 4)

  def test_planted_channels_recall(self):
    q, k = inputs(4, s=64, t=64, d=16)
    for h in range(4):
      q[:, h, 3 * h] *= 8
    k[..., [0, 3, 6, 9]] *= 4
    want = oracle.exact_keys(q[-1:], k, top_k=8, offset=63)
    good = oracle.heavy_channels(q, k, r=4)
    bad = [[c for c in range(16) if c not in x][:4] for x in good]
    recall = []
    for channels in (good, bad):
      got = oracle.double_sparsity_keys(
        q[-1:], k, channels=channels, top_k=8, offset=63
      )
      pairs = zip(got, want)
      recall.append(np.mean([len(set(a[0]) & set(b[0])) for a, b in pairs]))
    self.assertGreater(recall[0], 6)
    self.assertLess(recall[1], 3)

  @authors("double_sparsity_channels")
  def test_channels_authors(self, case):
    n, heads, kv_heads, d = case["shape"]
    q, k = normal(0, n, heads, d), normal(1, n, kv_heads, d)
    for r in (1, 3, d):
      want = [sorted(row[:r]) for row in case["order"]]
      self.assertEqual(oracle.heavy_channels(q, k, r=r), want)

  @authors("double_sparsity")
  def test_authors(self, case):
    t, heads, kv_heads, d = case["shape"]
    q, k = normal(0, 1, heads, d), normal(1, t, kv_heads, d)
    got = oracle.double_sparsity_keys(
      q, k, channels=case["channels"], top_k=case["top_k"], offset=t - 1
    )
    self.assertEqual([head[0] for head in got], case["chosen"])


class LayersTest(parameterized.TestCase):
  def test_tidal(self):
    kinds = oracle.tidal_layers(12)
    self.assertEqual(kinds[:3], ["dense", "dense", "select"])
    self.assertEqual(kinds[9], "select")
    self.assertEqual(kinds.count("reuse"), 8)
    q, k = inputs(0)
    every = oracle.exact_keys(q, k, top_k=99, offset=20)
    self.assertEqual(every, [[list(range(21))]] * 4)

  @authors("tidal")
  def test_tidal_authors(self, case):
    t, heads, kv_heads, d = case["shape"]
    layers = oracle.tidal_layers(
      case["layers"], dense=case["dense"], again=case["again"]
    )
    kept = None
    for layer, (kind, want) in enumerate(zip(layers, case["read"])):
      q, k = (
        normal(2 * layer, 1, heads, d),
        normal(2 * layer + 1, t, kv_heads, d),
      )
      if kind == "select":
        kept = oracle.exact_keys(q, k, top_k=case["top_k"], offset=t - 1)
      read = [list(range(t))] * heads
      if kind == "reuse":
        read = [head[0] for head in kept]
      self.assertEqual(read, want)

  def test_delta(self):
    q, k = inputs(0)
    p = selection.probabilities(q, k, offset=20)[:, 0]
    got = oracle.delta_scores(q, k, page=4, offset=20)
    most = np.append(p.max(axis=0), [0, 0, 0]).reshape(6, 4)
    exact(got[0], most.sum(axis=-1))
    choose = functools.partial(oracle.delta_pages, q, k, page=4, offset=20)
    self.assertEqual(choose(pages=6), [list(range(6))])
    for count in range(2, 6):
      pages = choose(pages=count, recent=2)[0]
      self.assertLen(pages, count)
      self.assertContainsSubset([4, 5], pages)
      rest = sorted(set(range(4)), key=lambda j: -got[0, j])[: count - 2]
      self.assertEqual(pages, sorted(rest + [4, 5]))

  @authors("delta")
  def test_delta_authors(self, case):
    # The scores are the input here.
    for row, pages, want in zip(case["scores"], case["pages"], case["chosen"]):
      newest = range(pages - case["recent"], pages)
      scores = dict(enumerate(row[:pages]))
      self.assertEqual(selection.top(scores, case["k"], newest), want)


class SnapKvTest(parameterized.TestCase):
  def test_scores(self):
    q, k = inputs(0, s=21)
    p = selection.probabilities(q, k)[:, -5:, :16].sum(axis=1)
    plain = oracle.snapkv_scores(q, k, window=5, kernel=1)
    exact(plain, p)
    got = oracle.snapkv_scores(q, k, window=5, kernel=3)
    exact(got[1, 7], p[1, 6:9].mean())
    exact(got[1, 0], p[1, :2].sum() / 3)
    got = oracle.snapkv_scores(q, k, window=5, kernel=3, pool="max")
    exact(got[1, 7], p[1, 6:9].max())
    exact(got[1, 15], p[1, 14:].max())
    # Only the last queries matter.
    some = oracle.snapkv_scores(q[-6:], k, window=5, kernel=3, pool="max")
    exact(some, got)
    with self.assertRaises(ValueError):
      oracle.snapkv_scores(q, k, window=5, kernel=4)

  def test_keep(self):
    q, k = inputs(2, s=21)
    keep = functools.partial(oracle.snapkv_keep, q, k, window=5)
    self.assertEqual(keep(capacity=21), [list(range(21))] * 4)
    self.assertEqual(keep(capacity=5), [[16, 17, 18, 19, 20]] * 4)
    for kept in keep(capacity=9):
      self.assertLen(kept, 9)
      self.assertEqual(kept[-5:], [16, 17, 18, 19, 20])
    self.assertLen(keep(capacity=9, shared=True), 2)
    one = oracle.snapkv_keep(q[:, ::2], k, window=5, capacity=9, shared=True)
    self.assertEqual(
      one, oracle.snapkv_keep(q[:, ::2], k, window=5, capacity=9)
    )
    with self.assertRaises(ValueError):
      keep(capacity=4)

  @authors("snapkv")
  def test_authors(self, case):
    t, heads, d = case["shape"]
    q, k = normal(0, t, heads, d), normal(1, t, heads, d)
    options = dict(case["options"])
    got = oracle.snapkv_keep(q, k, **options)
    if options["pool"] == "avg":
      self.assertEqual(got, case["kept"])
      return
    # Neighbours have the same maximum: equal choices have equal scores.
    capacity = options.pop("capacity") - options["window"]
    scores = oracle.snapkv_scores(q, k, **options)
    for row, mine, theirs in zip(scores, got, case["kept"]):
      self.assertEqual(mine[capacity:], theirs[capacity:])
      exact(np.sort(row[mine[:capacity]]), np.sort(row[theirs[:capacity]]))


class H2oTest(parameterized.TestCase):
  def run_steps(self, heavy, recent, s=9, t=15):
    q, k = inputs(0, s=t, t=t)
    states = oracle.h2o_start(q[:s], k[:s], heavy=heavy, recent=recent)
    reads = []
    for p in range(s, t):
      states, read = oracle.h2o_step(
        states, q[p], k, position=p, heavy=heavy, recent=recent
      )
      reads.append(read)
    return q, k, states, reads

  def test_full_budget(self):
    q, k, states, reads = self.run_steps(10, 5)
    p = selection.probabilities(q, k)
    for h in range(4):
      exact([states[h][t] for t in range(15)], p[h].sum(axis=0))
      self.assertEqual(reads[-1][h], list(range(15)))

  def test_budget(self):
    _, _, states, reads = self.run_steps(3, 2)
    for p, read in zip(range(9, 15), reads):
      for keys in read:
        self.assertLen(keys, 6)
        self.assertEqual(keys[-3:], [p - 2, p - 1, p])
    for before, after in itertools.pairwise(reads):
      for a, b in zip(before, after):
        self.assertContainsSubset(b[:-1], a)
    self.assertTrue(all(len(x) == 5 for x in states))

  def test_heavy_hitters_stay(self):
    q, k = inputs(0, s=12, t=12)
    q[..., 0], k[..., 0] = 9, 0
    k[4, :, 0] = 5
    states = oracle.h2o_start(q, k, heavy=1, recent=2)
    self.assertEqual([sorted(x) for x in states], [[4, 10, 11]] * 4)

  @authors("h2o")
  def test_authors(self, case):
    s, t, heads, d = case["shape"]
    q, k = normal(0, t, heads, d), normal(1, t, heads, d)
    heavy, recent = case["heavy"], case["recent"]
    states = oracle.h2o_start(q[:s], k[:s], heavy=heavy, recent=recent)
    for p, want in zip(range(s, t), case["read"]):
      states, read = oracle.h2o_step(
        states, q[p], k, position=p, heavy=heavy, recent=recent
      )
      self.assertEqual(read, want)
