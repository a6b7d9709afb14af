"""The attention oracle against itself, whole arrays, and small sums."""

import dataclasses
import math

from absl.testing import parameterized
import numpy as np

from tests.oracles import attention as oracle

FEATURES = (
  "columns",
  "dlse",
  "level",
  "members",
  "positions",
  "rule",
  "scale",
  "segments",
  "sinks",
  "skip",
  "softcap",
)
# The definition has no level with a threshold.
EVERYTHING = tuple(
  tuple(f for f in FEATURES if f != out) for out in ("level", "skip")
)
CASES = ((), *[(f,) for f in FEATURES], *EVERYTHING)
STEP = 1e-5


def rule(q_position, kv_position):
  """Causal with a few global keys; takes ints and arrays."""
  return (kv_position <= q_position) | (kv_position % 3 == 0)


@dataclasses.dataclass
class Case:
  """Arguments of the oracle; the heads are 2 to a key head."""

  arrays: dict  # q, k, v
  lists: tuple  # indices, counts
  options: dict
  dout: np.ndarray
  dlse: np.ndarray | None

  def attention(self, **changed):
    return oracle.attention(
      *self.arrays.values(), *self.lists, **self.options | changed
    )

  def gradients(self):
    return oracle.gradients(
      *self.arrays.values(),
      *self.lists,
      **self.options,
      dout=self.dout,
      dlse=self.dlse,
    )

  def loss(self, **changed):
    """What `gradients` is the gradient of."""
    arrays = {key: changed.pop(key, x) for key, x in self.arrays.items()}
    got = oracle.attention(
      *arrays.values(), *self.lists, **self.options | changed
    )
    loss = np.sum(self.dout * got.out)
    if self.dlse is not None:
      some = np.isfinite(got.lse)
      loss += np.sum(self.dlse[some] * got.lse[some])
    return loss


