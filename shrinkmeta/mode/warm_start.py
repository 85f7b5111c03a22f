"""Make the warm start of new tasks, and check that a warm start fits a model."""

from typing import Any

import jax
import jax.numpy as jnp

from shrinkmeta.base import WarmStart
from shrinkmeta.checks import validate

PyTree = Any


def no_start(part: PyTree, count: int) -> WarmStart:
  """Return the start of `count` new tasks: zeros [count, ...], like the task-specific part of phi.

  Args:
    part: phi, with None in the frozen modules.
    count: the number of tasks.
  """
  zeros = lambda: jax.tree.map(lambda p: jnp.zeros((count, *p.shape), p.dtype), part)
  # z and w need arrays of their own: JAX cannot donate one array twice
  # (docs/hazards.md#donated-twice).
  return WarmStart(zeros(), zeros())


def check_start(warm: WarmStart, part: PyTree, count: int, has_mode: bool = True) -> None:
  """Raise TypeError or ValueError unless `warm` fits the algorithm, the model and the tasks.

  Args:
    warm: the warm start to check.
    part: phi, with None in the frozen modules.
    count: the number of tasks.
    has_mode: whether the algorithm has an implicit gradient.
  """
  if not has_mode:
    raise ValueError(
      "A warm start is for algorithms with an implicit gradient: imaml, sigma_imaml, "
      "sigma_reptile, empirical_bayes."
    )
  if not isinstance(warm, WarmStart):
    hint = "Make one: learner.no_start(state, count)."
    validate.instance("warm", warm, WarmStart, "a shrinkmeta.WarmStart(z, w), or None", hint)
  for name, tree in warm._asdict().items():
    validate.same_shapes(f"warm.{name}", tree, "the moving part of phi", part, lead=1)
    for leaf in jax.tree.leaves(tree):
      if leaf.shape[0] != count:
        raise ValueError(f"warm.{name} has {leaf.shape[0]} tasks; the update has {count}.")
