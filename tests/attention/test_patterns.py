"""Fixed patterns: against tables filled pair by pair, and as attention."""

import functools

from hypothesis import given
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as pk
from pallas_kernels import aot
from pallas_kernels import rules
from sparsejax.attention import formats
from sparsejax.attention import patterns
from sparsejax.attention.patterns import listing
from tests.kernels import problem
from tests.oracles import patterns as oracle

BLOCKS = dict(block_q=16, block_kv=32)
S, T = 40, 70  # 3 blocks each, the last ones not full
of_16 = dict(block_q=16, block_kv=16)
SIZE = 3000  # ranges of positions that are classified at a time
GRID = 63  # tokens of every grid below

# name: (rule, its table from queries, keys, offset)
BANDS = {
  "causal": (pk.Causal(), oracle.causal),
  "window": (
    pk.Window(9, 3),
    functools.partial(oracle.window, left=9, right=3),
  ),
  "sinks": (
    patterns.Sinks(5, 9),
    functools.partial(oracle.sinks, first=5, local=9),
  ),
  "no_sinks": (
    patterns.Sinks(0, 9),
    functools.partial(oracle.sinks, first=0, local=9),
  ),
  "sinks_alone": (
    patterns.Sinks(19, 0),
    functools.partial(oracle.sinks, first=19, local=0),
  ),
  "dilated": (
    patterns.Dilated(2, 1, 20),
    functools.partial(oracle.dilated, left=2, right=1, dilation=20),
  ),
  "dilated_by_1": (
    patterns.Dilated(20),
    functools.partial(oracle.dilated, left=20),
  ),
  "diagonals": (
    patterns.Diagonals((0, -3, 30, 31, 32)),
    functools.partial(oracle.diagonals, offsets=(0, -3, 30, 31, 32)),
  ),
  "no_diagonals": (
    patterns.Diagonals(()),
    functools.partial(oracle.diagonals, offsets=()),
  ),
  "columns": (
    patterns.Columns((3, 4, 5, 40)),
    functools.partial(oracle.columns, positions=(3, 4, 5, 40)),
  ),
  "columns_of_blocks": (
    patterns.Columns(range(30, 66)),
    functools.partial(oracle.columns, positions=range(30, 66)),
  ),
  "stripes": (
    patterns.stripes([1, 2, 33], [0, 1, 2, 50]),
    functools.partial(
      oracle.stripes, verticals=[1, 2, 33], slashes=[0, 1, 2, 50]
    ),
  ),
  "strided": (
    patterns.Strided(5, 24),
    functools.partial(oracle.strided, local=5, stride=24),
  ),
  "strided_by_1": (
    patterns.Strided(0, 1),
    functools.partial(oracle.strided, local=0, stride=1),
  ),
}


def square(function, *args, **options):
  """A table of as many queries as keys, without an offset."""

  def table(queries, keys, offset=0):
    assert (queries, offset) == (keys, 0)
    return function(*[queries][: not args], *args, **options)

  return table


def longformer(**options):
  tokens = options.get("global_tokens", ())
  rule = patterns.Longformer(**options | {"global_tokens": tokens})
  return rule, square(oracle.longformer, **options)


def neighborhood(shape, **options):
  rule = patterns.Neighborhood(shape, **options)
  return rule, square(oracle.neighborhood, shape, **options)


SQUARES = {
  "longformer": longformer(left=6, right=6, global_tokens=(0, 1, 40)),
  "longformer_causal": longformer(
    left=6, right=6, global_tokens=(2, 3, 30), is_causal=True
  ),
  "longformer_dilated": longformer(
    left=3, right=2, global_tokens=(1,), dilation=5
  ),
  "longformer_all": longformer(left=0, right=0, global_tokens=range(GRID)),
  "1d_stride": neighborhood((63,), window=20, stride=16),
  "1d_dilated_causal": neighborhood(
    (63,), window=4, stride=3, dilation=5, is_causal=True
  ),
  "1d_whole": neighborhood((63,), window=99, stride=99),
  "2d": neighborhood((7, 9), window=3),
  "2d_mixed": neighborhood(
    (9, 7),
    window=(4, 3),
    stride=(2, 3),
    dilation=(2, 1),
    is_causal=(True, False),
  ),
  "3d": neighborhood(
    (7, 3, 3),
    window=(3, 1, 2),
    stride=(2, 1, 2),
    dilation=(2, 1, 1),
    is_causal=(True, False, False),
  ),
}
RULES = BANDS | SQUARES


