"""InfLLM-V2: choices, outputs and gradients against the oracle."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax import attention
from tests.attention import selectors
from tests.attention.selectors import B
from tests.attention.selectors import BLOCKS
from tests.attention.selectors import H
from tests.attention.selectors import OFFSET
from tests.attention.selectors import S
from tests.attention.selectors import T
from tests.kernels import problem
from tests.oracles import selection_trainable as oracle

SIZES = dict(length=8, stride=4, block=16)
STATIC = (*SIZES, "top_k", "initial", "local", "block_q", "capacity")
select = problem.jit(attention.infllm_select, static_argnames=STATIC)
attend = problem.jit(
  attention.infllm, static_argnames=(*STATIC, "dense_length")
)
PLACES = jnp.arange(S) + OFFSET


def choice(q, k, **given):
  chosen = [
    oracle.infllm_blocks(*x, **SIZES, **given) for x in zip(q, k, strict=True)
  ]
  return selectors.table(chosen)


def test_scores_of_blocks():
  q, k, _ = selectors.inputs(0)
  p = oracle.window_probabilities(
    q[0], oracle.nsa_compress(k[0], length=8, stride=4), length=8, stride=4
  )
  p = p.reshape(2, 2, *p.shape[1:]).sum(1)
  got = attention.largest_window(jnp.array(p, jnp.float32), BLOCKS, **SIZES)
  want = oracle.infllm_scores(q[0], k[0], **SIZES)
  np.testing.assert_allclose(got, want, rtol=1e-6)


@pytest.mark.parametrize(
  "given", [dict(top_k=3, local=2), dict(top_k=1, initial=0, local=1)]
)
@pytest.mark.parametrize("offset", [OFFSET, 0])
def test_choice(given, offset):
  q, k, _ = selectors.inputs(1)
  got = select(q, k, q_positions=jnp.arange(S) + offset, **SIZES, **given)
  # A window is in two blocks where it lies across their border: that ties
  # them exactly, and the lower block wins.
  want = choice(q, k, offset=offset, **given)
  np.testing.assert_array_equal(selectors.rows(got), np.repeat(want, 2, 1))


dense = selectors.gradients(selectors.dense)


@pytest.mark.parametrize("top_k,dense_length", [(2, 0), (BLOCKS, 0), (2, T)])
def test_outputs_and_gradients(top_k, dense_length):
  x = selectors.inputs(2)
  given = dict(top_k=top_k, local=1, dense_length=dense_length, **SIZES)
  mine = functools.partial(attention.infllm, q_positions=PLACES, **given)
  got = problem.jit(mine)(*x)
  for out, *one in zip(got, *x, strict=True):
    want, _ = oracle.infllm(*one, offset=OFFSET, **given)
    np.testing.assert_allclose(out, want, rtol=1e-5, atol=1e-5)
  read = np.broadcast_to(selectors.causal(OFFSET), (B, H, S, T))
  if top_k < BLOCKS and not dense_length:
    chosen = choice(*x[:2], top_k=top_k, local=1, offset=OFFSET)
    read = selectors.tokens(chosen, OFFSET)
  selectors.assert_close(selectors.gradients(mine)(x), dense(x, read))


def test_transformations():
  given = dict(top_k=2, local=1, dense_length=0, **SIZES)
  f = functools.partial(attention.infllm, **given)
  single = lambda x: f(*(a[None] for a in x))[0]

  @problem.jit
  def one_by_one(*x):
    step = lambda carry, x: (carry, jax.checkpoint(single)(x))
    return jax.vmap(single)(x), jax.lax.scan(step, 0, x)[1]

  first = attend._cache_size()
  for seed in (1, 2):
    x = selectors.inputs(seed)
    want = attend(*x, **given)
    selectors.assert_close(one_by_one(*x), (want, want), 1e-6)
  assert attend._cache_size() == first + 1
  x = selectors.inputs(3, jnp.bfloat16)
  got = attend(*x, **given)
  assert got.dtype == jnp.bfloat16
  want = attend(*(a.astype(jnp.float32) for a in x), **given)
  np.testing.assert_allclose(got.astype(np.float32), want, atol=0.03)


@pytest.mark.parametrize(
  "change,message",
  [
    (dict(dense_length=-1), "dense_length is -1"),
    (dict(dense_length=0, block=24), "block is 24|block 24"),
    (dict(dense_length=0, stride=3), "stride 3"),
    (dict(dense_length=0, local=-1), "local is -1"),
    (dict(dense_length=0, top_k=2.0), "top_k is 2.0"),
    (dict(q_positions=jnp.arange(3)), "q_positions is"),
    (dict(softcap=-1.0), "softcap"),
  ],
)
def test_bad_input(change, message):
  q, k, v = selectors.inputs(0)
  with pytest.raises(ValueError, match=message):
    attention.infllm(q, k, v, **change)
