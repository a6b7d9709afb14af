"""Kernels that execute what was selected.

This package depends on jax and numpy alone, never on sparsejax. It holds no
kernel yet.
"""
