"""Grouped matmul: every backend against the oracle, and what others get wrong.

The lists of a case are drawn from a seed, out of range and repeated ones too.
"""

import dataclasses
import functools
import importlib

from absl.testing import absltest
from absl.testing import parameterized
import hypothesis
from hypothesis import strategies
import jax
from jax import lax
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import NamedSharding
import numpy as np
import pytest

from pallas_kernels import aot
from pallas_kernels import grouped_matmul
from pallas_kernels.grouped_matmul import edges as edges_lib
from pallas_kernels.grouped_matmul import reference
from pallas_kernels.grouped_matmul import tpu
from tests.kernels import problem
from tests.kernels import test_aot
from tests.kernels import test_sharded_attention
from tests.oracles import matmul as oracle

P = jax.P
BACKENDS = ("reference", "xla", "tpu")
ROWS, K, N, GROUPS, EDGES, OUT = 7, 5, 6, 3, 12, 8
SIZES = (4, 0, 5)  # three edges are of no group
megablox = importlib.import_module(
  "jax.experimental.pallas.ops.tpu.megablox.gmm"
)


@dataclasses.dataclass(frozen=True)
class Case:
  """What a call has; `sizes` are those of all groups."""

  sizes: tuple = SIZES
  rows: int = EDGES
  k: int = K
  n: int = N
  groups: int = GROUPS
  gate: bool = False
  silu: bool = False
  gather: bool = False
  scatter: bool = False
  scale: bool = False
  transpose_rhs: bool = False
  offset: int | None = None
  tail: float = 0.0  # what lies in rows of no group


CASES = {
  "plain": Case(),
  "transposed": Case(transpose_rhs=True),
  "one row": Case(sizes=(0, 1, 0), rows=1),
  "one of each": Case(sizes=(1,), rows=1, k=1, n=1, groups=1),
  "all rows in one": Case(sizes=(0, EDGES, 0)),
  "no rows in any": Case(sizes=(0, 0, 0)),
  "NaN behind the groups": Case(tail=np.nan, scale=True),
  "infinite behind the groups, activated": Case(tail=np.inf, silu=True),
  "negative and too many": Case(sizes=(-3, 5, 2**31 - 1), scale=True),
  "activated": Case(silu=True, transpose_rhs=True),
  "gated": Case(gate=True),
  "gated and activated": Case(gate=True, silu=True, scale=True),
  "gathered": Case(rows=ROWS, gather=True),
  "scattered": Case(scatter=True, scale=True),
  "both": Case(rows=ROWS, gather=True, scatter=True, scale=True),
  "everything": Case(
    rows=ROWS,
    gate=True,
    silu=True,
    gather=True,
    scatter=True,
    scale=True,
    transpose_rhs=True,
  ),
  "some of the groups": Case(sizes=(1, 3, 2, 0, 2, 1), offset=2, scale=True),
  "groups before the first": Case(sizes=(4, 3, 2), offset=-2),
  "groups behind the last": Case(sizes=(4, 3, 2), offset=2, gate=True),
}


def logistic(x):
  return 1 / (1 + np.exp(-x))


@functools.cache
def drawn(case):
  """Arrays with gradients, integers, and options, by the argument's name."""
  rng = np.random.default_rng(0)
  normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)
  of_rhs = (case.n, case.k) if case.transpose_rhs else (case.k, case.n)
  arrays = dict(lhs=normal(case.rows, case.k), rhs=normal(case.groups, *of_rhs))
  edges = EDGES if case.gather else case.rows
  if not case.gather:
    ends = np.clip(np.cumsum(np.clip(case.sizes, 0, edges)), 0, edges)
    arrays["lhs"][ends[-1] :] += case.tail
  integers = dict(group_sizes=np.array(case.sizes, np.int32))
  static = dict(transpose_rhs=case.transpose_rhs)
  if case.gate:
    arrays["rhs_gate"] = normal(case.groups, *of_rhs)
  if case.scale:
    arrays["row_scale"] = normal(edges)
  if case.gather:
    integers["gather"] = rng.integers(-1, case.rows + 1, EDGES, np.int32)
  if case.scatter:
    integers["scatter"] = rng.integers(-1, OUT + 1, edges, np.int32)
    static["num_rows"] = OUT
  if case.offset is not None:
    integers["group_offset"] = np.int32(case.offset)
  dout = normal(OUT if case.scatter else edges, case.n)
  return arrays, integers, static, dout


