"""The cost model of a pod agrees with arithmetic by hand."""

import pytest

from experiments.benchmarks.studies import pods
from experiments.benchmarks.studies.pods import Chip


def test_compute_is_that_of_the_busiest_device():
  chip = Chip(1e12, 1e9, 1e-6, "ring", utilisation=0.5)
  assert pods.compute_seconds(chip, 2e9, 9, 4) == pytest.approx(3 * 2e9 / 0.5e12)


@pytest.mark.parametrize(("links", "hops"), [("ring", 30), ("torus", 12), ("tree", 8)])
def test_all_reduce(links, hops):
  chip = Chip(1e12, 1e9, 1e-6, links)
  want = 2 * 15 / 16 * 4e6 / 1e9 + hops * 1e-6
  assert pods.reduce_seconds(chip, 4_000_000, 16) == pytest.approx(want)


def test_more_steps_and_more_tasks_a_device_leave_less_to_communication():
  row = {
    "devices": 64,
    "task_flops_a_step": 3e8,
    "task_flops_besides": 6e9,
    "all_reduce_bytes": 5e5,
  }
  chip = pods.CHIPS["TPU v5e"]
  share = lambda steps, tasks: pods.communication(chip, row, steps, tasks)
  assert share(1000, 1) < share(100, 1) < share(10, 1) < 1
  sent = pods.reduce_seconds(chip, 500_000, 64)
  work = (3e8 * 100 + 6e9) / (197e12 * 0.3)
  assert share(100, 4) == pytest.approx(sent / (sent + 4 * work))
