"""Formats of block-sparse attention: against tables of tokens, and back."""

import functools

from hypothesis import given
from hypothesis import strategies as st
import jax
from jax.experimental.pallas.ops.tpu.splash_attention import (
  splash_attention_mask as splash_mask,
)
from jax.experimental.pallas.ops.tpu.splash_attention import (
  splash_attention_mask_info as splash_info,
)
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse

import pallas_kernels as pk
from sparsejax.attention import formats
from tests.kernels import problem
from tests.oracles import formats as oracle

BLOCKS = dict(block_q=16, block_kv=32)
S, T = 40, 70  # 3 blocks of queries and 3 of keys, the last ones not full
causal = lambda q, k: k <= q
window = lambda q, k: q - 9 <= k <= q
RULES = (
  (None, oracle.everything),
  (pk.Causal(), causal),
  (pk.Window(9), window),
)
each_rule = pytest.mark.parametrize("rule,plain", RULES)


def random_mask(seed, rule=None, members=False, columns=0, lead=(2, 3)):
  """Lists in any order, some empty, with whatever else is asked for."""
  rng = np.random.default_rng(seed)
  shape = (*lead, 3)
  given = dict(
    indices=rng.integers(-1, 4, (*shape, 3)), counts=rng.integers(0, 4, shape)
  )
  if members:
    words = rng.integers(0, 2**32, (*shape, 1, 16))
    given["members"] = words.astype(np.uint32)
  if columns:
    given["columns"] = rng.integers(-1, T + 9, (*shape, columns))
  return problem.constructor(kv_blocks=3, rule=rule, **BLOCKS)(given)


def assert_same(got, want):
  """Masks with equal lists, whatever their capacities."""
  np.testing.assert_array_equal(got.counts, want.counts)
  np.testing.assert_array_equal(got.blocks(), want.blocks())
  for name in ("block_q", "block_kv", "kv_blocks", "rule"):
    assert getattr(got, name) == getattr(want, name), name


def assert_canonical(mask):
  fields = [n for n in ("members", "columns", "level") if getattr(mask, n)
            is not None]  # fmt: skip
  static = [getattr(mask, n) for n in ("block_q", "block_kv", "kv_blocks")]
  again = pk.BlockMask(
    mask.indices,
    mask.counts,
    **dict(zip(("block_q", "block_kv", "kv_blocks"), static, strict=True)),
    **{n: getattr(mask, n) for n in fields},
  )
  for name in ("indices", "counts", *fields):
    np.testing.assert_array_equal(getattr(mask, name), getattr(again, name))


# Tables of tokens.


@each_rule
@pytest.mark.parametrize("columns", [0, 5])
@pytest.mark.parametrize("members", [False, True])
def test_to_dense(rule, plain, members, columns):
  mask = random_mask(0, rule, members, columns)
  got = problem.jit(lambda mask: formats.to_dense(mask, S, T))(mask)
  want = oracle.of_mask(mask, S, T, plain)
  np.testing.assert_array_equal(got, want)


@each_rule
@pytest.mark.parametrize("members", [False, True])
def test_dense_and_back(rule, plain, members):
  """Exact, in what is read; a block that reads nothing is not listed again."""
  convert = functools.partial(formats.from_dense, rule=rule, **BLOCKS)
  for seed in range(3):
    dense = oracle.of_mask(random_mask(seed, rule, members), S, T, plain)
    mask = convert(dense)
    assert_canonical(mask)
    assert mask.rule == rule
    np.testing.assert_array_equal(oracle.of_mask(mask, S, T, plain), dense)
    if not members:
      assert mask.members is None
    fullest = max(int(mask.counts.max()), 1)
    assert mask.capacity == fullest
    jitted = problem.jit(convert)(dense)
    assert jitted.capacity == 3
    np.testing.assert_array_equal(oracle.of_mask(jitted, S, T, plain), dense)
    np.testing.assert_array_equal(jitted.counts, mask.counts)


def test_dense_needs_members_only_for_rows_that_could_read():
  dense = np.zeros((1, 1, S, T), bool)
  dense[..., 5:16, :32] = True
  assert formats.from_dense(dense, **BLOCKS).members is not None
  rule = pk.Window(0, 100)
  # Queries 0 to 4 read their block whole here, and later ones only the end.
  tail = np.asarray(rule(np.arange(S)[:, None], np.arange(T)))[None, None]
  mask = formats.from_dense(tail, **BLOCKS, rule=rule)
  assert mask.members is None
  np.testing.assert_array_equal(formats.to_dense(mask, S, T), tail)


