"""The experiment of sparse autoencoders, on a small random encoder."""

import html
import json
import re
import shutil
import types

from flax import nnx
import jax
import ml_collections
import numpy as np
import optax
import pytest
import tokenizers

from configs import sae_minilm
from experiments import activations
from experiments import dictionary
from experiments import dictionary_figures
from experiments import dictionary_page
from experiments import dictionary_training
from experiments.models import bert
from experiments.models import pretrained
from experiments.tasks import docstrings
from sparsejax import sparse_coding

WORDS = ("gives", "<b>", "of", "x", "and", "nothing", "than", "mean", "sum")
CONFIG = bert.Config(
  vocab_size=16,
  hidden_size=8,
  num_hidden_layers=2,
  num_attention_heads=2,
  intermediate_size=8,
  max_position_embeddings=16,
)


def config(**changes):
  found = sae_minilm.get_config()
  found.update(
    model="small",
    layer="blocks/0",
    texts=200,
    length=8,
    pairs=6,
    latents=16,
    variants=("l1", "top_k"),
    levels={"l1": (0.01, 0.1), "top_k": (2,)},
    seeds=2,
    steps=10,
    learning_rate=1e-3,
    batch_size=8,
    settings={"top_k": {"dead_after": 20}},
    log_every=2,
    checkpoint_every=4,
    page={"l0": 2, "latents": 4, "passages": 2},
  )
  found.update(changes)
  return found


@pytest.fixture(scope="module", autouse=True)
def small():
  """A small encoder, and texts of few words."""
  words = {word: i for i, word in enumerate(["[UNK]", *WORDS])}
  tokenizer = tokenizers.Tokenizer(
    tokenizers.models.WordLevel(words, unk_token="[UNK]")
  )
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
  model = bert.Bert(CONFIG, rngs=nnx.Rngs(0))
  loaded = pretrained.Pretrained(model, tokenizer, CONFIG)
  draw = np.random.default_rng(0)
  texts = [
    " ".join(draw.choice(WORDS, size)) for size in draw.integers(3, 8, 80)
  ]
  texts = list(dict.fromkeys(texts))
  pairs = docstrings.Pairs(tuple(texts[:8]), tuple(texts[8:16]), "words")
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(pretrained, "load", lambda source: loaded)
    patch.setattr(docstrings, "load", lambda: pairs)
    patch.setattr(activations, "paragraphs", lambda: texts[8:])
    patch.setattr(dictionary_figures, "CHUNK", 16)
    yield loaded


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  """A run that was stopped and resumed, and where it is."""
  workdir = tmp_path_factory.mktemp("whole") / "run"
  calls = iter([False] * 4 + [True])
  assert dictionary.run(config(), workdir, stopped=lambda: next(calls)) is None
  assert not (workdir / "results.jsonl").exists()
  (checkpoints,) = workdir.glob("programs/*/checkpoints")
  assert {p.name for p in checkpoints.iterdir()} == {"4", "5"}
  found = dictionary.run(config(), workdir)
  dictionary.write(found, config().page, workdir)
  return found, workdir


def test_a_run_tells_of_every_training(finished):
  found, workdir = finished
  lines = (workdir / "results.jsonl").read_text().splitlines()
  assert [json.loads(line) for line in lines] == found["rows"]
  assert [(r["variant"], r["level"], r["seed"]) for r in found["rows"]] == [
    (*at, seed)
    for at in (("l1", 0.01), ("l1", 0.1), ("top_k", 2))
    for seed in (0, 1)
  ]
  for row in found["rows"]:
    assert np.isfinite([row[name] for name in dictionary.COLUMNS]).all()
    sae = sparse_coding.load(
      dictionary.kept_at(workdir, *list(row.values())[:3])
    )
    np.testing.assert_allclose(sae.norms(), 1, rtol=1e-5)
  # Shares of rows, added up in f32.
  for row in found["rows"][4:]:
    assert row["l0"] == pytest.approx(2, abs=1e-5)
  table = (workdir / "table.txt").read_text()
  assert table.count("top_k") == 1 and "[" in table and "intact" in table
  assert (workdir / "frontier.png").stat().st_size > 1000
  assert not [*workdir.glob("programs/*/checkpoints")]
  steps = (workdir / "programs/top_k_2/metrics.jsonl").read_text()
  assert [json.loads(line)["step"] for line in steps.splitlines()] == [
    *range(2, 11, 2)
  ]


