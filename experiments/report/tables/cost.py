"""The cost of training, and the settings of each algorithm."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

import shrinkmeta as sm
from experiments.report.statistics import group_by_algorithm
from experiments.report.tables.markdown import as_table
from experiments.runs.results import Curve

_STAGES = ("compile", "train", "adapt")


def settings_table(arms: Mapping[str, Mapping[str, Any]]) -> str:
  """Return the settings of each algorithm: `trials`, and every setting that any of them uses.

  Args:
    arms: {algorithm: settings}. `trials` is the number of trials that chose them; 0 means no
      search.
  """
  names = dict.fromkeys(name for settings in arms.values() for name in settings)
  used = lambda name: name == "trials" or any(settings.get(name) for settings in arms.values())
  names = [name for name in names if used(name)]
  rows = [[a, *(str(settings.get(n, "")) for n in names)] for a, settings in arms.items()]
  return f"Settings\n\n{as_table(['algorithm', *names], rows)}\n"


def cost_table(curves: Sequence[Curve], tasks: int, arms: Mapping[str, Mapping[str, Any]]) -> str:
  """Return the cost of training by algorithm, and how well modes and solves converged.

  Args:
    curves: curves of any algorithms and seeds.
    tasks: the number of tasks in a meta-step.
    arms: {algorithm: settings}. `inner_steps` is the number of adaptation steps of a task.
  """

  def mean(group: Sequence[Curve], name: str) -> str:
    values = [np.mean(c.history[name]) for c in group if c.history.get(name)]
    return f"{np.mean(values):.3g}" if np.isfinite(values).any() else "none"

  def step_rate(algorithm: str, rates: Sequence[float]) -> str:
    known = sm.FAMILY.get(algorithm)
    if not rates or (known is not None and known.phi == "pooled"):  # no adaptation in training
      return "none"
    return f"{np.mean(rates) * arms[algorithm]['inner_steps']:.3g}"

  rows = []
  for algorithm, group in group_by_algorithm(curves).items():
    rates = [tasks / np.median(c.history["seconds"]) for c in group if c.history.get("seconds")]
    rows.append(
      [
        algorithm,
        f"{np.mean(rates):.3g}" if rates else "none",
        step_rate(algorithm, rates),
        *(f"{np.mean([c.seconds.get(s, math.nan) for c in group]):.1f}" for s in _STAGES),
        *(mean(group, n) for n in ("failed", "inner_grad_norm", "solve_residual")),
        mean(group, "negative_curvature"),
      ]
    )
  header = [
    "algorithm",
    "tasks a second",
    "times inner steps",
    *(f"{s}, s" for s in _STAGES),
    "failed tasks a step",
  ]
  header += ["gradient norm at theta_hat", "relative residual of w", "share of negative curvature"]
  title = "Cost: rates of the median meta-step, else means over seeds and meta-steps"
  return f"{title}; adapt with compilation\n\n{as_table(header, rows)}\n"
