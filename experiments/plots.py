"""Pictures of what a run of an experiment found, as PNG.

Every picture is 7.5 inches wide: shown 900 pixels wide, its text is about as large as the text
around it. An algorithm has one look in all of them: the hue tells what a method is built on, and a
thick solid line with filled dots that it learns sigma.
"""

import contextlib
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib import colors, layout_engine, transforms
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from scipy import optimize

from experiments import results
from experiments.results import Curve, Path

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


_PANELS = {
  "accuracy": ("Accuracy on unseen tasks, %", 100.0),
  "nll": ("Negative log-likelihood on unseen tasks, nats per example", 1.0),
}


def learns_sigma(algorithm: str) -> bool:
  """True for the rows of the table that learn one sigma a module, of a prior."""
  return algorithm.startswith("sigma_") or algorithm == "empirical_bayes"


def adaptation_curves(path: Path, curves: Sequence[Curve]) -> None:
  """Accuracy and negative log-likelihood against adaptation steps, with 95 % bands over episodes.

  Args:
    path: the PNG to write.
    curves: at equal steps and on the same episodes; seeds are averaged per episode.
  """
  results.group_by_algorithm(curves)  # checks them
  fields = list(_PANELS) if results.has(curves, "accuracy") else ["nll"]
  steps = np.asarray(curves[0].steps)
  x = _step_positions(steps)
  with _canvas(path, 3.3 * len(fields)) as figure:
    panels = list(figure.subplots(len(fields), 1, sharex=True, squeeze=False)[:, 0])
    for ax, field in zip(panels, fields, strict=True):
      title, scale = _PANELS[field]
      _adaptation_panel(ax, x, results.average_seeds(curves, field), scale)
      ax.set_title(title)
      ax.tick_params(axis="x", length=0)
    bottom = panels[-1]
    bottom.tick_params(axis="x", length=3.5)
    bottom.set_xticks(x, [f"{step:,}" for step in steps])
    episodes = np.shape(curves[0].accuracy)[1]
    bottom.set_xlabel(f"Adaptation steps (bands: 95 % intervals over {episodes:,} tasks)")
    means = np.concatenate([np.asarray(line.get_ydata()) for line in bottom.get_lines()])
    means = means[np.isfinite(means)]
    low, high = (means.min(), means.max()) if means.size else (1.0, 1.0)
    if 0 < 8 * low < high:  # one diverging method would flatten all others
      bottom.set_yscale("log")
      ticks = _log_ticks(low, high)
      bottom.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
      bottom.set_yticks([], minor=True)
    if steps[0] == 0 and len(steps) > 1:
      _mark_break(bottom, (x[0] + x[1]) / 2, "x")
    _label_ends(figure, panels)


def data_curves(path: Path, found: Mapping[float, Sequence[Curve]], step: int, label: str) -> None:
  """As `adaptation_curves`, after one number of adaptation steps, against how much data there is.

  Args:
    path: the PNG to write.
    found: amount of data -> curves; each amount has its own tasks.
    step: index into `Curve.steps`.
    label: what the amount is.
  """
  amounts = sorted(found)
  whole = [results.group_by_algorithm(found[amount]) for amount in amounts]
  fields = [field for field in _PANELS if all(results.has(found[a], field) for a in amounts)]
  with _canvas(path, 3.3 * len(fields)) as figure:
    panels = list(figure.subplots(len(fields), 1, sharex=True, squeeze=False)[:, 0])
    for ax, field in zip(panels, fields, strict=True):
      title, scale = _PANELS[field]
      means = [results.average_seeds(found[amount], field) for amount in amounts]
      series = {
        name: np.stack([mean[name][step] for mean in means])
        for name in whole[0]
        if all(name in group for group in whole)
      }
      _adaptation_panel(ax, np.log10(amounts), series, scale)
      ax.set_title(title)
      ax.tick_params(axis="x", length=0)
    panels[-1].tick_params(axis="x", length=3.5)
    panels[-1].set_xticks(np.log10(amounts), [f"{amount:g}" for amount in amounts])
    steps = np.asarray(found[amounts[0]][0].steps)
    panels[-1].set_xlabel(
      f"{label} (after {steps[step]:,} adaptation steps; bands: 95 % intervals)"
    )
    _label_ends(figure, panels)


