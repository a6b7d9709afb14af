"""Thresholds and n:m masks of 16M scores."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from experiments.bench import timing
from sparsejax import select

SIZE = 2**24


def ordered(x: jax.Array) -> jax.Array:
  """Keys that sort as the scores do, in a type that sorts fast."""
  bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
  return jnp.where(x < 0, ~bits, bits | jnp.uint32(2**31))


def cases(bandwidth: float) -> Iterator[timing.Case]:
  """Rows, given the bytes per second that this machine reads."""
  x = jax.random.normal(jax.random.key(0), (SIZE // 4096, 4096))
  k = SIZE // 10
  yield timing.Case(
    name="threshold of 16M f32, 10% above it",
    ours=timing.timed(jax.jit(lambda x: select.kth_largest(x, k)), x),
    peers={
      "jnp.sort": timing.timed(
        jax.jit(lambda x: jnp.sort(x.ravel())[SIZE - k]), x
      ),
      "jnp.sort of uint32 keys": timing.timed(
        jax.jit(lambda x: jnp.sort(ordered(x).ravel())[SIZE - k]), x
      ),
      "lax.top_k": timing.timed(
        jax.jit(lambda x: jax.lax.top_k(x.ravel(), k)[0][-1]), x
      ),
    },
    target={"jnp.sort": 2, "jnp.sort of uint32 keys": 2, "lax.top_k": 5},
    limit=32 * 4 * SIZE / bandwidth,
    note="limit: 32 reads of the scores",
  )
  for n, m in (2, 4), (4, 16):

    def by_sort(x, n=n, m=m):
      groups = x.reshape(SIZE // 4096 // m, m, 4096)
      return groups >= jnp.sort(groups, axis=1)[:, m - n, None]

    def ours(x, n=n, m=m):
      return select.NM(n, m, axis=0).mask(x, n / m)

    yield timing.Case(
      name=f"{n}:{m} mask of 16M f32",
      ours=timing.timed(jax.jit(ours), x),
      peers={
        "sort along the axis": timing.timed(jax.jit(by_sort), x),
        "sort of uint32 keys": timing.timed(
          jax.jit(lambda x, by_sort=by_sort: by_sort(ordered(x))), x
        ),
      },
      target={"sort along the axis": 10, "sort of uint32 keys": 10},
      limit=5 * SIZE / bandwidth,
      note="limit: one read of the scores and one write of the mask; the "
      "sort keeps more than n where scores tie",
    )


def facts() -> dict[str, Any]:
  """None."""
  return {}
