"""Warm starts: a cold one for tasks not seen before, and the check that one fits a model."""

from typing import Any

import jax
import jax.numpy as jnp

from shrinkmeta.base import WarmStart
from shrinkmeta.checks import validate

PyTree = Any


def no_start(part: PyTree, count: int) -> WarmStart:
  """Return the cold start of `count` tasks: zeros [count, ...], like the moving part of phi."""
  zeros = lambda: jax.tree.map(lambda p: jnp.zeros((count, *p.shape), p.dtype), part)
  return WarmStart(zeros(), zeros())  # two trees, because a buffer may be donated once


def check_start(warm: WarmStart, part: PyTree, count: int, has_mode: bool = True) -> None:
  """Raises TypeError or ValueError unless `warm` fits the moving part of phi and `count` tasks."""
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
        raise ValueError(f"warm.{name} is of {leaf.shape[0]} tasks, and there are {count}.")
