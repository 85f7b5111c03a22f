"""The training loop, the same on a laptop and on a pod.

Update i sees the tasks i * meta_batch to (i + 1) * meta_batch - 1 of the source, for any number of
devices and processes; each process asks the source for its own share. A run that was stopped
continues from its last checkpoint. On the same devices it ends with the same bits.
"""

import contextlib
import signal
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import PartitionSpec

from shrinkmeta.base import MetaLearner, MetaState, check_learner, check_state
from shrinkmeta.checks import scalars, validate
from shrinkmeta.checks.paths import local_path
from shrinkmeta.data.source import source
from shrinkmeta.devices.placement import Rules, place_state
from shrinkmeta.model.tasks import Batch, Task
from shrinkmeta.training.callbacks import Callback
from shrinkmeta.training.checkpoints import Checkpoints, Store, opened
from shrinkmeta.training.programs import Source, Update, build_update
from shrinkmeta.training.records import Reporter, reporting
from shrinkmeta.training.stopping import Watchdog, stop_signals

PyTree = Any
Evaluate = Callable[[MetaState], Mapping[str, Any]]  # state -> {name: a number}


def fit(
  learner: MetaLearner,
  state: MetaState,
  tasks: Source | Sequence[Task] | Task,
  steps: int,
  *,
  meta_batch: int,
  micro_batches: int = 1,
  key: jax.Array | None = None,
  evaluate: Evaluate | None = None,
  evaluate_every: int = 0,
  best: str | None = None,
  callbacks: Sequence[Callback] = (),
  checkpoints: Checkpoints | None = None,
  rules: Rules | None = None,
  stall_seconds: float | None = None,
) -> MetaState:
  """Update the state until `state.step` is `steps`.

  The log record of an update holds the loss and other means over the tasks that did not fail, sigma
  of every module, the number of failed tasks, the seconds, and the share of inner loops that
  converged. Failed tasks and unconverged loops are warned of.

  Ctrl-C ends the run after the update under way: the state is saved, if there are `checkpoints`,
  and returned, for another `fit` to continue from. A second Ctrl-C interrupts at once.

  Args:
    learner: the learner.
    state: a state of `learner.init(params)`, or any later one. It is copied, never donated; its
      constants are neither. With `checkpoints`, the newest state in the folder replaces it.
    tasks: tasks(first, count) returns the tasks first to first + count - 1, leaves [count, N, ...].
      It must return the same tasks for the same numbers. If learner.spec.mesh does not divide the
      tasks evenly, padding tasks are added, which count as 0. A list of Tasks, or a Task with
      leaves [K, N, ...], is drawn from in a new order each epoch: see `shrinkmeta.source`.
    steps: the number of updates, those of earlier runs included.
    meta_batch: the number of tasks per update.
    micro_batches: the number of parts in which the tasks of an update are drawn, placed and run,
      one after another, if they do not fit into memory at once. It divides `meta_batch`.
    key: folded with the step, for a learner that draws (a batch_size, a stochastic log_det).
    evaluate: evaluate(state) returns {name: number}, in every process. The numbers join the log
      record as "eval/<name>". The next update overwrites the state's arrays: copy what you keep.
    evaluate_every: the number of updates between two evaluations.
    best: a name that `evaluate` returns. The state with the smallest value is kept, for
      `restore(checkpoints, learner, state, "best")`.
    callbacks: called with the log record of every step, in process 0.
    checkpoints: where states are kept, or None.
    rules: how large leaves are cut over the mesh's axis "model": see `place_state`.
    stall_seconds: the longest time for an update, in seconds, compilation apart. A longer one ends
      the process with exit code 1 and the tracebacks of all threads.

  Returns:
    The state after the last update.

  Raises:
    TypeError, ValueError: an argument is wrong; the message names it.
    FloatingPointError: every task of an update failed, or its gradient is not finite.
    MemoryError: an update needs more memory than the device has, by XLA's analysis.
    SystemExit: with code 143 on SIGTERM, after the state is saved.

  Example:
    >>> import shrinkmeta as sm
    >>> learner = sm.reptile(sm.gaussian(lambda theta, x: x * theta["w"]), {"w": "w"})
    >>> batch = lambda count: sm.Batch(jnp.ones((count, 4)), jnp.ones((count, 4)))
    >>> tasks = lambda first, count: sm.Task(batch(count), None)
    >>> int(sm.fit(learner, learner.init({"w": 0.0}), tasks, 2, meta_batch=3).step)
    2
  """
  steps = validate.integer("steps", steps, 0)
  meta_batch = validate.integer("meta_batch", meta_batch, 1)
  micro_batches = validate.integer("micro_batches", micro_batches, 1)
  evaluation = _Evaluation(evaluate, validate.integer("evaluate_every", evaluate_every, 0), best)
  _check_types(learner, state, tasks, key, callbacks, checkpoints, rules, stall_seconds)
  _check_parts(learner, meta_batch, micro_batches)
  _check_evaluation(evaluation, checkpoints)
  with contextlib.ExitStack() as stack:
    state = place_state(_copied(state), learner.spec.mesh, rules)
    store = None
    if checkpoints is not None:
      store = stack.enter_context(opened(checkpoints, learner, meta_batch))
      state = store.restore(state) or state
    saving = _Saving(store, 0 if checkpoints is None else checkpoints.every)
    first = _first_step(state, steps)
    reporter = stack.enter_context(reporting(learner, callbacks, first, steps, meta_batch))
    stopped = stack.enter_context(stop_signals())
    watchdog = Watchdog(stall_seconds)
    stack.callback(watchdog.stop)
    options = (meta_batch, micro_batches, key, watchdog)
    update = build_update(learner, state, _source(tasks, key), *options)
    return _loop(state, steps, update, evaluation, saving, reporter, stopped, watchdog)


