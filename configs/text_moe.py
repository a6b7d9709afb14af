"""A mixture of experts on the text of Python's standard library.

  python -m experiments.train --config=configs/text_moe.py --workdir=runs/moe

In the place of each MLP there are 8 experts, of which a byte goes to 2. They
have half of the neurons of an MLP each, so that a byte takes as many operations
as in configs/text_moe_dense.py. The two side by side, over seeds:

  python -m experiments.sweep --workdir=runs/moe_dense \
    --configs=configs/text_moe.py,configs/text_moe_dense.py

The work directory also receives routing.png, the loads of each layer over the
run; metrics.jsonl and TensorBoard have them as layer_0_load_3 and so on. To try
something else:

  --config.model.balance='{"name": "bias", "rate": 0.001}'  # no auxiliary loss
  --config.model.balance='{"name": "none"}'
  --config.model.capacity_factor=1.25 --config.model.priority=weight
  --config.model.router='{"name": "top_p", "p": 0.5, "renormalize": True}'
  --config.model.router='{"name": "dense_to_sparse", "threshold": 0.1,
    "until": 750}'
"""

from configs import text_dense


def get_config():
  config = text_dense.get_config()
  config.steps = 1_000
  config.task.sequence_length = 64
  config.model = {
    "name": "moe_transformer",
    "width": 64,
    "depth": 2,
    "heads": 4,
    "experts": 8,
    "hidden": 128,
    "router": {"name": "top_k", "k": 2, "renormalize": True},
    "balance": {"name": "auxiliary", "coefficient": 0.01},
  }
  config.optimizer.learning_rate = 1e-2
  return config
