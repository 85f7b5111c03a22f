"""Names of lines at their right ends, in the colour of each line, so that no two overlap.

This file imports matplotlib. The pictures import this file when they are drawn.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import scipy  # loads scipy.optimize at its first use
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.text import Text

from shrinkmeta.plots import look

HEIGHT = 0.16  # inches that one name needs
_AT, _BEND, _END = 1.045, 1.012, 1.038  # of a name, of the line to it; in widths of the panel


def name_ends(ax: Axes, lines: Mapping[str, Line2D]) -> None:
  """Write the name of every line to the right of the panel, and connect it to the line's end.

  A line without a finite value gets no name.

  Args:
    ax: the panel. It should be HEIGHT inches high for each name.
    lines: {name: line}.
  """
  ends = []
  for name, line in lines.items():
    known = np.flatnonzero(np.isfinite(np.asarray(line.get_ydata(), float)))
    if not known.size:
      continue
    color: Any = line.get_color()
    here = {"transform": ax.transAxes, "color": color}
    text = ax.text(_AT, 0.5, name, va="center", fontsize=look.SMALL, parse_math=False, **here)
    joint = Line2D([], [], linewidth=0.6, alpha=0.6, clip_on=False, zorder=1, **here)
    ax.add_artist(joint)
    joint.set_clip_path(None)
    point = (line.get_xdata()[known[-1]], line.get_ydata()[known[-1]])
    ends.append((point, text, joint))
  if ends:
    ax.add_artist(_Placer(ends))


class _Placer(Artist):
  """Draws nothing. Before every drawing it moves the names to where the lines end."""

  def __init__(self, ends: list[tuple[Any, Text, Line2D]]):
    super().__init__()
    self.set_zorder(-1)  # artists are drawn in this order
    self._ends = ends

  def draw(self, renderer: Any) -> None:
    """Move the names."""
    del renderer
    ax = self.axes
    assert ax is not None
    points = np.array([point for point, _, _ in self._ends], float)
    x, y = ax.transAxes.inverted().transform(ax.transData.transform(points)).T
    y = np.clip(y, 0.0, 1.0)  # a line may leave the panel
    inches = ax.bbox.height / ax.figure.dpi
    gap = min(HEIGHT / inches, 1 / len(y))
    places = spread(y, gap, gap / 2, 1 - gap / 2)
    for (_, text, joint), start, end, place in zip(self._ends, x, y, places, strict=True):
      text.set_y(place)
      near = start > 0.9
      across = ([start, _BEND, _END], [end, end, place])
      joint.set_data(*(across if near else ([start, _END], [end, place])))
      joint.set_linestyle("-" if near else ":")

  def get_tightbbox(self, renderer: Any = None) -> None:
    """Take no place in the layout; the names take theirs."""


def spread(y: np.ndarray, gap: float, low: float, high: float) -> np.ndarray:
  """Return places in [low, high] at least `gap` apart, in the order of y and near to it.

  Let u_i = place_i - i gap. The places are at least `gap` apart if and only if u does not decrease.
  So the least-squares places come from an isotonic regression of u.

  Args:
    y: [n], the heights at which the lines end.
    gap: the least distance between two places.
    low: the lowest place.
    high: the highest place.

  Returns:
    The places, [n].

  >>> spread(np.array([0.5, 0.5]), 0.2, 0.0, 1.0).round(2).tolist()
  [0.4, 0.6]
  """
  order = np.argsort(y, kind="stable")
  offset = gap * np.arange(len(y))
  u = scipy.optimize.isotonic_regression(y[order] - offset).x
  places = np.empty_like(y)
  places[order] = np.clip(u, low, max(low, high - offset[-1])) + offset
  return places
