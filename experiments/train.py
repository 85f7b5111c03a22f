"""Train arms of a table of results/: algorithms with their settings, each from several seeds.

    python -m experiments.train --table=small_data --set=problem.shots=3 --seeds=10,11,12

The same command, given again, continues a run that was stopped. By default all algorithms are
trained from seeds 10 to 14, because searches use seeds from 0. Runs go into runs/TABLE by default.
"""

import pathlib
import sys
from collections.abc import Sequence

from absl import app, flags, logging

import shrinkmeta as sm
from experiments.runs import pipeline, problems, store
from experiments.settings import algorithms, machine, tables
from experiments.settings import flags as shared

_TABLE = shared.table()
_SIZE = shared.table_size()
_ALGORITHMS = shared.algorithms()
_SEEDS = shared.seeds()
_SET = shared.changes()
_TUNED = flags.DEFINE_bool(
  "tuned", True, "Use the settings that experiments.tune chose. False uses those it starts from."
)
_OUT = shared.out()
_DATA_DIR = shared.data_dir()
_CACHE = shared.compilation_cache()
shared.define_processes()


def main(argv: Sequence[str]) -> None:
  """Read the flags and train."""
  shared.no_arguments(argv)
  with shared.usage():
    machine.start_jax(cache=_CACHE.value, processes=shared.processes())
    names = algorithms.chosen(shared.or_default(_ALGORITHMS, ["all"]))
    seeds = shared.parse_seeds(shared.or_default(_SEEDS, ["10", "11", "12", "13", "14"]))
    config = tables.load(_TABLE.value, _SIZE.value, _SET.value, _TUNED.value, names)
    problem = problems.make_problem(config.problem, _DATA_DIR.value)
    pipeline.check_processes(config, problem, names, seeds)
    out = pathlib.Path(shared.or_default(_OUT, f"runs/{_TABLE.value}"))
    sm.check_shared("--out", out)
    arms = {name: pipeline.prepare(name, config, problem) for name in names}
  diverged: list[str] = []
  for name, prepared in arms.items():
    if not config.arms[name].trials:
      logging.warning("%s: no search chose its settings", name)
    for seed in seeds:
      with shared.usage():
        run = store.begin(out / f"{name}-{seed}", name, seed, config, problem)
      try:
        trained = pipeline.train(prepared, name, seed, config, run.checkpoints)
      except FloatingPointError as error:  # go on with the others
        store.record_divergence(run.folder, error)
        logging.error("%s, seed %d diverged: %s", name, seed, error)
        diverged.append(str(run.folder))
        continue
      store.diverged(run.folder).unlink(missing_ok=True)  # an earlier start may have diverged
      losses = trained.history.get("loss") or [float("nan")]
      logging.info("%s, seed %d: loss %.4f in the last meta-step", name, seed, losses[-1])
  if diverged:
    logging.error("Without a result: %s", ", ".join(diverged))
    sys.exit(1)


if __name__ == "__main__":
  app.run(main)
