"""One meta-learner for the whole family: a row of choices, and what follows from it.

The meta-loss is the mean over tasks of the mean validation negative log-likelihood at theta_hat;
where phi follows l_MAP it is the mean over tasks of the training negative log joint. Each task
gives its gradient with respect to (phi, log sigma^2); a task whose loss or gradient is not finite
is left out of the step and counted.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from shrinkmeta import modules, validate
from shrinkmeta.batching import Batching, check_batching, num_tasks, over_tasks, tasks_at_once
from shrinkmeta.density import masked_log_prob
from shrinkmeta.hyperprior import SigmaPrior
from shrinkmeta.implicit import Implicit, MetaParams, implicit_gradient, map_estimate
from shrinkmeta.inner import Descent, Inner, InnerInfo, mean_nll
from shrinkmeta.likelihood import Likelihood
from shrinkmeta.mode import Mode, Moving, moving_model, posterior_mode, run_loops
from shrinkmeta.partition import Frozen, frozen_modules, hold, merge, moving
from shrinkmeta.solvers import SolveInfo
from shrinkmeta.tasks import Batch, Task, check_batch, check_tasks, num_examples
from shrinkmeta.warm import WarmStart, check_start, no_start
from shrinkmeta.whitening import to_theta

PyTree = Any


class Row(NamedTuple):
  """One line of the table of algorithms."""

  sigma: Literal["inf", "fixed", "learned"]  # "inf": only a mask tells which modules move
  phi: Literal[
    "predictive", "map", "pooled"
  ]  # what phi follows; "pooled": no adaptation in training
  gradient: Literal["unrolled", "first_order", "implicit", "none"]  # of theta_hat


class OptState(NamedTuple):
  """The optimisers' states."""

  phi: optax.OptState
  log_sigma2: optax.OptState


class MetaState(NamedTuple):
  """All that the next step needs."""

  phi: PyTree
  log_sigma2: dict[str, jax.Array]  # {module: []}; inf: no prior, -inf: frozen
  opt_state: OptState
  step: jax.Array  # [] int32


class Metrics(NamedTuple):
  """What people read. T is the number of tasks; a failed task counts in no mean."""

  loss: jax.Array  # [] mean over tasks of val_nll
  phi_loss: jax.Array  # [] what phi follows: loss; the training objective; nan for reptile
  val_nll: jax.Array  # [T] mean validation negative log-likelihood of an example, nats
  failed: jax.Array  # [T] bool: not finite, or no example; left out of this step
  num_failed: jax.Array  # [] int32
  inner: InnerInfo  # [T] each
  solve: SolveInfo | None  # [T] each; None where no linear system is solved
  phi_grad_norm: jax.Array  # []
  sigma_grad: dict[str, jax.Array]  # {module: []} d meta-loss / d log sigma_m^2
  warm: WarmStart | None  # where these tasks may begin next time; None unless a start was given


class MetaLearner(NamedTuple):
  """An algorithm as pure functions; `jax.jit` them at the edge.

  init(params) -> MetaState
  update(state, tasks, key=None, warm=None) -> (MetaState, Metrics)
  adapt(state, batch, steps=None, key=None) -> (theta, InnerInfo), for one task
  meta_gradient(state, tasks, key=None, warm=None) -> (MetaParams, Metrics)
  adapt_tasks(state, batches, steps=None, key=None) -> (thetas, InnerInfo), for T tasks
  no_start(state, count) -> WarmStart, of `count` tasks not seen before

  `key` is needed with Inner.batch_size only. `steps` replaces the learner's own: an int, or an
  increasing tuple [S] that records one run, so that theta and info lead with [S]. `warm` starts
  recurring tasks of a row with a mode where they ended before: see `warm.py`.

  `adapt_tasks` runs tasks as `update` does, by the learner's batching and mesh. Frozen modules are
  not copied T times: their leaves of `thetas` are None, and `sm.merge(thetas, state.phi)` is whole.
  """

  init: Callable[[PyTree], MetaState]
  update: Callable[..., tuple[MetaState, Metrics]]
  adapt: Callable[..., tuple[PyTree, InnerInfo]]
  meta_gradient: Callable[..., tuple[MetaParams, Metrics]]
  adapt_tasks: Callable[..., tuple[PyTree, InnerInfo]]
  no_start: Callable[[MetaState, int], WarmStart]
  labels: modules.Labels
  row: Row


