"""The functions of a learner, for every algorithm of the family.

The meta-loss is a mean over the tasks that did not fail. `Algorithm.phi` chooses the meta-loss of
phi: the validation NLL at theta_hat, the negative log joint, the negative log evidence, or the NLL
of all examples at phi. The meta-loss of sigma is the validation NLL, or the negative log evidence.
"""

import functools
import types
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from shrinkmeta.base import (
  InnerInfo,
  MetaLearner,
  MetaParams,
  MetaState,
  Metrics,
  OptState,
  PerTask,
  Programs,
  Sums,
  WarmStart,
  check_state,
)
from shrinkmeta.checks import scalars, validate
from shrinkmeta.config import Frozen, Spec
from shrinkmeta.devices.batching import leading, map_tasks
from shrinkmeta.devices.keys import same_in_any_batch
from shrinkmeta.gradients.per_task import Item
from shrinkmeta.gradients.total import (
  Shared,
  in_blocks,
  key_of,
  run_first,
  sums_over_tasks,
  theta_hat,
)
from shrinkmeta.learner.meta_step import apply, gradient_from
from shrinkmeta.learner.sigma import finite_or_zero, keep_modules
from shrinkmeta.learner.statistics import refresh
from shrinkmeta.mode import warm_start
from shrinkmeta.mode.frozen import as_built, frozen_modules, moving
from shrinkmeta.mode.optimise import Steps, checked_steps
from shrinkmeta.model import modules
from shrinkmeta.model.outputs import check_targets
from shrinkmeta.model.tasks import Batch, Task, check_batch, check_tasks
from shrinkmeta.model.variants import is_random, warn_without_key, with_constants

PyTree = Any


def learner_of(spec: Spec) -> MetaLearner:
  """Bind the functions of a learner to its spec: callers leave out `spec`, and so does `help`."""
  spec = spec._replace(programs=Programs())
  functions = init, update, adapt, meta_gradient, adapt_tasks, no_start, sums, apply, keep, refresh
  return MetaLearner(*(types.MethodType(f, spec) for f in functions), spec=spec)


def init(spec: Spec, params: PyTree, constants: PyTree = None) -> MetaState:
  """Return the state before the first update.

  Args:
    params: the parameters of your network, a pytree of floats. They are copied.
    constants: what `predict` takes as its third argument, such as a frozen base: a pytree of arrays
      of any dtype, or None. They are not copied, so donating the state donates them too.

  Returns:
    a MetaState with phi = params, log sigma^2 of init_sigma, and fresh optimiser states.

  Raises:
    TypeError: a constant is no array, or `predict` takes no constants.
    ValueError: params are not finite floats of one dtype, or labels do not fit them.

  >>> import shrinkmeta as sm
  >>> learner = sm.maml(sm.gaussian(lambda theta, x: x * theta["w"]), {"w": "w"})
  >>> learner.init({"w": 0.5}).phi
  {'w': Array(0.5, dtype=float32)}
  """
  dtype = validate.parameters("params", params)
  modules.check_labels(spec.labels, params)
  # Copies: donating the state must not delete the caller's arrays (docs/hazards.md#donated-twice).
  # One dtype: a step must not change it and compile again (docs/hazards.md#optimiser-dtypes).
  phi = jax.tree.map(lambda p: jnp.array(p, dtype), params)
  log_s2 = {m: jnp.asarray(v, dtype) for m, v in spec.log_sigma2.items()}
  states = spec.phi_optimizer.init(phi), spec.sigma_optimizer.init(finite_or_zero(log_s2))
  opt_state = OptState(*jax.tree.map(jnp.array, states))  # leaves may share an array
  with_constants(spec.likelihood, constants)
  constants = jax.tree.map(jnp.asarray, constants)
  return MetaState(phi, log_s2, opt_state, jnp.zeros([], jnp.int32), constants)


def update(
  spec: Spec,
  state: MetaState,
  tasks: Task,
  key: jax.Array | None = None,
  warm: WarmStart | None = None,
) -> tuple[MetaState, Metrics]:
  """Take one step of phi and sigma on the tasks of one meta-batch.

  Args:
    state: a MetaState of this learner, from `init` or from the previous update.
    tasks: T tasks, leaves [T, N, ...].
    key: a random key; do not use it again. It is needed only with a batch_size of Inner or
      Implicit, a stochastic log-determinant, or `sm.with_randomness`.
    warm: where the inner loops and solves begin, leaves [T, ...]; only for algorithms with an
      implicit gradient. `metrics.warm` then holds the starts for these tasks' next update.

  Returns:
    (the next MetaState, Metrics).

  Raises:
    TypeError, ValueError: `tasks` or `state` does not fit this learner.

  >>> import shrinkmeta as sm
  >>> learner = sm.maml(sm.gaussian(lambda theta, x: x * theta["w"]), {"w": "w"})
  >>> batch = sm.Batch(jnp.ones([3, 4]), jnp.ones([3, 4]))  # three tasks of four examples
  >>> state, metrics = jax.jit(learner.update)(learner.init({"w": 0.0}), sm.Task(batch, batch))
  >>> int(state.step), bool(state.phi["w"] > 0)
  (1, True)
  """
  return apply(spec, state, *sums_over_tasks(spec, *_ready(spec, state, tasks, key, warm)))


