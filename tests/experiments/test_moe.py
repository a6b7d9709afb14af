"""Mixtures of experts: the model, how it trains, and what is kept of a run."""

import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import text_moe
from experiments import experiment
from experiments import flops
from experiments import models
from experiments import report
from experiments import summaries
from experiments import training
from experiments import workdir as workdirs
from sparsejax import weights

BIAS = {"name": "bias", "rate": 0.25}
ANNEALED = {
  "name": "dense_to_sparse",
  "threshold": 0.2,
  "until": 4,
  "begin": 50.0,
  "end": 0.01,
}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
  path = tmp_path_factory.mktemp("text") / "a"
  path.write_text("".join(f"{i * i % 97} " for i in range(2_000)))
  return path


def small(text, **fields):
  config = text_moe.get_config()
  config.steps = 6
  config.batch_size = 4
  config.log_every, config.eval_every, config.checkpoint_every = 1, 3, 2
  config.task.path = str(text)
  config.task.sequence_length = 7
  config.task.validation_batches = 2
  config.optimizer.warmup_steps = 0
  config.model.width, config.model.heads, config.model.depth = 8, 2, 1
  config.model.experts, config.model.hidden = 4, 8
  with config.unlocked():
    for name, value in fields.items():
      config.model[name] = value
  return config


@pytest.fixture(scope="module")
def biased(text):
  """A config, and what it makes, compiled once for all tests."""
  config = small(
    text,
    balance=BIAS,
    depth=2,
    capacity_factor=0.5,
    priority="weight",
    router={"name": "top_k", "k": 2},
  )
  return config, experiment.make(config)


def steps(config, parts, count):
  """States and metrics after each of some steps."""
  state, data = parts.init(0), parts.task.train_iterator(0)
  for _ in range(count):
    *state, values = parts.step(*state, next(data))
    yield jax.device_get(tuple(state)), jax.device_get(values)


def test_one_expert_is_the_dense_model():
  shape = {"vocabulary": 7, "width": 8, "depth": 1, "heads": 2}
  mixture = {
    "experts": 1,
    "hidden": 32,
    "router": {"name": "top_k", "k": 1},
    "balance": {"name": "none"},
  }
  tokens = jnp.arange(10).reshape(2, 5) % 7

  @jax.jit
  def compare():
    dense = models.Transformer(**shape, rngs=nnx.Rngs(0))
    moe = models.MoETransformer(**shape, **mixture, rngs=nnx.Rngs(1))
    (block,), (of,) = moe.blocks, dense.blocks
    began = {n: block.mixture.experts[n][...].std() for n in ("up", "down")}
    for name in ("up", "down"):
      kernel = getattr(of, name).kernel[...]
      began[name] /= kernel.std()
      block.mixture.experts[name][...] = kernel[None]
    for name in ("attention", "attention_norm", "mlp_norm"):
      setattr(block, name, getattr(of, name))
    moe.embed, moe.norm, moe.readout = dense.embed, dense.norm, dense.readout
    return moe(tokens), dense(tokens), began

  logits, of_dense, began = compare()
  np.testing.assert_allclose(logits, of_dense, rtol=1e-4, atol=1e-5)
  # They begin alike, too: down is smaller the more blocks there are.
  assert began == {n: pytest.approx(1, abs=0.3) for n in ("up", "down")}


def test_the_loss_includes_the_auxiliary_loss(text):
  # Weights that are 1 whatever the logits: the router learns by it alone.
  router = {"name": "top_k", "k": 1, "renormalize": True}
  balance = {"name": "auxiliary", "coefficient": 0.5}
  config = small(text, router=router, balance=balance)
  config.optimizer.weight_decay = 0.0
  parts = experiment.make(config)
  before = jax.device_get(parts.init(0)[0])
  ((after, _), values), *_ = steps(config, parts, 1)
  kernel = lambda params: params["blocks"][0]["mixture"]["router"]["kernel"]
  assert (kernel(before) != kernel(after)).any()
  found = values["auxiliary_loss"]
  assert found == 0.5 * values["layer_0_load_balance"] > 0
  # What is reported as the loss is the task's.
  assert values["loss"] == pytest.approx(np.log(2) * values["bits_per_byte"])


def test_the_bias_moves_against_the_load_and_does_not_decay(biased):
  config, parts = biased
  assert config.optimizer.weight_decay > 0
  biases = np.zeros((2, 4), np.float32)
  for (params, _), values in steps(config, parts, 3):
    for layer, bias in enumerate(biases):
      load = [values[f"layer_{layer}_load_{expert}"] for expert in range(4)]
      assert sum(load) == pytest.approx(1)
      bias -= np.float32(BIAS["rate"]) * np.sign(np.array(load) - 0.25)
      mixture = params["blocks"][layer]["mixture"]
      np.testing.assert_array_equal(mixture["balance_bias"], bias)
  assert biases.any()


def test_a_method_does_not_see_the_bias(text):
  config = small(text, balance=BIAS)
  config.method = {"name": "static", "sparsity": 0.5}
  parts = experiment.make(config)
  state = jax.eval_shape(parts.init, 0)
  sparse = lambda x: isinstance(x, weights.SparseState)
  (found,) = filter(sparse, jax.tree.leaves(state[1], is_leaf=sparse))
  masked = [
    jax.tree_util.keystr(path, simple=True, separator="/")
    for path, _ in jax.tree.leaves_with_path(found.masks)
  ]
  assert any("mixture/experts/up" in name for name in masked)
  assert not any("balance_bias" in name for name in masked)
  batch = next(parts.task.train_iterator(0))
  after = jax.eval_shape(parts.step, *state, batch)
  assert jax.tree.structure(after[:2]) == jax.tree.structure(state)


