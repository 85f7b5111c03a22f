"""Pictures of sigma: of every module after training, and of every module during training.

sigma is drawn on a logarithmic scale. 0 (frozen) and inf (no prior) have places of their own at its
ends.
"""

import functools
import math
import numbers
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from shrinkmeta.checks import validate
from shrinkmeta.checks.kinds import shown
from shrinkmeta.checks.paths import Path, local_path
from shrinkmeta.diagnostics.summary import ModuleSummary
from shrinkmeta.plots import look
from shrinkmeta.training.callbacks import Callback, writable_file

if TYPE_CHECKING:
  from matplotlib.axes import Axes
  from matplotlib.figure import Figure

_PREFIX = "sigma/"  # of sigma in a log record
Values = dict[str, float]  # {module: sigma}


def sigma_by_module(
  runs: Any, *, colors: Mapping[str, Any] | None = None, ax: Any = None
) -> "Figure":
  """Draw sigma of every module: a dot for each seed, and a bar at the geometric mean.

  Args:
    runs: what `module_summary` returned, or {module: sigma}. Or a list of these, one for each seed.
      Or {learner: such a list}, to compare learners. Modules stand in the order of their first
      appearance, from top to bottom.
    colors: {learner: colour}, for learners that should look the same in several pictures.
    ax: matplotlib Axes to draw on. None makes a figure, which is high enough for all modules.

  Returns:
    A matplotlib Figure.

  Raises:
    ImportError: matplotlib is not installed.
    TypeError, ValueError: an argument is wrong; the message names it.

  Example:
    >>> seeds = [{"body": 0.1, "head": 1.2}, {"body": 0.2, "head": 0.9}]
    >>> figure = sigma_by_module(seeds)
    >>> [text.get_text() for text in figure.axes[0].get_yticklabels()]
    ['body', 'head']
  """
  look.check_colors(colors)
  learners = _learners(runs)
  modules = list(dict.fromkeys(m for seeds in learners.values() for seed in seeds for m in seed))
  row = max(0.22, 0.17 * len(learners))  # inches
  height = 1.1 + row * len(modules) + 0.2 * (len(learners) > 1)
  figure, ax = look.panel(ax, height, look.width_for(modules))
  table = {
    name: np.array([[seed.get(m, math.nan) for m in modules] for seed in seeds])
    for name, seeds in learners.items()
  }  # [seeds, modules] each
  scale = _scale(np.concatenate([values.ravel() for values in table.values()]))
  look.name_rows(ax, modules)
  entries, width = {}, 0.8 / len(table)
  for i, (name, style) in enumerate(look.looks(table, colors).items()):
    y = np.arange(len(modules)) + (i - (len(table) - 1) / 2) * width
    entries[name] = _dots(ax, scale, table[name], y, 0.4 * width, style)
  scale.apply(ax, "x")
  several = any(len(values) > 1 for values in table.values())
  look.axis_labels(ax, "σ" + (" (dot: one seed; bar: geometric mean)" if several else ""))
  look.title(ax, "σ: how far a task may move each module")
  if isinstance(runs, Mapping) and "" not in learners:
    look.legend_above(ax, entries)
  return figure


def sigma_history(runs: Any, *, ax: Any = None) -> "Figure":
  """Draw sigma of every module against the updates of training.

  With several seeds a thick line is their geometric mean, at the updates that all of them have. A
  thin line is one seed.

  Args:
    runs: the log records of a run, as `recorder` collects them and `read_json_lines` reads them. Or
      a list of such lists, one for each seed. Or {learner: records or such a list}, which draws a
      panel for each learner.
    ax: matplotlib Axes to draw one learner on. None makes a figure.

  Returns:
    A matplotlib Figure.

  Raises:
    ImportError: matplotlib is not installed.
    TypeError, ValueError: an argument is wrong; the message names it.

  Example:
    >>> records = [{"step": s, "sigma/body": 0.3 / (s + 1), "sigma/head": 0.3} for s in range(9)]
    >>> figure = sigma_history(records)
    >>> figure.axes[0].get_xlabel()
    'update'
  """
  look.import_matplotlib()
  from shrinkmeta.plots import line_names

  learners = dict(runs) if isinstance(runs, Mapping) else {"": runs}
  traces = {name: _seeds_of(name, found) for name, found in learners.items()}
  if not traces or (ax is not None and len(traces) > 1):
    raise ValueError(f"runs must have one learner or more, and one with ax; got {len(traces)}.")
  modules = list(dict.fromkeys(m for seeds in traces.values() for s in seeds for m in s.sigma))
  height = max(2.4, 0.5 + line_names.HEIGHT * len(modules))
  if ax is None:
    width = look.width_for(modules)
    figure, panels = look.figure(0.4 + height * len(traces), len(traces), 1, width, sharex=True)
  else:
    figure, one = look.panel(ax, height)
    panels = [one]
  values = [v for seeds in traces.values() for s in seeds for v in s.sigma.values()]
  scale, style = _scale(np.concatenate(values)), look.looks(modules)
  for ax, (name, seeds) in zip(panels, traces.items(), strict=True):
    _lines(ax, scale, seeds, style)
    look.title(ax, f"σ during training{name and ': '}{name}")
  look.axis_labels(panels[-1], "update")
  return figure


