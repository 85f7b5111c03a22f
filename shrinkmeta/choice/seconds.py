"""Measure the time to adapt a set of modules, with all other modules frozen."""

import statistics
import time
from typing import Any

import jax

from shrinkmeta.base import MetaLearner, MetaState
from shrinkmeta.devices.batching import leading
from shrinkmeta.model.tasks import Batch


def seconds_a_task(
  learner: MetaLearner,
  state: MetaState,
  chosen: tuple[str, ...],
  batches: Batch,
  key: Any,
  repeats: int,
) -> float:
  """Return the seconds that `learner.keep(state, chosen)` takes to adapt one task.

  A first run, which compiles the program, is not timed. Each timed run waits for its results.

  Args:
    learner: the learner.
    state: a state of this learner.
    chosen: the task-specific modules. The time of the empty set is 0.
    batches: training data of T tasks, leaves [T, N, ...].
    key: a random key for the mini-batches of the inner loop, or None.
    repeats: the number of timed runs.

  Returns:
    the median over runs of (seconds of a run) / T, or NaN if `repeats` is 0.
  """
  if not repeats:
    return float("nan")
  if not chosen:
    return 0.0
  kept, state = learner.keep(state, chosen)
  adapt = jax.jit(lambda state, batches, key: kept.adapt_tasks(state, batches, key=key))
  run = lambda: jax.block_until_ready(adapt(state, batches, key))
  run()
  seconds = []
  for _ in range(repeats):
    begin = time.perf_counter()
    run()
    seconds.append(time.perf_counter() - begin)
  return statistics.median(seconds) / leading(batches)
