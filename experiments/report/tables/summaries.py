"""Tables of what a run of an experiment found, in Markdown that reads as text."""

import collections
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

import shrinkmeta as sm
from experiments.runs.results import (
  Curve,
  average_seeds,
  check,
  group_by_algorithm,
  has,
  interval,
  network_order,
)

_STAGES = ("compile", "train", "adapt")


def accuracy_table(curves: Sequence[Curve], over: str = "episodes") -> str:
  """Accuracy and negative log-likelihood by adaptation step, mean ± 95 % interval over episodes.

  Args:
    over: what the columns of the curves are, in words.
  """
  steps = [str(step) for step in np.asarray(curves[0].steps)] if curves else []

  def table(field: str, scale: float, digits: int) -> str:
    rows = [
      [a, *(_plus_minus(scale * v, digits) for v in values)]
      for a, values in average_seeds(curves, field).items()
    ]
    return _markdown(["algorithm", *steps], rows)

  title = "Negative log-likelihood in nats per example by adaptation step"
  if not has(curves, "accuracy"):
    return f"{title}, {_sample(curves, over)}\n\n{table('nll', 1, 3)}\n"
  return (
    f"Accuracy in % by adaptation step, {_sample(curves, over)}\n\n"
    f"{table('accuracy', 100, 1)}\n\n"
    f"{title}\n\n"
    f"{table('nll', 1, 3)}\n"
  )


def paired_table(
  curves: Sequence[Curve],
  reference: str = "sigma_imaml",
  step: int = -1,
  over: str = "episodes",
) -> str:
  """Reference − rival on the same episodes: accuracy in points, and negative log-likelihood.

  Better than a rival: accuracy above 0, negative log-likelihood below 0. The intervals hold for
  one rival at a time; they are not widened for the number of rivals.

  The rival has adapted for as many steps as the reference, and in the last two columns for the
  number that is best for it, which stands in parentheses. That is picked on these very episodes,
  and so flatters the rival; the reference is where it was.

  Args:
    curves: at equal steps and on the same episodes.
    reference: the algorithm the others are subtracted from.
    step: index into `Curve.steps` of the reference, the last by default.
    over: what the columns of the curves are, in words.
  """
  accuracy, nll = average_seeds(curves, "accuracy"), average_seeds(curves, "nll")
  if reference not in accuracy:
    raise ValueError(
      f"reference is one of {', '.join(accuracy)}; got {reference!r}. "
      "Pass one of these, or train it too."
    )
  steps = np.asarray(curves[0].steps)
  if not -len(steps) <= step < len(steps):
    raise ValueError(
      f"step indexes the {len(steps)} recorded steps {steps.tolist()}; got {step}. "
      "Pass a position, not a number of steps."
    )

  measures = {"nats per example": (nll, 1, 3)}
  if has(curves, "accuracy"):
    measures = {"accuracy in points": (accuracy, 100, 2)} | measures

  def difference(rival: str, measure: str, at: int) -> str:
    values, scale, digits = measures[measure]
    with np.errstate(invalid="ignore"):  # inf − inf, where both diverged
      paired = scale * (values[reference][step] - values[rival][at])
    return _plus_minus(paired, digits, "+")

  def at_best(rival: str, measure: str) -> str:
    better = 1 if measure.startswith("accuracy") else -1
    means = better * measures[measure][0][rival].mean(1)
    best = int(np.argmax(np.where(np.isfinite(means), means, -np.inf)))
    return f"{difference(rival, measure, best)} ({steps[best]})"

  rows = [
    [r, *(difference(r, m, step) for m in measures), *(at_best(r, m) for m in measures)]
    for r in accuracy
    if r != reference
  ]
  header = ["rival", *measures, *(f"{measure}, rival at its best" for measure in measures)]
  title = (
    f"{reference} minus rival after {steps[step]} adaptation steps, paired, {_sample(curves, over)}"
  )
  return f"{title}\n\n{_markdown(header, rows)}\n"


def overfitting_table(curves: Sequence[Curve], over: str = "episodes") -> str:
  """What adapting for too long costs: accuracy at the last step against the best step.

  The best step is picked on these very episodes, so the loss is never positive, and 0 says that
  the last step is the best. The interval is paired over episodes and takes the pick as given.
  """
  rows = []
  for algorithm, values in average_seeds(curves, "accuracy").items():
    values = 100 * values
    best = int(np.argmax(values.mean(1)))
    rows.append(
      [
        algorithm,
        str(np.asarray(curves[0].steps)[best]),
        _plus_minus(values[best], 1),
        _plus_minus(values[-1], 1),
        _plus_minus(values[-1] - values[best], 2, "+"),
      ]
    )
  last = np.asarray(curves[0].steps)[-1]
  header = ["algorithm", "best step", "accuracy there in %", f"at step {last} in %", "difference"]
  return f"Best and last adaptation step, {_sample(curves, over)}\n\n{_markdown(header, rows)}\n"


