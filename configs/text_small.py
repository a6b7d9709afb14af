"""A dense byte-level Transformer that two cores train in minutes, to prune."""

from configs import text_dense


def get_config():
  config = text_dense.get_config()
  config.steps = 1_500
  config.eval_every = 250
  config.task.sequence_length = 64
  config.model.depth = 2
  config.optimizer.learning_rate = 5e-3
  return config