@functools.cache
def compiled(backend, silu, interpret=False, **static):
  """f(arrays, integers, dout) -> the result and gradients by name."""
  call = functools.partial(
    grouped_matmul,
    activation=jax.nn.silu if silu else None,
    backend=backend,
    interpret=interpret or backend == "tpu",
    **static,
  )

  def f(arrays, integers, dout):
    out, pull = jax.vjp(lambda arrays: call(**arrays, **integers), arrays)
    alone = call(**arrays, **integers)  # whose body may be another
    return dict(out=out, alone=alone, **pull(dout.astype(out.dtype))[0])

  return problem.jit(f)


@functools.cache
def expected(case):
  arrays, integers, static, dout = drawn(case)
  inputs = arrays | integers | static
  if case.silu:
    inputs["activation"] = lambda x: x * logistic(x)
  out = oracle.grouped_matmul(**inputs)
  if case.silu:
    inputs["activation_slope"] = lambda x: (
      logistic(x) * (1 + x * (1 - logistic(x)))
    )
  want = oracle.grouped_matmul_gradients(dout, **inputs)
  return dict(out=out, alone=out, **want)


def compare(case, backend, interpret=False):
  arrays, integers, static, dout = drawn(case)
  got = compiled(backend, case.silu, interpret, **static)(
    arrays, integers, dout
  )
  want = expected(case)
  for name, x in got.items():
    assert x.shape == want[name].shape and x.dtype == np.float32, name
    np.testing.assert_allclose(
      x, want[name], rtol=1e-5, atol=1e-5, err_msg=name
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_against_the_oracle(name, backend):
  case = CASES[name]
  if backend == "reference" and np.isinf(case.tail):
    pytest.skip("the definition is differentiated as it stands")
  compare(case, backend)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["both", "everything", "some of the groups"])
def test_kernels_race_nowhere_and_read_nothing_unwritten(name):
  interpret = pltpu.InterpretParams(
    detect_races=True, uninitialized_memory="nan"
  )
  compare(CASES[name], "tpu", interpret)


# Several tiles, in each direction and of each kind.
TILED = edges_lib.make(
  jnp.array([20, 0, 13, 32, 1], jnp.int32), 5, None, None, 75, None, None
)


@functools.cache
def tiles_problem():
  rng = np.random.default_rng(0)
  normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)
  x, w, y = normal(75, 384), normal(5, 384, 256), normal(75, 256)
  x[66:], y[66:] = np.nan, np.nan  # behind the groups
  return x, w, y


@pytest.mark.parametrize("k", [128, 384])
def test_many_tiles_on_tpu(k):
  x, w, _ = tiles_problem()
  options = dict(transpose_rhs=False, combine=lambda y: y, dtype=jnp.float32)
  want = reference.product(x, (w,), None, TILED, **options)
  (got,) = tpu.product(
    x,
    (w,),
    None,
    TILED,
    **options,
    interpret=True,
    tiling=tpu.Tiling(16, k, 128),
  )
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-3)
  assert not np.asarray(got[66:]).any()


def test_many_tiles_of_the_gradient_on_tpu():
  x, w, y = tiles_problem()
  got = tpu.outer(
    x,
    y,
    None,
    TILED,
    dtype=jnp.float32,
    interpret=True,
    tiling=tpu.Tiling(16, 128, 128),
  )
  want, at = np.zeros_like(w), 0
  for group, size in enumerate([20, 0, 13, 32, 1]):
    want[group] = x[at : at + size].T @ y[at : at + size]
    at += size
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-3)


@problem.jit
def all_of(sizes, gather, scatter):
  """Values and gradients of both backends, of one problem."""
  rng = np.random.default_rng(0)
  normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)
  primals = normal(ROWS, K), normal(GROUPS, K, N), normal(EDGES)

  def run(backend):
    def call(lhs, rhs, scale):
      return grouped_matmul(
        lhs,
        rhs,
        sizes,
        gather=gather,
        scatter=scatter,
        num_rows=OUT,
        row_scale=scale,
        backend=backend,
      )

    out, pull = jax.vjp(call, *primals)
    return out, pull(jnp.cos(out))

  return run("xla"), run("reference")


integers = strategies.integers(-(2**31), 2**31 - 1)
nearby = strategies.integers(-3, EDGES + 3)
lists = lambda length: strategies.lists(
  strategies.one_of(integers, nearby, nearby, nearby),
  min_size=length,
  max_size=length,
)