class _Evaluation(NamedTuple):
  """What `fit` evaluates, and how often."""

  function: Evaluate | None
  every: int  # updates
  best: str | None

  def due(self, done: int) -> bool:
    """Whether the state after `done` updates is evaluated."""
    return self.function is not None and done % self.every == 0

  def __call__(self, state: MetaState) -> dict[str, float]:
    """The numbers {"eval/<name>": float}, and an error if they are none or lack the best."""
    assert self.function is not None
    found = self.function(state)
    validate.instance("evaluate(state)", found, Mapping, "a dict {name: number}")
    extra = {}
    for name, value in found.items():
      try:
        extra[f"eval/{name}"] = _number(value)
      except TypeError as error:
        raise TypeError(f"evaluate(state)[{name!r}] must be a number; got {value!r}.") from error
    if self.best is not None and f"eval/{self.best}" not in extra:
      raise ValueError(f"best is {self.best!r}, but evaluate gives {sorted(extra)}.")
    return extra


def _number(value: Any) -> float:
  """A number of Python, NumPy or JAX as a float; TypeError for text and for arrays with axes."""
  if isinstance(value, (str, bytes)) or np.ndim(value) != 0:
    raise TypeError(f"{type(value).__name__} is no number")
  return float(value)


class _Saving(NamedTuple):
  """Where `fit` saves states, and how often."""

  store: Store | None
  every: int  # updates

  def scheduled(self, done: int) -> bool:
    """Whether the state after `done` updates is saved in any case."""
    return self.store is not None and done % self.every == 0

  def due(self, done: int, value: float | None) -> bool:
    """Whether the state after `done` updates, evaluated as `value`, is saved."""
    if self.store is None or value is None or self.scheduled(done):
      return self.scheduled(done)
    best = self.store.best()
    return best is None or value < best[1]


def _loop(
  state: MetaState,
  steps: int,
  update: Update,
  evaluation: _Evaluation,
  saving: _Saving,
  reporter: Reporter,
  stopped: Callable[[int], int | None],
  watchdog: Watchdog,
) -> MetaState:
  """Run the updates from `state.step` to `steps`."""
  on_cpu, first = jax.default_backend() == "cpu", int(state.step)
  for step in range(first, steps):
    done = step + 1
    if step > first:
      watchdog.start()
    state, record = update(state, step)
    reporter.flush()  # the record of the last step: an accelerator is busy with this one by now
    reporter.hold(step, record)
    evaluates = evaluation.due(done)
    # On a CPU two programs with a collective must not run at once: the host devices share one
    # thread pool and could wait for each other (docs/hazards.md#host-device-collectives). On an
    # accelerator the work below would wait for the update without a watchdog.
    if on_cpu or evaluates or saving.scheduled(done) or done == steps:
      jax.block_until_ready(record)
    watchdog.stop()
    extra = evaluation(state) if evaluates else {}
    if on_cpu or extra:
      reporter.flush(extra)
    stop, value = stopped(done), extra.get(f"eval/{evaluation.best}")
    due, last = saving.due(done, value), done == steps or stop is not None
    if last or due:  # report a step before it is saved
      reporter.flush()
    if saving.store is not None:
      if due or last:
        saving.store.save(state, value)
      if last:
        saving.store.finish()  # still inside `stop_signals`, so that a signal waits for it
    if stop is not None:
      name = signal.Signals(stop).name
      logging.warning("%s: stopped after step %d (%d of %d done).", name, step, done, steps)
      if stop == signal.SIGTERM:
        raise SystemExit(128 + signal.SIGTERM)
      break
  return state


