"""`choose_modules` chooses the modules to keep task-specific, and returns the curve of losses."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from shrinkmeta.base import MetaLearner, MetaParams, MetaState
from shrinkmeta.checks import scalars, validate
from shrinkmeta.checks.kinds import shown
from shrinkmeta.choice.losses import SetLosses
from shrinkmeta.choice.path import Path, greedy, paired_error, smallest_good
from shrinkmeta.choice.seconds import seconds_a_task
from shrinkmeta.choice.tables import CurvePoint, ModuleLoss, curve_text, table_text
from shrinkmeta.devices.keys import same_in_any_batch
from shrinkmeta.gradients.total import Shared
from shrinkmeta.learner.sigma import known_sigma
from shrinkmeta.mode.frozen import check_own
from shrinkmeta.model.modules import check_parameters, module_sizes, names
from shrinkmeta.model.outputs import check_targets
from shrinkmeta.model.tasks import Task, check_tasks
from shrinkmeta.model.variants import with_constants

PyTree = Any


class Choice(NamedTuple):
  """The chosen task-specific modules and the measured losses; `print` shows them as two tables.

  Attributes:
    modules: the chosen modules, in the order in which the path adds them. It is empty if adaptation
      does not lower the loss enough.
    table: a ModuleLoss for each module, in the order of the paths of the parameters.
    curve: a CurvePoint for each set of the nested path, from no module to all.
    num_sound: the number of tasks in the means. Their loss is finite for every set.
    num_failed: the number of tasks left out of the means. Their loss is not finite for some set.
    tolerance: the largest allowed difference to the best loss, in nats per example. None allows one
      paired standard error.
  """

  modules: tuple[str, ...]
  table: tuple[ModuleLoss, ...]
  curve: tuple[CurvePoint, ...]
  num_sound: int
  num_failed: int
  tolerance: float | None

  def __str__(self) -> str:
    """Return the choice, the table of modules and the path as plain text."""
    chosen = self.curve[len(self.modules)]
    allowed = "one paired standard error" if self.tolerance is None else f"{self.tolerance:g} nats"
    failed = f", {self.num_failed} failed tasks left out" if self.num_failed else ""
    every = sum(row.parameters for row in self.table)
    what = f"{chosen.parameters:,} of {every:,} parameters"
    return (
      f"Task-specific: {', '.join(self.modules) or 'no module'} ({what}).\n"
      f"It is the smallest set within {allowed} of the best.\n"
      f"Losses: validation, nats per example, mean over {self.num_sound} tasks{failed}.\n\n"
      f"{table_text(self.table)}\n\n{curve_text(self.curve, len(self.modules))}"
    )


def choose_modules(
  learner: MetaLearner,
  state: MetaState,
  tasks: Task,
  *,
  tolerance: float | None = None,
  key: jax.Array | None = None,
  repeats: int = 3,
) -> Choice:
  """Choose the modules to keep task-specific, by the validation losses of sets of modules.

      S_0 = {},   S_k+1 = S_k + argmin_m loss(S_k + m),   choose the first S_k near the best S_j

  A module outside a set has sigma = 0. phi and the other sigmas stay as they are in `state`. One
  compiled program computes the losses of all sets, at most M (M + 3) / 2 sets for M modules if no
  task fails. Later calls with the learner and tasks of the same shapes reuse it. The choice is
  fitted to these tasks. Pass tasks that phi and sigma have not seen, and report the loss of the
  chosen set on a third group of tasks.

  Args:
    learner: any learner with task-specific modules. Its frozen modules stay frozen.
    state: a MetaState of this learner.
    tasks: T tasks, leaves [T, N, ...], with validation data.
    tolerance: the largest allowed difference to the best loss on the path, in nats per example.
      None allows one standard error of the difference, paired over tasks.
    key: a random key, needed only with Inner.batch_size. Every set gets the same draws. Do not use
      the key again.
    repeats: the number of timed runs for each set. The seconds of a set are the median over its
      runs. 0 measures no time and saves compiling one program for each set of the path.

  Returns:
    a Choice. `learner.keep(state, choice.modules)` returns a learner that adapts only the chosen
    modules, and its state.

  Raises:
    TypeError: an argument has the wrong type.
    ValueError: two arguments do not fit each other, every module of the learner is frozen, or every
      task fails.

  Example:
    >>> import shrinkmeta as sm
    >>> likelihood = sm.gaussian(lambda p, x: x * p["slope"] + p["level"])
    >>> params = {"level": jnp.zeros(()), "slope": jnp.ones(())}
    >>> learner = sm.sigma_imaml(likelihood, sm.by_leaf(params), init_sigma=1.0)
    >>> x = jnp.tile(jnp.linspace(-1.0, 1.0, 8), (3, 1))
    >>> y = x + jnp.array([[-2.0], [0.0], [3.0]])  # the level differs between tasks
    >>> tasks = sm.Task(sm.Batch(x, y), sm.Batch(x, y))
    >>> choose_modules(learner, learner.init(params), tasks, tolerance=0.01).modules
    ('level',)
  """
  sigma = _check(learner, state, tasks, tolerance)
  repeats = validate.integer("repeats", repeats, 0)
  scalars.key("key", key)
  key = same_in_any_batch(key)
  labels, candidates = learner.spec.labels, tuple(m for m, s in sigma.items() if s > 0)
  sizes = module_sizes(state.phi, labels)
  itemsize = jnp.result_type(jax.tree.leaves(state.phi)[0]).itemsize
  params = MetaParams(state.phi, state.log_sigma2)
  shared = Shared(params, key, state.constants)
  run = SetLosses(learner, candidates, shared, tasks)
  run([])
  for m in candidates:
    run([m])
    run([other for other in candidates if other != m])
  path = _path(run, sizes)
  _need_two(int(run.sound().sum()), tolerance)
  seconds = [seconds_a_task(learner, state, s, tasks.train, key, repeats) for s in path]
  table = _table(run, {m: sigma[m] for m in names(labels)}, sizes, itemsize)
  curve = _curve(run, path, sizes, itemsize, seconds)
  losses, errors = [p.loss for p in curve], [p.error for p in curve]
  first = smallest_good(losses, errors, tolerance)
  num_sound, count = int(run.sound().sum()), run.sound().size
  return Choice(path[first], table, curve, num_sound, count - num_sound, tolerance)


def _table(
  run: SetLosses, sigma: dict[str, float], sizes: dict[str, int], itemsize: int
) -> tuple[ModuleLoss, ...]:
  """Return the table of modules, with means over the tasks that did not fail."""
  sound, every = run.sound(), run.candidates
  moved = np.mean(run.squares[frozenset(every)][sound], 0)
  table = []
  for m in sigma:
    only = [m] if m in every else []
    rest = [other for other in every if other != m]
    far = float(np.sqrt(moved[every.index(m)] / sizes[m])) if only else 0.0
    alone = (_mean(run, only, sound), _error(run, only, (), sound))
    missing = (_mean(run, rest, sound), _error(run, rest, every, sound))
    table.append(ModuleLoss(m, sigma[m], far, sizes[m], sizes[m] * itemsize, *alone, *missing))
  return tuple(table)


def _curve(
  run: SetLosses, path: Path, sizes: dict[str, int], itemsize: int, seconds: Sequence[float]
) -> tuple[CurvePoint, ...]:
  """Return a point for each set on the path, with means over the tasks that did not fail."""
  sound = run.sound()
  best = min(path, key=lambda chosen: _mean(run, chosen, sound))
  curve = []
  for chosen, took in zip(path, seconds, strict=True):
    count = sum(sizes[m] for m in chosen)
    loss = (_mean(run, chosen, sound), _error(run, chosen, best, sound))
    cost = (count / sum(sizes.values()), count, count * itemsize, took)
    curve.append(CurvePoint(chosen[-1] if chosen else None, chosen, *loss, *cost))
  return tuple(curve)


def _mean(run: SetLosses, chosen: Sequence[str], sound: np.ndarray) -> float:
  """Return the mean loss of a set over the tasks `sound` [T], in nats per example."""
  return float(np.mean(run(chosen)[sound]))


def _error(run: SetLosses, chosen: Sequence[str], other: Sequence[str], sound: np.ndarray) -> float:
  """Return the standard error of the loss difference of two sets, paired over tasks `sound` [T]."""
  return paired_error(run(chosen)[sound], run(other)[sound])


def _path(run: SetLosses, sizes: dict[str, int]) -> Path:
  """Return the greedy path, by mean losses over the tasks that did not fail for any set."""
  while True:
    sound = _some_sound(run)
    path = greedy(lambda chosen, s=sound: _mean(run, chosen, s), run.candidates, sizes)
    if np.array_equal(_some_sound(run), sound):
      return path  # otherwise a task failed for a new set: begin again without this task


def _some_sound(run: SetLosses) -> np.ndarray:
  """Return which tasks did not fail, [T] bool, or raise ValueError if every task failed."""
  if not (sound := run.sound()).any():
    worst = max(run.losses, key=lambda s: int(np.sum(~np.isfinite(run.losses[s]))))
    count = int(np.sum(~np.isfinite(run.losses[worst])))
    raise ValueError(
      "Every task fails for some set of modules: its loss is not finite. With "
      f"{sorted(worst) or 'no module'} task-specific {count} of {sound.size} tasks fail. Take a "
      "smaller inner step size, or look at phi and the data."
    )
  return sound


def _check(learner: Any, state: Any, tasks: Any, tolerance: Any) -> dict[str, float]:
  """Check the arguments of `choose_modules`, and return {module: sigma_m} (0 if frozen)."""
  made = "a learner, as sm.sigma_imaml(...) returns it"
  validate.instance("learner", learner, MetaLearner, made)
  validate.instance("state", state, MetaState, "a MetaState, as learner.init(params) returns it")
  if any(isinstance(x, Tracer) for x in jax.tree.leaves((state, tasks))):
    raise TypeError("choose_modules returns names, so it runs outside jit, vmap and grad.")
  labels, mesh = learner.spec.labels, learner.spec.mesh
  check_parameters("state.phi", state.phi, "state.log_sigma2", state.log_sigma2, labels)
  check_own(learner.spec, state.log_sigma2)
  if mesh is not None and mesh.is_multi_process:
    raise ValueError(
      "choose_modules runs in one process; learner.spec.mesh has devices of several. Build the "
      "learner without a mesh, or with one of this process, on a state that it holds whole."
    )
  check_tasks(tasks, needs_val=False)
  if tasks.val is None:
    raise ValueError(
      "tasks.val is None. choose_modules compares validation losses: split the data of each task."
    )
  check_targets(with_constants(learner.spec.likelihood, state.constants), "tasks", tasks, state.phi)
  if tolerance is not None:
    if not scalars.number("tolerance", tolerance) >= 0:
      raise ValueError(f"tolerance must not be negative; got {shown(tolerance)}.")
  sigma = known_sigma(learner.spec, state, "choose_modules")
  if not any(sigma.values()):
    raise ValueError(
      "Every module of this learner is frozen (sigma is 0). Use a learner that adapts, such as "
      "sm.sigma_imaml or sm.fine_tuning."
    )
  _need_two(len(jax.tree.leaves(tasks.val.targets)[0]), tolerance)
  return sigma


def _need_two(num_tasks: int, tolerance: float | None) -> None:
  """Raise ValueError if there are too few tasks without a failure for a standard error."""
  if num_tasks < 2 and tolerance is None:
    raise ValueError(
      "One task without a failure gives no standard error: pass more tasks, or a tolerance in nats."
    )
