"""Trains one learner on tasks, and adapts it to unseen ones."""

import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from jax.experimental import multihost_utils

import shrinkmeta as sm
from experiments.runs import results
from shrinkmeta.model.modules import gather
from shrinkmeta.model.tasks import weights

PyTree = Any
Episodes = Callable[[Any, int], sm.Task]  # (first index, number of tasks) -> tasks [T]

_STARTED = "started"  # 1.0 in those rows of a log that a start of the program wrote first


class Trained(NamedTuple):
  """A trained state with its history."""

  state: sm.MetaState
  history: dict[str, list[float]]
  seconds: dict[str, float]


class Adapted(NamedTuple):
  """E test episodes at S adaptation steps."""

  accuracy: np.ndarray  # [S, E] nan in regression
  nll: np.ndarray  # [S, E] nats an example
  moved: dict[str, float]  # module -> rms(theta - phi) after the last step
  seconds: dict[str, float]


def host_mesh(num_tasks: int) -> jax.sharding.Mesh | None:
  """As many devices as shorten the longest share of the tasks; None where that is one.

  Of several processes all devices. What they do not divide is filled up: see `sm.over_tasks`.
  """
  if jax.process_count() > 1:
    return sm.task_mesh()
  share = -(-num_tasks // jax.device_count())
  count = -(-num_tasks // share)
  return None if count == 1 else sm.task_mesh(jax.devices()[:count])


def train(
  learner: sm.MetaLearner,
  params: PyTree,
  episodes: Episodes,
  meta_steps: int,
  meta_batch: int,
  name: str,
  callbacks: Sequence[sm.Callback] = (),
  checkpoints: sm.Checkpoints | None = None,
  key: jax.Array | None = None,
) -> Trained:
  """`sm.fit`, with the rows of all steps as a history.

  Args:
    checkpoints: where the run keeps its states and, in log.jsonl, its rows, and goes on from.
    key: of the mini-batches of inner steps, where there are any.
  """
  rows: list[dict[str, Any]] = []
  told = [sm.progress_bar(f"{name}: train"), _marked(sm.recorder(rows)), *callbacks]
  log = None if checkpoints is None else pathlib.Path(checkpoints.folder) / "log.jsonl"
  if log is not None:
    told.append(_marked(sm.json_lines(log)))
  state = sm.fit(
    learner,
    learner.init(params),
    episodes,
    meta_steps,
    meta_batch=meta_batch,
    key=key,
    callbacks=told,
    checkpoints=checkpoints,
  )
  if log is not None and jax.process_index() == 0:
    rows = sm.read_json_lines(log)  # with those of earlier starts
  return trained(state, rows)


def _marked(callback: sm.Callback) -> sm.Callback:
  """`callback`, told in the first row of each start that it is one: it waited for compilation."""
  first: list[int] = []

  def begin(step: int, steps: int) -> None:
    first[:] = [step]
    callback.begin(step, steps)

  def record(step: int, row: Mapping[str, float]) -> None:
    callback.record(step, {**row, _STARTED: 1.0} if step in first else row)

  return sm.Callback(begin, record, callback.end)


def trained(state: sm.MetaState, rows: Sequence[Mapping[str, Any]]) -> Trained:
  """A state with the rows of its log, of which those that waited for compilation are told apart."""
  names = [name for name in (rows[0] if rows else ()) if name != _STARTED]
  history = {name: [float(row[name]) for row in rows] for name in names}
  seconds = {"compile": 0.0, "train": 0.0}
  for row in rows:
    seconds["compile" if _STARTED in row else "train"] += float(row["seconds"])
  return Trained(state, history, seconds)


def as_curve(
  learner: sm.MetaLearner, name: str, seed: int, steps: Sequence[int], run: Trained, found: Adapted
) -> results.Curve:
  """The record of an algorithm trained from a seed and adapted for `steps`."""
  modules = sm.module_summary(learner.labels, run.state.phi, run.state.log_sigma2)
  return results.Curve(
    algorithm=name,
    seed=seed,
    steps=np.asarray(steps),
    accuracy=found.accuracy,
    nll=found.nll,
    sigma={row.name: row.sigma for row in modules},
    moved=found.moved,
    sizes={row.name: row.size for row in modules},
    seconds=run.seconds | found.seconds,
    history=run.history,
  )


def adapt(
  learner: sm.MetaLearner,
  likelihood: sm.Likelihood,
  state: sm.MetaState,
  episodes: Episodes,
  num_episodes: int,
  steps: tuple[int, ...],
  block: int,
  name: str,
  key: jax.Array | None = None,
) -> Adapted:
  """One run of adaptation an episode, judged on its val part at each of `steps`.

  Its seconds are those of compilation too.

  Args:
    key: folded with an episode's number, of the mini-batches of its steps.
  """

  def one(state: sm.MetaState, item: tuple[sm.Task, jax.Array]) -> tuple[tuple[()], Any]:
    task, number = item
    own = None if key is None else jax.random.fold_in(key, number)
    thetas, _ = learner.adapt(state, task.train, steps, own)

    def judge(theta: PyTree) -> tuple[jax.Array, jax.Array]:
      outputs, targets = likelihood.predict(theta, task.val.inputs), task.val.targets
      judged = weights(task.val, outputs.dtype)
      mean = lambda x: jnp.sum(jnp.where(judged > 0, x, 0) * judged) / jnp.sum(judged)
      nll = -mean(likelihood.log_prob(outputs, targets))
      if not jnp.issubdtype(targets.dtype, jnp.integer):
        return jnp.full_like(nll, jnp.nan), nll
      return mean(jnp.argmax(outputs, -1) == targets), nll

    accuracy, nll = jax.lax.map(judge, thetas)  # in sequence: see batching.py on CPUs
    last = jax.tree.map(lambda x, p: jnp.mean(jnp.square(x[-1] - p)), thetas, state.phi)
    return (), (accuracy, nll, last)

  begin = time.perf_counter()
  starts = range(0, num_episodes, block)
  mesh = host_mesh(block)
  offset, mine, share = sm.share_of_tasks(block, mesh)
  state = sm.place_state(state, mesh)

  @jax.jit
  def run(state: sm.MetaState, tasks: sm.Task, start: jax.typing.ArrayLike) -> Any:
    numbers = start + jnp.arange(len(jax.tree.leaves(tasks)[0]))
    return sm.over_tasks(one, state, (tasks, numbers), mesh=mesh)[1]

  blocks = []
  quiet = jax.process_index() != 0
  for start in tqdm.tqdm(starts, f"{name}: adapt", unit="block", dynamic_ncols=True, disable=quiet):
    tasks = episodes(start + (offset if mine else 0), max(1, mine))
    found = run(state, sm.place_tasks(tasks, mesh, share, mine), start)
    if jax.process_count() > 1:
      found = multihost_utils.process_allgather(found, tiled=True)
    blocks.append(jax.tree.map(lambda x: x[:block], jax.device_get(found)))
  accuracy, nll, square = jax.tree.map(lambda *x: np.concatenate(x)[:num_episodes], *blocks)
  sizes = gather(jax.tree.map(jnp.size, state.phi), learner.labels)
  total = jax.tree.map(lambda s, p: p.size * s.mean(), square, state.phi)
  total = gather(total, learner.labels)
  moved = {m: float(np.sqrt(total[m] / sizes[m])) for m in sizes}
  return Adapted(accuracy.T, nll.T, moved, {"adapt": time.perf_counter() - begin})
