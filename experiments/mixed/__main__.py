"""Fits a mixed model to a CSV file in long format.

    python -m experiments.mixed --data=sleepstudy.csv --formula="y ~ x + (x || group)"

prints fixed effects, standard deviations with intervals and the likelihood; --json and --plot write
them with every group's estimate. The same likelihood, modules and evidence as for a network: a term
of the formula is a module, sigma its standard deviation between groups.
"""

import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import matplotlib
import numpy as np
from absl import app, flags

from experiments.mixed import groups, model, report, simulation, table
from experiments.mixed.formula import parse
from experiments.runs import files
from experiments.settings import flags as shared
from experiments.settings import paths

_DATA = paths.define("data", "CSV file with a line of column names.")
_FORMULA = flags.DEFINE_string("formula", None, "Such as 'y ~ x + (x || group)'.")
_FAMILY = flags.DEFINE_enum("family", "gaussian", ["gaussian", "logistic", "poisson"], "Of y.")
_ESTIMATOR = flags.DEFINE_enum(
  "estimator", "ml", ["ml", "reml", "predictive"], "What phi and sigma maximise."
)
_SEED = shared.seed()  # of --simulate, and of the halves of --estimator=predictive
_SIMULATE = flags.DEFINE_integer(
  "simulate", None, "In place of --data: fits so many simulated data sets by every estimator.", 2
)
_JSON = paths.define("json", "Writes the fit and every group's estimate there.")
_PICTURES = (".png", ".pdf", ".svg")
_PLOT = paths.define("plot", "Writes a picture (png, pdf, svg) of the groups there.")


def main(argv: Sequence[str]) -> None:
  """Read the flags, fit, and write what they ask for."""
  shared.no_arguments(argv)
  # Before a fit, which may take minutes.
  if _PLOT.value and pathlib.Path(_PLOT.value).suffix.lower() not in _PICTURES:
    raise app.UsageError(f"--plot={_PLOT.value} must end in one of {', '.join(_PICTURES)}.")
  if _SIMULATE.value and (_DATA.value or _FORMULA.value or _PLOT.value):
    raise app.UsageError("--simulate makes its data: leave --data, --formula and --plot out.")
  jax.config.update("jax_platforms", "cpu")
  jax.config.update("jax_enable_x64", True)
  if _SIMULATE.value:
    rows = simulation.run(_SIMULATE.value, _SEED.value)
    print(simulation.text(rows))
    if _JSON.value:
      content = {"rows": rows, "datasets": _SIMULATE.value, "seed": _SEED.value}
      files.write_document(_JSON.value, content)
    return
  if not (_DATA.value and _FORMULA.value):
    raise app.UsageError("Give --data and --formula, or --simulate.")
  family: Any = _FAMILY.value
  estimator: Any = _ESTIMATOR.value
  with shared.usage():
    formula = parse(_FORMULA.value)
    data = table.grouped(table.read(pathlib.Path(_DATA.value)), formula, family)
    fitted = model.fit(formula, family, data.batches, estimator, jax.random.key(_SEED.value))
  print(report.text(fitted, formula, data, family, estimator))
  effects = groups.group_effects(formula, family, fitted, data.batches)
  linear = family == "gaussian"
  own = groups.unshrunk(formula, data.batches) if linear else {
    term: np.full(len(data.groups), np.nan) for term in formula.random
  }  # fmt: skip
  if _JSON.value:
    config = {
      "data": pathlib.Path(_DATA.value).name,
      "formula": _FORMULA.value,
      "family": family,
      "estimator": estimator,
      "seed": _SEED.value,
    }
    content = report.as_json(fitted, data, effects, own, config)
    files.write_document(_JSON.value, content)
  if _PLOT.value:
    matplotlib.use("agg")
    report.plot(pathlib.Path(_PLOT.value), fitted, formula, data, effects, own)


if __name__ == "__main__":
  app.run(main)
