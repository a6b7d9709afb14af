"""Kernels that execute what was selected.

This package depends on jax and numpy alone, never on sparsejax.

  what you look for                import                   described in
  attention over listed blocks     block_sparse_attention   its docstring
  matmul by listed blocks          block_sparse_matmul      its docstring
  the same, keys on many devices   ring_attention           its docstring
  rows by their group's weight     grouped_matmul           its docstring
  which blocks a query reads       BlockMask                block_mask.py
  which blocks a weight has        BlockSparseWeight        its docstring
  causal, window, your own         Causal, Window           rules.py
  compiling for absent hardware    aot.compile_for          aot.py
  what a mask costs                costs.cost               costs.py
  what each backend can do         features.matrix          features.py
"""

from pallas_kernels.block_mask import BlockMask
from pallas_kernels.block_sparse_attention import block_sparse_attention
from pallas_kernels.block_sparse_attention import ring_attention
from pallas_kernels.block_sparse_matmul import block_sparse_matmul
from pallas_kernels.block_sparse_matmul import BlockSparseWeight
from pallas_kernels.block_sparse_matmul import sampled_matmul
from pallas_kernels.grouped_matmul import grouped_matmul
from pallas_kernels.rules import Causal
from pallas_kernels.rules import Window

__all__ = [
  "BlockMask",
  "BlockSparseWeight",
  "Causal",
  "Window",
  "block_sparse_attention",
  "block_sparse_matmul",
  "grouped_matmul",
  "ring_attention",
  "sampled_matmul",
]
