"""Do the estimators find the true values? Fits of many data sets from one known mixed model.

    python -m experiments.mixed --simulate=200

The model is y = level_g + slope_g x + noise, with 40 groups of 2 to 20 observations. The command
prints three numbers for each estimator and standard deviation: the median bias, the coverage of the
95 % interval if the estimator has one, and the efficiency. An estimate of 0 has no interval and
counts as not covered. The efficiency is the mean squared error of REML's log sd divided by that of
the estimator.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from shrinkmeta import mixed

FORMULA = "y ~ x + (x || g)"
INTERCEPT = "(Intercept)"
GROUPS, SMALLEST, LARGEST = 40, 2, 20
FIXED = {INTERCEPT: 0.5, "x": -1.0}
TRUTH = {INTERCEPT: 1.0, "x": 0.6, "residual": 0.8}
ESTIMATORS: tuple[mixed.Estimator, ...] = ("ml", "reml", "predictive")


def draw(seed: int, number: int) -> dict[str, np.ndarray]:
  """Return data set `number` of a seed, as columns y, x and g."""
  rng = np.random.default_rng((seed, number))
  columns: dict[str, list[np.ndarray]] = {"y": [], "x": [], "g": []}
  for g, size in enumerate(rng.integers(SMALLEST, LARGEST + 1, GROUPS)):
    level = FIXED[INTERCEPT] + TRUTH[INTERCEPT] * rng.normal()
    slope = FIXED["x"] + TRUTH["x"] * rng.normal()
    x = rng.normal(size=size)
    columns["y"].append(level + slope * x + TRUTH["residual"] * rng.normal(size=size))
    columns["x"].append(x)
    columns["g"].append(np.full(size, g))
  return {name: np.concatenate(parts) for name, parts in columns.items()}


def run(
  datasets: int, seed: int, estimators: Sequence[mixed.Estimator] = ESTIMATORS
) -> list[dict[str, Any]]:
  """Return one record for each estimator and standard deviation.

  Args:
    datasets: the number of data sets.
    seed: of the data.
    estimators: which to compare with REML, and "reml" itself.
  """
  found: dict[str, list[mixed.Fit]] = {name: [] for name in estimators}
  for number in tqdm(range(datasets), mininterval=5.0):
    design = mixed.design(FORMULA, draw(seed, number))
    for name in estimators:
      found[name].append(mixed.fit_design(design, "gaussian", name, seed=seed + number))
  rows = []
  for name in estimators:
    for sd, truth in TRUTH.items():
      estimates, low, high = _of(found[name], sd)
      best = _of(found["reml"], sd)[0]
      inside = (low <= truth) & (truth <= high)
      error = lambda x, truth=truth: float(np.mean(np.square(np.log(x / truth))))
      rows.append(
        {
          "estimator": name,
          "sd": sd,
          "truth": truth,
          "median": float(np.median(estimates)),
          "median_bias": float(np.median(estimates) / truth - 1),
          "coverage": None if name == "predictive" else float(np.mean(inside)),
          "efficiency": _efficiency(error(best), error(estimates)),
          "singular": int(np.sum(estimates == 0)),
          "not_converged": sum(not fit.converged for fit in found[name]),
        }
      )
  return rows


def _efficiency(best: float, own: float) -> float | None:
  """Return best / own; None if an estimate was 0, whose logarithm is not finite."""
  return best / own if np.isfinite(best) and np.isfinite(own) else None


def _of(fits: Sequence[mixed.Fit], sd: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Return (estimates, lower, upper ends) of a sd; an estimate of 0 has no interval."""
  values, intervals = [], []
  for fit in fits:
    residual = sd == "residual"
    values.append(fit.residual if residual else fit.sd[sd])
    intervals.append(fit.residual_interval if residual else fit.sd_interval[sd])
  low, high = np.array(intervals, float).T
  return np.array(values, float), low, high


def text(rows: Sequence[dict[str, Any]]) -> str:
  """Return the records as a Markdown table."""
  lines = [
    "| estimator | sd of | truth | median | median bias, % | coverage of 95 %, % | efficiency |",
    "|---|---|---|---|---|---|---|",
  ]
  for row in rows:
    coverage = "none" if row["coverage"] is None else f"{100 * row['coverage']:.1f}"
    efficiency = "none" if row["efficiency"] is None else f"{row['efficiency']:.2f}"
    lines.append(
      f"| {row['estimator']} | {row['sd']} | {row['truth']:g} | {row['median']:.3f} | "
      f"{100 * row['median_bias']:+.1f} | {coverage} | {efficiency} |"
    )
  return "\n".join(lines)
