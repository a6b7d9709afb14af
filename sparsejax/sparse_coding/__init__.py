"""Which latents explain an activation: dictionaries, autoencoders, recovery.

A code is an array of latents, or a `Code` that lists those of each row. An
autoencoder is an encoder, a sparsifier and a dictionary, and its loss is made
of named terms; solvers find codes without an encoder.
"""

from sparsejax.sparse_coding.autoencoders import Autoencoder
from sparsejax.sparse_coding.autoencoders import Crosscoder
from sparsejax.sparse_coding.autoencoders import Pass
from sparsejax.sparse_coding.autoencoders import squared_error
from sparsejax.sparse_coding.codes import Code
from sparsejax.sparse_coding.codes import decode
from sparsejax.sparse_coding.codes import encode_top_k
from sparsejax.sparse_coding.codes import top_k
from sparsejax.sparse_coding.metrics import ablate
from sparsejax.sparse_coding.metrics import absorption
from sparsejax.sparse_coding.metrics import absorption_fraction
from sparsejax.sparse_coding.metrics import dead_fraction
from sparsejax.sparse_coding.metrics import dense_fraction
from sparsejax.sparse_coding.metrics import density
from sparsejax.sparse_coding.metrics import description_length
from sparsejax.sparse_coding.metrics import explained_variance
from sparsejax.sparse_coding.metrics import l0
from sparsejax.sparse_coding.metrics import loss_recovered
from sparsejax.sparse_coding.metrics import mcc
from sparsejax.sparse_coding.metrics import shrinkage
from sparsejax.sparse_coding.metrics import Statistics
from sparsejax.sparse_coding.selection import batch_top_k
from sparsejax.sparse_coding.selection import feature_choice
from sparsejax.sparse_coding.selection import gradient_aware
from sparsejax.sparse_coding.selection import jump_relu
from sparsejax.sparse_coding.selection import mutual_choice
from sparsejax.sparse_coding.selection import norm_aware
from sparsejax.sparse_coding.selection import step
from sparsejax.sparse_coding.sparsifiers import BatchTopK
from sparsejax.sparse_coding.sparsifiers import FeatureChoice
from sparsejax.sparse_coding.sparsifiers import Gated
from sparsejax.sparse_coding.sparsifiers import JumpReLU
from sparsejax.sparse_coding.sparsifiers import LatentStatistic
from sparsejax.sparse_coding.sparsifiers import ReLU
from sparsejax.sparse_coding.sparsifiers import Sparsifier
from sparsejax.sparse_coding.sparsifiers import TopK
