"""Algorithms side by side on the same episodes: accuracy, likelihood, and their differences."""

from collections.abc import Sequence

import numpy as np

from experiments.report.statistics import average_seeds, has
from experiments.report.tables.markdown import as_table, plus_minus, sample
from experiments.runs.results import Curve
from experiments.settings.algorithms import learns_sigma


def accuracy_table(curves: Sequence[Curve], over: str = "episodes") -> str:
  """Return accuracy and negative log-likelihood by adaptation step, with 95 % intervals.

  Args:
    over: the name of the curves' columns, in words.
  """
  steps = [str(step) for step in np.asarray(curves[0].steps)] if curves else []

  def table(field: str, scale: float, digits: int) -> str:
    rows = [
      [a, *(plus_minus(scale * v, digits) for v in values)]
      for a, values in average_seeds(curves, field).items()
    ]
    return as_table(["algorithm", *steps], rows)

  title = "Negative log-likelihood in nats per example by adaptation step"
  if not has(curves, "accuracy"):
    return f"{title}, {sample(curves, over)}\n\n{table('nll', 1, 3)}\n"
  return (
    f"Accuracy in % by adaptation step, {sample(curves, over)}\n\n"
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
  """Return the differences reference − rival on the same episodes, in accuracy and likelihood.

  The reference is better where the difference in accuracy is above 0, and where the difference in
  negative log-likelihood is below 0. The intervals hold for one rival at a time. They are not
  widened for the number of rivals.

  The rival has adapted for as many steps as the reference. In the last two columns it has adapted
  for the number of steps that is best for it, which stands in parentheses. This number is chosen on
  the same episodes, which favours the rival. The reference keeps its number of steps.

  Args:
    curves: curves at equal steps and on the same episodes.
    reference: the algorithm from which the others are subtracted.
    step: the index into `Curve.steps` of the reference; the last by default.
    over: the name of the curves' columns, in words.
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
    return plus_minus(paired, digits, "+")

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
    f"{reference} minus rival after {steps[step]} adaptation steps, paired, {sample(curves, over)}"
  )
  return f"{title}\n\n{as_table(header, rows)}\n"


def overfitting_table(curves: Sequence[Curve], over: str = "episodes") -> str:
  """Return the cost of adapting for too long: accuracy at the last step minus the best step.

  The best step is chosen on the same episodes, so the difference is never positive. It is 0 if the
  last step is the best. The interval is paired over episodes, and ignores that the best step was
  chosen.
  """
  rows = []
  for algorithm, values in average_seeds(curves, "accuracy").items():
    values = 100 * values
    best = int(np.argmax(values.mean(1)))
    rows.append(
      [
        algorithm,
        str(np.asarray(curves[0].steps)[best]),
        plus_minus(values[best], 1),
        plus_minus(values[-1], 1),
        plus_minus(values[-1] - values[best], 2, "+"),
      ]
    )
  last = np.asarray(curves[0].steps)[-1]
  header = ["algorithm", "best step", "accuracy there in %", f"at step {last} in %", "difference"]
  return f"Best and last adaptation step, {sample(curves, over)}\n\n{as_table(header, rows)}\n"


def tables(curves: Sequence[Curve], step: int = -1, over: str = "episodes") -> list[str]:
  """Return the tables of this file that apply to these curves.

  Args:
    curves: curves at equal steps and on the same episodes.
    step: the index into `Curve.steps` of the step after which each algorithm that learns sigma is
      compared with the others.
    over: the name of the curves' columns, in words.
  """
  found = [accuracy_table(curves, over)]
  if has(curves, "accuracy"):
    found.append(overfitting_table(curves, over))
  names = list(dict.fromkeys(curve.algorithm for curve in curves))
  if len(names) > 1:
    found += [paired_table(curves, name, step, over) for name in names if learns_sigma(name)]
  return found