def test_a_training_among_others_is_one_alone(finished):
  """Whatever was stopped, and whichever levels and seeds were beside it."""
  _, workdir = finished
  store = activations.Store(workdir / "activations" / "training")
  made = nnx.Rngs(jax.random.key(1))
  sae = sparse_coding.l1_sae(8, 16, weight=0.1, rngs=made)
  sae.bias[...] = store[np.arange(len(store))].mean(0)
  # Of ten steps two fall to 0, the first from where the rate was.
  rate = optax.piecewise_constant_schedule(1e-3, {9: 0.5})
  tx = sparse_coding.unit_norm(optax.adam(rate))
  optimizer = nnx.Optimizer(sae, tx, wrt=nnx.Param)

  @nnx.jit
  def step(sae, optimizer, x, weight):
    loss = lambda sae: sae.loss(x, weights={"l1_loss": weight})[0]
    optimizer.update(sae, nnx.grad(loss)(sae))

  rows = iter(store.batches(8, seed=1).to_iter_dataset())
  for number in range(1, 11):
    step(sae, optimizer, next(rows), 0.1 * min(number / 2, 1))
  kept = sparse_coding.load(dictionary.kept_at(workdir, "l1", 0.1, 1))
  for name in ("kernel", "dictionary", "bias", "encoder_bias"):
    # Adam divides by small roots: f32 to a hundredth of a step of 1e-3.
    np.testing.assert_allclose(
      getattr(kept, name)[...], getattr(sae, name)[...], atol=1e-5
    )


def test_what_is_finished_stays(finished, monkeypatch):
  found, workdir = finished
  monkeypatch.setattr(dictionary_training, "train", None)
  again = dictionary.run(config(), workdir)
  assert again["rows"] == found["rows"]
  with pytest.raises(ValueError, match=r"config\.steps=10, and this one has 8"):
    dictionary.run(config(steps=8), workdir)


def test_a_truncated_store_is_refused(finished, tmp_path):
  _, workdir = finished
  copy = shutil.copytree(workdir, tmp_path / "copy")
  shard = copy / "activations" / "training" / "00000"
  shard.write_bytes(shard.read_bytes()[:-2])
  with pytest.raises(ValueError, match=r"training/00000 has \d+ bytes"):
    dictionary.run(config(), copy)
  (copy / "results.jsonl").write_text('{"variant"')
  with pytest.raises(ValueError, match=r"results\.jsonl is damaged"):
    dictionary.read(copy)


@pytest.mark.parametrize(
  ("changes", "error"),
  [
    ({"variants": ("l2",)}, r"variants has 'l2'; it takes l1, .*top_k"),
    ({"levels": {"top_k": (2, 17)}}, r"top_k .*\.latents=16; got \(2, 17\)"),
    ({"levels": {"l1": (0.0,)}}, r"levels\.l1 takes numbers above 0"),
    ({"levels": {"top_k": (2, 8.5)}}, r"top_k takes integers .*\(2, 8\.5\)"),
    ({"levels": {"topk": (2,)}}, r"levels\.topk is not .* takes .*top_k"),
    ({"variants": ("mp",)}, r"levels\.mp takes integers .*got \(\)"),
    ({"variants": ("ort",)}, r"settings\.ort\.chunks is missing"),
    ({"settings": {"top_k": {"rate": 1}}}, r"settings\.top_k\.rate is not"),
    ({"settings": {"topk": {}}}, r"settings\.topk is not .* takes .*top_k"),
    ({"page": {"l0": 0}}, r"page\.l0 takes numbers above 0; got 0"),
    ({"page": {"passages": -1}}, r"page\.passages takes integers .*got -1"),
    ({"page": {"L0": 2}}, r"page\.L0 is not .* takes l0, latents, passages"),
    ({"steps": 0}, r"steps takes 1 or more; got 0"),
    ({"lr": 1}, r"config\.lr is not a setting"),
  ],
)
def test_a_wrong_config_is_refused(changes, error, tmp_path):
  with pytest.raises(ValueError, match=error):
    dictionary.run(config(**changes), tmp_path / "run")
  assert not (tmp_path / "run").exists()


def test_numbers_of_a_page_and_levels_are_of_the_right_kind():
  given = config(variants=("batch_top_k",))
  given.levels.batch_top_k = (8.5,)  # on average
  given.page = ml_collections.ConfigDict(
    {"l0": 2.5, "latents": 4, "passages": 2}
  )
  dictionary.check(given)
  del given.page.passages
  with pytest.raises(ValueError, match=r"page\.passages is missing"):
    dictionary.check(given)
  given.page.passages = 2.5
  with pytest.raises(ValueError, match=r"passages takes integers .*got 2\.5"):
    dictionary.check(given)


def test_the_config_is_right():
  given = sae_minilm.get_config()
  dictionary.check(given)
  sizes = [len(p.trainings) for p in dictionary_training.programs(given)]
  assert sum(sizes) == len(given.variants) * 4 * 3
  assert sizes[0] == 12 and sizes[-1] == 3  # weights are one program


def test_no_text_is_in_two_parts():
  texts, (_, docs) = dictionary.split(config())
  parts = [set(texts["training"]), set(texts["validation"]), set(docs)]
  assert all(parts) and len(set.union(*parts)) == sum(map(len, parts))


