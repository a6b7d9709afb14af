"""The tasks: what they hold, that they repeat, what they refuse."""

import json

import numpy as np
import pytest

from experiments import tasks
from experiments.tasks import mnist1d
from experiments.tasks import text


def make_text(path, **settings):
  defaults = {
    "batch_size": 2,
    "glob": "*.txt",
    "sequence_length": 8,
    "validation_batches": 3,
  }
  return text.make(path=str(path), **defaults | settings)


def write(path, content):
  path.write_text(content)
  return path


def test_text_is_the_standard_library_split_by_file():
  train, validation = text.read()
  assert len(train) > 5 * len(validation)
  assert len(validation) > 100_000


def test_text_reads_files_in_the_order_of_their_names(tmp_path):
  names = [f"{i}.txt" for i in range(30)]
  for name in reversed(names):
    write(tmp_path / name, name)
  write(tmp_path / "other.md", "no")
  for part, of_validation in zip(
    text.read(str(tmp_path), "*.txt"), (False, True), strict=True
  ):
    chosen = [
      n for n in sorted(names) if text.is_validation(n) == of_validation
    ]
    assert chosen
    assert part.tobytes().decode() == "".join(n + "\0" for n in chosen)


def test_text_splits_a_file_by_place(tmp_path):
  path = write(tmp_path / "a", "0123456789" * 10)
  train, validation = text.read(str(path))
  assert len(train) == 90
  assert validation.tobytes() == b"0123456789"


def test_text_gives_each_side_a_file(tmp_path):
  names = [f"{i}.txt" for i in range(100)]
  alike = [[n for n in names if text.is_validation(n) == v] for v in (0, 1)]
  for of_validation, (a, b, *_) in enumerate(alike):
    directory = tmp_path / str(of_validation)
    directory.mkdir()
    write(directory / a, "a")
    write(directory / b, "b")
    parts = [p.tobytes() for p in text.read(str(directory), "*.txt")]
    assert sorted(parts) == [b"a\0", b"b\0"]


def test_text_splits_an_only_file_by_place(tmp_path):
  path = write(tmp_path / "a.txt", "0123456789" * 10)
  for got, want in zip(
    text.read(str(tmp_path), "*.txt"), text.read(str(path)), strict=True
  ):
    np.testing.assert_array_equal(got, want)
  make_text(tmp_path)


def test_text_windows_cover_the_text_and_share_a_byte():
  windows = text.Windows(np.arange(20, dtype=np.uint8), 8)
  assert len(windows) == 2
  np.testing.assert_array_equal(windows[0], np.arange(9))
  np.testing.assert_array_equal(windows[1], np.arange(8, 17))


def test_text_resumes_where_the_iterator_was(tmp_path):
  task = make_text(write(tmp_path / "a", "0123456789" * 100))
  iterator = task.train_iterator(0)
  for _ in range(100):  # more than one epoch
    next(iterator)
  state = json.loads(json.dumps(iterator.get_state()))
  wanted = [next(iterator) for _ in range(3)]
  resumed = task.train_iterator(0)
  resumed.set_state(state)
  np.testing.assert_array_equal([next(resumed) for _ in range(3)], wanted)


def test_text_epochs_and_seeds_differ_in_order_alone(tmp_path):
  path = write(tmp_path / "a", "0123456789abcdefg" * 40)

  def epochs(seed):
    iterator = make_text(path, batch_size=1).train_iterator(seed)
    windows = [next(iterator)[0].tobytes() for _ in range(2 * 76)]
    return windows[:76], windows[76:]

  first, second = epochs(0)
  other, _ = epochs(1)
  assert first == epochs(0)[0]
  assert first != second
  assert first != other
  assert sorted(first) == sorted(second) == sorted(other)


def test_text_validation_batches_have_one_size(tmp_path):
  path = write(tmp_path / "a", "0123456789" * 100)
  batches = make_text(path).validation
  assert [batch.shape for batch in batches] == [(2, 9)] * 3
  batches = make_text(path, batch_size=64).validation
  assert [batch.shape for batch in batches] == [(12, 9)]


def test_text_refuses_what_is_not_there(tmp_path):
  write(tmp_path / "a.md", "another kind of file")
  short = write(tmp_path / "short", "short")
  with pytest.raises(ValueError, match=r"config.task.path .*'/no/such'"):
    make_text("/no/such")
  with pytest.raises(ValueError, match=r"no file .* config.task.glob='\*.txt'"):
    make_text(tmp_path)
  with pytest.raises(ValueError, match=r"too few .*sequence_length=8"):
    make_text(short)
  with pytest.raises(ValueError, match=r"sequence_length takes 1 .* got 0"):
    make_text(short, sequence_length=0)
  with pytest.raises(ValueError, match=r"validation_batches .* 1 .* got 0"):
    make_text(short, validation_batches=0)


@pytest.mark.parametrize(
  ("name", "inputs", "validation"), [("digits", 64, 360), ("mnist1d", 40, 1000)]
)
def test_classification_shapes(name, inputs, validation):
  task = tasks.TASKS[name](batch_size=32)
  batch = next(task.train_iterator(0))
  assert batch["features"].shape == (32, inputs)
  assert batch["features"].dtype == np.float32
  assert batch["labels"].shape == (32,)
  assert task.model == {"inputs": inputs, "classes": 10}
  (held,) = task.validation
  assert held["features"].shape == (validation, inputs)


def test_mnist1d_is_its_seed_and_leaves_the_global_generators():
  np.random.seed(5)
  wanted = np.random.random()
  np.random.seed(5)
  a, b, c = (
    mnist1d.make(batch_size=1, examples=50, data_seed=seed)
    for seed in (1, 1, 2)
  )
  assert np.random.random() == wanted
  features = lambda task: task.validation[0]["features"]
  np.testing.assert_array_equal(features(a), features(b))
  assert not np.array_equal(features(a), features(c))


@pytest.mark.parametrize("examples", [0, 40, 55])
def test_mnist1d_refuses_examples(examples):
  with pytest.raises(ValueError, match=rf"examples takes .* got {examples}"):
    mnist1d.make(batch_size=1, examples=examples)
