"""The backends that every kernel here has."""

from jax import lax

BACKENDS = ("tpu", "xla", "reference")


def check(backend, interpret):
  """Raises a ValueError for a name that is none, or nothing to interpret."""
  if backend is not None and backend not in BACKENDS:
    raise ValueError(
      f"backend is {backend!r}; it takes None or one of {BACKENDS}."
    )
  if interpret and backend != "tpu":
    raise ValueError(
      f"interpret is {interpret!r} with backend {backend!r}; it runs a Pallas "
      "kernel, so name one: backend='tpu'."
    )


def choose(backend, kernel, fallback, lacks, args):
  """Runs the backend asked for on the arguments, or for "auto" the platform's.

  Args:
    backend: "auto", "tpu" or "xla".
    kernel: what runs on TPU.
    fallback: the same in plain XLA.
    lacks: what the kernel cannot do of this call, or None.
    args: of either.
  """
  if backend == "xla" or (backend == "auto" and lacks):
    return fallback(*args)
  if backend == "tpu":
    if lacks:
      raise ValueError(f"backend 'tpu' has no {lacks}; use 'xla' or None.")
    return kernel(*args)
  return lax.platform_dependent(*args, tpu=kernel, default=fallback)
