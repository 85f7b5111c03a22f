"""Train one learner on tasks, and adapt it to unseen tasks."""

import functools
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm
from jax.experimental import multihost_utils

import shrinkmeta as sm
from experiments.datasets.source import example_weights
from experiments.runs import results

PyTree = Any
Episodes = Callable[[Any, int], sm.Task]  # (first index, number of tasks) -> tasks [T]

_STARTED = "started"  # 1.0 in the first log record of each start of the program


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
  """Return the smallest mesh on which no device has more tasks than necessary; None for one device.

  Several processes use all their devices. `sm.over_tasks` pads the tasks to a multiple of the
  number of devices.
  """
  if jax.process_count() > 1:
    return sm.task_mesh()
  share = -(-num_tasks // jax.device_count())
  count = -(-num_tasks // share)
  return None if count == 1 else sm.task_mesh(jax.devices()[:count])


def fit_to_the_end(
  learner: sm.MetaLearner, state: sm.MetaState, tasks: Episodes, steps: int, **settings: Any
) -> sm.MetaState:
  """Return what `sm.fit` returns, unless Ctrl-C ended the run before its last update.

  Args:
    learner, state, tasks, steps: as for `sm.fit`.
    settings: the keywords of `sm.fit`.

  Raises:
    KeyboardInterrupt: the run is not finished, so nothing may be stored as its result.
  """
  state = sm.fit(learner, state, tasks, steps, **settings)
  if int(state.step) < steps:
    raise KeyboardInterrupt(
      f"Training stopped after {int(state.step)} of {steps} updates, and no result was written. "
      "The same command continues from the last checkpoint, or begins again if there is none."
    )
  return state


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
  """Train with `sm.fit`; the log records of all steps become the history.

  Args:
    learner: the learner to train.
    params: the initial parameters.
    episodes: the training tasks by index.
    meta_steps: the number of updates.
    meta_batch: the number of tasks in an update.
    name: a name for the progress bar.
    callbacks: further callbacks of `sm.fit`.
    checkpoints: the folder of states and of log.jsonl; a stopped run continues from it.
    key: the key for mini-batches of inner steps.
  """
  records: list[dict[str, Any]] = []
  told = [sm.progress_bar(f"{name}: train"), _marked(sm.recorder(records)), *callbacks]
  log = None if checkpoints is None else pathlib.Path(checkpoints.folder) / "log.jsonl"
  if log is not None:
    told.append(_marked(sm.json_lines(log)))
  state = fit_to_the_end(
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
    records = sm.read_json_lines(log)  # with those of earlier starts
  return trained(state, records)


def train_base(
  likelihood: sm.Likelihood,
  params: PyTree,
  pool: sm.Batch,
  optimizer: Callable[[optax.Schedule], optax.GradientTransformation],
  folder: pathlib.Path,
  *,
  steps: int,
  rate: float,
  rows: int,
  seed: int,
  save_every: int,
) -> tuple[PyTree, list[float]]:
  """Train one network on random examples of a pool; continue from a checkpoint in `folder`.

  Args:
    likelihood: of an example.
    params: the parameters at the start.
    pool: NumPy arrays [N, ...].
    optimizer: makes the optimiser from a learning rate that rises to `rate` and then falls by a
      cosine.
    folder: the folder of the log and the checkpoints.
    steps: the number of steps.
    rate: the largest learning rate.
    rows: the number of examples of a step, which is even.
    seed: fixes the examples of every step.
    save_every: the number of steps between two checkpoints.

  Returns:
    (parameters, the losses of all steps in nats per example).

  Raises:
    KeyboardInterrupt: Ctrl-C ended the training.
    ValueError: `rows` is not even.
  """
  if rows < 2 or rows % 2:
    raise ValueError(f"A step of the base wants an even number of examples; got {rows}.")
  half = rows // 2

  def tasks(first: int, count: int) -> sm.Task:
    """One task a step: any examples, half of them as train and half as val."""
    draw = lambda i: np.random.default_rng((seed, 3, i)).choice(len(pool.inputs), 2 * half)
    drawn = np.stack([draw(i) for i in range(first, first + count)])
    part = lambda at: jax.tree.map(lambda x: jnp.asarray(x[at]), pool)
    return sm.Task(part(drawn[:, :half]), part(drawn[:, half:]))

  schedule = optax.warmup_cosine_decay_schedule(0.0, rate, max(1, steps // 20), steps, 0.02 * rate)
  labels = jax.tree.map(lambda _: "network", params)
  learner = sm.no_adaptation(likelihood, labels, phi_optimizer=optimizer(schedule))
  log = folder / "log.jsonl"
  state = fit_to_the_end(
    learner,
    learner.init(params),
    tasks,
    steps,
    meta_batch=1,
    callbacks=(sm.json_lines(log),),
    checkpoints=sm.Checkpoints(folder / "states", every=save_every, keep=2),
  )
  return state.phi, [record["phi_loss"] for record in sm.read_json_lines(log)]


def thinned(values: Sequence[float], count: int = 50) -> list[list[float]]:
  """Return [last step, mean] of at most `count` equal parts of a series."""
  parts = np.array_split(np.arange(len(values)), min(count, len(values)))
  return [[int(p[-1]) + 1, float(np.mean(np.asarray(values)[p]))] for p in parts]


def _marked(callback: sm.Callback) -> sm.Callback:
  """Mark the first record after each start for `callback`; that step waited for compilation."""
  first: list[int] = []

  def begin(step: int, steps: int) -> None:
    first[:] = [step]
    callback.begin(step, steps)

  def record(step: int, values: Mapping[str, float]) -> None:
    callback.record(step, {**values, _STARTED: 1.0} if step in first else values)

  return sm.Callback(begin, record, callback.end)


def trained(state: sm.MetaState, records: Sequence[Mapping[str, Any]]) -> Trained:
  """Return a state with its log records; seconds of steps that compiled are summed separately."""
  names = [name for name in (records[0] if records else ()) if name != _STARTED]
  history = {name: [float(one[name]) for one in records] for name in names}
  seconds = {"compile": 0.0, "train": 0.0}
  for one in records:
    seconds["compile" if _STARTED in one else "train"] += float(one["seconds"])
  return Trained(state, history, seconds)


def as_curve(
  learner: sm.MetaLearner, name: str, seed: int, steps: Sequence[int], run: Trained, found: Adapted
) -> results.Curve:
  """Return the record of an algorithm trained from a seed and adapted for `steps`."""
  modules = sm.module_summary(learner.labels, run.state.phi, run.state.log_sigma2)
  return results.Curve(
    algorithm=name,
    seed=seed,
    steps=np.asarray(steps),
    accuracy=found.accuracy,
    nll=found.nll,
    sigma={module.name: module.sigma for module in modules},
    moved=found.moved,
    sizes={module.name: module.size for module in modules},
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
  """Adapt to each episode, and evaluate on its val part after each number of steps in `steps`.

  The seconds include compilation.

  Args:
    learner: the learner that adapts.
    likelihood: the likelihood of the network.
    state: the trained state.
    episodes: the tasks by index.
    num_episodes: E, the number of episodes.
    steps: [S], ascending numbers of steps.
    block: the number of episodes that are adapted at once.
    name: a name for the progress bar.
    key: the key for mini-batches of inner steps; it is folded with the number of the episode.
  """
  begin = time.perf_counter()
  starts = range(0, num_episodes, block)
  mesh = host_mesh(block)
  offset, mine, share = sm.share_of_tasks(block, mesh)
  state, key = sm.place_state((state, key), mesh)
  run = _adapting(learner.adapt, likelihood, tuple(steps), mesh)
  blocks = []
  quiet = jax.process_index() != 0
  for start in tqdm.tqdm(starts, f"{name}: adapt", unit="block", dynamic_ncols=True, disable=quiet):
    tasks = episodes(start + (offset if mine else 0), max(1, mine))
    found = run(state, sm.place_tasks(tasks, mesh, share, mine), start, key)
    if jax.process_count() > 1:
      found = multihost_utils.process_allgather(found, tiled=True)
    blocks.append(jax.tree.map(lambda x: x[:block], jax.device_get(found)))
  accuracy, nll, square = jax.tree.map(lambda *x: np.concatenate(x)[:num_episodes], *blocks)
  sizes = _sum_by_module(jax.tree.map(jnp.size, state.phi), learner.labels)
  total = jax.tree.map(lambda s, p: p.size * s.mean(), square, state.phi)
  total = _sum_by_module(total, learner.labels)
  moved = {m: float(np.sqrt(total[m] / sizes[m])) for m in sizes}
  return Adapted(accuracy.T, nll.T, moved, {"adapt": time.perf_counter() - begin})


@functools.lru_cache(maxsize=4)
def _adapting(
  adapt: Callable[..., tuple[PyTree, sm.InnerInfo]],
  likelihood: sm.Likelihood,
  steps: tuple[int, ...],
  mesh: jax.sharding.Mesh | None,
) -> Callable[..., Any]:
  """Build the program of `adapt`, which the seeds of an algorithm share.

  It maps (state, tasks, number of the first task, key) to (accuracy [T, S], nll [T, S], the mean
  squared move of every parameter after the last step).
  """

  @jax.jit
  def run(state: sm.MetaState, tasks: sm.Task, start: jax.typing.ArrayLike, key: Any) -> Any:
    def one(shared: tuple[sm.MetaState, Any], item: tuple[sm.Task, jax.Array]) -> Any:
      (state, key), (task, number) = shared, item
      own = None if key is None else jax.random.fold_in(key, number)
      thetas, _ = adapt(state, task.train, steps, own)

      def judge(theta: PyTree) -> tuple[jax.Array, jax.Array]:
        outputs, targets = likelihood.predict(theta, task.val.inputs), task.val.targets
        judged = example_weights(task.val, outputs.dtype)
        mean = lambda x: jnp.sum(jnp.where(judged > 0, x, 0) * judged) / jnp.sum(judged)
        nll = -mean(likelihood.log_prob(outputs, targets))
        if not jnp.issubdtype(targets.dtype, jnp.integer):
          return jnp.full_like(nll, jnp.nan), nll
        return mean(jnp.argmax(outputs, -1) == targets), nll

      accuracy, nll = jax.lax.map(judge, thetas)  # one after another: a CPU is faster so
      last = jax.tree.map(lambda x, p: jnp.mean(jnp.square(x[-1] - p)), thetas, state.phi)
      return (), (accuracy, nll, last)

    numbers = start + jnp.arange(len(jax.tree.leaves(tasks)[0]))
    return sm.over_tasks(one, (state, key), (tasks, numbers), mesh=mesh)[1]

  return run


def _sum_by_module(numbers: PyTree, labels: sm.Labels) -> dict[str, Any]:
  """Return the sum over each module's leaves, for a tree with one number for each leaf."""
  total: dict[str, Any] = {}
  for label, number in zip(jax.tree.leaves(labels), jax.tree.leaves(numbers), strict=True):
    total[label] = total[label] + number if label in total else number
  return dict(sorted(total.items()))
