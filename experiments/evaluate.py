"""Adapts trained runs to tasks kept apart, and writes what it found beside them.

python -m experiments.evaluate runs/small_data
python -m experiments.evaluate runs/small_data --freeze=0.1,0.2,0.4
"""

from collections.abc import Sequence

import numpy as np
from absl import app, flags, logging

import shrinkmeta as sm
from experiments import problems, results, runs, startup, training

_SPLIT = flags.DEFINE_enum("split", "test", ["validation", "test"], "Which tasks.")
_FREEZE = flags.DEFINE_list(
  "freeze", [], "Thresholds: modules whose sigma lies below are held at phi in adaptation."
)
_CACHE = flags.DEFINE_string(
  "compilation_cache", None, "Folder in which compiled programs are kept for the next run."
)
startup.define_flags()


def curve(
  run: runs.Run, prepared: runs.Prepared, state: sm.MetaState, adapted: training.Adapted
) -> results.Curve:
  """The record of one evaluation."""
  history = runs.history(run)
  modules = sm.module_summary(prepared.learner.labels, state.phi, state.log_sigma2)
  seconds = history.get("seconds") or [0.0]
  return results.Curve(
    algorithm=run.arm,
    seed=run.seed,
    steps=np.asarray(run.config.adapt_steps),
    accuracy=adapted.accuracy,
    nll=adapted.nll,
    sigma={row.name: row.sigma for row in modules},
    moved=adapted.moved,
    sizes={row.name: row.size for row in modules},
    seconds={"compile": seconds[0], "train": sum(seconds[1:])} | adapted.seconds,
    history=history,
  )


def main(argv: Sequence[str]) -> None:
  """Reads the flags, once."""
  if len(argv) < 2:
    raise app.UsageError("Name folders of runs: python -m experiments.evaluate runs/small_data")
  startup.start_jax(cache=_CACHE.value, processes=startup.processes())
  try:
    thresholds = [float(text) for text in _FREEZE.value]
    folders = runs.find(argv[1:])
  except ValueError as error:
    raise app.UsageError(str(error)) from error
  last: tuple[object, problems.Problem] | None = None
  for folder in folders:
    run, about = runs.read(folder)
    wanted = [(_SPLIT.value, None)] if not thresholds else []
    wanted += [(f"{_SPLIT.value}-freeze{below:g}", below) for below in thresholds]
    wanted = [(name, below) for name, below in wanted if not (folder / f"{name}.json").exists()]
    if not wanted:
      continue
    if last is None or last[0] != run.config.problem:
      last = run.config.problem, problems.make_problem(run.config)
    prepared = runs.prepare(run.arm, run.config, last[1])
    if thresholds and prepared.learner.row.sigma != "learned":
      continue
    trained = runs.restore(run, prepared)
    for name, below in wanted:
      state = trained
      if below is not None:
        state = state._replace(log_sigma2=runs.thresholded(state, below))
      adapted = runs.evaluate(
        prepared, state, run.config, _SPLIT.value, run.config.adapt_steps, f"{run.arm}-{run.seed}"
      )
      found = curve(run, prepared, state, adapted)
      settings = {**about["config"], "split": _SPLIT.value, "protocol": about["protocol"]}
      settings["freeze"] = below
      results.write_json(folder / f"{name}.json", settings, [found], results.environment())
      at = list(run.config.adapt_steps).index(run.config.report_step)
      logging.info(
        "%s, %s: accuracy %.3f, nll %.3f after %d steps",
        folder.name, name, found.accuracy[at].mean(), found.nll[at].mean(), run.config.report_step,
      )  # fmt: skip


if __name__ == "__main__":
  app.run(main)