@hypothesis.given(lists(GROUPS), lists(EDGES), lists(EDGES))
def test_no_list_reads_or_writes_what_does_not_exist(sizes, gather, scatter):
  as_array = lambda x: np.array(x, np.int32)
  got, want = all_of(*map(as_array, (sizes, gather, scatter)))
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-4),
    got,
    want,
  )


class LimitsTest(parameterized.TestCase):
  @parameterized.parameters(
    ((0, K), (GROUPS, K, N), (0, N)),
    ((ROWS, K), (0, K, N), (ROWS, N)),
    ((ROWS, K), (GROUPS, K, 0), (ROWS, 0)),
    ((ROWS, 0), (GROUPS, 0, N), (ROWS, N)),
  )
  def test_nothing_there(self, of_lhs, of_rhs, of_out):
    sizes = jnp.ones(of_rhs[0], jnp.int32)
    call = lambda *args: grouped_matmul(*args, sizes)
    out, pull = jax.vjp(call, jnp.ones(of_lhs), jnp.ones(of_rhs))
    self.assertEqual(out.shape, of_out)
    self.assertFalse(out.any())
    self.assertEqual([x.shape for x in pull(out)], [of_lhs, of_rhs])

  def test_no_rows_to_scatter_to(self):
    there = jnp.zeros(4, jnp.int32)
    call = lambda x: grouped_matmul(X, x, S, scatter=there, num_rows=0).sum()
    self.assertFalse(jax.grad(call)(W).any())

  @parameterized.product(
    backend=("xla", "tpu"), scatter=(False, True), silu=(False, True)
  )
  def test_scales_and_cotangents_of_no_group_may_be_anything(
    self, backend, scatter, silu
  ):
    x, w, sizes = jnp.ones((4, 3)), jnp.ones((1, 3, 2)), jnp.array([2])
    nan = jnp.array([1.0, 1.0, jnp.nan, jnp.inf])
    more = dict(scatter=jnp.arange(4) % 2, num_rows=2) if scatter else {}
    if silu:
      more |= dict(rhs_gate=w, activation=jax.nn.silu)
    call = problem.jit(
      lambda x, w, scale: grouped_matmul(
        x,
        w,
        sizes,
        row_scale=scale,
        backend=backend,
        interpret=backend == "tpu",
        **more,
      )
    )
    dout = jnp.ones((2, 2)) if scatter else jnp.ones((4, 2)) * nan[:, None]
    out, pull = jax.vjp(call, x, w, nan)
    self.assertTrue(jnp.isfinite(out).all())
    dx, dw, dscale = pull(dout)
    self.assertTrue(jnp.isfinite(dx).all() and jnp.isfinite(dw).all())
    self.assertFalse(dscale[2:].any() or dx[2:].any())

  def test_integers_of_any_width(self):
    x, far = jnp.ones((3, 1)), np.array([2**32 - 1, 0, 1], np.uint32)
    w = jnp.ones((1, 1, 1))
    np.testing.assert_array_equal(
      grouped_matmul(x, w, np.array([3], np.int8), gather=far).ravel(),
      [0, 1, 1],
    )
    np.testing.assert_array_equal(grouped_matmul(x, w, far[:1]).ravel(), 1)

  def test_one_group_is_a_dense_product(self):
    x, w = jnp.ones((9, 4)) * jnp.arange(9.0)[:, None], jnp.ones((1, 4, 3))
    np.testing.assert_array_equal(
      grouped_matmul(x, w, jnp.array([9])), x @ w[0]
    )

  @parameterized.parameters("xla", "tpu")
  def test_bfloat16_accumulates_in_float32(self, backend):
    ones = jnp.ones((2, 512), jnp.bfloat16)
    w = jnp.full((1, 512, 4), 1 + 2**-7, jnp.bfloat16)
    call = functools.partial(
      grouped_matmul, backend=backend, interpret=backend == "tpu"
    )
    sizes = jnp.array([2])
    exact = 512 * (1 + 2**-7)
    out = call(ones, w, sizes, preferred_element_type=jnp.float32)
    self.assertEqual(out.dtype, jnp.float32)
    np.testing.assert_array_equal(out, exact)
    out, pull = jax.vjp(lambda *args: call(*args, sizes), ones, w)
    self.assertEqual(out.dtype, jnp.bfloat16)
    self.assertEqual([x.dtype for x in pull(out)], [jnp.bfloat16] * 2)
    # Row after row into one target: 300 ones would stop at 256 in bf16.
    many = jnp.ones((300, 1), jnp.bfloat16)
    total = call(
      many,
      jnp.ones((1, 1, 1), jnp.bfloat16),
      jnp.array([300]),
      scatter=jnp.zeros(300, jnp.int32),
      num_rows=1,
    )
    self.assertEqual(total.item(), 300)

  def test_shards_of_the_experts_add_up(self):
    arrays, integers, _, _ = drawn(CASES["plain"])
    lhs, rhs, sizes = arrays["lhs"], arrays["rhs"], integers["group_sizes"]
    parts = [
      grouped_matmul(lhs, rhs[i : i + 1], sizes, group_offset=i)
      for i in range(GROUPS)
    ]
    np.testing.assert_allclose(
      sum(parts), grouped_matmul(lhs, rhs, sizes), rtol=1e-6
    )

  def test_second_order(self):
    arrays, integers, static, _ = drawn(CASES["everything"])

    def steepness(backend):
      call = functools.partial(
        grouped_matmul, activation=jax.nn.silu, backend=backend
      )
      loss = lambda arrays: (call(**arrays, **integers, **static) ** 2).sum()
      square = lambda x: sum((a**2).sum() for a in jax.tree.leaves(x))
      return problem.jit(jax.grad(lambda x: square(jax.grad(loss)(x))))(arrays)

    got, want = steepness("xla"), steepness("reference")
    for name, x in got.items():
      size = np.abs(want[name]).max()
      np.testing.assert_allclose(x, want[name], rtol=1e-4, atol=1e-5 * size)

  def test_second_order_of_each_product(self):
    arrays, integers, static, _ = drawn(CASES["both"])

    def steepness(backend):
      call = functools.partial(grouped_matmul, backend=backend)
      loss = lambda arrays: (call(**arrays, **integers, **static) ** 3).sum()
      square = lambda x: sum((a**2).sum() for a in jax.tree.leaves(x))
      return problem.jit(jax.grad(lambda x: square(jax.grad(loss)(x))))(arrays)

    got, want = steepness("xla"), steepness("reference")
    for name, x in got.items():
      size = np.abs(want[name]).max()
      np.testing.assert_allclose(x, want[name], rtol=1e-4, atol=1e-5 * size)

  def test_vmap(self):
    arrays, integers, static, _ = drawn(CASES["both"])
    sizes = jnp.array([[4, 0, 5], [0, 0, 0], [1, 9, 2]], jnp.int32)
    lhs = jnp.stack([arrays["lhs"], 2 * arrays["lhs"], -arrays["lhs"]])

    def loss(lhs, rhs, sizes):
      out = grouped_matmul(
        lhs,
        rhs,
        sizes,
        gather=integers["gather"],
        scatter=integers["scatter"],
        **static,
      )
      return (out**2).sum()

    each = problem.jit(jax.value_and_grad(loss, (0, 1)))
    got = problem.jit(jax.vmap(jax.value_and_grad(loss, (0, 1)), (0, None, 0)))(
      lhs, arrays["rhs"], sizes
    )
    for i in range(3):
      jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5),
        jax.tree.map(lambda x, i=i: x[i], got),
        each(lhs[i], arrays["rhs"], sizes[i]),
      )

  def test_other_sizes_compile_nothing(self):
    arrays, integers, _, _ = drawn(CASES["plain"])
    call = jax.jit(lambda sizes: grouped_matmul(**arrays, group_sizes=sizes))
    call(integers["group_sizes"])
    call(integers["group_sizes"][::-1].copy())
    self.assertEqual(call._cache_size(), 1)