@pytest.fixture(scope="module")
def figures(small, tmp_path_factory):
  texts = activations.paragraphs()
  store = activations.collect(
    tmp_path_factory.mktemp("figures") / "store",
    small,
    "blocks/0",
    texts[:9],
    length=8,
    dtype="float32",
  )
  sides = [texts[9:19], texts[19:29]]
  return dictionary_figures.Figures(small, store, sides, store.mean())


def test_figures_of_what_loses_nothing_and_of_what_loses_all(figures):
  sae = sparse_coding.Autoencoder(8, 16, rngs=nnx.Rngs(0))
  both = np.concatenate([np.eye(8), -np.eye(8)])
  sae.kernel[...] = sae.dictionary[...] = both
  sae.bias[...] = figures.store.mean()
  whole = figures.of(sae)
  assert whole["l0"] == pytest.approx(8)  # a sign each
  for name in ("explained", "recovered", "cosine", "shrinkage"):
    assert whole[name] == pytest.approx(1, abs=1e-5)
  assert whole["retrieval"] == figures.bounds["intact"]["retrieval"]
  sae.encoder_bias[...] -= 1e3
  nothing = figures.of(sae)
  assert nothing["l0"] == 0 and nothing["dead"] == 1
  for name in ("explained", "recovered"):
    assert nothing[name] == pytest.approx(0, abs=1e-5)
  cosine = figures.bounds["ablated"]["cosine"]
  assert nothing["cosine"] == pytest.approx(cosine, abs=1e-6) and cosine < 0.99


def test_codes_are_those_of_all_rows(figures):
  sae = sparse_coding.top_k_sae(8, 16, 3, rngs=nnx.Rngs(0))
  sae.eval()
  found = dictionary_figures.codes(sae, figures.store)
  whole = sae.encode(figures.store[np.arange(len(figures.store))]).dense()
  # Kept as f16.
  np.testing.assert_allclose(found, whole, rtol=1e-3, atol=1e-3)


def test_the_best_is_of_the_level_that_is_asked_for():
  row = lambda level, seed, l0, recovered: {
    "variant": "l1",
    "level": level,
    "seed": seed,
    "l0": l0,
    "recovered": recovered,
  }
  rows = [row(1, 0, 9, 0.9), row(1, 1, 9, 0.8)]
  rows += [row(2, 0, 4, 0.6), row(2, 1, 6, 0.7)]
  assert dictionary.best(rows, "l1", 5.5) == rows[3]
  assert dictionary.best(rows, "l1", 100) == rows[0]


def test_a_page_shows_where_latents_are_active(finished):
  found, workdir = finished
  page = (workdir / "latents_top_k.html").read_text()
  # Only tags of our own: what texts have is escaped.
  assert "&lt;b&gt;" in page and "<b>" not in page
  assert "http" not in page and "<script" not in page
  assert page.count("<section") == page.count("</section>") <= 4
  row = dictionary.best(found["rows"], "top_k", 2)
  at = row["variant"], row["level"], row["seed"]
  sae = sparse_coding.load(dictionary.kept_at(workdir, *at))
  store, texts = found["validation"]
  codes = dictionary_figures.codes(sae, store)
  densest = int((codes != 0).sum(0).argmax())
  section = page.split(f"<section id='{densest}'>")[1].split("</section>")[0]
  strongest = codes[:, densest].argmax()
  word = texts[store.text[strongest]].split()[store.token[strongest]]
  # The strongest token has the full shade.
  assert f"/ 1.00)'>{html.escape(word)}</span>" in section
  assert f"{(codes[:, densest] != 0).mean():.2%}" in section
  assert section.count("<p>") <= 2


def test_a_page_of_dead_latents_is_empty(figures, monkeypatch):
  sae = sparse_coding.top_k_sae(8, 16, 3, rngs=nnx.Rngs(0))
  none = np.zeros((len(figures.store), 16), np.float16)
  monkeypatch.setattr(dictionary_figures, "codes", lambda *_: none)
  page = dictionary_page.page("a & b", sae, figures.store, [], None)
  assert "0 of 16 latents" in page and "<section" not in page
  assert "<h1>a &amp; b</h1>" in page


def test_passages_show_the_tokens_around_and_join_parts_of_words():
  vocabulary = {word: i for i, word in enumerate(["[UNK]", "a", "##b", "c"])}
  tokenizer = tokenizers.Tokenizer(
    tokenizers.models.WordPiece(vocabulary, unk_token="[UNK]")
  )
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
  store = types.SimpleNamespace(
    text=np.repeat([0, 1], [2, 40]), token=np.r_[:2, :40]
  )
  values = np.zeros(42)
  values[2:4] = 1, 4
  texts = ["c c", "ab " * 20]
  found = dictionary_page.passage(3, values, store, texts, tokenizer)
  words = re.sub(r"<span[^>]*>|</span>|</?p>|…", "", found).split()
  assert words == ["ab"] * 7  # 12 tokens after the second
  assert found.count("style=") == 2 and "/ 0.25)'>a<" in found
