"""Counted operations, against counts by hand."""

import dataclasses

import jax
import numpy as np
import pytest

from configs import digits_rigl
from configs import text_dense
from configs import text_moe
from experiments import experiment
from experiments import flops

METHODS = {
  "dense": {},
  "static": {"sparsity": 0.75},
  "rigl": {"sparsity": 0.75, "every": 10, "until": 50},
  "top_kast": {"sparsity": 0.75, "backward_sparsity": 0.5},
  "sr_ste": {"n": 1, "m": 4},
  "mask_decay": {"n": 1, "m": 4, "until": 50},
}
# Of a step, where the dense forward pass is one, over 100 steps.
COSTS = {
  "dense": 3.0,
  "static": 0.75,
  # 5 of the 100 steps need all of the weights' gradients.
  "rigl": 0.75 + 0.05 * 0.75,
  "top_kast": 0.25 + 0.25 + 0.5,
  "sr_ste": 0.25 + 0.25 + 1,
  "mask_decay": (3 + 0.75) / 2,
}


@pytest.mark.parametrize("name", METHODS)
def test_training(name):
  config = digits_rigl.get_config()
  del config.sparsity
  config.method = {"name": name} | METHODS[name]
  config.model.width, config.model.depth, config.steps = 16, 1, 100
  parts = experiment.make(config)
  state = parts.init(0)
  size, kept = flops.weights(parts, state)
  assert size == 64 * 16 + 16 * 10
  density = 1.0 if name == "dense" else 0.25
  assert kept == density * size
  assert flops.forward(parts, state) == 2 * kept
  records = [{"step": step, "density": density} for step in (0, 50, 100)]
  cost = flops.training(config, parts, state, records)
  dense = 2 * size * config.batch_size * config.steps
  assert cost == pytest.approx(COSTS[name] * dense)


def test_experts_count_as_often_as_tokens_go_there(tmp_path):
  (tmp_path / "a").write_text("0123456789" * 100)
  config = text_moe.get_config()
  config.task.path = str(tmp_path / "a")
  config.model.width, config.model.heads, config.model.hidden = 8, 2, 16
  parts = experiment.make(config)
  shapes = jax.eval_shape(parts.init, 0)
  ones = jax.tree.map(lambda x: np.ones(x.shape), shapes[0])
  parts = dataclasses.replace(parts, masks=lambda *_: ones)
  others = 2 * (4 * 8 * 8 + 8 * 8) + 8 * 256
  expert = 2 * 8 * 16
  assert flops.weights(parts, shapes) == (others + 16 * expert,) * 2
  records = [
    {"step": 1, "train_layer_0_active": 2.0, "train_layer_1_active": 1.0},
    {"step": 2, "validation_layer_0_active": 8.0, "train_active": 8.0},
    {"step": 3, "train_layer_0_active": 1.0, "train_layer_1_active": 0.5},
  ]
  edges = flops.active(records, "train_")
  assert edges == {"layer_0_active": 1.5, "layer_1_active": 0.75}
  met, kept = flops.weights(parts, shapes, edges)
  assert met == kept == others + 2.25 * expert
  tokens = config.task.sequence_length
  found = flops.forward(parts, shapes, edges)
  assert found == 2 * tokens * met + parts.other_flops


def test_forward_of_a_transformer(tmp_path):
  (tmp_path / "a").write_text("0123456789" * 100)
  config = text_dense.get_config()
  config.task.path = str(tmp_path / "a")
  config.task.sequence_length = 8
  config.model.width, config.model.depth, config.model.heads = 16, 2, 2
  parts = experiment.make(config)
  weights = 2 * (3 + 1 + 4 + 4) * 16 * 16 + 16 * 256
  # Position t reads t keys: 36 pairs, a score and a sum of 16 features each.
  attention = 2 * 36 * (2 + 2) * 16
  found = flops.forward(parts, parts.init(0))
  assert found == 2 * 8 * weights + attention
