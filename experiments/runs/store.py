"""A run in a folder of its own: one arm trained from one seed.

run.json        settings, protocol, versions, device
states/         checkpoints, and log.jsonl, a log record per meta-step
SPLIT.json      what `evaluate` found, a `results.Curve`; SPLIT-freezeX.json with modules frozen
"""

import json
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import ml_collections
from absl import logging

import shrinkmeta as sm
from experiments.datasets.source import Problem
from experiments.runs import files, pipeline, results, training
from experiments.settings import algorithms, schema

FORMAT = "shrinkmeta.experiments.run/4"


class Run(NamedTuple):
  """The content of run.json."""

  folder: pathlib.Path
  arm: str  # name of its algorithm
  seed: int
  config: schema.Config

  @property
  def checkpoints(self) -> sm.Checkpoints:
    """Return where the states are; `begin` has checked that the folder belongs to this run."""
    # Two, so that a damaged checkpoint costs the steps since the one before, not the whole run.
    return sm.Checkpoints(self.folder / "states", every=50, keep=2)


def begin(
  folder: pathlib.Path, arm: str, seed: int, config: schema.Config, problem: Problem
) -> Run:
  """Write run.json, or raise ValueError if the folder holds another run."""
  run = Run(folder, arm, seed, config)
  about = {
    "format": FORMAT,
    "arm": arm,
    "seed": seed,
    "config": config.to_dict() | {"arms": {arm: config.arms[arm].to_dict()}},
    "protocol": pipeline.protocol(config, problem),
    "checksums": checksums(problem),
    "environment": files.environment(),
  }
  file = folder / "run.json"
  if file.exists():
    own = _about(file)
    parts = [k for k in ("arm", "seed", "config", "protocol", "checksums") if k in own]
    different = [
      f"{name.removeprefix('config.')}: {then} in it, {now} here"
      for name, then, now in _differences(*({k: d.get(k) for k in parts} for d in (own, about)))
      if name.rpartition(".")[2] not in schema.OF_SEARCH
    ]
    if different:
      raise ValueError(
        f"{folder} holds a run with another config or other data: {'; '.join(different)}. Choose "
        "another --out, or remove the folder."
      )
    return run
  if (folder / "states").exists():
    raise ValueError(
      f"{folder} has states of a run but no run.json, which says which one. Choose another --out, "
      "or remove the folder."
    )
  for split in ("validation", "test"):  # errors come before training
    pipeline.evaluation(config, problem, split)
  if jax.process_index() == 0:
    with files.atomic(file) as temporary:
      text = json.dumps(about, indent=1, allow_nan=False)
      temporary.write_text(text + "\n", encoding="utf-8")
  return run


def checksums(problem: Problem) -> dict[str, str]:
  """Return a checksum of the arrays of each part: words and counts do not show other pictures."""
  parts = ("train", "validation", "test")
  return {part: files.fingerprint(getattr(problem, part).data) for part in parts}


def _differences(then: Any, now: Any) -> list[tuple[str, Any, Any]]:
  """Return (dotted name, old value, new value) of entries that differ after conversion to JSON."""
  old, new = (schema.flat(json.loads(json.dumps(tree))) for tree in (then, now))
  different = [name for name in sorted({*old, *new}) if old.get(name) != new.get(name)]
  return [(name, old.get(name, "absent"), new.get(name, "absent")) for name in different]


def record(
  run: Run,
  about: Mapping[str, Any],
  prepared: pipeline.Prepared,
  trained: training.Trained,
  name: str,
  split: str,
  freeze: float = 0.0,
) -> results.Curve:
  """Evaluate a trained run and write NAME.json.

  Args:
    run: the run.
    about: the content of its run.json.
    prepared: the arm of the run.
    trained: the trained state and the history.
    name: the name of the file.
    split: "validation" or "test".
    freeze: the threshold; modules with a smaller sigma are frozen.
  """
  check_data(run, about, prepared.problem)
  trained = trained._replace(state=pipeline.frozen_below(trained.state, freeze))
  curve = pipeline.curve(prepared, run.arm, run.seed, run.config, split, trained)
  settings = {**about["config"], "protocol": about["protocol"], "split": split, "freeze": freeze}
  results.write_json(run.folder / f"{name}.json", settings, [curve], files.environment())
  return curve