def sigma_per_module(path: Path, curves: Sequence[Curve]) -> None:
  """Learned sigma of each module: a dot a seed, a bar their geometric mean.

  Modules without a prior (inf) and frozen ones (0) sit on their own lines, off the scale.
  """
  groups = _learned(curves)
  modules = results.network_order(
    {module for group in groups.values() for curve in group for module in curve.sigma}
  )
  sigma = {
    a: np.array([[curve.sigma.get(m, math.nan) for m in modules] for curve in group])
    for a, group in groups.items()
  }  # [K, modules] each
  scale = _sigma_scale(np.concatenate([values.ravel() for values in sigma.values()]))
  width = min(0.8 / len(sigma), 0.36)  # of an algorithm's column; a module's is 1 wide
  with _canvas(path, 3.9) as figure:
    ax = figure.subplots()
    for i in range(0, len(modules), 2):
      ax.axvspan(i - 0.5, i + 0.5, color="#f6f6f6", linewidth=0, zorder=0)
    for i, (algorithm, values) in enumerate(sigma.items()):
      x = np.arange(len(modules)) + (i - (len(sigma) - 1) / 2) * width
      color = _hue(algorithm)
      ax.hlines(
        scale.place(_geometric_mean(values)),
        x - 0.4 * width,
        x + 0.4 * width,
        color=color,
        linewidth=2.4,
        zorder=4,
        label=_title(algorithm),
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
  with _canvas(path, 1.0 + 2.4 * len(groups)) as figure:
    axes = figure.subplots(len(groups), 1, sharex=True, squeeze=False)[:, 0]
    for ax, (algorithm, group) in zip(axes, groups.items(), strict=True):
      modules = results.network_order(group[0].sigma)
      log = [[np.log10(c.history[f"sigma/{m}"]) for m in modules] for c in group]
      mean = np.mean(log, 0)  # [modules, meta-steps]
      image = ax.imshow(mean, aspect="auto", cmap="viridis", interpolation="nearest")
      ax.set_yticks(range(len(modules)), modules)
      ax.set_title(
        f"{_title(algorithm)}: log10 of sigma, seeds {', '.join(str(c.seed) for c in group)}"
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
  modules = results.network_order(
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
  with _canvas(path, 0.7 + len(groups) * max(2.2, 0.17 * len(modules) + 0.3)) as figure:
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
      ax.set_title(f"Learned σ during meta-training: {_title(algorithm)}")
    panels[-1].set_xlabel("Meta-step")
    _label_ends(figure, panels)


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
    ticks = {tick: f"{tick:g}" for tick in _log_ticks(self.low, self.high)}
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
        _mark_break(ax, math.sqrt(pinned * edge), "y")


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


def _log_ticks(low: float, high: float) -> list[float]:
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


def _step_positions(steps: np.ndarray) -> np.ndarray:
  """log10 of steps [S], ascending; 0 stands a little before the first positive step."""
  positive = steps[steps > 0]
  before = np.log10(positive[0]) - 0.4 if positive.size else 0.0
  return np.concatenate([np.full(len(steps) - len(positive), before), np.log10(positive)])


def _adaptation_panel(ax: Axes, x: np.ndarray, series: dict[str, np.ndarray], scale: float) -> None:
  """Draws scale · mean ± 95 % of each series [S, E] over x [S]; diverged points are left out."""
  for algorithm, values in series.items():
    mean, half = scale * np.array([results.interval(row) for row in values]).T
    mean[~np.isfinite(mean)] = np.nan
    color, learned = _hue(algorithm), learns_sigma(algorithm)
    band = np.isfinite(half)
    ax.fill_between(
      x,
      mean - half,
      mean + half,
      where=band.tolist(),
      color=color,
      alpha=0.15,
      linewidth=0,
      zorder=2,
    )
    label = _title(algorithm) + (" (diverged)" if np.isnan(mean[-1]) else "")
    ax.plot(
      x,
      mean,
      color=color,
      label=label,
      zorder=4 if learned else 3,
      linewidth=2.0 if learned else 1.2,
      linestyle="-" if learned else (0, (4, 1.5)),
      marker="o",
      markersize=4.2 if learned else 3.8,
      markeredgewidth=1.0,
      markerfacecolor=color if learned else "white",
    )
  ax.margins(x=0.02)


def _mark_break(ax: Axes, at: float, axis: str) -> None:
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


def _label_ends(figure: Figure, panels: Sequence[Axes]) -> None:
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
    gap = min(height / (ax.get_position().height * figure.get_figheight()), 1 / len(here))
    places = _spread(y, gap, gap / 2, 1 - gap / 2)
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


def _spread(y: np.ndarray, gap: float, low: float, high: float) -> np.ndarray:
  """Places in [low, high], at least `gap` apart and in the order of y, least squares from y [n].

  With u_i = place_i − i · gap the distances say that u ascends: an isotonic regression.
  """
  order = np.argsort(y, kind="stable")
  offset = gap * np.arange(len(y))
  u = optimize.isotonic_regression(y[order] - offset).x
  places = np.empty_like(y)
  places[order] = np.clip(u, low, max(low, high - offset[-1])) + offset
  return places


def _learned(curves: Sequence[Curve]) -> dict[str, list[Curve]]:
  groups = {a: group for a, group in results.group_by_algorithm(curves).items() if learns_sigma(a)}
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


def _hue(algorithm: str) -> str:
  name = algorithm.removeprefix("sigma_")
  return _HUES.get(name, _SPARE_HUES[zlib.crc32(name.encode()) % len(_SPARE_HUES)])


def _title(algorithm: str) -> str:
  name = algorithm.removeprefix("sigma_")
  return ("σ-" if name != algorithm else "") + _TITLES.get(name, name.replace("_", " "))


@contextlib.contextmanager
def _canvas(path: Path, height: float) -> Iterator[Figure]:
  """A figure, `height` inches high, that becomes the PNG at `path` once the body is done."""
  with matplotlib.rc_context(_STYLE):
    layout = layout_engine.ConstrainedLayoutEngine(h_pad=0.08, w_pad=0.05)
    figure = Figure(figsize=(WIDTH, height), dpi=DPI, layout=layout)
    FigureCanvasAgg(figure)
    yield figure
    with results.atomic(path) as temporary:
      figure.savefig(temporary, format="png")
