"""What claims about procedures measure, on tiny settings: figures, no times."""

import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import claims
from experiments import tickets
from experiments.procedures import before_training
from experiments.procedures import firing
from experiments.procedures import mnist1d_mlp
from experiments.procedures import penalties
from experiments.procedures import soups
from experiments.procedures import timings
from experiments.procedures import under_masks

SMALL = {
  "lottery_ticket": (tickets.measure, {"steps": 12, "early": 4, "number": 2}),
  "sparse_soups": (soups.measure, {"dense": 20, "retrain": 10}),
  "synflow_999": (
    before_training.measure,
    {"width": 40, "depth": 3, "sparsity": 0.995, "steps": 2},
  ),
  "hypersparse": (penalties.measure, {"steps": 400, "fine_tuning": 10}),
  "lazy_neuron": (firing.emergence, {"narrow": 8, "wide": 8, "steps": 4}),
  "lazy_top_k": (firing.noise, {"kept": 2, "width": 16, "steps": 3}),
  "pixelfly": (
    timings.pixelfly,
    {"width": 64, "depth": 2, "steps": 3, "rounds": 1},
  ),
  "srigl_condensed": (
    timings.condensed,
    {"shape": (64, 32), "memory": 20_000, "rounds": 1},
  ),
}


@pytest.fixture(autouse=True, scope="module")
def tiny():
  """Networks of the claims, smaller."""
  with pytest.MonkeyPatch.context() as patch:
    for module in (tickets, soups, penalties):
      patch.setattr(module, "WIDTH", 16)
    yield


def test_every_procedure_is_measured_here():
  kinds = claims.CLAIMS.items()
  names = {n for n, claim in kinds if isinstance(claim, claims.Procedure)}
  assert names == set(SMALL)


@pytest.mark.parametrize("name", SMALL)
def test_a_measure_gives_the_figures_of_all_arms(name):
  claim, (measure, settings) = claims.CLAIMS[name], SMALL[name]
  assert claim.measure is measure
  point = {field: values[0] for field, values in claim.grid.items()}
  found = measure(3, **point, **settings)
  assert set(found) == set(claim.arms)
  for arm in found.values():
    assert set(arm) & set(claim.figures)
    assert all(np.isfinite(x) for x in arm.values())
  for *pair, figure in (*claim.better, *claim.besides):
    assert all(figure in found[arm] for arm in pair)
  if not claim.ratios:  # and no times: the same again
    assert measure(3, **point, **settings) == found
  assert all(map(str, claim.about().values()))


def test_orders_go_through_epochs():
  setting = mnist1d_mlp.setting(16, 2)
  order = setting.order(0, 83)
  assert order.shape == (83, mnist1d_mlp.BATCH) and order.dtype == np.int32
  for epoch in (order[:40], order[40:80]):
    assert sorted(epoch.ravel()) == list(range(4_000))
  assert (order[:40] != order[40:80]).any()
  np.testing.assert_array_equal(setting.order(0, 5), order[:5])
  batch = setting.batch(0, 7)
  assert batch["features"].shape == (7, 40) and batch["labels"].shape == (7,)


def test_a_ticket_goes_back_to_a_later_step():
  # Trainings as long as above: nothing is compiled for them.
  settings = {"number": 1, "rewind": 4, "steps": 16, "early": 4}
  found = list(tickets.rounds(0, learning_rate=1e-2, **settings))
  assert [round(density, 2) for density, _ in found] == [1, 0.8]
  # Undone, the ticket and a random mask of all weights are one network.
  dense = found[0][1]
  assert dense["ticket"] == dense["random"]
  assert dense["ticket"] != dense["reinitialized"]


def masks(*layers):
  kernels = [{"kernel": jnp.array(layer, bool)} for layer in layers]
  hidden = {i: layer for i, layer in enumerate(kernels[:-1])}
  return {"hidden": hidden, "readout": kernels[-1]}


def test_collapse_and_connection_of_masks():
  ones = np.ones((2, 2))
  assert before_training.connected(masks(ones, ones)) == 1
  assert before_training.collapsed(masks(ones, np.zeros((2, 3)))) == 1
  assert before_training.connected(masks(ones, np.zeros((2, 3)))) == 0
  # Of four weights two are a path; one begins nowhere, one ends nowhere.
  found = masks([[1, 1], [0, 0]], [[1, 0], [0, 0]], [[1, 0], [0, 0]])
  assert before_training.connected(found) == 3 / 4
  found = masks([[1, 0], [0, 0]], [[1, 0], [0, 0]], [[1, 0], [0, 1]])
  assert before_training.connected(found) == 3 / 4
  assert before_training.collapsed(found) == 0
  assert (
    before_training.connected(masks(np.zeros((2, 2)), np.zeros((2, 2)))) == 0
  )