to_dense = problem.jit(formats.to_dense, static_argnums=(1, 2))


@functools.partial(problem.jit, static_argnums=0)
def classify_flat(rule, bounds):
  return rules.classify(rule, *bounds)


def classify(rule, *bounds):
  """In one size for all, so that there is one program a rule."""
  bounds = np.array(np.broadcast_arrays(*bounds), np.int32)
  shape, size = bounds.shape[1:], bounds[0].size
  if size > SIZE:
    raise AssertionError(size)
  flat = np.pad(bounds.reshape(4, -1), ((0, 0), (0, SIZE - size)))
  return np.asarray(classify_flat(rule, flat))[:size].reshape(shape)


@pytest.fixture
def one_program(monkeypatch):
  monkeypatch.setattr(listing, "_classify", classify)


def table_of(mask, queries, keys, q_positions=None):
  """What the mask reads, having checked that it lists nothing in vain."""
  lists, counts = np.asarray(mask.indices)[0, 0], np.asarray(mask.counts)[0, 0]
  assert mask.capacity == max(counts.max(), 1)
  pad = ((0, 0),) * 3 + ((0, mask.kv_blocks - mask.capacity),)
  # All lists of one shape and the rule apart, for one program.
  whole = mask._replace(indices=np.pad(mask.indices, pad), rule=None)
  table = np.array(to_dense(whole, queries, keys)[0, 0])
  at = np.arange(queries) if q_positions is None else q_positions
  table &= np.asarray(mask.rule(at[:, None], np.arange(keys)))
  want = oracle.to_blocks(table, mask.block_q, mask.block_kv)
  got = [row[:count].tolist() for row, count in zip(lists, counts, strict=True)]
  assert got == want
  return table


@pytest.mark.parametrize("name", BANDS)
def test_bands(name, one_program):
  """Odd lengths, blocks that are not full, one token, and a decode step."""
  rule, oracle_table = BANDS[name]
  for queries, keys, offset in (
    (S, T, 0),
    (S, T, 30),
    (1, 1, 0),
    (1, T, T - 1),
  ):
    at = np.arange(queries) + offset
    blocks = BLOCKS if queries > 1 else dict(block_q=1, block_kv=16)
    mask = patterns.mask(rule, queries, keys, **blocks, q_positions=at)
    table = table_of(mask, queries, keys, q_positions=at)
    want = oracle_table(queries, keys, offset=offset)
    np.testing.assert_array_equal(table, want)


@pytest.mark.parametrize("name", SQUARES)
def test_squares(name, one_program):
  rule, oracle_table = SQUARES[name]
  mask = patterns.mask(rule, GRID, GRID, **BLOCKS)
  want = oracle_table(GRID, GRID)
  np.testing.assert_array_equal(table_of(mask, GRID, GRID), want)
  # A step of decoding, which is the last row.
  at = np.array([GRID - 1])
  options = dict(block_q=1, block_kv=16, q_positions=at)
  mask = patterns.mask(rule, 1, GRID, **options)
  table = table_of(mask, 1, GRID, q_positions=at)
  np.testing.assert_array_equal(table, want[-1:])


def test_one_token(one_program):
  for rule, want in (
    (patterns.Longformer(0, 0), 1),
    (patterns.Neighborhood((1,), 3, 2, 2), 1),
    (patterns.Neighborhood((1, 1, 1), 1, is_causal=True), 1),
    (patterns.Sinks(0, 0), 0),
  ):
    mask = patterns.mask(rule, 1, 1, block_q=16, block_kv=16)
    assert table_of(mask, 1, 1).sum() == want