def sigma_picture(path: Path, every: int = 100) -> Callback:
  """Draw sigma of every module during a training run, again and again, into one file.

  A run that continues from a checkpoint draws only the updates after this checkpoint. To draw the
  whole run, pass the result of `read_json_lines` to `sigma_history`.

  Args:
    path: the file. Its ending is the format, such as ".png". Its folder is made if it is missing.
    every: the number of updates between two pictures. The last update is always drawn.

  Returns:
    A callback for `fit`. Its `begin` raises OSError if the file cannot be written.

  Raises:
    ImportError: matplotlib is not installed.
    TypeError, ValueError: an argument is wrong; the message names it.

  Example:
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...   callback = sigma_picture(f"{folder}/sigma.svg")
    ...   callback.begin(0, 1)
    ...   callback.record(0, {"sigma/body": 0.3})
    ...   callback.end()
    ...   len(open(f"{folder}/sigma.svg").read()) > 1000
    True
  """
  look.import_matplotlib()
  from matplotlib.backend_bases import FigureCanvasBase

  file, every = local_path("path", path), validate.integer("every", every, 1)
  endings = sorted(FigureCanvasBase.get_supported_filetypes())
  if file.suffix[1:].lower() not in endings:
    raise ValueError(f"path must end in one of .{', .'.join(endings)}; got {file.name!r}.")
  records: list[dict[str, float]] = []

  def begin(first: int, steps: int) -> None:
    del first, steps
    writable_file(file)
    records.clear()

  def record(step: int, log_record: Mapping[str, float]) -> None:
    found = {name: value for name, value in log_record.items() if name.startswith(_PREFIX)}
    records.append({"step": step, **found})
    if (step + 1) % every == 0:
      end()

  def end() -> None:
    if any(len(found) > 1 for found in records):  # algorithms without sigma have no picture
      sigma_history(records).savefig(file, dpi=150)

  return Callback(begin, record, end)


class _Trace(NamedTuple):
  """sigma of one run: R updates, and {module: [R]}."""

  steps: np.ndarray
  sigma: dict[str, np.ndarray]


class _Scale(NamedTuple):
  """A logarithmic scale from `low` to `high`, with 0 drawn at `zero` and inf drawn at `inf`."""

  low: float
  high: float
  zero: float
  inf: float
  has_zero: bool
  has_inf: bool

  def place(self, sigma: np.ndarray) -> np.ndarray:
    """Return where to draw sigma [...]; NaN stays out of the picture."""
    return np.where(sigma == 0, self.zero, np.where(np.isposinf(sigma), self.inf, sigma))

  def apply(self, ax: "Axes", axis: str) -> None:
    """Scale the axis "x" or "y", and write its ticks."""
    ticks = {tick: f"{tick:g}" for tick in look.log_ticks(self.low, self.high)}
    if self.has_zero:
      ticks[self.zero] = "0"
    if self.has_inf:
      ticks[self.inf] = "∞"
    margin = (self.high / self.low) ** 0.05
    low, high = self.zero if self.has_zero else self.low, self.inf if self.has_inf else self.high
    ax.set(**{f"{axis}scale": "log", f"{axis}lim": (low / margin, high * margin)})
    (ax.xaxis if axis == "x" else ax.yaxis).set_ticks(list(ticks), list(ticks.values()))
    (ax.xaxis if axis == "x" else ax.yaxis).set_ticks([], minor=True)
    if self.has_zero:
      look.mark_break(ax, math.sqrt(self.zero * self.low), axis)
    if self.has_inf:
      look.mark_break(ax, math.sqrt(self.inf * self.high), axis)


def _scale(sigma: np.ndarray) -> _Scale:
  """Return the scale that shows every entry of sigma [...]."""
  finite = sigma[np.isfinite(sigma) & (sigma > 0)]
  low, high = (finite.min(), finite.max()) if finite.size else (1.0, 1.0)
  if high < 3 * low:  # differences below a factor of 3 should look small
    middle = math.sqrt(low * high)
    low, high = middle / 3**0.5, middle * 3**0.5
  gap, none, all_free = (high / low) ** 0.22, (sigma == 0).any(), np.isposinf(sigma).any()
  return _Scale(low, high, low / gap, high * gap, bool(none), bool(all_free))


def _geometric_mean(sigma: np.ndarray) -> np.ndarray:
  """Return the mean over the leading axis: 0 if one is 0, inf if one is inf, NaN for both."""
  with np.errstate(divide="ignore", invalid="ignore"):  # log 0, and inf - inf
    return np.exp(np.log(sigma).mean(0))


