"""Matmul by a weight of which only some blocks exist.

weight.py holds the weight, matmul.py the public functions; one file a backend
implements them, and lists.py says what all of them are given.
"""

from pallas_kernels.block_sparse_matmul.matmul import (
  block_sparse_matmul as block_sparse_matmul,
)
from pallas_kernels.block_sparse_matmul.matmul import (
  sampled_matmul as sampled_matmul,
)
from pallas_kernels.block_sparse_matmul.weight import (
  BlockSparseWeight as BlockSparseWeight,
)