class MemoryTest(absltest.TestCase):
  def test_no_row_is_copied_before_it_is_multiplied(self):
    tokens, edges, d, f, experts = 64, 192, 24, 40, 4
    rng = np.random.default_rng(0)
    token = rng.integers(0, tokens, edges, np.int32)
    sizes = np.full(experts, edges // experts, np.int32)
    w = lambda *shape: np.ones((experts, *shape), np.float32)
    scale = np.ones(edges, np.float32)

    def layer(x, gate, up, down, scale):
      h = grouped_matmul(
        x, up, sizes, rhs_gate=gate, activation=jax.nn.silu, gather=token
      )
      return grouped_matmul(
        h, down, sizes, scatter=token, num_rows=tokens, row_scale=scale
      )

    loss = lambda *args: (layer(*args) ** 2).sum()
    args = np.ones((tokens, d), np.float32), w(d, f), w(d, f), w(f, d), scale
    for call in layer, jax.grad(loss, (0, 1, 2, 3, 4)):
      text = problem.jit(call).lower(*args).compile().as_text()
      self.assertIn(f"f32[{tokens},{d}]", text)
      self.assertNotIn(f"[{edges},{d}]", text)


class PeersTest(absltest.TestCase):
  """What peers on this machine do with the same calls."""

  def setUp(self):
    super().setUp()
    rng = np.random.default_rng(0)
    self.x = jnp.asarray(rng.standard_normal((256, 128)), jnp.float32)
    self.w = jnp.asarray(rng.standard_normal((2, 128, 128)), jnp.float32)
    self.sizes = jnp.array([100, 50], jnp.int32)

  def gmm(self, x, w, sizes):
    return megablox.gmm(x, w, sizes, interpret=True)

  def test_rows_of_no_group_are_zeros(self):
    theirs = self.gmm(self.x, self.w, self.sizes)
    self.assertFalse(np.isfinite(theirs[150:]).all())
    ours = grouped_matmul(
      self.x, self.w, self.sizes, backend="tpu", interpret=True
    )
    np.testing.assert_array_equal(ours[150:], 0)
    np.testing.assert_allclose(ours[:150], theirs[:150], rtol=1e-5, atol=1e-4)

  def test_what_lies_behind_the_groups_reaches_no_gradient(self):
    x = self.x.at[150:].set(jnp.nan)
    grad = lambda call: jax.grad(lambda w: call(x, w)[:150].sum())(self.w)
    # One that multiplies all rows, and masks what comes of it.
    masked = lambda x, w: jnp.where(
      (jnp.arange(256) < 150)[:, None], x @ w.sum(0), 0
    )
    self.assertTrue(np.isnan(grad(masked)).any())
    for backend in "xla", "tpu":
      call = functools.partial(
        grouped_matmul, backend=backend, interpret=backend == "tpu"
      )
      ours = grad(lambda x, w, call=call: call(x, w, self.sizes))
      self.assertTrue(np.isfinite(ours).all())

  def test_rows_that_no_tile_divides(self):
    sizes = jnp.array([100, 25], jnp.int32)
    with self.assertRaisesRegex(ValueError, "divisible"):
      self.gmm(self.x[:125], self.w, sizes)
    ours = grouped_matmul(
      self.x[:125], self.w, sizes, backend="tpu", interpret=True
    )
    want = lax.ragged_dot(self.x[:125], self.w, sizes)
    np.testing.assert_allclose(ours, want, rtol=1e-5, atol=1e-4)

  def test_second_derivatives(self):
    def steepness(call):
      loss = lambda w: (call(self.x, w, self.sizes) ** 2).sum()
      return jax.grad(lambda w: (jax.grad(loss)(w) ** 2).sum())(self.w)

    with self.assertRaises(NotImplementedError):
      steepness(lax.ragged_dot)
    self.assertTrue(np.isfinite(steepness(grouped_matmul)).all())

  def test_some_of_the_groups(self):
    call = lambda dot: jax.jit(
      lambda offset: dot(self.x, self.w[:1], self.sizes, group_offset=offset[0])
    )(jnp.array([1]))
    with self.assertRaisesRegex(TypeError, "not hashable"):
      call(lax.ragged_dot)
    ours = call(grouped_matmul)
    want = self.x[100:150] @ self.w[0]
    np.testing.assert_allclose(ours[100:150], want, rtol=1e-5, atol=1e-4)
    self.assertFalse(ours[:100].any() or ours[150:].any())

  def test_one_weight_for_a_vmapped_batch(self):
    both = jnp.stack([self.x, -self.x])
    call = lambda dot: jax.vmap(dot, (0, None, 0))(
      both, self.w, jnp.stack([self.sizes, self.sizes])
    )
    with self.assertRaises(NotImplementedError):
      call(lax.ragged_dot)
    self.assertEqual(call(grouped_matmul).shape, (2, 256, 128))


@functools.partial(jax.jit, static_argnums=0)
def everything(call, lhs, rhs, scale):
  """The result and all gradients."""

  def loss(lhs, rhs, scale):
    out = call(lhs, rhs, scale)
    return (out**2).mean(), out

  grads, out = jax.grad(loss, (0, 1, 2), has_aux=True)(lhs, rhs, scale)
  return out, grads


class ShardedTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    self.args = normal(32, 8), normal(4, 8, 16), normal(32)
    self.sizes = np.array([5, 0, 20, 4], np.int32)

  def plain(self, lhs, rhs, scale, **more):
    return grouped_matmul(lhs, rhs, self.sizes, row_scale=scale, **more)

  def gated(self, lhs, rhs, scale):
    return self.plain(lhs, rhs, scale, rhs_gate=rhs / 2, activation=jax.nn.silu)

  def gathered(self, lhs, rhs, scale):
    there = np.arange(32, dtype=np.int32)
    return self.plain(
      lhs, rhs, scale, gather=there[::-1], scatter=there // 2, num_rows=16
    )

  # Rows; weights by output; by expert; and where both want the same axis.
  @parameterized.product(
    axes=(AxisType.Auto, AxisType.Explicit), call=("gated", "gathered")
  )
  def test_shards_of_rows_experts_and_outputs(self, axes, call):
    self.check(axes, call, P("x"), P("y", None, "z"), P("x"))

  @parameterized.product(
    axes=(AxisType.Auto, AxisType.Explicit),
    call=("plain", "gated", "gathered"),
    specs=(
      (P("x"), P("y", None, "z"), P("x")),
      (P(None, "y"), P(None, "y", "z"), P()),
      (P("x"), P("x"), P("x")),
    ),
  )
  @pytest.mark.slow
  def test_shards(self, axes, call, specs):
    self.check(axes, call, *specs)

  def check(self, axes, call, *specs):
    call = getattr(self, call)
    want = everything(call, *self.args)
    mesh = jax.make_mesh((2, 2, 2), ("x", "y", "z"), axis_types=(axes,) * 3)
    place = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))
    args = list(map(place, self.args, specs))
    with jax.set_mesh(mesh):
      out, grads = everything(call, *args)
    jax.tree.map(
      functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5),
      (out, grads),
      want,
    )
    for x, like in zip(grads, args, strict=True):
      self.assertTrue(x.sharding.is_equivalent_to(like.sharding, x.ndim))

  @parameterized.parameters(AxisType.Auto, AxisType.Explicit)
  def test_nothing_is_gathered(self, axes):
    mesh = jax.make_mesh((2, 2, 2), ("x", "y", "z"), axis_types=(axes,) * 3)
    place = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))
    args = map(place, self.args, (P("x"), P("y", None, "z"), P("x")))
    with jax.set_mesh(mesh):
      text = everything.lower(self.gated, *args).compile().as_text()
    # But for a bound of the groups, that all devices want.
    self.assertLessEqual(test_sharded_attention.moved(text), 4)

  def test_sizes_that_are_sharded(self):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Explicit,))
    sizes = np.arange(8, dtype=np.int32)
    w = np.ones((8, 8, 4), np.float32)
    place = lambda x: jax.device_put(x, NamedSharding(mesh, P("x")))
    with jax.set_mesh(mesh):
      got = jax.jit(grouped_matmul)(self.args[0], place(w), place(sizes))
    want = grouped_matmul(self.args[0], w, sizes)
    np.testing.assert_allclose(got, want, rtol=1e-5)

  def test_some_axes_are_manual(self):
    mesh = jax.make_mesh(
      (2, 4), ("data", "expert"), axis_types=(AxisType.Auto,) * 2
    )

    def local(lhs, rhs):
      offset = lax.axis_index("expert") * rhs.shape[0]
      out = grouped_matmul(lhs, rhs, self.sizes, group_offset=offset)
      return lax.psum(out, "expert")

    got = jax.jit(
      jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(P(), P("expert")),
        out_specs=P(),
        axis_names={"expert"},
      )
    )(*self.args[:2])
    want = grouped_matmul(*self.args[:2], self.sizes)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)

  @parameterized.parameters("plain", "gated")
  def test_experts_over_a_mesh_axis(self, call):
    mesh = jax.make_mesh(
      (2, 4), ("data", "expert"), axis_types=(AxisType.Auto,) * 2
    )

    def local(lhs, rhs, scale):
      offset = lax.axis_index("expert") * rhs.shape[0]
      more = {}
      if call == "gated":
        more = dict(rhs_gate=rhs / 2, activation=jax.nn.silu)
      out = self.plain(lhs, rhs, scale, group_offset=offset, **more)
      return lax.psum(out, "expert")

    sharded = jax.shard_map(
      local,
      mesh=mesh,
      in_specs=(P(), P("expert"), P()),
      out_specs=P(),
      check_vma=True,
    )
    got = everything(sharded, *self.args)
    want = everything(getattr(self, call), *self.args)
    jax.tree.map(
      functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5),
      got,
      want,
    )


