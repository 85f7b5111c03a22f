"""The data of every group of a mixed model against one covariate, with the fitted lines."""

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from shrinkmeta.plots import look

if TYPE_CHECKING:
  from shrinkmeta.formulas.design import RandomTerm
  from shrinkmeta.mixed import Model

_INTERCEPT = "(Intercept)"
_MOST_PANELS, _COLUMNS = 36, 6  # with more groups all lines lie in one panel
_WORDS = ("shrunk", "by itself", "fixed effects")


class _Fitted(NamedTuple):
  """Fitted means [N] of the rows: shrunk, by each group alone or None, by fixed effects alone."""

  shrunk: np.ndarray
  own: np.ndarray | None
  fixed: np.ndarray


def covariate(model: "Model", x: str | None, *, needed: bool) -> str | None:
  """Return the name of the covariate to draw against.

  Args:
    model: the fitted model.
    x: the name that the user gave, or None.
    needed: raise an error if the model has no covariate.

  Returns:
    The name of a column, or None if the model has none.

  Raises:
    ValueError: the model has no column called `x`, or no covariate.
  """
  random = [name for term in model.design.random for name in term.names]
  names = [n for n in dict.fromkeys([*random, *model.design.fixed_names]) if n != _INTERCEPT]
  if x is not None and x not in names:
    raise ValueError(f"x must be one of {', '.join(names) or 'no covariates'}; got {x!r}.")
  if needed and not names:
    raise ValueError("kind 'lines' needs a covariate, and this model has none. Draw 'groups'.")
  return x or next(iter(names), None)


def size(model: "Model") -> tuple[float, float]:
  """Return the width and height in inches of `draw`."""
  count = len(_finest(model).levels)
  if count > _MOST_PANELS:
    return look.WIDTH, 4.8
  columns = min(count, _COLUMNS)
  return max(4.0, 1.6 * columns), 1.0 + 1.5 * math.ceil(count / columns)


def draw(part: Any, model: "Model", x: str) -> None:
  """Draw the rows and the fitted means of every group, joined in the order of the covariate.

  Each group has a panel. More than 36 groups share one, in which only the shrunk lines are drawn.
  Where other predictors vary between the rows of a group, the lines bend.

  Args:
    part: the subfigure.
    model: the fitted model.
    x: the name of the covariate.
  """
  term, response, fitted = _finest(model), *_means(model)
  at = _column(model, x)
  many = len(term.levels) > _MOST_PANELS
  if many:
    (ax,) = look.panels_of(part)
    ax.plot(at, response, ".", color=look.QUIET, markersize=2, alpha=0.4, zorder=1)
    panels = [ax] * len(term.levels)
    look.title(ax, f"{len(term.levels):,} groups of {term.group}")
  else:
    columns = min(len(term.levels), _COLUMNS)
    rows = math.ceil(len(term.levels) / columns)
    grid = look.panels_of(part, rows, columns, sharex=True, sharey=True)
    for ax in grid[len(term.levels) :]:
      ax.remove()
    panels = grid[: len(term.levels)]
    for ax, label in zip(panels, term.levels, strict=True):
      ax.set_title(label, fontsize=look.SMALL, color=look.INK, parse_math=False)
  entries: dict[str, Any] = {}
  for g, ax in enumerate(panels):
    own = np.flatnonzero(term.index == g)
    own = own[np.argsort(at[own], kind="stable")]
    if not many:
      ax.plot(at[own], response[own], ".", color=look.QUIET, markersize=4, zorder=1)
    styles = (
      {"color": look.COLORS[0], "linewidth": 0.5 if many else 1.5, "zorder": 3},
      {"color": look.COLORS[1], "linewidth": 1.0, "linestyle": "--", "zorder": 2},
      {"color": look.INK, "linewidth": 0.8, "linestyle": ":", "zorder": 2},
    )
    for word, values, style in zip(_WORDS, fitted, styles, strict=True):
      if values is not None and (not many or word == "shrunk"):
        # A line between rows with the same covariate, or of one row, would be invisible.
        marker = "" if np.ptp(at[own]) > 0 else "o"
        entries[word] = ax.plot(at[own], values[own], marker=marker, markersize=3, **style)[0]
  for write, text in ((part.supxlabel, x), (part.supylabel, model.design.response_name)):
    write(text, fontsize=look.TEXT, color=look.INK, parse_math=False)
  part.legend(
    list(entries.values()),
    list(entries),
    loc="outside upper left",
    ncols=len(entries),
    frameon=False,
    fontsize=look.SMALL,
  )


def _finest(model: "Model") -> "RandomTerm":
  """The first random term of the factor with the most groups."""
  return max(model.design.random, key=lambda term: len(term.levels))


def _column(model: "Model", x: str) -> np.ndarray:
  """The column [N] of a covariate."""
  design = model.design
  if x in design.fixed_names:
    return design.fixed[:, design.fixed_names.index(x)]
  return next(t.columns[:, t.names.index(x)] for t in design.random if x in t.names)


def _means(model: "Model") -> tuple[np.ndarray, _Fitted]:
  """The response [N], as a share of the trials if it has trials, and the fitted means."""
  from shrinkmeta import mixed
  from shrinkmeta.mixed.answers.predict import mean_of

  design, fit = model.design, model.estimates
  trials = 1.0 if design.trials is None else design.trials
  shrunk = mixed.predict(model)
  fixed = design.offset + design.fixed @ np.array(list(fit.fixed.values()))
  own = None
  effects, alone = mixed.effects(model), mixed.unshrunk(model)
  random = {name for term in design.random for name in term.names}
  # `unshrunk` estimates every coefficient from the group. It knows those of random effects only.
  if fit.family == "gaussian" and len(fit.groups) == 1 and random >= set(design.fixed_names):
    own = shrunk.eta.copy()
    for term in design.random:
      for j, name in enumerate(term.names):
        own += term.columns[:, j] * (alone[name] - effects[name].value)[term.index]
  return design.response / trials, _Fitted(shrunk.mean, own, mean_of(fixed, fit.family))
