"""The arms of an experiment: every algorithm of the family with the step sizes it runs with.

Algorithms know nothing of data sets and networks; a data set needs no change here.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import optax
from jax.sharding import Mesh

import shrinkmeta as sm
from experiments.settings import schema
from shrinkmeta.model.modules import Labels

ALL = (
  "sigma_imaml",
  "sigma_reptile",
  "sigma_maml",
  "imaml",
  "reptile",
  "fomaml",
  "maml",
  "meta_sgd",
  "anil",
  "boil",
  "hand_picked",
  "fine_tuning",
)
DEFAULT = ("sigma_imaml", "reptile", "fomaml")

_OPTIMIZERS: dict[str, Callable[[Any], optax.GradientTransformation]] = {
  "sgd": optax.sgd,
  "adam": optax.adam,
  "lbfgs": lambda rate: optax.lbfgs(),  # finds a rate of its own, by a line search
  # The square root of a zero second moment has no derivative: a gradient through Adam's steps is
  # NaN wherever an entry's gradient is 0, as under a norm, unless a root is added.
  "smooth_adam": functools.partial(optax.adam, eps_root=1e-8),
}


def chosen(names: Sequence[str]) -> tuple[str, ...]:
  """The algorithms of a flag, each of them once, where "all" alone stands for all of them."""
  if list(names) == ["all"]:
    return ALL
  if unknown := sorted(set(names) - set(ALL)):
    raise ValueError(f"{', '.join(unknown)}: no algorithm; choose of {', '.join(ALL)}, or all.")
  if not names or len(set(names)) < len(names):
    raise ValueError(f"Wanted one or more algorithms, each of them once; got {','.join(names)!r}.")
  return tuple(names)


def make_learner(
  name: str,
  config: schema.Config,
  likelihood: sm.Likelihood,
  labels: Labels,
  mesh: Mesh | None,
) -> sm.MetaLearner:
  """The learner `name` with the settings config.arms[name]; see `configs.py` for their meaning."""
  chosen([name])
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
  row = sm.FAMILY[name]
  if row.gradient == "implicit":
    size = config.cg_batch or None
    keywords["implicit"] = sm.Implicit(
      max_steps=config.cg_steps, tol=config.cg_tol, batch_size=size
    )
  if row.sigma != "inf":
    keywords["init_sigma"] = arm.init_sigma
  if row.sigma == "learned":
    keywords["sigma_optimizer"] = optax.adam(_decayed(arm.sigma_rate, config.meta_steps))
  if name == "hand_picked":
    keywords["task_specific"] = (arm.task_specific,)
  return getattr(sm, name)(likelihood, labels, **keywords)


def _halving(rate: float, steps: int) -> optax.Schedule | float:
  """rate / (1 + t / steps); constant where steps is 0."""
  return (lambda t: rate / (1.0 + t / steps)) if steps else rate


def _decayed(rate: float, meta_steps: int) -> optax.Schedule:
  """Constant for the first half of the meta-steps, then linearly down to a tenth."""
  half = meta_steps // 2
  return optax.linear_schedule(rate, 0.1 * rate, max(1, meta_steps - half), half)
