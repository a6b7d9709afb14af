"""Names of tensors, and settings that are refused."""

from flax import nnx
import pytest

from experiments.models import bert
from experiments.models import checkpoints
from experiments.models import llama
from sparsejax import paths
from tests.models import problem


@pytest.mark.parametrize(
  ("model_class", "config"),
  [
    (bert.Bert, bert.Config.read(problem.BERT)),
    (
      llama.Llama,
      llama.Config.read(
        problem.LLAMA | {"attention_bias": True, "mlp_bias": True}
      ),
    ),
  ],
)
def test_each_parameter_has_a_tensor_of_its_own(model_class, config):
  shapes = nnx.eval_shape(lambda: model_class(config, rngs=nnx.Rngs(0)))
  by_path, _ = paths.named(nnx.state(shapes, nnx.Param))
  names = [model_class.NAMES.tensor(path) for path in by_path]
  assert len(set(names)) == len(names)
  assert not any("*" in name for name in names)
  assert not any(model_class.NAMES.is_unused(name) for name in names)
  assert [model_class.NAMES.current(name) for name in names] == names


def test_names_in_older_files():
  names = bert.Bert.NAMES
  layer = "encoder.layer.11.attention.output.LayerNorm"
  assert names.current(f"bert.{layer}.gamma") == f"{layer}.weight"
  assert names.current(f"bert.{layer}.beta") == f"{layer}.bias"
  assert names.is_unused("pooler.dense.weight")
  assert not names.is_unused("classifier.weight")
  assert (
    names.tensor("blocks/11/attention_norm/scale")
    == "encoder.layer.11.attention.output.LayerNorm.weight"
  )


def test_kernels_are_transposed_and_nothing_else():
  assert checkpoints.is_transposed("blocks/3/up/kernel")
  for path in ("embed/embedding", "norm/scale", "blocks/3/up/bias"):
    assert not checkpoints.is_transposed(path)


def test_settings_that_cannot_be_hashed_are_refused():
  with pytest.raises(ValueError, match=r"act=\['a'\] is not supported"):
    checkpoints.refuse({"act": ["a"]}, act={"a": 1, "b": 2})
  checkpoints.refuse({}, act={"a": 1})
