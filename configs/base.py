"""What every config begins with."""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
  return ml_collections.ConfigDict(
    {
      "seed": 0,
      "steps": 2_000,
      "batch_size": 16,
      "log_every": 10,  # steps
      "eval_every": 100,
      "checkpoint_every": 500,
      "method": {"name": "dense"},
      "optimizer": {
        "name": "adamw",
        "learning_rate": 1e-3,
        "warmup_steps": 100,
        "weight_decay": 0.1,
      },
    }
  )


def with_sparsity(config, method, sparsity):
  """Adds a method that follows --config.sparsity."""
  config.sparsity = sparsity
  config.method = method
  config.method.sparsity = config.get_ref("sparsity")
  return config
