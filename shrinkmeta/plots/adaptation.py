"""A picture of loss and accuracy on new tasks against the number of adaptation steps."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from shrinkmeta.checks import validate
from shrinkmeta.checks.kinds import shown
from shrinkmeta.diagnostics.evaluation import Evaluation
from shrinkmeta.plots import look

if TYPE_CHECKING:
  from matplotlib.axes import Axes
  from matplotlib.figure import Figure

Curves = dict[str, tuple[np.ndarray, list[Evaluation]]]  # {learner: (x [S], S evaluations)}
_MOST = 1e3  # nats, or this times the lowest loss if that is above 1; the panel ends there


def adaptation_curves(
  evaluations: Mapping[str, Mapping[int, Evaluation] | Mapping[float, Evaluation]],
  *,
  xlabel: str = "adaptation steps",
  colors: Mapping[str, Any] | None = None,
) -> "Figure":
  """Draw the loss, and the accuracy if there is one, against the number of adaptation steps.

  Bands are 95 % intervals over tasks; a point without a neighbour has a bar. Means leave failed
  tasks out. The label of a learner has the number of tasks that failed at its last point. The x
  axis is logarithmic. A break in the axis separates the point at 0 steps from the others.

  Args:
    evaluations: {learner: {steps: what `evaluate(learner, state, tasks, steps=steps)` returned}}.
    xlabel: what the numbers are, if they are not steps: the amount of data, for example.
    colors: {learner: colour}, for learners that should look the same in several pictures.

  Returns:
    A matplotlib Figure.

  Raises:
    ImportError: matplotlib is not installed.
    TypeError, ValueError: an argument is wrong; the message names it.

  Example:
    >>> yes = np.ones(3, bool)
    >>> found = {s: Evaluation(np.array([1.0, 1.2, 0.9]) / (s + 1), None, yes) for s in (0, 1, 10)}
    >>> figure = adaptation_curves({"MAML": found})
    >>> [text.get_text() for text in figure.axes[0].get_xticklabels()]
    ['0', '1', '10']
  """
  validate.instance("xlabel", xlabel, str, "a string")
  look.check_colors(colors)
  curves = _curves(evaluations)
  every = np.unique(np.concatenate([x for x, _ in curves.values()]))
  has_accuracy = all(e.accuracy is not None for _, points in curves.values() for e in points)
  height = max(2.9, 0.17 * len(curves) + 0.6)
  panels = ["accuracy", "loss"] if has_accuracy else ["loss"]
  figure, axes = look.figure(height * len(panels) + 0.3, len(panels), sharex=True)
  for ax, field in zip(axes, panels, strict=True):
    _panel(ax, field, curves, every, colors)
    ax.tick_params(axis="x", length=0)
  bottom, tasks = axes[-1], max(len(e.val_nll) for _, points in curves.values() for e in points)
  ticks = _ticks(every)
  bottom.tick_params(axis="x", length=3.5)
  places = _place(ticks, every)
  width = float(np.ptp(_place(every, every))) or 1.0
  bottom.set_xticks(places, _with_room([f"{x:,g}" for x in ticks], places / width))
  look.axis_labels(bottom, f"{xlabel} (with 95 % intervals over {look.counted(tasks, 'task')})")
  if every[0] == 0 and len(every) > 1:
    first, second = _place(every[:2], every)
    look.mark_break(bottom, (first + second) / 2, "x")
  return figure


def _curves(evaluations: Any) -> Curves:
  """Return the points of every learner in ascending order of x."""
  wanted = "{learner: {steps: what sm.evaluate returned}}"
  validate.instance("evaluations", evaluations, Mapping, wanted)
  found: Curves = {}
  for name, points in evaluations.items():
    validate.instance("the names in evaluations", name, str, "strings")
    where = f"evaluations[{name!r}]"
    validate.instance(where, points, Mapping, "{steps: what sm.evaluate returned}")
    for step, point in points.items():
      if not isinstance(step, (int, float, np.number)) or not step >= 0:
        raise ValueError(f"The steps of {where} must be 0 or more; got {shown(step)}.")
      validate.instance(f"{where}[{step!r}]", point, Evaluation, "a shrinkmeta.Evaluation")
    if points:
      order = sorted(points)
      found[name] = np.array(order, float), [points[step] for step in order]
  if not found:
    raise ValueError(f"evaluations must be {wanted}; it is empty.")
  return found


def _place(x: np.ndarray, every: np.ndarray) -> np.ndarray:
  """Return log10 of x; 0 stands a little before the first positive number of `every`."""
  positive = every[every > 0]
  before = np.log10(positive[0]) - 0.4 if positive.size else 0.0
  return np.where(x > 0, np.log10(np.where(x > 0, x, 1.0)), before)


def _ticks(every: np.ndarray) -> np.ndarray:
  """Return the numbers that are written below the panel: all, or round ones if they are many."""
  if len(every) <= 12:
    return every
  positive = every[every > 0]
  return np.array([*every[every == 0], *look.log_ticks(positive[0], positive[-1])])


def _with_room(labels: Sequence[str], places: np.ndarray) -> list[str]:
  """Return the labels of an axis, "" for those without room; the last one is always written.

  Args:
    labels: n labels in ascending order.
    places: [n], their places, in widths of the axis.
  """
  # The middles of two labels of three characters are at least 0.065 of the axis apart.
  apart = lambda i, j: places[j] - places[i] >= 0.02 + 0.0075 * (len(labels[i]) + len(labels[j]))
  last = len(labels) - 1
  written: list[int] = []
  for i in range(last):
    if apart(i, last) and (not written or apart(written[-1], i)):
      written.append(i)
  return [label if i in (*written, last) else "" for i, label in enumerate(labels)]


def _panel(
  ax: "Axes", field: str, curves: Curves, every: np.ndarray, colors: Mapping[str, Any] | None
) -> None:
  """Draw the mean and the 95 % intervals of every learner, and name the lines."""
  from shrinkmeta.plots import line_names

  lines, means = {}, []
  for (name, (color, marker, dashes)), (x, points) in zip(
    look.looks(curves, colors).items(), curves.values(), strict=True
  ):
    place = _place(x, every)
    intervals = [e.loss if field == "loss" else e.mean_accuracy for e in points]
    mean, low, high = np.array(intervals, float).T * (1 if field == "loss" else 100)
    known = np.isfinite(low)
    band = {"color": color, "alpha": 0.15, "linewidth": 0, "zorder": 2}
    ax.fill_between(place, low, high, where=known.tolist(), **band)
    alone = look.alone(known)
    if alone.any():
      bars = np.stack([mean - low, high - mean])[:, alone]
      bar = {"fmt": "none", "ecolor": color, "alpha": 0.5, "elinewidth": 1.2, "capsize": 3}
      ax.errorbar(place[alone], mean[alone], bars, zorder=2, **bar)
    failed = points[-1].num_failed
    note = f" ({failed:,} of {len(points[-1].val_nll):,} failed)" if failed else ""
    style = {"linestyle": dashes, "marker": marker, "linewidth": 1.5, "markersize": 4.5}
    style["markevery"] = max(1, len(x) // 8)
    lines[name + note] = ax.plot(place, mean, color=color, zorder=3, **style)[0]
    means.append(mean)
  what = {"loss": "Loss on new tasks, nats per example", "accuracy": "Accuracy on new tasks, %"}
  look.title(ax, what[field])
  ax.margins(x=0.02)
  if field == "loss":
    _scale(ax, np.concatenate(means))
  line_names.name_ends(ax, lines)


def _scale(ax: "Axes", means: np.ndarray) -> None:
  """Scale the loss so that one learner that diverges does not flatten all others."""
  means = means[np.isfinite(means)]
  if not means.size or means.max() < 8 * max(means.min(), 1.0):
    return
  low = means.min()
  high = min(means.max(), _MOST * max(low, 1.0))
  if low > 0:
    ax.set_yscale("log")
    ticks = look.log_ticks(low, high)
  else:  # a density can be above 1: the scale is linear up to one nat
    ax.set_yscale("symlog", linthresh=1.0)
    ax.set_ylim(bottom=min(1.3 * low, -0.1))  # bands may go far below
    below = [-tick for tick in look.log_ticks(1.0, -low)] if low < -1 else []
    ticks = [*below, 0.0, *look.log_ticks(1.0, high)]
  ax.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
  ax.set_yticks([], minor=True)
  if high < means.max():
    ax.set_ylim(top=high)