class _Item(NamedTuple):
  """One task as the learner sees it."""

  number: jax.Array  # [] its place among the T
  task: Task
  start: WarmStart | None
  end: Descent | None  # where its loop ended, if it has been run already


class _TaskResult(NamedTuple):
  grad: MetaParams
  val_nll: jax.Array  # []
  phi_loss: jax.Array  # []
  inner: InnerInfo
  solve: SolveInfo | None
  warm: WarmStart | None


def make_learner(
  row: Row,
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
  batching: Batching = "auto",
  mesh: Mesh | None = None,
) -> MetaLearner:
  """Builds the learner of a row; `algorithms.py` names the rows and their defaults.

  Args:
    init_sigma: sigma_m at the start (fixed rows: for good); a number for all modules or one each.
      Modules that start at 0 are frozen for good: their parameters are held at phi, have no task
      axis and no part in the inner loop. (Outside jit, so are those whose log_sigma2 is -inf.)
    log_p_phi, log_p_sigma: log densities added to the meta-loss, negated, once for the tasks of a
      step and in its units: over the number of their validation examples (phi following l_MAP:
      over the number of tasks).
    batching, mesh: see `over_tasks`. With Inner.tol and blocks of tasks, a task that has converged
      leaves its block to the next: see `queue.py`.
  """
  check_batching(batching)
  sigma = _sigma_by_module(init_sigma, labels)
  built_frozen = frozen_modules({module: -jnp.inf if s == 0 else s for module, s in sigma.items()})
  if row.gradient == "unrolled" and inner.tol is not None:
    raise ValueError(
      "A gradient through the steps needs their number: set Inner.tol=None, or take an implicit "
      "row."
    )

  def find_mode(
    params: MetaParams, batch: Batch, key: Any, frozen: Frozen, **keywords: Any
  ) -> Mode:
    return posterior_mode(
      inner, likelihood, labels, params.phi, sigma_of(params), batch, frozen, key=key, **keywords
    )

  def sigma_of(params: MetaParams) -> dict[str, Any]:
    """log sigma^2; as a number, known before compiling, where the row leaves no choice."""
    if row.sigma != "inf":
      return params.log_sigma2
    return {m: math.inf if sigma[m] == math.inf else v for m, v in params.log_sigma2.items()}

  def moving_of(params: MetaParams, frozen: Frozen) -> Moving:
    return moving_model(likelihood, labels, params.phi, sigma_of(params), frozen)

  def val_nll(theta: PyTree, task: Task) -> jax.Array:
    nan = jnp.full([], jnp.nan, _dtype(theta))
    return nan if task.val is None else mean_nll(likelihood, theta, task.val)

  def adapted_nll(
    params: MetaParams, item: _Item, key: Any, frozen: Frozen
  ) -> tuple[jax.Array, Mode]:
    """(val_nll at theta_hat, mode), differentiable in params through the steps."""
    mode = find_mode(params, item.task.train, key, frozen, info_at_end=False)
    return val_nll(mode.theta, item.task), mode

  def unrolled(params: MetaParams, item: _Item, key: Any, frozen: Frozen) -> _TaskResult:
    value_and_grad = jax.value_and_grad(adapted_nll, has_aux=True)
    (nll, mode), grad = value_and_grad(params, item, key, frozen)
    return _TaskResult(grad, nll, nll, mode.info, None, None)

  def first_order(params: MetaParams, item: _Item, key: Any, frozen: Frozen) -> _TaskResult:
    """The gradient with z held, of a loss that itself still depends on params through z."""
    nll, mode = adapted_nll(params, item, key, frozen)

    def loss(params: MetaParams) -> jax.Array:
      model = moving_of(params, frozen)
      theta = merge(to_theta(model.phi, model.white.scale, mode.z), params.phi)
      return val_nll(theta, item.task)

    return _TaskResult(jax.grad(loss)(params), nll, nll, mode.info, None, None)

  def stationary(params: MetaParams, item: _Item, key: Any, frozen: Frozen) -> _TaskResult:
    """Gradients by the implicit function theorem, for sigma and, where phi follows it, l_PLL."""
    model, task, start = moving_of(params, frozen), item.task, item.start
    mode = find_mode(
      params,
      task.train,
      key,
      frozen,
      start=None if start is None else start.z,
      end=item.end,
      info_at_end=has_mode,
    )
    zero_sigma = jax.tree.map(jnp.zeros_like, params.log_sigma2)
    if row.phi == "map" and row.sigma == "inf":  # sigma^2 times the gradient of -l_MAP
      d_phi = jax.tree.map(lambda s, v: -s * v, model.white.scale, mode.z)
      d_phi = merge(d_phi, jax.tree.map(jnp.zeros_like, params.phi))
      nll = val_nll(mode.theta, task)
      nan = jnp.full_like(nll, jnp.nan)
      return _TaskResult(MetaParams(d_phi, zero_sigma), nll, nan, mode.info, None, None)
    nll, g = jax.value_and_grad(val_nll)(mode.theta, task)
    grad, w, solve = implicit_gradient(
      implicit,
      likelihood,
      labels,
      params.phi,
      params.log_sigma2,
      task.train,
      mode.z,
      g,
      frozen=frozen,
      start=None if start is None else start.w,
    )
    warm = None if start is None else WarmStart(mode.z, w)
    if row.phi == "predictive":
      return _TaskResult(grad, nll, nll, mode.info, solve, warm)
    d_phi, phi_loss = _map_gradient(likelihood, mode, model, task.train)
    return _TaskResult(grad._replace(phi=d_phi), nll, phi_loss, mode.info, solve, warm)

  def pooled(params: MetaParams, item: _Item, key: Any, frozen: Frozen) -> _TaskResult:
    """phi for all tasks alike: the mean negative log-likelihood of both parts at theta = phi."""
    del key, frozen
    counts = [num_examples(part, _dtype(params.phi)) for part in item.task]

    def loss(phi: PyTree) -> jax.Array:
      parts = zip(counts, item.task, strict=True)
      total = sum(n * mean_nll(likelihood, phi, part) for n, part in parts)
      return total / jnp.maximum(sum(counts), 1.0)

    nll, g = jax.value_and_grad(loss)(params.phi)
    none = InnerInfo(jnp.zeros([], jnp.int32), nll, optax.tree.norm(g), jnp.zeros([], bool))
    grad = MetaParams(g, jax.tree.map(jnp.zeros_like, params.log_sigma2))
    return _TaskResult(grad, val_nll(params.phi, item.task), nll, none, None, None)

  by_gradient = {"unrolled": unrolled, "first_order": first_order}
  of_task = pooled if row.phi == "pooled" else by_gradient.get(row.gradient, stationary)
  judges = row != Row("inf", "map", "none")  # reptile looks at no validation example
  has_mode = row.gradient == "implicit"
  in_blocks = isinstance(batching, int) and inner.tol is not None

  def run_first(
    shared: tuple[MetaParams, Any], items: _Item, frozen: Frozen, steps: Any = None
  ) -> _Item:
    """The inner loops of tasks in blocks, each leaving its block when it has converged."""
    params, key = shared
    slots = tasks_at_once(batching, shared, num_tasks(items))
    keys = None if key is None else jax.vmap(lambda number: _key_of(key, number))(items.number)
    starts = None if items.start is None else items.start.z
    train, model = items.task.train, moving_of(params, frozen)
    return items._replace(end=run_loops(inner, model, train, keys, starts, steps, slots))

  def init(params: PyTree) -> MetaState:
    dtype = validate.parameters("params", params)
    modules.check_labels(labels, params)
    phi = jax.tree.map(jnp.array, params)  # copies: donation never reaches the caller's arrays
    log_s2 = {m: jnp.asarray(2.0 * math.log(s) if s else -jnp.inf, dtype) for m, s in sigma.items()}
    opt_state = OptState(phi_optimizer.init(phi), sigma_optimizer.init(log_s2))
    return MetaState(phi, log_s2, opt_state, jnp.zeros([], jnp.int32))

  def checked(state: MetaState) -> tuple[MetaParams, Frozen]:
    """The parameters, after checks, and the modules that need no work."""
    validate.parameters("state.phi", state.phi)
    modules.check_labels(labels, state.phi)
    modules.check_modules("state.log_sigma2", state.log_sigma2, labels)
    frozen = frozen_modules(state.log_sigma2, built_frozen)
    built = {m: s for m, s in sigma.items() if m in built_frozen or row.sigma == "inf"}
    phi = hold(state.phi, state.log_sigma2, labels, built)
    return MetaParams(phi, state.log_sigma2), frozen

  def meta_gradient(
    state: MetaState,
    tasks: Task,
    key: jax.Array | None = None,
    warm: WarmStart | None = None,
  ) -> tuple[MetaParams, Metrics]:
    check_tasks(tasks, needs_val=judges)
    params, frozen = checked(state)
    dtype = _dtype(params.phi)
    if warm is not None:
      if not has_mode:
        raise ValueError("A warm start is for rows with a mode: imaml, sigma_imaml, sigma_reptile.")
      frozen = built_frozen  # as in no_start
      check_start(warm, moving(params.phi, labels, frozen), num_tasks(tasks))

    def one(shared: tuple[MetaParams, Any], item: _Item) -> tuple[Any, Any]:
      params, key = shared
      result = of_task(params, item, _key_of(key, item.number), frozen)
      counts = jnp.stack([num_examples(part, dtype) for part in item.task if part is not None])
      judged = (result.grad, result.val_nll) if item.task.val is not None else result.grad
      finite = [jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(judged)]
      ok = jnp.all(jnp.stack(finite)) & jnp.all(counts > 0)
      kept = jax.tree.map(
        lambda x: jnp.where(ok, x, jnp.zeros_like(x)),
        (result.grad, result.val_nll, result.phi_loss, counts[-1], jnp.ones([], jnp.int32)),
      )
      # A task that failed begins anew.
      again = jax.tree.map(lambda x: jnp.where(ok, x, jnp.zeros_like(x)), result.warm)
      return kept, (result.val_nll, ~ok, result.inner, result.solve, again)

    items = _Item(jnp.arange(num_tasks(tasks)), tasks, warm, None)
    first = functools.partial(run_first, frozen=frozen) if has_mode and in_blocks else None
    sums, (val_nll_t, failed, inner_info, solve_info, warm) = over_tasks(
      one, (params, key), items, batching, mesh, first
    )
    grad, loss, phi_loss, val_count, ok_count = sums
    count = jnp.maximum(ok_count, 1).astype(dtype)
    grad, loss, phi_loss = jax.tree.map(lambda x: x / count, (grad, loss, phi_loss))
    prior_weight = 1.0 / (count if row.phi == "map" else jnp.maximum(val_count, 1.0))
    if log_p_phi is not None:
      value, prior = jax.value_and_grad(log_p_phi)(state.phi)
      grad = grad._replace(phi=optax.tree.add_scale(grad.phi, -prior_weight, prior))
      phi_loss = phi_loss - prior_weight * value
    if log_p_sigma is not None and row.sigma == "learned":
      prior = jax.grad(log_p_sigma)(state.log_sigma2)
      sigma_weight = -1.0 / jnp.maximum(val_count, 1.0)
      grad = grad._replace(log_sigma2=optax.tree.add_scale(grad.log_sigma2, sigma_weight, prior))
    if row.sigma != "learned":
      grad = grad._replace(log_sigma2=optax.tree.zeros_like(grad.log_sigma2))
    metrics = Metrics(
      loss=jnp.where(ok_count > 0, loss, jnp.nan),
      phi_loss=jnp.where(ok_count > 0, phi_loss, jnp.nan),
      val_nll=val_nll_t,
      failed=failed,
      num_failed=num_tasks(tasks) - ok_count,
      inner=inner_info,
      solve=solve_info,
      phi_grad_norm=optax.tree.norm(grad.phi),
      sigma_grad=grad.log_sigma2,
      warm=warm,
    )
    return grad, metrics

  def update(
    state: MetaState,
    tasks: Task,
    key: jax.Array | None = None,
    warm: WarmStart | None = None,
  ) -> tuple[MetaState, Metrics]:
    grad, metrics = meta_gradient(state, tasks, key, warm)
    phi_step, phi_opt = phi_optimizer.update(grad.phi, state.opt_state.phi, state.phi)
    phi, log_s2 = optax.apply_updates(state.phi, phi_step), state.log_sigma2
    sigma_opt = state.opt_state.log_sigma2
    if row.sigma == "learned":
      sigma_step, sigma_opt = sigma_optimizer.update(grad.log_sigma2, sigma_opt, log_s2)
      log_s2 = cast(dict[str, jax.Array], optax.apply_updates(log_s2, sigma_step))
    new = MetaState(phi, log_s2, OptState(phi_opt, sigma_opt), state.step)
    any_task = metrics.num_failed < num_tasks(tasks)  # a step on nothing must move nothing
    new = jax.tree.map(lambda a, b: jnp.where(any_task, a, b), new, state)
    return new._replace(step=state.step + 1), metrics

  def adapt(
    state: MetaState,
    batch: Batch,
    steps: int | jax.Array | tuple[int, ...] | None = None,
    key: jax.Array | None = None,
  ) -> tuple[PyTree, InnerInfo]:
    if has_mode and not isinstance(steps, tuple):
      return map_estimate(
        likelihood,
        labels,
        state.phi,
        state.log_sigma2,
        batch,
        inner,
        implicit,
        steps=steps,
        key=key,
        frozen=built_frozen,
      )
    params, frozen = checked(state)
    check_batch("batch", batch)
    mode = find_mode(params, batch, key, frozen, steps=steps)
    return mode.theta, mode.info

  def adapt_tasks(
    state: MetaState,
    batches: Batch,
    steps: int | jax.Array | tuple[int, ...] | None = None,
    key: jax.Array | None = None,
  ) -> tuple[PyTree, InnerInfo]:
    params, frozen = checked(state)
    check_batch("batches", batches, ("T", "N"))

    def one(shared: tuple[MetaParams, Any], item: _Item) -> tuple[tuple[()], Any]:
      params, key = shared
      own = _key_of(key, item.number)
      mode = find_mode(params, item.task.train, own, frozen, steps=steps, end=item.end)
      return (), (moving(mode.theta, labels, frozen), mode.info)

    items = _Item(jnp.arange(num_tasks(batches)), Task(batches, None), None, None)
    queued = in_blocks and not isinstance(steps, tuple)
    first = functools.partial(run_first, frozen=frozen, steps=steps) if queued else None
    return over_tasks(one, (params, key), items, batching, mesh, first)[1]

  def fresh(state: MetaState, count: int) -> WarmStart:
    return no_start(moving(state.phi, labels, built_frozen), count)

  return MetaLearner(init, update, adapt, meta_gradient, adapt_tasks, fresh, labels, row)


