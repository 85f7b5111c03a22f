"""Adapts trained runs to tasks kept apart, and writes what it found beside them, once.

python -m experiments.evaluate runs/small_data
python -m experiments.evaluate runs/small_data --freeze=0.1,0.2,0.4
"""

import functools
import json
import math
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence

from absl import app, flags, logging

from experiments.datasets.source import Problem
from experiments.runs import problems, results, store
from experiments.settings import machine

_SPLIT = flags.DEFINE_enum("split", "test", ["validation", "test"], "Which tasks.")
_FREEZE = flags.DEFINE_list(
  "freeze", [], "Thresholds: modules whose sigma lies below are held at phi in adaptation."
)
_DATA_DIR = flags.DEFINE_string(
  "data_dir", None, "Folder of the data set of all these runs; default $SHRINKMETA_DATA/NAME."
)
_CACHE = flags.DEFINE_string(
  "compilation_cache", None, "Folder in which compiled programs are kept for the next run."
)


def thresholds(texts: Sequence[str]) -> list[float]:
  """The numbers of --freeze."""
  try:
    found = [float(text) for text in texts]
  except ValueError:
    found = [math.nan]
  if not all(0 < value < math.inf for value in found):
    raise ValueError(
      f"--freeze wants finite numbers above 0, as in --freeze=0.1,0.2; got {','.join(texts)!r}."
    )
  return found


def evaluate(
  folder: pathlib.Path,
  split: str,
  wanted: Mapping[str, float],
  make_problem: Callable[[str], Problem],
) -> None:
  """Writes those files of a run that are not there.

  Args:
    wanted: name of a file -> threshold below which modules are frozen.
    make_problem: from settings as JSON.
  """
  run, about = store.read(folder)
  if any(wanted.values()) and not results.learns_sigma(run.arm):
    logging.info("%s: no sigma to freeze by", folder)
    return
  missing = {n: below for n, below in wanted.items() if not results.is_there(folder / f"{n}.json")}
  if not missing:
    logging.info("%s: there already", folder)
    return
  problem = make_problem(json.dumps(about["config"]["problem"]))
  prepared = store.prepare(run.arm, run.config, problem)
  trained = store.restore(run, prepared)
  for name, below in missing.items():
    curve = store.record(run, about, prepared, trained, name, split, below)
    step = run.config.report_step
    at = list(run.config.adapt_steps).index(step)
    accuracy, nll = curve.accuracy[at].mean(), curve.nll[at].mean()
    logging.info("%s: accuracy %.3f, nats %.3f after %d steps", folder, accuracy, nll, step)


def main(argv: Sequence[str]) -> None:
  """Reads the flags, once."""
  if len(argv) < 2:
    raise app.UsageError("Name folders of runs: python -m experiments.evaluate runs/small_data")
  machine.start_jax(cache=_CACHE.value)
  split, data_dir = _SPLIT.value, _DATA_DIR.value
  with machine.usage():
    wanted = {f"{split}-freeze{value:g}": value for value in thresholds(_FREEZE.value)}
    folders = store.find(argv[1:])
  make = functools.cache(lambda settings: problems.make_problem(json.loads(settings), data_dir))
  failed: list[str] = []
  for folder in folders:
    try:
      evaluate(folder, split, wanted or {split: 0.0}, make)
    except Exception as error:  # whatever one run has, the others are evaluated
      expected = isinstance(error, (ValueError, OSError))  # they say what to do
      logging.error("%s: %s", folder, error, exc_info=not expected)
      failed.append(str(folder))
  if failed:
    logging.error("%d of %d runs are left: %s", len(failed), len(folders), ", ".join(failed))
    sys.exit(1)


if __name__ == "__main__":
  app.run(main)
