"""The functions of a learner, for every algorithm of the family.

The meta-loss is the mean over tasks of the validation negative log-likelihood at theta_hat, of the
training negative log joint, or of the negative log evidence. Failed tasks are left out and counted.
"""

import dataclasses
import functools
import math
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from shrinkmeta import validate
from shrinkmeta.base import (
  InnerInfo,
  MetaLearner,
  MetaParams,
  MetaState,
  Metrics,
  OptState,
  PerTask,
  Sums,
  WarmStart,
)
from shrinkmeta.config import (
  Algorithm,
  Frozen,
  Implicit,
  Inner,
  LogDet,
  SigmaGradient,
  Spec,
  derive,
)
from shrinkmeta.devices.batching import Batching, leading, map_tasks
from shrinkmeta.gradients.implicit import differentiable_mode
from shrinkmeta.gradients.per_task import Item
from shrinkmeta.gradients.total import in_blocks, key_of, model_of, run_first, sums_over_tasks
from shrinkmeta.keys import same_in_any_batch
from shrinkmeta.meta_step import apply, gradient_from
from shrinkmeta.mode import warm_start
from shrinkmeta.mode.frozen import as_built, frozen_modules, moving
from shrinkmeta.mode.optimise import Steps, posterior_mode
from shrinkmeta.model import modules
from shrinkmeta.model.likelihood import Likelihood
from shrinkmeta.model.outputs import check_targets
from shrinkmeta.model.priors import SigmaPrior
from shrinkmeta.model.tasks import Batch, Task, check_batch, check_tasks

PyTree = Any


def make_learner(
  algorithm: Algorithm,
  likelihood: Likelihood,
  labels: modules.Labels,
  *,
  inner: Inner,
  implicit: Implicit,
  phi_optimizer: optax.GradientTransformation,
  sigma_optimizer: optax.GradientTransformation,
  init_sigma: float | Mapping[str, float],
  log_p_phi: Callable[[PyTree], jax.Array] | None = None,
  log_p_sigma: SigmaPrior | None = None,
  log_det: LogDet = LogDet(),  # noqa: B008 (frozen)
  restricted: Sequence[str] = (),
  sigma_gradient: SigmaGradient = "per_task",
  batching: Batching = "auto",
  mesh: Mesh | None = None,
) -> MetaLearner:
  """Build the learner of an algorithm; `sm.maml`, `sm.sigma_imaml`, ... do so with defaults.

  Args:
    algorithm: a line of `sm.FAMILY`, or one of your own.
    likelihood: predict and log_prob.
    labels: the module of every parameter.
    inner: how theta_hat is found.
    implicit: how its gradient is found, where the algorithm has an implicit gradient.
    phi_optimizer: any optax optimiser, for phi.
    sigma_optimizer: likewise, for log sigma^2 where it is learned.
    init_sigma: sigma_m at the start (for good where sigma is fixed): a number for all modules, or
      {module: number}. Modules that start at 0 are frozen for good: their parameters are held at
      phi, have no task axis and no part in the inner loop. (Outside jit, so are those whose
      log_sigma2 is -inf.)
    log_p_phi: a log density phi -> [], subtracted from the meta-loss once per update. It is divided
      by the number of validation examples, as the likelihood term is. (Pooled algorithms: of all
      examples; phi following l_MAP or the evidence: by the number of tasks.)
    log_p_sigma: a log density {module: log sigma_m^2} -> [], likewise, where sigma is learned.
    log_det: how the determinant of the evidence is found.
    restricted: modules of phi that the evidence integrates out too (REML), for linear-Gaussian
      models: see `sm.restriction`.
    sigma_gradient: sigma's gradient where phi follows l_MAP. "joint" goes through phi_hat and
      theta_hat, "per_task" through theta_hat with phi held, "diagonal" drops the loss's curvature.
    batching: how many tasks run at once on a device: see `sm.over_tasks`. With Inner.tol and blocks
      of tasks, a task that has converged leaves its block to the next.
    mesh: the devices that the tasks are split over, or None.

  Returns:
    the MetaLearner.

  Raises:
    ValueError: settings that do not fit each other.
  """
  if sigma_gradient == "diagonal":
    implicit = dataclasses.replace(implicit, solver="identity", batch_size=None, num_batches=1)
  if isinstance(restricted, str):
    raise TypeError(f"restricted must be a tuple of modules; got the string {restricted!r}.")
  settings = Spec(
    algorithm=algorithm,
    likelihood=likelihood,
    labels=labels,
    inner=inner,
    implicit=implicit,
    phi_optimizer=phi_optimizer,
    sigma_optimizer=sigma_optimizer,
    sigma=_sigma_by_module(init_sigma, labels),
    log_det=log_det,
    restricted=tuple(restricted),
    sigma_gradient=sigma_gradient,
    log_p_phi=log_p_phi,
    log_p_sigma=log_p_sigma,
    batching=batching,
    mesh=mesh,
  )
  spec = derive(settings)
  functions = (init, update, adapt, meta_gradient, adapt_tasks, no_start, sums, apply)
  # A bound method fixes the first argument, and keeps the docstring and the rest of the signature.
  return MetaLearner(*(types.MethodType(f, spec) for f in functions), spec=spec)


