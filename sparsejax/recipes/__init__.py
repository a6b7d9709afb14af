"""Published methods that are several rooms at once."""

from sparsejax.recipes.umoe import premixed_experts
from sparsejax.recipes.umoe import UMoE
