"""Draw the loss along the path, and how much each module lowers the loss."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from shrinkmeta.choice.tables import CurvePoint, ModuleLoss

if TYPE_CHECKING:
  from matplotlib.axes import Axes
  from matplotlib.figure import Figure

# Okabe and Ito, Color Universal Design, 2008: colour-blind readers can tell them apart.
_BLUE, _ORANGE, _INK = "#0072b2", "#d55e00", "#222222"
_ABOVE: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (0, 1), "borderaxespad": 0.2}
_ABOVE |= {"fontsize": 8, "frameon": False, "markerscale": 0.7}


def draw(rows: Sequence[ModuleLoss], points: Sequence[CurvePoint], chosen: int) -> "Figure":
  """Draw the loss along the path, and beside it two differences of loss for each module.

  The first difference is the loss without task-specific modules minus the loss with only this
  module. The second is the loss with all but this module minus the loss with all modules.

  Args:
    rows: a ModuleLoss for each module.
    points: a CurvePoint for each set of the path, from the empty set to all modules.
    chosen: the position of the chosen set in `points`.

  Returns:
    a matplotlib Figure.

  Raises:
    ImportError: matplotlib is not installed.
  """
  try:
    from matplotlib.figure import Figure
  except ImportError as error:
    raise ImportError("Choice.plot draws with matplotlib: pip install matplotlib.") from error
  height = max(3.6, 1.8 + 0.42 * len(rows))
  figure = Figure(figsize=(9, height), layout="constrained")
  left, right = figure.subplots(1, 2, width_ratios=(1.15, 1))
  _curve(left, points, chosen)
  _modules(right, rows, points)
  for ax in (left, right):
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(color="#e6e6e6", linewidth=0.7)
    ax.set_axisbelow(True)
  return figure


def _curve(ax: "Axes", points: Sequence[CurvePoint], chosen: int) -> None:
  """Draw the mean loss of each set, with its paired standard error to the best set as a bar."""
  x, loss = range(len(points)), [p.loss for p in points]
  errors = [p.error for p in points]
  ax.axhline(min(loss), color=_INK, linewidth=0.8, linestyle=":", label="best on the path")
  label = "mean; bars: paired s.e. to the best"
  ax.errorbar(x, loss, errors, color=_BLUE, marker="o", markersize=5, capsize=3, label=label)
  share = f"chosen: {100 * points[chosen].share:.1f} % of the parameters"
  ring = {"markersize": 13, "markerfacecolor": "none", "markeredgewidth": 2}
  ax.plot(chosen, loss[chosen], color=_ORANGE, marker="s", linestyle="none", label=share, **ring)
  ticks = ["none" if p.added is None else f"+ {p.added}" for p in points]
  ax.set_xticks(list(x), ticks, rotation=35, ha="right", rotation_mode="anchor")
  ax.set_xlabel("task-specific modules, added one by one")
  ax.set_ylabel("validation loss, nats per example")
  ax.legend(**_ABOVE)


def _modules(ax: "Axes", rows: Sequence[ModuleLoss], points: Sequence[CurvePoint]) -> None:
  """Draw how far each module alone lowers the loss, and how far the loss rises without it."""
  none, every = points[0].loss, points[-1].loss
  y = list(range(len(rows)))
  alone = ([none - r.only for r in rows], [r.only_error for r in rows])
  missing = ([r.without - every for r in rows], [r.without_error for r in rows])
  style = {"linestyle": "none", "capsize": 3, "markersize": 6}
  for offset, (values, errors), color, marker, label in (
    (-0.14, alone, _BLUE, "o", "with only it: none - loss"),
    (0.14, missing, _ORANGE, "D", "with all but it: loss - all"),
  ):
    at = [i + offset for i in y]
    ax.errorbar(values, at, xerr=errors, color=color, marker=marker, label=label, **style)
  ax.axvline(0.0, color=_INK, linewidth=0.8)
  ax.set_yticks(y, [r.module for r in rows])
  ax.set_ylim(len(rows) - 0.5, -0.5)
  ax.set_xlabel("worth of the module, nats per example")
  ax.legend(**_ABOVE)
