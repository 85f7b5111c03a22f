"""Draw the group effects of a mixed model: with intervals, or shrunk against unshrunk."""

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from shrinkmeta.plots import estimates, look

if TYPE_CHECKING:
  from shrinkmeta.mixed import Effects, Model

_PANEL = 5.2  # inches


def size_of_groups(model: "Model") -> tuple[float, float]:
  """Return the width and height in inches of `draw_groups`."""
  most = max(model.estimates.groups.values())
  labels = [label for term in model.design.random for label in term.levels]
  width = look.width_for(labels, _PANEL)
  return width * len(model.estimates.sd), 0.5 + estimates.height_for(most)


def draw_groups(part: Any, model: "Model") -> None:
  """Draw groups in the order of their shrunk estimates, a panel for each random effect.

  Args:
    part: the subfigure.
    model: the fitted model.
  """
  from shrinkmeta import mixed

  fit, own = model.estimates, mixed.unshrunk(model)
  axes = look.panels_of(part, 1, len(fit.sd))
  for ax, (key, effect) in zip(axes, mixed.effects(model).items(), strict=True):
    name, centre, fixed = _fixed_effect(model, key, effect)
    low, high = fit.sd_interval[key]
    between = "" if math.isnan(low) else f" [{low:.3g}, {high:.3g}]"
    between = ", a boundary estimate" if fit.sd[key] == 0 else between
    found = estimates.Estimates(
      effect.value,
      effect.sd,
      None if np.isnan(own[key]).all() else own[key],
      effect.levels,
      centre,
      fit.sd[key],
      word="fixed effect" if fixed else "0",
      spread="sd",
    )
    look.title(ax, f"{name} by {effect.group}")
    estimates.draw(ax, found)
    look.axis_labels(ax, f"{key}\nsd {fit.sd[key]:.3g}{between}", effect.group)


def size_of_shrinkage(model: "Model") -> tuple[float, float]:
  """Return the width and height in inches of `draw_shrinkage`."""
  return _PANEL * len(model.estimates.sd), 3.6


def draw_shrinkage(part: Any, model: "Model") -> None:
  """Draw shrunk estimates against the groups' own estimates, a panel for each random effect.

  Args:
    part: the subfigure.
    model: the fitted model.
  """
  from shrinkmeta import mixed

  own = mixed.unshrunk(model)
  axes = look.panels_of(part, 1, len(model.estimates.sd))
  for ax, (key, effect) in zip(axes, mixed.effects(model).items(), strict=True):
    known = np.isfinite(own[key])
    size = 8 + 60 * effect.rows[known] / effect.rows.max()
    ax.scatter(own[key][known], effect.value[known], size, color=look.COLORS[0], alpha=0.6)
    if known.any():  # a group of another family than gaussian has no estimate of its own
      ends = [float(own[key][known].min()), float(own[key][known].max())]
      ax.plot(ends, ends, color=look.QUIET, linewidth=1)
    ax.axhline(_fixed_effect(model, key, effect)[1], color=look.QUIET, linewidth=1, linestyle="--")
    look.axis_labels(ax, f"{key} by itself", f"{key} shrunk")
    look.title(ax, "Area of a point: rows of the group")


def _fixed_effect(model: "Model", key: str, effect: "Effects") -> tuple[str, float, bool]:
  """Return (the column of a random effect, its fixed effect or 0, whether it has one)."""
  fit = model.estimates
  name = key.removeprefix(f"{effect.group} ") if len(fit.groups) > 1 else key
  return name, fit.fixed.get(name, 0.0), name in fit.fixed