def settings_table(arms: Mapping[str, Mapping[str, Any]]) -> str:
  """The settings that each algorithm ran with, `trials` and those that one of them uses.

  Args:
    arms: algorithm -> settings; of `trials`, the length of the search that chose them, 0 is none.
  """
  names = dict.fromkeys(name for settings in arms.values() for name in settings)
  used = lambda name: name == "trials" or any(settings.get(name) for settings in arms.values())
  names = [name for name in names if used(name)]
  rows = [[a, *(str(settings.get(n, "")) for n in names)] for a, settings in arms.items()]
  return f"Settings\n\n{_markdown(['algorithm', *names], rows)}\n"


def cost_table(curves: Sequence[Curve], tasks: int, arms: Mapping[str, Mapping[str, Any]]) -> str:
  """What training took, and how well its modes and solves ended, by algorithm.

  Args:
    tasks: of a meta-step.
    arms: algorithm -> settings, of which `inner_steps` tells how long a task's adaptation was.
  """

  def mean(group: Sequence[Curve], name: str) -> str:
    values = [np.mean(c.history[name]) for c in group if c.history.get(name)]
    return f"{np.mean(values):.3g}" if np.isfinite(values).any() else "none"

  def step_rate(algorithm: str, rates: Sequence[float]) -> str:
    row = sm.FAMILY.get(algorithm)
    if not rates or (row is not None and row.phi == "pooled"):  # it does not adapt in training
      return "none"
    return f"{np.mean(rates) * arms[algorithm]['inner_steps']:.3g}"

  rows = []
  for algorithm, group in group_by_algorithm(curves).items():
    rates = [tasks / np.median(c.history["seconds"]) for c in group if c.history.get("seconds")]
    rows.append(
      [
        algorithm,
        f"{np.mean(rates):.3g}" if rates else "none",
        step_rate(algorithm, rates),
        *(f"{np.mean([c.seconds.get(s, math.nan) for c in group]):.1f}" for s in _STAGES),
        *(mean(group, n) for n in ("failed", "inner_grad_norm", "solve_residual")),
        mean(group, "negative_curvature"),
      ]
    )
  header = [
    "algorithm",
    "tasks a second",
    "times inner steps",
    *(f"{s}, s" for s in _STAGES),
    "failed tasks a step",
  ]
  header += ["gradient norm at theta_hat", "relative residual of w", "share of negative curvature"]
  title = "Cost: rates of the median meta-step, else means over seeds and meta-steps"
  return f"{title}; adapt with compilation\n\n{_markdown(header, rows)}\n"


class Agreement(NamedTuple):
  """How alike the sigma of two seeds are over modules, mean over pairs of seeds."""

  ranks: float  # Spearman's correlation: the order
  logs: float  # Pearson's, of log sigma, where the order of nearly equal ones hardly tells; or nan


def sigma_agreement(curves: Sequence[Curve]) -> dict[str, Agreement]:
  """Algorithm -> how its seeds agree, of three modules and more with a sigma of their own."""
  found = {}
  for algorithm, group in group_by_algorithm(curves).items():
    sigma = np.array([[c.sigma[m] for m in sorted(c.sigma)] for c in group])
    differs = np.ptp(sigma, 1).all()  # equal numbers have no correlation
    if len(sigma) > 1 and sigma.shape[1] > 2 and np.isfinite(sigma).all() and differs:
      pairs = np.triu_indices(len(sigma), 1)
      mean = lambda rows, pairs=pairs: float(np.corrcoef(rows)[pairs].mean())
      logs = mean(np.log(sigma)) if (sigma > 0).all() else math.nan
      found[algorithm] = Agreement(mean(stats.rankdata(sigma, axis=1)), logs)
  return found


def freezing_table(
  whole: Sequence[Curve], frozen: Mapping[float, Sequence[Curve]], step: int = -1
) -> str:
  """What is lost where the modules whose sigma lies below a threshold stay at phi.

  Args:
    whole: one algorithm's curves with no module frozen.
    frozen: threshold -> the curves of the same seeds with modules frozen, on the same episodes.
    step: index into `Curve.steps`, the last by default.
  """
  rows = []
  for threshold, curves in sorted(frozen.items()):
    seeds = [sorted(curve.seed for curve in group) for group in (whole, curves)]
    if seeds[0] != seeds[1]:
      raise ValueError(
        f"The modules below {threshold:g} are frozen in seeds {seeds[1]}, and seeds {seeds[0]} "
        "have none frozen: wanted the same seeds. Run experiments.evaluate on all of them."
      )
    left = [[m for m in curve.sizes if curve.sigma[m] > 0] for curve in curves]
    shares = [
      sum(curve.sizes[m] for m in modules) / sum(curve.sizes.values())
      for curve, modules in zip(curves, left, strict=True)
    ]
    counts = collections.Counter(m for modules in left for m in modules)
    named = [
      m if n == len(curves) else f"{m} ({n} of {len(curves)})"
      for m, n in ((m, counts[m]) for m in network_order(counts))
    ]
    cells = [f"{threshold:g}", ", ".join(named) or "none", f"{100 * np.mean(shares):.1f}"]
    for field, scale, digits in (("accuracy", 100.0, 2), ("nll", 1.0, 3)):
      if field == "nll" or has(whole, "accuracy"):
        one, other = (np.mean([getattr(c, field)[step] for c in g], 0) for g in (curves, whole))
        cells.append(_plus_minus(scale * (one - other), digits, "+"))
    rows.append(cells)
  header = ["threshold", "task-specific modules", "% of parameters"]
  header += ["accuracy in points"] * has(whole, "accuracy") + ["nats per example"]
  at = np.asarray(whole[0].steps)[step]
  title = f"{whole[0].algorithm}, modules with sigma below a threshold frozen minus none frozen"
  return f"{title}, after {at} steps, paired, {_sample(whole)}\n\n{_markdown(header, rows)}\n"


