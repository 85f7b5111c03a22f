"""Fit a mixed model to a table with one row for each observation and a column of groups.

    python -m experiments.mixed --data=sleepstudy.csv --formula="y ~ x + (x || group)"

prints fixed effects, standard deviations with intervals, and the likelihood. --json and --plot also
write the estimates of every group. `shrinkmeta.mixed` fits the model. docs/mixed.md says what a
formula may contain.
"""

import pathlib
from collections.abc import Sequence
from typing import Any

from absl import app, flags

from experiments.mixed import report
from experiments.settings import flags as shared
from experiments.settings import paths
from shrinkmeta import mixed

_DATA = paths.define("data", "Text file with a line of column names.")
_FORMULA = flags.DEFINE_string("formula", None, "The model, such as 'y ~ x + (x || g)'.")
_FAMILY = flags.DEFINE_enum(
  "family", "gaussian", ["gaussian", "logistic", "poisson"], "Distribution of y."
)
_ESTIMATOR = flags.DEFINE_enum(
  "estimator", "ml", ["ml", "reml", "predictive"], "The criterion that phi and sigma maximise."
)
_SEED = shared.seed()  # of --simulate, and of the halves of --estimator=predictive
_SEP = flags.DEFINE_string(
  "sep", None, "Column separator: a character, or comma, semicolon, tab, space. Default: detected."
)
_DECIMAL = flags.DEFINE_enum("decimal", None, [".", ","], "Decimal sign. Default: detected.")
_NA = flags.DEFINE_list(
  "na",
  None,
  "Texts that stand for a missing value, like an empty field. Default: NA, N/A, NULL, ...",
)
_ENCODING = flags.DEFINE_string("encoding", None, "Such as latin-1. Default: UTF-8 or UTF-16.")
_COMMENT = flags.DEFINE_string("comment", None, "Lines that begin with this text are skipped.")
_TRIALS = flags.DEFINE_string(
  "trials", None, "Column or expression with the numbers of trials, if y counts successes."
)
_WEIGHTS = flags.DEFINE_string("weights", None, "Column or expression with the rows' weights.")
_OFFSET = flags.DEFINE_string("offset", None, "Column or expression to add to eta.")
_PREDICT = paths.define("predict", "Text file of new rows to predict, read like --data.")
_PROFILE = flags.DEFINE_bool("profile", False, "Also compute profile intervals.")
_SIMULATE = flags.DEFINE_integer(
  "simulate",
  None,
  "Number of data sets to simulate, and to fit by every estimator, instead of --data.",
  2,
)
_JSON = paths.define("json", "File for the fit and every group's estimate.")
_PLOT = paths.define("plot", "File for a picture, in the format of its suffix.")
_PICTURE = flags.DEFINE_enum(
  "picture",
  "groups",
  ["groups", "lines", "shrinkage", "residuals", "quantiles", "all"],
  "The picture that --plot writes.",
)

_OF_A_FIT = (
  *(_DATA, _FORMULA, _FAMILY, _ESTIMATOR, _SEP, _DECIMAL, _NA, _ENCODING, _COMMENT, _TRIALS),
  *(_WEIGHTS, _OFFSET, _PREDICT, _PROFILE, _PLOT, _PICTURE),
)  # flags that have no meaning for --simulate


def main(argv: Sequence[str]) -> None:
  """Read the flags, fit, and write the requested outputs."""
  shared.no_arguments(argv)
  if _SIMULATE.value and (given := [flag.name for flag in _OF_A_FIT if flag.present]):
    raise app.UsageError(
      "--simulate makes its data and fits them by every estimator: leave "
      f"{', '.join(f'--{name}' for name in given)} out. --seed and --json are allowed."
    )
  if _PLOT.value:  # before a fit, which may take minutes
    from experiments.mixed import pictures

    if pathlib.Path(_PLOT.value).suffix.lower() not in pictures.SUFFIXES:
      known = ", ".join(pictures.SUFFIXES)
      raise app.UsageError(f"--plot={_PLOT.value} must end in one of {known}.")
  if _SIMULATE.value:
    _simulate(_SIMULATE.value, _SEED.value)
    return
  if not (_DATA.value and _FORMULA.value):
    raise app.UsageError("Give --data and --formula, or --simulate.")
  family: Any = _FAMILY.value
  estimator: Any = _ESTIMATOR.value
  predictions = profile = None
  with shared.usage():
    model = mixed.fit(
      _FORMULA.value,
      _table(_DATA.value),
      family=family,
      estimator=estimator,
      weights=_WEIGHTS.value,
      trials=_TRIALS.value,
      offset=_OFFSET.value,
      seed=_SEED.value,
    )
    if _PREDICT.value:
      predictions = mixed.predict(model, _table(_PREDICT.value))
    if _PROFILE.value and not model.estimates.perfect:  # the summary says why not
      profile = mixed.profile(model)
  found = mixed.summary(model, profile)
  print(found)
  if predictions is not None:
    print(report.predicted(predictions))
  if _JSON.value:
    config = {
      "data": pathlib.Path(_DATA.value).name,
      "formula": _FORMULA.value,
      "family": family,
      "estimator": estimator,
      "seed": _SEED.value,
    }
    report.write(_JSON.value, report.as_json(model, found, predictions, config))
  if _PLOT.value:
    from experiments.mixed import pictures

    with shared.usage():  # "lines" needs a covariate
      pictures.write(pathlib.Path(_PLOT.value), model, _PICTURE.value)


def _table(path: str) -> mixed.Table:
  return mixed.read(
    path,
    sep=_SEP.value,
    decimal=_DECIMAL.value,
    encoding=_ENCODING.value,
    comment=_COMMENT.value,
    na=_NA.value,
  )


def _simulate(datasets: int, seed: int) -> None:
  from experiments.mixed import simulation

  rows = simulation.run(datasets, seed)
  print(simulation.text(rows))
  if _JSON.value:
    report.write(_JSON.value, {"rows": rows, "datasets": datasets, "seed": seed})


if __name__ == "__main__":
  app.run(main)
