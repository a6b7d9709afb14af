"""What a grouped matmul means, with dense arrays: the definition.

Every other backend is tested against this one. It multiplies every row by the
weights of all groups, picks one, and is differentiated by JAX.
"""

import jax.numpy as jnp


def product(lhs, weights, scale, edges, *, transpose_rhs, combine, dtype):
  """See `xla.product`."""
  inside = edges.in_a_group()
  rows = lhs.astype(jnp.float32)
  if edges.source is not None:
    rows = rows.at[edges.source].get(mode="fill", fill_value=0)
  rows = jnp.where(inside[:, None], rows, 0)
  groups = weights[0].shape[0]
  group = jnp.searchsorted(edges.ends, jnp.arange(edges.count), side="right")
  group = jnp.minimum(group, groups - 1)[:, None, None]
  all_of_them = "ek,gnk->egn" if transpose_rhs else "ek,gkn->egn"
  y = combine(
    *(
      jnp.take_along_axis(
        jnp.einsum(all_of_them, rows, w.astype(jnp.float32)), group, axis=1
      )[:, 0]
      for w in weights
    )
  )
  if scale is not None:
    y *= jnp.where(inside, scale, 0)[:, None]
  y = jnp.where(inside[:, None], y, 0)
  if edges.target is not None:
    sums = jnp.zeros((edges.targets, y.shape[1]), jnp.float32)
    y = sums.at[edges.target].add(y, mode="drop")
  return y.astype(dtype)
