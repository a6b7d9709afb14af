"""The ragged exchange on CPU against a loop over slices, and its gradients."""

import functools

import jax
import numpy as np
import pytest

from sparsejax import routing
from tests.routing import problem

DEVICES, SLICES = 8, 16  # two slices for each device
ROWS, ROOM, WIDTH = 9, 40, 3


@functools.cache
def mesh():
  return jax.make_mesh(
    (DEVICES,), ("expert",), axis_types=(jax.sharding.AxisType.Auto,)
  )


def draw(seed):
  """Offsets and sizes [devices, slices] that overlap nowhere they arrive."""
  rng = np.random.default_rng(seed)
  send = rng.integers(0, 4, (DEVICES, SLICES))
  begin = rng.integers(0, ROWS - send + 1)
  lands = np.zeros_like(send)
  receive = np.zeros_like(send)
  for to in range(DEVICES):
    arriving = [(d, 2 * to + j) for d in range(DEVICES) for j in range(2)]
    # The j-th slice of device d is the (2 d + j)-th that comes.
    receive[to] = [send[at] for at in arriving]
    order, at = rng.permutation(len(arriving)), 0
    gaps = ROOM - receive[to].sum()
    for i in order:
      gap = rng.integers(0, gaps + 1) if rng.random() < 0.3 else 0
      gaps -= gap
      lands[arriving[i]] = at + gap
      at += gap + receive[to][i]
    if seed == 0:
      assert gaps >= 0
  return [x.astype(np.int32) for x in (begin, send, lands, receive)]


def loop(operand, output, begin, send, lands, receive):
  """What is sent, row by row."""
  del receive
  output = output.copy()
  for d in range(DEVICES):
    for k in range(SLICES):
      for row in range(send[d, k]):
        output[k // 2, lands[d, k] + row] = operand[d, begin[d, k] + row]
  return output


@functools.cache
def compiled():
  def local(operand, output, *slices, cotangent):
    run = lambda operand, output: routing.ragged_all_to_all(
      operand, output, *slices, axis_name="expert"
    )
    out, pull = jax.vjp(run, operand, output)
    tangent = jax.jvp(run, (operand, output), (operand**2, output**2))[1]
    return out, *pull(cotangent), tangent

  def whole(operand, output, *slices, cotangent):
    flat = lambda x: x.reshape(-1, *x.shape[2:])
    by_device = jax.P("expert")
    run = jax.shard_map(
      lambda *args: local(*args[:-1], cotangent=args[-1]),
      mesh=mesh(),
      in_specs=(by_device,) * 7,
      out_specs=by_device,
    )
    outs = run(*map(flat, (operand, output, *slices, cotangent)))
    return [x.reshape(DEVICES, -1, WIDTH) for x in outs]

  return problem.jit(whole)


@pytest.mark.parametrize("seed", range(3))
def test_against_a_loop(seed):
  slices = draw(seed)
  operand = problem.normal(seed, DEVICES, ROWS, WIDTH)
  output = problem.normal(seed + 1, DEVICES, ROOM, WIDTH)
  cotangent = problem.normal(seed + 2, DEVICES, ROOM, WIDTH)
  got = compiled()(operand, output, *slices, cotangent=cotangent)
  np.testing.assert_array_equal(got[0], loop(operand, output, *slices))
  # It is linear: a row of the operand has the sum of the cotangents of where it
  # went, one of the output its own, or none where it was overwritten.
  numbers = np.arange(ROWS * DEVICES).reshape(DEVICES, ROWS)
  source = loop(numbers, np.full((DEVICES, ROOM), -1), *slices)
  of_operand = np.zeros((DEVICES * ROWS, WIDTH))
  for to in range(DEVICES):
    for row in range(ROOM):
      if source[to, row] >= 0:
        of_operand[source[to, row]] += cotangent[to, row]
  problem.close(got[1].reshape(-1, WIDTH), of_operand)
  want = np.where((source >= 0)[..., None], 0, cotangent)
  np.testing.assert_array_equal(got[2], want)
  want = loop(operand**2, output**2, *slices)
  np.testing.assert_array_equal(got[3], want)
  assert compiled()._cache_size() == 1


def test_what_is_not_sent_may_be_anything():
  begin, send, lands, receive = draw(0)
  sent = np.zeros((DEVICES, ROWS), bool)
  for d in range(DEVICES):
    for k in range(SLICES):
      sent[d, begin[d, k] : begin[d, k] + send[d, k]] = True
  assert not sent.all()
  operand = problem.normal(0, DEVICES, ROWS, WIDTH)
  operand[~sent] = np.nan
  output = np.zeros((DEVICES, ROOM, WIDTH), np.float32)
  out, back, *_ = compiled()(
    operand, output, begin, send, lands, receive, cotangent=output + 1
  )
  assert np.isfinite(out).all()
  assert not np.asarray(back)[~sent].any()


@pytest.mark.parametrize(
  "argument, change",
  [
    ("input_offsets", dict(input_offsets=np.zeros(3, np.int32))),
    ("input_offsets", dict(input_offsets=np.zeros((8, 1), np.int32))),
    ("send_sizes", dict(send_sizes=np.zeros(16, np.int32))),
    ("output_offsets", dict(output_offsets=np.zeros(1, np.int32))),
    ("recv_sizes", dict(recv_sizes=np.zeros(9, np.int32))),
    ("output", dict(output=np.zeros((4, 2), np.float32))),
    ("output", dict(output=np.zeros((4, 3), np.int32))),
  ],
)
def test_errors_name_the_argument(argument, change):
  zeros = np.zeros(8, np.int32)
  given = dict(
    operand=np.zeros((4, 3), np.float32),
    output=np.zeros((4, 3), np.float32),
    input_offsets=zeros,
    send_sizes=zeros,
    output_offsets=zeros,
    recv_sizes=zeros,
  )
  call = jax.shard_map(
    lambda: routing.ragged_all_to_all(**given | change, axis_name="expert"),
    mesh=mesh(),
    in_specs=(),
    out_specs=jax.P("expert"),
  )
  with pytest.raises(ValueError, match=rf"^{argument}\b.*got"):
    jax.eval_shape(call)
