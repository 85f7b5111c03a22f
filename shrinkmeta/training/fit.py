"""The training loop, which runs unchanged on a laptop and on a pod.

Update i sees the tasks i * meta_batch to (i + 1) * meta_batch - 1 of the source, for any number of
devices and processes. Each process asks the source for its own share. A run that was stopped
continues from its last checkpoint. On the same devices it then ends with the same bits as a run
that was not stopped.
"""

import contextlib
import math
import signal
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from absl import logging
from jax.sharding import PartitionSpec

from shrinkmeta.base import MetaLearner, MetaState, check_learner, check_state
from shrinkmeta.checks import scalars, validate
from shrinkmeta.checks.paths import local_path
from shrinkmeta.data.source import source
from shrinkmeta.devices.placement import Rules, place_state
from shrinkmeta.devices.processes import check_alike, check_shared
from shrinkmeta.learner.statistics import Statistics
from shrinkmeta.mode.frozen import check_own
from shrinkmeta.model.tasks import Batch, Task
from shrinkmeta.training.callbacks import Callback
from shrinkmeta.training.checkpoint_format import describe, fingerprints, versions
from shrinkmeta.training.checkpoints import Checkpoints, Store, opened
from shrinkmeta.training.programs import Source, Update, build_update
from shrinkmeta.training.records import Evaluate, Evaluation, Reporter, reporting
from shrinkmeta.training.states.resume import run_settings
from shrinkmeta.training.stopping import Watchdog, stop_signals

PyTree = Any


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
  refresh: Statistics | None = None,
  stall_seconds: float | None = None,
) -> MetaState:
  """Update the state until `state.step` is `steps`.

  The log record of an update holds the loss and other means over the tasks that did not fail, sigma
  of every module, the number of failed tasks, the share of converged inner loops, and the seconds
  with compilation and evaluations. `fit` warns once if tasks fail, and once if few inner loops of
  implicit gradients converge. Without `refresh`, calls with one learner and shape compile once.

  Ctrl-C ends the run after the current update. `fit` then saves the state, if there are
  `checkpoints`, and returns it, with `state.step` < `steps`. A second Ctrl-C stops at once.

  Args:
    learner: the learner.
    state: a state of `learner.init(params)`, or any later one. `fit` copies it, except for its
      constants, and donates none of it. With `checkpoints`, the newest saved state replaces it.
    tasks: tasks(first, count) returns the tasks first to first + count - 1, leaves [count, N, ...].
      Task i must be the same at every call. Or a list of Tasks, or a Task with leaves [K, N, ...]:
      see `sm.source`. If devices cannot share tasks evenly, `fit` adds padding, which counts as 0.
    steps: the number of updates of all runs together, earlier runs included.
    meta_batch: the number of tasks per update.
    micro_batches: the number of parts into which the tasks of an update are split; it divides
      `meta_batch`. The parts run one after another, so only one of them must fit into memory.
    key: a random key, needed if the learner draws. Each update folds its step into the key.
    evaluate: evaluate(state) returns {name: number}, the same in every process. The log record has
      them as "eval/<name>". The next update overwrites the state's arrays: copy what you keep.
    evaluate_every: the number of updates between two evaluations.
    best: a name that `evaluate` returns. `sm.restore(..., "best")` reads the state at its minimum.
    callbacks: process 0 calls them with the log record of every step.
    checkpoints: where and how often to save states, or None.
    rules: the rules that cut leaves along the axis "model" of the mesh: see `place_state`.
    refresh: (phi, inputs, constants) -> the constants that change, such as running averages, called
      after every update: see `learner.refresh`. It needs Checkpoints(constants=True).
    stall_seconds: the time limit of an update, in seconds. The first update and compilation do not
      count. A longer update ends the process with exit code 1 and the tracebacks of all threads.

  Returns:
    The state after the last update.

  Raises:
    TypeError, ValueError: an argument is wrong. The message names it.
    FloatingPointError: every task of an update failed, or its gradient is not finite.
    MemoryError: an update needs more memory than the device has, by XLA's analysis.
    RuntimeError: another process could not draw its first tasks; the message has its error.
    SystemExit: SIGTERM ended the run, after the state was saved. The exit code is 143.

  Example:
    >>> import shrinkmeta as sm
    >>> learner = sm.reptile(sm.gaussian(lambda theta, x: x * theta["w"]), {"w": "w"})
    >>> tasks = lambda first, n: sm.Task(sm.Batch(jnp.ones((n, 4)), jnp.ones((n, 4))), None)
    >>> int(sm.fit(learner, learner.init({"w": 0.0}), tasks, 2, meta_batch=3).step)
    2
  """
  steps = validate.integer("steps", steps, 0)
  meta_batch = validate.integer("meta_batch", meta_batch, 1)
  micro_batches = validate.integer("micro_batches", micro_batches, 1)
  evaluation = Evaluation(evaluate, validate.integer("evaluate_every", evaluate_every, 0), best)
  _check_types(learner, state, tasks, key, callbacks, checkpoints, rules, stall_seconds)
  _check_parts(learner, meta_batch, micro_batches)
  _check_evaluation(evaluation, checkpoints)
  _check_refresh(refresh, state, micro_batches, checkpoints)
  _check_processes(learner, state, checkpoints, steps, meta_batch, micro_batches, evaluation)
  with contextlib.ExitStack() as stack:
    state, saving = place_state(_copied(state), learner.spec.mesh, rules), _Saving(None, 0)
    if checkpoints is not None:
      store = stack.enter_context(opened(checkpoints, learner, meta_batch))
      state, saving = store.restore(state, steps) or state, _Saving(store, checkpoints.every)
    first = _first_step(state, steps)
    reporter = stack.enter_context(reporting(learner, callbacks, first, steps, meta_batch))
    stopped = stack.enter_context(stop_signals())
    stack.callback((watchdog := Watchdog(stall_seconds)).stop)
    options = (meta_batch, micro_batches, key, watchdog, refresh)
    update = build_update(learner, state, _source(tasks, key), *options)
    return _loop(state, steps, update, evaluation, saving, reporter, stopped, watchdog)


