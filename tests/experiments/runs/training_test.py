from typing import Any

import jax

import shrinkmeta as sm
from experiments.runs import training


def test_tasks_take_the_devices_that_shorten_the_longest_share(monkeypatch):
  monkeypatch.setattr(jax, "device_count", lambda: 4)
  monkeypatch.setattr(jax, "devices", lambda: ["a", "b", "c", "d"])
  monkeypatch.setattr(sm, "task_mesh", len)
  devices = [training.host_mesh(tasks) for tasks in (1, 2, 3, 4, 5, 6, 7, 8, 9, 25)]
  assert devices == [None, 2, 3, 4, 3, 3, 4, 4, 3, 4]


def test_steps_that_waited_for_compilation_are_counted_apart():
  state: Any = None  # handed on as it is
  rows = [
    {"step": 0, "seconds": 9.0, "started": 1.0},
    {"step": 1, "seconds": 1.0},
    {"step": 2, "seconds": 2.0},
  ]
  found = training.trained(state, rows)
  assert found.seconds == {"compile": 9.0, "train": 3.0}
  assert found.history == {"step": [0.0, 1.0, 2.0], "seconds": [9.0, 1.0, 2.0]}
  goes_on = training.trained(state, [*rows, {"step": 3, "seconds": 7.0, "started": 1.0}])
  assert goes_on.seconds == {"compile": 16.0, "train": 3.0}
  assert training.trained(state, []).seconds == {"compile": 0.0, "train": 0.0}
