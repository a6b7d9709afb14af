"""The oracle of fine-tuning: NumPy, brute force, differences, peft.

data/finetuning_authors.json has what peft and the methods' authors' code give
for numbers drawn by `normal`.
"""

import functools
import itertools
import json
import math
import pathlib

from absl.testing import parameterized
import numpy as np

from tests.oracles import activations
from tests.oracles import finetuning as oracle
from tests.oracles import routing

AUTHORS = json.loads(
  (pathlib.Path(__file__).parent / "data/finetuning_authors.json").read_text()
)["results"]
exact = functools.partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-13)
# The authors' numbers are written with twelve digits.
printed = functools.partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-11)


def normal(seed, *shape):
  return np.random.default_rng(seed).standard_normal(shape)


def softmax(z):
  p = np.exp(z - z.max(-1, keepdims=True))
  return p / p.sum(-1, keepdims=True)


class LoraTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.w, self.a, self.b = normal(1, 6, 4), normal(2, 6, 2), normal(3, 2, 4)
    self.x, self.g = normal(4, 3, 6), normal(5, 3, 4)

  def test_against_peft(self):
    args = self.x, self.w, self.a, self.b, 3.0
    printed(oracle.lora(*args).ravel(), AUTHORS["peft"])
    merged = oracle.lora_merge(*args[1:])
    printed(merged.ravel(), AUTHORS["peft_merged"])
    exact(self.x @ merged, oracle.lora(*args))
    dx, da, db = oracle.lora_gradients(*args, self.g)
    printed(da.ravel(), AUTHORS["peft_a"])
    printed(db.ravel(), AUTHORS["peft_b"])
    exact(dx, self.g @ merged.T)

  def test_root(self):
    delta = oracle.lora_delta(self.a, self.b, 3.0, root=True)
    printed((self.x @ (self.w + delta)).ravel(), AUTHORS["peft_root"])
    printed((self.w + delta).ravel(), AUTHORS["peft_root_merged"])

  def test_zero_b(self):
    args = self.x, self.w, self.a, 0 * self.b, 3.0
    exact(oracle.lora(*args), self.x @ self.w)
    _, da, db = oracle.lora_gradients(*args, self.g)
    self.assertEqual(np.abs(da).max(), 0)
    self.assertGreater(np.abs(db).max(), 0)


class LoraDropoutTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.a, self.b = normal(0, 4, 2), normal(1, 2, 3)
    self.full = 1.5 * self.a @ self.b

  def test_rows_and_columns(self):
    inputs, outputs = np.array([1, 0, 1, 1]), np.array([1, 1, 0])
    delta = oracle.lora_dropout_delta(self.a, self.b, 3.0, inputs, outputs)
    exact(delta, np.diag(inputs) @ self.full @ np.diag(outputs))
    self.assertEqual(np.linalg.matrix_rank(delta), 2)

  def test_all_masks(self):
    p = 0.3
    mean, zeros, scaled = 0.0, 0.0, 0.0
    for bits in itertools.product([0, 1], repeat=7):
      share = math.prod(1 - p if bit else p for bit in bits)
      masks = np.array(bits[:4]), np.array(bits[4:])
      delta = oracle.lora_dropout_delta(self.a, self.b, 3.0, *masks)
      mean = mean + share * delta
      zeros += share * (delta == 0).mean()
      delta = oracle.lora_dropout_delta(self.a, self.b, 3.0, *masks, rescale=p)
      scaled = scaled + share * delta
    exact(mean, (1 - p) ** 2 * self.full)
    exact(zeros, 2 * p - p * p)
    exact(scaled, self.full)

  def test_ensemble(self):
    x, w, y = normal(2, 5, 4), normal(3, 4, 3), normal(4, 5, 3)
    rng = np.random.default_rng(5)
    masks = [(rng.random(4) > 0.4, rng.random(3) > 0.4) for _ in range(4)]
    out = oracle.lora_ensemble(x, w, self.a, self.b, 3.0, masks)
    each = [
      x @ (w + np.diag(i * 1.0) @ self.full @ np.diag(o * 1.0))
      for i, o in masks
    ]
    exact(out, np.mean(each, 0))
    loss = lambda z: ((z - y) ** 2).mean()
    self.assertLess(loss(out), np.mean([loss(z) for z in each]))
    on = [(np.ones(4, bool), np.ones(3, bool))]
    exact(
      oracle.lora_ensemble(x, w, self.a, self.b, 3.0, on),
      oracle.lora(x, w, self.a, self.b, 3.0),
    )


class MixtureTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.x, self.w = normal(0, 5, 4), normal(1, 4, 3)
    self.a, self.b = normal(2, 4, 4, 2), normal(3, 4, 2, 3)
    self.logits = normal(4, 5, 4)

  @parameterized.product(k=(1, 2, 4), normalize=(True, False))
  def test_against_einsum(self, k, normalize):
    gates = oracle.top_k_gates(self.logits, k, normalize)
    other = routing.top_k(self.logits, k, renormalize=normalize).dense()
    exact(gates, other)
    out = oracle.lora_moe(self.x, self.w, self.a, self.b, 3.0, gates)
    low = np.einsum("ti,eir,ero->teo", self.x, self.a, self.b)
    exact(out, self.x @ self.w + 1.5 * np.einsum("teo,te->to", low, gates))

  def test_one_expert_is_lora(self):
    a, b = self.a[:1], self.b[:1]
    gates = oracle.top_k_gates(self.logits[:, :1], 1)
    out = oracle.lora_moe(self.x, self.w, a, b, 3.0, gates)
    exact(out, oracle.lora(self.x, self.w, a[0], b[0], 3.0))
    exact(oracle.sira_gates(self.logits[:, :1], 1, capacity=5), gates)

  def test_octavius(self):
    gates = oracle.octavius_gates(normal(7, 3, 6, 5), normal(6, 5, 4))
    printed(gates.ravel(), AUTHORS["octavius"])
    self.assertEqual((gates > 0).sum(1).tolist(), [2, 2, 2])

  def test_octavius_padding(self):
    x, w = normal(7, 2, 6, 5), normal(6, 5, 4)
    valid = np.arange(6) < np.array([[4], [6]])
    gates = oracle.octavius_gates(x, w, valid)
    exact(gates[:1], oracle.octavius_gates(x[:1, :4], w))
    exact(gates[1:], oracle.octavius_gates(x[1:], w))

  @parameterized.parameters(1, 2, 3)
  def test_sira(self, capacity):
    keep = normal(5, 5, 4) > -0.5
    gates = oracle.sira_gates(self.logits, 2, capacity, keep)
    self.assertLessEqual((gates > 0).sum(0).max(), capacity)
    self.assertFalse((gates > 0)[~keep].any())
    # The same edges by the definition of a router with capacity.
    logits = np.where(keep, self.logits, -np.inf)
    assignment = routing.top_k(logits, 2)
    kept = routing.keep(assignment, capacity)
    p = softmax(self.logits)
    wanted = np.zeros((5, 4))
    for edge, token, expert, _ in assignment.edges():
      if kept[edge] and keep[token, expert]:
        wanted[token, expert] = p[token, expert]
    exact(gates, wanted)

  def test_sira_at_evaluation(self):
    exact(oracle.sira_gates(self.logits, 2), oracle.top_k_gates(self.logits, 2))
    sums = oracle.sira_gates(self.logits, 2, normalize=True).sum(1)
    exact(sums, np.ones(5))


class MaskedOptimizerTest(parameterized.TestCase):
  @parameterized.parameters(0.0, 0.1)
  def test_against_the_packed_vector(self, weight_decay):
    leaves = [normal(0, 3, 4), normal(1, 5)]
    masks = [normal(2, 3, 4) > 0, normal(3, 5) > 0]
    steps = [[normal(10 + t, 3, 4), normal(20 + t, 5)] for t in range(4)]
    new, (m, v) = oracle.masked_adamw(
      leaves, masks, steps, 0.1, weight_decay=weight_decay
    )
    pack = lambda tree: np.concatenate(
      [leaf[mask] for leaf, mask in zip(tree, masks, strict=True)]
    )
    w, first, second = pack(leaves), 0.0, 0.0
    for t, step in enumerate(steps, 1):
      g = pack(step)
      first = 0.9 * first + 0.1 * g
      second = 0.999 * second + 0.001 * g * g
      update = (first / (1 - 0.9**t)) / (
        np.sqrt(second / (1 - 0.999**t)) + 1e-8
      )
      w = w - 0.1 * (update + weight_decay * w)
    exact(pack(new), w)
    exact(m, first)
    exact(v, second)
    self.assertLen(m, oracle.trained_count(masks))
    for old, leaf, mask in zip(leaves, new, masks, strict=True):
      np.testing.assert_array_equal(leaf[~mask], old[~mask])
      self.assertTrue((leaf[mask] != old[mask]).all())


class FishTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.w, self.x = normal(8, 3, 4), normal(9, 7, 3)
    self.y = [0, 3, 1, 2, 0, 1, 3]
    self.gradients = [
      oracle.log_likelihood_gradient(x, y, self.w)
      for x, y in zip(self.x, self.y, strict=True)
    ]

  def test_against_the_authors(self):
    scores = oracle.fisher([[g] for g in self.gradients])[0]
    # They add up what is averaged here.
    printed(7 * scores.ravel(), AUTHORS["fish_label_square"])
    sizes = np.abs(self.gradients).sum(0)
    printed(sizes.ravel(), AUTHORS["fish_label_absolute"])
    expected = oracle.logistic_fisher(self.x, self.w)
    printed(7 * expected.ravel(), AUTHORS["fish_expect"])

  def test_closed_forms(self):
    scores = oracle.fisher([[g] for g in self.gradients])[0]
    exact(scores, oracle.logistic_fisher(self.x, self.w, self.y))
    # The expectation over the labels that the model draws.
    total = 0.0
    for x in self.x:
      p = softmax(x @ self.w)
      for y in range(4):
        g = oracle.log_likelihood_gradient(x, y, self.w)
        total = total + p[y] * g**2 / 7
    exact(total, oracle.logistic_fisher(self.x, self.w))

  def test_gradient(self):
    for x, y, g in zip(self.x, self.y, self.gradients, strict=True):
      likelihood = lambda w, x=x, y=y: np.log(softmax(x @ w)[y])
      numeric = routing.numerical_gradient(likelihood, self.w)
      np.testing.assert_allclose(g, numeric, atol=1e-8)

  def test_not_the_square_of_the_batch(self):
    scores = oracle.fisher([[g] for g in self.gradients])[0]
    self.assertGreater(
      np.abs(scores - np.mean(self.gradients, 0) ** 2).max(), 0.1
    )

  def test_mask(self):
    scores = [normal(0, 3, 4) ** 2, normal(1, 5) ** 2, normal(2, 2) ** 2]
    masks = oracle.fish_mask(scores, 9, always=(2,))
    self.assertEqual(oracle.trained_count(masks), 9)
    self.assertTrue(masks[2].all())
    flat = np.concatenate([s.ravel() for s in scores[:2]])
    limit = np.sort(flat)[-7]
    for s, m in zip(scores[:2], masks[:2], strict=True):
      np.testing.assert_array_equal(m, s >= limit)


class LtSftTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.before = [normal(12, 4, 5), normal(13, 7)]
    self.after = [normal(14, 4, 5), normal(15, 7)]

  def flat(self, masks):
    return [int(v) for mask in masks for v in mask.ravel()]

  def test_against_the_authors(self):
    masks = oracle.most_changed(self.before, self.after, 6)
    self.assertEqual(self.flat(masks), AUTHORS["lt_sft_6"])
    more = oracle.most_changed(self.before, self.after, 4, masks)
    self.assertEqual(self.flat(more), AUTHORS["lt_sft_6_4"])

  def test_ties(self):
    masks = oracle.most_changed([np.zeros(4)], [np.ones(4)], 2)
    self.assertEqual(self.flat(masks), [1, 1, 0, 0])
    # What has a mask is not chosen again, even before what never changed.
    more = oracle.most_changed([np.zeros(4)], [np.zeros(4)], 2, masks)
    self.assertEqual(self.flat(more), [1, 1, 1, 1])

  def test_difference(self):
    dense = normal(10, 3, 4) * (normal(11, 3, 4) > 0.3)
    entries = oracle.sparse_difference(
      [np.zeros((3, 4))], [dense], [dense != 0]
    )[0]
    # The authors' steps run down the columns.
    steps = np.cumsum(AUTHORS["sft_steps"])
    theirs = {
      int(s % 3 * 4 + s // 3): v
      for s, v in zip(steps, AUTHORS["sft_values"], strict=True)
    }
    self.assertEqual([i for i, _ in entries], sorted(theirs))
    printed([v for _, v in entries], [theirs[i] for i, _ in entries])

  def test_compose(self):
    one = oracle.most_changed(self.before, self.after, 6)
    two = [~m for m in one]
    parts = [
      oracle.sparse_difference(self.before, self.after, m) for m in (one, two)
    ]
    self.assertEqual(sum(len(leaf) for leaf in parts[0]), 6)
    whole = oracle.compose(self.before, parts)
    half = oracle.compose(self.before, parts[:1])
    for old, new, all_, some, mask in zip(
      self.before, self.after, whole, half, one, strict=True
    ):
      exact(all_, new)
      np.testing.assert_array_equal(some[~mask], old[~mask])

  def test_penalty(self):
    flat = np.concatenate(
      [(b - a).ravel() for b, a in zip(self.before, self.after, strict=True)]
    )
    found = oracle.distance_penalty(self.before, self.after, 0.3)
    exact(found, 0.3 * np.abs(flat).mean())


class SmtTest(parameterized.TestCase):
  @parameterized.parameters("mean_abs", "abs_mean")
  def test_against_the_authors(self, rule):
    # Their weights are [outputs, inputs], which blocks do not mind.
    scores = [
      oracle.block_scores([normal(16, 6, 9)], (3, 3), rule),
      oracle.block_scores([normal(17, 9, 6)], (3, 3), rule),
    ]
    blocks = oracle.select_blocks(scores, 5)
    found = [[list(map(int, b)) for b in each] for each in blocks]
    self.assertEqual(found, AUTHORS[f"smt_{rule}"])

  def test_scores(self):
    steps = [normal(t, 4, 6) for t in range(3)]
    for rule, whole in (
      ("sum_abs", np.abs(steps).sum(0)),
      ("abs_mean", np.abs(np.sum(steps, 0))),
      ("mean_abs", np.sum(steps, 0)),
    ):
      pooled = whole.reshape(2, 2, 2, 3).mean((1, 3))
      exact(oracle.block_scores(steps, (2, 3), rule), np.abs(pooled))

  def test_gradient_of_the_authors(self):
    x, g = normal(18, 2, 4, 9).reshape(8, 9), normal(19, 2, 4, 6).reshape(8, 6)
    # Blocks (0, 1) and (1, 2) of [outputs, inputs].
    found = oracle.block_gradients(x, g, [(1, 0), (2, 1)], (3, 3))
    theirs = np.reshape(AUTHORS["smt_gradient"], (2, 3, 3))
    printed(found, theirs.transpose(0, 2, 1))

  def test_slices(self):
    x, g, w = normal(0, 5, 4), normal(1, 5, 6), normal(2, 4, 6)
    blocks = [(0, 1), (1, 0)]
    full = oracle.gather_blocks(x.T @ g, blocks, (2, 3))
    exact(oracle.block_gradients(x, g, blocks, (2, 3)), full)
    values = oracle.gather_blocks(w, blocks, (2, 3))
    exact(oracle.scatter_blocks(w, blocks, values), w)
    new = oracle.scatter_blocks(w, blocks, values + 1)
    self.assertEqual((new != w).sum(), values.size)
    exact(oracle.gather_blocks(new, blocks, (2, 3)), values + 1)


class S2ftTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.up, self.gate, self.down = normal(20, 4, 6), normal(21, 4, 6), None
    self.down = normal(22, 6, 4)
    self.x, self.g = normal(23, 3, 4), normal(24, 3, 4)

  def permuted(self, order):
    return (
      oracle.permute_columns(self.gate, order),
      oracle.permute_columns(self.up, order),
      oracle.permute_rows(self.down, order),
    )

  def test_against_the_authors(self):
    order, first, second = oracle.s2ft_order([4, 1], [1, 3], 6)
    self.assertEqual([*first, *second], AUTHORS["s2ft_slices"])
    gate, up, down = self.permuted(order)
    printed(up.ravel(), AUTHORS["s2ft_up"])
    printed(down.ravel(), AUTHORS["s2ft_down"])
    found = oracle.s2ft_gradients(self.x, gate, up, down, self.g, first, second)
    printed(found[0].ravel(), AUTHORS["s2ft_up_gradient"])
    printed(found[1].ravel(), AUTHORS["s2ft_down_gradient"])

  @parameterized.parameters(
    (([], [2]),), (([5, 0], []),), (([3, 1, 2], [2, 1]),), (([], []),)
  )
  def test_slices_of_the_full_gradient(self, chosen):
    order, first, second = oracle.s2ft_order(*chosen, 6)
    self.assertEqual(set(order[slice(*first)]), set(chosen[0]))
    self.assertEqual(set(order[slice(*second)]), set(chosen[1]))
    self.assertEqual(sorted(order), list(range(6)))
    back = oracle.inverse(order)
    self.assertEqual([order[i] for i in back], list(range(6)))
    gate, up, down = self.permuted(order)
    before, _ = oracle.gated_ffn(self.x, self.gate, self.up, self.down)
    after, _ = oracle.gated_ffn(self.x, gate, up, down)
    exact(after, before)
    exact(oracle.permute_columns(up, back), self.up)
    full = oracle.gated_ffn_gradients(self.x, gate, up, down, self.g)
    part = oracle.s2ft_gradients(self.x, gate, up, down, self.g, first, second)
    exact(part[0], full[0][:, slice(*first)])
    exact(part[1], full[1][slice(*second)])

  def test_full_gradients(self):
    args = self.x, self.gate, self.up, self.down
    up, down = oracle.gated_ffn_gradients(*args, self.g)
    loss = lambda u, d: (
      oracle.gated_ffn(self.x, self.gate, u, d)[0] * self.g
    ).sum()
    near = functools.partial(np.testing.assert_allclose, atol=1e-7)
    near(up, routing.numerical_gradient(lambda u: loss(u, self.down), self.up))
    near(
      down, routing.numerical_gradient(lambda d: loss(self.up, d), self.down)
    )

  def test_heads(self):
    """Heads in groups of two share their keys: whole groups move."""
    q, k, v, o = (
      normal(s, *shape)
      for s, shape in enumerate(((5, 12), (5, 6), (5, 6), (12, 5)))
    )
    x, order = normal(5, 4, 5), [2, 0, 1]

    def block(q, k, v, o):
      heads = lambda a, n: a.reshape(4, n, 2)
      out, _ = activations.attention(
        heads(x @ q, 6), heads(x @ k, 3), heads(x @ v, 3)
      )
      return out.reshape(4, 12) @ o

    moved = block(
      oracle.permute_columns(q, order, 4),
      oracle.permute_columns(k, order, 2),
      oracle.permute_columns(v, order, 2),
      oracle.permute_rows(o, order, 4),
    )
    exact(moved, block(q, k, v, o))


class MeterTest(parameterized.TestCase):
  def test_against_numpy(self):
    before = [normal(0, 4, 5), normal(1, 6)]
    change = [normal(2, 4, 5) * (normal(3, 4, 5) > 0), 1e-6 * normal(4, 6)]
    after = [b + c for b, c in zip(before, change, strict=True)]
    same = sum((np.abs(c) <= 1e-5).sum() for c in change)
    exact(oracle.update_sparsity(before, after), same / 26)
    mask = oracle.update_mask(before[0], after[0])
    np.testing.assert_array_equal(mask, np.abs(change[0]) > 1e-5)

  def test_overlap(self):
    one, two = normal(0, 9, 9) > 0.3, normal(1, 9, 9) > 0.8
    found = oracle.overlap(one, two)
    both = (one & two).sum()
    exact(found, (both / one.sum(), both / two.sum(), one.mean() * two.mean()))

  @parameterized.parameters(1, 2, 4)
  def test_rank(self, rank):
    change = normal(0, 6, rank) @ normal(1, rank, 4)
    before = normal(2, 6, 4)
    self.assertEqual(oracle.update_rank(before, before + change), rank)


class SparseLocoTest(parameterized.TestCase):
  def test_sides(self):
    sizes = (1, 2, 7, 63, 64, 65, 96, 100, 127, 128, 768)
    found = [oracle.chunk_side(n, 64) for n in sizes]
    self.assertEqual(found, AUTHORS["loco_split"])

  @parameterized.parameters(4, 256)
  def test_against_the_authors(self, levels):
    e = normal(25, 6, 8)
    sent, left = oracle.send(e, np.zeros((6, 8)), 0.9, 2, 4, levels)
    # Their table is float32.
    np.testing.assert_allclose(
      sent.ravel(), AUTHORS[f"loco_{levels}"], rtol=1e-6
    )
    exact(sent + left, e)

  def test_replicas(self):
    zero = np.zeros((6, 8))
    sent = [
      oracle.send(normal(s, 6, 8), zero, 0.9, 2, 4)[0] for s in (26, 27, 28)
    ]
    found = oracle.outer_step(zero, sent, -1.0, "senders")
    printed(found.ravel(), AUTHORS["loco_mean"])
    exact(oracle.outer_step(zero, sent, -2.0), 2 * np.mean(sent, 0))

  @parameterized.parameters(((6, 8), 4), ((5, 7), 4), ((12,), 5), ((1,), 64))
  def test_chunks(self, shape, target):
    found = oracle.chunks(shape, target)
    self.assertEqual(
      sorted(i for chunk in found for i in chunk), list(range(math.prod(shape)))
    )
    mask = oracle.chunked_top_k(normal(0, *shape), 1, target)
    self.assertEqual(mask.sum(), len(found))

  @parameterized.parameters(None, 2, 4, 16)
  def test_conservation(self, levels):
    error = normal(0, 6, 4)
    for t in range(3):
      delta = normal(1 + t, 6, 4)
      sent, left = oracle.send(delta, error, 0.95, 2, 3, levels)
      exact(sent + left, 0.95 * error + delta)
      if levels is not None:
        self.assertLessEqual(len({v for v in sent.ravel() if v}), levels)
      error = left

  def test_plain_averaging(self):
    theta, deltas = normal(0, 4, 6), [normal(s, 4, 6) for s in (1, 2, 3)]
    sent = [oracle.send(d, np.zeros((4, 6)), 0.0, 24, 6)[0] for d in deltas]
    exact(oracle.outer_step(theta, sent, 1.0), theta - np.mean(deltas, 0))

  @parameterized.parameters(1, 2, 7, 40)
  def test_quantize(self, n):
    values = [float(v) for v in normal(n, n)]
    codes, table = oracle.quantize(values)
    self.assertTrue(set(codes) <= {0, 1, 2, 3})
    # Means of the groups: the mean of all is kept.
    exact(np.mean([table[c] for c in codes]), np.mean(values), atol=1e-12)
    same, same_table = oracle.quantize([3.0] * n)
    exact([same_table[c] for c in same], 3.0)
    order = np.argsort(values)
    self.assertEqual([codes[i] for i in order], sorted(codes))

  def test_error_feedback(self):
    """Two replicas pull one entry apart, and send no other without memory."""
    goal = normal(0, 8)
    pull = np.array([3.0] + [0.0] * 7)
    ends = {}
    for beta in (0.0, 0.95):
      theta, errors = np.zeros(8), [np.zeros(8)] * 2
      for _ in range(400):
        sent = []
        for r, sign in enumerate((1, -1)):
          delta = 0.05 * (theta - goal + sign * pull)
          one, errors[r] = oracle.send(delta, errors[r], beta, 1, 8)
          sent.append(one)
        theta = oracle.outer_step(theta, sent, 1.0)
      ends[beta] = np.abs(theta - goal)[1:].max()
    self.assertEqual(ends[0.0], np.abs(goal[1:]).max())
    self.assertLess(ends[0.95], 0.2 * ends[0.0])
