"""Grouped matmul on CPU against ragged_dot, and on TPU against megablox.

The times are of this machine; what is said of TPU are schedules: bundles of a
grid step, a cycle each when nothing stalls.
"""

from collections.abc import Iterator
import functools
import importlib
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from experiments.bench import attention
from experiments.bench import timing
from pallas_kernels import aot
from pallas_kernels import grouped_matmul
from pallas_kernels.grouped_matmul import edges as edges_lib
from pallas_kernels.grouped_matmul import tpu

ROWS = 4096
TOP = 2  # experts a token goes to
TARGET = "v6e:2x2"
# m, k, n, groups, and the tiles of m, k and n.
TILINGS = (
  ((8192, 2048, 1024, 8), (512, 1024, 512)),
  ((8192, 1024, 1024, 8), (512, 512, 512)),
  ((8192, 2048, 1024, 8), (128, 1024, 1024)),
)


def normal(seed: int, *shape: int) -> jax.Array:
  """Rows of a length of about one."""
  draw = jax.random.normal(jax.random.key(seed), shape)
  return draw * shape[-1] ** -0.25


def with_gradients(call, many):
  """Output and the gradients of its sum of squares, in the first arguments."""

  def run(*args):
    loss = lambda *primals: (call(*primals, *args[many:]) ** 2).sum()
    return jax.value_and_grad(loss, tuple(range(many)))(*args[:many])

  return run


def layer(x, gate, up, down, scale, token, sizes):
  """A mixture of experts, from where the experts are chosen."""
  h = grouped_matmul(
    x, up, sizes, rhs_gate=gate, activation=jax.nn.silu, gather=token
  )
  return grouped_matmul(
    h, down, sizes, scatter=token, num_rows=x.shape[0], row_scale=scale
  )


def chain(x, gate, up, down, scale, token, sizes):
  """The same of what JAX has."""
  rows = x[token]
  h = jax.nn.silu(lax.ragged_dot(rows, gate, sizes))
  h *= lax.ragged_dot(rows, up, sizes)
  y = lax.ragged_dot(h, down, sizes) * scale[:, None]
  return jnp.zeros_like(x).at[token].add(y)


