"""Native sparse attention: every branch and choice against the oracle."""

import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax import attention
from sparsejax.attention import scores
from tests.attention import selectors
from tests.attention.selectors import B
from tests.attention.selectors import BLOCKS
from tests.attention.selectors import D
from tests.attention.selectors import H
from tests.attention.selectors import HKV
from tests.attention.selectors import OFFSET
from tests.attention.selectors import S
from tests.attention.selectors import T
from tests.kernels import problem
from tests.oracles import selection_trainable as oracle

WINDOWS = dict(length=8, stride=4)
SIZES = dict(**WINDOWS, block=16)
STATIC = ("top_n", "initial", "local", "block_q", "length", "stride", "block")
STATIC += ("capacity",)
select = problem.jit(attention.nsa_select, static_argnames=STATIC)
attend = problem.jit(attention.nsa, static_argnames=(*STATIC, "window"))
PLACES = jnp.arange(S) + OFFSET


def gates(seed):
  x = np.random.default_rng(seed).random((B, S, H, 3))
  return jnp.array(x, jnp.float32)


def compress(x):
  return np.stack([oracle.nsa_compress(y, **WINDOWS) for y in x])


def choice(q, k_cmp, **given):
  """The oracle's lists, [B][Hkv][S]."""
  return [
    oracle.nsa_blocks(*x, T, **SIZES, **given)
    for x in zip(q, k_cmp, strict=True)
  ]