@pytest.mark.parametrize("name", RULES)
def test_classes_are_exact(name):
  """Of random ranges of positions, against all of their pairs."""
  rule, oracle_table = RULES[name]
  table = oracle_table(GRID, GRID)
  rng = np.random.default_rng(0)
  ranges = np.sort(rng.integers(0, GRID, (2, SIZE, 2)))
  ranges[:, :2000, 1] = np.minimum(
    ranges[:, :2000, 0] + rng.integers(0, 7, (2, 2000)), GRID - 1
  )
  (q_min, q_max), (k_min, k_max) = ranges.transpose(0, 2, 1)
  # How many pairs are read, from sums of the table up to each pair.
  sums = np.pad(table.astype(int).cumsum(0).cumsum(1), ((1, 0), (1, 0)))
  read = sums[q_max + 1, k_max + 1] - sums[q_min, k_max + 1]
  read += sums[q_min, k_min] - sums[q_max + 1, k_min]
  pairs = (q_max - q_min + 1) * (k_max - k_min + 1)
  got = classify(rule, q_min, q_max, k_min, k_max)
  np.testing.assert_array_equal(got == rules.SKIP, read == 0)
  assert (read == pairs)[got == rules.WHOLE].all()
  if name not in ("stripes", "longformer_dilated"):  # of these some are PARTIAL
    np.testing.assert_array_equal(got == rules.WHOLE, read == pairs)


def test_outside_of_the_grid_nothing_is_read(one_program):
  rule = patterns.Neighborhood((4, 4), 3)
  at = np.arange(-20, 44)
  found = np.asarray(rule(at[:, None], at))
  inside = (at >= 0) & (at < 16)
  assert not (found & ~(inside[:, None] & inside)).any()
  mask = patterns.mask(rule, 64, 64, block_q=16, block_kv=16)
  assert mask.counts.tolist() == [[[1, 0, 0, 0]]]
  around = classify(rule, 0, 99, 0, 99)
  beyond = classify(rule, 16, 20, 0, 9)
  assert (int(around), int(beyond)) == (rules.PARTIAL, rules.SKIP)


def test_unions_and_intersections(one_program):
  """Of rules, and of masks; rules that meet nowhere are listed nowhere."""
  strided, diagonals = patterns.Strided(0, 24), patterns.Diagonals((0, 24, 25))
  of = functools.partial(patterns.mask, queries=S, keys=T, **BLOCKS)
  left = oracle.strided(S, T, local=0, stride=24)
  right = oracle.diagonals(S, T, (0, 24, 25))
  either = of(strided | diagonals)
  np.testing.assert_array_equal(table_of(either, S, T), left | right)
  both = of(strided & diagonals)
  np.testing.assert_array_equal(table_of(both, S, T), left & right)
  # Blocks that both touch, though not in the same places.
  met = of(strided) & of(diagonals)
  table = formats.to_dense(met, S, T)[0, 0]
  np.testing.assert_array_equal(table, left & right)
  apart = of(patterns.Diagonals((1,)) & patterns.Diagonals((2,)))
  assert apart.counts.max() == 0


def test_rules_that_say_nothing_of_tiles():
  """Blocks are looked into, in chunks."""
  rule = lambda q, k: (q * 7 + k * 3) % 41 == 0
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(listing, "_PAIRS", 2048)
    patch.setattr(listing, "_TILES", 6)
    mask = patterns.mask(rule, S, T, block_q=1, block_kv=16)
  want = oracle.table(S, T, rule)
  np.testing.assert_array_equal(table_of(mask, S, T), want)


def test_permuted_positions(one_program):
  rng = np.random.default_rng(0)
  q_at, k_at = rng.permutation(S), rng.permutation(T)
  at = dict(q_positions=q_at, kv_positions=k_at)
  rule = patterns.Diagonals((0,))
  # Ranges of positions are wide here, and no list misses what is read.
  mask = patterns.mask(rule, S, T, block_q=1, block_kv=16, **at)
  table = formats.to_dense(mask, S, T, **at)[0, 0]
  np.testing.assert_array_equal(table, q_at[:, None] == k_at)


