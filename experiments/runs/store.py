"""A run: one arm trained from one seed, in a folder of its own.

    run.json        settings, protocol, versions, device
    states/         checkpoints, and log.jsonl, a row a meta-step
    SPLIT.json      what `evaluate` found, a `results.Curve`; SPLIT-freezeX.json with modules frozen

One training run consumes three keys: of the initial parameters, of the training tasks, and of the
mini-batches of inner steps. Test tasks and their mini-batches have keys of their own, the same for
all arms and seeds, so that differences between arms are paired.
"""

import json
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections

import shrinkmeta as sm
from experiments.runs import learners, problems, results, training
from experiments.settings import schema
from experiments.networks import convnet
from experiments.datasets import support
from experiments.datasets.source import Problem, Source

FORMAT = "shrinkmeta.experiments.run/4"
_SAMPLE = jax.jit(Source.sample, static_argnums=3)
_EVALUATION_KEY = {"validation": 30_000, "test": 20_000}


class Run(NamedTuple):
  """What a folder says of itself."""

  folder: pathlib.Path
  arm: str
  seed: int
  config: schema.Config

  @property
  def checkpoints(self) -> sm.Checkpoints:
    """Where its states are; `begin` has seen to it that no other run has the folder."""
    # Two, so that a damaged one costs the steps since the other and not the run.
    return sm.Checkpoints(self.folder / "states", every=50, keep=2)


class Prepared(NamedTuple):
  """An arm ready to be trained and to be evaluated."""

  learner: sm.MetaLearner
  model: problems.Model
  problem: Problem


def prepare(arm: str, config: schema.Config, problem: Problem) -> Prepared:
  """The learner of an arm for a problem, whose tasks carry what the network's norm needs."""
  if config.network.kind == "conv" and config.network.norm == "support":
    problem = support.beside(problem)
  model = problems.make_model(config, problem)
  labels = convnet.modules(model.shapes, config.arms[arm].modules)
  mesh = training.host_mesh(config.meta_batch)
  return Prepared(learners.make_learner(arm, config, model.likelihood, labels, mesh), model, problem)


def train(
  prepared: Prepared,
  arm: str,
  seed: int,
  config: schema.Config,
  checkpoints: sm.Checkpoints | None = None,
) -> training.Trained:
  """Trains from a seed, or goes on from the last checkpoint."""
  init_key, task_key, step_key = jax.random.split(jax.random.key(seed), 3)
  source = prepared.problem.train
  return training.train(
    prepared.learner,
    prepared.model.init(init_key),
    lambda start, count: _SAMPLE(source, task_key, start, count),
    config.meta_steps,
    config.meta_batch,
    f"{arm}-{seed}",
    (),
    checkpoints,
    step_key,
  )


def evaluate(
  prepared: Prepared,
  state: sm.MetaState,
  config: schema.Config,
  split: str,
  name: str,
) -> training.Adapted:
  """Adapts to the first config.SPLIT_episodes tasks of a split, the same for all arms and seeds."""
  source, count = _judged(config, prepared.problem, split)
  task_key, step_key = jax.random.split(jax.random.key(_EVALUATION_KEY[split]))
  return training.adapt(
    prepared.learner,
    prepared.model.likelihood,
    state,
    lambda start, count: _SAMPLE(source, task_key, start, count),
    count,
    tuple(config.adapt_steps),
    min(20, count),
    name,
    step_key,
  )


def _judged(config: schema.Config, problem: Problem, split: str) -> tuple[Source, int]:
  """Where the tasks of a split come from, and how many; ValueError where they would come again.

  Episodes of one task of a finite list are the same, or differ by what is random in them; either
  way they are not independent, as intervals take them to be.
  """
  source = {"validation": problem.validation, "test": problem.test}[split]
  count = config[f"{split}_episodes"]
  if source.tasks is not None and count > source.tasks:
    raise ValueError(
      f"There are {source.tasks} {split} tasks ({problem.protocol.split}), and {split}_episodes is "
      f"{count}: some would count twice. Train with --set={split}_episodes={source.tasks}."
    )
  return source, count


