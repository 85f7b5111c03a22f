"""Draw the estimates of many tasks: shrunk to the shared value, and from each task's data alone."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import scipy  # loads scipy.special, half a second, at its first use

from shrinkmeta.checks import scalars, validate
from shrinkmeta.checks.kinds import shown
from shrinkmeta.plots import look

if TYPE_CHECKING:
  from matplotlib.figure import Figure

_MOST_NAMES = 60


class Estimates(NamedTuple):
  """T estimates to draw, and the words of their legend.

  Attributes:
    mean, sd: [T], the estimates and their standard deviations.
    own: [T], the estimates from the data of each task alone, or None.
    names: the T names of the rows of the panel.
    centre: the shared value, or None.
    sigma: the standard deviation between tasks, or None.
    level: the probability of the intervals.
    word: what `centre` is called in the legend.
    spread: what `sigma` is called in the legend.
  """

  mean: np.ndarray
  sd: np.ndarray
  own: np.ndarray | None
  names: Sequence[str]
  centre: float | None
  sigma: float | None
  level: float = 0.95
  word: str = "φ"
  spread: str = "σ"


def shrunk_estimates(
  mean: Any,
  sd: Any,
  *,
  unshrunk: Any = None,
  names: Sequence[str] | None = None,
  centre: float | None = None,
  sigma: float | None = None,
  level: float = 0.95,
  ax: Any = None,
) -> "Figure":
  """Draw one parameter of T tasks with intervals, from the largest estimate to the smallest.

      mean -+ Phi^-1((1 + level) / 2) sd

  Args:
    mean: [T] the estimates, such as the means of the tasks' posteriors.
    sd: [T] their standard deviations.
    unshrunk: [T] the estimates from the data of each task alone, or None.
    names: T names of tasks. No names are shown if `names` is None or if T is more than 60.
    centre: the shared value phi, or None.
    sigma: the standard deviation between tasks, drawn as a band around `centre`, or None.
    level: the probability of the intervals, between 0 and 1.
    ax: matplotlib Axes to draw on. None makes a figure.

  Returns:
    A matplotlib Figure.

  Raises:
    ImportError: matplotlib is not installed.
    TypeError, ValueError: an argument is wrong; the message names it.

  Example:
    >>> figure = shrunk_estimates(np.array([0.4, -0.2]), np.array([0.1, 0.1]), names=["b", "a"])
    >>> [text.get_text() for text in figure.axes[0].get_yticklabels()]
    ['b', 'a']
  """
  mean = _numbers("mean", mean)
  sd = _numbers("sd", sd, mean.size)
  if (sd < 0).any():
    raise ValueError(f"sd must not be negative; got {sd.min():g}.")
  own = None if unshrunk is None else _numbers("unshrunk", unshrunk, mean.size)
  labels = _names(names, mean.size)
  if not 0 < scalars.number("level", level) < 1:
    raise ValueError(f"level must lie between 0 and 1; got {level}.")
  centre = None if centre is None else scalars.number("centre", centre)
  sigma = None if sigma is None else scalars.number("sigma", sigma)
  if sigma is not None and (centre is None or not sigma >= 0):
    raise ValueError(f"sigma must not be negative and needs centre; got sigma={sigma}.")
  many = mean.size > _MOST_NAMES
  figure, ax = look.panel(ax, height_for(mean.size), look.width_for([] if many else labels))
  look.title(ax, f"Estimates of {look.counted(mean.size, 'task')}")
  draw(ax, Estimates(mean, sd, own, labels, centre, sigma, level))
  return figure


def height_for(count: int) -> float:
  """Return the height in inches of a picture of `count` estimates."""
  return 1.5 + min(7.5, (0.1 if count > _MOST_NAMES else 0.19) * count)


def draw(ax: Any, found: Estimates) -> None:
  """Draw estimates on a panel, from the largest to the smallest, and a legend below its title.

  Args:
    ax: the panel, whose title is already written.
    found: the estimates.
  """
  mean, sd, own, labels, centre, sigma, level, word, spread = found
  many = mean.size > _MOST_NAMES
  order, y, entries = np.argsort(-mean, kind="stable"), np.arange(mean.size), {}
  if many:
    ax.set(yticks=[], ylim=(mean.size, -1))
  else:
    look.name_rows(ax, [labels[int(i)] for i in order])
  thin = 0.5 if many else 1.0
  half = scipy.special.ndtri(0.5 + 0.5 * level) * sd
  _limits(ax, mean, half, centre, sigma)
  if sigma is not None and centre is not None:
    span = np.clip((centre - sigma, centre + sigma), *ax.get_xlim())  # sigma may be infinite
    entries[f"{word} ± {spread}"] = ax.axvspan(*span, color="#cfe3f1", linewidth=0, zorder=0.5)
  if centre is not None:
    entries[word] = ax.axvline(centre, color=look.QUIET, linewidth=1.0, linestyle="--", zorder=1)
  if own is not None:
    style = {"marker": "s", "linestyle": "none", "markerfacecolor": "none"}
    style |= {"markersize": 4 * thin, "markeredgewidth": thin, "zorder": 2}
    entries["by itself"] = ax.plot(own[order], y, color=look.COLORS[1], **style)[0]
  style = {"marker": "o", "linestyle": "none", "markersize": 4 * thin, "linewidth": 1.2 * thin}
  drawn = ax.errorbar(mean[order], y, xerr=half[order], color=look.COLORS[0], zorder=3, **style)
  entries[f"shrunk, {100 * level:g} % interval"] = drawn
  look.legend_above(ax, entries)


def _limits(
  ax: Any, mean: np.ndarray, half: np.ndarray, centre: float | None, sigma: float | None
) -> None:
  """Show all intervals. An estimate of a task by itself may lie far outside, off the picture.

  An interval without finite ends still shows its middle.
  """
  ends = [mean, mean - half, mean + half]
  if centre is not None:
    band = sigma or 0.0
    ends.append(np.array([centre, centre - band, centre + band]))
  inner = np.concatenate(ends)
  inner = inner[np.isfinite(inner)]
  if inner.size:
    margin = 0.4 * (np.ptp(inner) or 1.0)
    ax.set_xlim(inner.min() - margin, inner.max() + margin)


def _numbers(name: str, value: Any, size: int | None = None) -> np.ndarray:
  """Return the argument as an array [T] of floats."""
  validate.array(name, value, "an array [T]", numbers=False)
  found = np.asarray(value)
  if found.ndim != 1 or not found.size or size not in (None, found.size):
    wanted = "[T]" if size is None else f"[{size}], one number for each task"
    raise ValueError(f"{name} must be {wanted}; got shape {found.shape}.")
  return found.astype(float)


def _names(names: Any, count: int) -> list[str]:
  """Return the names of the tasks."""
  if names is None:
    return [""] * count
  sequence = isinstance(names, Sequence) and not isinstance(names, str)
  if not sequence or not all(isinstance(name, str) for name in names):
    raise TypeError(f"names must be a list of strings; got {shown(names)}.")
  if len(names) != count:
    raise ValueError(f"names must be {count} strings, one for each task; got {len(names)}.")
  return list(names)