# Patterns of blocks.


@pytest.mark.parametrize(
  "options",
  [
    dict(num_heads=4, local=2, stride=3, kv_heads=2, first=1),
    dict(num_heads=2, local=0, stride=8, step=3),
    dict(num_heads=1, local=99, stride=99),
  ],
)
def test_s2(options):
  mask = patterns.s2(85, 16, **options)
  want = oracle.s2(6, **options)
  np.testing.assert_array_equal(mask.blocks()[0], want)
  tables = [oracle.of_blocks(x, 16, 16, 85, 85) for x in want]
  got = formats.to_dense(mask, 85, 85)[0]
  np.testing.assert_array_equal(got, tables & oracle.causal(85, 85))


@pytest.mark.parametrize("max_stride", [1, 64])
def test_butterfly(max_stride):
  for length in (16, 101):
    mask = patterns.butterfly(length, 16, max_stride=max_stride)
    want = oracle.butterfly(-(-length // 16), max_stride=max_stride)
    np.testing.assert_array_equal(mask.blocks()[0, 0], want)


@pytest.mark.parametrize("window_blocks,global_blocks", [(3, 1), (5, 2)])
def test_bigbird(window_blocks, global_blocks):
  sizes = dict(window_blocks=window_blocks, global_blocks=global_blocks)
  keys = jax.random.split(jax.random.key(3), 2)
  blocks, length = 9, 139

  @problem.jit
  def make(keys):
    draw = lambda key: patterns.bigbird_random(key, length, 16, **sizes)
    drawn = jax.vmap(draw)(keys)
    return drawn, patterns.bigbird(length, 16, random=drawn, **sizes)

  drawn, mask = make(keys)
  for head, lists in enumerate(np.asarray(drawn).tolist()):
    for i, row in enumerate(lists):
      candidates = oracle.bigbird_candidates(i, blocks, **sizes)
      row = [j for j in row if j >= 0]
      assert len({*row}) == len(row) and {*row} <= {*candidates}
      ends = i < global_blocks or i >= blocks - global_blocks
      assert len(row) == (0 if ends else min(3, len(candidates)))
    want = oracle.bigbird(blocks, random=lists, **sizes)
    np.testing.assert_array_equal(mask.blocks()[0, head], want)
  assert (drawn[0] != drawn[1]).any()
  got = patterns.bigbird(length, 16, random=drawn[0], **sizes)
  np.testing.assert_array_equal(got.blocks()[0, 0], mask.blocks()[0, 0])


# As attention.


@problem.jit
def dense(q, k, v, table):
  scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
  scores = jnp.where(table, scores, -jnp.inf)
  return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v)


def test_attention():
  rule, oracle_table = RULES["2d_mixed"]
  q, k, v = jax.random.normal(jax.random.key(0), (3, 1, GRID, 2, 8))

  @problem.jit
  def attend(q, k, v):
    # Lists are constants, though made inside of jit.
    mask = patterns.mask(rule, GRID, GRID, **BLOCKS)
    assert not isinstance(mask.indices, jax.core.Tracer)
    return pk.block_sparse_attention(q, k, v, mask)

  want = dense(q, k, v, oracle_table(GRID, GRID)[None, None])
  np.testing.assert_allclose(attend(q, k, v), want, atol=2e-6)


@pytest.mark.slow
def test_compiles_for_tpu():
  """The rules' integer arithmetic, in the bodies of the kernels."""
  rule = patterns.Neighborhood((8, 32), (4, 8), (2, 1), (2, 1), (False, True))
  rule |= patterns.Sinks(4, 100) | patterns.Strided(9, 24)
  rule |= patterns.Longformer(3, 3, (1, 2, 40), dilation=3)
  mask = patterns.mask(
    rule | patterns.stripes([1, 200], [7]), 256, 256, block_q=128, block_kv=128
  )

  def loss(q, k, v):
    out = pk.block_sparse_attention(q, k, v, mask, backend="tpu")
    return out.astype(jnp.float32).sum()

  x = jax.ShapeDtypeStruct((1, 256, 2, 128), jnp.bfloat16)
  step = jax.grad(loss, (0, 1, 2))
  assert aot.compile_for(step, x, x, x, target="v6e:2x2").kernels


def test_attention_of_heads():
  mask = patterns.s2(GRID, 16, num_heads=2, local=1, stride=3)
  mask |= patterns.mask(pk.Causal(), GRID, GRID, **of_16) & patterns.butterfly(
    GRID, 16, max_stride=2
  )
  q, k, v = jax.random.normal(jax.random.key(0), (3, 1, GRID, 2, 8))
  blocks = oracle.s2(4, num_heads=2, local=1, stride=3)
  blocks = blocks | oracle.butterfly(4, max_stride=2)
  tables = [oracle.of_blocks(x, 16, 16, GRID, GRID) for x in blocks]
  want = dense(q, k, v, tables & oracle.causal(GRID, GRID))
  got = problem.jit(pk.block_sparse_attention)(q, k, v, mask)
  np.testing.assert_allclose(got, want, atol=2e-6)


def test_long_sequences():
  """128k tokens: arrays are of listed blocks."""
  tokens, block = 2**17, 128
  blocks = tokens // block
  for rule, most in (
    (patterns.Sinks(4, 1024), 10),
    (patterns.stripes([7], [0]), 2),
    (patterns.Neighborhood((32, 64, 64), (3, 8, 8), (1, 4, 4)), 28),
  ):
    mask = patterns.mask(rule, tokens, tokens, block_q=block, block_kv=block)
    assert mask.counts.shape == (1, 1, blocks)
    assert int(mask.counts.min()) > 0
    assert mask.indices.nbytes <= 4 * blocks * most
  mask = patterns.s2(tokens, 64, num_heads=8, local=16, stride=64)
  assert mask.capacity <= 16 + 2048 // 64
  assert patterns.butterfly(tokens, 64, max_stride=2048).capacity == 12


@given(st.data())
def test_neighborhoods_of_any_shape(data):
  shape = tuple(data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=3)))
  each = lambda low, high: data.draw(
    st.tuples(*[st.integers(low, high)] * len(shape))
  )
  window = each(1, 6)
  stride = tuple(min(a, b) for a, b in zip(window, each(1, 6), strict=True))
  options = dict(window=window, stride=stride, dilation=each(1, 4))
  options["is_causal"] = tuple(x == 1 for x in each(0, 1))
  rule = patterns.Neighborhood(shape, **options)
  want = oracle.neighborhood(shape, **options)
  at = np.arange(126)  # of one shape, for few programs
  got = np.array(rule(at[:, None], at))
  np.testing.assert_array_equal(got[: len(want), : len(want)], want)
  assert got.sum() == want.sum()