def record(
  run: Run,
  about: Mapping[str, Any],
  prepared: Prepared,
  trained: training.Trained,
  name: str,
  split: str,
  freeze: float = 0.0,
) -> results.Curve:
  """Adapts to a split with the modules frozen whose sigma lies below `freeze`; writes NAME.json."""
  then, now = about["protocol"], json.loads(json.dumps(protocol(run.config, prepared.problem)))
  if different := [
    f"{k}: {then.get(k)!r} then, {now[k]!r} now" for k in now if now[k] != then.get(k)
  ]:
    raise ValueError(
      f"{run.folder} was trained by another protocol: {'; '.join(different)}. Tasks to judge it "
      "may be among those it was trained on. Give the same data, --data_dir, or train it again."
    )
  trained = trained._replace(state=frozen_below(trained.state, freeze))
  found = evaluate(prepared, trained.state, run.config, split, f"{run.arm}-{run.seed}")
  curve = training.as_curve(
    prepared.learner, run.arm, run.seed, run.config.adapt_steps, trained, found
  )
  settings = {**about["config"], "protocol": about["protocol"], "split": split, "freeze": freeze}
  results.write_json(run.folder / f"{name}.json", settings, [curve], results.environment())
  return curve


def begin(
  folder: pathlib.Path, arm: str, seed: int, config: schema.Config, problem: Problem
) -> Run:
  """Writes run.json; a folder that another run has begun is left alone by an error."""
  run = Run(folder, arm, seed, config)
  about = {
    "format": FORMAT,
    "arm": arm,
    "seed": seed,
    "config": config.to_dict() | {"arms": {arm: config.arms[arm].to_dict()}},
    "protocol": protocol(config, problem),
    "environment": results.environment(),
  }
  file = folder / "run.json"
  if file.exists():
    own = _about(file)
    came = json.loads(json.dumps(about))
    then, now = (
      schema.flat({k: d.get(k) for k in ("arm", "seed", "config", "protocol")})
      for d in (own, came)
    )
    different = [
      f"{k.removeprefix('config.')}: {then.get(k, 'absent')} in it, {now.get(k, 'absent')} here"
      for k in sorted({*then, *now})
      if then.get(k) != now.get(k) and k.rpartition(".")[2] not in schema.OF_SEARCH
    ]
    if different:
      raise ValueError(
        f"{folder} holds a run with another config or other data: {'; '.join(different)}. Choose "
        "another --out, or remove the folder."
      )
    return run
  for split in ("validation", "test"):  # before anything is trained
    _judged(config, problem, split)
  if jax.process_index() == 0:
    with results.atomic(file) as temporary:
      text = json.dumps(about, indent=1, allow_nan=False)
      temporary.write_text(text + "\n", encoding="utf-8")
  return run


def read(folder: pathlib.Path) -> tuple[Run, dict[str, Any]]:
  """(the run of a folder, all of its run.json)."""
  about = _about(folder / "run.json")
  config = ml_collections.ConfigDict(about["config"])
  return Run(folder, about["arm"], about["seed"], config), about


def _about(file: pathlib.Path) -> dict[str, Any]:
  """What a run.json holds."""
  try:
    about = json.loads(file.read_text(encoding="utf-8"))
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


def find(paths: Iterable[str]) -> list[pathlib.Path]:
  """The folders of runs at or below the paths, sorted."""
  found: set[pathlib.Path] = set()
  for path in map(pathlib.Path, paths):
    own = {file.parent for file in path.rglob("run.json")}
    if not own:
      raise ValueError(f"There is no run in {path}: no run.json in it or below it.")
    found |= own
  return sorted(found)


def record_divergence(folder: pathlib.Path, error: FloatingPointError) -> None:
  """Writes why a run has no result."""
  if jax.process_index() == 0:
    with results.atomic(diverged(folder)) as temporary:
      temporary.write_text(f"{error}\n", encoding="utf-8")


def diverged(folder: pathlib.Path) -> pathlib.Path:
  """The file that says so."""
  return folder / "diverged.txt"


def restore(run: Run, prepared: Prepared) -> training.Trained:
  """The state after the last meta-step; ValueError where training has not got there."""
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
  rows = sm.read_json_lines(log)
  if len(rows) != run.config.meta_steps:
    raise ValueError(
      f"{log} has {len(rows)} rows and wants one for each of {run.config.meta_steps} meta-steps: "
      "what training took and how sigma moved is lost. Train again in another folder."
    )
  return training.trained(found, rows)


def protocol(config: schema.Config, problem: Problem) -> dict[str, Any]:
  """What a row of results says of how it came about."""
  norms = {
    "batch": "statistics of the current batch (transductive)",
    "support": "statistics of the support set",
    "group": "none (group norm)",
  }
  norm = norms[config.network.norm] if config.network.kind == "conv" else "none"
  return problem.protocol._asdict() | {"batch norm": norm}


def frozen_below(state: sm.MetaState, threshold: float) -> sm.MetaState:
  """The state with the modules frozen whose sigma lies below."""
  freeze = lambda value: jnp.where(jnp.exp(0.5 * value) < threshold, -jnp.inf, value)
  return state._replace(log_sigma2=jax.tree.map(freeze, state.log_sigma2))
