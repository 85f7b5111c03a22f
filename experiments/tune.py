"""Chooses the settings of the arms of a table on its validation tasks, by searches of one length.

    python -m experiments.tune --table=small_data --trials=8

Trial 0 of an arm has the settings that the table starts from. The others are points of one Halton
sequence, the same for all arms: rates and init_sigma up to a factor of 4 away; half, all or twice
the inner steps; all examples at an inner step or a batch; an inner rate that is constant or decays.
Where both are searched, a step of theta goes with inner_rate and with init_sigma, or its square,
and varies by their product. The most accurate after `report_step` steps, in regression the
likeliest, goes with the whole search into experiments/tuned/TABLE-SIZE/ARM.json, from where
`experiments.train` has it.

A trial is a run, with --seeds=3 the mean of three: a trial then costs three times as much, and less
hangs on luck. What the table's protocol fixes, config.fixed, is not searched. A search that was
stopped goes on where it was when started again.
"""

import math
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import app, flags, logging
from scipy.stats import qmc

from experiments.datasets.source import Problem
from experiments.networks import convnet
from experiments.runs import learners, problems, results, store
from experiments.settings import machine, schema, tables

_TABLE = flags.DEFINE_enum("table", "sinusoid", list(tables.TABLES), "What is searched.")
_SIZE = flags.DEFINE_enum("size", "cpu", list(tables.SIZES), "For which machine.")
_ARMS = flags.DEFINE_list("arms", ["all"], f"Of {', '.join(learners.ALL)}; or all.")
_TRIALS = flags.DEFINE_integer("trials", 8, "Trials an arm.", lower_bound=1)
_SEEDS = flags.DEFINE_integer("seeds", 1, "Runs a trial, whose mean counts.", lower_bound=1)
_SET = flags.DEFINE_multi_string("set", [], "Changes one setting of all trials.")
_OUT = flags.DEFINE_string("out", None, "Folder of the trials; default searches/TABLE-SIZE.")
_CHOSEN = flags.DEFINE_string(
  "chosen", None, "Folder of ARM.json; default is where experiments.train looks for them."
)
_DATA_DIR = flags.DEFINE_string(
  "data_dir", None, "Folder of the data set; default $SHRINKMETA_DATA/NAME."
)
_CACHE = flags.DEFINE_string(
  "compilation_cache", None, "Folder in which compiled programs are kept for the next run."
)

_FACTOR = 4.0  # a rate, or init_sigma, lies between start / _FACTOR and start * _FACTOR
_SEARCHED: tuple[str, ...] = (
  "batch_size",
  "inner_rate",
  "outer_rate",
  "inner_steps",
  "init_sigma",
  "sigma_rate",
  "task_specific",
  "inner_decay",
)
_HALVED = 10  # steps after which a rate that decays has halved


def draw(
  start: schema.Config, trial: int, modules: Sequence[str], fixed: Sequence[str] = ()
) -> dict[str, Any]:
  """The settings of a trial, those that `start`, config.arms[ARM], has among _SEARCHED.

  Args:
    modules: what `task_specific` is one of.
    fixed: settings left as they are.
  """
  searched = {name: start[name] for name in _SEARCHED if name in start and name not in fixed}
  if trial == 0:
    return searched
  point = qmc.Halton(len(_SEARCHED), rng=0).random(trial + 1)[trial]
  at = dict(zip(_SEARCHED, map(float, point), strict=True))  # in [0, 1)
  choices: dict[str, Sequence[Any]] = {
    "batch_size": sorted({0, start.batch_size}),
    "inner_steps": [math.ceil(start.inner_steps * factor) for factor in (0.5, 1, 2)],
    "task_specific": modules,
    "inner_decay": (0, start.inner_decay or _HALVED),
  }

  def setting(name: str, value: Any) -> Any:
    if name in choices:
      return choices[name][int(at[name] * len(choices[name]))]
    return float(f"{value * _FACTOR ** (2 * at[name] - 1):.3g}")

  return {name: setting(name, value) for name, value in searched.items()}


