"""The oracle of trained selectors: by hand, limits, gradients, the authors.

data/selection_authors.json has what the authors' code gives for inputs drawn
by `normal`, and where their conventions differ.
"""

import functools
import math

from absl.testing import parameterized
import numpy as np

from tests.oracles import selection
from tests.oracles import selection_trainable as oracle
from tests.oracles.test_selection_oracle import authors
from tests.oracles.test_selection_oracle import normal

close = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-6)
exact = functools.partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-13)

NSA = dict(length=4, stride=2, block=4)
INFLLM = dict(length=4, stride=2, block=8)


def inputs(seed, s=13, heads=4, kv_heads=2, d=4):
  return (
    normal(seed, s, heads, d),
    normal(seed + 1, s, kv_heads, d),
    normal(seed + 2, s, kv_heads, d),
  )


def causal_blocks(s, block, rows=2):
  return [[list(range(t // block + 1)) for t in range(s)]] * rows


class NsaTest(parameterized.TestCase):
  def test_compress(self):
    x = normal(0, 11, 2, 3)
    got = oracle.nsa_compress(x, length=4, stride=2)
    self.assertEqual(got.shape, (4, 2, 3))
    exact(got[3], x[6:10].mean(axis=0))
    weights = normal(1, 4, 3)
    phi = lambda rows: (rows * weights).sum(axis=0)
    got = oracle.nsa_compress(x, length=4, stride=2, phi=phi)
    exact(got[1, 1], (x[2:6, 1] * weights).sum(axis=0))
    self.assertEqual(len(oracle.nsa_compress(x[:3], length=4, stride=2)), 0)

  def test_importance_counts_what_windows_share_with_blocks(self):
    for length, stride, block in ((32, 16, 64), (4, 2, 4), (8, 2, 16)):
      blocks = 3
      windows = (blocks * block - length) // stride + 1
      for c in range(windows):
        p = np.eye(windows)[c]
        got = oracle.nsa_importance(
          p, blocks, length=length, stride=stride, block=block
        )
        span = range(c * stride, c * stride + length)
        want = [sum(t // block == j for t in span) for j in range(blocks)]
        exact(got * stride, want)
    with self.assertRaises(ValueError):
      oracle.nsa_importance([1.0], 1, length=4, stride=3, block=6)

  def test_one_window_a_block(self):
    # length = stride = block: the importance is the probability itself.
    p = np.array([0.5, 0.3, 0.2])
    exact(oracle.nsa_importance(p, 3, length=4, stride=4, block=4), p)

  def test_by_hand(self):
    # Windows are blocks of 2 keys; the query is 1, the keys' means 3, 5, 1, 0.
    k = np.array([3, 3, 5, 5, 1, 1, 0, 0, 9, 9.0]).reshape(-1, 1, 1)
    q = np.ones((1, 1, 1))
    k_cmp = oracle.nsa_compress(k, length=2, stride=2)
    choose = functools.partial(
      oracle.nsa_blocks, q, k_cmp, 10, length=2, stride=2, block=2, offset=8
    )
    # The own block, 4, is no whole window yet: no score, but forced.
    self.assertEqual(choose(top_n=2, initial=0, local=1), [[[1, 4]]])
    self.assertEqual(choose(top_n=3, initial=0, local=1), [[[0, 1, 4]]])
    self.assertEqual(choose(top_n=4, initial=1, local=2), [[[0, 1, 3, 4]]])
    self.assertEqual(choose(top_n=1, initial=1, local=2), [[[0, 3, 4]]])

  def test_ties_take_the_lowest(self):
    q, k = np.zeros((8, 1, 1)), np.zeros((8, 1, 1))
    got = oracle.nsa_blocks(
      q, k[:4], 8, top_n=2, length=2, stride=2, block=2, initial=0, local=1
    )
    self.assertEqual(got[0][7], [0, 3])

  def test_all_blocks_are_dense(self):
    q, k, v = inputs(0)
    k_cmp = oracle.nsa_compress(k, length=4, stride=2)
    chosen = oracle.nsa_blocks(q, k_cmp, 13, top_n=4, **NSA)
    self.assertEqual(chosen, causal_blocks(13, 4))
    gates = np.zeros((13, 4, 3))
    gates[..., 1] = 1
    out, branches = oracle.nsa(
      q, (k_cmp, k_cmp), (k, v), (k, v), gates, chosen=chosen, window=3,
      **NSA,
    )  # fmt: skip
    exact(out, selection.dense(q, k, v)[0])
    exact(branches[0][:3], 0)  # no whole window yet
    near = [[range(max(s - 2, 0), s + 1) for s in range(13)]] * 4
    exact(branches[2], selection.attend(q, k, v, near)[0])

  def test_gates_weigh_the_branches(self):
    q, k, v = inputs(3)
    k_cmp = oracle.nsa_compress(k, length=4, stride=2)
    gates = 1 / (1 + np.exp(-normal(9, 13, 4, 3)))
    out, branches = oracle.nsa(
      q, (k_cmp, 2 * k_cmp), (k, v), (2 * k, v), gates, window=2,
      chosen=causal_blocks(13, 4), **NSA,
    )  # fmt: skip
    exact(out, np.einsum("shb,bshd->shd", gates, np.array(branches)))

  def test_one_choice_a_group(self):
    q, k, _ = inputs(5)
    k_cmp = oracle.nsa_compress(k, length=4, stride=2)
    both = oracle.nsa_scores(q, k_cmp, 13, **NSA)
    each = oracle.nsa_scores(q, np.repeat(k_cmp, 2, axis=1), 13, **NSA)
    exact(both, each[::2] + each[1::2])
    self.assertLen(oracle.nsa_blocks(q, k_cmp, 13, top_n=2, **NSA), 2)

  @authors("nsa")
  def test_authors(self, case):
    block, n = case["block"], case["top_n"]
    s, heads, kv_heads, d = case["shape"]
    q = normal(0, s, heads, d)
    k, v = normal(1, s, kv_heads, d), normal(2, s, kv_heads, d)
    pool = dict(length=block, stride=block)
    k_cmp, v_cmp = (
      oracle.nsa_compress(k, **pool),
      oracle.nsa_compress(v, **pool),
    )
    chosen = oracle.nsa_blocks(q, k_cmp, s, top_n=n, block=block, **pool)
    self.assertEqual(chosen, case["blocks"])
    _, branches = oracle.nsa(
      q, (k_cmp, v_cmp), (k, v), (k, v), np.ones((s, heads, 3)),
      chosen=chosen, block=block, **pool,
    )  # fmt: skip
    close(branches[0].sum(axis=-1), case["compressed"])
    close(branches[1].sum(axis=-1), case["selected"])


class MobaTest(parameterized.TestCase):
  def test_by_hand(self):
    k = np.array([0, 2, 9, -1, 4, 4, 0.0]).reshape(-1, 1, 1)
    q = np.ones((7, 1, 1))
    # Means 1, 4, 4, 0; the own block is in.
    got = oracle.moba_blocks(q, k, block=2, top_k=2)[0]
    self.assertEqual(got, [[0], [0], [0, 1], [0, 1], [1, 2], [1, 2], [1, 3]])
    got = oracle.moba_blocks(-q, k, block=2, top_k=2)[0]
    self.assertEqual(got[4:], [[0, 2], [0, 2], [0, 3]])
    free = oracle.moba_blocks(q, k, block=2, top_k=2, is_causal=False)[0]
    self.assertEqual(free, [[1, 2]] * 7)

  def test_all_blocks_are_dense(self):
    q, k, v = inputs(0)
    out, lse = oracle.moba(q, k, v, block=4, top_k=4)
    want = selection.dense(q, k, v)
    exact(out, want[0])
    exact(lse, want[1])

  def test_never_ahead(self):
    q, k, _ = inputs(7)
    for head in oracle.moba_blocks(q, k, block=3, top_k=2):
      for s, blocks in enumerate(head):
        self.assertIn(s // 3, blocks)
        self.assertLessEqual(blocks[-1], s // 3)
    # What lies ahead changes nothing.
    changed = k.copy()
    changed[9:] = 99
    got = oracle.moba_blocks(q, changed, block=3, top_k=2)
    for a, b in zip(got, oracle.moba_blocks(q, k, block=3, top_k=2)):
      self.assertEqual(a[:9], b[:9])

  def test_decode_is_the_last_row(self):
    q, k, v = inputs(8)
    last, _ = oracle.moba(q[-1:], k, v, block=4, top_k=2, offset=12)
    exact(last[0], oracle.moba(q, k, v, block=4, top_k=2)[0][-1])

  def test_key_convolution(self):
    k, w = normal(0, 6, 2, 3), normal(1, 3, 2, 3)
    exact(oracle.key_convolution(k, np.zeros_like(w)), k)
    padded = np.concatenate([np.zeros((2, 2, 3)), k])
    z = sum(w[lag] * padded[2 - lag : 8 - lag] for lag in range(3))
    exact(oracle.key_convolution(k, w), k + z / (1 + np.exp(-z)))
    changed = k.copy()
    changed[4:] = 7
    exact(
      oracle.key_convolution(changed, w)[:4], oracle.key_convolution(k, w)[:4]
    )

  def test_snr_ranks_blocks(self):
    rng = np.random.default_rng(0)
    for d, block in ((64, 8), (64, 32), (128, 32)):
      q = rng.standard_normal((600, d))
      q /= np.linalg.norm(q, axis=1, keepdims=True)
      noise = rng.standard_normal((2, 600, block, d)) / math.sqrt(d)
      noise[0, :, 0] += 0.8 * q
      scores = np.einsum("nd,bnkd->bn", q, noise) / block
      wins = (scores[0] > scores[1]).mean()
      z = oracle.moba_snr(0.8, d, block)
      self.assertAlmostEqual(
        wins, 0.5 * math.erfc(-z / math.sqrt(2)), delta=0.05
      )
    self.assertEqual(
      oracle.moba_snr(1, 2, 1, clustered=3, cluster_difference=0.5), 2
    )

  @authors("moba")
  def test_authors(self, case):
    s, heads, d = case["shape"]
    q, k, v = (normal(i, s, heads, d) for i in range(3))
    out, _ = oracle.moba(q, k, v, block=case["block"], top_k=case["top_k"])
    close(out.sum(axis=-1), case["out"])


class DsaTest(parameterized.TestCase):
  def test_by_hand(self):
    q = np.array([[[1.0], [-1.0]]] * 4)
    k = np.array([[2.0], [-3.0], [1.0], [0.5]])
    w = np.array([[1.0, 1.0], [1.0, 1.0], [1.0, -1.0], [0.0, 0.0]])
    got = oracle.index_scores(q, k, w)
    want = [[2], [2, 3], [2, -3, 1], [0, 0, 0, 0]]
    for row, x in zip(got, want):
      self.assertEqual(row[: len(x)].tolist(), x)
      self.assertTrue((row[len(x) :] == -np.inf).all())
    chosen = oracle.dsa_keys(got, top_k=2)
    self.assertEqual(chosen, [[0], [0, 1], [0, 2], [0, 1]])
    self.assertEqual(oracle.dsa_keys(got, top_k=1)[1], [1])

  def test_everything_is_dense(self):
    q, k, v = inputs(0)
    scores = oracle.index_scores(
      normal(3, 13, 2, 5), normal(4, 13, 5), normal(5, 13, 2)
    )
    chosen = oracle.dsa_keys(scores, top_k=13)
    exact(
      selection.attend(q, k, v, [chosen] * 4)[0], selection.dense(q, k, v)[0]
    )

  @parameterized.parameters(False, True)
  def test_loss(self, sparse):
    q, k, _ = inputs(0, s=6)
    p = selection.probabilities(q, k)
    args = normal(3, 6, 2, 5), normal(4, 6, 5), normal(5, 6, 2)
    scores = oracle.index_scores(*args)
    keys = oracle.dsa_keys(scores, top_k=3) if sparse else None
    losses, slopes = oracle.dsa_loss(scores, p, keys=keys)
    self.assertTrue((losses[1:] > 0).all())
    exact(losses[0], 0)
    exact(slopes.sum(axis=1), 0)
    for s, t in np.ndindex(6, 6):
      if scores[s, t] == -np.inf:
        self.assertEqual(slopes[s, t], 0)
        continue
      up, down = scores.copy(), scores.copy()
      up[s, t] += 1e-5
      down[s, t] -= 1e-5
      change = (
        oracle.dsa_loss(up, p, keys=keys)[0]
        - oracle.dsa_loss(down, p, keys=keys)[0]
      ).sum()
      np.testing.assert_allclose(slopes[s, t], change / 2e-5, atol=1e-8)

  def test_loss_is_zero_at_the_target(self):
    q, k, _ = inputs(0, s=6)
    p = selection.probabilities(q, k)
    with np.errstate(divide="ignore"):
      scores = np.log(p.sum(axis=0)) + 3
    losses, slopes = oracle.dsa_loss(scores, p)
    exact(losses, 0)
    exact(slopes, 0)

  @authors("dsa")
  def test_authors(self, case):
    s, index_heads, c, heads, kv_heads, d = case["shape"]
    q, k = normal(0, s, index_heads, c), normal(1, s, c)
    w = normal(2, s, index_heads)
    chosen = oracle.dsa_keys(oracle.index_scores(q, k, w), top_k=case["top_k"])
    self.assertEqual(chosen, case["keys"])
    if "out" in case:
      q, k = normal(3, s, heads, d), normal(4, s, kv_heads, d)
      v = normal(5, s, kv_heads, d)
      out, _ = selection.attend(q, k, v, [chosen] * heads)
      close(out.sum(axis=-1), case["out"])


class HisaTest(parameterized.TestCase):
  args = normal(0, 20, 2, 5), normal(1, 20, 5), normal(2, 20, 2)

  def test_all_blocks_are_dsa(self):
    want = oracle.dsa_keys(oracle.index_scores(*self.args), top_k=4)
    got, blocks = oracle.hisa_keys(*self.args, block=3, top_m=7, top_k=4)
    self.assertEqual(got, want)
    self.assertEqual(blocks[19], list(range(7)))
    got, _ = oracle.hisa_keys(*self.args, block=1, top_m=20, top_k=4)
    self.assertEqual(got, want)

  def test_forced_and_within(self):
    got, blocks = oracle.hisa_keys(*self.args, block=3, top_m=3, top_k=4)
    for s, (keys, some) in enumerate(zip(got, blocks)):
      self.assertIn(0, some)
      self.assertIn(s // 3, some)
      self.assertLessEqual(len(some), 3)
      self.assertTrue(all(t // 3 in some and t <= s for t in keys))
      self.assertLen(keys, min(4, len(selection.tokens(some, 3, 20, s))))

  def test_keys_ahead_change_nothing(self):
    q, k, w = self.args
    changed = k.copy()
    changed[10:] = 50
    got = oracle.hisa_keys(q, changed, w, block=3, top_m=3, top_k=4)
    want = oracle.hisa_keys(q, k, w, block=3, top_m=3, top_k=4)
    self.assertEqual(got[0][:10], want[0][:10])

  def test_clustered_keys(self):
    rng = np.random.default_rng(0)
    centers = rng.standard_normal((16, 8))
    k = np.repeat(centers, 8, axis=0) + 0.05 * rng.standard_normal((128, 8))
    q, w = rng.standard_normal((4, 2, 8)), np.abs(rng.standard_normal((4, 2)))
    flat = oracle.dsa_keys(oracle.index_scores(q, k, w, offset=124), top_k=8)
    got, _ = oracle.hisa_keys(q, k, w, block=8, top_m=4, top_k=8, offset=124)
    for a, b in zip(flat, got):
      self.assertGreater(len(set(a) & set(b)) / len(set(a) | set(b)), 0.6)


class InfllmTest(parameterized.TestCase):
  def test_scores_by_hand(self):
    # Windows 0-3, 2-5, 4-7, 6-9 and 8-11; blocks 0-7 and 8-11.
    k = normal(0, 12, 1, 1)
    q = np.ones((1, 1, 1))
    pooled = oracle.nsa_compress(k, length=4, stride=2).ravel()
    e = np.exp(pooled)
    got = oracle.infllm_scores(q, k, offset=11, **INFLLM)[0, 0]
    p = e / e.sum()
    exact(got, [p[:4].max(), p[3:].max()])
    # At position 8 the last window is not past.
    got = oracle.infllm_scores(q, k, offset=8, **INFLLM)[0, 0]
    p = e[:3] / e[:3].sum()
    exact(got, [p.max(), 0])

  def test_group_shares_and_coarse(self):
    q, k, _ = inputs(0, s=24)
    both = oracle.infllm_scores(q, k, **INFLLM)
    self.assertEqual(both.shape, (2, 24, 3))
    # One head a group: the scale of a row changes no order.
    one = oracle.infllm_scores(q[:, :2], k, **INFLLM)
    other = oracle.infllm_scores(q[:, :2], k, coarse=(8, 4), **INFLLM)
    for g, s in np.ndindex(2, 24):
      if s >= 7 and one[g, s].max() > 0:
        ratio = other[g, s] / np.where(one[g, s] > 0, one[g, s], 1)
        exact(ratio[one[g, s] > 0], ratio[0])
    same = oracle.infllm_scores(q, k, coarse=(4, 2), **INFLLM)
    exact(same, both)

  def test_blocks(self):
    q, k, v = inputs(2, s=40)
    options = dict(initial=1, local=2, **INFLLM)
    chosen = oracle.infllm_blocks(q, k, top_k=4, **options)
    for rows in chosen:
      for s, blocks in enumerate(rows):
        own = s // 8
        self.assertContainsSubset({0, own, max(own - 1, 0)}, blocks)
        self.assertLen(blocks, min(4, own + 1))
        self.assertLessEqual(blocks[-1], own)
    everything = oracle.infllm_blocks(q, k, top_k=5, **options)
    self.assertEqual(everything, causal_blocks(40, 8))
    want = selection.dense(q, k, v)[0]
    exact(oracle.infllm(q, k, v, top_k=5, dense_length=0, **options)[0], want)
    exact(oracle.infllm(q, k, v, top_k=3, dense_length=40, **options)[0], want)
    sparse = oracle.infllm(q, k, v, top_k=3, dense_length=39, **options)[0]
    self.assertGreater(np.abs(sparse - want).max(), 0.01)

  @authors("infllm")
  def test_authors(self, case):
    s, heads, kv_heads, d = case["shape"]
    q, k = normal(0, s, heads, d), normal(1, s, kv_heads, d)
    pooled = oracle.nsa_compress(k)
    p = oracle.window_probabilities(q, pooled, length=32, stride=16)
    if "coarse" in case:
      p = oracle.coarse_probabilities(q, k, p, coarse=case["coarse"])
    got = p.reshape(kv_heads, -1, *p.shape[1:]).sum(axis=1)
    close(got[:, case["rows"]], case["scores"])


class SeerTest(parameterized.TestCase):
  def test_rope(self):
    x = normal(0, 4, 2, 6)
    got = oracle.rope(x, [0, 3, 7, 7], base=100.0)
    exact(got[0], x[0])
    exact(np.linalg.norm(got, axis=-1), np.linalg.norm(x, axis=-1))
    # Products depend on the distance.
    y = oracle.rope(np.stack([x[0]] * 2), [2, 5], base=100.0)
    z = oracle.rope(np.stack([x[1]] * 2), [6, 9], base=100.0)
    exact((y[0] * z[0]).sum(-1), (y[1] * z[1]).sum(-1))

  def test_gate(self):
    q, k, _ = inputs(0, s=10)
    w_q, w_k = normal(5, 4, 4, 6), normal(6, 2, 12, 6)
    got = oracle.seer_gate(q, k, w_q, w_k, block=4, base=None)
    self.assertEqual(got.shape, (4, 3, 3))
    self.assertTrue((got[:, 0, 1:] == -np.inf).all())
    a = q[8:10, 3].mean(axis=0) @ w_q[3]
    part = k[4:8, 1]
    b = np.concatenate([part.max(0), part.min(0), part.mean(0)]) @ w_k[1]
    exact(got[3, 2, 1], a @ b / math.sqrt(6))

  def test_target(self):
    q, k, _ = inputs(0, s=10)
    target = oracle.seer_target(q, k, block=4)
    exact(target.sum(axis=-1), 1)
    p = selection.probabilities(q, k)
    largest = [p[1, 4:8, :4].max(), p[1, 4:8, 4:8].max(), 0]
    exact(target[1, 1], largest / np.sum(largest))
    # Blocks of one token: the attention itself.
    exact(oracle.seer_target(q, k, block=1), p)

  def test_loss(self):
    q, k, _ = inputs(0, s=10)
    target = oracle.seer_target(q, k, block=4)
    with np.errstate(divide="ignore"):
      exact(oracle.seer_loss(np.log(target) - 7, target), 0)
    logits = np.where(np.tri(3, dtype=bool), 0.0, -np.inf)[None]
    got = oracle.seer_loss(np.repeat(logits, 4, 0), target)
    entropy = -sum(x * math.log(x) for x in target[2, 2])
    exact(got[2, 2], math.log(3) - entropy)

  def test_blocks(self):
    with np.errstate(divide="ignore"):
      logits = np.log([[[1, 0, 0], [3, 1, 0], [6, 3, 1.0]]])
    choose = functools.partial(oracle.seer_blocks, logits)
    self.assertEqual(choose(top_k=1), [[[0], [1], [2]]])
    self.assertEqual(choose(top_k=2), [[[0], [0, 1], [0, 2]]])
    self.assertEqual(choose(threshold=0.32), [[[0], [0, 1], [0, 2]]])
    self.assertEqual(choose(threshold=0.0), [[[0], [0, 1], [0, 1, 2]]])
    self.assertEqual(choose(threshold=1.0), [[[0], [1], [2]]])
    dense = choose(threshold=1.0, dense_rows=1)
    self.assertEqual(dense, [[[0], [1], [0, 1, 2]]])

  @authors("seer")
  def test_authors(self, case):
    s, heads, kv_heads, d, g = case["shape"]
    block = case["block"]
    kinds = dict(q_pool=case["q_pool"], k_pool=case["k_pool"])
    q, k = normal(0, s, heads, d), normal(1, s, kv_heads, d)
    w_q = normal(2, heads, d * len(case["q_pool"]), g)
    w_k = normal(3, kv_heads, d * len(case["k_pool"]), g)
    logits = oracle.seer_gate(q, k, w_q, w_k, block=block, **kinds)
    p = np.array([[selection.softmax(row) for row in head] for head in logits])
    close(p, case["gate"])
    # They force nothing and count blocks ahead: compare where that is none.
    got = oracle.seer_blocks(logits, threshold=case["threshold"])
    for h, i in np.ndindex(*p.shape[:2]):
      want = set(case["above"][h][i])
      self.assertEqual(set(got[h][i]), want | {i})


class MoaTest(parameterized.TestCase):
  def test_influence_is_the_first_order_change(self):
    q, k, v = inputs(0, s=5, heads=1, kv_heads=1)
    pull = normal(5, 5, 4)
    a = selection.probabilities(q, k)[0]
    slope = pull @ v[:, 0].T
    got = oracle.moa_influence(a, slope)
    # The loss pull . out is linear in the attention: no higher orders.
    for s in range(5):
      for t in range(s + 1):
        kept = [[u for u in range(r + 1) if (r, u) != (s, t)] for r in range(5)]
        out, _ = selection.attend(q, k, v, [kept])
        full, _ = selection.dense(q, k, v)
        change = (pull * (out - full)[:, 0]).sum()
        exact(got[s, t], change)

  def test_spans(self):
    self.assertEqual(oracle.moa_span(-99, 0.5, 16), 1)
    self.assertEqual(oracle.moa_span(0, 0.5, 16), 8)
    influence = np.tri(6)
    self.assertEqual(oracle.moa_damage(influence, 6, sinks=0), 0)
    self.assertEqual(oracle.moa_damage(influence, 1, sinks=0), 15)
    self.assertEqual(oracle.moa_damage(influence, 2, sinks=1), 6)
    self.assertEqual(oracle.moa_damage(influence, 1, sinks=6), 0)

  def test_plan_gives_length_to_the_head_that_needs_it(self):
    local = lambda n: np.eye(n) + np.eye(n, k=-1)
    far = lambda n: np.tri(n, k=-4)
    profiles = [[local(n), far(n)] for n in (8, 12)]
    options = [(2, 0.0), (0, 0.5), (0, 1.0)]
    plan = functools.partial(oracle.moa_spans, profiles, options, sinks=0)
    self.assertEqual(plan(density=[1, 1]), [0, 2])
    self.assertEqual(plan(density=[0.625, 0.6]), [0, 2])
    self.assertEqual(plan(density=[0.5, 0.5]), [0, 1])
    self.assertEqual(plan(density=[0.25, 0.25]), [0, 0])
    self.assertIsNone(plan(density=[0.2, 0.2]))

  @authors("moa")
  def test_authors(self, case):
    s, heads, d = case["shape"]
    q, k, v = (normal(i, s, heads, d) for i in range(3))
    pull = normal(3, s, heads, d)
    p = selection.probabilities(q, k)
    for h in range(heads):
      got = oracle.moa_influence(p[h], pull[:, h] @ v[:, h].T)
      want = np.array(case["effect"][h])
      # Beyond the diagonal theirs has no meaning.
      close(np.tril(got), np.tril(want))


class MosaTest(parameterized.TestCase):
  def test_by_hand(self):
    scores = np.array([[0.1, 0.9], [0.8, 0.2], [0.8, 0.3], [0.3, 0.3]])
    choose = functools.partial(oracle.mosa_tokens, scores)
    self.assertEqual(choose(k=2), [[1, 2], [0, 2]])
    self.assertEqual(choose(k=2, include_first=True), [[0, 1], [0, 2]])
    self.assertEqual(choose(k=3), [[1, 2, 3], [0, 2, 3]])
    self.assertEqual(choose(k=1), choose(k=2))
    self.assertEqual(choose(k=9), [[0, 1, 2, 3]] * 2)

  def test_all_tokens_are_dense(self):
    q, k, v = (normal(i, 6, 2, 3) for i in range(3))
    scores = np.ones((6, 2))
    chosen = oracle.mosa_tokens(scores, k=6)
    exact(
      oracle.mosa(scores, q, k, v, chosen=chosen), selection.dense(q, k, v)[0]
    )

  def test_only_the_chosen(self):
    q, k, v = (normal(i, 6, 1, 3) for i in range(3))
    scores = normal(3, 6, 1)
    out = oracle.mosa(scores, q, k, v, chosen=[[1, 4]])
    exact(out[[0, 2, 3, 5]], 0)
    exact(out[1, 0], scores[1, 0] * v[1, 0])
    # A later token matters through the choice alone.
    k[5], v[5] = 9, 9
    exact(oracle.mosa(scores, q, k, v, chosen=[[1, 4]]), out)

  @authors("mosa")
  def test_authors(self, case):
    s, heads, d, h = case["shape"]
    x, w_r = normal(0, s, h), normal(1, heads, h)
    w_qkv, w_o = normal(2, heads, h, 3 * d), normal(3, heads, d, h)
    scores = 1 / (1 + np.exp(-x @ w_r.T))
    q, k, v = np.split(np.einsum("ti,eij->tej", x, w_qkv), 3, axis=-1)
    turned = case["turned"]
    turn = lambda z: np.concatenate(
      [oracle.rope(z[..., :turned], range(s)), z[..., turned:]], axis=-1
    )
    chosen = oracle.mosa_tokens(
      scores, k=case["k"], include_first=case["include_first"]
    )
    self.assertEqual(chosen, case["tokens"])
    out = oracle.mosa(scores, turn(q), turn(k), v, chosen=chosen)
    close(np.einsum("ted,edi->ti", out, w_o), case["out"], atol=2e-5)