def test_synflow_keeps_what_others_collapse():
  # 0.5% of four layers are some 30 weights.
  measure, settings = SMALL["synflow_999"]
  found = measure(0, learning_rate=1e-2, **settings)
  assert found["synflow"]["collapsed"] == 0
  assert found["synflow"]["connected"] > 0.5
  assert found["magnitude"]["connected"] < found["synflow"]["connected"]
  for arm in ("synflow", "snip", "grasp", "magnitude"):
    assert found[arm]["density"] == pytest.approx(0.005, abs=1e-4)


def test_l1_is_a_constant_slope_of_weights_alone():
  params = {"kernel": jnp.array([[2.0, -0.5], [0.0, 1.0]]), "bias": jnp.ones(2)}
  tx = penalties.add_l1(lambda count: 0.1 * (count + 1))
  zeros, state = jax.tree.map(jnp.zeros_like, params), tx.init(params)
  for step in (1, 2):
    updates, state = tx.update(zeros, state, params)
    # Tenths are no binary fractions.
    np.testing.assert_allclose(
      updates["kernel"], 0.1 * step * np.array([[1, -1], [0, 1]]), rtol=1e-6
    )
    assert not updates["bias"].any()


def test_a_penalty_makes_pruning_cheaper():
  measure, settings = SMALL["hypersparse"]
  found = measure(0, strength=3e-2, **settings)
  change = {arm: figures["loss_change"] for arm, figures in found.items()}
  assert change["hypersparse"] < change["none"] / 2


def test_forms_of_a_layer_are_one_function():
  shape = (48, 16)
  x = jax.random.normal(jax.random.key(0), (1, 48))
  forms = timings.layers(0, shape, 0.75)
  run = lambda arm: forms[arm][0](x, forms[arm][1])
  matrix = forms["csr"][1]
  assert matrix.nnz == 12 * 16  # of constant fan-in
  # Sums in other orders.
  for got in (run("masked"), (matrix @ np.asarray(x[0]))[None]):
    np.testing.assert_allclose(got, run("condensed"), rtol=1e-5, atol=1e-5)
  assert run("dense").shape == (1, 16)


def test_a_table_and_a_picture_of_tickets(tmp_path):
  figures = {"accuracy": 0.5, "loss": 1.0, "early_accuracy": 0.25}
  rows = [
    {"seed": s, "density": d, "arms": dict.fromkeys(tickets.ARMS, figures)}
    for s in range(2)
    for d in (1.0, 0.8)
  ]
  lines = tickets.table(rows).splitlines()
  assert len(lines) == 1 + 2 * 3
  assert lines[1].split()[:3] == ["100.0%", "ticket", "0.5000"]
  assert "[" not in tickets.table(rows[:1])
  tickets.draw(rows, tmp_path / "tickets.png")
  assert (tmp_path / "tickets.png").stat().st_size > 10_000


def test_the_launcher_of_tickets_writes_rows_and_a_picture(
  tmp_path, monkeypatch, capsys
):
  given = types.SimpleNamespace(
    workdir=str(tmp_path / "found"),
    seeds=2,
    rounds=1,
    fraction=0.5,
    steps=12,
    early=20,  # more than there are
    rewind=0,
    learning_rate=1e-2,
  )
  monkeypatch.setattr(tickets.flags, "FLAGS", given)
  tickets.main(["tickets"])
  found = json.loads((tmp_path / "found" / "tickets.json").read_text())
  assert [row["seed"] for row in found["rows"]] == [0, 0, 1, 1]
  assert found["about"]["fraction"] == 0.5
  for row in found["rows"]:  # all steps are early
    for figures in row["arms"].values():
      assert figures["early_accuracy"] == figures["accuracy"]
  assert "50.0%  reinitialized" in capsys.readouterr().out
  assert (tmp_path / "found" / "tickets.png").exists()


def test_density_counts_what_may_be_masked():
  tree = {"kernel": jnp.eye(4, dtype=bool), "bias": jnp.ones(4, bool)}
  assert under_masks.density(tree) == 1 / 4
