"""Block-sparse matmul against the oracle, and what its lists may hold."""

import dataclasses
import functools

from hypothesis import given
from hypothesis import strategies as st
import jax
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as pk
from pallas_kernels import aot
from pallas_kernels.block_sparse_matmul import tpu
from pallas_kernels.block_sparse_matmul import xla
from tests import common
from tests.kernels.problem import jit
from tests.oracles import matmul as oracle

OPTIONS = {
  "default": {},
  "reference": dict(backend="reference"),
  "xla": dict(backend="xla"),
  "tpu": dict(backend="tpu", interpret=True),
  "tpu_races": dict(
    backend="tpu",
    interpret=pltpu.InterpretParams(
      detect_races=True, uninitialized_memory="nan"
    ),
  ),
}
backends = pytest.mark.parametrize(
  "backend",
  [
    "reference",
    "xla",
    "tpu",
    pytest.param("tpu_races", marks=pytest.mark.slow),
  ],
)
# Blocks that hang over both edges. Those of the Pallas kernel are large.
SMALL = dict(shape=(40, 52), block=(16, 8))
LARGE = dict(shape=(300, 200), block=(128, 128))


def size_for(backend):
  return LARGE if backend.startswith("tpu") else SMALL


def make(shape, block, lead=(3, 2), room=3, seed=0, dtype=np.float32):
  """x, weight, dy; unused values and what hangs over are NaN."""
  rng = np.random.default_rng(seed)
  (n_k, n_n), capacity = -(-np.array(shape) // block), 3
  indices = rng.integers(0, n_k, (n_n, capacity))
  counts = rng.integers(0, capacity + 1, n_n)
  counts[:2] = 0, capacity  # an empty column, and a full one
  nnz = int(counts.sum()) + room
  values = np.full((nnz, *block), np.nan)
  for inside, rows, cols in oracle._listed(
    indices, counts, shape, values.shape
  ):
    lies = rows.stop - rows.start, cols.stop - cols.start
    values[inside] = rng.standard_normal(lies)
  normal = lambda size: jnp.asarray(rng.standard_normal((*lead, size)), dtype)
  weight = pk.BlockSparseWeight(
    jnp.asarray(values, dtype), indices, counts, shape
  )
  return normal(shape[0]), weight, normal(shape[1])


def everything(backend):
  """f(x, weight, dy) -> the result, gradients and the sampled product."""
  options = OPTIONS[backend]

  def f(x, weight, dy):
    def call(x, values):
      w = dataclasses.replace(weight, values=values)
      return pk.block_sparse_matmul(x, w, **options)

    out, pull = jax.vjp(call, x, weight.values)
    return out, *pull(dy), pk.sampled_matmul(x, dy, weight, **options)

  return f


@functools.cache
def compiled(backend):
  return jit(everything(backend))


def expected(x, weight, dy):
  lists = np.asarray(weight.indices), np.asarray(weight.counts)
  lists = weight.values, *lists, weight.shape
  out = oracle.block_sparse_matmul(x, *lists)
  dx, dvalues = oracle.block_sparse_matmul_gradients(dy, x, *lists)
  return out, dx, dvalues, dvalues


def compare(backend, x, weight, dy, rtol=1e-5):
  got = compiled(backend)(x, weight, dy)
  for name, a, b in zip(
    ("out", "dx", "dvalues", "sampled"), got, expected(x, weight, dy)
  ):
    assert a.dtype == x.dtype
    scale = rtol * max(1, np.abs(b).max(initial=0))
    a = np.asarray(a, np.float64)
    np.testing.assert_allclose(a, b, rtol, 5 * scale, err_msg=name)


@backends
def test_against_the_oracle(backend):
  compare(backend, *make(**size_for(backend)))


@pytest.mark.parametrize("lead", [(), (1,), (0,), (2, 0, 3)], ids=str)
def test_leading_dimensions(lead):
  x, weight, dy = make(**SMALL, lead=lead)
  if 0 in lead:
    out, dx, dvalues, sampled = compiled("xla")(x, weight, dy)
    assert (out.shape, dx.shape) == (dy.shape, x.shape)
    assert not dvalues.any() and not sampled.any()
  else:
    compare("xla", x, weight, dy)


def test_many_steps(monkeypatch):
  monkeypatch.setattr(xla, "STEP_BYTES", 2**11)  # rows of no other test
  compare("xla", *make(**SMALL, lead=(7,), room=9))


@pytest.mark.parametrize(
  "backend", ["xla", pytest.param("tpu", marks=pytest.mark.slow)]
)
def test_bfloat16_accumulates_in_float32(backend):
  problem = make(**size_for(backend), lead=(40,), dtype=jnp.bfloat16)
  compare(backend, *problem, rtol=1e-2)
  x, weight, _ = problem
  out = pk.block_sparse_matmul(
    x, weight, preferred_element_type=jnp.float32, **OPTIONS[backend]
  )
  want, *_ = expected(*problem)
  assert out.dtype == jnp.float32
  np.testing.assert_allclose(out, want, 1e-4, 1e-4)


def test_all_blocks_listed_is_dense():
  rng = np.random.default_rng(0)
  w = jnp.asarray(rng.integers(-3, 4, (40, 52)), jnp.float32)
  x = jnp.asarray(rng.integers(-3, 4, (5, 40)), jnp.float32)

  @jit
  def f(x, w):
    every = jnp.ones((3, 7), bool)
    weight = pk.BlockSparseWeight.from_dense(w, every, (16, 8), capacity=21)
    return weight.density, weight.dense(), pk.block_sparse_matmul(x, weight)

  density, dense, out = f(x, w)
  assert density == 1
  np.testing.assert_array_equal(dense, w)
  np.testing.assert_array_equal(out, x @ w)


@pytest.mark.parametrize("kind", ["no values", "no slots", "none listed"])
def test_nothing_listed(kind):
  nnz, slots = 3 * (kind != "no values"), 2 * (kind != "no slots")
  weight = pk.BlockSparseWeight(
    jnp.full((nnz, 16, 8), jnp.nan),
    jnp.zeros((7, slots), int),
    jnp.full(7, 2 * (kind != "none listed")),
    (40, 52),
  )
  if kind == "none listed":
    x, y = jnp.full((2, 40), jnp.nan), jnp.full((2, 52), jnp.nan)
    for got in compiled("xla")(x, weight, y):
      assert not got.any()
  else:
    x = jnp.ones((2, 40))
    assert not pk.block_sparse_matmul(x, weight).any()
    assert weight.density == 0


@pytest.mark.parametrize("backend", ["reference", "xla"])
def test_nan_reaches_what_lists_it_and_nothing_else(backend):
  x, weight, dy = make(**SMALL)
  x, dy = x.at[..., 17].set(jnp.nan), dy.at[..., 9].set(jnp.nan)
  out, dx, dvalues, _ = compiled(backend)(x, weight, dy)
  row, column = (np.asarray(a) for a in weight.places())
  of_columns = lambda columns: np.isin(np.arange(52) // 8, columns)
  of_rows = lambda rows: np.isin(np.arange(40) // 16, rows)
  listing = of_columns(column[row == 1])
  np.testing.assert_array_equal(jnp.isnan(out[0, 0]), listing)
  listed = of_rows(row[(column == 1) & (row < 3)])
  np.testing.assert_array_equal(jnp.isnan(dx[0, 0]), listed)
  touched = (row == 1) | (column == 1)
  assert not jnp.isnan(dvalues[~touched]).any()


def cleaned(weight):
  """The same weight without what its lists may not hold, and its places."""
  indices, counts = np.asarray(weight.indices), np.asarray(weight.counts)
  n_k, (n_n, capacity) = weight.blocks[0], indices.shape
  nnz, p, kept = len(weight.values), 0, []
  lists = [[] for _ in range(n_n)]
  for j in range(n_n):
    for s in range(np.clip(counts[j], 0, capacity)):
      if p < nnz and 0 <= indices[j, s] < n_k:
        lists[j].append(indices[j, s])
        kept.append(p)
      p += 1
  padded = [found + [0] * (capacity - len(found)) for found in lists]
  values = weight.values[np.array(kept, int)]
  made = pk.BlockSparseWeight(
    values, np.array(padded), np.array([*map(len, lists)]), weight.shape
  )
  return made, np.array(kept, int)


def check_fuzzed(backend, seed):
  x, weight, dy = make(**size_for(backend))
  rng = np.random.default_rng(seed)
  wild = rng.choice([-(2**31), -5, -1, 0, 1, 2, 3, 40, 2**31 - 1], (2, 64))
  weight = pk.BlockSparseWeight(
    jnp.ones_like(weight.values).at[-1].set(2.0),
    wild[0, : weight.indices.size].reshape(weight.indices.shape),
    wild[1, : weight.counts.size],
    weight.shape,
  )
  clean, kept = cleaned(weight)
  out, dx, dvalues, sampled = compiled(backend)(x, weight, dy)
  want = expected(x, clean, dy)
  np.testing.assert_allclose(out, want[0], 1e-5, 1e-4)
  np.testing.assert_allclose(dx, want[1], 1e-5, 1e-4)
  for got in (dvalues, sampled):
    np.testing.assert_allclose(got[kept], want[2], 1e-5, 1e-4)
    assert not np.delete(got, kept, 0).any()
  np.testing.assert_allclose(
    weight.density, len(kept) / np.prod(weight.blocks), 1e-6
  )


@given(seed=st.integers(0, 10**6))
def test_fuzzed_lists(seed):
  check_fuzzed("xla", seed)


@pytest.mark.parametrize("backend", ["reference", "tpu"])
def test_fuzzed_lists_of_other_backends(backend):
  for seed in range(4):
    check_fuzzed(backend, seed)


@pytest.mark.parametrize("kind", ["wild", "reversed", "twice", "of others"])
def test_stale_edges_are_not_used(kind):
  x, weight, dy = make(**LARGE)
  nnz, edges = len(weight.values), weight.with_transpose().edges
  wild = np.resize([-(2**31), 2**31 - 1, 3, 3, -1, 7], nnz)
  if kind == "of others":
    flipped = weight.blocks[0] - 1 - weight.indices
    weight = dataclasses.replace(weight.with_transpose(), indices=flipped)
  else:
    made = {"wild": wild, "reversed": edges[::-1], "twice": edges.at[1].set(0)}
    weight = dataclasses.replace(weight, edges=made[kind])
  compare("tpu", x, weight, dy)


def test_edges_are_checked():
  target = jnp.array([2, 0, 3, 0, 1])
  sorted_, f = np.argsort(target, stable=True), jit(tpu.checked_edges)
  for edges in (sorted_, np.zeros(5), sorted_[::-1], np.arange(5) - 1):
    edges = jnp.asarray(edges, jnp.int32)
    np.testing.assert_array_equal(f(edges, target), sorted_)


def test_a_step_fits_vmem():
  MiB = 2**20
  product = functools.partial(tpu.product_room, size=4, out=4, transpose=False)
  assert tpu.tile_of(1000, product((9, 1024, 1024))) == (512, 18 * MiB)
  assert tpu.tile_of(1000, product((9, 2048, 2048))) == (256, 42 * MiB)
  assert tpu.tile_of(3, product((9, 128, 256)))[0] == 16
  assert tpu.sampled_room((9, 2048, 2048), 2, 2) == (2**14, 32 * MiB)
  for size, name in ((4096, "4096 x 4096"), (2**14, "16384 x 16384")):
    shape = (9, size, size)
    assert name in tpu.lacks(5, shape, 9, product(shape))


def test_blocks_too_large_for_vmem():
  shape = (4096, 4096)
  blank = jax.ShapeDtypeStruct((1, *shape), jnp.float32)

  def f(values, **options):
    weight = pk.BlockSparseWeight(values, [[0]], [1], shape)
    return pk.block_sparse_matmul(jnp.ones(4096), weight, **options)

  assert jax.eval_shape(f, blank).shape == (4096,)
  with pytest.raises(ValueError, match="'tpu' has no room for blocks of 4096"):
    jax.eval_shape(functools.partial(f, backend="tpu"), blank)


def test_cached_transpose():
  x, weight, dy = make(**LARGE)
  compare("tpu", x, weight.with_transpose(), dy)


def test_second_order():
  x, weight, dy = make(**SMALL)

  def penalty(options, x, values, dy):
    w = dataclasses.replace(weight, values=values)
    f = lambda x, v, dy: (
      pk.block_sparse_matmul(x, dataclasses.replace(w, values=v), **options)
      * dy
    ).sum()
    dx, dvalues = jax.grad(f, (0, 1))(x, values, dy)
    return (dx**2).sum() + (dvalues**3).sum()

  got, want = (
    jit(jax.grad(functools.partial(penalty, OPTIONS[b]), (0, 1, 2)))(
      x, weight.values, dy
    )
    for b in ("xla", "reference")
  )
  for a, b in zip(got, want):
    np.testing.assert_allclose(a, b, 1e-4, 1e-3)


def test_vmap():
  x, weight, dy = make(**SMALL, lead=(4, 3, 2))
  others = [make(**SMALL, seed=s, room=0)[1] for s in (0, 1)]
  nnz = max(len(w.values) for w in others)
  room = lambda w: jnp.pad(w.values, [(0, nnz - len(w.values)), (0, 0), (0, 0)])
  many = jax.tree.map(
    lambda *a: jnp.stack(a),
    *(dataclasses.replace(w, values=room(w)) for w in others),
  )
  f = compiled("xla")
  for axes, args, size in (
    ((0, None, 0), (x, weight, dy), 4),
    ((0, 0, 0), (x[:2], many, dy[:2]), 2),
  ):
    got = jit(jax.vmap(everything("xla"), axes))(*args)
    for i in range(size):
      at = [
        a if axis is None else jax.tree.map(lambda a, i=i: a[i], a)
        for axis, a in zip(axes, args)
      ]
      for a, b in zip(got, f(*at), strict=True):
        np.testing.assert_allclose(a[i], b, 1e-5, 1e-5)


def test_other_lists_run_the_same_program():
  f = jit(lambda x, weight: pk.block_sparse_matmul(x, weight))
  w = jnp.ones((40, 52))
  for seed in (0, 1):
    mask = np.random.default_rng(seed).random((3, 7)) < 0.5
    weight = pk.BlockSparseWeight.from_dense(w, mask, (16, 8), capacity=21)
    f(w.T, weight)
  assert f._cache_size() == 1


@pytest.mark.parametrize("axis_type", common.AXIS_TYPES, ids=str)
@pytest.mark.parametrize("cut", ["columns", "values"])
@pytest.mark.parametrize("rows", [("x",), (None, "x")], ids=["b", "t"])
def test_sharded(axis_type, cut, rows):
  x, weight, dy = make((64, 128), (16, 8), lead=(8, 4), seed=3)
  nnz = -(-len(weight.values) // 2) * 2
  pad = [(0, nnz - len(weight.values)), (0, 0), (0, 0)]
  weight = dataclasses.replace(weight, values=jnp.pad(weight.values, pad))
  want = compiled("xla")(x, weight, dy)
  mesh = common.mesh_of(axis_type)
  columns = "y" if cut == "columns" else None
  on = lambda a, *spec: common.place(a, mesh, jax.P(*spec))
  with jax.set_mesh(mesh):
    weight = dataclasses.replace(
      weight,
      values=on(weight.values, None if columns else "y"),
      indices=on(weight.indices, columns),
      counts=on(weight.counts, columns),
    )
    of_dy = (*rows, None, columns) if rows[0] else (*rows, columns)
    args = on(x, *rows), weight, on(dy, *of_dy)
    f = compiled("xla").lower(*args).compile()
    got = f(*args)
  assert common.moved(f) == set()
  for a, b in zip(got, want, strict=True):
    np.testing.assert_allclose(a, b, 1e-5, 1e-4)
  shards = [a.sharding.shard_shape(a.shape) for a in got]
  lead = (2, 4) if rows[0] else (8, 1)
  assert [s[:2] for s in shards[:2]] == [lead, lead]
  assert [s[0] for s in shards[2:]] == 2 * [nnz if columns else nnz // 2]
  out = got[0].sharding.shard_shape(got[0].shape)
  assert out[-1] == (64 if columns else 128)


def test_inside_shard_map():
  x, weight, dy = make(**SMALL, lead=(8,))
  want = compiled("xla")(x, weight, dy)
  mesh = jax.make_mesh((8,), ("x",), (jax.sharding.AxisType.Auto,))
  f = lambda *args: everything("xla")(*args)[:3]
  specs = (jax.P("x"), jax.P(), jax.P("x"))
  outs = (jax.P("x"), jax.P("x"), jax.P())
  f = jax.shard_map(f, mesh=mesh, in_specs=specs, out_specs=outs)
  for a, b in zip(jit(f)(x, weight, dy), want):
    np.testing.assert_allclose(a, b, 1e-5, 1e-4)


def test_gradient_by_the_weight():
  x, weight, dy = make(**SMALL)
  f = lambda weight: (pk.block_sparse_matmul(x, weight) * dy).sum()
  got = jax.grad(f, allow_int=True)(weight)
  np.testing.assert_allclose(got.values, expected(x, weight, dy)[2], 1e-4, 1e-4)
  assert got.indices.dtype == jax.dtypes.float0


@pytest.mark.parametrize("kind", ["blocks", "weights"])
def test_from_dense(kind):
  rng = np.random.default_rng(0)
  w = rng.standard_normal((40, 52)).astype(np.float32)
  mask = rng.random((3, 7) if kind == "blocks" else w.shape) < 0.2
  spread = mask
  if kind == "blocks":
    spread = np.kron(mask, np.ones((16, 8), bool))[:40, :52]
  make = functools.partial(pk.BlockSparseWeight.from_dense, block=(16, 8))
  np.testing.assert_array_equal(make(w, mask).dense(), w * spread)
  traced = jit(functools.partial(make, capacity=21))(w, mask)
  np.testing.assert_array_equal(traced.dense(), w * spread)
  lists = [np.asarray(a) for a in (traced.indices, traced.counts)]
  want = oracle.dense(traced.values, *lists, traced.shape)
  np.testing.assert_array_equal(traced.dense(), want)
  got = jax.grad(lambda w: (make(w, mask).dense() ** 2).sum())(jnp.asarray(w))
  np.testing.assert_allclose(got, 2 * w * spread, 1e-6)


def weight_of(**changes):
  given = dict(
    values=jnp.ones((2, 16, 8)),
    indices=jnp.zeros((7, 2), int),
    counts=jnp.zeros(7, int),
    shape=(40, 52),
  )
  return pk.BlockSparseWeight(**(given | changes))


def from_dense(**changes):
  given = dict(w=jnp.ones((40, 52)), mask=jnp.ones((3, 7), bool), block=(16, 8))
  return pk.BlockSparseWeight.from_dense(**(given | changes))


NO_BLOCKS = jnp.zeros((3, 7), bool)


def matmul(x=None, weight=None, **options):
  x = jnp.ones((2, 40)) if x is None else x
  weight = weight_of() if weight is None else weight
  return pk.block_sparse_matmul(x, weight, **options)


def sampled(x, y):
  return pk.sampled_matmul(x, y, weight_of())


@pytest.mark.parametrize(
  "call, message",
  [
    (lambda: weight_of(shape=(40,)), r"shape is \(40,\)"),
    (lambda: weight_of(shape=None), "shape is None; it must be"),
    (lambda: weight_of(shape=(40, 5.2)), r"shape is \(40, 5.2\)"),
    (lambda: weight_of(values=jnp.ones((2, 16))), "values is float32"),
    (lambda: weight_of(values=jnp.ones((2, 16, 8), int)), "values is int32"),
    (lambda: weight_of(indices=jnp.zeros((6, 2), int)), r"indices .*\[7, C\]"),
    (lambda: weight_of(counts=jnp.zeros(7)), "counts is float32"),
    (lambda: weight_of(edges=jnp.zeros(3, int)), r"edges .*\[2\]"),
    (lambda: from_dense(w=jnp.ones(3)), r"w is float32\[3\]"),
    (lambda: from_dense(block=(0, 8)), r"block is \(0, 8\)"),
    (lambda: from_dense(block=8), "block is 8; it must be two"),
    (lambda: from_dense(capacity=2.5), "capacity is 2.5; it must be"),
    (lambda: from_dense(capacity=-1), "capacity is -1; it must be"),
    (lambda: from_dense(mask=jnp.ones((3, 6), bool)), r"mask is bool\[3, 6\]"),
    (lambda: from_dense(capacity=20), "capacity is 20; the mask has 21"),
    (
      lambda: jax.eval_shape(lambda m: from_dense(mask=m), NO_BLOCKS),
      "capacity is None and mask is traced",
    ),
    (lambda: matmul(weight=jnp.ones((40, 52))), "weight is Array"),
    (lambda: matmul(jnp.ones((2, 41))), r"x is float32\[2, 41\].* K is 40"),
    (lambda: matmul(jnp.ones((2, 40), int)), "x is int32"),
    (lambda: matmul(jnp.ones((2, 40), jnp.bfloat16)), "x has dtype bfloat16"),
    (lambda: sampled(jnp.ones((2, 40)), jnp.ones((3, 52))), "leading"),
    (lambda: sampled(jnp.ones((2, 40)), jnp.ones((2, 40))), "N is 52"),
    (lambda: matmul(preferred_element_type=jnp.int32), "preferred_element"),
    (lambda: matmul(preferred_element_type="foo"), "_type is 'foo'; it must"),
    (lambda: matmul(backend="gpu"), "backend is 'gpu'"),
    (lambda: matmul(interpret=True), "interpret is True"),
    (lambda: matmul(backend="tpu"), "'tpu' has no blocks of 16 x 8"),
  ],
)  # fmt: skip
def test_errors(call, message):
  with pytest.raises(ValueError, match=message):
    call()


def test_numpy_integers():
  weight = from_dense(block=np.array([16, 8]), capacity=np.int64(21))
  assert weight.block == (16, 8)
  assert weight_of(shape=np.array([40, 52])).shape == (40, 52)


@pytest.mark.parametrize("x64", [False, True])
def test_what_int32_cannot_hold_does_not_wrap(x64):
  with jax.enable_x64(x64):
    indices, counts = np.zeros((7, 2), np.int64), np.full(7, 2**32 + 1)
    indices[0], indices[1] = 2**32, -(2**32)
    for to in (np.asarray, list, jnp.asarray) if x64 else (np.asarray, list):
      weight = weight_of(
        values=jnp.ones((14, 16, 8)), indices=to(indices), counts=to(counts)
      )
      assert weight.indices.dtype == weight.counts.dtype == jnp.int32
      assert weight.places()[0].tolist() == [3] * 4 + [0] * 10


@pytest.mark.slow
@pytest.mark.parametrize(
  "dtype, shape, block",
  [
    ("bfloat16", *LARGE.values()),
    ("float32", *LARGE.values()),
    ("float32", (2048, 2048), (1024, 1024)),
    ("bfloat16", (4096, 4096), (2048, 2048)),
  ],
)
def test_compiles_ahead_of_time(dtype, shape, block):
  x, weight, dy = make(shape, block, lead=(1000,), dtype=jnp.dtype(dtype))
  f = lambda *args: everything("default")(*args)[:3]
  for target in ("v6e:2x2", "v5e:2x2", "v5p:2x2x1"):
    kernels = aot.compile_for(f, x, weight, dy, target=target).kernels
    assert kernels.keys() == {
      "block_sparse_matmul",
      "block_sparse_matmul_t",
      "block_sparse_sampled",
    }