def random_lists(rng, shape, capacity, kv_blocks):
  """Canonical lists with at least half the capacity; the first is empty."""
  indices = np.zeros((*shape, capacity), np.int32)
  counts = rng.integers((capacity + 1) // 2, capacity + 1, shape, np.int32)
  counts[..., 0] = 0
  for where in np.ndindex(*shape):
    count = counts[where]
    indices[where][:count] = np.sort(
      rng.choice(kv_blocks, count, replace=False)
    )
  return indices, counts


def random_columns(rng, indices, counts, width, block_kv, keys):
  """Canonical columns; none where nothing is listed."""
  columns = np.full((*counts.shape, width), -1, np.int32)
  for where in np.ndindex(*counts.shape):
    listed = indices[where][: counts[where]]
    free = [t for t in range(keys) if t // block_kv not in listed]
    count = min(int(rng.integers(width + 1)), len(free))
    if counts[where]:
      columns[where][:count] = np.sort(rng.choice(free, count, replace=False))
  return columns


def random_case(
  seed,
  features,
  *,
  batch=2,
  queries=5,
  keys=7,
  kv_heads=1,
  dim=2,
  block_q=2,
  block_kv=2,
):
  rng = np.random.default_rng(seed)
  heads = 2 * kv_heads
  if "level" in features:
    block_kv, keys = 4, 8
  q_blocks, kv_blocks = -(-queries // block_q), -(-keys // block_kv)
  capacity = max(kv_blocks - 1, 2)
  shared = rng.permutation([(1, 1), (1, heads), (batch, 1), (batch, heads)])
  shape = (*shared[0], q_blocks)
  indices, counts = random_lists(rng, shape, capacity, kv_blocks)
  options = dict(block_q=block_q, block_kv=block_kv)
  if "columns" in features:
    options["columns"] = random_columns(rng, indices, counts, 3, block_kv, keys)
  if "level" in features:
    options["level"] = rng.integers(0, 3, indices.shape, np.int8)
  if "members" in features:
    words = (*shape, -(-capacity // 32), block_q)
    options["members"] = rng.integers(0, 2**32, words, np.uint32)
  if "positions" in features:
    options["q_positions"] = rng.permutation(queries) + 1
    options["kv_positions"] = rng.integers(0, keys, (batch, keys))
  if "rule" in features:
    options["rule"] = rule
  if "scale" in features:
    options["scale"] = 0.4
  if "segments" in features:
    options["q_segment_ids"] = rng.integers(0, 2, (batch, queries))
    options["kv_segment_ids"] = rng.integers(0, 2, keys)
  if "sinks" in features:
    options["sinks"] = rng.normal(size=heads)
  if "skip" in features:
    options["skip_threshold"] = 0.6
  if "softcap" in features:
    options["softcap"] = 1.5
  arrays = dict(
    q=2 * rng.normal(size=(batch, queries, heads, dim)),
    k=rng.normal(size=(batch, keys, kv_heads, dim)),
    v=rng.normal(size=(batch, keys, kv_heads, dim)),
  )
  dout = rng.normal(size=(batch, queries, heads, dim))
  dlse = None
  if "dlse" in features:
    dlse = rng.normal(size=(batch, queries, heads))
  return Case(arrays, (indices, counts), options, dout, dlse)


def skips(case):
  """Whether a readable block is skipped, and no decision is a close one."""
  got, all_kept = case.attention(), case.attention(skip_threshold=0.0)
  return np.any(all_kept.kept & ~got.kept) and got.skip_margin > 1e-3


def case_that_skips(seed, features, **sizes):
  if "skip" not in features:
    return random_case(seed, features, **sizes)
  seeds = range(1000 * seed, 1000 * seed + 100)
  cases = (random_case(s, features, **sizes) for s in seeds)
  return next(filter(skips, cases))


def kept_blocks(logits, listed, threshold):
  """The skipping of one tile; logits [rows, kv_blocks, block_kv]."""
  if threshold is None:
    return list(listed)
  kept, before = [], np.full((len(logits), 1), -np.inf)
  for j in listed:
    # The weight of this block's best key, in terms of the best so far.
    best = np.maximum(before, logits[:, j].max(axis=1, keepdims=True))
    readable = np.isfinite(best)
    ratio = np.exp(logits[:, j] - np.where(readable, best, 0.0))
    if np.any((ratio >= threshold) & np.isfinite(logits[:, j])):
      kept.append(j)
      before = best
  return kept


def whole_array_attention(case):
  """The same by masked arrays, a run being its keys with equal contents."""
  q, k, v = case.arrays.values()
  batch, queries, heads, dim = q.shape
  keys = k.shape[1]
  options = case.options
  block_q, block_kv = options["block_q"], options["block_kv"]
  q_blocks, kv_blocks = -(-queries // block_q), -(-keys // block_kv)
  padded = kv_blocks * block_kv
  indices, counts = (
    np.broadcast_to(x, (batch, heads, *x.shape[2:])) for x in case.lists
  )
  shared = {
    name: np.broadcast_to(x, (batch, heads, *x.shape[2:]))
    for name in ("columns", "level", "members")
    if (x := options.get(name)) is not None
  }

  def per_token(name, length):
    x = options.get(name)
    default = np.arange(length) if "positions" in name else 0
    return np.broadcast_to(default if x is None else x, (batch, length))

  q_positions = per_token("q_positions", queries)
  q_segments = per_token("q_segment_ids", queries)
  of_keys = (
    per_token("kv_positions", keys)[..., None],
    per_token("kv_segment_ids", keys)[..., None],
  )

  out = np.zeros(q.shape)
  lse = np.zeros(q.shape[:3])
  kept = np.zeros(indices.shape, bool)
  mass_sum = np.zeros(indices.shape)
  mass_max = np.zeros(indices.shape)
  for b, h, i in np.ndindex(batch, heads, q_blocks):
    listed = indices[b, h, i, : counts[b, h, i]]
    rows = np.arange(i * block_q, min((i + 1) * block_q, queries))
    levels = np.zeros(kv_blocks, int)
    if "level" in shared:
      levels[listed] = shared["level"][b, h, i, : len(listed)]

    def runs(x, last, levels=levels):
      """Every key's [T, ..] replaced by the mean or the last of its run."""
      x = np.pad(x, ((0, padded - keys), (0, 0)))
      x = x.reshape(kv_blocks, block_kv, -1)
      parts = []
      for part, n in zip(x, 2**levels, strict=True):
        part = part.reshape(block_kv // n, n, -1)
        one = part[:, -1:] if last else part.mean(axis=1, keepdims=True)
        parts.append(np.repeat(one, n, axis=1).reshape(block_kv, -1))
      return np.concatenate(parts)

    key, value = runs(k[b, :, h // 2], False), runs(v[b, :, h // 2], False)
    position, segment = (runs(x[b], True)[:, 0] for x in of_keys)

    reads = np.zeros((len(rows), kv_blocks, block_kv), bool)
    for c, j in enumerate(listed):
      member = True
      if "members" in shared:
        words = shared["members"][b, h, i, c // 32, : len(rows)]
        member = (words[:, None] & np.uint32(1 << (c % 32))) != 0
      reads[:, j] = member
    reads = reads.reshape(len(rows), padded)
    if "columns" in shared:
      columns = shared["columns"][b, h, i]
      reads[:, columns[columns >= 0]] = True
    reads &= np.arange(padded) < keys
    if "rule" in options:
      reads &= options["rule"](q_positions[b, rows, None], position)
    reads &= q_segments[b, rows, None] == segment

    logits = q[b, rows, h] @ key.T * options.get("scale", dim**-0.5)
    if "softcap" in options:
      cap = options["softcap"]
      logits = cap * np.tanh(logits / cap)
    logits = np.where(reads, logits, -np.inf)
    logits = logits.reshape(len(rows), kv_blocks, block_kv)
    threshold = options.get("skip_threshold")
    good = kept_blocks(logits, listed, threshold)
    logits[:, [j for j in listed if j not in good]] = -np.inf
    kept[b, h, i, : len(listed)] = np.isin(listed, good)

    weights = np.exp(logits)
    total = weights.sum(axis=(1, 2))
    if "sinks" in options:
      total = total + np.exp(options["sinks"][h])
    with np.errstate(divide="ignore"):
      lse[b, rows, h] = np.log(total)
    weights /= np.where(total > 0, total, 1.0)[:, None, None]
    out[b, rows, h] = weights.reshape(len(rows), padded) @ value
    for c, j in enumerate(listed):
      mass_sum[b, h, i, c] = weights[:, j].sum()
      mass_max[b, h, i, c] = weights[:, j].max() * 2 ** levels[j]
  return oracle.Attention(out, lse, mass_sum, mass_max, kept, math.inf)


class CanonicalTest(parameterized.TestCase):
  @parameterized.parameters(*range(5))
  def test_equals_sorted_set(self, seed):
    rng = np.random.default_rng(seed)
    capacity, kv_blocks = 6, 5
    before = rng.integers(-3, 9, (2, 3, 4, capacity))
    asked = rng.integers(-2, capacity + 3, (2, 3, 4))
    indices, counts = oracle.canonical(before, asked, kv_blocks)
    self.assertEqual(indices.shape, before.shape)
    for where in np.ndindex(*asked.shape):
      first = before[where][: min(max(asked[where], 0), capacity)]
      want = sorted(set(first.tolist()) & set(range(kv_blocks)))
      self.assertEqual(counts[where], len(want))
      padding = [0] * (capacity - len(want))
      self.assertEqual(indices[where].tolist(), want + padding)
    again = oracle.canonical(indices, counts, kv_blocks)
    np.testing.assert_array_equal(again[0], indices)
    np.testing.assert_array_equal(again[1], counts)

  def test_no_capacity(self):
    indices, counts = oracle.canonical(np.zeros((2, 0), int), [3, -1], 4)
    self.assertEqual(indices.shape, (2, 0))
    self.assertEqual(counts.tolist(), [0, 0])

  @parameterized.parameters(([1, 0], 2), ([1, 1], 2), ([0, 3], 2), ([0, 1], 3))
  def test_attention_refuses_other_lists(self, indices, count):
    x = np.ones((1, 3, 1, 1))
    lists = np.array([[[indices]]]), np.array([[[count]]])
    with self.assertRaisesRegex(ValueError, "not canonical"):
      oracle.attention(x, x, x, *lists, block_q=3, block_kv=1)


class AttentionTest(parameterized.TestCase):
  def assert_same(self, got, want):
    np.testing.assert_array_equal(got.kept, want.kept)
    for name in ("out", "lse", "mass_sum", "mass_max"):
      np.testing.assert_allclose(
        getattr(got, name), getattr(want, name), atol=1e-12, err_msg=name
      )

  @parameterized.parameters(False, True)
  def test_full_lists_are_dense(self, causal):
    rng = np.random.default_rng(0)
    batch, length, heads, kv_heads, dim = 2, 9, 4, 2, 3
    q = rng.normal(size=(batch, length, heads, dim))
    k, v = rng.normal(size=(2, batch, length, kv_heads, dim))
    indices = np.broadcast_to(np.arange(5), (1, 1, 3, 5))
    counts = np.full((1, 1, 3), 5)
    got = oracle.attention(
      q,
      k,
      v,
      indices,
      counts,
      block_q=4,
      block_kv=2,
      rule=(lambda pq, pk: pk <= pq) if causal else None,
    )
    k, v = np.repeat(k, 2, axis=2), np.repeat(v, 2, axis=2)
    weights = np.exp(np.einsum("bshd,bthd->bhst", q, k) / dim**0.5)
    if causal:
      weights = np.tril(weights)
    total = weights.sum(axis=-1, keepdims=True)
    out = np.einsum("bhst,bthd->bshd", weights / total, v)
    np.testing.assert_allclose(got.out, out, atol=1e-12)
    lse = np.log(total[..., 0]).transpose(0, 2, 1)
    np.testing.assert_allclose(got.lse, lse, atol=1e-12)
    rows = got.mass_sum.sum(axis=-1)
    np.testing.assert_allclose(rows[0, 0], [4.0, 4.0, 1.0])
    self.assertTrue(np.all(got.kept))

  @parameterized.parameters(*enumerate(CASES))
  def test_equals_whole_arrays(self, number, features):
    case = case_that_skips(
      number, features, queries=11, kv_heads=2, dim=3, block_q=4
    )
    self.assert_same(case.attention(), whole_array_attention(case))

  @parameterized.parameters(*range(12))
  def test_equals_whole_arrays_with_some_features(self, seed):
    rng = np.random.default_rng(seed)
    chosen = [f for f in EVERYTHING[seed % 2] if rng.integers(2)]
    case = random_case(seed, chosen, queries=7, keys=13, block_q=3)
    self.assert_same(case.attention(), whole_array_attention(case))

  def test_more_than_one_word_of_members(self):
    case = random_case(0, ("members",), keys=70, block_kv=1)
    self.assertEqual(case.options["members"].shape[3], 3)
    self.assert_same(case.attention(), whole_array_attention(case))

  def test_by_hand(self):
    # Logits ln 1, ln 2 (block 0), ln 3 as a column, ln 2 for the sink: the
    # shares are 1/8, 2/8, 3/8 and 2/8.
    k = np.log([1.0, 2.0, 9.0, 3.0]).reshape(1, 4, 1, 1)
    v = np.array([8.0, 16.0, 99.0, 32.0]).reshape(1, 4, 1, 1)
    q = np.ones((1, 1, 1, 1))
    options = dict(
      block_q=1,
      block_kv=2,
      columns=[[[[3, -1]]]],
      sinks=np.log([2.0]),
    )
    lists = np.array([[[[0, 0]]]]), np.array([[[1]]])
    got = oracle.attention(q, k, v, *lists, **options)
    np.testing.assert_allclose(got.out, [[[[17.0]]]])
    np.testing.assert_allclose(got.lse, [[[math.log(8)]]])
    np.testing.assert_allclose(got.mass_sum, [[[[3 / 8, 0.0]]]])
    np.testing.assert_allclose(got.mass_max, [[[[2 / 8, 0.0]]]])
    self.assertEqual(got.kept.tolist(), [[[[True, False]]]])
    grads = oracle.gradients(
      q, k, v, *lists, **options, dout=q, dlse=np.ones((1, 1, 1))
    )
    # dL/dz = p * (v - 17 + 1), for the sink 2/8 * (-17 + 1).
    want = [-1.0, 0.0, 0.0, 6.0]
    np.testing.assert_allclose(grads["dk"].ravel(), want, atol=1e-12)
    want = [1 / 8, 2 / 8, 0.0, 3 / 8]
    np.testing.assert_allclose(grads["dv"].ravel(), want)
    np.testing.assert_allclose(grads["dsinks"], [-4.0])
    want = -math.log(1) + 6 * math.log(3)
    np.testing.assert_allclose(grads["dq"].ravel(), [want])

  def test_level_by_hand(self):
    # Two runs of two: means 0 and ln 4 count twice, 2 and 8 of 10.
    k = np.array([-1.0, 1.0, 0.0, 2 * math.log(4)]).reshape(1, 4, 1, 1)
    v = np.array([0.0, 20.0, 30.0, 10.0]).reshape(1, 4, 1, 1)
    q = np.ones((1, 1, 1, 1))
    lists = np.zeros((1, 1, 1, 1), int), np.ones((1, 1, 1), int)
    options = dict(block_q=1, block_kv=4, level=np.full((1, 1, 1, 1), 1))
    got = oracle.attention(q, k, v, *lists, **options)
    np.testing.assert_allclose(got.out.ravel(), [0.2 * 10 + 0.8 * 20])
    np.testing.assert_allclose(got.lse.ravel(), [math.log(10)])
    np.testing.assert_allclose(got.mass_sum.ravel(), [1.0])
    np.testing.assert_allclose(got.mass_max.ravel(), [0.8])
    # A run goes by its last key: position 2 lets the first run in only.
    first = oracle.attention(
      q, k, v, *lists, **options, rule=lambda pq, pk: pk <= pq + 2
    )
    np.testing.assert_allclose(first.out.ravel(), [10.0])
    np.testing.assert_allclose(first.lse.ravel(), [math.log(2)])

  def test_columns_out_of_canonical_form(self):
    case = random_case(0, ("columns",))
    want = case.attention()
    columns = case.options["columns"]
    first = columns[..., :1]
    more = [columns, first, np.full_like(first, 7), np.zeros_like(first)]
    case.options["columns"] = np.concatenate(more, axis=-1)
    indices, counts = case.lists
    # Repetitions, key 7 of 7, and key 0 where it is read already: no change.
    got = case.attention()
    for where in np.ndindex(*counts.shape):
      listed = indices[where][: counts[where]]
      rows = slice(2 * where[2], 2 * where[2] + 2)
      if 0 in listed or 0 in columns[where]:
        b = where[0] if len(counts) > 1 else slice(None)
        h = where[1] if counts.shape[1] > 1 else slice(None)
        np.testing.assert_array_equal(got.out[b, rows, h], want.out[b, rows, h])

  def test_skip_by_hand(self):
    # Two rows, q = 1 and q = -1; four blocks of one key. The running maxima
    # are (0, 0), then (0, 3): row 1 keeps the second block. In the third
    # both rows are below ln 0.5 = -0.69: -1 and 1 - 3. In the fourth row 0
    # has 0.5 more than before; the first stays though it is now below.
    k = np.array([0.0, -3.0, -1.0, 0.5]).reshape(1, 4, 1, 1)
    q = np.array([1.0, -1.0]).reshape(1, 2, 1, 1)
    lists = np.arange(4).reshape(1, 1, 1, 4), np.array([[[4]]])
    options = dict(block_q=2, block_kv=1, skip_threshold=0.5)
    got = oracle.attention(q, k, k, *lists, **options)
    self.assertEqual(got.kept.ravel().tolist(), [True, True, False, True])
    self.assertEqual(got.mass_sum.ravel()[2], 0.0)
    # The closest decision: -1 and -0.69 in the third block.
    self.assertAlmostEqual(got.skip_margin, 1 - math.log(2))
    # A row that cannot read a block has no say: without row 1, the second
    # block goes too.
    rows = np.array([[[[[0b1111, 0b1101]]]]], np.uint32)
    got = oracle.attention(q, k, k, *lists, **options, members=rows)
    self.assertEqual(got.kept.ravel().tolist(), [True, False, True, True])

  def test_skipped_is_as_if_not_listed(self):
    for seed in range(5):
      case = case_that_skips(seed, EVERYTHING[0])
      got, grads = case.attention(), case.gradients()
      members = case.options["members"]
      indices = np.broadcast_to(case.lists[0], got.kept.shape)
      left = np.zeros(got.kept.shape, int)
      bits = np.zeros((*got.kept.shape[:3], *members.shape[3:]), np.uint32)
      members = np.broadcast_to(members, bits.shape)
      for where in np.ndindex(*got.kept.shape[:3]):
        slots = np.flatnonzero(got.kept[where])
        left[where][: len(slots)] = indices[where][slots]
        for new, old in enumerate(slots):
          bit = (members[where][0] >> np.uint32(old)) & np.uint32(1)
          bits[where][0] |= bit << np.uint32(new)
      case.lists = left, got.kept.sum(axis=-1)
      case.options.update(members=bits, skip_threshold=None)
      want = case.attention()
      np.testing.assert_allclose(got.out, want.out, atol=1e-12)
      np.testing.assert_allclose(got.lse, want.lse, atol=1e-12)
      without = case.gradients()
      for name, x in grads.items():
        np.testing.assert_allclose(x, without[name], atol=1e-12)

  @parameterized.parameters((EVERYTHING[0],), (("skip",),))
  def test_threshold_zero_skips_nothing(self, features):
    for seed in range(5):
      case = random_case(seed, features)
      got = case.attention(skip_threshold=0.0)
      want = case.attention(skip_threshold=None)
      for name in ("out", "lse", "mass_sum", "mass_max"):
        np.testing.assert_array_equal(getattr(got, name), getattr(want, name))
      # Only what nobody reads.
      np.testing.assert_array_equal(got.kept, want.kept & (want.mass_sum > 0))


class GradientsTest(parameterized.TestCase):
  @parameterized.parameters(
    *enumerate(CASES),
    (100, ("sinks", "dlse")),
    (101, ("level", "rule")),
    (102, ("members", "columns", "segments", "dlse")),
    (103, ("rule", "sinks"), 2),
  )
  def test_equal_finite_differences(self, number, features, kv_heads=1):
    case = case_that_skips(
      number, features, batch=2 // kv_heads, kv_heads=kv_heads
    )
    got = case.gradients()
    inputs = dict(case.arrays)
    if "sinks" in features:
      inputs["sinks"] = case.options["sinks"]
    else:
      self.assertIsNone(got["dsinks"])
    for name, x in inputs.items():
      want = np.zeros(x.shape)
      for where in np.ndindex(*x.shape):
        up, down = x.copy(), x.copy()
        up[where] += STEP
        down[where] -= STEP
        difference = case.loss(**{name: up}) - case.loss(**{name: down})
        want[where] = difference / (2 * STEP)
      np.testing.assert_allclose(got[f"d{name}"], want, atol=1e-8, err_msg=name)

  @parameterized.parameters((("dlse",),), EVERYTHING[:1], EVERYTHING[1:])
  def test_rows_that_read_nothing(self, features):
    case = random_case(0, features)
    got, grads = case.attention(), case.gradients()
    # Nothing is listed for the first block of queries.
    np.testing.assert_array_equal(got.out[:, :2], 0.0)
    np.testing.assert_array_equal(grads["dq"][:, :2], 0.0)
    sinks = case.options.get("sinks", [-np.inf, -np.inf])
    np.testing.assert_array_equal(
      got.lse[:, :2], np.broadcast_to(sinks, (2, 2, 2))
    )
    # Their share of the sinks' gradient is that of lse alone, and they have
    # none in anything else: without it all is the same.
    case.dout = case.dout.copy()
    case.dlse = case.dlse.copy()
    case.dout[:, :2] = 0.0
    removed = case.dlse[:, :2].sum(axis=(0, 1))
    case.dlse[:, :2] = 0.0
    without = case.gradients()
    for name in ("dq", "dk", "dv"):
      np.testing.assert_array_equal(grads[name], without[name])
    if "sinks" in features:
      np.testing.assert_allclose(grads["dsinks"] - without["dsinks"], removed)

  def test_nothing_unread_is_touched(self):
    # What no query reads may be anything, and its gradient is zero.
    case = random_case(3, ("rule", "dlse"))
    case.lists = np.zeros((1, 1, 3, 1), int), np.ones((1, 1, 3), int)
    want, grads = case.attention(), case.gradients()
    for name in ("k", "v"):
      case.arrays[name] = case.arrays[name].copy()
      case.arrays[name][:, 2:] = np.nan
    got = case.attention()
    np.testing.assert_array_equal(got.out, want.out)
    self.assertTrue(np.all(np.isfinite(got.out)))
    for name, x in case.gradients().items():
      if x is not None:
        np.testing.assert_array_equal(x, grads[name])
