"""Choosing weights of a trained model in one shot, a layer at a time.

Each method takes a kernel [inputs, outputs] and the moments of what the layer
reads (`sparsejax.capture.moments`), and returns a `Pruned`: the kernel with
exact zeros, its mask, and how it was made. Papers write the transpose,
[outputs, inputs]: their rows are the columns here.

Masks go on to `keep_masked` for training, and to `condense` to be run.
"""

from sparsejax.weights.post_training.compensation import sparsegpt
from sparsejax.weights.post_training.densities import owl
from sparsejax.weights.post_training.layers import prune
from sparsejax.weights.post_training.layers import prune_layers
from sparsejax.weights.post_training.layers import put_layers
from sparsejax.weights.post_training.results import Made
from sparsejax.weights.post_training.results import Pruned
from sparsejax.weights.post_training.results import reconstruction_error
from sparsejax.weights.post_training.scores import magnitude_pruning
from sparsejax.weights.post_training.scores import wanda
from sparsejax.weights.post_training.scores import wanda_scores
from sparsejax.weights.post_training.swaps import dsnot
