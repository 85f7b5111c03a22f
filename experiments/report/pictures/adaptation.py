"""Pictures of accuracy and likelihood, against adaptation steps and against the amount of data."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

import shrinkmeta as sm
from experiments.report import statistics
from experiments.report.pictures.canvas import hue, save, title_of
from experiments.runs.files import Path
from experiments.runs.results import Curve


def adaptation_curves(path: Path, curves: Sequence[Curve], over: str = "tasks") -> None:
  """Draw accuracy and negative log-likelihood against adaptation steps, with 95 % bands.

  Args:
    path: the PNG to write.
    curves: curves at equal steps and on the same episodes. Seeds are averaged per episode.
    over: the units that the bands are over, in the plural.
  """
  groups = statistics.group_by_algorithm(curves)
  steps = np.asarray(curves[0].steps).tolist()
  points = {
    title_of(a): {step: at[a] for step, at in zip(steps, _evaluations(curves), strict=True)}
    for a in groups
  }
  figure = sm.plots.adaptation_curves(points, colors=_colors(groups))
  episodes = np.shape(curves[0].accuracy)[1]
  figure.axes[-1].set_xlabel(f"adaptation steps (bands: 95 % intervals over {episodes:,} {over})")
  save(path, figure)


def data_curves(path: Path, found: Mapping[float, Sequence[Curve]], step: int, label: str) -> None:
  """Draw the same after one number of adaptation steps, against the amount of data.

  Each algorithm must have curves at every amount; otherwise this raises ValueError.

  Args:
    path: the PNG to write.
    found: {amount of data: curves}. Each amount has its own tasks.
    step: the index into `Curve.steps`.
    label: the name of the amount.
  """
  amounts = sorted(found)
  whole = [statistics.group_by_algorithm(found[amount]) for amount in amounts]
  for amount, group in zip(amounts, whole, strict=True):
    if unlike := sorted(set(whole[0]) ^ set(group)):
      raise ValueError(
        f"{label}: {', '.join(unlike)} has curves at {amounts[0]:g} or at {amount:g}, not at both. "
        "Train and evaluate it there too, or leave it out."
      )
  at = {amount: _evaluations(found[amount])[step] for amount in amounts}
  points = {title_of(a): {amount: at[amount][a] for amount in amounts} for a in whole[0]}
  figure = sm.plots.adaptation_curves(points, colors=_colors(whole[0]))
  steps = np.asarray(found[amounts[0]][0].steps)
  words = f"{label} (after {steps[step]:,} adaptation steps; bands: 95 % intervals)"
  figure.axes[-1].set_xlabel(words)
  save(path, figure)


def _evaluations(curves: Sequence[Curve]) -> list[dict[str, sm.Evaluation]]:
  """Return {algorithm: the losses of all episodes} for each number of steps."""
  nll = statistics.average_seeds(curves, "nll")
  accuracy = statistics.average_seeds(curves, "accuracy")
  classes = statistics.has(curves, "accuracy")
  one = lambda a, i: sm.Evaluation(
    nll[a][i], accuracy[a][i] if classes else None, np.isfinite(nll[a][i])
  )
  return [{a: one(a, i) for a in nll} for i in range(len(curves[0].steps))]


def _colors(algorithms: Iterable[str]) -> dict[str, str]:
  return {title_of(a): hue(a) for a in algorithms}
