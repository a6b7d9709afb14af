"""Which neurons fire."""

from sparsejax.activations.meters import Activity
from sparsejax.activations.meters import density
from sparsejax.activations.top_k import statistical_top_k
from sparsejax.activations.top_k import top_k
