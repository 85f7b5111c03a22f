"""Adapts trained runs to tasks kept apart, and writes what it found beside them, once.

python -m experiments.evaluate runs/small_data
python -m experiments.evaluate runs/small_data --freeze=0.1,0.2,0.4
"""

import functools
import json
from collections.abc import Sequence

from absl import app, flags, logging

from experiments import problems, runs, startup

_SPLIT = flags.DEFINE_enum("split", "test", ["validation", "test"], "Which tasks.")
_FREEZE = flags.DEFINE_list(
  "freeze", [], "Thresholds: modules whose sigma lies below are held at phi in adaptation."
)
_CACHE = flags.DEFINE_string(
  "compilation_cache", None, "Folder in which compiled programs are kept for the next run."
)


def main(argv: Sequence[str]) -> None:
  """Reads the flags, once."""
  if len(argv) < 2:
    raise app.UsageError("Name folders of runs: python -m experiments.evaluate runs/small_data")
  startup.start_jax(cache=_CACHE.value)
  split = _SPLIT.value
  try:
    wanted = {f"{split}-freeze{float(text):g}": float(text) for text in _FREEZE.value}
    folders = runs.find(argv[1:])
  except ValueError as error:
    raise app.UsageError(str(error)) from error
  wanted = wanted or {split: 0.0}
  problem = functools.cache(lambda settings: problems.make_problem(json.loads(settings)))
  for folder in folders:
    run, about = runs.read(folder)
    missing = {n: below for n, below in wanted.items() if not (folder / f"{n}.json").exists()}
    learns = runs.learns_sigma(run)
    if not missing or (_FREEZE.value and not learns):
      logging.info("%s: %s", folder, "there already" if learns else "no sigma to freeze by")
      continue
    prepared = runs.prepare(run.arm, run.config, problem(json.dumps(about["config"]["problem"])))
    trained = runs.restore(run, prepared)
    for name, below in missing.items():
      curve = runs.record(run, about, prepared, trained, name, split, below)
      step = run.config.report_step
      at = list(run.config.adapt_steps).index(step)
      accuracy, nll = curve.accuracy[at].mean(), curve.nll[at].mean()
      logging.info("%s: accuracy %.3f, nats %.3f after %d steps", folder, accuracy, nll, step)


if __name__ == "__main__":
  app.run(main)
