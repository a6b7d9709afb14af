"""Published methods that are several rooms at once."""

from sparsejax.recipes.mosa import MoSA
from sparsejax.recipes.mosa import mosa
from sparsejax.recipes.mosa import mosa_tokens
from sparsejax.recipes.sira import add_sira
from sparsejax.recipes.sira import SiRA
from sparsejax.recipes.sira import sira_route
from sparsejax.recipes.umoe import premixed_experts
from sparsejax.recipes.umoe import UMoE