def _dots(
  ax: "Axes", scale: _Scale, sigma: np.ndarray, y: np.ndarray, half: float, style: look.Look
) -> Any:
  """Draw sigma [seeds, modules] of one learner at the rows y [modules]."""
  seeds = len(sigma)
  # Seeds lie side by side, so that equal ones stay visible.
  nudge = 0.6 * half * (np.linspace(-1, 1, seeds) if seeds > 1 else np.zeros(1))
  at, size = y + nudge[:, None], 18 if seeds > 1 else 30
  alpha = 0.55 if seeds > 1 else 1.0
  mark = {"s": size, "color": style.color, "marker": style.marker, "linewidths": 0}
  dots = ax.scatter(scale.place(sigma), at, alpha=alpha, zorder=3, **mark)
  if seeds > 1:
    mean = scale.place(_geometric_mean(sigma))
    ax.vlines(mean, y - half, y + half, color=style.color, linewidth=2.4, zorder=4)
  return dots


def _lines(
  ax: "Axes", scale: _Scale, seeds: Sequence[_Trace], style: Mapping[str, look.Look]
) -> None:
  """Draw the runs of one learner."""
  from shrinkmeta.plots import line_names

  updates = functools.reduce(np.intersect1d, [run.steps for run in seeds])
  if not updates.size:
    raise ValueError(
      "The runs of a learner must have updates in common; got none. If the runs are parts of one "
      "run, join their log records in one list."
    )
  lines = {}
  for module, (color, _, dashes) in style.items():
    of_seed = [run.sigma.get(module, np.full(len(run.steps), math.nan)) for run in seeds]
    for run, values in zip(seeds, of_seed, strict=True) if len(seeds) > 1 else ():
      look.line(ax, run.steps, scale.place(values), color=color, linewidth=0.6, alpha=0.4)
    shared = [v[np.isin(run.steps, updates)] for run, v in zip(seeds, of_seed, strict=True)]
    mean = scale.place(_geometric_mean(np.stack(shared)))
    lines[module] = look.line(ax, updates, mean, color=color, linestyle=dashes, linewidth=1.7)
  scale.apply(ax, "y")
  ax.margins(x=0.01)
  line_names.name_ends(ax, lines)


def _learners(runs: Any) -> dict[str, list[Values]]:
  """Return {learner: [{module: sigma} of each seed]} of every form that `runs` may have."""
  if isinstance(runs, Mapping) and not all(_is_number(v) for v in runs.values()):
    found = {name: _list_of_values(value) for name, value in runs.items()}
  else:
    found = {"": _list_of_values(runs)}
  if not any(seed for seeds in found.values() for seed in seeds):
    raise ValueError("runs must have a module or more; got none.")
  return found


def _list_of_values(runs: Any) -> list[Values]:
  """Return [{module: sigma} of each seed]."""
  seeds = [runs] if isinstance(runs, Mapping) or _are_summaries(runs) else runs
  if not isinstance(seeds, (list, tuple)) or not seeds:
    raise TypeError(
      "runs must be what sm.module_summary returned, {module: sigma}, a list of these, or "
      f"{{learner: such a list}}; got {shown(runs)}."
    )
  return [_values(seed) for seed in seeds]


def _values(seed: Any) -> Values:
  """Return {module: sigma} of one seed."""
  if _are_summaries(seed):
    return {summary.name: summary.sigma for summary in seed}
  if isinstance(seed, Mapping) and all(isinstance(m, str) for m in seed):
    found = {m: float(v) for m, v in seed.items() if _is_number(v)}
    if len(found) == len(seed) and not any(v < 0 for v in found.values()):
      return found
  raise TypeError(
    "Each seed in runs must be what sm.module_summary returned, or {module: sigma} with sigma >= 0;"
    f" got {shown(seed)}."
  )


def _are_summaries(values: Any) -> bool:
  listed = isinstance(values, Sequence) and bool(values)
  return listed and all(isinstance(value, ModuleSummary) for value in values)


def _is_number(value: Any) -> bool:
  if isinstance(value, bool):
    return False
  return isinstance(value, numbers.Real) or getattr(value, "shape", None) == ()


def _seeds_of(name: str, runs: Any) -> list[_Trace]:
  """Return sigma of the runs of one learner."""
  wanted = "the log records of a run, a list of such lists, or {learner: either}"
  if not isinstance(runs, (list, tuple)) or not runs:
    raise TypeError(f"runs must be {wanted}; got {shown(runs)}{name and ' for '}{name}.")
  return [_trace(run) for run in ([runs] if isinstance(runs[0], Mapping) else runs)]


def _trace(records: Any) -> _Trace:
  """Return sigma of one run, from its log records."""
  if not isinstance(records, (list, tuple)) or not all(isinstance(r, Mapping) for r in records):
    raise TypeError(f"A run in runs must be a list of log records; got {shown(records)}.")
  names = dict.fromkeys(n for r in records for n in r if str(n).startswith(_PREFIX))
  if not names:
    raise ValueError(
      'No log record in runs has a number "sigma/<module>". Pass the records of an algorithm that '
      "learns sigma, as sm.recorder collects them."
    )
  # After a resumption a list may hold an update twice. Then the last record counts.
  found = dict(sorted({float(r.get("step", i)): r for i, r in enumerate(records)}.items()))
  values = {n.removeprefix(_PREFIX): [r.get(n, math.nan) for r in found.values()] for n in names}
  return _Trace(np.array([*found]), {m: np.array(v, float) for m, v in values.items()})