def test_dense_of_other_positions():
  """Permuted tokens: the rule sees positions, of each batch element."""
  rng = np.random.default_rng(1)
  at = dict(
    q_positions=rng.permutation(S),
    kv_positions=np.stack([rng.permutation(T) for _ in range(2)]),
  )
  dense = at["kv_positions"][:, None, None] <= at["q_positions"][:, None]
  mask = formats.from_dense(dense, **BLOCKS, rule=pk.Causal(), **at)
  assert mask.members is None and mask.counts.shape == (2, 1, 3)
  np.testing.assert_array_equal(formats.to_dense(mask, S, T, **at), dense)


def test_dense_that_no_mask_can_say():
  dense = np.ones((1, 2, S, T), bool)
  dense[0, 1, 17, 40] = False
  with pytest.raises(ValueError, match=r"\[\[0, 1, 1, 1, 1\]\]"):
    formats.from_dense(dense, **BLOCKS)
  with pytest.raises(ValueError, match="where the rule Causal"):
    formats.from_dense(dense, **BLOCKS, rule=pk.Causal())
  # Traced, a row that is torn reads what the rule allows.
  got = problem.jit(lambda x: formats.from_dense(x, **BLOCKS))(dense)
  assert oracle.of_mask(got, S, T).all()
  jitted = problem.jit(
    lambda x: formats.from_dense(x, **BLOCKS, rule=pk.Causal())
  )
  got = oracle.of_mask(jitted(dense), S, T, causal)
  np.testing.assert_array_equal(got[0, 0], np.tri(S, T, dtype=bool))


def test_dense_capacity():
  dense = np.ones((1, 1, S, T), bool)
  convert = functools.partial(formats.from_dense, **BLOCKS, capacity=2)
  with pytest.raises(ValueError, match="capacity is 2"):
    convert(dense)
  assert (problem.jit(convert)(dense).dropped == 1).all()


@pytest.mark.parametrize("shape", [(1, 1, 0, 5), (1, 1, 5, 0), (1, 2, 1, 1)])
def test_dense_of_few_tokens(shape):
  dense = np.ones(shape, bool)
  mask = formats.from_dense(dense, **BLOCKS)
  got = formats.to_dense(mask, *shape[2:])
  np.testing.assert_array_equal(got, dense)


@functools.cache
def there_and_back(block_q, queries, keys):
  """dense -> mask, dense; compiled once for equal sizes."""

  def f(dense):
    mask = formats.from_dense(dense, block_q, 16)
    return mask, formats.to_dense(mask, queries, keys)

  return problem.jit(f)


