"""Pictures of the learned sigma of every module."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib import colors
from matplotlib.axes import Axes

from experiments.networks.modules import network_order
from experiments.report import statistics
from experiments.report.pictures.canvas import (
  canvas,
  hue,
  label_ends,
  log_ticks,
  mark_break,
  title_of,
)
from experiments.runs.files import Path
from experiments.runs.results import Curve
from experiments.settings.algorithms import learns_sigma


def sigma_per_module(path: Path, curves: Sequence[Curve]) -> None:
  """Learned sigma of each module: a dot a seed, a bar their geometric mean.

  Modules without a prior (inf) and frozen ones (0) sit on their own lines, off the scale.
  """
  groups = _learned(curves)
  modules = network_order(
    {module for group in groups.values() for curve in group for module in curve.sigma}
  )
  sigma = {
    a: np.array([[curve.sigma.get(m, math.nan) for m in modules] for curve in group])
    for a, group in groups.items()
  }  # [K, modules] each
  scale = _sigma_scale(np.concatenate([values.ravel() for values in sigma.values()]))
  width = min(0.8 / len(sigma), 0.36)  # of an algorithm's column; a module's is 1 wide
  with canvas(path, 3.9) as figure:
    ax = figure.subplots()
    for i in range(0, len(modules), 2):
      ax.axvspan(i - 0.5, i + 0.5, color="#f6f6f6", linewidth=0, zorder=0)
    for i, (algorithm, values) in enumerate(sigma.items()):
      x = np.arange(len(modules)) + (i - (len(sigma) - 1) / 2) * width
      color = hue(algorithm)
      ax.hlines(
        scale.place(_geometric_mean(values)),
        x - 0.4 * width,
        x + 0.4 * width,
        color=color,
        linewidth=2.4,
        zorder=4,
        label=title_of(algorithm),
      )
      # Seeds side by side, so that equal ones stay visible.
      nudge = 0.24 * width * (np.linspace(-1, 1, len(values)) if len(values) > 1 else np.zeros(1))
      ax.scatter(
        x + nudge[:, None],
        scale.place(values),
        s=18,
        color=color,
        alpha=0.5,
        linewidths=0,
        zorder=3,
      )
    scale.apply(ax)
    ax.grid(axis="x", visible=False)
    ax.set_xlim(-0.5, len(modules) - 0.5)
    crowded = max(map(len, modules)) * len(modules) > 90
    ax.set_xticks(
      range(len(modules)),
      modules,
      rotation=35 if crowded else 0,
      ha="right" if crowded else "center",
      rotation_mode="anchor",
    )
    ax.tick_params(axis="x", length=0)
    ax.set_xlabel("Module, from input to output (dot: one seed, bar: geometric mean)")
    ax.set_title("Learned σ: how far a task may move each module", pad=25)
    ax.legend(
      loc="lower left",
      bbox_to_anchor=(-0.01, 1.0),
      ncols=4,
      frameon=False,
      borderaxespad=0.2,
      handlelength=1.2,
      columnspacing=1.8,
    )


def sigma_heat_map(path: Path, curves: Sequence[Curve]) -> None:
  """log10 sigma of every module over training, geometric mean over seeds; a panel an algorithm."""
  groups = _learned(curves)
  with canvas(path, 1.0 + 2.4 * len(groups)) as figure:
    axes = figure.subplots(len(groups), 1, sharex=True, squeeze=False)[:, 0]
    for ax, (algorithm, group) in zip(axes, groups.items(), strict=True):
      modules = network_order(group[0].sigma)
      log = [[np.log10(c.history[f"sigma/{m}"]) for m in modules] for c in group]
      mean = np.mean(log, 0)  # [modules, meta-steps]
      image = ax.imshow(mean, aspect="auto", cmap="viridis", interpolation="nearest")
      ax.set_yticks(range(len(modules)), modules)
      ax.set_title(
        f"{title_of(algorithm)}: log10 of sigma, seeds {', '.join(str(c.seed) for c in group)}"
      )
      ax.grid(False)
      figure.colorbar(image, ax=ax)
    axes[-1].set_xlabel("Meta-steps")


def sigma_history(path: Path, curves: Sequence[Curve]) -> None:
  """Learned sigma against meta-steps: a panel an algorithm, a line a module.

  Bold: the geometric mean over seeds, thin: each seed. Reads `history["sigma/<module>"]`, and
  `history["step"]` for the meta-steps; without it the records are numbered.
  """
  groups = _learned(curves)
  modules = network_order(
    {
      name.removeprefix("sigma/")
      for group in groups.values()
      for curve in group
      for name in curve.history
      if name.startswith("sigma/")
    }
  )
  if not modules:
    raise ValueError(
      'Wanted "sigma/<module>" in the history of a curve that learns sigma; got '
      "none. Record sigma while training."
    )
  traces = {a: [_trace(curve, modules) for curve in group] for a, group in groups.items()}
  scale = _sigma_scale(np.concatenate([y.ravel() for t in traces.values() for _, y in t]))
  looks = _module_looks(modules)
  with canvas(path, 0.7 + len(groups) * max(2.2, 0.17 * len(modules) + 0.3)) as figure:
    panels = figure.subplots(len(groups), 1, sharex=True, sharey=True, squeeze=False)[:, 0].tolist()
    for ax, (algorithm, group) in zip(panels, traces.items(), strict=True):
      end = min(len(step) for step, _ in group)  # a seed cut short shortens the mean only
      mean = _geometric_mean(np.stack([y[:, :end] for _, y in group]))
      for i, module in enumerate(modules):
        color, dashes = looks[i]
        for step, y in group if len(group) > 1 else ():
          ax.plot(step, scale.place(y[i]), color=color, linewidth=0.6, alpha=0.35)
        ax.plot(
          group[0][0][:end],
          scale.place(mean[i]),
          color=color,
          linewidth=1.7,
          linestyle=dashes,
          label=module,
        )
      scale.apply(ax)
      ax.margins(x=0.01)
      ax.set_title(f"Learned σ during meta-training: {title_of(algorithm)}")
    panels[-1].set_xlabel("Meta-step")
    label_ends(figure, panels)


class _Scale(NamedTuple):
  """A log axis for sigma on which 0 and inf have a line of their own."""

  low: float  # [] smallest and
  high: float  # [] largest value on the log scale
  zero: float  # [] where 0 is drawn
  inf: float  # [] where inf is drawn
  has_zero: bool
  has_inf: bool

  def place(self, sigma: np.ndarray) -> np.ndarray:
    """Where to draw sigma [...]; nan stays out of the picture."""
    return np.where(sigma == 0, self.zero, np.where(np.isposinf(sigma), self.inf, sigma))

  def apply(self, ax: Axes) -> None:
    ticks = {tick: f"{tick:g}" for tick in log_ticks(self.low, self.high)}
    if self.has_zero:
      ticks[self.zero] = "0, frozen"
    if self.has_inf:
      ticks[self.inf] = "∞, no prior"
    margin = (self.high / self.low) ** 0.05
    ax.set_yscale("log")
    ax.set_ylim(
      (self.zero if self.has_zero else self.low) / margin,
      (self.inf if self.has_inf else self.high) * margin,
    )
    ax.set_yticks(list(ticks), list(ticks.values()))
    ax.set_yticks([], minor=True)
    for pinned, edge, own in (
      (self.zero, self.low, self.has_zero),
      (self.inf, self.high, self.has_inf),
    ):
      if own:
        mark_break(ax, math.sqrt(pinned * edge), "y")


def _sigma_scale(sigma: np.ndarray) -> _Scale:
  """The scale that shows every entry of sigma."""
  finite = sigma[np.isfinite(sigma) & (sigma > 0)]
  low, high = (finite.min(), finite.max()) if finite.size else (1.0, 1.0)
  if high < 3 * low:  # differences below a factor of 3 should look small
    middle = math.sqrt(low * high)
    low, high = middle / 3**0.5, middle * 3**0.5
  gap = (high / low) ** 0.22
  return _Scale(
    low, high, low / gap, high * gap, bool((sigma == 0).any()), bool(np.isposinf(sigma).any())
  )


def _learned(curves: Sequence[Curve]) -> dict[str, list[Curve]]:
  groups = {
    a: group for a, group in statistics.group_by_algorithm(curves).items() if learns_sigma(a)
  }
  if not any(curve.sigma for group in groups.values() for curve in group):
    names = ", ".join(sorted({curve.algorithm for curve in curves}))
    raise ValueError(
      f"Wanted a curve of an algorithm that learns sigma; got {names}. "
      "Leave this picture out, or train sigma_imaml."
    )
  return groups


def _trace(curve: Curve, modules: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
  """Meta-steps [R] and sigma [modules, R] of one run; nan for a module without a record."""
  found = {m: curve.history[f"sigma/{m}"] for m in modules if f"sigma/{m}" in curve.history}
  length = max(map(len, found.values()), default=0)
  steps = np.asarray(curve.history.get("step", range(1, length + 1)), float)
  if any(len(values) != len(steps) for values in found.values()):
    lengths = {m: len(values) for m, values in found.items()}
    raise ValueError(
      f"{curve.algorithm}, seed {curve.seed}: history records sigma once a step; "
      f"got {len(steps)} steps and {lengths}. Record both together."
    )
  absent = [math.nan] * len(steps)
  return steps, np.array([found.get(m, absent) for m in modules], float)


def _geometric_mean(sigma: np.ndarray) -> np.ndarray:
  """Over the leading axis; 0 if one is 0, inf if one is inf, nan for both."""
  with np.errstate(divide="ignore", invalid="ignore"):  # log 0, and inf − inf
    return np.exp(np.log(sigma).mean(0))


def _module_looks(modules: Sequence[str]) -> list[tuple[str, str]]:
  """(colour, line style) each: dark to light from input to output, normalisations dashed."""
  norm = ["norm" in module.lower() for module in modules]
  depth = np.cumsum([i > 0 and not is_norm for i, is_norm in enumerate(norm)])
  shades = matplotlib.colormaps["viridis"](0.72 * depth / max(depth[-1], 1))
  return [
    (colors.to_hex(shade), "--" if is_norm else "-")
    for shade, is_norm in zip(shades, norm, strict=True)
  ]
