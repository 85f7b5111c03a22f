"""The learner of an arm: an algorithm of the library with the settings of the arm.

This module knows nothing of data sets and networks, so a new data set needs no change here.
"""

import functools
from collections.abc import Callable
from typing import Any

import optax
from jax.sharding import Mesh

import shrinkmeta as sm
from experiments.settings import algorithms
from experiments.settings.schema import Config

MakeLearner = Callable[[sm.Inner], sm.MetaLearner]
_OPTIMIZERS: dict[str, Callable[[Any], optax.GradientTransformation]] = {
  "sgd": optax.sgd,
  "adam": optax.adam,
  "lbfgs": lambda rate: sm.lbfgs(),  # a line search finds its rate
  # The square root of a zero second moment has no derivative. Without eps_root a gradient through
  # Adam's steps is NaN wherever an entry's gradient is 0, as that of a bias before a norm is
  # (docs/hazards.md#adam-root).
  "smooth_adam": functools.partial(optax.adam, eps_root=1e-8),
}


def by_inner(
  make: Callable[..., sm.MetaLearner], likelihood: sm.Likelihood, labels: sm.Labels, **more: Any
) -> MakeLearner:
  """Return a function that makes the learner of an algorithm for a given inner loop.

  Args:
    make: the algorithm, such as `sm.sigma_imaml`.
    likelihood, labels: its first two arguments.
    more: its keywords, without `inner`.
  """
  return lambda inner: make(likelihood, labels, inner=inner, **more)


def make_learner(
  name: str,
  config: Config,
  likelihood: sm.Likelihood,
  labels: sm.Labels,
  mesh: Mesh | None,
) -> sm.MetaLearner:
  """Return the learner `name` with the settings config.arms[name], see settings/arms.py."""
  algorithms.chosen([name])
  arm = config.arms[name]
  for key in ("inner", "outer"):
    if arm[key] not in _OPTIMIZERS:
      raise ValueError(f"arms.{name}.{key} is one of {', '.join(_OPTIMIZERS)}; got {arm[key]!r}.")
  optimizer = _OPTIMIZERS[arm.inner](_halving(arm.inner_rate, arm.inner_decay))
  keywords: dict[str, Any] = {
    "inner": sm.Inner(optimizer, steps=arm.inner_steps, batch_size=arm.batch_size or None),
    "phi_optimizer": _OPTIMIZERS[arm.outer](_decayed(arm.outer_rate, config.meta_steps)),
    "mesh": mesh,
  }
  algorithm = sm.FAMILY[name]
  if algorithm.gradient == "implicit":
    size = config.cg_batch or None
    keywords["implicit"] = sm.Implicit(
      max_steps=config.cg_steps, tol=config.cg_tol, batch_size=size
    )
  if algorithm.sigma != "inf":
    keywords["init_sigma"] = arm.init_sigma
  if algorithm.sigma == "learned":
    keywords["sigma_optimizer"] = optax.adam(_decayed(arm.sigma_rate, config.meta_steps))
  if name == "hand_picked":
    keywords["task_specific"] = (arm.task_specific,)
  learner = getattr(sm, name)(likelihood, labels, **keywords)
  return sm.clip_tasks(learner, arm.clip) if arm.get("clip") else learner


def _halving(rate: float, steps: int) -> optax.Schedule | float:
  """Return rate / (1 + t / steps), or a constant rate if steps is 0."""
  return (lambda t: rate / (1.0 + t / steps)) if steps else rate


def _decayed(rate: float, meta_steps: int) -> optax.Schedule:
  """Return a rate that is constant for half of the meta-steps, then falls linearly to a tenth."""
  half = meta_steps // 2
  return optax.linear_schedule(rate, 0.1 * rate, max(1, meta_steps - half), half)