def test_rules_are_equal_by_what_they_say():
  assert patterns.Columns([3, 1, 1]) == patterns.Columns((1, 3))
  assert hash(patterns.Columns(range(3))) == hash(patterns.Columns((0, 1, 2)))
  left = patterns.Neighborhood([4, 4], 3)
  right = patterns.Neighborhood((4, 4), (3, 3), is_causal=(False, False))
  assert left == right and hash(left) == hash(right)
  assert patterns.Neighborhood(9, 3) == patterns.Neighborhood((9,), (3,))
  assert patterns.Sinks(np.int64(4), 9) == patterns.Sinks(4, 9)


def test_numbers_beyond_int32(one_program):
  for rule in (
    patterns.Sinks(2**40, 2**40),
    patterns.Dilated(2**40, 2**40, 1),
    patterns.Strided(2**40, 2**40),
    patterns.Longformer(2**40, 2**40, dilation=1),
  ):
    mask = patterns.mask(rule, 20, 20, block_q=16, block_kv=16)
    assert table_of(mask, 20, 20)[19].all()
  far = patterns.mask(
    patterns.Dilated(2**20, 0, 2**20), 20, 20, block_q=16, block_kv=16
  )
  np.testing.assert_array_equal(table_of(far, 20, 20), np.eye(20, dtype=bool))