def meta_gradient(
  spec: Spec,
  state: MetaState,
  tasks: Task,
  key: jax.Array | None = None,
  warm: WarmStart | None = None,
) -> tuple[MetaParams, Metrics]:
  """Return the gradient that an update would follow, and its metrics.

  Args:
    state: a MetaState of this learner.
    tasks: T tasks, leaves [T, N, ...].
    key, warm: as for `update`.

  Returns:
    (the gradient in phi and log sigma^2, Metrics).

  Raises:
    TypeError, ValueError: `tasks` or `state` does not fit this learner.

  >>> import shrinkmeta as sm
  >>> learner = sm.maml(sm.gaussian(lambda theta, x: x * theta["w"]), {"w": "w"})
  >>> batch = sm.Batch(jnp.ones([3, 4]), jnp.ones([3, 4]))  # three tasks of four examples
  >>> gradient, metrics = learner.meta_gradient(learner.init({"w": 0.0}), sm.Task(batch, batch))
  >>> round(float(gradient.phi["w"]), 3)  # -0.9^5 at theta_hat, times d theta_hat/d phi = 0.9^5
  -0.349
  """
  return gradient_from(spec, state, *sums_over_tasks(spec, *_ready(spec, state, tasks, key, warm)))


def sums(
  spec: Spec,
  state: MetaState,
  tasks: Task,
  key: jax.Array | None = None,
  warm: WarmStart | None = None,
  first: jax.typing.ArrayLike = 0,
) -> tuple[Sums, PerTask]:
  """Return the sums of a micro-batch of tasks, for `apply`.

  Args:
    state: a MetaState of this learner.
    tasks: some tasks of the meta-batch, leaves [T, N, ...].
    key, warm: as for `update`; all micro-batches take the same key.
    first: the position [] of the first of these tasks in the meta-batch; it fixes their keys.

  Returns:
    (Sums, which add up leaf by leaf over micro-batches; PerTask, to be concatenated).

  Raises:
    TypeError, ValueError: `tasks` or `state` does not fit this learner, or `first` is not 0 (or is
      traced) and the learner has `sigma_gradient="joint"` or `restricted`.

  >>> import shrinkmeta as sm
  >>> learner = sm.maml(sm.gaussian(lambda theta, x: x * theta["w"]), {"w": "w"})
  >>> batch = sm.Batch(jnp.ones([3, 4]), jnp.ones([3, 4]))  # three tasks of four examples
  >>> sums, per_task = learner.sums(learner.init({"w": 0.0}), sm.Task(batch, batch))
  >>> int(sums.tasks), per_task.val_nll.shape
  (3, (3,))
  """
  first = scalars.count("first", first)
  if spec.sees_all_tasks and validate.known(first) != 0:
    raise ValueError(
      'With sigma_gradient="joint" or restricted, the loss of an update is not a sum over its '
      "micro-batches. Call `sums` once, with all tasks of the update and first=0."
    )
  return sums_over_tasks(spec, *_ready(spec, state, tasks, key, warm, first))


def _ready(spec: Spec, state: MetaState, tasks: Task, key: Any, warm: Any, first: Any = 0) -> Any:
  """Check the arguments of `sums`, and return those of `sums_over_tasks`."""
  params, frozen = _checked(spec, state)
  check_tasks(tasks, needs_val=spec.needs_validation)
  scalars.key("key", key)
  key = same_in_any_batch(key)
  if key is None and not spec.has_mode and is_random(spec.likelihood):
    warn_without_key()
  if validate.readable(tasks):
    check_targets(with_constants(spec.likelihood, state.constants), "tasks", tasks, state.phi)
  if warm is not None:
    frozen = spec.frozen  # as in no_start, so that the trees of `warm` fit
    part = moving(params.phi, spec.labels, frozen)
    warm_start.check_start(warm, part, leading(tasks), spec.has_mode)
  return Shared(params, key, state.constants), frozen, tasks, warm, first


def adapt(
  spec: Spec, state: MetaState, batch: Batch, steps: Steps = None, key: jax.Array | None = None
) -> tuple[PyTree, InnerInfo]:
  """Return theta_hat of one task.

  If the algorithm has an implicit gradient, theta_hat is differentiated by the implicit rule.
  Otherwise it is differentiated through the inner steps; with a tuple, in forward mode only.

  Args:
    state: a MetaState of this learner.
    batch: the task's training data [N, ...], without the T axis.
    steps: replaces Inner.steps. With a tuple of S increasing ints the loop runs once, and the
      result holds theta after each of these numbers of steps.
    key: a random key, needed only with a batch_size of Inner or Implicit, or `sm.with_randomness`.

  Returns:
    (theta, like phi; InnerInfo). For a tuple of S steps all leaves are [S, ...].

  Raises:
    TypeError, ValueError: `batch` or `state` does not fit this learner.

  >>> import shrinkmeta as sm
  >>> learner = sm.maml(sm.gaussian(lambda theta, x: x * theta["w"]), {"w": "w"})
  >>> one = sm.Batch(jnp.ones(4), jnp.ones(4))
  >>> theta, info = learner.adapt(learner.init({"w": 0.0}), one, steps=(0, 5))
  >>> [round(float(w), 2) for w in theta["w"]]  # 1 - (1 - 0.1)^5
  [0.0, 0.41]
  """
  params, frozen = _checked(spec, state)
  check_batch("batch", batch)
  scalars.key("key", key)
  key = same_in_any_batch(key)
  steps = None if steps is None else checked_steps(steps)
  return theta_hat(spec, frozen, Shared(params, key, state.constants), batch, steps)


