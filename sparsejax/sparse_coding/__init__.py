"""Which latents explain an activation: dictionaries, autoencoders, recovery.

A code is an array of latents, or a `Code` that lists those of each row. An
autoencoder is an encoder, a sparsifier and a dictionary, and its loss is made
of named terms; solvers find codes without an encoder.
"""

from sparsejax.sparse_coding.codes import Code
from sparsejax.sparse_coding.codes import decode
from sparsejax.sparse_coding.codes import encode_top_k
from sparsejax.sparse_coding.codes import top_k