BAD = (
  ("first is -1", lambda: patterns.Sinks(-1, 2)),
  ("local is 1.5", lambda: patterns.Sinks(1, 1.5)),
  ("left is True", lambda: patterns.Dilated(True)),
  ("dilation is 0", lambda: patterns.Dilated(1, 1, 0)),
  ("offsets is", lambda: patterns.Diagonals([0.5])),
  ("offsets is 3", lambda: patterns.Diagonals(3)),
  ("positions is", lambda: patterns.Columns([-1])),
  ("verticals is", lambda: patterns.stripes([-1], [0])),
  ("slashes is", lambda: patterns.stripes([1], [-2])),
  ("stride is 0", lambda: patterns.Strided(1, 0)),
  ("right is", lambda: patterns.Longformer(1, "2")),
  ("global_tokens is", lambda: patterns.Longformer(1, 1, [[0]])),
  ("dilation is 0", lambda: patterns.Longformer(1, 1, dilation=0)),
  ("shape is", lambda: patterns.Neighborhood((2, 2, 2, 2), 3)),
  ("shape is 0", lambda: patterns.Neighborhood((4, 0), 3)),
  ("window is", lambda: patterns.Neighborhood((4, 4), (3, 3, 3))),
  ("window is 0", lambda: patterns.Neighborhood((4, 4), 0)),
  ("stride is", lambda: patterns.Neighborhood((4, 4), 2, 3)),
  ("num_heads is", lambda: patterns.s2(64, 16, num_heads=0, local=1, stride=1)),
  (
    "kv_heads is 3",
    lambda: patterns.s2(64, 16, num_heads=4, local=1, stride=1, kv_heads=3),
  ),
  ("length is 0", lambda: patterns.butterfly(0, 16, max_stride=2)),
  ("block_q is 24", lambda: patterns.butterfly(48, 24, max_stride=2)),
  ("max_stride is 3", lambda: patterns.butterfly(64, 16, max_stride=3)),
  ("max_stride is 0", lambda: patterns.butterfly(64, 16, max_stride=0)),
  (
    "window_blocks is 2",
    lambda: patterns.bigbird(64, 16, random=[[0]] * 4, window_blocks=2),
  ),
  ("random is", lambda: patterns.bigbird(64, 16, random=[[0]] * 3)),
  ("random is", lambda: patterns.bigbird(64, 16, random=[[0.0]] * 4)),
  (
    "count is",
    lambda: patterns.bigbird_random(jax.random.key(0), 64, 16, count=-1),
  ),
  ("rule is None", lambda: patterns.mask(None, 4, 4, **of_16)),
  ("rule is", lambda: patterns.mask(3, 4, 4, **of_16)),
  ("Did you mean", lambda: patterns.mask(pk.Causal, 4, 4, **of_16)),
  ("queries is 0", lambda: patterns.mask(pk.Causal(), 0, 4, **of_16)),
  ("keys is", lambda: patterns.mask(pk.Causal(), 4, 4.5, **of_16)),
  (
    "block_kv is 8",
    lambda: patterns.mask(pk.Causal(), 4, 4, block_q=16, block_kv=8),
  ),
  (
    "q_positions is",
    lambda: patterns.mask(pk.Causal(), 4, 4, q_positions=[3], **of_16),
  ),
  (
    "kv_positions is traced",
    lambda: jax.jit(
      lambda x: patterns.mask(pk.Causal(), 4, 4, kv_positions=x, **of_16)
    )(jnp.arange(4)),
  ),
)


@pytest.mark.parametrize("message,call", BAD, ids=[x[0] for x in BAD])
def test_bad_input(message, call):
  with pytest.raises(ValueError, match=message):
    call()
