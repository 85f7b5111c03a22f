"""The residuals of a mixed model: against fitted means, and against a normal distribution."""

from typing import TYPE_CHECKING, Any

import numpy as np
import scipy  # loads scipy.special, half a second, at its first use

from shrinkmeta.plots import look

if TYPE_CHECKING:
  from shrinkmeta.mixed import Model

_DOTS = {"color": look.COLORS[0], "markersize": 4}


def size_of_residuals(model: "Model") -> tuple[float, float]:
  """Return the width and height in inches of `draw_residuals`."""
  del model
  return look.WIDTH, 3.6


def draw_residuals(part: Any, model: "Model") -> None:
  """Draw the Pearson residuals of the fitted rows against their fitted means.

  Args:
    part: the subfigure.
    model: the fitted model.
  """
  from shrinkmeta import mixed

  mean, residuals = mixed.residuals(model)
  (ax,) = look.panels_of(part)
  ax.axhline(0.0, color=look.QUIET, linewidth=1)
  ax.plot(mean, residuals, ".", alpha=0.6, **_DOTS)
  look.axis_labels(ax, f"fitted {model.design.response_name}", "Pearson residual")


def size_of_quantiles(model: "Model") -> tuple[float, float]:
  """Return the width and height in inches of `draw_quantiles`."""
  return 3.2 * (1 + len(model.estimates.sd)), 3.4


def draw_quantiles(part: Any, model: "Model") -> None:
  """Draw residuals and standardised group effects against normal quantiles.

  Args:
    part: the subfigure.
    model: the fitted model.
  """
  from shrinkmeta import mixed

  samples = {"residuals": mixed.residuals(model)[1]}
  for key, effect in mixed.effects(model).items():
    spread = np.std(effect.mode)
    if spread > 0:
      samples[key] = (effect.mode - effect.mode.mean()) / spread
  axes = look.panels_of(part, 1, len(samples))
  for ax, (name, values) in zip(axes, samples.items(), strict=True):
    normal = scipy.special.ndtri((np.arange(len(values)) + 0.5) / len(values))
    ax.plot(normal, normal, color=look.QUIET, linewidth=1)
    ax.plot(normal, np.sort(values), ".", **_DOTS)
    look.axis_labels(ax, "normal quantile", name)
