"""SparseJAX: score, select, execute. Sparsity as pure functions in JAX.

What you look for            | import
-----------------------------|---------------------------------------------
exact top-k masks, n:m, ERK  | sparsejax.select
RigL, SET, SR-STE, pruning   | sparsejax.weights
"""

__version__ = "0.1.0"
