"""What a block-sparse matmul means, with dense arrays: the definition.

Every other backend is tested against this one. It multiplies all blocks, drops
what is not listed, and is differentiated by JAX.
"""

import jax.numpy as jnp

from pallas_kernels.block_sparse_matmul import lists

f32 = jnp.float32


def _blocks(x, count):
  """[b, t, n * width] -> f32 [rows, n, width]."""
  return x.astype(f32).reshape(-1, count, x.shape[-1] // count)


def product(x, weight, dtype):
  """x @ weight: [b, t, K] to [b, t, N]."""
  n_k, n_n = weight.blocks
  at = weight.places()
  empty = jnp.zeros((n_k, n_n, *weight.block), f32)
  values = lists.inside(weight.values.astype(f32), *at, weight.shape)
  blocks = empty.at[at].add(values, mode="drop")
  listed = jnp.zeros((n_k, n_n), bool).at[at].set(True, mode="drop")
  each = jnp.einsum("bki,knij->bknj", _blocks(x, n_k), blocks)
  out = jnp.where(listed[..., None], each, 0).sum(1)
  return out.reshape(*x.shape[:-1], -1).astype(dtype)


def sampled(x, y, weight, dtype):
  """The listed blocks of x.T @ y."""
  (n_k, n_n), at = weight.blocks, weight.places()
  blocks = jnp.einsum("bki,bnj->knij", _blocks(x, n_k), _blocks(y, n_n))
  found = blocks.at[at].get(mode="fill", fill_value=0)
  return lists.inside(found, *at, weight.shape).astype(dtype)