@pytest.mark.parametrize("make", [selectors.inputs, selectors.grid])
@pytest.mark.parametrize(
  "given", [dict(top_n=3), dict(top_n=1, initial=0, local=1), dict(top_n=0)]
)
@pytest.mark.parametrize("offset", [OFFSET, 0])
def test_choice(make, given, offset):
  q, k, _ = make(8)
  k_cmp = compress(k)
  got = select(q, k, q_positions=jnp.arange(S) + offset, **SIZES, **given)
  got = selectors.rows(got)
  want = selectors.table(choice(q, k_cmp, offset=offset, **given))
  # Equal scores are not equal in f32: of these the oracle's score decides.
  for b, h, s in np.argwhere((got != np.repeat(want, 2, 1)).any(-1)):
    row = oracle.nsa_scores(
      q[b, s : s + 1], k_cmp[b], T, offset=s + offset, **SIZES
    )[h // 2, 0]
    mine, theirs = row[got[b, h, s]], row[want[b, h // 2, s]]
    np.testing.assert_allclose(np.sort(mine), np.sort(theirs), atol=1e-6)
    assert make is selectors.grid, "of normal numbers none are equal"


def test_importance():
  p = np.random.default_rng(0).random((3, 16)).astype(np.float32)
  for length, stride, block in ((8, 4, 16), (32, 16, 64), (4, 4, 4), (6, 2, 6)):
    given = dict(length=length, stride=stride, block=block)
    got = attention.window_importance(jnp.array(p), 5, **given)
    want = [oracle.nsa_importance(row, 5, **given) for row in p]
    np.testing.assert_allclose(got, want, rtol=1e-6)


def formula(q, k, v, g, compressed, sliding, chosen):
  """All branches in dense arrays; the choice is bool [B, H, S, T]."""
  ends = jnp.arange(compressed[0].shape[1]) * 4 + 7
  seen = jnp.broadcast_to(ends <= PLACES[:, None], (B, H, S, len(ends)))
  near = selectors.causal(OFFSET) & ~selectors.causal(OFFSET - 20)
  first = selectors.dense(q, *compressed, seen)
  second = selectors.dense(q, k, v, chosen)
  third = selectors.dense(q, *sliding, np.broadcast_to(near, (B, H, S, T)))
  branches = jnp.stack([first, second, third], -1)
  return (branches * g[..., None, :]).sum(-1)


def mine(q, k, v, g, compressed, sliding):
  given = dict(compressed=compressed, sliding=sliding, q_positions=PLACES)
  return attention.nsa(
    q, k, v, g, window=20, top_n=2, local=1, **SIZES, **given
  )


branches = problem.jit(mine)


def test_outputs_and_gradients():
  q, k, v = selectors.inputs(0)
  count = scores.window_count(T, **WINDOWS)
  compressed = [x[:, :count] for x in selectors.inputs(1)[1:]]
  sliding = selectors.inputs(2)[1:]
  args = (q, k, v, gates(3), compressed, sliding)
  chosen = choice(q, compressed[0], top_n=2, local=1, offset=OFFSET)
  got = branches(*args)
  for i in range(B):
    at = jax.tree.map(lambda x, i=i: x[i], args)
    want, _ = oracle.nsa(
      at[0],
      at[4],
      at[1:3],
      at[5],
      at[3],
      chosen=chosen[i],
      window=20,
      offset=OFFSET,
      **SIZES,
    )
    np.testing.assert_allclose(got[i], want, rtol=1e-5, atol=1e-5)
  read = selectors.tokens(selectors.table(chosen), OFFSET)
  got = selectors.gradients(mine)(args)
  selectors.assert_close(got, selectors.gradients(formula)(args, read))


def test_means_and_keys_of_one_kind_are_the_default():
  q, k, v = selectors.inputs(4)
  g = gates(5)
  compressed = [jnp.array(compress(x), jnp.float32) for x in (k, v)]
  want = branches(q, k, v, g, compressed, (k, v))
  got = attend(
    q, k, v, g, q_positions=PLACES, window=20, top_n=2, local=1, **SIZES
  )
  selectors.assert_close(got, want)


def test_full_budget_is_dense():
  q, k, v = selectors.inputs(6)
  read = np.broadcast_to(selectors.causal(0), (B, H, S, T))
  weights = jnp.array([0.0, 0.25, 0.75])
  g = jnp.broadcast_to(weights, (B, S, H, 3))
  f = functools.partial(attention.nsa, gates=g, top_n=BLOCKS, window=T, **SIZES)
  got = selectors.gradients(f)((q, k, v))
  selectors.assert_close(
    got, selectors.gradients(selectors.dense)((q, k, v), read)
  )


def test_positions_may_be_any():
  q, k, v = selectors.inputs(7)
  g, order = gates(8), np.random.default_rng(9).permutation(S)
  given = dict(window=20, top_n=2, local=1, **SIZES)
  want = attend(q, k, v, g, q_positions=PLACES, **given)
  got = attend(
    q[:, order], k, v, g[:, order], q_positions=PLACES[order], **given
  )
  selectors.assert_close(got, want[:, order])


def test_transformations(monkeypatch):
  f = functools.partial(attention.nsa, window=20, top_n=2, **SIZES)
  single = lambda x: f(*(a[None] for a in x))[0]

  @problem.jit
  def one_by_one(*x):
    step = lambda carry, x: (carry, jax.checkpoint(single)(x))
    return jax.vmap(single)(x), jax.lax.scan(step, 0, x)[1]

  first = attend._cache_size()
  for seed in (1, 2):
    x = (*selectors.inputs(seed), gates(seed))
    want = attend(*x, window=20, top_n=2, **SIZES)
    with monkeypatch.context() as patch:
      patch.setattr(scores, "CHUNK", 1)  # 16 queries at a time
      selectors.assert_close(one_by_one(*x), (want, want), 1e-6)
  assert attend._cache_size() == first + 1


def test_bf16():
  args = (*selectors.inputs(3, jnp.bfloat16), gates(4))
  given = dict(window=20, top_n=2, **SIZES)
  got = attend(*args, **given)
  assert got.dtype == jnp.bfloat16
  want = attend(*(x.astype(jnp.float32) for x in args), **given)
  np.testing.assert_allclose(got.astype(np.float32), want, atol=0.03)


def test_fewer_keys_than_a_window():
  q, k, v = (x[:, :5] for x in selectors.inputs(0))
  g = jnp.ones((B, 5, H, 3))
  got = attend(q, k, v, g, window=20, top_n=2, **SIZES)
  read = np.broadcast_to(np.tril(np.ones((5, 5), bool)), (B, H, 5, 5))
  # Nothing from the first branch, and the same from the other two.
  selectors.assert_close(got, 2 * selectors.dense(q, k, v, read))


def test_module():
  width = 6
  layer = attention.NSA(
    width, H, D, top_n=2, local=1, window=20, rngs=nnx.Rngs(0), **SIZES
  )
  graph, params = nnx.split(layer)
  q, k, v = selectors.inputs(12)
  x = jnp.cos(jnp.arange(B * S * width)).reshape(B, S, width)

  def attend(params, q, k, v):
    return nnx.merge(graph, params)(x, q, k, v, q_positions=PLACES)

  def plain(params, q, k, v, chosen):
    """The same by the dense formula; windows are cut in a loop."""
    compressed = []
    for name, rows in (("keys", k), ("values", v)):
      of = params[name]
      cut = [rows[:, i : i + 8] for i in range(0, T - 7, 4)]
      cut = jnp.stack(cut, 1) + of["place"][...][:, None]
      cut = jnp.moveaxis(cut, 3, 2).reshape(B, -1, HKV, 8 * D)
      for layer, f in (("inner", jax.nn.gelu), ("outer", lambda x: x)):
        kernel, bias = (of[layer][n][...] for n in ("kernel", "bias"))
        cut = f(cut @ kernel + bias)
      compressed.append(cut)
    kernel, bias = (params["gates"][n][...] for n in ("kernel", "bias"))
    g = jax.nn.sigmoid(x @ kernel + bias).reshape(B, S, H, 3)
    return formula(q, k, v, g, compressed, (k, v), chosen)

  chosen = choice(q, layer.keys(k), top_n=2, local=1, offset=OFFSET)
  read = selectors.tokens(selectors.table(chosen), OFFSET)
  got = selectors.gradients(attend)((params, q, k, v))
  want = selectors.gradients(plain)((params, q, k, v), read)
  selectors.assert_close(got, want)
  # Every parameter takes part.
  assert all(jnp.abs(x).max() > 0 for x in jax.tree.leaves(got[1][0]))


@pytest.mark.parametrize(
  "change,message",
  [
    (dict(block=24, stride=8), "block is 24"),
    (dict(stride=3), "stride 3"),
    (dict(length=32, stride=16), "length is 32"),
    (dict(length=0), "length is 0"),
    (dict(top_n=-1), "top_n is -1"),
    (dict(local=1.0), "local is 1.0"),
    (dict(window=0), "window is 0"),
    (dict(block_q=3), "block_q is 3"),
    (dict(gates=jnp.ones((B, S, H, 2))), "gates has shape"),
    (dict(q_positions=jnp.arange(3)), "q_positions is"),
    (dict(compressed=selectors.inputs(0)[1:]), "compressed keys have shape"),
  ],
)
def test_bad_input(change, message):
  q, k, v = selectors.inputs(0)
  given = {"gates": gates(0), **SIZES, **change}
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(lambda q: attention.nsa(q, k, v, **given), q)


def test_module_wants_one_or_three():
  layer = attention.NSA(4, H, D, rngs=nnx.Rngs(0), **SIZES)
  q, k, v = selectors.inputs(0)
  with pytest.raises(ValueError, match="one or three"):
    layer(jnp.ones((B, S, 4)), q, (k, k), v)