def run_trial(
  folder: pathlib.Path, arm: str, config: schema.Config, problem: Problem, seeds: int
) -> dict[str, float | None]:
  """Trains from each seed and adapts to the validation tasks, unless FOLDER-SEED has it.

  Returns:
    "accuracy" and "nll", means over seeds, and "seconds", their sum; None is an accuracy in
    regression, and all three where one seed diverged.
  """
  prepared = store.prepare(arm, config, problem)
  none: dict[str, float | None] = {"accuracy": None, "nll": None, "seconds": None}
  found: list[dict[str, float]] = []
  for seed in range(seeds):
    own = folder.with_name(f"{folder.name}-{seed}")
    with machine.usage():
      run = store.begin(own, arm, seed, config, problem)
    file, diverged = own / "validation.json", store.diverged(own)
    if not results.is_there(file) and not diverged.exists():
      try:
        trained = store.train(prepared, arm, seed, config, run.checkpoints)
        store.record(run, store.read(own)[1], prepared, trained, "validation", "validation")
      except FloatingPointError as error:
        store.record_divergence(own, error)
    if diverged.exists():
      return none  # the worst already, whatever other seeds do
    _, (curve,) = results.read_json(file)
    accuracy, nll = float(curve.accuracy[-1].mean()), float(curve.nll[-1].mean())
    if not math.isfinite(nll):
      return none
    found.append({"accuracy": accuracy, "nll": nll, "seconds": sum(curve.seconds.values())})
  mean = {name: float(np.mean([one[name] for one in found])) for name in ("accuracy", "nll")}
  total = {"seconds": sum(one["seconds"] for one in found)}
  return {name: value if math.isfinite(value) else None for name, value in (mean | total).items()}


def score(found: Mapping[str, float | None]) -> float:
  """Accuracy; in regression the mean log-likelihood. What diverged is worse than all else."""
  if found["nll"] is None:
    return -math.inf
  return -found["nll"] if found["accuracy"] is None else found["accuracy"]


def search(
  arm: str, start: schema.Config, trials: int, seeds: int, problem: Problem, out: pathlib.Path
) -> dict[str, Any]:
  """{"chosen": settings, "trials": of each its settings and what it found}."""
  shapes = problems.make_model(start, problem).shapes
  labels = set(jax.tree.leaves(convnet.modules(shapes, start.arms[arm].modules)))
  modules = results.network_order(m for m in labels if "norm" not in m)
  done: list[dict[str, Any]] = []
  for trial in range(trials):
    settings = draw(start.arms[arm], trial, modules, start.fixed)
    config = start.copy_and_resolve_references()
    config.arms[arm].update(settings)
    found = run_trial(out / f"{arm}-{trial}", arm, config, problem, seeds)
    jax.clear_caches()  # programs of these settings, none of which is met again
    done.append({"settings": settings, **found})
    logging.info("%s, trial %d, %s: %s", arm, trial, settings, found)
  best = max(done, key=score)  # of equals the first
  if best["nll"] is None:
    raise FloatingPointError(
      f"All {trials} trials of {arm} diverged: nothing was chosen. See {out}, and lower its rates "
      "by --set with another --out, or in experiments/tables.py."
    )
  return {"chosen": best["settings"], "trials": done}


def main(argv: Sequence[str]) -> None:
  """Reads the flags, once."""
  if len(argv) > 1:
    raise app.UsageError(f"Unexpected arguments: {argv[1:]}.")
  machine.start_jax(cache=_CACHE.value)
  table, size = _TABLE.value, _SIZE.value
  with machine.usage():
    names = learners.chosen(_ARMS.value)
    config = tables.load(table, size, _SET.value, tuned=False)
    problem = problems.make_problem(config.problem, _DATA_DIR.value)
    for name in names:
      store.prepare(name, config, problem)  # an error of settings, before another arm is searched
  with config.unlocked():
    config.adapt_steps = (config.report_step,)
  out = pathlib.Path(_OUT.value or f"searches/{table}-{size}")
  shared = {key: value for key, value in config.to_dict().items() if key != "arms"}
  failed = False
  for name in names:
    try:
      found = search(name, config, _TRIALS.value, _SEEDS.value, problem, out)
    except FloatingPointError as error:  # the others are searched
      logging.error("%s", error)
      failed = True
      continue
    file = tables.chosen_file(table, size, name)
    file = file if _CHOSEN.value is None else pathlib.Path(_CHOSEN.value) / file.name
    about = {"format": tables.TUNED, "arm": name, "start": config.arms[name].to_dict()}
    about |= {"seeds": _SEEDS.value, "config": shared, "protocol": store.protocol(config, problem)}
    results.write_document(file, about | found)
    logging.info("%s: %s, in %s", name, found["chosen"], file)
  if failed:
    sys.exit(1)


if __name__ == "__main__":
  app.run(main)