def adapt_tasks(
  spec: Spec, state: MetaState, batches: Batch, steps: Steps = None, key: jax.Array | None = None
) -> tuple[PyTree, InnerInfo]:
  """Return theta_hat of T tasks, computed with the learner's batching and mesh.

  Frozen modules are not copied T times: the result has None there, unless every module is frozen.
  `sm.merge(thetas, state.phi)` fills them in. The result is differentiated as in `adapt`.

  Args:
    state: a MetaState of this learner.
    batches: training data, leaves [T, N, ...].
    steps: as for `adapt`.
    key: as for `adapt`; consumed.

  Returns:
    (thetas, InnerInfo), leaves [T, ...], or [T, S, ...] for a tuple of steps.

  Raises:
    TypeError, ValueError: `batches` or `state` does not fit this learner.

  >>> import shrinkmeta as sm
  >>> learner = sm.maml(sm.gaussian(lambda theta, x: x * theta["w"]), {"w": "w"})
  >>> batch = sm.Batch(jnp.ones([3, 4]), jnp.ones([3, 4]))  # three tasks of four examples
  >>> thetas, info = learner.adapt_tasks(learner.init({"w": 0.0}), batch)
  >>> thetas["w"].shape, int(info.steps[0])
  ((3,), 5)
  """
  params, frozen = _checked(spec, state)
  check_batch("batches", batches, ("T", "N"))
  scalars.key("key", key)
  steps = None if steps is None else checked_steps(steps)
  if validate.readable(batches):
    check_targets(with_constants(spec.likelihood, state.constants), "batches", batches, state.phi)

  def one(shared: Shared, item: Item) -> tuple[tuple[()], Any]:
    own = shared._replace(key=key_of(shared.key, item.number))
    theta, info = theta_hat(spec, frozen, own, item.task.train, steps, item.end)
    return (), (moving(theta, spec.labels, frozen), info)

  items = Item(jnp.arange(leading(batches)), Task(batches, None), None, None)
  queued = in_blocks(spec) and not isinstance(steps, tuple)
  first = functools.partial(run_first, spec, frozen, steps, lambda key: key) if queued else None
  shared = Shared(params, same_in_any_batch(key), state.constants)
  return map_tasks(one, shared, items, spec.batching, spec.mesh, first)[1]


def no_start(spec: Spec, state: MetaState, count: int) -> WarmStart:
  """Return the warm start of new tasks: zeros.

  Args:
    state: a MetaState of this learner.
    count: the number of tasks.

  Returns:
    a WarmStart, leaves [count, ...].

  Raises:
    TypeError, ValueError: `state` has the wrong type, or `count` is not an integer of at least 0.

  >>> import shrinkmeta as sm
  >>> learner = sm.imaml(sm.gaussian(lambda theta, x: x * theta["w"]), {"w": "w"})
  >>> learner.no_start(learner.init({"w": 0.0}), 3).z
  {'w': Array([0., 0., 0.], dtype=float32)}
  """
  check_state("state", state)
  count = validate.integer("count", count, least=0)
  return warm_start.no_start(moving(state.phi, spec.labels, spec.frozen), count)


def keep(spec: Spec, state: MetaState, modules: Sequence[str]) -> tuple[MetaLearner, MetaState]:
  """Return a learner in which only some modules stay task-specific, and all others are frozen.

  All settings stay the same. The frozen modules have sigma = 0 from now on. A warm start of this
  learner does not fit the new one: call `no_start` of the new learner.

  Args:
    state: a MetaState of this learner, outside jit.
    modules: the modules that stay task-specific, such as those of `sm.choose_modules`.

  Returns:
    (the new MetaLearner, the state with sigma = 0 in the frozen modules).

  Raises:
    TypeError, ValueError: `state` does not fit, or `modules` is empty or names a frozen module.
  """
  _checked(spec, state)
  spec, state = keep_modules(spec, state, modules)
  return learner_of(spec), state


def _checked(spec: Spec, state: MetaState) -> tuple[MetaParams, Frozen]:
  """Check `state`; return (its phi and log sigma^2, the frozen modules)."""
  if not isinstance(state, MetaState):
    check_state("state", state)
  known = modules.check_parameters(
    "state.phi", state.phi, "state.log_sigma2", state.log_sigma2, spec.labels
  )
  frozen = frozen_modules(known, spec.frozen)
  phi = as_built(state.phi, state.log_sigma2, known, spec.labels, spec.built)
  return MetaParams(phi, state.log_sigma2), frozen
