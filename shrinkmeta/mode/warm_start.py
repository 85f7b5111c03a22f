"""Where a task's loop and solve ended: a start for the next time the same task comes.

phi and sigma move little from one meta-step to the next, and so do z_hat and w of a task in
whitened coordinates. Tasks that recur may begin there, and a loop or a solve that stops by
tolerance then stops sooner. A buffer of K tasks is a `WarmStart` whose leaves lead with [K].
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from shrinkmeta import validate

PyTree = Any


class WarmStart(NamedTuple):
  """Trees like phi, None for frozen modules; of T tasks the leaves lead with [T]."""

  z: PyTree  # the mode, theta = phi + sigma * z
  w: PyTree  # the solution of the linear system

  def take(self, tasks: jax.Array) -> "WarmStart":
    """The starts of the tasks with these numbers [T]."""
    return jax.tree.map(lambda x: x[tasks], self)

  def put(self, tasks: jax.Array, warm: "WarmStart") -> "WarmStart":
    """The buffer with `warm`, of these tasks [T], written into it."""
    return jax.tree.map(lambda x, new: x.at[tasks].set(new), self, warm)


def no_start(phi: PyTree, count: int) -> WarmStart:
  """`count` tasks that have not been seen: zeros, the cold start, like the moving part of phi."""
  zeros = lambda: jax.tree.map(lambda p: jnp.zeros((count, *p.shape), p.dtype), phi)
  return WarmStart(zeros(), zeros())  # two: a buffer may be donated once


def check_start(warm: WarmStart, part: PyTree, count: int) -> None:
  """Raises ValueError unless `warm` fits the moving part of phi and the number of tasks."""
  if not isinstance(warm, WarmStart):
    raise ValueError(f"warm must be a shrinkmeta.WarmStart(z, w); got {type(warm)}.")
  for name, tree in warm._asdict().items():
    validate.same_shapes(f"warm.{name}", tree, "the moving part of phi", part, lead=1)
    for leaf in jax.tree.leaves(tree):
      if leaf.shape[0] != count:
        raise ValueError(f"warm.{name} is of {leaf.shape[0]} tasks, and there are {count}.")
