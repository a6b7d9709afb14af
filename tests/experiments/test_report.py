"""The table and the picture."""

import pytest

from experiments import report

RECORDS = [
  {"step": 0, "validation_loss": 3.0, "density": 1.0},
  {"step": 5, "train_loss": 2.0},
  {"step": 10, "validation_loss": 1.0, "density": 0.5},
]
SUMMARY = {
  "step": 10,
  "validation_loss": 1.0,
  "training_flops": 2.5e9,
  "step_seconds": 0.0123,
}


def cells(text):
  rows = [line.split("  ") for line in text.splitlines()]
  return [[cell.strip() for cell in row if cell.strip()] for row in rows]


def test_table_of_single_runs():
  other = SUMMARY | {"validation_loss": 0.5, "step_seconds": None}
  text = report.table({"dense": [SUMMARY], "rigl": [other]})
  rows = cells(text)
  assert ["dense", "rigl"] in rows
  assert ["validation loss (nats)", "1.0000", "0.5000"] in rows
  assert ["training FLOPs", "2.5 G", "2.5 G"] in rows
  assert ["step time (ms)", "12.3", "-"] in rows
  assert "density" not in text
  assert "counted, not measured" in text


def test_table_of_several_seeds_has_intervals():
  seeds = [SUMMARY | {"validation_loss": value} for value in (1, 2, 3)]
  rows = cells(report.table({"rigl": seeds}))
  assert ["validation loss (nats)", "2.0000 ± 2.4841"] in rows


def test_compare_writes_a_picture_and_the_table(tmp_path):
  runs = {"a": [(SUMMARY, RECORDS)], "b": [(SUMMARY, RECORDS)] * 2}
  text = report.compare(tmp_path, runs, "validation_loss")
  assert (tmp_path / "table.txt").read_text() == text + "\n"
  assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_loads_are_drawn_where_there_are_any(tmp_path, monkeypatch):
  path, figures = tmp_path / "routing.png", []
  close = report.plt.close
  monkeypatch.setattr(report.plt, "close", figures.append)
  report.loads(path, RECORDS)
  assert not path.exists()
  layers = {
    f"train_layer_{layer}_{name}": value
    for layer in range(2)
    for name, value in {
      "load_0": 0.25,
      "load_1": 0.75,
      "load_balance": 1.5,
      "max_violation": 0.5,
      "dropped": 0.1,
    }.items()
  }
  report.loads(path, [{"step": s} | layers for s in (10, 20, 30)])
  assert path.read_bytes().startswith(b"\x89PNG")
  (figure,) = figures
  close(figure)
  assert [ax.get_title("left") for ax in figure.axes[::3]] == [
    "layer 0",
    "layer 1",
  ]
  shares, violation, dropped = figure.axes[3:]
  assert len(shares.collections) == 2
  assert violation.lines[0].get_ydata() == pytest.approx([0.5] * 3)
  assert dropped.lines[0].get_ydata() == pytest.approx([0.1] * 3)
  # Records are told by their steps.
  labels = [text.get_text() for text in shares.get_xticklabels()]
  assert [label for label in labels if label] == ["10", "20", "30"]


def test_an_unknown_metric_is_named(tmp_path):
  with pytest.raises(ValueError, match="no record has the metric 'loss'"):
    report.compare(tmp_path, {"a": [(SUMMARY, RECORDS)]}, "loss")
