"""Run an update: draw its tasks, place them on the devices, and call compiled programs.

With micro_batches = 1 an update runs one program. Otherwise a first program runs for each part of
the tasks, a second adds the sums of the parts, and a third updates the state.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from shrinkmeta.base import MetaLearner, MetaState, PerTask, Sums
from shrinkmeta.checks import validate
from shrinkmeta.devices.batching import num_tasks
from shrinkmeta.devices.memory import ProgramCost, give_back, program_cost
from shrinkmeta.devices.placement import place_state, place_tasks, share_of_tasks
from shrinkmeta.devices.processes import check_program, together
from shrinkmeta.learner.kept import kept
from shrinkmeta.learner.statistics import Statistics
from shrinkmeta.model.outputs import check_targets
from shrinkmeta.model.tasks import Task, check_tasks
from shrinkmeta.model.variants import with_constants
from shrinkmeta.training.records import measured
from shrinkmeta.training.stopping import Watchdog

PyTree = Any
Source = Callable[[int, int], Task]  # (first, count) -> the tasks first to first + count - 1
Update = Callable[[MetaState, int], tuple[MetaState, PyTree]]  # (state, step) -> (state, record)


def build_update(
  learner: MetaLearner,
  state: MetaState,
  source: Source,
  meta_batch: int,
  micro_batches: int,
  key: jax.Array | None,
  watchdog: Watchdog,
  refresh: Statistics | None = None,
) -> Update:
  """Build the function that draws the tasks of a step and updates the state.

  Args:
    learner: the learner.
    state: a state that is placed on the devices. The new states are placed in the same way.
    source: the function (first, count) -> Task.
    meta_batch: the number of tasks per update.
    micro_batches: the number of parts in which the tasks run. It divides `meta_batch`.
    key: a random key, into which each update folds its step. None if the learner draws nothing.
    watchdog: the watchdog of the run. It does not count while a program compiles.
    refresh: makes the new constants of a task: see `learner.refresh`. None: they never change.

  Returns:
    update(state, step) -> (new state, log record). The log record is that of `measured`. The old
    state is donated.
  """
  count = meta_batch // micro_batches
  draw = _drawing(source, learner, count, micro_batches)
  key = place_state(key, learner.spec.mesh)
  # The new state overwrites the old one and keeps its placement. Constants are another argument:
  # they are not donated, and no program returns a copy of those that never change.
  options: dict[str, Any] = {"donate_argnums": 0}
  if learner.spec.mesh is not None:
    placed = jax.tree.map(lambda x: x.sharding, state)
    record = None if refresh is None else (None, placed.constants)
    options["out_shardings"] = (placed._replace(constants=None), record)

  if micro_batches == 1:
    whole = kept(learner, _whole) if refresh is None else _whole(learner, refresh)
    update = compile_per_shape(whole, watchdog, _advice(learner), **options)

    def at_once(state: MetaState, step: int) -> tuple[MetaState, PyTree]:
      tasks, constants = draw(step * meta_batch, state), state.constants
      state, record = update(state._replace(constants=None), constants, tasks, key)
      if refresh is not None:
        record, constants = record
      return state._replace(constants=constants), record

    return at_once

  part, finish = kept(learner, _parts)
  part = compile_per_shape(part, watchdog, _advice(learner))
  finish = compile_per_shape(finish, watchdog, None, **options)
  # On a CPU two programs with a collective must not run at once, as in `fit`
  # (docs/hazards.md#host-device-collectives).
  wait = jax.block_until_ready if jax.default_backend() == "cpu" else lambda x: x

  def in_parts(state: MetaState, step: int) -> tuple[MetaState, PyTree]:
    first = step * meta_batch
    total, per_task = wait(part(state, draw(first, state), np.int32(0), key))
    for start in range(count, meta_batch, count):
      sums, per_task = wait(part(state, draw(first + start, state), np.int32(start), key))
      total = _add(total, sums)
    # The log record holds no value of a single task, so the last part's PerTask is enough.
    new, record = finish(state._replace(constants=None), total, per_task)
    return new._replace(constants=state.constants), record

  return in_parts


def _whole(learner: MetaLearner, refresh: Statistics | None = None) -> Callable[..., Any]:
  """Build the update of all tasks at once, for the `refresh` of `build_update`."""

  def whole(
    state: MetaState, constants: PyTree, tasks: Task, key: jax.Array | None
  ) -> tuple[MetaState, PyTree]:
    state = state._replace(constants=constants)
    state, metrics = learner.update(state, tasks, _key_at(state, key))
    record = measured(learner, state, metrics)
    if refresh is not None:
      record = (record, learner.refresh(state, tasks, refresh).constants)
    return state._replace(constants=None), record

  return whole


def _parts(learner: MetaLearner) -> tuple[Callable[..., Any], Callable[..., Any]]:
  """Build the sums of a part of the tasks, and the update with the sums of all parts."""

  def part(
    state: MetaState, tasks: Task, first: jax.typing.ArrayLike, key: jax.Array | None
  ) -> tuple[Sums, PerTask]:
    return learner.sums(state, tasks, _key_at(state, key), first=first)

  def finish(state: MetaState, sums: Sums, per_task: PerTask) -> tuple[MetaState, PyTree]:
    state, metrics = learner.apply(state, sums, per_task)
    return state, measured(learner, state, metrics)

  return part, finish


@functools.partial(jax.jit, donate_argnums=0)
def _add(a: Sums, b: Sums) -> Sums:
  return jax.tree.map(jnp.add, a, b)


def _key_at(state: MetaState, key: jax.Array | None) -> jax.Array | None:
  """Return the key of the update that begins at `state`."""
  return None if key is None else jax.random.fold_in(key, state.step)


def _drawing(
  source: Source, learner: MetaLearner, count: int, checks: int
) -> Callable[[int, MetaState], Task]:
  """Build draw(first, state), which draws, pads and places this process's share of `count` tasks.

  The first `checks` draws check the targets. In a program no value is known, and a wrong target
  only makes its task count as failed. If such a draw fails in one process, all processes stop.
  """
  spec, mesh = learner.spec, learner.spec.mesh
  offset, mine, share = share_of_tasks(count, mesh)

  def drawn(first: int, wanted: int) -> Task:
    tasks = source(first, wanted)
    validate.instance(f"tasks({first}, {wanted})", tasks, Task, "a shrinkmeta.Task(train, val)")
    if (found := num_tasks(tasks)) != wanted:
      raise ValueError(
        f"tasks({first}, {wanted}) returned {found} tasks; {wanted} were asked for. The second "
        "argument is how many to return: here this process' share of meta_batch."
      )
    return tasks

  def checked(first: int, wanted: int, state: MetaState) -> Task:
    tasks = drawn(first, wanted)
    # Traced, they are checked for their structure only: one with NaN fails alone.
    jax.eval_shape(lambda tasks: check_tasks(tasks, needs_val=spec.needs_validation), tasks)
    likelihood = with_constants(spec.likelihood, state.constants)
    check_targets(likelihood, f"tasks({first}, {wanted})", tasks, state.phi)
    return tasks

  def draw(first: int, state: MetaState) -> Task:
    nonlocal checks
    # More devices than tasks: a process without tasks passes one as a template for padding.
    first, wanted = (first + offset, mine) if mine else (first, 1)
    if checks > 0:
      checks -= 1
      tasks = together(lambda: checked(first, wanted, state))
    else:
      tasks = drawn(first, wanted)
    return place_tasks(tasks, mesh, share, mine)

  return draw


def compile_per_shape(
  f: Callable[..., Any], watchdog: Watchdog, advice: str | None = "", **options: Any
) -> Callable[..., Any]:
  """Compile `f` once for each structure and shapes of arguments, and log the memory it needs.

  Several processes first compare their programs.

  Args:
    f: the function.
    watchdog: the watchdog of the run. It does not count while a program compiles.
    advice: what the user can do if a program needs more memory than the device has. None logs no
      memory.
    **options: options of `jax.jit`.

  Returns:
    A function with the arguments and results of `f`.
  """
  programs: dict[Any, jax.stages.Compiled] = {}

  def call(*args: Any) -> Any:
    leaves, structure = jax.tree.flatten(args)
    shapes = structure, *((jnp.shape(x), jnp.result_type(x)) for x in leaves)
    if shapes not in programs:
      watched = watchdog.stop()
      lowered = jax.jit(f, **options).lower(*args)
      check_program(lowered)
      programs[shapes] = lowered.compile()
      give_back()
      if advice is not None:
        _log_memory(program_cost(programs[shapes]), advice)
      if watched:
        watchdog.start()
    return programs[shapes](*args)

  return call


def _advice(learner: MetaLearner) -> str:
  """Return what the user can do if an update needs more memory than the device has."""
  if learner.spec.sees_all_tasks:
    return "One term joins all tasks of an update: use a smaller meta_batch, or more devices"
  return (
    'Give the learner batching="sequential" or a small number of tasks at once, give fit more '
    "micro_batches, or both"
  )


def _log_memory(needed: ProgramCost | None, advice: str) -> None:
  """Log the memory that a program needs, and raise MemoryError if the device has less."""
  logging.info("An update needs %s.", needed or "an amount of memory this backend does not report")
  limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
  if needed is not None and limit is not None and needed.bytes > limit:
    raise MemoryError(
      f"An update needs {needed}, but the device has {limit / 1e6:,.1f} MB. {advice}."
    )
