"""Costs: against loops over the lists, and the TPU kernels' own operands."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as pk
from pallas_kernels import costs
from tests.kernels import problem
from tests.kernels.problem import Case

CAUSAL = pk.Causal()
CASES = dict(
  plain=Case(),
  shared=Case(shared=("batch", "heads"), keys=50),
  causal=Case(rule=CAUSAL, queries=23, keys=70, capacity=5),
  window=Case(rule=pk.Window(9, 3), block_kv=32, keys=90, capacity=3),
  members=Case(members=True, rule=CAUSAL, capacity=3, shared=("batch",)),
  columns=Case(columns=19, rule=CAUSAL),
  columns_shared=Case(columns=5, shared=("heads",), kv_heads=1),
  level=Case(level=True, keys=48, rule=pk.Window(5)),
  single=Case(block_q=1, queries=9, kv_heads=4, members=True),
)
each_case = pytest.mark.parametrize("name", CASES)


def allowed(rule, queries, keys):
  """Whether some query may read some key."""
  if rule is None:
    return True
  return bool(rule(np.array(queries)[:, None], np.array(keys)).any())


def pairs(mask, case):
  """Pairs that are run, of every batch element and head, one at a time."""
  indices, counts = np.asarray(mask.indices), np.asarray(mask.counts)
  found = 0
  for b, h, i in np.ndindex(case.batch, case.heads, counts.shape[2]):
    at = (b % counts.shape[0], h % counts.shape[1], i)
    end = min((i + 1) * mask.block_q, case.queries)
    rows = range(i * mask.block_q, end)
    for c in range(counts[at]):
      begin = indices[at][c] * mask.block_kv
      keys = range(begin, min(begin + mask.block_kv, case.keys))
      if mask.level is not None:
        run = 2 ** int(mask.level[at][c])
        keys = keys[run - 1 :: run]
      found += allowed(mask.rule, rows, keys)
    if mask.columns is not None:
      columns = np.asarray(mask.columns)[at]
      for first in range(0, len(columns), mask.block_kv):
        some = columns[first : first + mask.block_kv]
        some = some[(some >= 0) & (some < case.keys)]
        found += len(some) > 0 and allowed(mask.rule, rows, some)
  return found


def of(case, mask, **options):
  q_shape = (case.batch, case.queries, case.heads, case.dim)
  kv_shape = (case.batch, case.keys, case.kv_heads, case.dim)
  options = dict(dtype="float32") | options
  return costs.cost(mask, q_shape, kv_shape, **options)


@each_case
def test_flops(name):
  case = CASES[name]
  mask = problem.make(case).mask
  run = pairs(mask, case)
  dense = case.batch * case.heads * case.queries * case.keys
  for backward, products in ((False, 2), (True, 7)):
    found = of(case, mask, backward=backward)
    each = 2 * case.dim * products
    assert found.blocks == run
    assert found.flops == run * each * mask.block_q * mask.block_kv
    assert found.dense_flops == each * dense
    assert found.speedup_bound == found.dense_flops / found.flops
    moved = found.bytes_read + found.bytes_written
    assert found.arithmetic_intensity == found.flops / moved
    for field in dataclasses.fields(found):
      assert type(getattr(found, field.name)) is int, field.name


def test_bytes_of_a_small_call():
  """Every array by hand: 2 query blocks of 16, lists of 1 and 2 of 3 blocks."""
  mask = pk.BlockMask(
    [[[[0, 0], [1, 2]]]], [[[1, 2]]], block_q=16, block_kv=16, kv_blocks=3
  )
  q_shape, kv_shape = (1, 30, 4, 8), (1, 40, 2, 8)
  cost = functools.partial(costs.cost, mask, q_shape, kv_shape)
  q, kv = 30 * 4 * 8 * 2, 40 * 2 * 8 * 2
  tile, statistic = 16 * 8 * 2, 30 * 4 * 4
  pairs = 3 * 4  # of each query head
  forward = cost(dtype=jnp.bfloat16)
  # A list is a step of 8 blocks (the least that fill 128 lanes) and a code.
  lists = 2 * (8 + 1) * 4
  assert forward.smem_bytes == lists
  assert forward.bytes_read == q + pairs * 2 * tile + lists
  assert forward.bytes_written == q + statistic
  both = cost(dtype=jnp.bfloat16, backward=True)
  # 8 edges and 3 key blocks: 4 steps of 8 edges, shared by both key heads.
  by_key = 4 * (2 + 8) * 4
  delta = 2 * q
  dq = 2 * q + 2 * statistic + pairs * 2 * tile + lists
  dkv = 2 * kv + pairs * (2 * tile + 2 * 16 * 4) + by_key
  assert both.bytes_read == forward.bytes_read + delta + dq + dkv
  assert both.bytes_written == 2 * q + 2 * statistic + 2 * kv
  assert both.smem_bytes == max(lists, by_key)
  single = cost(dtype="float32")
  assert single.bytes_written == 2 * q + statistic


def prefetched(jaxpr):
  """Bytes of the scalar-prefetch operands of each Pallas kernel."""
  found = []
  for equation in jaxpr.eqns:
    if equation.primitive.name == "pallas_call":
      count = equation.params["grid_mapping"].num_index_operands
      shapes = [x.aval for x in equation.invars[:count]]
      assert all(x.ndim == 1 and x.dtype == jnp.int32 for x in shapes)
      found.append(4 * sum(math.prod(x.shape) for x in shapes))
      continue
    for value in jax.tree.leaves(list(equation.params.values())):
      inner = getattr(value, "jaxpr", value)
      if hasattr(inner, "eqns"):
        found += prefetched(inner)
  return found


@each_case
def test_lists_are_those_of_the_kernels(name):
  case = CASES[name]
  made = problem.make(case)

  def loss(arrays, mask):
    out = pk.block_sparse_attention(
      *(arrays[n] for n in "qkv"), mask, backend="tpu", interpret=True
    )
    return out.sum()

  traced = jax.make_jaxpr(jax.grad(loss))(made.arrays, made.mask)
  forward, dq, dkv = prefetched(traced.jaxpr)
  assert of(case, made.mask).smem_bytes == forward
  both = of(case, made.mask, backward=True)
  assert both.smem_bytes == max(forward, dq, dkv)


def test_nothing_listed_or_nothing_there():
  mask = pk.BlockMask.from_blocks(
    np.zeros((2, 2), bool), block_q=16, block_kv=16
  )
  found = costs.cost(mask, (1, 32, 1, 8), (1, 32, 1, 8), dtype="float32")
  assert found.flops == found.blocks == 0
  assert found.speedup_bound == float("inf")
  assert found.arithmetic_intensity == 0


@pytest.mark.parametrize("queries,keys", [(32, 0), (0, 32), (0, 0)])
def test_empty_arrays(queries, keys):
  lists = np.zeros((1, 1, queries // 16, 2), int)
  mask = pk.BlockMask(
    lists, block_q=16, block_kv=16, kv_blocks=keys // 16, rule=CAUSAL
  )
  found = costs.cost(mask, (1, queries, 1, 8), (1, keys, 1, 8), dtype="float32")
  assert found.blocks == found.flops == found.dense_flops == 0


@pytest.mark.parametrize(
  "q_shape,kv_shape,match",
  [
    ((1, 32, 8), (1, 32, 1, 8), "q_shape is"),
    (np.ones((1, 32, 1, 8)), (1, 32, 1, 8), "^q_shape is an array of shape"),
    ((1, 32, 3, 8), (1, 32, 2, 8), "divides 3"),
    ((1, 32, 2, 8), (1, 32, 2, 4), "head_dim 8"),
    ((2, 32, 2, 8), (1, 32, 2, 8), "have batch 2"),
    ((1, 33, 2, 8), (1, 32, 2, 8), "need 1 or 1, 1 or 2, 3 and 2"),
    ((1, 32, 5, 8), (1, 32, 5, 8), "1 or 5"),
  ],
)
def test_wrong_shapes(q_shape, kv_shape, match):
  blocks = np.ones((2, 2, 2), bool)
  mask = pk.BlockMask.from_blocks(blocks, block_q=16, block_kv=16)
  with pytest.raises(ValueError, match=match):
    costs.cost(mask, q_shape, kv_shape, dtype="float32")


def test_wrong_masks():
  shape = (1, 32, 1, 8)
  cost = functools.partial(
    costs.cost, q_shape=shape, kv_shape=shape, dtype="float32"
  )
  with pytest.raises(ValueError, match="mask is a ndarray"):
    cost(np.ones((2, 2), bool))
  mask = pk.BlockMask.from_blocks(
    np.ones((2, 2), bool), block_q=16, block_kv=16
  )
  with pytest.raises(ValueError, match="mask is traced"):
    jax.jit(lambda mask: cost(mask).flops)(mask)