def test_annealing_compiles_once(text):
  config = small(text, router=ANNEALED, balance={"name": "none"})
  parts = experiment.make(config)
  active = [values["active"] for _, values in steps(config, parts, 6)]
  assert parts.step._cache_size() == 1
  # All four experts are above 0.2 while it is hot; one is in the end.
  assert active[0] == 4
  assert active[-1] == pytest.approx(1, abs=0.1)
  assert sorted(active, reverse=True) == active


@pytest.fixture(scope="module")
def finished(biased, tmp_path_factory):
  config, parts = biased
  workdir = tmp_path_factory.mktemp("run")
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(training.experiment, "make", lambda _: parts)
    return workdir, list(training.train(config, workdir))


def test_what_mixtures_did_is_on_record(biased, finished):
  workdir, _ = finished
  records = workdirs.read_metrics(workdir)
  assert [r["step"] for r in records] == list(range(7))
  for record in records[1:]:
    for name in ("max_violation", "entropy", "dropped", "edges", "active"):
      layers = [record[f"train_layer_{layer}_{name}"] for layer in range(2)]
      assert record[f"train_{name}"] == pytest.approx(np.mean(layers))
    assert record["train_edges"] == 2
    assert 0.5 <= record["train_dropped"] < 1
    kept = 2 * (1 - record["train_layer_1_dropped"])
    assert record["train_layer_1_active"] == pytest.approx(kept)
  assert "validation_layer_1_load_3" in records[-1]
  assert (workdir / "routing.png").read_bytes().startswith(b"\x89PNG")
  assert list((workdir / "tensorboard").glob("events*"))


def test_the_summary_counts_what_a_token_meets(biased, finished):
  _, parts = biased
  summary = summaries.read(finished[0])
  edges = [summary[f"validation_layer_{layer}_active"] for layer in range(2)]
  experts = 2 * 8 * 8  # weights of one
  idle = sum((4 - active) * experts for active in edges)
  found = summary["parameters"] - summary["active_parameters"]
  assert found == pytest.approx(idle)
  weights, _ = flops.weights(parts, parts.init(0))
  forward = 2 * 7 * (weights - idle) + parts.other_flops
  assert summary["inference_flops"] == pytest.approx(forward)
  # In training others were dropped; a step costs three passes.
  records = workdirs.read_metrics(finished[0])[1:]
  mean = np.mean(
    [[r[f"train_layer_{i}_active"] for i in (0, 1)] for r in records]
  )
  forward = 2 * 7 * (weights - 2 * (4 - mean) * experts) + parts.other_flops
  assert summary["training_flops"] == pytest.approx(3 * forward * 4 * 6)
  table = report.table({"moe": [summary]})
  assert "parameters that a token meets" in table
  assert "experts a token" in table


def test_a_run_that_was_stopped_ends_as_if_it_never_had_been(
  biased, finished, tmp_path, monkeypatch
):
  config, parts = biased
  monkeypatch.setattr(training.experiment, "make", lambda _: parts)
  calls = iter(range(100))
  stop = lambda: next(calls) == 3
  records = list(training.train(config, tmp_path, stopped=stop))
  assert records[-1][0] == 4
  assert summaries.read(tmp_path) is None
  records += training.train(config, tmp_path)
  workdir, whole = finished
  assert records == whole
  with (
    workdirs.Checkpoints(tmp_path) as resumed,
    workdirs.Checkpoints(workdir) as other,
  ):
    like = jax.eval_shape(lambda: parts.init(0))
    restore = functools.partial(workdirs.Checkpoints.restore, step=6, like=like)
    states = [
      restore(kept, data=parts.task.train_iterator(0))
      for kept in (resumed, other)
    ]
  jax.tree.map(np.testing.assert_array_equal, *states)


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"experts": 0}, r"config.model.experts takes 1 or more; got 0"),
    ({"hidden": 0}, r"config.model.hidden takes 1 or more; got 0"),
    (
      {"capacity_factor": 0.0},
      r"config.model.capacity_factor takes more .* 0.0",
    ),
    ({"priority": "random"}, r"config.model.priority takes one of .*'random'"),
    ({"priority": "weight"}, r"priority='weight' takes a .*capacity_factor"),
    ({"router": {"name": "best"}}, r"model.router.name is 'best'; .* top_k"),
    ({"router": {"name": "top_k"}}, r"config.model.router.k is missing"),
    ({"router": {"name": "top_k", "k": 5}}, r"config.model.router: k .* got 5"),
    (
      {"router": {"name": "top_p", "p": 0.5, "k": 2}},
      r"config.model.router.k is not a setting here; it takes k_max, p",
    ),
    (
      {"router": {"name": "top_p", "p": 0.5, "k_max": 0}},
      r"config.model.router: k_max must be 1 to 4, got 0",
    ),
    ({"router": {"name": "top_p", "p": 1.5}}, r"config.model.router: p .* 1.5"),
    (
      {"router": ANNEALED | {"end": 0.0}},
      r"config.model.router.end takes more",
    ),
    ({"router": ANNEALED | {"threshold": 2}}, r"router: threshold must be"),
    ({"balance": {"name": "loss"}}, r"config.model.balance.name is 'loss'"),
    ({"balance": {"name": "auxiliary"}}, r"balance.coefficient is missing"),
    (
      {"balance": BIAS, "router": {"name": "top_p", "p": 0.5}},
      r"balance.name='bias' takes config.model.router.name='top_k'.* 'top_p'",
    ),
  ],
)
def test_a_wrong_setting_is_named(fields, message, text):
  with pytest.raises(ValueError, match=message):
    experiment.make(small(text, **fields))
