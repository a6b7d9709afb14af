"""The TPU kernels' schedules against splash attention's, compiled together."""

import importlib.util

import pytest

from experiments.bench import schedules

pytestmark = [
  pytest.mark.slow,
  pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu is not installed (the extra aot)",
  ),
]


@pytest.mark.parametrize("block", [128, 512])
def test_a_step_takes_no_more_bundles_than_splash_attention(block):
  ours, theirs = schedules.ours(block, fuse=1), schedules.theirs(block)
  assert set(ours) == set(theirs) == set(schedules.KERNELS)
  for kernel in schedules.KERNELS:
    assert ours[kernel].whole_step <= theirs[kernel].whole_step, kernel


@pytest.mark.parametrize("block", [128, 512])
def test_a_body_does_all_the_products(block):
  # A v6e MXU takes 8 rows a slot against a tile of 256 x 256.
  slots = block / 8 * -(-block // 256)
  products = {"forward": 2, "dq": 3, "dkv": 4}
  for kernel, schedule in schedules.ours(block, fuse=1).items():
    assert schedule.mxu_slots >= products[kernel] * slots, kernel


def test_small_blocks_fused_fill_the_unit():
  at_most = {"forward": 90, "dq": 90, "dkv": 110}
  for kernel, schedule in schedules.ours(128, fuse=4).items():
    hot = min(schedule.body, *schedule.other_bodies)
    assert hot / 4 <= at_most[kernel], kernel