X, W, S = jnp.ones((4, 3)), jnp.ones((2, 3, 5)), jnp.array([2, 2])


@pytest.mark.parametrize(
  "argument, given",
  [
    ("lhs", dict(lhs=jnp.ones((1, 4, 3)))),
    ("lhs", dict(lhs=jnp.ones((4, 3), jnp.int32))),
    ("rhs", dict(rhs=jnp.ones((3, 5)))),
    ("rhs", dict(rhs=W.astype(jnp.bfloat16))),
    ("rhs", dict(transpose_rhs=True)),
    ("rhs_gate", dict(rhs_gate=W[:1])),
    ("activation", dict(activation="silu")),
    ("activation", dict(activation=lambda x: x * X)),
    ("activation", dict(activation=lambda x: x * X[:2])),
    ("activation", dict(activation=lambda x: x.sum())),
    ("preferred_element_type", dict(preferred_element_type="foo")),
    ("group_sizes", dict(group_sizes=jnp.ones(2))),
    ("group_sizes", dict(group_sizes=jnp.array([4]))),
    ("group_offset", dict(group_offset=jnp.array([1]))),
    ("gather", dict(gather=jnp.ones(4))),
    ("scatter", dict(scatter=jnp.array([0, 1]), num_rows=2)),
    ("num_rows", dict(scatter=jnp.array([0, 1, 0, 1]))),
    ("num_rows", dict(num_rows=2)),
    ("num_rows", dict(scatter=jnp.array([0, 1, 0, 1]), num_rows=-1)),
    ("row_scale", dict(row_scale=jnp.ones(3))),
    ("row_scale", dict(row_scale=S)),
    ("preferred_element_type", dict(preferred_element_type=jnp.int32)),
    ("backend", dict(backend="gpu")),
    ("interpret", dict(interpret=True)),
  ],
)
def test_errors_name_the_argument(argument, given):
  call = dict(lhs=X, rhs=W, group_sizes=S) | given
  with pytest.raises(ValueError, match=argument):
    grouped_matmul(**call)


