"""Means, intervals and groups of curves, for tables and pictures.

Letters in shapes: S adaptation steps recorded, E test episodes, K seeds.
"""

import collections
import math
from collections.abc import Sequence

import numpy as np
from scipy import stats

from experiments.runs.results import Curve, check


def interval(values: np.ndarray, level: float = 0.95) -> tuple[float, float]:
  """Return the mean, and the half width of its Student t interval over episodes.

      mean ± t_{E-1, (1 + level) / 2} · s / √E,   s² = Σ_e (v_e − mean)² / (E − 1)

  Args:
    values: [E], or [K, E] for K seeds on the same episodes. With [K, E], v_e is the mean over
      seeds, and the interval holds for new tasks of these networks, not for new seeds.
    level: coverage.

  Returns:
    (mean, half width). The half width is inf for E = 1, and nan where a value is not finite.
  """
  values = np.asarray(values, float)
  if values.ndim not in (1, 2) or not values.size:
    raise ValueError(
      f"interval takes values [E] or [seeds, E], E >= 1; got shape {values.shape}. "
      "Index one adaptation step first."
    )
  if not 0 < level < 1:
    raise ValueError(f"level is a coverage between 0 and 1; got {level}. For 95 % pass 0.95.")
  with np.errstate(invalid="ignore"):  # inf − inf, for a run that diverged
    episodes = values.mean(0) if values.ndim == 2 else values
    mean = float(episodes.mean())
    if episodes.size == 1:
      return mean, math.inf
    half = quantile(episodes.size, level) * stats.sem(episodes)
  return mean, float(half)


def quantile(count: int, level: float = 0.95) -> float:
  """Return by what to multiply a standard error of `count` >= 2 values for an interval."""
  return float(stats.t.ppf((1 + level) / 2, count - 1))


def group_by_algorithm(curves: Sequence[Curve]) -> dict[str, list[Curve]]:
  """Return {algorithm: its curves, one for each seed}; raise ValueError if they do not compare."""
  if not curves:
    raise ValueError("Wanted at least one Curve; got none.")
  groups: dict[str, list[Curve]] = collections.defaultdict(list)
  checked = [check(curve, f"curves[{i}]") for i, curve in enumerate(curves)]
  first = checked[0]
  for curve in checked:
    name = f"{curve.algorithm}, seed {curve.seed}"
    if not np.array_equal(curve.steps, first.steps) or curve.accuracy.shape != first.accuracy.shape:
      raise ValueError(
        "Curves are compared at the same steps on the same episodes; got steps "
        f"{first.steps.tolist()}, {first.accuracy.shape[1]} episodes for {first.algorithm}, and "
        f"{curve.steps.tolist()}, {curve.accuracy.shape[1]} episodes for {name}. "
        "Rerun one with the other's config."
      )
    if any(curve.seed == other.seed for other in groups[curve.algorithm]):
      raise ValueError(f"Wanted one curve an algorithm and seed; got two of {name}. Drop one.")
    groups[curve.algorithm].append(curve)
  return dict(groups)


def average_seeds(curves: Sequence[Curve], field: str) -> dict[str, np.ndarray]:
  """Return {algorithm: `field` ("accuracy" or "nll") averaged over its seeds, [S, E]}."""
  groups = group_by_algorithm(curves)
  return {a: np.mean([getattr(c, field) for c in group], 0) for a, group in groups.items()}


def has(curves: Sequence[Curve], field: str) -> bool:
  """Return whether any curve has numbers of `field`; regression has no accuracy."""
  return any(not np.isnan(np.asarray(getattr(curve, field), float)).all() for curve in curves)
