"""The pruning experiment: its figures, and runs on a small model."""

import functools
import json

from absl.testing import flagsaver
from flax import nnx
import numpy as np
import pytest
import tokenizers

from experiments import prune
from experiments.models import bert
from experiments.models import pretrained
from experiments.tasks import docstrings
from sparsejax import capture
from sparsejax import select
from sparsejax import weights

WORDS = ("gives", "the", "of", "x", "and", "nothing", "than", "mean", "sum")
CONFIG = bert.Config(
  vocab_size=32,
  hidden_size=32,
  num_hidden_layers=2,
  num_attention_heads=2,
  intermediate_size=32,
  max_position_embeddings=16,
)


def tokenizer():
  vocabulary = {word: i for i, word in enumerate(["[UNK]", *WORDS])}
  found = tokenizers.Tokenizer(
    tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]")
  )
  found.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  return found


@pytest.fixture(scope="module")
def small():
  """A small encoder, and twelve texts of few words."""
  with pytest.MonkeyPatch.context() as patch:
    model = bert.Bert(CONFIG, rngs=nnx.Rngs(0))
    loaded = pretrained.Pretrained(model, tokenizer(), CONFIG)
    patch.setattr(pretrained, "load", lambda source: loaded)
    texts = [" ".join((WORDS * 3)[i : i + 2 + i // 2]) for i in range(12)]
    pairs = docstrings.Pairs(tuple(reversed(texts)), tuple(texts), "words")
    patch.setattr(docstrings, "load", lambda: pairs)
    patch.setattr(prune, "ROWS", 4)
    yield prune.Measured("small", seeds=2, calibration=5, evaluation=6)


def test_retrieval():
  texts = np.eye(4)
  assert prune.retrieval(texts, texts) == 1
  assert prune.retrieval(texts[[1, 0, 2, 3]], texts) == 0.5


def test_points_are_what_a_structure_can_have():
  assert prune.points(["4:8", "block16"], [0.7, 0.5]) == [
    ("4:8", 0.5),
    ("block16", 0.7),
    ("block16", 0.5),
  ]
  for structure, sparsity, error in (
    ("2:4", 0.6, r"must have 0.5 for the structure 2:4, got 0.6"),
    ("unstructured", 1.0, r"in \[0, 1\), got 1.0"),
    ("unstructured", float("nan"), r"in \[0, 1\), got nan"),
  ):
    with pytest.raises(ValueError, match=error):
      prune.points([structure], [sparsity])


@pytest.mark.parametrize(
  ("method", "structure"),
  [("dsnot", "block16"), ("owl", "2:4"), ("slicegpt", "2:4")],
)
def test_methods_refuse_structures(method, structure):
  with pytest.raises(ValueError, match=f"not be {structure} for the method"):
    prune.check(["wanda", method], [("unstructured", 0.5), (structure, 0.5)])


def test_batches_are_of_texts_of_like_length():
  texts = [" ".join((WORDS * 3)[:n]) for n in (20, 1, 9, 8, 2)] * 2
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(prune, "ROWS", 4)
    made = prune.batches_of(tokenizer(), texts, 19)
  assert [batch[0].shape for batch in made.batches] == [
    (4, 8),
    (4, 16),
    (4, 19),
  ]
  assert made.order.tolist() == [1, 6, 4, 9, 3, 8, 2, 7, 0, 5]
  assert [valid.sum() for _, valid in made.batches] == [6, 34, 38]


def test_embeddings_keep_the_order_of_texts(small):
  texts = [" ".join(WORDS[:5]), "x", "the sum of x", "mean"] * 3
  embed = lambda texts: prune.embed(
    small.model, prune.batches_of(tokenizer(), texts, 8)
  )
  found = embed(texts)
  for i, text in enumerate(texts):
    np.testing.assert_allclose(found[i], embed([text])[0], atol=1e-6)
  assert np.linalg.norm(found[1] - found[0]) > 0.01


def test_all_kept_is_the_dense_model(small):
  row = small.row("wanda", ("unstructured", 0.0), 0)
  assert row["error"] == 0 and row["retrieval"] == small.dense["retrieval"]
  assert row["fidelity"] == pytest.approx(1, abs=1e-6)


def test_a_block_is_calibrated_on_what_pruned_ones_give(small):
  model, seen = nnx.clone(small.model), []
  texts = prune.batches_of(tokenizer(), ["the sum of x", "mean"] * 3, 9)

  def method(kernel, moments):
    seen.append(moments)
    return weights.wanda(kernel, moments, 0.5)

  inputs = prune.first_inputs(model, texts)
  prune.prune_blocks(model.blocks, inputs, [method] * 2, prune.valid_rows)
  whole = capture.moments(
    lambda model, batch: model(*batch),
    model,
    texts.batches,
    where=lambda name: name == "blocks/1/attention/query/kernel",
    valid=lambda batch: batch[1],
  )
  (expected,) = whole.values()
  of_query = seen[6 + ["key", "out", "query"].index("query")]
  np.testing.assert_allclose(of_query.second, expected.second, atol=1e-4)


def test_errors_name_the_layer(small):
  model, batches = nnx.clone(small.model), small.sets[0]
  # Of the second block one of 32 by 32 is all there is, and goes.
  whole, none = (0.5, select.Block((16, 16))), (0.5, select.Block((32, 32)))
  methods = [
    functools.partial(weights.wanda, density=density, structure=structure)
    for density, structure in (whole, none)
  ]
  error = r"blocks/1/attention/key/kernel: density .* keeps 0 of 1 "
  with pytest.raises(ValueError, match=error):
    prune.prune_blocks(model.blocks, batches, methods, prune.valid_rows)


def test_structures_hold(small):
  model, batches = nnx.clone(small.model), small.sets[0]
  methods = prune.methods_of("dsnot", ("2:4", 0.5), model.blocks, batches)
  masks, _ = prune.prune_blocks(
    model.blocks, batches, methods, prune.valid_rows
  )
  kernel = np.asarray(model.blocks[1].down.kernel[...])
  assert ((kernel != 0).reshape(-1, 4, 32).sum(1) == 2).all()
  np.testing.assert_array_equal(masks[1]["down"]["kernel"], kernel != 0)
  assert masks[1]["down"]["bias"].all()


def test_how_a_kernel_was_made_is_a_chain():
  moments = capture.Moments.zeros(8).add(np.eye(8, dtype=np.float32))
  kernel = np.arange(32, dtype=np.float32).reshape(8, 4) - 16
  pruned = prune.METHODS["dsnot"](
    kernel, moments, density=None, structure=prune.STRUCTURES["4:8"]
  )
  start = weights.Made("wanda", None, prune.STRUCTURES["4:8"], rows=8)
  assert pruned.made.method == "dsnot" and pruned.made.start == start


def test_directions_are_cut(small):
  """None, and half of 32: nothing is lost, and then parameters are."""
  whole = small.row("slicegpt", ("unstructured", 0.0), 0)
  assert whole["fidelity"] == pytest.approx(1, abs=1e-5)
  assert whole["retrieval"] == small.dense["retrieval"]
  half = small.row("slicegpt", ("unstructured", 0.5), 0)
  assert half["fidelity"] < 0.999 and half["kept"] < whole["kept"]
  assert "error" not in half
  masked = small.row("wanda", ("unstructured", 0.5), 0)
  # Half of each block's kernels, which are of 32 by 32.
  size = prune.parameters(small.model)
  pruned = 2 * 6 * 32 * 32 / 2
  assert masked["kept"] == pytest.approx((size - pruned) / size, abs=1e-6)


def test_owl_gives_blocks_what_its_density_asks(small):
  model, batches = nnx.clone(small.model), small.sets[0]
  # Outliers in the second block alone.
  kernel = model.blocks[1].up.kernel
  kernel[...] = kernel[...].at[:, :2].mul(50)
  found = prune.owl_densities(model.blocks, batches, 0.3, prune.valid_rows)
  np.testing.assert_allclose(found, [0.22, 0.38], atol=1e-6)
  methods = prune.methods_of(
    "owl", ("unstructured", 0.7), model.blocks, batches, prune.valid_rows
  )
  densities = [method.keywords["density"] for method in methods]
  np.testing.assert_allclose(densities, found)


def test_a_run_on_a_small_model(small, tmp_path, capsys):
  before = np.asarray(small.model.blocks[0].up.kernel[...])
  at = prune.points(["unstructured", "2:4", "block16"], [0.5])
  found = prune.run(small, ["magnitude", "wanda"], at)
  np.testing.assert_array_equal(
    before, small.model.blocks[0].up.kernel[...]
  )  # fmt: skip
  assert [row["seed"] for row in found["rows"]] == [0, 1] * 6
  for row in found["rows"]:
    assert 0 < row["error"] < 1 and -1 <= row["fidelity"] <= 1
    assert row["calibration"] == found["about"]["calibration"][row["seed"]]
  assert len({row["calibration"] for row in found["rows"]}) == 2
  magnitude = prune.grouped(found)["magnitude", "unstructured", 0.5]
  assert magnitude[0]["fidelity"] == magnitude[1]["fidelity"]
  assert magnitude[0]["error"] != magnitude[1]["error"]
  prune.write(found, tmp_path)
  assert json.loads((tmp_path / "prune.json").read_text())["rows"]
  assert (tmp_path / "prune.png").stat().st_size > 1000
  output = capsys.readouterr().out
  for told in (
    "text: words; split: 6 pairs",
    "context: 64 tokens",
    *(f"{s}:{h}" for s, h in found["about"]["calibration"].items()),
  ):
    assert told in output


@pytest.mark.parametrize(
  ("given", "error"),
  [
    ({"structure": ["2:4"], "sparsity": ["0.6"]}, r"must have 0\.5"),
    ({"sparsity": ["half"]}, "numbers, got half"),
    ({"structure": ["block16"], "method": ["dsnot"]}, "not be block16"),
  ],
)
def test_flags_are_checked(given, error):
  if "sparsity" not in prune.flags.FLAGS:
    prune.define_flags()
  prune.flags.FLAGS.mark_as_parsed()
  with flagsaver.flagsaver(**given), pytest.raises(ValueError, match=error):
    prune.given_points()
