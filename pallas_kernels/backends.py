"""The backends that every kernel here has."""

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