class _Saving(NamedTuple):
  """The store in which `fit` saves states, and how often it does."""

  store: Store | None
  every: int  # updates

  def scheduled(self, done: int) -> bool:
    """Return whether the state after `done` updates is saved on schedule."""
    return self.store is not None and done % self.every == 0

  def due(self, done: int, value: float | None) -> bool:
    """Return whether to save the state after `done` updates: on schedule, or if it is the best."""
    if self.store is None or value is None or self.scheduled(done):
      return self.scheduled(done)
    best = self.store.best()
    return math.isfinite(value) and (best is None or value < best[1])


def _loop(
  state: MetaState,
  steps: int,
  update: Update,
  evaluation: Evaluation,
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
    reporter.flush()  # read the last step's record while an accelerator computes this step
    reporter.hold(step, record)
    evaluates = evaluation.due(done)
    # On a CPU two programs with a collective must not run at once: the host devices share one
    # thread pool and could wait for each other (docs/hazards.md#host-device-collectives). On an
    # accelerator the work below needs the new state. Wait for it here, while the watchdog counts.
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
        saving.store.finish()  # inside `stop_signals`, so that a signal does not cut it short
    if stop is not None:
      name = signal.Signals(stop).name
      saved = "" if saving.store is None else f", saved as {done}"
      logging.warning("%s: stopped; %d of %d updates done%s.", name, done, steps, saved)
      if stop == signal.SIGTERM:
        raise SystemExit(128 + signal.SIGTERM)
      break
  return state


def _first_step(state: MetaState, steps: int) -> int:
  """Return the first step of the run; raise ValueError if the state is past `steps`."""
  if (first := int(state.step)) > steps:
    raise ValueError(
      f"steps is {steps}, but the state is already that of step {first}. steps counts all runs "
      f"together: for {steps} more pass steps={first + steps}."
    )
  return first


def _copied(state: MetaState) -> MetaState:
  """Copy the state, except for its constants."""
  # An update deletes the arrays of its state. The copy keeps the caller's arrays alive
  # (docs/hazards.md#donated-twice).
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
  """Raise TypeError or ValueError if an argument of `fit` has a wrong type or value."""
  check_learner("learner", learner)
  check_state("state", state)
  check_own(learner.spec, state.log_sigma2)
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
  if isinstance(callbacks, Callback):  # a Callback is a tuple too, of three functions
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
    scalars.regex("a key of rules", name)
    validate.instance(f"rules[{name!r}]", spec, PartitionSpec, "a jax.sharding.PartitionSpec")
  if stall_seconds is not None:
    if not scalars.number("stall_seconds", stall_seconds) > 0:
      raise ValueError(f"stall_seconds must be positive, or None; got {stall_seconds!r}.")


def _source(tasks: Source | Sequence[Task] | Task, key: jax.Array | None) -> Source:
  """Return the tasks as a function (first, count) -> Task."""
  if not isinstance(tasks, (Task, list, tuple)):
    return cast(Source, tasks)
  key = jax.random.key(0) if key is None else key
  # Updates fold their step into the key. This number is above every step, so the draws differ.
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


def _check_processes(
  learner: MetaLearner,
  state: MetaState,
  checkpoints: Checkpoints | None,
  steps: int,
  meta_batch: int,
  micro_batches: int,
  evaluation: Evaluation,
) -> None:
  """Raise ValueError if the processes of this run differ, or do not share the folder of states."""
  if jax.process_count() == 1:
    return
  settings = {} if checkpoints is None else checkpoints.settings
  arrays = jax.tree.map(jnp.asarray, state)
  local = all(x.is_fully_addressable for x in jax.tree.leaves(arrays))
  prints = {name: int(x) for name, x in jax.jit(fingerprints)(arrays).items()} if local else {}
  check_alike(
    describe(learner, arrays, settings, meta_batch)
    | run_settings(learner)
    | {"steps": steps, "micro_batches": micro_batches, "evaluate_every": evaluation.every}
    | {
      "best": evaluation.best,
      "checkpoints": checkpoints and (checkpoints.every, checkpoints.keep),
    }
    | {"versions": versions(), "fingerprint": prints}
  )
  if checkpoints is not None:
    check_shared("Checkpoints.folder", checkpoints.folder)


def _check_refresh(
  refresh: Any, state: MetaState, micro_batches: int, checkpoints: Checkpoints | None
) -> None:
  """Raise TypeError or ValueError if running statistics cannot be refreshed."""
  if refresh is None:
    return
  validate.function("refresh", refresh, "(phi, inputs [N, ...], constants) -> constants, or None")
  if state.constants is None:
    raise ValueError("refresh changes constants: pass learner.init(params, constants=...).")
  if micro_batches > 1:
    raise ValueError(f"refresh needs micro_batches=1; got {micro_batches}.")
  if checkpoints is not None and not checkpoints.constants:
    raise ValueError("refresh changes constants: store them, Checkpoints(folder, constants=True).")


def _check_evaluation(evaluation: Evaluation, checkpoints: Checkpoints | None) -> None:
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
