"""Trains arms of a table of RESULTS.md.

    python -m experiments.train --table=small_data --set=problem.shots=3 --seeds=10,11,12

A run that was stopped goes on where it was when the same command is given again.
"""

import pathlib
import sys
from collections.abc import Sequence

from absl import app, flags, logging

from experiments.runs import learners, problems, store
from experiments.settings import machine, tables

_TABLE = flags.DEFINE_enum("table", "sinusoid", list(tables.TABLES), "What is run.")
_SIZE = flags.DEFINE_enum("size", "cpu", list(tables.SIZES), "For which machine.")
_ARMS = flags.DEFINE_list("arms", ["all"], f"Of {', '.join(learners.ALL)}; or all.")
_SEEDS = flags.DEFINE_list(
  "seeds",
  ["10", "11", "12", "13", "14"],
  "A run each; those of trials of experiments.tune begin at 0.",
)
_SET = flags.DEFINE_multi_string("set", [], "Changes one setting: --set=meta_steps=100.")
_TUNED = flags.DEFINE_bool(
  "tuned", True, "Settings that experiments.tune chose; false: those that searches start from."
)
_OUT = flags.DEFINE_string("out", None, "Folder of the runs; default runs/TABLE.")
_DATA_DIR = flags.DEFINE_string(
  "data_dir", None, "Folder of the data set; default $SHRINKMETA_DATA/NAME."
)
_CACHE = flags.DEFINE_string(
  "compilation_cache", None, "Folder in which compiled programs are kept for the next run."
)
machine.define_flags()


def main(argv: Sequence[str]) -> None:
  """Reads the flags, once."""
  if len(argv) > 1:
    raise app.UsageError(f"Unexpected arguments: {argv[1:]}.")
  machine.start_jax(cache=_CACHE.value, processes=machine.processes())
  with machine.usage():
    names = learners.chosen(_ARMS.value)
    seeds = machine.parse_seeds(_SEEDS.value)
    config = tables.load(_TABLE.value, _SIZE.value, _SET.value, _TUNED.value)
    problem = problems.make_problem(config.problem, _DATA_DIR.value)
    ready = {name: store.prepare(name, config, problem) for name in names}
  out = pathlib.Path(_OUT.value or f"runs/{_TABLE.value}")
  diverged: list[str] = []
  for name, prepared in ready.items():
    if not config.arms[name].trials:
      logging.warning("%s: no search chose its settings", name)
    for seed in seeds:
      with machine.usage():
        run = store.begin(out / f"{name}-{seed}", name, seed, config, problem)
      try:
        trained = store.train(prepared, name, seed, config, run.checkpoints)
      except FloatingPointError as error:  # the others are trained
        store.record_divergence(run.folder, error)
        logging.error("%s, seed %d diverged: %s", name, seed, error)
        diverged.append(str(run.folder))
        continue
      store.diverged(run.folder).unlink(missing_ok=True)  # of an earlier start
      losses = trained.history.get("loss") or [float("nan")]
      logging.info("%s, seed %d: validation loss %.4f", name, seed, losses[-1])
  if diverged:
    logging.error("Without a result: %s", ", ".join(diverged))
    sys.exit(1)


if __name__ == "__main__":
  app.run(main)