def test_a_backend_named_runs_or_raises():
  with pytest.raises(ValueError, match="backend 'tpu' has no"):
    grouped_matmul(
      X.astype(jnp.float16),
      W.astype(jnp.float16),
      S,
      backend="tpu",
      interpret=True,
    )


# Plain sizes on every TPU, odd ones, and such as have to be cut to fit in.
@test_aot.needs_tpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(
  "target, m, k, n",
  [
    ("v5e:2x2", 1000, 512, 384),
    ("v5p:2x2x1", 1000, 512, 384),
    ("v6e:2x2", 72, 100, 200),
    ("v5e:2x2", 4096, 2048, 2048),
  ],
)
def test_compiles_for_tpu(target, dtype, m, k, n):
  spec = lambda *shape: jax.ShapeDtypeStruct(shape, dtype)
  ints = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)

  def layer(x, gate, up, down, scale, token, sizes):
    h = grouped_matmul(
      x, up, sizes, rhs_gate=gate, activation=jax.nn.gelu, gather=token
    )
    y = grouped_matmul(
      h, down, sizes, scatter=token, num_rows=m // 2, row_scale=scale
    )
    return (y.astype(jnp.float32) ** 2).sum()

  args = (spec(m // 2, k), spec(4, k, n), spec(4, k, n), spec(4, n, k), spec(m))
  grads = jax.grad(layer, (0, 1, 2, 3, 4))
  compiled_for = aot.compile_for(grads, *args, ints(m), ints(4), target=target)
  assert len(compiled_for.kernels) >= 6


@test_aot.needs_tpu
@pytest.mark.parametrize("kernel", ["forward", "dlhs", "drhs"])
def test_a_step_takes_no_more_bundles_than_megablox(kernel):
  schedules = importlib.import_module("experiments.bench.grouped")
  for tiling in schedules.TILINGS:
    ours, theirs = schedules.steps(kernel, *tiling)
    assert ours <= theirs, tiling


if __name__ == "__main__":
  absltest.main()
