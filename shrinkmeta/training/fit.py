"""The training loop: the same on a laptop and on a pod, and nothing lost where it is stopped.

Update i sees the tasks i * meta_batch to (i + 1) * meta_batch - 1 of the source, whatever the
number of devices and processes; each process asks the source for its own share of them. A run that
was stopped goes on from its last checkpoint and ends, on the same devices, in the same bits.
"""

import contextlib
import math
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging

from shrinkmeta.base import MetaLearner, MetaState, Metrics, PerTask, Sums
from shrinkmeta.devices.batching import num_tasks
from shrinkmeta.devices.memory import ProgramCost, program_cost
from shrinkmeta.devices.placement import Rules, place_state, place_tasks, share_of_tasks
from shrinkmeta.model.tasks import Task
from shrinkmeta.training.callbacks import Callback
from shrinkmeta.training.checkpoints import Checkpoints, Store, opened
from shrinkmeta.training.stopping import Watchdog, sigterm

PyTree = Any
Source = Callable[[int, int], Task]  # (first, count) -> the tasks first to first + count - 1
Evaluate = Callable[[MetaState], Mapping[str, float]]


def fit(
  learner: MetaLearner,
  state: MetaState,
  tasks: Source,
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
  """Updates until `state.step` is `steps`; returns the state after the last.

  A row, what callbacks are told of a step, holds the loss and other means over sound tasks, sigma
  of every module, how many tasks failed, and the seconds since the row before.

  Args:
    state: from `learner.init`, or any later one. With checkpoints, the newest in their folder is
      taken instead. It is copied, never donated.
    tasks: pure in (first, count), finite in number or not. Its tasks are split over learner.spec's
      mesh; a number that the mesh does not divide is filled up with tasks of no account.
    micro_batches: parts in which the tasks of an update are drawn, placed and run one after
      another, their gradients added up, where all do not fit at once.
    key: folded with the step, for learners that draw (a batch_size, a stochastic log_det).
    evaluate: state -> numbers, called after every `evaluate_every` updates, in every process;
      they join that step's row as "eval/<name>". The state's arrays are the next update's: copy
      what is to outlive the call.
    best: the name of the one of them that is to be small: the best such state is kept, for
      `restore(checkpoints, learner, state, "best")`.
    callbacks: told of every step, in process 0.
    rules: how large leaves are cut over the mesh's axis "model": see `place_state`.
    stall_seconds: an update that takes longer, its own compilation and the first one aside, ends
      the process with exit code 1 and the tracebacks of all threads, so that whoever started it can
      start it again.

  Raises:
    FloatingPointError: no task of an update was sound, or its gradient not finite.
    MemoryError: an update needs more memory than the device has, by XLA's analysis.
    SystemExit: on SIGTERM, with code 143, after the state was saved.
  """
  _check(learner, steps, meta_batch, micro_batches, evaluate, evaluate_every, best, checkpoints)
  with contextlib.ExitStack() as stack:
    mesh = learner.spec.mesh
    copy = lambda x: x.copy() if isinstance(x, jax.Array) else jnp.array(x, jnp.result_type(x))
    state = place_state(jax.tree.map(copy, state), mesh, rules)
    store = None
    if checkpoints is not None:
      store = stack.enter_context(opened(checkpoints, learner, meta_batch))
      state = store.restore(state) or state
    first = int(state.step)
    if first > steps:
      raise ValueError(f"The state is that of step {first}, beyond the {steps} asked for.")
    told = callbacks if jax.process_index() == 0 else ()
    for callback in told:
      callback.begin(first, steps)
      stack.callback(callback.end)
    stopped = stack.enter_context(sigterm())
    watchdog = Watchdog(stall_seconds)
    stack.callback(watchdog.stop)
    update = _update(learner, state, tasks, meta_batch, micro_batches, key, watchdog)
    on_cpu = jax.default_backend() == "cpu"
    unread: tuple[int, PyTree] | None = None
    told_at = time.perf_counter()

    def report(step: int, row: PyTree, extra: Mapping[str, float]) -> None:
      nonlocal told_at
      numbers = {name: float(value) for name, value in jax.device_get(row).items()}
      numbers["failed"] = meta_batch - numbers.pop("sound")
      now = time.perf_counter()
      numbers |= {"seconds": now - told_at, **extra}
      told_at = now
      for callback in told:
        callback.record(step, numbers)
      norms = [numbers["phi_grad_norm"], numbers.get("sigma_grad_norm", 0.0)]
      if numbers["failed"] < meta_batch and not all(map(math.isfinite, norms)):
        raise FloatingPointError(
          f"The gradient of step {step} is not finite, though those of its tasks are: look at "
          "log_p_phi and log_p_sigma where phi and sigma are now. The state is that before it."
        )
      if numbers["failed"] == meta_batch:
        raise FloatingPointError(
          f"No task of step {step} had a finite loss and gradient, so that nothing can be learnt. "
          "Lower the inner step size or init_sigma, look for NaN in the tasks; a gradient through "
          "Adam's steps needs eps_root > 0."
        )

    for step in range(first, steps):
      done = step + 1
      if step > first:
        watchdog.start()
      state, row = update(state, step)
      if unread is not None:  # on accelerators the next step is under way by now
        report(*unread, {})
      unread = (step, row)
      judged = evaluate is not None and done % evaluate_every == 0
      saved = checkpoints is not None and done % checkpoints.every == 0
      # On a CPU two programs with a collective must not be in flight at once: host devices share
      # one thread pool and could wait for each other. Elsewhere what follows would wait unwatched.
      if on_cpu or judged or saved or done == steps:
        jax.block_until_ready(row)
      watchdog.stop()
      extra = {}
      if judged:
        assert evaluate is not None
        extra = {f"eval/{name}": float(value) for name, value in evaluate(state).items()}
        if best is not None and f"eval/{best}" not in extra:
          raise ValueError(f"best is {best!r}, but evaluate gives {sorted(extra)}.")
      stop, value = stopped(done), extra.get(f"eval/{best}")
      due = store is not None and _due(store, checkpoints, done, value)
      last = done == steps or stop
      if on_cpu or extra or last or due:  # a step that is saved has been told of
        report(*unread, extra)
        unread = None
      if store is not None and (due or last):
        store.save(state, value)
      if stop:
        if store is not None:
          store.finish()
        logging.warning("SIGTERM: stopped after step %d of %d.", done, steps)
        raise SystemExit(128 + signal.SIGTERM)
    if store is not None:
      store.finish()  # while a SIGTERM still waits for it
  return state


def _due(store: Store, checkpoints: Checkpoints | None, done: int, value: float | None) -> bool:
  """Whether a state is saved: every so many steps, and where it is the best so far."""
  assert checkpoints is not None
  if done % checkpoints.every == 0:
    return True
  best = None if value is None else store.best()
  return value is not None and (best is None or value < best[1])


def _update(
  learner: MetaLearner,
  state: MetaState,
  source: Source,
  meta_batch: int,
  micro_batches: int,
  key: jax.Array | None,
  watchdog: Watchdog,
) -> Callable[[MetaState, int], tuple[MetaState, PyTree]]:
  """(state, step) -> (state, row): draws the tasks and runs the compiled programs."""
  mesh, count = learner.spec.mesh, meta_batch // micro_batches
  offset, mine, share = share_of_tasks(count, mesh)
  key_at = lambda state: None if key is None else jax.random.fold_in(key, state.step)

  def drawn(first: int, wanted: int) -> Task:
    tasks = source(first, wanted)
    if (found := num_tasks(tasks)) != wanted:
      raise ValueError(
        f"source({first}, {wanted}) returned {found} tasks; {wanted} were asked for. Its second "
        "argument is how many to return, here this process' share of meta_batch."
      )
    return tasks

  def draw(first: int) -> Task:
    """This process' share of `count` tasks, placed and filled up."""
    if not mine:  # fewer tasks than devices: one of them is a pattern to fill up with
      return place_tasks(drawn(first, 1), mesh, share, 0)
    return place_tasks(drawn(first + offset, mine), mesh, share)

  def whole(state: MetaState, tasks: Task) -> tuple[MetaState, PyTree]:
    state, metrics = learner.update(state, tasks, key_at(state))
    return state, _row(learner, state, metrics)

  def part(state: MetaState, tasks: Task, first: jax.typing.ArrayLike) -> tuple[Sums, PerTask]:
    return learner.sums(state, tasks, key_at(state), first=first)

  def finish(state: MetaState, sums: Sums, per_task: PerTask) -> tuple[MetaState, PyTree]:
    state, metrics = learner.apply(state, sums, per_task)
    return state, _row(learner, state, metrics)

  # A state comes out as it lay when it went in, in place of it.
  options: dict[str, Any] = {"donate_argnums": 0}
  if mesh is not None:
    options["out_shardings"] = (jax.tree.map(lambda x: x.sharding, state), None)
  advice = (
    "All its tasks at once are in one term: give it a smaller meta_batch, or more devices"
    if learner.spec.sees_all_tasks
    else 'Give the learner batching="sequential" or a small number of tasks at once, fit more '
    "micro_batches, or both"
  )
  whole = _telling(whole, watchdog, advice, **options)
  part = _telling(part, watchdog, advice)
  add = jax.jit(lambda a, b: jax.tree.map(jnp.add, a, b), donate_argnums=0)
  finish = jax.jit(finish, **options)
  # One program with a collective at a time, as in `fit`.
  wait = jax.block_until_ready if jax.default_backend() == "cpu" else lambda x: x

  def update(state: MetaState, step: int) -> tuple[MetaState, PyTree]:
    first = step * meta_batch
    if micro_batches == 1:
      return whole(state, draw(first))
    total, per_task = wait(part(state, draw(first), np.int32(0)))
    for start in range(count, meta_batch, count):
      sums, per_task = wait(part(state, draw(first + start), np.int32(start)))
      total = add(total, sums)
    return finish(state, total, per_task)  # a row logs no values of single tasks: any part's do

  return update


def _telling(
  f: Callable[..., Any], watchdog: Watchdog, advice: str = "", **options: Any
) -> Callable[..., Any]:
  """jit(f), which tells what it takes whenever it compiles: once for all arguments of a shape.

  While it compiles it is not watched.

  Args:
    advice: what to do where it takes too much.
  """
  programs: dict[Any, jax.stages.Compiled] = {}

  def call(*args: Any) -> Any:
    shapes = tuple((jnp.shape(x), jnp.result_type(x)) for x in jax.tree.leaves(args))
    if shapes not in programs:
      watched = watchdog.stop()
      programs[shapes] = jax.jit(f, **options).lower(*args).compile()
      _tell(program_cost(programs[shapes]), advice)
      if watched:
        watchdog.start()
    return programs[shapes](*args)

  return call


def _row(learner: MetaLearner, state: MetaState, metrics: Metrics) -> dict[str, jax.Array]:
  """The numbers of one step that are logged: all [] and the same on every device."""
  inner, solve = metrics.mean_inner, metrics.mean_solve
  row = {
    "loss": metrics.loss,
    "phi_loss": metrics.phi_loss,
    "sound": metrics.num_sound,
    "phi_grad_norm": metrics.phi_grad_norm,
    "inner_objective": inner.objective,
    "inner_steps": inner.steps,
    "inner_grad_norm": inner.grad_norm,
  }
  if solve is not None:
    row["solve_residual"], row["solve_steps"] = solve.residual, solve.steps
    row["negative_curvature"] = solve.negative_curvature
  if learner.algorithm.sigma != "inf":
    row["sigma_grad_norm"] = optax.tree.norm(metrics.sigma_grad)
    row |= {f"sigma/{m}": jnp.exp(0.5 * value) for m, value in state.log_sigma2.items()}
  return row


def _tell(needed: ProgramCost | None, advice: str) -> None:
  """Logs what an update needs; raises MemoryError where the device has less."""
  logging.info("An update takes %s.", needed or "memory that this backend does not tell")
  limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
  if needed is not None and limit is not None and needed.bytes > limit:
    raise MemoryError(
      f"An update takes {needed}, but the device has {limit / 1e6:,.1f} MB. {advice}."
    )


def _check(
  learner: MetaLearner,
  steps: int,
  meta_batch: int,
  micro_batches: int,
  evaluate: Evaluate | None,
  evaluate_every: int,
  best: str | None,
  checkpoints: Checkpoints | None,
) -> None:
  if steps < 0 or meta_batch < 1 or micro_batches < 1 or meta_batch % micro_batches:
    raise ValueError(
      "fit wants steps >= 0 and a meta_batch >= 1 that micro_batches divides; got "
      f"steps={steps}, meta_batch={meta_batch}, micro_batches={micro_batches}."
    )
  if micro_batches > 1 and learner.spec.sees_all_tasks:
    raise ValueError(
      'sigma_gradient="joint" and restricted join all tasks of an update in one term: '
      f"micro_batches must be 1; got {micro_batches}."
    )
  if (evaluate is None) != (evaluate_every == 0) or evaluate_every < 0:
    raise ValueError(
      "evaluate and evaluate_every (a number of updates) go together; got "
      f"evaluate={evaluate}, evaluate_every={evaluate_every}."
    )
  if best is not None and evaluate is None:
    raise ValueError(f"best={best!r} names a number that evaluate gives; there is no evaluate.")
  if best is not None and checkpoints is None:
    raise ValueError(f"best={best!r} keeps a state among checkpoints: pass checkpoints= too.")
