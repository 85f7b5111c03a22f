"""The colours and markers of algorithms, and figures as PNG files.

In a picture that is shown 900 pixels wide, text is about as large as the text around it. An
algorithm has the hue of the method that it extends.
"""

import zlib
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.runs import files
from experiments.runs.files import Path

DPI = 240  # dots per inch: 1,800 dots for a figure 7.5 inches wide
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


def hue(algorithm: str) -> str:
  name = algorithm.removeprefix("sigma_")
  return _HUES.get(name, _SPARE_HUES[zlib.crc32(name.encode()) % len(_SPARE_HUES)])


def title_of(algorithm: str) -> str:
  name = algorithm.removeprefix("sigma_")
  return ("σ-" if name != algorithm else "") + _TITLES.get(name, name.replace("_", " "))


def line(ax: Axes, x: Any, y: Any, label: str, like: str, method: str) -> None:
  """Draw the losses of a method: a thick line if it learns sigma, and else a dashed one.

  Args:
    ax: where to draw.
    x, y: the points of the line.
    label: the text in the legend.
    like: the algorithm whose colour the line has: see `hue`.
    method: the name of the method; one with a learned sigma begins with "sigma".
  """
  ours = method.startswith("sigma")
  ax.plot(
    x,
    y,
    label=label,
    color=hue(like),
    linewidth=2.2 if ours else 1.2,
    marker="o",
    markersize=4 if ours else 2.5,
    linestyle="-" if ours else "--",
  )


def save(path: Path, figure: Figure) -> None:
  """Write the figure as a PNG, whole or not at all."""
  with files.atomic(path) as temporary:
    figure.savefig(temporary, dpi=DPI, format="png")
