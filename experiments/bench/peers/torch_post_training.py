"""The authors' SparseGPT and Wanda as peers of the post-training rows.

  git clone https://github.com/IST-DASLab/sparsegpt CODE/sparsegpt
  git clone https://github.com/locuslab/wanda CODE/wanda
  python -m experiments.bench --only=post_training \
    --peer="authors=ENV/bin/python experiments/bench/peers/\
torch_post_training.py --code=CODE"

ENV is an environment of its own with torch (CPU build) and transformers 5. The
classes that sum statistics, and how SparseGPT chooses, are the authors' own.
The loops are written here as their programs have them: one text at a time, and
a block once more after it is pruned. So is Wanda's choice, a stable sort of the
scores of each output. A text is as long as it is: nothing is spent on padding.
`--batch=16` runs as many texts at a time, padded, which their programs do not.

Beside "seconds" it prints what they went to: "forward", "statistics" and
"choosing".
"""

import argparse
import contextlib
import io
import json
import os
import pathlib
import sys
import time

import numpy as np
import torch
import transformers


def main():
  parser = argparse.ArgumentParser()
  parser.add_argument("--code", type=pathlib.Path, required=True)
  parser.add_argument("--inputs", default="runs/bench/post_training.npz")
  parser.add_argument("--batch", type=int, default=1)
  parser.add_argument("case")
  given = parser.parse_args()
  name = given.case.split(" ")[0]
  if name not in METHODS:
    sys.exit(f"only rows that begin with one of {list(METHODS)}")
  torch.set_num_threads(len(os.sched_getaffinity(0)))  # as many as XLA takes
  transformers.utils.logging.set_verbosity_error()
  transformers.utils.logging.disable_progress_bar()
  torch.cuda.synchronize = lambda: None  # theirs waits for a GPU
  inputs = np.load(given.inputs)
  method = METHODS[name](given.code, float(inputs["sparsity"]))
  model = transformers.BertModel.from_pretrained(
    str(inputs["model"]), add_pooling_layer=False
  ).eval()
  dense = {name: x.clone() for name, x in model.state_dict().items()}
  texts = batches(inputs["tokens"], inputs["valid"], given.batch)
  with torch.no_grad():
    for _ in sys.stdin:
      model.load_state_dict(dense)
      with contextlib.redirect_stdout(io.StringIO()):  # theirs prints
        spent = prune(model, texts, method)
      print(json.dumps(spent), flush=True)


def batches(tokens, valid, size):
  """Tokens, which are valid, and the mask of attention if some are not."""
  found = []
  for i in range(0, len(tokens), size):
    rows = torch.tensor(valid[i : i + size])
    longest = int(rows.sum(1).max())
    rows = rows[:, :longest]
    ids = torch.tensor(tokens[i : i + size, :longest]).long()
    mask = None if rows.all() else rows[:, None, None]
    found.append((ids, rows, mask))
  return found


def prune(model, texts, method):
  """Prunes block after block; seconds of it all and of its parts."""
  begin = time.perf_counter()
  spent = {"statistics": 0.0, "choosing": 0.0}
  hidden = [model.embeddings(ids) for ids, _, _ in texts]
  rows = None  # which are valid of the text that runs

  def hook(statistics):
    def add(layer, inputs, output):
      begin = time.perf_counter()
      x = inputs[0].data
      statistics.add_batch(x if rows.all() else x[rows], output.data)
      spent["statistics"] += time.perf_counter() - begin

    return add

  for block in model.encoder.layer:
    layers = [x for x in block.modules() if isinstance(x, torch.nn.Linear)]
    statistics = [method.statistics(layer) for layer in layers]
    hooks = [
      layer.register_forward_hook(hook(x))
      for layer, x in zip(layers, statistics)
    ]
    for x, (_, valid, mask) in zip(hidden, texts):
      rows = valid
      block(x, mask)
    for x in hooks:
      x.remove()
    chosen = time.perf_counter()
    for layer, x in zip(layers, statistics):
      method.choose(layer, x)
    spent["choosing"] += time.perf_counter() - chosen
    hidden = [block(x, mask) for x, (_, _, mask) in zip(hidden, texts)]
  seconds = time.perf_counter() - begin
  return {"seconds": seconds, "forward": seconds - sum(spent.values()), **spent}


class SparseGPT:
  """Their class sums and chooses."""

  def __init__(self, code, sparsity):
    sys.path.insert(0, str(code / "sparsegpt"))
    import sparsegpt

    self.statistics, self.sparsity = sparsegpt.SparseGPT, sparsity

  def choose(self, layer, statistics):
    statistics.fasterprune(self.sparsity, percdamp=0.01, blocksize=128)
    statistics.free()


class Wanda:
  """Their class sums; scores are sorted for each output, stably."""

  def __init__(self, code, sparsity):
    sys.path.insert(0, str(code / "wanda" / "lib"))
    import layerwrapper

    self.statistics, self.sparsity = layerwrapper.WrappedGPT, sparsity

  def choose(self, layer, statistics):
    weight = layer.weight.data
    scores = weight.abs() * statistics.scaler_row.sqrt()
    order = torch.sort(scores, dim=-1, stable=True)[1]
    pruned = order[:, : int(weight.shape[1] * self.sparsity)]
    weight.scatter_(1, pruned, 0)


METHODS = {"sparsegpt": SparseGPT, "wanda": Wanda}

if __name__ == "__main__":
  main()
