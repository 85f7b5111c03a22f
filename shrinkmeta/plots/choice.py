"""A picture of the choice of modules: the loss along the path, and what each module is worth."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from shrinkmeta.checks import validate
from shrinkmeta.choice.choose import Choice
from shrinkmeta.choice.tables import CurvePoint, ModuleLoss
from shrinkmeta.plots import look

if TYPE_CHECKING:
  from matplotlib.axes import Axes
  from matplotlib.figure import Figure

_BLUE, _ORANGE = look.COLORS[:2]


def choice_curve(choice: Choice) -> "Figure":
  """Draw the loss along the path of sets, and beside it two differences of loss for each module.

  The first difference is the loss without task-specific modules minus the loss with only this
  module. The second is the loss with all but this module minus the loss with all modules.

  Args:
    choice: what `choose_modules` returned.

  Returns:
    A matplotlib Figure.

  Raises:
    ImportError: matplotlib is not installed.
    TypeError: `choice` is not a Choice.
  """
  validate.instance("choice", choice, Choice, "a Choice, as shrinkmeta.choose_modules returns it")
  names = [row.module for row in choice.table]
  width = 8.6 + 0.14 * max(0, max(map(len, names)) - 8)
  height = 1.9 + 0.22 * len(choice.curve)
  figure, (left, right) = look.figure(height, 1, 2, width, width_ratios=(1.1, 1))
  _path(left, choice.curve, len(choice.modules))
  _worth(right, choice.table, choice.curve)
  return figure


def _path(ax: "Axes", points: Sequence[CurvePoint], chosen: int) -> None:
  """Draw the mean loss of each set, with its paired standard error to the best set as a bar."""
  y, loss = range(len(points)), [p.loss for p in points]
  look.name_rows(ax, ["none" if p.added is None else f"+ {p.added}" for p in points])
  best = ax.axvline(min(loss), color=look.INK, linewidth=0.8, linestyle=":")
  style = {"marker": "o", "markersize": 4.5, "capsize": 2.5, "linewidth": 1.3}
  line = ax.errorbar(loss, y, xerr=[p.error for p in points], color=_BLUE, **style)
  ring = {"markersize": 11, "markerfacecolor": "none", "markeredgewidth": 1.8}
  mark = ax.plot(loss[chosen], chosen, color=_ORANGE, marker="s", linestyle="none", **ring)[0]
  look.axis_labels(ax, "validation loss, nats per example")
  look.title(ax, "Task-specific modules, added one by one")
  share = f"chosen: {100 * points[chosen].share:.1f} % of the parameters"
  entries = {"mean; bars: paired s.e. to the best": line, share: mark, "best on the path": best}
  look.legend_above(ax, entries, width=0)  # one below the other


def _worth(ax: "Axes", rows: Sequence[ModuleLoss], points: Sequence[CurvePoint]) -> None:
  """Draw how far each module alone lowers the loss, and how far the loss rises without it."""
  none, every = points[0].loss, points[-1].loss
  look.name_rows(ax, [row.module for row in rows])
  alone = ([none - r.only for r in rows], [r.only_error for r in rows])
  missing = ([r.without - every for r in rows], [r.without_error for r in rows])
  style, entries = {"linestyle": "none", "capsize": 2.5, "markersize": 4.5}, {}
  for offset, (values, errors), color, marker, label in (
    (-0.16, alone, _BLUE, "o", "with only it: none - loss"),
    (0.16, missing, _ORANGE, "D", "with all but it: loss - all"),
  ):
    at = [i + offset for i in range(len(rows))]
    entries[label] = ax.errorbar(values, at, xerr=errors, color=color, marker=marker, **style)
  ax.axvline(0.0, color=look.INK, linewidth=0.8)
  look.axis_labels(ax, "worth of the module, nats per example")
  look.title(ax, "What one module is worth")
  look.legend_above(ax, entries, width=0)
