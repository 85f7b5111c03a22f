"""Loops of many tasks at once, in which a task that is finished makes room for the next.

`vmap` of a loop that may stop early runs until the slowest of its tasks stops, and the others'
steps are thrown away. Here a fixed number of slots step together; a finished task leaves its slot
to one that waits, so that all T take about (sum of their steps) / slots steps of the block instead
of (longest) a block.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

PyTree = Any


def drain(
  begin: Callable[[PyTree], PyTree],
  unfinished: Callable[[PyTree], jax.Array],
  step: Callable[[PyTree, PyTree], PyTree],
  keep: Callable[[PyTree], PyTree],
  tasks: PyTree,
  slots: int,
) -> tuple[PyTree, jax.Array]:
  """Runs every task's loop to its end.

  Args:
    begin: task -> state where its loop begins.
    unfinished: state -> bool [], whether to step on.
    step: (task, state) -> state.
    keep: state -> what is kept of it in the end.
    tasks: leaves lead with [T].
    slots: how many loops run at once.

  Returns:
    what was kept, leaves [T, ...], and the number of steps that the block took [].
  """
  count = jax.tree.leaves(tasks)[0].shape[0]
  slots = min(slots, count)
  pick = lambda index: jax.tree.map(lambda x: x[jnp.minimum(index, count - 1)], tasks)
  choose = lambda which, new, old: jax.tree.map(
    lambda a, b: jnp.where(which.reshape(-1, *[1] * (a.ndim - 1)), a, b), new, old
  )
  index = jnp.arange(slots)  # the task in each slot; `count` where there is none left
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
    at = jnp.where(left, index, count)  # a row out of range is dropped
    kept = jax.tree.map(lambda x, y: x.at[at].set(y, mode="drop"), kept, jax.vmap(keep)(state))
    index = jnp.where(left, jnp.minimum(waiting + jnp.cumsum(left) - 1, count), index)
    state = choose(left, jax.vmap(begin)(pick(index)), state)
    return index, waiting + jnp.sum(left), state, kept, steps

  start = (index, jnp.asarray(slots), state, kept, jnp.zeros([], jnp.int32))
  end = jax.lax.while_loop(lambda loop: jnp.any(loop[0] < count), round_, start)
  return end[3], end[4]