def check_data(run: Run, about: Mapping[str, Any], problem: Problem) -> None:
  """Raise ValueError unless the run was trained by the protocol, and on the data, of `problem`."""
  sums = checksums(problem)
  now = pipeline.protocol(run.config, problem) | {"checksums": sums}
  then = {name: about["protocol"].get(name) for name in now}
  then["checksums"] = about.get("checksums", sums)  # runs of earlier versions have none
  if different := [f"{k}: {a!r} then, {b!r} now" for k, a, b in _differences(then, now)]:
    raise ValueError(
      f"{run.folder} was trained by another protocol: {'; '.join(different)}. Tasks to judge it "
      "may be among those it was trained on. Give the same data, --data_dir, or train it again."
    )


def evaluate(
  folder: pathlib.Path,
  split: str,
  wanted: Mapping[str, float],
  make_problem: Callable[[str], Problem],
) -> None:
  """Write the evaluations of a run that are missing.

  Args:
    folder: the folder of the run.
    split: "validation" or "test".
    wanted: {name of a file: threshold}. Modules with sigma below the threshold are frozen; 0
      freezes none.
    make_problem: returns the problem for settings in JSON.
  """
  run, about = read(folder)
  if any(wanted.values()) and not algorithms.learns_sigma(run.arm):
    logging.info("%s: no sigma to freeze by", folder)
    return
  missing = {n: below for n, below in wanted.items() if not results.is_there(folder / f"{n}.json")}
  if not missing:
    logging.info("%s: there already", folder)
    return
  problem = make_problem(json.dumps(about["config"]["problem"]))
  prepared = pipeline.prepare(run.arm, run.config, problem)
  trained = restore(run, prepared)
  for name, below in missing.items():
    curve = record(run, about, prepared, trained, name, split, below)
    step = run.config.report_step
    at = list(run.config.adapt_steps).index(step)
    accuracy, nll = curve.accuracy[at].mean(), curve.nll[at].mean()
    logging.info("%s: accuracy %.3f, nats %.3f after %d steps", folder, accuracy, nll, step)


def read(folder: pathlib.Path) -> tuple[Run, dict[str, Any]]:
  """Return the run of a folder, and the content of its run.json."""
  about = _about(folder / "run.json")
  config = ml_collections.ConfigDict(about["config"])
  return Run(folder, about["arm"], about["seed"], config), about


def _about(file: pathlib.Path) -> dict[str, Any]:
  """Return the content of a run.json."""
  try:
    about = json.loads(file.read_text(encoding="utf-8-sig"))
  except (OSError, ValueError) as error:
    raise ValueError(
      f"{file} cannot be read: {error}. Wanted what experiments.train wrote. Train again in "
      "another folder."
    ) from error
  found = about.get("format") if isinstance(about, dict) else None
  if found != FORMAT:
    raise ValueError(
      f"{file}: format is {found!r}; wanted {FORMAT!r}. Train again in another folder."
    )
  return about


def find(paths: Iterable[files.Path]) -> list[pathlib.Path]:
  """Return the folders of runs at or below the paths, sorted."""
  found: set[pathlib.Path] = set()
  for path in map(pathlib.Path, paths):
    own = {file.parent for file in path.rglob("run.json")}
    if not own:
      raise ValueError(f"There is no run in {path}: no run.json in it or below it.")
    found |= own
  return sorted(found)


def record_divergence(folder: pathlib.Path, error: FloatingPointError) -> None:
  """Write the reason why a run has no result."""
  if jax.process_index() == 0:
    with files.atomic(diverged(folder)) as temporary:
      temporary.write_text(f"{error}\n", encoding="utf-8")


def diverged(folder: pathlib.Path) -> pathlib.Path:
  """Return the path of the file that exists if a run diverged."""
  return folder / "diverged.txt"


def restore(run: Run, prepared: pipeline.Prepared) -> training.Trained:
  """Return the state after the last meta-step; raise ValueError if training has not finished."""
  state = prepared.learner.init(prepared.model.init(jax.random.key(0)))
  found = sm.restore(run.checkpoints, prepared.learner, state)
  if diverged(run.folder).exists():
    raise ValueError(f"{run.folder} has no result: see {diverged(run.folder)}.")
  if found is None or int(found.step) != run.config.meta_steps:
    raise ValueError(
      f"{run.folder} was trained for {0 if found is None else int(found.step)} of "
      f"{run.config.meta_steps} meta-steps: start experiments.train again, it goes on from there."
    )
  log = run.folder / "states" / "log.jsonl"
  records = sm.read_json_lines(log)
  if len(records) != run.config.meta_steps:
    raise ValueError(
      f"{log} has {len(records)} records and wants one for each of {run.config.meta_steps} "
      "meta-steps: the times of training and the history of sigma are lost. Train again in another "
      "folder."
    )
  return training.trained(found, records)
