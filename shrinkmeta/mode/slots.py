"""Run the inner loops of many tasks at once; a task that has finished makes room for the next.

`vmap` of a loop that may stop early runs until the slowest task stops. The steps that it makes for
the other tasks meanwhile are thrown away. Here a fixed number of slots step together, with one task
in each slot. When a task finishes, a waiting task takes its slot. So T tasks take about
(sum of their steps) / slots steps. With `vmap`, every block of tasks would take as many steps as
its slowest task.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from shrinkmeta.config import Inner
from shrinkmeta.mode.optimise import Descent, Loop, loop
from shrinkmeta.mode.task_model import TaskModel
from shrinkmeta.model.tasks import Batch

PyTree = Any


def run_loops(
  inner: Inner,
  model_of: Callable[[Batch], TaskModel],
  batches: Batch,
  keys: jax.Array | None,
  starts: PyTree | None,
  steps: int | jax.Array | None,
  slots: int,
) -> Descent:
  """Run the inner loops of T tasks, `slots` at a time; a converged task is replaced by the next.

  Unlike `posterior_mode`, this function computes the outputs of frozen modules in every step.
  Keeping them would need extra memory for every slot.

  Args:
    inner: the optimiser, its steps and its tolerance.
    model_of: builds the task model of one task from its data.
    batches: training data, leaves [T, N, ...].
    keys: [T] keys for mini-batches, or None.
    starts: z to begin from, leaves [T, ...], or None for 0.
    steps: replaces inner.steps.
    slots: how many loops run at once.

  Returns:
    the last state of each loop, leaves [T, ...], without the state of its optimiser. The argument
    `end` of `posterior_mode` takes the last state of one task.
  """
  until = inner.steps if steps is None else steps

  def loop_of(task: tuple[Any, ...]) -> Loop:
    batch, key, _ = task
    return loop(inner, model_of(batch), key)

  return drain(
    begin=lambda task: loop_of(task).begin(task[2]),
    unfinished=lambda at: (at.step < until) & ~at.done,
    step=lambda task, at: loop_of(task).step(at),
    keep=lambda at: at._replace(opt_state=()),
    tasks=(batches, keys, starts),
    slots=slots,
  )[0]


def drain(
  begin: Callable[[PyTree], PyTree],
  unfinished: Callable[[PyTree], jax.Array],
  step: Callable[[PyTree, PyTree], PyTree],
  keep: Callable[[PyTree], PyTree],
  tasks: PyTree,
  slots: int,
) -> tuple[PyTree, jax.Array]:
  """Run the loop of every task to its end.

  Args:
    begin: task -> the first state of its loop.
    unfinished: state -> bool [], whether the loop makes another step.
    step: (task, state) -> the next state.
    keep: the last state of a loop -> the part of it that is returned.
    tasks: leaves [T, ...].
    slots: how many loops run at once.

  Returns:
    (the kept parts, leaves [T, ...]; the number of steps [], in each of which all slots step at
    once).
  """
  count = jax.tree.leaves(tasks)[0].shape[0]
  slots = min(slots, count)
  pick = lambda index: jax.tree.map(lambda x: jnp.asarray(x)[jnp.minimum(index, count - 1)], tasks)
  choose = lambda which, new, old: jax.tree.map(
    lambda a, b: jnp.where(which.reshape(-1, *[1] * (a.ndim - 1)), a, b), new, old
  )
  index = jnp.arange(slots)  # the task in each slot; `count` in an empty slot
  state = jax.vmap(begin)(pick(index))
  kept = jax.eval_shape(jax.vmap(keep), state)
  kept = jax.tree.map(lambda x: jnp.zeros((count, *x.shape[1:]), x.dtype), kept)

  def round_(loop: tuple[Any, ...]) -> tuple[Any, ...]:
    index, waiting, state, kept, steps = loop
    taken, data = index < count, pick(index)

    def all_busy(inner: tuple[Any, ...]) -> jax.Array:
      return jnp.all(jax.vmap(unfinished)(inner[0]) | ~taken)

    def advance(inner: tuple[Any, ...]) -> tuple[Any, ...]:
      return jax.vmap(step)(data, inner[0]), inner[1] + 1

    state, steps = jax.lax.while_loop(all_busy, advance, (state, steps))
    left = taken & ~jax.vmap(unfinished)(state)
    at = jnp.where(left, index, count)  # `count` is out of range: `set` drops these values
    kept = jax.tree.map(lambda x, y: x.at[at].set(y, mode="drop"), kept, jax.vmap(keep)(state))
    index = jnp.where(left, jnp.minimum(waiting + jnp.cumsum(left) - 1, count), index)
    state = choose(left, jax.vmap(begin)(pick(index)), state)
    return index, waiting + jnp.sum(left), state, kept, steps

  start = (index, jnp.asarray(slots), state, kept, jnp.zeros([], jnp.int32))
  end = jax.lax.while_loop(lambda loop: jnp.any(loop[0] < count), round_, start)
  return end[3], end[4]