def _key_of(key: jax.Array | None, index: jax.Array) -> jax.Array | None:
  return None if key is None else jax.random.fold_in(key, index)


def _map_gradient(
  likelihood: Likelihood, mode: Mode, model: Moving, batch: Batch
) -> tuple[PyTree, jax.Array]:
  """d/d phi of -l_MAP of one task, (phi - theta_hat) / sigma^2, without dividing by sigma.

  At the mode it equals both -z / s and G = grad -log p(D | theta), and so for every c >= 0
  (G - c s z) / (1 + c s^2), which is finite from sigma = 0 to sigma -> inf. The error of the first
  form, dz / s, and of the second, H s dz, of an inexact mode balance at c = H: c = N, a curvature
  of one an example, is taken. Also returns the negative log joint less its normaliser [].
  """

  def nll(theta: PyTree) -> jax.Array:
    return -masked_log_prob(likelihood, likelihood.predict(theta, batch.inputs), batch)

  value, g = jax.value_and_grad(nll)(mode.theta)
  c = num_examples(batch, value.dtype)
  balanced = lambda s, v, g: (g - c * s * v) / (1.0 + c * s * s)
  # Of frozen modules, None in s and z, sigma is 0: G it is.
  none = lambda x: x is None
  moved = lambda s, v, g: g if s is None else balanced(s, v, g)
  grad = jax.tree.map(moved, model.white.scale, mode.z, g, is_leaf=none)
  return grad, value + 0.5 * optax.tree.norm(mode.z, squared=True)


def _sigma_by_module(
  init_sigma: float | Mapping[str, float], labels: modules.Labels
) -> dict[str, float]:
  if isinstance(init_sigma, Mapping):
    modules.check_modules("init_sigma", init_sigma, labels)
    sigma = {module: float(value) for module, value in init_sigma.items()}
  else:
    sigma = dict.fromkeys(modules.names(labels), float(init_sigma))
  for module, value in sigma.items():
    if not value >= 0:
      raise ValueError(f"init_sigma is a standard deviation; got {value} for module {module!r}.")
  return sigma


def _dtype(phi: PyTree) -> jnp.dtype:
  return jnp.result_type(jax.tree.leaves(phi)[0])