def mixture(experts: int, d: int, f: int) -> tuple[jax.Array, ...]:
  """The arguments of a layer, each token's experts drawn at random."""
  rng = np.random.default_rng(0)
  chosen = np.stack([rng.permutation(experts)[:TOP] for _ in range(ROWS)])
  chosen = chosen.reshape(-1)
  weights = normal(1, experts, d, f), normal(2, experts, d, f)
  return (
    normal(0, ROWS, d),
    *weights,
    normal(3, experts, f, d),
    jnp.asarray(rng.random(ROWS * TOP), jnp.float32),
    jnp.asarray(np.argsort(chosen, kind="stable") // TOP, jnp.int32),
    jnp.asarray(np.bincount(chosen, minlength=experts), jnp.int32),
  )


def cases(bandwidth: float) -> Iterator[timing.Case]:
  """Rows; `bandwidth` is not what bounds them."""
  del bandwidth
  rate = attention.gemm_rate()
  passes = (
    ("forward", lambda f, many: f, 1),
    ("forward and backward", with_gradients, 3),
  )
  dense = lambda x, w, sizes: x @ w[0]
  timed = lambda f, args: timing.timed(jax.jit(f), *args)
  for groups, k, n, peers in (
    (64, 256, 512, {"ragged_dot": (lax.ragged_dot, (25, 20))}),
    (8, 512, 1024, {"one dense matmul": (dense, (1 / 1.3, 1 / 1.35))}),
  ):
    chosen = np.random.default_rng(0).integers(0, groups, ROWS)
    sizes = jnp.asarray(np.bincount(chosen, minlength=groups), jnp.int32)
    args = normal(0, ROWS, k), normal(1, groups, k, n), sizes
    for i, (label, wrap, times) in enumerate(passes):
      yield timing.Case(
        name=f"grouped matmul {label}, {groups} groups, {ROWS} x {k} x {n}",
        ours=timed(wrap(grouped_matmul, 2), args),
        peers={x: timed(wrap(f, 2), args) for x, (f, _) in peers.items()},
        target={x: aims[i] for x, (_, aims) in peers.items()},
        limit=times * 2 * ROWS * k * n / rate,
        note="limit: the products alone, at the rate of a large one",
      )
  experts, d, f = 64, 256, 512
  args = mixture(experts, d, f)
  yield timing.Case(
    name=f"mixture of experts forward, {experts} experts, {ROWS} tokens to "
    f"{TOP}, {d} x {f}",
    ours=timed(layer, args),
    peers={"chain over ragged_dot": timed(chain, args)},
    target={"chain over ragged_dot": 15},
    limit=3 * 2 * ROWS * TOP * d * f / rate,
    note="limit: the products alone, at the rate of a large one",
  )


def steps(kernel: str, sizes, tiles) -> tuple[int, int]:
  """Bundles of a whole grid step: ours, and megablox's in the same tiles."""
  megablox = importlib.import_module(
    "jax.experimental.pallas.ops.tpu.megablox.gmm"
  )
  (m, k, n, groups), tiling = sizes, tpu.Tiling(*tiles)
  spec = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)
  x, y = spec(m, k), spec(m, n)
  back = kernel == "dlhs"
  w = spec(groups, n, k) if back else spec(groups, k, n)
  group_sizes = jax.ShapeDtypeStruct((groups,), jnp.int32)
  edges = lambda sizes: edges_lib.make(sizes, groups, None, None, m, None, None)

  def product(x, w, sizes):
    return tpu.product(
      x,
      (w,),
      None,
      edges(sizes),
      transpose_rhs=back,
      combine=lambda y: y,
      dtype=jnp.bfloat16,
      tiling=tiling,
    )

  def outer(x, y, sizes):
    return tpu.outer(
      x, y, None, edges(sizes), dtype=jnp.bfloat16, tiling=tiling
    )

  if kernel == "drhs":
    args, ours = (x, y, group_sizes), outer
    theirs = lambda x, *rest: megablox.tgmm(x.T, *rest, jnp.bfloat16, tiles)
  else:
    args, ours = (x, w, group_sizes), product
    theirs = functools.partial(
      megablox.gmm,
      preferred_element_type=jnp.bfloat16,
      tiling=tiles,
      transpose_rhs=back,
    )
  found = []
  for call in ours, theirs:
    (schedule,) = aot.compile_for(call, *args, target=TARGET).kernels.values()
    found.append(schedule.whole_step)
  return tuple(found)


def facts() -> dict[str, Any]:
  """Memory of a layer, and bundles of the TPU kernels' steps."""
  found = {}
  args = mixture(64, 256, 512)
  for label, call in (
    ("forward", layer),
    ("forward and backward", with_gradients(layer, 5)),
  ):
    compiled = jax.jit(call).lower(*args).compile()
    temp = compiled.memory_analysis().temp_size_in_bytes
    copies = f"f32[{ROWS * TOP},256]" in compiled.as_text()
    found[f"mixture of experts {label}"] = (
      f"{temp / 1e6:.0f} MB temporary, "
      f"{'a' if copies else 'no'} copy of a row for each expert"
    )
  try:
    for sizes, tiles in TILINGS:
      for kernel in "forward", "dlhs", "drhs":
        ours, theirs = steps(kernel, sizes, tiles)
        shape = " x ".join(map(str, tiles))
        found[f"v6e grouped {kernel}, tiles of {shape}, bundles a step"] = (
          f"{ours}, megablox {theirs}"
        )
  except ImportError as error:
    found["v6e grouped schedules"] = f"not compiled: {error}"
  return found
