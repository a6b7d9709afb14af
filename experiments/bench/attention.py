"""Block-sparse attention on CPU against dense attention, and its memory."""

from collections.abc import Iterator
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench import timing
import pallas_kernels

TOKENS, HEADS, DIM = 4096, 4, 64
BLOCK, LISTED = 128, 4  # 12.5% of the blocks
TOKEN_BLOCK, TOKEN_LISTED = 64, 16


def gemm_rate() -> float:
  """FLOPs per second of a dense f32 product (the best of ten)."""
  x = jnp.ones((2048, 2048))
  run = timing.timed(jax.jit(lambda x: x @ x), x)
  return 2 * 2048**3 / min(run() for _ in range(10))


def arrays(tokens: int) -> tuple[jax.Array, ...]:
  """q, k and v of one sequence."""
  keys = jax.random.split(jax.random.key(0), 3)
  return tuple(jax.random.normal(k, (1, tokens, HEADS, DIM)) for k in keys)


def random_blocks(tokens: int, listed: int) -> pallas_kernels.BlockMask:
  """Every query block of every head lists as many blocks at random."""
  blocks = tokens // BLOCK
  drawn = np.random.default_rng(0).random((1, HEADS, blocks, blocks))
  return pallas_kernels.BlockMask(
    drawn.argsort(-1)[..., :listed],
    block_q=BLOCK,
    block_kv=BLOCK,
    kv_blocks=blocks,
  )


def random_tokens(overlap: bool) -> pallas_kernels.BlockMask:
  """Every token chooses 16 of the blocks before it, and its own.

  Without overlap tokens draw alone; with it a token keeps what its neighbor
  chose but for one block.
  """
  rng = np.random.default_rng(0)
  blocks = TOKENS // TOKEN_BLOCK
  chosen = np.full((1, HEADS, TOKENS, TOKEN_LISTED), -1, np.int32)
  for head in range(HEADS):
    kept = []
    for token in range(TOKENS):
      own = token // TOKEN_BLOCK
      many = min(own, TOKEN_LISTED - 1)
      if overlap and len(kept) == many and many:
        kept[rng.integers(many)] = rng.integers(own)
      else:
        kept = list(rng.permutation(own)[:many])
      chosen[0, head, token, : many + 1] = [own, *kept]
  return pallas_kernels.BlockMask.from_queries(
    jnp.asarray(chosen),
    block_q=TOKEN_BLOCK,
    block_kv=TOKEN_BLOCK,
    kv_blocks=blocks,
    capacity=blocks,
    rule=pallas_kernels.Causal(),
  )


def with_gradients(attend):
  """Output and the gradients of its sum of squares."""

  def run(q, k, v, *mask):
    loss = lambda *qkv: (attend(*qkv, *mask) ** 2).sum()
    return jax.value_and_grad(loss, (0, 1, 2))(q, k, v)

  return run


def cases(bandwidth: float) -> Iterator[timing.Case]:
  """Rows; `bandwidth` is not what bounds them."""
  del bandwidth
  rate = gemm_rate()
  attend = pallas_kernels.block_sparse_attention
  dense = jax.nn.dot_product_attention
  causal = lambda q, k, v: dense(q, k, v, is_causal=True)
  qkv = arrays(TOKENS)
  mask = random_blocks(TOKENS, LISTED)
  product = 2 * TOKENS * HEADS * DIM * BLOCK * LISTED
  size = f"{TOKENS} tokens, {HEADS} heads of {DIM}"
  share = f"{LISTED * BLOCK / TOKENS:.1%} of blocks of {BLOCK}"
  for label, wrap, products, targets in (
    (
      "forward",
      lambda f: f,
      2,
      {"jax dense": 15, "torch sdpa": 3.5, "torch flex": 1.7},
    ),
    ("forward and backward", with_gradients, 7, {"jax dense": 12}),
  ):
    yield timing.Case(
      name=f"attention {label}, {size}, {share}",
      ours=timing.timed(jax.jit(wrap(attend)), *qkv, mask),
      peers={"jax dense": timing.timed(jax.jit(wrap(dense)), *qkv)},
      target=targets,
      limit=products * product / rate,
      note="limit: the products alone, at the rate of a large one",
    )
  for overlap in (False, True):
    mask = random_tokens(overlap)
    mean = float(mask.counts.mean())
    told = "neighbors alike" if overlap else "each alone"
    yield timing.Case(
      name=f"attention forward, {size}, {TOKEN_LISTED} blocks of "
      f"{TOKEN_BLOCK} a token, {told}",
      ours=timing.timed(jax.jit(attend), *qkv, mask),
      peers={"jax dense": timing.timed(jax.jit(causal), *qkv)},
      target={"jax dense": 3},
      limit=4 * TOKENS * HEADS * DIM * TOKEN_BLOCK * TOKEN_LISTED / rate,
      note=f"a tile's union lists {mean:.1f} of {TOKENS // TOKEN_BLOCK} "
      "blocks; limit: the products of what tokens chose",
    )


def facts() -> dict[str, Any]:
  """Memory and time at 16k tokens, where a dense table would be 4.3 GB."""
  tokens = 4 * TOKENS
  qkv = arrays(tokens)
  mask = random_blocks(tokens, 4 * LISTED)
  found = {}
  for label, wrap in (
    ("forward", lambda f: f),
    ("forward and backward", with_gradients),
  ):
    run = jax.jit(wrap(pallas_kernels.block_sparse_attention))
    compiled = run.lower(*qkv, mask).compile()
    jax.block_until_ready(compiled(*qkv, mask))
    begin = time.perf_counter()
    jax.block_until_ready(compiled(*qkv, mask))
    temp = compiled.memory_analysis().temp_size_in_bytes
    found[f"attention {label} at {tokens} tokens, 12.5%"] = (
      f"{temp / 1e6:.0f} MB temporary, {time.perf_counter() - begin:.2f} s"
    )
  return found
