"""PyTorch as a peer of the training step of a top-k autoencoder.

  PEER="ENV/bin/python experiments/bench/peers/torch_sae.py"
  python -m experiments.bench --only=sparse_coding \
    --peer="torch dense=$PEER dense" --peer="torch bag=$PEER bag"

ENV is an environment of its own with torch (CPU build). `dense` decodes by a
product with all latents, `bag` by `embedding_bag`, which reads those kept.
Either updates with Adam(fused=True). `--compile` compiles the step but for the
update, which needs a C++ compiler.
"""

import argparse
import json
import os
import re
import sys
import time

import torch
from torch.nn import functional


def main():
  parser = argparse.ArgumentParser()
  parser.add_argument("decoder", choices=("dense", "bag"))
  parser.add_argument("--compile", action="store_true")
  parser.add_argument("case")
  given = parser.parse_args()
  size = re.match(
    r"a step of a top-k SAE, (\d+) rows, (\d+) to (\d+), k (\d+)", given.case
  )
  if not size:
    sys.exit("only rows that begin 'a step of a top-k SAE'")
  rows, width, latents, k = map(int, size.groups())
  torch.set_num_threads(len(os.sched_getaffinity(0)))
  torch.manual_seed(0)
  x = torch.randn(rows, width)
  atoms = functional.normalize(torch.randn(latents, width))
  shapes = atoms, atoms, torch.zeros(latents), torch.zeros(width)
  params = [torch.nn.Parameter(p.clone()) for p in shapes]
  kernel, dictionary, bias, center = params
  adam = torch.optim.Adam(params, lr=1e-3, fused=True)

  def loss_of(x):
    pre = functional.linear(x - center, kernel, bias)
    values, indices = pre.topk(k, sorted=False)
    values = values.relu()
    if given.decoder == "bag":
      out = functional.embedding_bag(
        indices, dictionary, per_sample_weights=values, mode="sum"
      )
    else:
      out = torch.zeros_like(pre).scatter(1, indices, values) @ dictionary
    return ((out + center - x) ** 2).sum(-1).mean()

  loss_of = torch.compile(loss_of) if given.compile else loss_of

  for _ in sys.stdin:
    begin = time.perf_counter()
    adam.zero_grad(set_to_none=True)
    loss_of(x).backward()
    adam.step()
    print(json.dumps({"seconds": time.perf_counter() - begin}), flush=True)


if __name__ == "__main__":
  main()
