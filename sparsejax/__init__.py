"""SparseJAX: score, select, execute. Sparsity as pure functions in JAX.

What you look for                    | name
-------------------------------------|---------------------------------------
a fixed random mask                  | sparsejax.weights.static
gradual magnitude pruning            | sparsejax.weights.gradual_magnitude
SET, RigL, SRigL, DST-EE             | sparsejax.weights.set_, rigl, ...
Top-KAST                             | sparsejax.weights.top_kast
SNIP, GraSP, SynFlow, random masks   | sparsejax.weights.snip, ...
ISS-P, HyperSparse                   | sparsejax.weights.iss_p, hypersparse
BDWP, Pixelfly, Sparse-IFT           | sparsejax.weights.Pixelfly, ...
2:4 training (SR-STE), mask decay    | sparsejax.weights.sr_ste, mask_decay
Wanda, SparseGPT, DSnoT, OWL         | sparsejax.weights.wanda, ...
sparse models in files               | sparsejax.weights.save, load
what layers read, and its moments    | sparsejax.capture
training under masks made elsewhere  | sparsejax.weights.keep_masked
densities, churn, dead neurons       | sparsejax.weights.summary
exact top-k, also over a whole tree  | sparsejax.select.top_k_mask
n:m, blocks, channels, fan-in        | sparsejax.select.NM, Block, ...
ERK and other budgets                | sparsejax.select.erk, ...
masks of other libraries' attention  | sparsejax.attention.formats
fixed patterns of attention          | sparsejax.attention.patterns
sparse attention in Flax's modules   | sparsejax.attention.as_attention_fn
mixtures of experts                  | sparsejax.routing.MoE
routers, balancing, dispatchers      | sparsejax.routing.top_k, dropless, ...
sparse autoencoders                  | sparsejax.sparse_coding.Autoencoder
OMP, ISTA and other solvers          | sparsejax.sparse_coding.omp, ista, ...
top-k, thresholds of activations     | sparsejax.activations.top_k, ...
layers that read what fires          | sparsejax.activations.sparse_ffn
fine-tuning of chosen entries        | sparsejax.finetuning.train_only
FISH, LT-SFT, SMT, S2FT              | sparsejax.finetuning.fish_mask, ...
LoRA                                 | sparsejax.finetuning.add_lora
SparseLoCo, between replicas         | sparsejax.communication
methods of two rooms (UMoE)          | sparsejax.recipes.UMoE
pictures of masks and attention      | sparsejax.plots
"""

from sparsejax import activations
from sparsejax import attention
from sparsejax import finetuning
from sparsejax import plots
from sparsejax import recipes
from sparsejax import routing
from sparsejax import select
from sparsejax import sparse_coding
from sparsejax import weights

__version__ = "0.1.0"
