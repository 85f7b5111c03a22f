"""The look that all pictures share: figures, colours, markers, dashes, ticks and legends.

matplotlib is imported when a picture is drawn, so that the library runs without it.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from shrinkmeta.checks import validate
from shrinkmeta.checks.kinds import shown

if TYPE_CHECKING:
  from matplotlib.artist import Artist
  from matplotlib.axes import Axes
  from matplotlib.figure import Figure
  from matplotlib.lines import Line2D

WIDTH = 7.5  # inches
INK, QUIET, GRID = "#222222", "#6b6b6b", "#e6e6e6"
# Okabe and Ito, Color Universal Design, 2008; orange and sky blue are darkened to carry text.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#b65a92", "#c98a00", "#3d9cd6", "#222222", "#7a7a7a")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1.5, 1)), (0, (6, 1.5, 1.5, 1.5)), (0, (9, 3)))
TITLE, TEXT, SMALL = 10, 9, 8.5  # points


class Look(NamedTuple):
  """How one line is drawn. No two of 40 lines have the same colour and the same dashes."""

  color: Any
  marker: str
  dashes: Any


def looks(names: Iterable[str], colors: Mapping[str, Any] | None = None) -> dict[str, Look]:
  """Return {name: Look}.

  Args:
    names: the names of the lines.
    colors: {name: colour}, which replaces the colours of some names.
  """
  own = colors or {}
  cycle = lambda values, i: values[i % len(values)]
  return {
    name: Look(own.get(name, cycle(COLORS, i)), cycle(MARKERS, i), cycle(DASHES, i + i // 8))
    for i, name in enumerate(names)
  }


def check_colors(colors: Any) -> None:
  """Raise TypeError or ValueError unless `colors` is {name: colour} or None."""
  import_matplotlib()
  from matplotlib.colors import is_color_like

  validate.instance("colors", colors, (Mapping, type(None)), "a dict {name: colour}, or None")
  for name, color in (colors or {}).items():
    validate.instance("the names in colors", name, str, "strings")
    if not is_color_like(color):
      raise ValueError(f"colors[{name!r}] must be a colour of matplotlib; got {shown(color)}.")


def import_matplotlib() -> None:
  """Import matplotlib, or raise an ImportError that says what to install."""
  try:
    import matplotlib.figure  # noqa: F401
  except ImportError as error:
    raise ImportError(
      "shrinkmeta.plots draws with matplotlib: pip install 'shrinkmeta[plots]'."
    ) from error


def figure(
  height: float, rows: int = 1, columns: int = 1, width: float = WIDTH, **options: Any
) -> tuple["Figure", list["Axes"]]:
  """Make a figure that belongs to no window, and its panels.

  Args:
    height: in inches.
    rows: the number of rows of panels.
    columns: the number of columns of panels.
    width: in inches.
    **options: what `Figure.subplots` takes.

  Returns:
    The figure and its panels, row by row.
  """
  import_matplotlib()
  from matplotlib.figure import Figure
  from matplotlib.layout_engine import ConstrainedLayoutEngine

  layout = ConstrainedLayoutEngine(h_pad=0.08, w_pad=0.05)  # inches
  made = Figure(figsize=(width, height), layout=layout)
  return made, panels_of(made, rows, columns, **options)


def panels_of(part: Any, rows: int = 1, columns: int = 1, **options: Any) -> list["Axes"]:
  """Make the panels of a figure or subfigure, with the spines, grid and ticks of all pictures.

  Args:
    part: the Figure or SubFigure.
    rows: the number of rows of panels.
    columns: the number of columns of panels.
    **options: what `Figure.subplots` takes.

  Returns:
    The panels, row by row.
  """
  panels = list(part.subplots(rows, columns, squeeze=False, **options).ravel())
  for ax in panels:
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set(color=QUIET, linewidth=0.7)
    ax.grid(color=GRID, linewidth=0.7)
    ax.set_axisbelow(True)
    ax.tick_params(color=QUIET, labelcolor=INK, labelsize=SMALL)
  return panels


def panel(ax: Any, height: float, width: float = WIDTH) -> tuple["Figure", "Axes"]:
  """Return the given axes and their figure, or a new figure with one panel.

  Args:
    ax: matplotlib Axes, or None.
    height: the height of a new figure, in inches.
    width: the width of a new figure, in inches.

  Raises:
    ImportError: matplotlib is not installed.
    TypeError: `ax` is neither Axes nor None.
  """
  if ax is None:
    made, panels = figure(height, width=width)
    return made, panels[0]
  import_matplotlib()
  from matplotlib.axes import Axes

  validate.instance("ax", ax, Axes, "matplotlib Axes, or None")
  return ax.get_figure(root=True), ax


def width_for(names: Iterable[str], width: float = WIDTH) -> float:
  """Return the width in inches of a figure with these names at its side.

  It is `width` if no name has more than 24 characters, and grows with the longest name.
  """
  return width + 0.07 * max(0, max(map(len, names), default=0) - 24)


def title(ax: "Axes", text: str, pad: float = 6) -> None:
  """Write the title of a panel at its left, with "$" as an ordinary character."""
  style = {"fontsize": TITLE, "fontweight": "bold", "color": INK, "parse_math": False}
  ax.set_title(text, loc="left", pad=pad, **style)


def counted(count: int, noun: str) -> str:
  """Return a number and its noun.

  >>> counted(1, "task"), counted(1200, "task")
  ('1 task', '1,200 tasks')
  """
  return f"{count:,} {noun}{'s' * (count != 1)}"


def alone(known: np.ndarray) -> np.ndarray:
  """Tell which known points [n] of a line have no known neighbour. A line does not show them.

  >>> alone(np.array([True, True, False, True])).tolist()
  [False, False, False, True]
  """
  beside = np.pad(known, 1)
  return known & ~beside[:-2] & ~beside[2:]


def line(ax: "Axes", x: np.ndarray, y: np.ndarray, **style: Any) -> "Line2D":
  """Draw y [n] against x [n] and return the line. It has dots at points without a neighbour."""
  points = np.flatnonzero(alone(np.isfinite(y))).tolist()
  return ax.plot(x, y, marker="o", markersize=3.5, markevery=points, **style)[0]


def axis_labels(ax: "Axes", x: str | None = None, y: str | None = None) -> None:
  """Write the labels of the axes, with "$" as an ordinary character."""
  for write, text in ((ax.set_xlabel, x), (ax.set_ylabel, y)):
    if text is not None:
      write(text, fontsize=TEXT, color=INK, parse_math=False)


def name_rows(ax: "Axes", names: Sequence[str]) -> None:
  """Write a name beside each of the rows 0, 1, ... of a panel, from top to bottom."""
  ax.set_yticks(range(len(names)), list(names), parse_math=False, fontsize=SMALL)
  ax.tick_params(axis="y", length=0)
  ax.set_ylim(len(names) - 0.5, -0.5)
  ax.grid(axis="y", visible=False)
  for i in range(0, len(names), 2):
    ax.axhspan(i - 0.5, i + 0.5, color="#f6f6f6", linewidth=0, zorder=0)


def legend_above(ax: "Axes", entries: Mapping[str, "Artist"], width: float = 5.0) -> None:
  """Draw a legend between the panel and its title.

  Args:
    ax: the panel. Its title moves up to make room.
    entries: {name: an Artist drawn in the style of this name}.
    width: the room for the legend, in inches.
  """
  inches = [0.55 + 0.075 * len(name) for name in entries]  # of a marker and a name
  fits = lambda n: sum(max(inches[i::n]) for i in range(n)) <= width
  columns = next((n for n in range(len(entries), 1, -1) if fits(n)), 1)
  made = ax.legend(
    list(entries.values()),
    [""] * len(entries),  # a label of matplotlib that begins with "_" would be left out
    loc="lower left",
    bbox_to_anchor=(-0.01, 1.0),
    ncols=columns,
    frameon=False,
    borderaxespad=0.2,
    fontsize=SMALL,
    handlelength=1.8,
  )
  for text, name in zip(made.get_texts(), entries, strict=True):
    text.set(text=name, parse_math=False, color=INK)
  if old := ax.get_title(loc="left"):
    title(ax, old, pad=9 + 13 * math.ceil(len(entries) / columns))


def log_ticks(low: float, high: float) -> list[float]:
  """Return round numbers in [low, high]: the more decades, the fewer numbers in each.

  >>> log_ticks(0.09, 1.2)
  [0.1, 0.2, 0.5, 1.0]
  """
  decades = math.log10(high / low)
  limits = ((1.1, (1, 1.5, 2, 3, 5, 7)), (2, (1, 2, 5)), (4, (1, 3)), (math.inf, (1,)))
  in_decade = next(numbers for most, numbers in limits if decades < most)
  exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
  step = max(1, math.ceil(decades / 12))
  ticks = [float(f"{m}e{e}") for e in exponents if e % step == 0 for m in in_decade]
  return [tick for tick in ticks if low <= tick <= high] or [float(f"{low:.2g}")]


def mark_break(ax: "Axes", at: float, axis: str) -> None:
  """Draw two strokes across a spine, because what lies beyond them is off the scale.

  Args:
    ax: the panel.
    at: the place of the strokes, in the units of the axis.
    axis: "x" or "y".
  """
  from matplotlib import transforms

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
      color=QUIET,
      marker=[(-0.5, -1), (0.5, 1)] if along_x else [(-1, -0.5), (1, 0.5)],
      markersize=7,
      linestyle="none",
      zorder=5,
    )