def init(spec: Spec, params: PyTree) -> MetaState:
  """Return the state before the first update.

  Args:
    params: the parameters of your network, a pytree of floats. They are copied.

  Returns:
    a MetaState with phi = params, log sigma^2 at the learner's start, and fresh optimiser states.

  Raises:
    ValueError: params are not finite floats of one dtype, or labels do not fit them.
  """
  dtype = validate.parameters("params", params)
  modules.check_labels(spec.labels, params)
  # Copies: donation never reaches the caller's arrays, and no step changes the type of a number.
  phi = jax.tree.map(lambda p: jnp.array(p, dtype), params)
  log_s2 = {m: jnp.asarray(v, dtype) for m, v in spec.log_sigma2.items()}
  opt_state = OptState(spec.phi_optimizer.init(phi), spec.sigma_optimizer.init(log_s2))
  return MetaState(phi, log_s2, opt_state, jnp.zeros([], jnp.int32))


def update(
  spec: Spec,
  state: MetaState,
  tasks: Task,
  key: jax.Array | None = None,
  warm: WarmStart | None = None,
) -> tuple[MetaState, Metrics]:
  """Take one step of phi and sigma on the tasks of one meta-batch.

  Args:
    state: from `init`, or from the update before.
    tasks: T tasks, leaves [T, N, ...].
    key: needed with a batch_size, of Inner or Implicit, or a stochastic log-determinant only;
      consumed.
    warm: where the loops and solves of recurring tasks begin, leaves [T, ...]; for algorithms with
      an implicit gradient. `metrics.warm` says where these tasks may begin next time.

  Returns:
    (the next MetaState, Metrics).

  Raises:
    TypeError, ValueError: tasks or a state that do not fit this learner.
  """
  return apply(spec, state, *sums(spec, state, tasks, key, warm))


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
    key: as for `update`; consumed.
    warm: as for `update`.

  Returns:
    (the gradient in phi and log sigma^2, Metrics).

  Raises:
    TypeError, ValueError: tasks or a state that do not fit this learner.
  """
  return gradient_from(spec, state, *sums(spec, state, tasks, key, warm))


def sums(
  spec: Spec,
  state: MetaState,
  tasks: Task,
  key: jax.Array | None = None,
  warm: WarmStart | None = None,
  first: jax.typing.ArrayLike = 0,
) -> tuple[Sums, PerTask]:
  """Return what a micro-batch of tasks adds to an update.

  Args:
    state: a MetaState of this learner.
    tasks: some tasks of the meta-batch, leaves [T, N, ...].
    key: as for `update`, the same for all micro-batches; consumed.
    warm: as for `update`.
    first: the number of the first of these tasks in the meta-batch.

  Returns:
    (Sums, which add up leaf by leaf over micro-batches; PerTask, to be concatenated).

  Raises:
    TypeError, ValueError: tasks or a state that do not fit this learner.
  """
  params, frozen = _checked(spec, state)
  check_tasks(tasks, needs_val=spec.needs_validation)
  if validate.known(jax.tree.leaves(tasks)[0]) is not None:
    check_targets(spec.likelihood, "tasks", tasks, state.phi)
  if warm is not None:
    frozen = spec.frozen  # as in no_start
    part = moving(params.phi, spec.labels, frozen)
    warm_start.check_start(warm, part, leading(tasks), spec.has_mode)
  return sums_over_tasks(spec, params, frozen, tasks, key, warm, first)


def adapt(
  spec: Spec, state: MetaState, batch: Batch, steps: Steps = None, key: jax.Array | None = None
) -> tuple[PyTree, InnerInfo]:
  """Return theta_hat of one task.

  Algorithms with an implicit gradient differentiate the result by the implicit rule, the others
  through the steps.

  Args:
    state: a MetaState of this learner.
    batch: the task's training data [N, ...], without the T axis.
    steps: replaces the learner's own: an int, or an increasing tuple [S] that records one run at
      those steps.
    key: needed with a batch_size of Inner or Implicit only; consumed.

  Returns:
    (theta, InnerInfo); for a tuple of steps every leaf leads with [S].

  Raises:
    TypeError, ValueError: a batch or a state that does not fit this learner.
  """
  params, frozen = _checked(spec, state)
  check_batch("batch", batch)
  make = lambda params, batch: model_of(spec, params, batch, frozen)
  if spec.has_mode and not isinstance(steps, tuple):
    return differentiable_mode(spec.inner, spec.implicit, make, params, batch, steps, key)
  mode = posterior_mode(spec.inner, make(params, batch), key=same_in_any_batch(key), steps=steps)
  return mode.theta, mode.info


def adapt_tasks(
  spec: Spec, state: MetaState, batches: Batch, steps: Steps = None, key: jax.Array | None = None
) -> tuple[PyTree, InnerInfo]:
  """Return theta_hat of T tasks, which run as in `update`, by the learner's batching and mesh.

  Frozen modules are not copied T times: their leaves of the result are None, and
  `sm.merge(thetas, state.phi)` is whole.

  Args:
    state: a MetaState of this learner.
    batches: training data, leaves [T, N, ...].
    steps: as for `adapt`.
    key: as for `adapt`; consumed.

  Returns:
    (thetas, InnerInfo), leaves [T, ...], or [T, S, ...] for a tuple of steps.

  Raises:
    TypeError, ValueError: batches or a state that do not fit this learner.
  """
  params, frozen = _checked(spec, state)
  check_batch("batches", batches, ("T", "N"))
  if validate.known(jax.tree.leaves(batches)[0]) is not None:
    check_targets(spec.likelihood, "batches", batches, state.phi)

  def one(shared: tuple[MetaParams, Any], item: Item) -> tuple[tuple[()], Any]:
    params, key = shared
    own = key_of(key, item.number)
    model = model_of(spec, params, item.task.train, frozen)
    mode = posterior_mode(spec.inner, model, key=own, steps=steps, end=item.end)
    return (), (moving(mode.theta, spec.labels, frozen), mode.info)

  items = Item(jnp.arange(leading(batches)), Task(batches, None), None, None)
  queued = in_blocks(spec) and not isinstance(steps, tuple)
  first = functools.partial(run_first, spec, frozen, steps, lambda key: key) if queued else None
  shared = (params, same_in_any_batch(key))
  return map_tasks(one, shared, items, spec.batching, spec.mesh, first)[1]


def no_start(spec: Spec, state: MetaState, count: int) -> WarmStart:
  """Return the warm start of tasks that have not been seen: zeros.

  Args:
    state: a MetaState of this learner.
    count: the number of tasks.

  Returns:
    a WarmStart, leaves [count, ...].
  """
  return warm_start.no_start(moving(state.phi, spec.labels, spec.frozen), count)


def _checked(spec: Spec, state: MetaState) -> tuple[MetaParams, Frozen]:
  """Return the parameters, after checks, and the modules that need no work."""
  if not isinstance(state, MetaState):
    raise TypeError(f"state must be a MetaState, from learner.init(params); got {type(state)}.")
  known = modules.check_parameters(
    "state.phi", state.phi, "state.log_sigma2", state.log_sigma2, spec.labels
  )
  frozen = frozen_modules(known, spec.frozen)
  masked = spec.algorithm.sigma == "inf"
  built = {m: s for m, s in spec.sigma.items() if m in spec.frozen or masked}
  phi = as_built(state.phi, state.log_sigma2, known, spec.labels, built)
  return MetaParams(phi, state.log_sigma2), frozen


def _sigma_by_module(
  init_sigma: float | Mapping[str, float], labels: modules.Labels
) -> dict[str, float]:
  """Return {module: sigma_m at the start}."""
  if isinstance(init_sigma, Mapping):
    modules.check_modules("init_sigma", init_sigma, labels)
    sigma = {module: float(value) for module, value in init_sigma.items()}
  else:
    sigma = dict.fromkeys(modules.names(labels), float(init_sigma))
  for module, value in sigma.items():
    if not value >= 0 or math.isnan(value):
      raise ValueError(f"init_sigma is a standard deviation; got {value} for module {module!r}.")
  return sigma
