"""Grouped matmul: rows multiplied by the weight of their group.

The public function is in matmul.py; one file a backend implements it, and
edges.py says what all of them are given.
"""

from pallas_kernels.grouped_matmul.matmul import (
  grouped_matmul as grouped_matmul,
)
