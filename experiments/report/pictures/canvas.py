"""The look that all pictures share, and how they become PNG files.

Every picture is 7.5 inches wide. Shown 900 pixels wide, its text is about as large as the text
around it. An algorithm looks the same in all pictures: its hue is that of the method it builds on,
and a thick solid line with filled dots means that it learns sigma.
"""

import contextlib
import math
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib import layout_engine, transforms
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from scipy import optimize

from experiments.runs import files
from experiments.runs.files import Path

WIDTH, DPI = 7.5, 240  # inches, dots per inch: 1,800 dots wide
_INK, _QUIET, _GRID = "#222222", "#6b6b6b", "#e6e6e6"
_STYLE: dict[Any, Any] = {
  "font.family": "DejaVu Sans",
  "font.size": 9,
  "axes.titlesize": 10,
  "axes.labelsize": 9,
  "xtick.labelsize": 8.5,
  "ytick.labelsize": 8.5,
  "text.color": _INK,
  "axes.labelcolor": _INK,
  "axes.edgecolor": _QUIET,
  "xtick.color": _QUIET,
  "ytick.color": _QUIET,
  "xtick.labelcolor": _INK,
  "ytick.labelcolor": _INK,
  "axes.spines.top": False,
  "axes.spines.right": False,
  "axes.linewidth": 0.7,
  "axes.grid": True,
  "axes.axisbelow": True,
  "grid.color": _GRID,
  "grid.linewidth": 0.7,
  "axes.titlelocation": "left",
  "axes.titleweight": "bold",
  "lines.solid_capstyle": "round",
}
# Okabe and Ito, Color Universal Design, 2008; orange and sky blue darkened to carry text.
_HUES = {
  "imaml": "#0072b2",
  "maml": "#d55e00",
  "reptile": "#009e73",
  "fomaml": "#c98a00",
  "anil": "#b65a92",
  "boil": "#3d9cd6",
  "fine_tuning": "#7a7a7a",
  "empirical_bayes": "#222222",
}
_TITLES = {
  "imaml": "iMAML",
  "maml": "MAML",
  "reptile": "Reptile",
  "fomaml": "FOMAML",
  "anil": "ANIL",
  "boil": "BOIL",
  "fine_tuning": "fine-tuning",
  "meta_sgd": "Meta-SGD",
  "hand_picked": "hand-picked",
  "empirical_bayes": "empirical Bayes",
}
_SPARE_HUES = ("#4b4b9b", "#8c6d31", "#637939", "#843c39")  # for algorithms not named above


def log_ticks(low: float, high: float) -> list[float]:
  """Round numbers in [low, high]: the more decades, the fewer in each."""
  decades = math.log10(high / low)
  in_decade = (
    (1, 1.5, 2, 3, 5, 7)
    if decades < 1.1
    else (1, 2, 5)
    if decades < 2
    else (1, 3)
    if decades < 4
    else (1,)
  )
  exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
  ticks = [m * 10.0**e for e in exponents for m in in_decade]
  return [tick for tick in ticks if low <= tick <= high] or [float(f"{low:.2g}")]


def mark_break(ax: Axes, at: float, axis: str) -> None:
  """Two strokes across the spine of `axis`: what lies beyond is off the scale."""
  along_x = axis == "x"
  spine = ax.get_xaxis_transform() if along_x else ax.get_yaxis_transform()
  for points in (-1.5, 1.5):
    shift = (points / 72, 0) if along_x else (0, points / 72)
    moved = spine + transforms.ScaledTranslation(*shift, ax.figure.dpi_scale_trans)
    ax.plot(
      [at if along_x else 0],
      [0 if along_x else at],
      transform=moved,
      clip_on=False,
      color=_QUIET,
      marker=[(-0.5, -1), (0.5, 1)] if along_x else [(-1, -0.5), (1, 0.5)],
      markersize=7,
      linestyle="none",
      zorder=5,
    )


def label_ends(figure: Figure, panels: Sequence[Axes]) -> None:
  """Names every labelled line at its right end, in its colour, spread so that none overlap."""
  height = 11.5 / 72  # inches a label needs
  ends = []
  for ax in panels:
    lines = [
      (line, np.flatnonzero(np.isfinite(np.asarray(line.get_ydata(), float))))
      for line in ax.get_lines()
      if not str(line.get_label()).startswith("_")
    ]
    for line, known in lines:
      if known.size:
        bold = "bold" if line.get_linewidth() >= 2 else "normal"
        text = ax.text(
          1.045,
          0.5,
          str(line.get_label()),
          transform=ax.transAxes,
          va="center",
          fontsize=8.5,
          color=line.get_color(),
          fontweight=bold,
        )
        ends.append((ax, line, known[-1], text))
  figure.draw_without_rendering()  # the layout makes room for the widest label, once
  figure.set_layout_engine("none")
  for ax in panels:
    here = [(line, last, text) for owner, line, last, text in ends if owner is ax]
    points = np.array([[line.get_xdata()[last], line.get_ydata()[last]] for line, last, _ in here])
    if not here:
      continue
    x, y = ax.transAxes.inverted().transform(ax.transData.transform(points)).T
    y = np.clip(y, 0.0, 1.0)  # of lines that leave the panel
    gap = min(height / (ax.get_position().height * figure.get_figheight()), 1 / len(here))
    places = spread(y, gap, gap / 2, 1 - gap / 2)
    for (line, _, text), start, end, place in zip(here, x, y, places, strict=True):
      text.set_y(place)
      ax.plot(
        [start, 1.012, 1.038],
        [end, end, place] if start > 0.9 else [end, place, place],
        transform=ax.transAxes,
        clip_on=False,
        color=line.get_color(),
        linewidth=0.6,
        linestyle="-" if start > 0.9 else ":",
        alpha=0.6,
        zorder=1,
      )


def spread(y: np.ndarray, gap: float, low: float, high: float) -> np.ndarray:
  """Places in [low, high], at least `gap` apart and in the order of y, least squares from y [n].

  With u_i = place_i − i · gap the distances say that u ascends: an isotonic regression.
  """
  order = np.argsort(y, kind="stable")
  offset = gap * np.arange(len(y))
  u = optimize.isotonic_regression(y[order] - offset).x
  places = np.empty_like(y)
  places[order] = np.clip(u, low, max(low, high - offset[-1])) + offset
  return places


def hue(algorithm: str) -> str:
  name = algorithm.removeprefix("sigma_")
  return _HUES.get(name, _SPARE_HUES[zlib.crc32(name.encode()) % len(_SPARE_HUES)])


def title_of(algorithm: str) -> str:
  name = algorithm.removeprefix("sigma_")
  return ("σ-" if name != algorithm else "") + _TITLES.get(name, name.replace("_", " "))


@contextlib.contextmanager
def canvas(path: Path, height: float) -> Iterator[Figure]:
  """A figure, `height` inches high, that becomes the PNG at `path` once the body is done."""
  with matplotlib.rc_context(_STYLE):
    layout = layout_engine.ConstrainedLayoutEngine(h_pad=0.08, w_pad=0.05)
    figure = Figure(figsize=(WIDTH, height), dpi=DPI, layout=layout)
    FigureCanvasAgg(figure)
    yield figure
    with files.atomic(path) as temporary:
      figure.savefig(temporary, format="png")
