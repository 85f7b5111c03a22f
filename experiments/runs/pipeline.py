"""The steps of every comparison: prepare an arm, train it from a seed, evaluate it.

Training uses three keys: for the initial parameters, for the training tasks, and for the
mini-batches of inner steps. Validation and test tasks have keys of their own. These are the same
for all arms and seeds, so that differences between arms are paired.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import shrinkmeta as sm
from experiments.datasets import support
from experiments.datasets.source import Problem, Source, pooled, sample_tasks
from experiments.networks.modules import modules
from experiments.runs import files, learners, problems, results, training
from experiments.settings.schema import Config

_EVALUATION_KEY = {"validation": 30_000, "test": 20_000}
_BLOCK = 20  # tasks adapted at a time


class Prepared(NamedTuple):
  """An arm that is ready for training and evaluation."""

  learner: sm.MetaLearner
  model: problems.Model
  problem: Problem


def prepare(algorithm: str, config: Config, problem: Problem) -> Prepared:
  """Return an arm's learner for a problem, with the inputs that the network's norm needs.

  Raises:
    ValueError: a setting is wrong, or a mini-batch has more examples than a task.
  """
  if config.arms[algorithm].get("pooled", False):
    problem = problem._replace(train=problem.train.mapped(pooled))
  if config.network.kind == "conv" and config.network.norm == "support":
    problem = support.beside(problem)
  model = problems.make_model(config, problem)
  labels = modules(model.shapes, config.arms[algorithm].modules)
  mesh = training.host_mesh(config.meta_batch)
  learner = learners.make_learner(algorithm, config, model.likelihood, labels, mesh)
  _check_batches(algorithm, config, problem)
  return Prepared(learner, model, problem)


def _check_batches(algorithm: str, config: Config, problem: Problem) -> None:
  """Raise ValueError if a mini-batch has more examples than a task to adapt to."""
  sample = functools.partial(Source.sample, start=0, count=1)
  sources = {name: getattr(problem, name) for name in ("train", "validation", "test")}
  tasks = {name: jax.eval_shape(sample, one, jax.random.key(0)) for name, one in sources.items()}
  rows = {name: jax.tree.leaves(task.train.targets)[0].shape[1] for name, task in tasks.items()}
  sizes = [(f"arms.{algorithm}.batch_size", config.arms[algorithm].batch_size, rows)]
  if sm.FAMILY[algorithm].gradient == "implicit":  # of training alone
    sizes.append(("cg_batch", config.cg_batch, {"train": rows["train"]}))
  for setting, size, limits in sizes:
    part = min(limits, key=lambda name: limits[name])
    if size > limits[part]:
      raise ValueError(
        f"{setting} is {size}, and a {part} task has {limits[part]} examples to adapt to. Change "
        f"--set={setting}; 0 takes all of them."
      )


def train(
  prepared: Prepared,
  algorithm: str,
  seed: int,
  config: Config,
  checkpoints: sm.Checkpoints | None = None,
  callbacks: Sequence[sm.Callback] = (),
) -> training.Trained:
  """Train from a seed, or continue from the last checkpoint."""
  init_key, task_key, step_key = jax.random.split(jax.random.key(seed), 3)
  source = prepared.problem.train
  return training.train(
    prepared.learner,
    prepared.model.init(init_key),
    lambda start, count: sample_tasks(source, task_key, start, count),
    config.meta_steps,
    config.meta_batch,
    f"{algorithm}-{seed}",
    callbacks,
    checkpoints,
    step_key,
  )


class Evaluation(NamedTuple):
  """The tasks of a split that an arm adapts to."""

  source: Source
  number: int  # of tasks
  rounds: int  # through a list of tasks; each task is averaged over them
  block: int  # tasks adapted at a time
  task_key: jax.Array
  step_key: jax.Array  # of the mini-batches of adaptation steps


def evaluation(config: Config, problem: Problem, split: str) -> Evaluation:
  """Return the first config.SPLIT_episodes tasks of a split; all arms and seeds have the same.

  Raises:
    ValueError: the split has fewer tasks, and the table has no `evaluation` in rounds. Intervals
      would count episodes of one task as independent.
  """
  source = {"validation": problem.validation, "test": problem.test}[split]
  count, rounds = config[f"{split}_episodes"], 1
  own = config.get("evaluation")
  if own is not None:
    if source.tasks is None:
      raise ValueError("Rounds want a finite list of tasks, and this problem draws them endlessly.")
    rounds = math.ceil(count / source.tasks)
    keys = jax.random.key(own.key), jax.random.key(own.key + 1)
    return Evaluation(source, rounds * source.tasks, rounds, own.block, *keys)
  if source.tasks is not None and count > source.tasks:
    raise ValueError(
      f"There are {source.tasks} {split} tasks ({problem.protocol.split}), and {split}_episodes is "
      f"{count}: some would count twice. Train with --set={split}_episodes={source.tasks}."
    )
  keys = jax.random.split(jax.random.key(_EVALUATION_KEY[split]))
  return Evaluation(source, count, rounds, _BLOCK, *keys)


def evaluate(
  prepared: Prepared, state: sm.MetaState, config: Config, split: str, name: str
) -> training.Adapted:
  """Adapt a trained state to the tasks of `evaluation`; the progress bar shows `name`."""
  on = evaluation(config, prepared.problem, split)
  found = training.adapt(
    prepared.learner,
    prepared.model.likelihood,
    state,
    lambda start, count: sample_tasks(on.source, on.task_key, start, count),
    on.number,
    tuple(config.adapt_steps),
    min(on.block, on.number),
    name,
    on.step_key,
  )
  if on.rounds == 1:
    return found
  by_task = lambda x: x.reshape(len(x), on.rounds, -1).mean(1)
  return found._replace(accuracy=by_task(found.accuracy), nll=by_task(found.nll))


def curve(
  prepared: Prepared,
  algorithm: str,
  seed: int,
  config: Config,
  split: str,
  trained: training.Trained,
) -> results.Curve:
  """Evaluate a trained arm and return its record."""
  found = evaluate(prepared, trained.state, config, split, f"{algorithm}-{seed}")
  return training.as_curve(prepared.learner, algorithm, seed, config.adapt_steps, trained, found)


def protocol(config: Config, problem: Problem) -> dict[str, Any]:
  """Return the description of the data and of the batch norm for results."""
  norms = {
    "batch": "statistics of the current batch (transductive)",
    "support": "statistics of the support set",
    "group": "none (group norm)",
  }
  norm = norms[config.network.norm] if config.network.kind == "conv" else "none"
  return problem.protocol._asdict() | {"batch norm": norm}


def check_processes(
  config: Config, problem: Problem, names: Sequence[str], seeds: Sequence[int]
) -> None:
  """Raise ValueError if the processes of a run differ in anything that changes its results."""
  if jax.process_count() > 1:
    sm.check_alike(
      {
        "algorithms": ", ".join(names),
        "seeds": ", ".join(map(str, seeds)),
        "config": config.to_dict(),
        "protocol": protocol(config, problem),
        "versions": files.versions(),
        "checksum of the training data": files.fingerprint(problem.train.data),
      }
    )


def frozen_below(state: sm.MetaState, threshold: float) -> sm.MetaState:
  """Return the state with every module frozen whose sigma is below the threshold."""
  freeze = lambda value: jnp.where(jnp.exp(0.5 * value) < threshold, -jnp.inf, value)
  return state._replace(log_sigma2=jax.tree.map(freeze, state.log_sigma2))
