"""The learned sigma, the agreement of seeds, and the cost of freezing modules."""

import collections
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from experiments.networks.modules import network_order
from experiments.report.statistics import group_by_algorithm, has
from experiments.report.tables.markdown import as_table, plus_minus, sample
from experiments.runs.results import Curve, check, number


class Agreement(NamedTuple):
  """Correlations over modules between the sigmas of two seeds, averaged over pairs of seeds."""

  ranks: float  # Spearman's, of sigma
  logs: float  # Pearson's, of log sigma, for sigmas so alike that their order says little; or nan


def sigma_agreement(curves: Sequence[Curve]) -> dict[str, Agreement]:
  """Return how well the seeds of each algorithm with three or more modules agree."""
  found = {}
  for algorithm, group in group_by_algorithm(curves).items():
    sigma = np.array([[c.sigma[m] for m in sorted(c.sigma)] for c in group])
    differs = np.ptp(sigma, 1).all()  # equal numbers have no correlation
    if len(sigma) > 1 and sigma.shape[1] > 2 and np.isfinite(sigma).all() and differs:
      pairs = np.triu_indices(len(sigma), 1)
      mean = lambda rows, pairs=pairs: float(np.corrcoef(rows)[pairs].mean())
      logs = mean(np.log(sigma)) if (sigma > 0).all() else math.nan
      found[algorithm] = Agreement(mean(stats.rankdata(sigma, axis=1)), logs)
  return found


def freezing_table(
  whole: Sequence[Curve],
  frozen: Mapping[float, Sequence[Curve]],
  step: int = -1,
  over: str = "episodes",
) -> str:
  """Return the loss of accuracy and likelihood if modules with sigma below a threshold stay at phi.

  Args:
    whole: the curves of one algorithm without frozen modules.
    frozen: {threshold: curves with frozen modules}, of the same seeds and episodes.
    step: the index into `Curve.steps`; the last by default.
    over: the name of a curve's columns, in the plural.
  """
  rows = []
  for threshold, curves in sorted(frozen.items()):
    seeds = [sorted(curve.seed for curve in group) for group in (whole, curves)]
    if seeds[0] != seeds[1]:
      raise ValueError(
        f"The modules below {number(threshold)} are frozen in seeds {seeds[1]}, and seeds "
        f"{seeds[0]} have none frozen: wanted the same seeds. Run experiments.evaluate on all of "
        "them."
      )
    left = [[m for m in curve.sizes if curve.sigma[m] > 0] for curve in curves]
    shares = [
      sum(curve.sizes[m] for m in modules) / sum(curve.sizes.values())
      for curve, modules in zip(curves, left, strict=True)
    ]
    counts = collections.Counter(m for modules in left for m in modules)
    named = [
      m if n == len(curves) else f"{m} ({n} of {len(curves)})"
      for m, n in ((m, counts[m]) for m in network_order(counts))
    ]
    cells = [number(threshold), ", ".join(named) or "none", f"{100 * np.mean(shares):.1f}"]
    for field, scale, digits in (("accuracy", 100.0, 2), ("nll", 1.0, 3)):
      if field == "nll" or has(whole, "accuracy"):
        one, other = (np.mean([getattr(c, field)[step] for c in g], 0) for g in (curves, whole))
        cells.append(plus_minus(scale * (one - other), digits, "+"))
    rows.append(cells)
  header = ["threshold", "task-specific modules", "% of parameters"]
  header += ["accuracy in points"] * has(whole, "accuracy") + ["nats per example"]
  at = np.asarray(whole[0].steps)[step]
  title = f"{whole[0].algorithm}, modules with sigma below a threshold frozen minus none frozen"
  return f"{title}, after {at} steps, paired, {sample(whole, over)}\n\n{as_table(header, rows)}\n"


_FOUND = "sigma of modules, largest first"


def _found(group: Sequence[Curve]) -> str:
  """Return modules with sigma, the geometric mean over seeds, largest first."""
  with np.errstate(divide="ignore"):  # a frozen module
    sigma = {m: float(np.exp(np.mean(np.log([c.sigma[m] for c in group])))) for m in group[0].sigma}
  return ", ".join(f"{m} {sigma[m]:.2g}" for m in sorted(sigma, key=lambda m: -sigma[m]))


def found_modules(groups: Mapping[str, Sequence[Curve]]) -> str:
  """Return the modules of each data set with sigma, the geometric mean over seeds, largest first.

  Args:
    groups: {name of the data: curves of algorithms that learn sigma}.
  """
  rows = [
    [data, algorithm, _found(group)]
    for data, curves in groups.items()
    for algorithm, group in group_by_algorithm(curves).items()
  ]
  return as_table(["data", "algorithm", _FOUND], rows) + "\n"


def sigma_table(curves: Sequence[Curve]) -> str:
  """Return the sigma of each algorithm, and whether its seeds agree on their order.

  Args:
    curves: curves of algorithms that learn sigma.
  """
  agreement = sigma_agreement(curves)
  none = Agreement(math.nan, math.nan)
  cell = lambda value: "none" if math.isnan(value) else f"{value:.2f}"
  rows = [
    [a, *map(cell, agreement.get(a, none)), _found(group)]
    for a, group in group_by_algorithm(curves).items()
  ]
  title = "Sigma, geometric mean over seeds, and correlations, mean over pairs of seeds"
  header = ["algorithm", "rank correlation", "of log sigma", _FOUND]
  return f"{title}\n\n{as_table(header, rows)}\n"


def module_table(curve: Curve) -> str:
  """Return the size, sigma and root mean square of theta - phi of each module."""
  curve = check(curve, "curve")

  def sigma(module: str) -> str:
    value = curve.sigma.get(module, math.nan)
    return {math.inf: "∞ (no prior)", 0.0: "0 (frozen)"}.get(value, f"{value:.3g}")

  rows = [
    [m, f"{curve.sizes[m]:,}", sigma(m), f"{curve.moved.get(m, math.nan):.3g}"]
    for m in network_order(curve.sizes)
  ]
  title = f"{curve.algorithm}, seed {curve.seed}, moved after {curve.steps[-1]} adaptation steps"
  return f"{title}\n\n{as_table(['module', 'parameters', 'sigma', 'rms moved'], rows)}\n"
