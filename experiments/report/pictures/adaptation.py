"""Pictures of accuracy and likelihood, against adaptation steps and against the amount of data."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes

from experiments.report import statistics
from experiments.report.pictures.canvas import (
  canvas,
  hue,
  label_ends,
  log_ticks,
  mark_break,
  title_of,
)
from experiments.runs.files import Path
from experiments.runs.results import Curve
from experiments.settings.algorithms import learns_sigma

_PANELS = {
  "accuracy": ("Accuracy on unseen tasks, %", 100.0),
  "nll": ("Negative log-likelihood on unseen tasks, nats per example", 1.0),
}


def adaptation_curves(path: Path, curves: Sequence[Curve], over: str = "tasks") -> None:
  """Accuracy and negative log-likelihood against adaptation steps, with 95 % bands.

  Args:
    path: the PNG to write.
    curves: at equal steps and on the same episodes; seeds are averaged per episode.
    over: what the bands are over, in the plural.
  """
  statistics.group_by_algorithm(curves)  # checks them
  fields = list(_PANELS) if statistics.has(curves, "accuracy") else ["nll"]
  steps = np.asarray(curves[0].steps)
  x = _step_positions(steps)
  with canvas(path, 3.3 * len(fields)) as figure:
    panels = list(figure.subplots(len(fields), 1, sharex=True, squeeze=False)[:, 0])
    for ax, field in zip(panels, fields, strict=True):
      title, scale = _PANELS[field]
      _adaptation_panel(ax, x, statistics.average_seeds(curves, field), scale)
      ax.set_title(title)
      ax.tick_params(axis="x", length=0)
    bottom = panels[-1]
    bottom.tick_params(axis="x", length=3.5)
    bottom.set_xticks(x, [f"{step:,}" for step in steps])
    episodes = np.shape(curves[0].accuracy)[1]
    bottom.set_xlabel(f"Adaptation steps (bands: 95 % intervals over {episodes:,} {over})")
    _scale_nats(bottom)
    if steps[0] == 0 and len(steps) > 1:
      mark_break(bottom, (x[0] + x[1]) / 2, "x")
    label_ends(figure, panels)


def data_curves(path: Path, found: Mapping[float, Sequence[Curve]], step: int, label: str) -> None:
  """As `adaptation_curves`, after one number of adaptation steps, against how much data there is.

  An algorithm that lacks at one of the amounts is a ValueError.

  Args:
    path: the PNG to write.
    found: amount of data -> curves; each amount has its own tasks.
    step: index into `Curve.steps`.
    label: what the amount is.
  """
  amounts = sorted(found)
  whole = [statistics.group_by_algorithm(found[amount]) for amount in amounts]
  for amount, group in zip(amounts, whole, strict=True):
    if unlike := sorted(set(whole[0]) ^ set(group)):
      raise ValueError(
        f"{label}: {', '.join(unlike)} has curves at {amounts[0]:g} or at {amount:g}, not at both. "
        "Train and evaluate it there too, or leave it out."
      )
  fields = [field for field in _PANELS if all(statistics.has(found[a], field) for a in amounts)]
  with canvas(path, 3.3 * len(fields)) as figure:
    panels = list(figure.subplots(len(fields), 1, sharex=True, squeeze=False)[:, 0])
    for ax, field in zip(panels, fields, strict=True):
      title, scale = _PANELS[field]
      means = [statistics.average_seeds(found[amount], field) for amount in amounts]
      series = {name: np.stack([mean[name][step] for mean in means]) for name in whole[0]}
      _adaptation_panel(ax, np.log10(amounts), series, scale)
      ax.set_title(title)
      ax.tick_params(axis="x", length=0)
    _scale_nats(panels[-1])
    panels[-1].tick_params(axis="x", length=3.5)
    panels[-1].set_xticks(np.log10(amounts), [f"{amount:g}" for amount in amounts])
    steps = np.asarray(found[amounts[0]][0].steps)
    panels[-1].set_xlabel(
      f"{label} (after {steps[step]:,} adaptation steps; bands: 95 % intervals)"
    )
    label_ends(figure, panels)


_MOST = 1e3  # nats, or this times the lowest if that is above 1; the panel ends there


def _scale_nats(ax: Axes) -> None:
  """A scale on which one diverging method does not flatten all others."""
  means = np.concatenate([np.asarray(line.get_ydata()) for line in ax.get_lines()])
  means = means[np.isfinite(means)]
  if not means.size or means.max() < 8 * max(means.min(), 1.0):
    return
  low = means.min()
  high = min(means.max(), _MOST * max(low, 1.0))
  if low > 0:
    ax.set_yscale("log")
    ticks = log_ticks(low, high)
  else:  # densities may be above 1: linear up to one nat
    ax.set_yscale("symlog", linthresh=1.0)
    ax.set_ylim(bottom=min(1.3 * low, -0.1))  # bands may go far below
    below = [-tick for tick in log_ticks(1.0, -low)] if low < -1 else []
    ticks = [*below, 0.0, *log_ticks(1.0, high)]
  ax.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
  ax.set_yticks([], minor=True)
  if high < means.max():
    ax.set_ylim(top=high)


def _step_positions(steps: np.ndarray) -> np.ndarray:
  """log10 of steps [S], ascending; 0 stands a little before the first positive step."""
  positive = steps[steps > 0]
  before = np.log10(positive[0]) - 0.4 if positive.size else 0.0
  return np.concatenate([np.full(len(steps) - len(positive), before), np.log10(positive)])


def _adaptation_panel(ax: Axes, x: np.ndarray, series: dict[str, np.ndarray], scale: float) -> None:
  """Draws scale · mean ± 95 % of each series [S, E] over x [S]; diverged points are left out."""
  for algorithm, values in series.items():
    mean, half = scale * np.array([statistics.interval(row) for row in values]).T
    mean[~np.isfinite(mean)] = np.nan
    color, learned = hue(algorithm), learns_sigma(algorithm)
    band = np.isfinite(half)
    ax.fill_between(
      x,
      mean - half,
      mean + half,
      where=band.tolist(),
      color=color,
      alpha=0.15,
      linewidth=0,
      zorder=2,
    )
    label = title_of(algorithm) + (" (diverged)" if np.isnan(mean[-1]) else "")
    ax.plot(
      x,
      mean,
      color=color,
      label=label,
      zorder=4 if learned else 3,
      linewidth=2.0 if learned else 1.2,
      linestyle="-" if learned else (0, (4, 1.5)),
      marker="o",
      markersize=4.2 if learned else 3.8,
      markeredgewidth=1.0,
      markerfacecolor=color if learned else "white",
    )
  ax.margins(x=0.02)