def _first_step(state: MetaState, steps: int) -> int:
  """The step that a run to `steps` begins at; ValueError if the state is past it."""
  if (first := int(state.step)) > steps:
    raise ValueError(f"steps is {steps}, but the state is already that of step {first}.")
  return first


def _copied(state: MetaState) -> MetaState:
  """The state, copied except for its constants."""
  # Updates donate the state; the caller keeps their arrays (docs/hazards.md#donated-twice).
  copy = lambda x: x.copy() if isinstance(x, jax.Array) else jnp.array(x, jnp.result_type(x))
  constants = jax.tree.map(jnp.asarray, state.constants)
  return jax.tree.map(copy, state._replace(constants=None))._replace(constants=constants)


def _check_types(
  learner: Any,
  state: Any,
  tasks: Any,
  key: Any,
  callbacks: Any,
  checkpoints: Any,
  rules: Any,
  stall_seconds: Any,
) -> None:
  """Raise TypeError or ValueError if an argument of `fit` is not what its name says."""
  check_learner("learner", learner)
  check_state("state", state)
  if not isinstance(tasks, (Task, list, tuple)):
    wanted = "(first, count) -> shrinkmeta.Task of `count` tasks"
    validate.function("tasks", tasks, wanted, "A list of Tasks, or a Task, serves too.")
  elif not isinstance(tasks, Task) and any(isinstance(task, Batch) for task in tasks):
    raise TypeError(
      "tasks must be a list of Tasks; got Batches. Split them: tasks=shrinkmeta.source(batches, "
      "rows=(examples of train, examples of val), key=jax.random.key(0))."
    )
  scalars.key("key", key)
  many = "a sequence of shrinkmeta.Callback, such as [shrinkmeta.recorder(records)]"
  if isinstance(callbacks, Callback):  # itself a tuple, of three functions
    raise TypeError(f"callbacks must be {many}; got one Callback: put it into a list.")
  validate.instance("callbacks", callbacks, Sequence, many)
  for i, callback in enumerate(callbacks):
    validate.instance(
      f"callbacks[{i}]", callback, Callback, "a shrinkmeta.Callback(begin, record, end)"
    )
  if checkpoints is not None:
    wanted = "a shrinkmeta.Checkpoints(folder), or None"
    validate.instance("checkpoints", checkpoints, Checkpoints, wanted)
    local_path("Checkpoints.folder", checkpoints.folder)
  validate.instance("rules", rules, (Mapping, type(None)), "a dict {regex: PartitionSpec}, or None")
  for name, spec in (rules or {}).items():
    validate.instance(f"rules, key {name!r}", name, str, "a regular expression")
    validate.instance(f"rules[{name!r}]", spec, PartitionSpec, "a jax.sharding.PartitionSpec")
  if stall_seconds is not None:
    if not scalars.number("stall_seconds", stall_seconds) > 0:
      raise ValueError(f"stall_seconds must be positive, or None; got {stall_seconds!r}.")


def _source(tasks: Source | Sequence[Task] | Task, key: jax.Array | None) -> Source:
  """The tasks as a function (first, count) -> Task."""
  if not isinstance(tasks, (Task, list, tuple)):
    return cast(Source, tasks)
  key = jax.random.key(0) if key is None else key
  # Updates fold their number into the key, and none is as large as this one.
  return source(cast(Any, tasks), key=jax.random.fold_in(key, 2**32 - 1))


def _check_parts(learner: MetaLearner, meta_batch: int, micro_batches: int) -> None:
  """Raise ValueError if the learner's update cannot run in `micro_batches` parts."""
  if meta_batch % micro_batches:
    raise ValueError(
      f"micro_batches must divide meta_batch; got micro_batches={micro_batches} and "
      f"meta_batch={meta_batch}."
    )
  if micro_batches > 1 and learner.spec.sees_all_tasks:
    raise ValueError(
      'sigma_gradient="joint" and restricted join all tasks of an update in one term: '
      f"micro_batches must be 1; got {micro_batches}."
    )


def _check_evaluation(evaluation: _Evaluation, checkpoints: Checkpoints | None) -> None:
  """Raise TypeError or ValueError if evaluate, evaluate_every and best do not fit together."""
  evaluate, every, best = evaluation
  if evaluate is not None:
    validate.function("evaluate", evaluate, "state -> {name: number}, or None")
  validate.instance("best", best, (str, type(None)), "a name that evaluate returns, or None")
  if (evaluate is None) != (every == 0):
    raise ValueError(
      "evaluate and evaluate_every (a number of updates) go together; got "
      f"evaluate={evaluate}, evaluate_every={every}."
    )
  if best is not None and evaluate is None:
    raise ValueError(f"best={best!r} names a number of evaluate, and there is no evaluate.")
  if best is not None and checkpoints is None:
    raise ValueError(f"best={best!r} keeps a state among checkpoints: pass checkpoints= too.")
