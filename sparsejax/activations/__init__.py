"""Which neurons fire."""

from sparsejax.activations.meters import Activity
from sparsejax.activations.meters import density
from sparsejax.activations.thresholds import calibrate
from sparsejax.activations.thresholds import chess_thresholds
from sparsejax.activations.thresholds import keep_above
from sparsejax.activations.thresholds import Magnitudes
from sparsejax.activations.thresholds import sparsified
from sparsejax.activations.top_k import statistical_top_k
from sparsejax.activations.top_k import top_k
