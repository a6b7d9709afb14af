"""The matrix of features: what its cells show, and how it is printed."""

import jax.numpy as jnp
import pytest

from pallas_kernels import features


def test_two_features_of_two_backends():
  lines = []
  found = features.matrix(
    ("reference", "xla"), ("rule", "softcap"), progress=lines.append
  )
  yes = dict(reference="yes", xla="yes")
  assert found == dict(rule=yes, softcap=yes)
  assert lines[0] == "0/4 rule, reference" and len(lines) == 4
  assert features.table(found).splitlines() == [
    "         reference  xla",
    "rule     yes        yes",
    "softcap  yes        yes",
  ]


@pytest.mark.slow
def test_kernels_skip_as_the_definition_does():
  found = features.matrix(("tpu",), ("skip_threshold",))
  assert found == {"skip_threshold": {"tpu": "yes"}}


def raises(error):
  def run(case, backend):
    if backend == "xla":
      raise error
    return (jnp.ones(3),)

  return run


@pytest.mark.parametrize(
  "run,shown",
  [
    (raises(ValueError("backend 'xla' has no rule; use another")), "no"),
    (raises(ValueError("shapes")), "ValueError"),
    (raises(NotImplementedError()), "NotImplementedError"),
    (lambda case, backend: (jnp.ones(3) * (2 - len(backend) / 9),), "wrong"),
    (lambda case, backend: (jnp.full(3, jnp.nan),), "wrong"),
    (
      lambda case, backend: (jnp.full(3, [jnp.inf, 1][backend == "xla"]),),
      "wrong",
    ),
    (lambda case, backend: (jnp.full(3, -jnp.inf),), "yes"),
    (lambda case, backend: (jnp.ones(3, [int, float][backend == "xla"]),),
     "wrong"),
  ],
)  # fmt: skip
def test_what_a_cell_shows(monkeypatch, run, shown):
  monkeypatch.setattr(features, "_run", run)
  found = features.matrix(("reference", "xla"), ("rule",))
  assert found["rule"]["xla"] == shown


def test_main_prints_the_matrix_alone(monkeypatch, capsys):
  monkeypatch.setattr(features, "_run", lambda case, backend: (jnp.ones(3),))
  features.main()
  out, error = capsys.readouterr()
  rows = out.splitlines()
  assert len(rows) == 1 + len(features.FEATURES)
  assert rows[0].split() == ["reference", "xla", "tpu"]
  cells = 3 * len(features.FEATURES)
  assert f"{cells - 1}/{cells} {features.FEATURES[-1]}, tpu" in error


@pytest.mark.parametrize(
  "arguments,match",
  [
    (dict(backends=("cuda",)), "backends is"),
    (dict(backends="xla"), "backends is 'xla'"),
    (dict(features=("speed",)), "features is"),
  ],
)
def test_unknown_names(arguments, match):
  with pytest.raises(ValueError, match=match):
    features.matrix(**arguments)
