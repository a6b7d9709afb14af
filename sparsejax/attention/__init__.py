"""Attention that reads some keys: which ones, and the formats that say so."""

from sparsejax.attention import formats
