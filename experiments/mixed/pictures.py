"""Pictures of a fit; names are escaped, because matplotlib reads text between two $ as a formula.

groups      every group's shrunk estimate with its interval, and its unshrunk estimate
shrinkage   the shrunk estimate against the unshrunk one
residuals   Pearson residuals against fitted means
quantiles   residuals and standardised group effects against a normal distribution
"""

import math
import pathlib
from collections.abc import Callable
from typing import Any

import matplotlib
import matplotlib.figure
import numpy as np
import scipy.special
from matplotlib.backend_bases import FigureCanvasBase

import shrinkmeta as sm
from experiments.runs import files
from shrinkmeta import mixed

_KNOWN = sorted(FigureCanvasBase.get_supported_filetypes())
SUFFIXES = (".png", *(f".{name}" for name in _KNOWN if name != "png"))


def write(path: pathlib.Path, model: mixed.Model, kind: str) -> None:
  """Write a picture in the format that the file's suffix names."""
  matplotlib.use("agg")
  figure = draw(model, kind)
  with files.atomic(path) as temporary:
    figure.savefig(temporary, dpi=150, format=path.suffix[1:].lower())


def draw(model: mixed.Model, kind: str) -> matplotlib.figure.Figure:
  """Draw "groups", "shrinkage", "residuals" or "quantiles"; "all" draws them below each other."""
  kinds = list(_KINDS) if kind == "all" else [kind]
  columns = len(model.estimates.sd)
  heights = [_height(model) if k == "groups" else 3.6 for k in kinds]
  figure = matplotlib.figure.Figure(
    figsize=(5.6 * max(columns, len(kinds) > 1 and 2), sum(heights)), layout="constrained"
  )
  parts = figure.subfigures(len(kinds), 1, height_ratios=heights, squeeze=False)[:, 0]
  for part, one in zip(parts, kinds, strict=True):
    _KINDS[one](part, model)
  return figure


def _height(model: mixed.Model) -> float:
  most = max(model.estimates.groups.values())
  return min(9.0, 1.6 + 0.18 * most)


def _groups(part: Any, model: mixed.Model) -> None:
  """Draw groups in the order of their shrunk estimates, with one panel for each random effect."""
  fit, own = model.estimates, mixed.unshrunk(model)
  axes = part.subplots(1, len(fit.sd), squeeze=False)[0]
  for ax, (key, effect) in zip(axes, mixed.effects(model).items(), strict=True):
    sm.plots.shrunk_estimates(
      effect.value,
      effect.sd,
      unshrunk=None if np.isnan(own[key]).all() else own[key],
      names=effect.levels,
      centre=float(np.mean(effect.value - effect.mode)),
      sigma=fit.sd[key],
      ax=ax,
    )
    low, high = fit.sd_interval[key]
    between = "" if math.isnan(low) else f"[{low:.3g}, {high:.3g}]"
    between = "on the boundary" if fit.sd[key] == 0 else between
    ax.set_xlabel(f"{key}\nσ {fit.sd[key]:.3g}  {between}", parse_math=False)
    ax.set_ylabel(effect.group, parse_math=False)


def _shrinkage(part: Any, model: mixed.Model) -> None:
  own = mixed.unshrunk(model)
  axes = part.subplots(1, len(model.estimates.sd), squeeze=False)[0]
  for ax, (key, effect) in zip(axes, mixed.effects(model).items(), strict=True):
    known = np.isfinite(own[key])
    size = 8 + 60 * effect.rows[known] / effect.rows.max()
    ax.scatter(own[key][known], effect.value[known], size, color="tab:blue", alpha=0.6)
    if known.any():  # none of a family other than gaussian
      ends = [float(own[key][known].min()), float(own[key][known].max())]
      ax.plot(ends, ends, color="0.6", linewidth=1)
    ax.axhline(float(np.mean(effect.value - effect.mode)), color="0.8", linewidth=1)
    ax.set_xlabel(f"{key} by itself", parse_math=False)
    ax.set_ylabel("shrunk; the area of a point is its rows", fontsize=8)


def _residuals(part: Any, model: mixed.Model) -> None:
  mean, residuals = mixed.residuals(model)
  ax = part.subplots()
  ax.axhline(0.0, color="0.6", linewidth=1)
  ax.plot(mean, residuals, ".", color="tab:blue", ms=4, alpha=0.6)
  ax.set_xlabel(f"fitted {model.design.response_name}", parse_math=False)
  ax.set_ylabel("Pearson residual")


def _quantiles(part: Any, model: mixed.Model) -> None:
  samples = {"residuals": mixed.residuals(model)[1]}
  for key, effect in mixed.effects(model).items():
    spread = np.std(effect.mode)
    if spread > 0:
      samples[key] = (effect.mode - effect.mode.mean()) / spread
  for ax, (name, values) in zip(
    part.subplots(1, len(samples), squeeze=False)[0], samples.items(), strict=True
  ):
    count = len(values)
    normal = scipy.special.ndtri((np.arange(count) + 0.5) / count)
    ax.plot(normal, normal, color="0.6", linewidth=1)
    ax.plot(normal, np.sort(values), ".", color="tab:blue", ms=4)
    ax.set_xlabel("normal quantile")
    ax.set_ylabel(name, parse_math=False)


_KINDS: dict[str, Callable[[Any, mixed.Model], None]] = {
  "groups": _groups,
  "shrinkage": _shrinkage,
  "residuals": _residuals,
  "quantiles": _quantiles,
}
