"""A search for the settings of an arm: it tries settings on validation tasks and keeps the best.

Trial 0 has the settings that the table starts from. The other trials are points of one Halton
sequence, the same for all arms. They vary

- rates and init_sigma, up to a factor of 4 up or down;
- inner steps: half, all or twice as many;
- an inner step on all examples or on a batch;
- an inner rate that is constant or decays.

If an arm searches both inner_rate and init_sigma, the size of a step in theta varies with
inner_rate init_sigma or with inner_rate init_sigma^2.
"""

import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from scipy.stats import qmc

from experiments.datasets.source import Problem
from experiments.networks import modules
from experiments.runs import pipeline, problems, results, store
from experiments.settings import flags
from experiments.settings.schema import Config

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
  start: Config, trial: int, choice_of_modules: Sequence[str], fixed: Sequence[str] = ()
) -> dict[str, Any]:
  """Return new values for the settings of an arm that are searched.

  Args:
    start: the arm, config.arms[NAME].
    trial: the number of the trial; trial 0 has the values of `start`.
    choice_of_modules: the choices for `task_specific`.
    fixed: the settings that are not searched.
  """
  searched = {name: start[name] for name in _SEARCHED if name in start and name not in fixed}
  if trial == 0:
    return searched
  point = qmc.Halton(len(_SEARCHED), rng=0).random(trial + 1)[trial]
  at = dict(zip(_SEARCHED, map(float, point), strict=True))  # in [0, 1)
  choices: dict[str, Sequence[Any]] = {
    "batch_size": sorted({0, start.batch_size}),
    "inner_steps": [math.ceil(start.inner_steps * factor) for factor in (0.5, 1, 2)],
    "task_specific": choice_of_modules,
    "inner_decay": (0, start.inner_decay or _HALVED),
  }

  def setting(name: str, value: Any) -> Any:
    if name in choices:
      return choices[name][int(at[name] * len(choices[name]))]
    return float(f"{value * _FACTOR ** (2 * at[name] - 1):.3g}")

  return {name: setting(name, value) for name, value in searched.items()}


def run_trial(
  folder: pathlib.Path, arm: str, config: Config, problem: Problem, seeds: int
) -> dict[str, float | None]:
  """Train from each seed and evaluate on validation tasks, unless FOLDER-SEED has the result.

  Args:
    folder: the folder of the trial. The folder of a run has its seed appended.
    arm: the name of the algorithm.
    config: the settings of the trial.
    problem: the tasks.
    seeds: the number of runs; their seeds are 0, 1, ...

  Returns:
    "accuracy" and "nll" are means over seeds, and "seconds" is the sum. The accuracy is None in
    regression. All three are None if any seed diverged.
  """
  prepared = pipeline.prepare(arm, config, problem)
  none: dict[str, float | None] = {"accuracy": None, "nll": None, "seconds": None}
  found: list[dict[str, float]] = []
  for seed in range(seeds):
    own = folder.with_name(f"{folder.name}-{seed}")
    with flags.usage():
      run = store.begin(own, arm, seed, config, problem)
    file, diverged = own / "validation.json", store.diverged(own)
    if not results.is_there(file) and not diverged.exists():
      try:
        trained = pipeline.train(prepared, arm, seed, config, run.checkpoints)
        store.record(run, store.read(own)[1], prepared, trained, "validation", "validation")
      except FloatingPointError as error:
        store.record_divergence(own, error)
    if diverged.exists():
      return none  # other seeds cannot make up for it
    _, (curve,) = results.read_json(file)
    accuracy, nll = float(curve.accuracy[-1].mean()), float(curve.nll[-1].mean())
    if not math.isfinite(nll):
      return none
    found.append({"accuracy": accuracy, "nll": nll, "seconds": sum(curve.seconds.values())})
  mean = {name: float(np.mean([one[name] for one in found])) for name in ("accuracy", "nll")}
  total = {"seconds": sum(one["seconds"] for one in found)}
  return {name: value if math.isfinite(value) else None for name, value in (mean | total).items()}


def score(found: Mapping[str, float | None]) -> float:
  """Return the accuracy, or in regression the mean log-likelihood; −inf if a run diverged."""
  if found["nll"] is None:
    return -math.inf
  return -found["nll"] if found["accuracy"] is None else found["accuracy"]


def search(
  arm: str, start: Config, trials: int, seeds: int, problem: Problem, out: pathlib.Path
) -> dict[str, Any]:
  """Return {"chosen": settings, "trials": the settings and the result of each trial}."""
  shapes = problems.make_model(start, problem).shapes
  labels = set(jax.tree.leaves(modules.modules(shapes, start.arms[arm].modules)))
  choices = modules.network_order(m for m in labels if "norm" not in m)
  done: list[dict[str, Any]] = []
  for trial in range(trials):
    settings = draw(start.arms[arm], trial, choices, start.fixed)
    config = start.copy_and_resolve_references()
    config.arms[arm].update(settings)
    found = run_trial(out / f"{arm}-{trial}", arm, config, problem, seeds)
    jax.clear_caches()  # no other trial uses these compiled programs
    done.append({"settings": settings, **found})
    logging.info("%s, trial %d, %s: %s", arm, trial, settings, found)
  best = max(done, key=score)  # the first of equals
  if best["nll"] is None:
    raise FloatingPointError(
      f"All {trials} trials of {arm} diverged: nothing was chosen. See {out}, and lower its rates "
      "by --set with another --out, or in experiments/settings/."
    )
  return {"chosen": best["settings"], "trials": done}