_FOUND = "sigma of modules, largest first"


def _found(group: Sequence[Curve]) -> str:
  """Modules with the geometric mean of sigma over seeds, in its order."""
  with np.errstate(divide="ignore"):  # a frozen module
    sigma = {m: float(np.exp(np.mean(np.log([c.sigma[m] for c in group])))) for m in group[0].sigma}
  return ", ".join(f"{m} {sigma[m]:.2g}" for m in sorted(sigma, key=lambda m: -sigma[m]))


def found_modules(groups: Mapping[str, Sequence[Curve]]) -> str:
  """Which modules were found with which data: sigma, its geometric mean over seeds, largest first.

  Args:
    groups: what the data are -> curves of algorithms that learn sigma.
  """
  rows = [
    [data, algorithm, _found(group)]
    for data, curves in groups.items()
    for algorithm, group in group_by_algorithm(curves).items()
  ]
  return _markdown(["data", "algorithm", _FOUND], rows) + "\n"


def sigma_table(curves: Sequence[Curve]) -> str:
  """What algorithms that learn sigma found, and whether their seeds agree on the order.

  Args:
    curves: of algorithms that learn sigma.
  """
  agreement = sigma_agreement(curves)
  none = Agreement(math.nan, math.nan)
  cell = lambda value: "none" if math.isnan(value) else f"{value:.2f}"
  rows = [
    [a, *map(cell, agreement.get(a, none)), _found(group)]
    for a, group in group_by_algorithm(curves).items()
  ]
  title = "Sigma, geometric mean over seeds, and correlations, mean over pairs of seeds"
  header = ["algorithm", "rank correlation", "of log sigma", _FOUND]
  return f"{title}\n\n{_markdown(header, rows)}\n"


def module_table(curve: Curve) -> str:
  """Per module in network order: parameters, sigma_m, and how far adaptation moved it."""
  curve = check(curve, "curve")

  def sigma(module: str) -> str:
    value = curve.sigma.get(module, math.nan)
    return {math.inf: "∞ (no prior)", 0.0: "0 (frozen)"}.get(value, f"{value:.3g}")

  rows = [
    [m, f"{curve.sizes[m]:,}", sigma(m), f"{curve.moved.get(m, math.nan):.3g}"]
    for m in network_order(curve.sizes)
  ]
  title = f"{curve.algorithm}, seed {curve.seed}, moved after {curve.steps[-1]} adaptation steps"
  return f"{title}\n\n{_markdown(['module', 'parameters', 'sigma', 'rms moved'], rows)}\n"


def _sample(curves: Sequence[Curve], over: str = "episodes") -> str:
  """What the intervals of a table are taken over, in words."""
  counts = {name: len(group) for name, group in group_by_algorithm(curves).items()}
  most = max(counts.values())
  fewer = ", ".join(f"{name}: {n}" for name, n in counts.items() if n < most)
  return (
    f"mean ± 95 % interval over {np.asarray(curves[0].accuracy).shape[1]} {over}, "
    f"each the mean of {most} seed{'s' * (most != 1)}" + (f" ({fewer})" if fewer else "")
  )


def _plus_minus(values: np.ndarray, digits: int, sign: str = "") -> str:
  mean, half = interval(values)
  if not math.isfinite(mean):
    return "diverged"  # one episode of one seed is enough
  form = ".1e" if abs(mean) >= 1e5 else f".{digits}f"
  return f"{mean:{sign}{form}} ± {half:{form}}"


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  """A table that reads as text and as Markdown: first column left, the others right."""
  widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
  line = lambda cells: (
    "| " + " | ".join([cells[0].ljust(widths[0]), *map(str.rjust, cells[1:], widths[1:])]) + " |"
  )
  rule = "|" + "|".join(["-" * (widths[0] + 2), *("-" * (w + 1) + ":" for w in widths[1:])]) + "|"
  return "\n".join([line(header), rule, *map(line, rows)])
