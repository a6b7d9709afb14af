"""The TPU kernels' schedules beside splash attention's, without a TPU.

A bundle is one cycle of a TPU core when nothing stalls: these are the
compiler's plans, not timings.
"""

from collections.abc import Iterator
import dataclasses
from typing import Any

import jax
from jax.experimental.pallas.ops.tpu import splash_attention as splash
import jax.numpy as jnp

from experiments.bench import timing
import pallas_kernels
from pallas_kernels import aot
from pallas_kernels import schedules
from pallas_kernels.block_sparse_attention import attention
from pallas_kernels.block_sparse_attention import lists

TARGET = "v6e:2x2"
HEADS, TOKENS, DIM, LISTED = 4, 4096, 128, 8
KERNELS = ("forward", "dq", "dkv")
PAIR = 128 * 128  # what bundles are divided by, queries times keys


def ours(block: int, fuse: int) -> dict[str, schedules.Schedule]:
  """The three kernels, each step taking `fuse` listed blocks."""
  settings = lists.Settings(
    block_q=block,
    block_kv=block,
    scale=DIM**-0.5,
    arange=True,
    backend="tpu",
    fuse=fuse,
  )
  blocks = TOKENS // block

  def loss(q, k, v, indices, counts):
    mask = pallas_kernels.BlockMask(
      indices, counts, block_q=block, block_kv=block, kv_blocks=blocks
    )
    at = jnp.arange(TOKENS)[None]
    call = lists.prepare(q, k, v, mask, (at, at), None, settings)
    return attention.run(*call)[0].astype(jnp.float32).sum()

  x = jax.ShapeDtypeStruct((1, TOKENS, HEADS, DIM), jnp.bfloat16)
  indices = jax.ShapeDtypeStruct((1, HEADS, blocks, LISTED), jnp.int32)
  counts = jax.ShapeDtypeStruct((1, HEADS, blocks), jnp.int32)
  return _kernels(jax.grad(loss, (0, 1, 2)), x, x, x, indices, counts)


def theirs(block: int) -> dict[str, schedules.Schedule]:
  """Splash attention's without a mask, in the same blocks."""
  sizes = splash.BlockSizes(
    **{
      field.name: block
      for field in dataclasses.fields(splash.BlockSizes)
      if field.name.startswith("block_")
    }
  )
  mask = splash.MultiHeadMask([splash.FullMask((TOKENS, TOKENS))] * HEADS)
  attend = splash.make_splash_mha(
    mask, head_shards=1, q_seq_shards=1, block_sizes=sizes
  )
  loss = lambda *qkv: attend(*qkv).astype(jnp.float32).sum()
  x = jax.ShapeDtypeStruct((HEADS, TOKENS, DIM), jnp.bfloat16)
  return _kernels(jax.grad(loss, (0, 1, 2)), x, x, x)


def _kernels(f, *avals):
  compiled = aot.compile_for(f, *avals, target=TARGET)
  found = {}
  for name, schedule in compiled.kernels.items():
    kind = next(
      kernel
      for kernel, mark in (("dkv", "dkv"), ("dq", "dq"), ("forward", "fwd"))
      if mark in name or kernel in name
    )
    found[kind] = schedule
  return found


def cases(bandwidth: float) -> Iterator[timing.Case]:
  """None: nothing here is timed."""
  del bandwidth
  return iter(())


def facts() -> dict[str, Any]:
  """Bundles of whole steps at equal blocks, and of fused ones a pair."""
  found = {}
  try:
    for block in 128, 512:
      mine, peer = ours(block, 1), theirs(block)
      for kernel in KERNELS:
        least = mine[kernel].mxu_slots
        found[f"v6e {kernel}, blocks of {block}, bundles a step"] = (
          f"{mine[kernel].whole_step}, splash {peer[kernel].whole_step} "
          f"(MXU slots used: {least})"
        )
    for kernel, schedule in ours(128, 4).items():
      hot = min(schedule.body, *schedule.other_bodies) / 4
      found[f"v6e {kernel}, four blocks of 128 a step, bundles a pair"] = (
        f"{hot:.0f} in the hot body, {schedule.whole_step / 4:.0f} in all"
      )
  except ImportError as error:
    found["v6e schedules"] = f"not compiled: {error}"
  return found
