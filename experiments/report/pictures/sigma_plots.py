"""Pictures of the learned sigma of every module."""

from collections.abc import Sequence

import matplotlib.figure
import numpy as np

import shrinkmeta as sm
from experiments.networks.modules import network_order
from experiments.report import statistics
from experiments.report.pictures.canvas import hue, save, title_of
from experiments.runs.files import Path
from experiments.runs.results import Curve
from experiments.settings.algorithms import learns_sigma


def sigma_per_module(path: Path, curves: Sequence[Curve]) -> None:
  """Draw sigma of each module: a dot for each seed, and a bar for their geometric mean.

  Modules are in order from input to output. Those without a prior (inf) and frozen ones (0) are
  drawn off the scale.
  """
  groups = _learned(curves)
  ordered = lambda sigma: {module: sigma[module] for module in network_order(sigma)}
  runs = {title_of(a): [ordered(curve.sigma) for curve in group] for a, group in groups.items()}
  save(path, sm.plots.sigma_by_module(runs, colors={title_of(a): hue(a) for a in groups}))


def sigma_heat_map(path: Path, curves: Sequence[Curve]) -> None:
  """Draw log10 sigma of every module during training; one panel for each algorithm.

  Sigma is the geometric mean over seeds.
  """
  groups = _learned(curves)
  size = (7.5, 1.0 + 2.4 * len(groups))
  figure = matplotlib.figure.Figure(figsize=size, layout="constrained")
  axes = figure.subplots(len(groups), 1, sharex=True, squeeze=False)[:, 0]
  for ax, (algorithm, group) in zip(axes, groups.items(), strict=True):
    modules = network_order(group[0].sigma)
    log = [[np.log10(c.history[f"sigma/{m}"]) for m in modules] for c in group]
    mean = np.mean(log, 0)  # [modules, meta-steps]
    image = ax.imshow(mean, aspect="auto", cmap="viridis", interpolation="nearest")
    ax.set_yticks(range(len(modules)), modules, fontsize=8.5)
    seeds = ", ".join(str(c.seed) for c in group)
    ax.set_title(f"{title_of(algorithm)}: log10 of sigma, seeds {seeds}", fontsize=10, loc="left")
    figure.colorbar(image, ax=ax)
  axes[-1].set_xlabel("Meta-steps", fontsize=9)
  save(path, figure)


def sigma_history(path: Path, curves: Sequence[Curve]) -> None:
  """Draw sigma against meta-steps: one panel for each algorithm, one line for each module.

  The data are `history["sigma/<module>"]` and `history["step"]`. Without "step", the numbers of the
  records are the steps.
  """
  runs = {
    title_of(a): [_records(curve) for curve in group] for a, group in _learned(curves).items()
  }
  save(path, sm.plots.sigma_history(runs))


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


def _records(curve: Curve) -> list[dict[str, float]]:
  """Return the log records of one run, modules from input to output."""
  sigma = {n for n in curve.history if n.startswith("sigma/")}
  found = {n: curve.history[n] for n in ["step", *network_order(sigma)] if n in curve.history}
  if len({len(values) for values in found.values()}) > 1:
    lengths = {name: len(values) for name, values in found.items()}
    raise ValueError(
      f"{curve.algorithm}, seed {curve.seed}: history records sigma once a step; got {lengths}. "
      "Record both together."
    )
  return [dict(zip(found, values, strict=True)) for values in zip(*found.values(), strict=True)]
