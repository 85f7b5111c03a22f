"""Every task runs its own loop to the end, and the steps of a block are counted exactly."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shrinkmeta.mode.slots import drain


def countdown(lengths, slots):
  """Task t counts from 0 to lengths[t], adding its number to a sum."""
  tasks = {"length": jnp.asarray(lengths), "name": jnp.arange(len(lengths), dtype=jnp.float32)}
  return jax.jit(
    lambda tasks: drain(
      lambda task: {"left": task["length"], "sum": jnp.zeros(2)},
      lambda state: state["left"] > 0,
      lambda task, state: {"left": state["left"] - 1, "sum": state["sum"] + task["name"]},
      lambda state: state["sum"],
      tasks,
      slots,
    )
  )(tasks)


@pytest.mark.parametrize("slots", (1, 2, 3, 7, 20))
def test_every_task_takes_its_own_steps(slots):
  lengths = [3, 0, 9, 1, 4, 4, 2]
  kept, _ = countdown(lengths, slots)
  want = np.array(lengths)[:, None] * np.arange(7)[:, None] * np.ones(2)
  np.testing.assert_array_equal(kept, want)


def test_a_finished_task_makes_room():
  """One slot: the sum of the steps. Two: the long task beside the rest. All: the longest."""
  lengths = [10, 1, 2, 3, 4]
  assert [int(countdown(lengths, slots)[1]) for slots in (1, 2, 5)] == [20, 10, 10]
  # In blocks of two without refilling it would be max(1, 9) + max(9, 1) + 1.
  assert int(countdown([1, 9, 9, 1, 1], 2)[1]) == 11


def test_a_task_that_ends_in_nan_stays_alone():
  tasks = jnp.array([1.0, jnp.nan, 3.0])
  kept, _ = drain(
    lambda task: (task, 0),
    lambda s: s[1] < 2,
    lambda _, s: (s[0] * 2, s[1] + 1),
    lambda s: s[0],
    tasks,
    2,
  )
  np.testing.assert_array_equal(kept, [4.0, np.nan, 12.0])
