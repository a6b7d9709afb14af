"""Which neurons fire."""

from sparsejax.activations.ffn import spark_ffn
from sparsejax.activations.ffn import sparse_ffn
from sparsejax.activations.ffn import sparse_glu
from sparsejax.activations.ffn import sparse_matmul
from sparsejax.activations.ffn import threshold_ffn
from sparsejax.activations.low_rank import r_sparse
from sparsejax.activations.low_rank import r_sparse_budget
from sparsejax.activations.low_rank import r_sparse_fit
from sparsejax.activations.low_rank import r_sparse_search
from sparsejax.activations.low_rank import RSparse
from sparsejax.activations.meters import Activity
from sparsejax.activations.meters import density
from sparsejax.activations.thresholds import calibrate
from sparsejax.activations.thresholds import chess_thresholds
from sparsejax.activations.thresholds import keep_above
from sparsejax.activations.thresholds import Magnitudes
from sparsejax.activations.thresholds import sparsified
from sparsejax.activations.top_k import statistical_top_k
from sparsejax.activations.top_k import top_k
