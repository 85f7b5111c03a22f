"""Choose the settings of the arms of a table on its validation tasks, by searches of equal length.

    python -m experiments.tune --table=small_data --trials=8

runs/search.py describes the trials of a search. The best trial is the most accurate after
`report_step` adaptation steps. In regression it is the trial with the highest likelihood. It is
written with the whole search to experiments/tuned/TABLE-SIZE/ALGORITHM.json, which
`experiments.train` reads.

By default all algorithms are searched, and a trial is one run from seed 0. With --seeds=0,1,2 a
trial is the mean of three runs. It takes three times as long and depends less on chance. Settings
that the protocol of a table fixes (config.fixed) are not searched. Runs go into
searches/TABLE-SIZE. The same command, given again, continues a search that was stopped.
"""

import pathlib
import sys
from collections.abc import Sequence

from absl import app, flags, logging

from experiments.runs import files, pipeline, problems, search
from experiments.settings import algorithms, machine, paths, tables, tuned
from experiments.settings import flags as shared

_TABLE = shared.table()
_SIZE = shared.table_size()
_ALGORITHMS = shared.algorithms()
_SEEDS = shared.seeds()
_SET = shared.changes()
_OUT = shared.out()
_DATA_DIR = shared.data_dir()
_CACHE = shared.compilation_cache()
_TRIALS = flags.DEFINE_integer("trials", 8, "Trials of each algorithm.", lower_bound=1)
_CHOSEN = paths.define(
  "chosen", "Folder of ALGORITHM.json; default: where experiments.train looks for it."
)


def runs_per_trial(texts: Sequence[str]) -> int:
  """Return the number of seeds in --seeds, which must be 0, 1, ..."""
  seeds = shared.parse_seeds(texts)
  if seeds != list(range(len(seeds))):
    raise ValueError(
      "--seeds of a search counts from 0: write --seeds=0,1,2 for three runs a trial; got "
      f"{','.join(texts)!r}."
    )
  return len(seeds)


def main(argv: Sequence[str]) -> None:
  """Read the flags and search."""
  shared.no_arguments(argv)
  machine.start_jax(cache=_CACHE.value)
  table, size = _TABLE.value, _SIZE.value
  with shared.usage():
    names = algorithms.chosen(shared.or_default(_ALGORITHMS, ["all"]))
    seeds = runs_per_trial(shared.or_default(_SEEDS, ["0"]))
    config = tables.load(table, size, _SET.value, use_tuned=False)
    problem = problems.make_problem(config.problem, _DATA_DIR.value)
    for name in names:  # errors of settings come before the first search
      pipeline.prepare(name, config, problem)
  with config.unlocked():
    config.adapt_steps = (config.report_step,)
  out = pathlib.Path(shared.or_default(_OUT, f"searches/{table}-{size}"))
  common = {key: value for key, value in config.to_dict().items() if key != "arms"}
  common = {"seeds": seeds, "config": common, "protocol": pipeline.protocol(config, problem)}
  failed = False
  for name in names:
    try:
      found = search.search(name, config, _TRIALS.value, seeds, problem, out)
    except FloatingPointError as error:  # go on with the others
      logging.error("%s", error)
      failed = True
      continue
    file = tuned.file_of(table, size, name)
    file = file if _CHOSEN.value is None else pathlib.Path(_CHOSEN.value) / file.name
    about = {"format": tuned.FORMAT, "arm": name, "start": config.arms[name].to_dict()}
    files.write_document(file, about | common | found)
    logging.info("%s: %s, in %s", name, found["chosen"], file)
  if failed:
    sys.exit(1)


if __name__ == "__main__":
  app.run(main)
