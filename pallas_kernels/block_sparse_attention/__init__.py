"""Block-sparse attention: one public function, one file a backend."""

from pallas_kernels.block_sparse_attention.attention import (
  block_sparse_attention,
)
from pallas_kernels.block_sparse_attention.ring import ring_attention

__all__ = ["block_sparse_attention", "ring_attention"]
