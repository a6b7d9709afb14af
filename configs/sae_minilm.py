"""Sparse autoencoders of all-MiniLM-L6-v2's fourth block: over half an hour.

  python -m experiments.dictionary --config=configs/sae_minilm.py \
    --workdir=runs/sae_minilm

One variant at fewer levels:

  --config.variants="('top_k',)" --config.levels.top_k="(16, 32)"
"""

import ml_collections


def get_config():
  return ml_collections.ConfigDict(
    {
      "model": "minilm",
      "layer": "blocks/3",
      "texts": 8_000,  # paragraphs, of which a tenth validates
      "length": 64,  # tokens of a text, at most
      "dtype": "float16",  # of the activations that are kept
      "pairs": 256,  # docstrings and signatures, whose embeddings are compared
      "latents": 1024,
      "variants": ("l1", "gated", "jump_relu", "top_k", "batch_top_k"),
      # k, or the weight of a term of the loss.
      "levels": {
        "l1": (0.8, 1.3, 2.0, 3.0),
        "gated": (1.3, 2.0, 3.2, 5.0),
        "jump_relu": (0.02, 0.1, 0.5, 2.0),
        "top_k": (8, 16, 32, 64),
        "batch_top_k": (8, 16, 32, 64),
      },
      # Others than the levels, as the constructors take them.
      "settings": {
        "jump_relu": {"threshold": 0.8, "bandwidth": 0.5},
        "top_k": {"dead_after": 50_000},  # tokens
        "batch_top_k": {"dead_after": 50_000},
      },
      "seeds": 3,
      "steps": 600,
      "batch_size": 512,
      "learning_rate": 3e-3,
      "log_every": 20,
      "checkpoint_every": 200,
      # The level of about this L0, and how many latents and passages of each.
      "page": {"l0": 32, "latents": 100, "passages": 5},
    }
  )