@given(
  st.integers(0, 2**16),
  st.sampled_from([(1, 7, 16), (16, 33, 50), (32, 16, 70)]),
)
def test_any_table_of_whole_rows(seed, sizes):
  _, queries, keys = sizes
  rng = np.random.default_rng(seed)
  rows = rng.random((1, 2, queries, -(-keys // 16))) < rng.random()
  dense = rows.repeat(16, -1)[..., :keys]
  mask, back = there_and_back(*sizes)(dense)
  np.testing.assert_array_equal(oracle.of_mask(mask, queries, keys), dense)
  np.testing.assert_array_equal(back, dense)


# FlexAttention.


def random_flex(seed):
  """Lists with anything past the counts, and no block in both."""
  rng = np.random.default_rng(seed)
  kind = rng.integers(0, 3, (2, 2, 3, 3))  # not listed, partial, full
  lists = []
  for which in (1, 2):
    counts = (kind == which).sum(-1)
    order = np.argsort(kind != which, axis=-1, kind="stable")
    order = np.where(np.arange(3) < counts[..., None], order, 7)
    lists += [counts, order]
  return kind, lists


def test_from_flex():
  kind, lists = random_flex(0)
  convert = functools.partial(formats.from_flex, **BLOCKS)
  want = oracle.of_flex(lists, 16, 32, S, T)
  for mask in (convert(*lists), problem.jit(convert)(*lists)):
    assert_canonical(mask)
    np.testing.assert_array_equal(mask.counts, (kind > 0).sum(-1))
    np.testing.assert_array_equal(oracle.of_mask(mask, S, T), want)
  partial = convert(*lists[:2])
  np.testing.assert_array_equal(partial.counts, (kind == 1).sum(-1))


@each_rule
def test_flex_and_back(rule, plain):
  mask = random_mask(2, rule)
  lists = problem.jit(lambda mask: formats.to_flex(mask, S, T))(mask)
  want = oracle.of_mask(mask, S, T, plain)
  got = oracle.of_flex(lists, 16, 32, S, T, plain)
  np.testing.assert_array_equal(got, want)
  # Full are those with no false entry, and tails are not.
  blocks = np.pad(want, [(0, 0)] * 2 + [(0, 8), (0, 26)])
  blocks = blocks.reshape(2, 3, 3, 16, 3, 32)
  full = blocks.all((3, 5)).sum(-1)
  np.testing.assert_array_equal(lists.full_kv_num_blocks, full)
  np.testing.assert_array_equal(
    lists.kv_num_blocks, blocks.any((3, 5)).sum(-1) - full
  )
  again = formats.from_flex(*lists, rule=rule, **BLOCKS)
  np.testing.assert_array_equal(oracle.of_mask(again, S, T, plain), want)


def test_flex_of_other_positions():
  mask = random_mask(3, pk.Causal())
  at = dict(q_positions=np.arange(S) + T, kv_positions=np.arange(T))
  lists = formats.to_flex(mask, S, T, **at)
  both = lists.kv_num_blocks + lists.full_kv_num_blocks
  np.testing.assert_array_equal(both, mask.counts)
  assert lists.full_kv_num_blocks.sum() > 0


def test_flex_full_blocks_that_the_rule_cuts():
  lists = np.zeros((1, 1, 2), int), np.zeros((1, 1, 2, 2), int)
  full = np.array([[[0, 1]]]), np.zeros((1, 1, 2, 2), int)
  square = dict(block_q=16, block_kv=16)
  convert = functools.partial(formats.from_flex, **square)
  assert convert(*lists, *full, rule=pk.Causal()).counts.tolist() == [[[0, 1]]]
  # Without classify the rule is tried on the tokens.
  free = lambda q, k: (k <= q) & (k >= 0)
  assert convert(*lists, *full, rule=free).counts.tolist() == [[[0, 1]]]
  full[0][0, 0, 0] = 1
  for rule in (pk.Causal(), free):
    with pytest.raises(ValueError, match=r"cuts key block \[0\] of query"):
      convert(*lists, *full, rule=rule)
  problem.jit(functools.partial(convert, rule=free))(*lists, *full)


# Splash attention: the arrays that jax itself makes.


def splash_blocks(made):
  """What jax's kernel would read, step by step."""
  info, _ = splash_info.process_mask(
    splash_mask.MultiHeadMask(made), (128, 128), head_shards=1, q_seq_shards=1
  )
  return info.data_next, info.block_mask


@pytest.mark.parametrize(
  "kind,rule",
  [
    ("causal", pk.Causal()),
    ("window", pk.Causal() & pk.Window(130)),
  ],
)
def test_from_splash(kind, rule):
  n = 640
  if kind == "causal":
    one = splash_mask.CausalMask((n, n))
  else:
    one = splash_mask.LocalMask((n, n), (130, 0), 0)
  data_next, blocks = splash_blocks([one, one])
  if kind == "window":
    assert data_next.shape[-1] < n // 128  # the grid is shrunk
  mask = formats.from_splash(
    data_next, blocks, block_q=128, block_kv=128, kv_blocks=5, rule=rule
  )
  want = np.asarray(one[:, :])
  np.testing.assert_array_equal(formats.to_dense(mask, n, n)[0, 0], want)
  tiles = want.reshape(5, 128, 5, 128).any((1, 3))
  np.testing.assert_array_equal(mask.blocks()[0, 0], tiles)


def test_from_splash_of_each_head():
  rng = np.random.default_rng(0)
  tables = rng.random((2, 4, 4)) < 0.5
  tables[..., 0] = True
  made = [
    splash_mask.NumpyMask(x.repeat(128, 0).repeat(128, 1)) for x in tables
  ]
  mask = formats.from_splash(
    *splash_blocks(made), block_q=128, block_kv=128, kv_blocks=4
  )
  np.testing.assert_array_equal(mask.blocks(), tables[None])


def test_from_splash_refuses():
  data_next, blocks = np.zeros((2, 1, 2, 2), np.int8)
  blocks[0] = [[1, 0], [2, 1]]
  data_next[0] = [[0, 0], [0, 1]]
  sizes = dict(block_q=128, block_kv=128, kv_blocks=2)
  with pytest.raises(ValueError, match="give the rule"):
    formats.from_splash(data_next, blocks, **sizes)
  with pytest.raises(ValueError, match="cuts key block"):
    formats.from_splash(data_next, blocks, rule=pk.Window(3), **sizes)
  with pytest.raises(ValueError, match="must be equal"):
    formats.from_splash(data_next, blocks[:, :1], **sizes)


# Native sparse attention.


def test_from_nsa():
  rng = np.random.default_rng(0)
  indices = rng.integers(-1, 3, (2, S, 2, 3))
  indices[rng.random(indices.shape) < 0.3] = S  # padding, as -1 is
  sizes = dict(block_q=16, block_kv=16, group=2)
  convert = functools.partial(formats.from_nsa, **sizes)
  each = rng.integers(0, 4, indices.shape[:3])
  twos = np.full_like(each, 2)
  for argument, counts in ((None, None), (2, twos), (each, each)):
    mask = problem.jit(convert)(indices, argument)
    want = oracle.of_queries(indices, counts, 16, S, causal).repeat(2, axis=1)
    np.testing.assert_array_equal(oracle.of_mask(mask, S, S, causal), want)
    assert not mask.dropped.any() and mask.rule == pk.Causal()


def test_nsa_and_back():
  rng = np.random.default_rng(1)
  order = rng.permuted(np.tile(np.arange(5), (1, S, 2, 1)), axis=-1)
  indices = np.sort(np.where(order < 2, np.arange(5), 9), -1)[..., :2]
  sizes = dict(block_q=16, block_kv=16, kv_len=T)
  mask = formats.from_nsa(indices, group=4, **sizes)
  assert mask.counts.shape == (1, 8, 3)
  got = problem.jit(lambda mask: formats.to_nsa(mask, S, group=4))(mask)
  np.testing.assert_array_equal(got[..., :2], indices)
  assert (got[..., 2:] == -1).all()
  np.testing.assert_array_equal(got, formats.to_nsa(mask, S, group=4))
  with pytest.raises(ValueError, match="list different blocks"):
    formats.to_nsa(mask, S, group=8)
  with pytest.raises(ValueError, match="divide the 8 heads"):
    formats.to_nsa(mask, S, group=3)
  # One key head is shared by all query heads.
  shared = formats.from_nsa(indices[:, :, :1], group=4, **sizes)
  assert shared.counts.shape == (1, 1, 3)
  back = formats.to_nsa(shared, S, group=4)
  np.testing.assert_array_equal(back[..., :2], indices[:, :, :1])


def test_nsa_capacity():
  indices = np.arange(S)[None, :, None, None] % 3
  mask = formats.from_nsa(indices, block_q=16, block_kv=16, capacity=2)
  assert (mask.dropped == 1).all()


# MInference.


@pytest.mark.parametrize(
  "sizes,queries,keys",
  [
    ((16, 32), 70, 70),
    ((32, 16), 40, 70),
    ((16, 16), 70, 40),
    ((1, 16), 33, 33),
  ],
)
def test_from_minference(sizes, queries, keys):
  rng = np.random.default_rng(sum(sizes))
  verticals = rng.integers(-1, keys + 5, (1, 2, 4))
  slashes = rng.integers(-1, queries + 5, (2, 2, 3))
  block_q, block_kv = sizes
  convert = functools.partial(
    formats.from_minference,
    q_len=queries,
    kv_len=keys,
    block_q=block_q,
    block_kv=block_kv,
  )
  mask = problem.jit(convert)(verticals, slashes)
  assert_canonical(mask)
  got = oracle.of_mask(mask, queries, keys, causal)
  for b, h in np.ndindex(2, 2):
    blocks, named = oracle.of_lines(
      verticals[0, h], slashes[b, h], queries, keys, *sizes
    )
    np.testing.assert_array_equal(mask.blocks()[b, h], blocks)
    painted = blocks.repeat(block_q, 0).repeat(block_kv, 1)
    painted = painted[:queries, :keys] & np.tri(queries, keys, dtype=bool)
    np.testing.assert_array_equal(got[b, h], painted | named)


def test_minference_lists():
  mask = random_mask(4, pk.Causal(), columns=5)
  lists = problem.jit(formats.to_minference)(mask)
  table = np.zeros((2, 3, S, T), bool)
  for b, h, i in np.ndindex(2, 3, 3):
    where, rows = (b, h, i), slice(16 * i, 16 * i + 16)
    for begin in lists.block_offset[where][: lists.block_count[where]]:
      table[b, h, rows, begin : begin + 32] = True
    for key in lists.column_index[where][: lists.column_count[where]]:
      table[b, h, rows, key : key + 1] = True
  table &= np.tri(S, T, dtype=bool)
  np.testing.assert_array_equal(table, oracle.of_mask(mask, S, T, causal))


def test_minference_of_concrete_lines_and_none():
  mask = formats.from_minference([[[-1]]], [[[0]]], q_len=S, **BLOCKS)
  assert mask.capacity == 1 and mask.indices.tolist() == [[[[0], [0], [1]]]]
  assert (mask.columns == -1).all()
  bare = formats.to_minference(random_mask(4, pk.Causal()))
  assert (bare.column_count == 0).all() and bare.column_index.shape[-1] == 1


# Compressed rows and columns.


def test_bsr_and_back():
  mask = random_mask(5)
  convert = functools.partial(formats.from_bsr, kv_blocks=3, **BLOCKS)
  blocks, tokens = np.asarray(mask.blocks()), oracle.of_mask(mask, 48, 96)
  for b, h in np.ndindex(2, 3):
    indptr, indices = formats.to_bsr(mask, batch=b, head=h)
    data = np.ones((len(indices), 16, 32), bool)
    matrix = scipy.sparse.bsr_array((data, indices, indptr), shape=(48, 96))
    np.testing.assert_array_equal(matrix.toarray(), tokens[b, h])
  again = convert(indptr, indices)
  np.testing.assert_array_equal(again.blocks()[0, 0], blocks[b, h])
  assert_same(problem.jit(convert)(indptr, indices), again)


def test_from_scipy():
  rng = np.random.default_rng(2)
  tiles = rng.random((4, 5)) < 0.4
  matrix = scipy.sparse.bsr_array(
    tiles.repeat(16, 0).repeat(16, 1), blocksize=(16, 16)
  )
  block_q, block_kv = matrix.blocksize
  mask = formats.from_bsr(
    matrix.indptr,
    matrix.indices,
    block_q=block_q,
    block_kv=block_kv,
    kv_blocks=matrix.shape[1] // block_kv,
  )
  np.testing.assert_array_equal(mask.blocks()[0, 0], tiles)


def test_bsr_of_faulty_lists():
  """Out of range or repeated entries are not listed."""
  convert = functools.partial(formats.from_bsr, kv_blocks=3, **BLOCKS)
  mask = convert([0, 4, 5], [2, -1, 2, 3, 0])
  np.testing.assert_array_equal(
    mask.blocks()[0, 0], [[False, False, True], [True, False, False]]
  )
  assert convert([0, 0], np.zeros(0, int)).counts.tolist() == [[[0]]]
  with pytest.raises(ValueError, match="indptr is empty"):
    convert(np.zeros(0, int), np.zeros(0, int))
  with pytest.raises(ValueError, match="batch is 1 and head is 0"):
    formats.to_bsr(mask, batch=1)


def test_cudnn_and_back():
  mask = random_mask(6)
  index, nums = problem.jit(formats.to_cudnn)(mask)
  again = formats.from_cudnn(index, nums, kv_blocks=3, **BLOCKS)
  assert_same(again, mask)
  rng = np.random.default_rng(0)
  shuffled = rng.permuted(np.tile(np.arange(3), (1, 1, 2, 1)), axis=-1)
  mask = formats.from_cudnn(shuffled, kv_blocks=3)
  assert mask.block_q == mask.block_kv == 128
  assert mask.indices.tolist() == [[[[0, 1, 2]] * 2]]


@pytest.mark.parametrize("members", [False, True])
def test_flash_moba(members):
  mask = random_mask(7, members=members)
  offsets, counts, rows = formats.to_flash_moba(mask, S)
  assert (offsets.dtype, counts.dtype) == (np.int64, np.int32)
  assert offsets.shape == counts.shape == (2, 3, 3)
  assert len(rows) == counts.sum() and rows.dtype == np.int32
  got = oracle.of_columns(offsets, counts, rows, 32, S, T)
  np.testing.assert_array_equal(got, oracle.of_mask(mask, S, T))


# What a format has no word for.


def test_dropped_blocks_are_in_no_export():
  blocks = np.ones((3, 3), bool)
  convert = functools.partial(pk.BlockMask.from_blocks, capacity=2, **BLOCKS)
  mask = problem.jit(convert)(blocks)
  assert (mask.counts == 3).all()
  lists = formats.to_flex(mask, S, T)
  both = lists.kv_num_blocks + lists.full_kv_num_blocks
  for counts in (both, formats.to_cudnn(mask)[1]):
    assert (counts == 2).all()
  assert formats.to_bsr(mask)[0].tolist() == [0, 2, 4, 6]
  assert formats.to_flash_moba(mask, S)[1].tolist() == [[[S, S, 0]]]
  assert formats.to_dense(mask, S, T).sum() == S * 64


@pytest.mark.parametrize("convert", ["bsr", "minference", "cudnn"])
def test_what_is_no_mask(convert):
  with pytest.raises(ValueError, match=r"^mask is a NoneType"):
    getattr(formats, f"to_{convert}")(None)


@pytest.mark.parametrize(
  "convert,lacks",
  [
    (lambda m: formats.to_dense(m, S, T), ("level",)),
    (lambda m: formats.to_flex(m, S, T), ("level", "columns", "members")),
    (lambda m: formats.to_nsa(m, S), ("level", "columns", "window", "none")),
    (formats.to_minference, ("level", "members", "window", "none")),
    (formats.to_bsr, ("level", "columns", "members")),
    (formats.to_cudnn, ("level", "columns", "members", "causal", "window")),
    (
      lambda m: formats.to_flash_moba(m, S),
      ("level", "columns", "window"),
    ),
  ],
  ids=["dense", "flex", "nsa", "minference", "bsr", "cudnn", "flash_moba"],
)
def test_refuses_by_name(convert, lacks):
  named = dict(none=None, causal=pk.Causal(), window=pk.Window(9))
  always = ("level", "columns", "members", "causal", "window", "none")
  for lack in always:
    rule = named.get(lack, pk.Causal())
    if lack in ("level", "columns", "members") and "causal" in lacks:
      rule = None
    mask = random_mask(
      8, rule, members=lack == "members", columns=2 * (lack == "columns")
    )
    if lack == "level":
      mask = pk.BlockMask(
        mask.indices,
        mask.counts,
        **BLOCKS,
        kv_blocks=3,
        rule=rule,
        level=mask.indices,
      )
    if lack in lacks:
      match = "rule" if lack in named else f"mask has {lack}"
      with pytest.raises(ValueError, match=match):
        convert(mask)
    else:
      convert(mask)


def test_traced_masks_and_sizes_that_depend_on_them():
  for convert in (formats.to_bsr, lambda m: formats.to_flash_moba(m, S)):
    with pytest.raises(ValueError, match="concrete"):
      jax.jit(convert)(random_mask(9))


@pytest.mark.parametrize(
  "convert,match",
  [
    (lambda: formats.from_dense(np.ones((2, 2)), 16, 16), "dense is float"),
    (lambda: formats.to_dense(random_mask(0), 49, T), "q_len is 49"),
    (lambda: formats.to_dense(random_mask(0), S, 64), "from 65 to 96"),
    (
      lambda: formats.from_flex([[[1]]], [[[[0]]]], [[[1]]], **BLOCKS),
      "given together",
    ),
    (
      lambda: formats.from_flex([[[1]]], [[[[0], [0]]]], **BLOCKS),
      "begin with it",
    ),
    (
      lambda: formats.from_nsa(np.zeros((1, 2, 1, 1)), **BLOCKS),
      "block_indices is float",
    ),
    (
      lambda: formats.from_minference([1], [[[0]]], q_len=S),
      "v_idx is int",
    ),
    (
      lambda: formats.to_dense(
        random_mask(0, pk.Causal()), S, T, q_positions=np.arange(T)
      ),
      "q_positions is int",
    ),
  ],
)
def test_wrong_arguments(convert, match):
  with pytest.raises(ValueError, match=match):
    convert()


def test_attention_reads_what_the_table_says():
  """The kernel and the table mean the same, and lists of each format run."""
  (q, k, v), _ = problem.qkv(1, S, T, 4, 2, 8)
  indices = np.arange(S)[None, :, None, None] // 16 - np.arange(2)
  mask = formats.from_nsa(
    np.concatenate([indices, indices % 2], 2), kv_len=T, group=2, **BLOCKS
  )
  attend = functools.partial(pk.block_sparse_attention, backend="xla")
  got = problem.jit(attend)(q, k, v, mask)
  table = formats.to_dense(mask, S, T)
  want = jax.nn.dot_product_attention(q, k, v, mask=table)
  some = np.asarray(table.any(-1))[0].T
  np.testing.assert_allclose(got[0][some], want[0][some], atol=1e-5)
  assert jnp.isfinite(got).all()
