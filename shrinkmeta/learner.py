"""One meta-learner for the whole family: a row of choices, and what follows from it.

The meta-loss is the mean over tasks of the mean validation negative log-likelihood at theta_hat;
where phi follows l_MAP it is the mean over tasks of the training negative log joint. Each task
gives its gradient with respect to (phi, log sigma^2); a task whose loss or gradient is not finite
is left out of the step and counted.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from shrinkmeta import modules, validate
from shrinkmeta.batching import Batching, num_tasks, over_tasks
from shrinkmeta.density import masked_log_prob
from shrinkmeta.hyperprior import SigmaPrior
from shrinkmeta.implicit import Implicit, MetaParams, implicit_gradient, map_estimate
from shrinkmeta.inner import Inner, InnerInfo, minimise
from shrinkmeta.likelihood import Likelihood
from shrinkmeta.solvers import SolveInfo
from shrinkmeta.tasks import Batch, Task, check_batch, check_tasks, num_examples
from shrinkmeta.whitening import Whitening, to_theta, whitening

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


class MetaLearner(NamedTuple):
  """An algorithm as pure functions; `jax.jit` them at the edge.

  init(params) -> MetaState
  update(state, tasks, key=None) -> (MetaState, Metrics)
  adapt(state, batch, steps=None, key=None) -> (theta, InnerInfo), for one task
  meta_gradient(state, tasks, key=None) -> (MetaParams, Metrics)

  `key` is needed with Inner.batch_size only. `steps` replaces the learner's own: an int, or an
  increasing tuple [S] that records one run, so that theta and info lead with [S].
  """

  init: Callable[[PyTree], MetaState]
  update: Callable[..., tuple[MetaState, Metrics]]
  adapt: Callable[..., tuple[PyTree, InnerInfo]]
  meta_gradient: Callable[..., tuple[MetaParams, Metrics]]
  labels: modules.Labels
  row: Row


class _TaskResult(NamedTuple):
  grad: MetaParams
  val_nll: jax.Array  # []
  phi_loss: jax.Array  # []
  inner: InnerInfo
  solve: SolveInfo | None


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
  batching: Batching = "vmap",
  mesh: Mesh | None = None,
) -> MetaLearner:
  """Builds the learner of a row; `algorithms.py` names the rows and their defaults.

  Args:
    init_sigma: sigma_m at the start (fixed rows: for good); a number for all modules or one each.
    log_p_phi, log_p_sigma: log densities added to the meta-loss, negated, once for the tasks of a
      step and in its units: over the number of their validation examples (phi following l_MAP:
      over the number of tasks).
    batching, mesh: see `over_tasks`.
  """
  sigma = _sigma_by_module(init_sigma, labels)
  if row.gradient == "unrolled" and inner.tol is not None:
    raise ValueError(
      "A gradient through the steps needs their number: set Inner.tol=None, or take an implicit "
      "row."
    )

  def val_nll(theta: PyTree, batch: Batch) -> jax.Array:
    log_p = masked_log_prob(likelihood, likelihood.predict(theta, batch.inputs), batch)
    return -log_p / jnp.maximum(num_examples(batch, log_p.dtype), 1.0)

  def adapted_nll(params: MetaParams, task: Task, key: Any) -> tuple[Any, tuple[Any, InnerInfo]]:
    """(val_nll at theta_hat, (z, info)), differentiable in params through the steps."""
    white = whitening(params.log_sigma2, labels, _dtype(params.phi))
    z, info = minimise(inner, likelihood, params.phi, white, task.train, key=key)
    return val_nll(to_theta(params.phi, white.scale, z), task.val), (z, info)

  def unrolled(params: MetaParams, task: Task, key: Any) -> _TaskResult:
    (nll, (_, info)), grad = jax.value_and_grad(adapted_nll, has_aux=True)(params, task, key)
    return _TaskResult(grad, nll, nll, info, None)

  def first_order(params: MetaParams, task: Task, key: Any) -> _TaskResult:
    """The gradient with z held, of a loss that itself still depends on params through z."""
    nll, (z, info) = adapted_nll(params, task, key)

    def loss(params: MetaParams) -> jax.Array:
      white = whitening(params.log_sigma2, labels, _dtype(params.phi))
      return val_nll(to_theta(params.phi, white.scale, z), task.val)

    return _TaskResult(jax.grad(loss)(params), nll, nll, info, None)

  def stationary(params: MetaParams, task: Task, key: Any) -> _TaskResult:
    """Gradients by the implicit function theorem, for sigma and, where phi follows it, l_PLL."""
    white = whitening(params.log_sigma2, labels, _dtype(params.phi))
    z, info = minimise(inner, likelihood, params.phi, white, task.train, key=key)
    theta = to_theta(params.phi, white.scale, z)
    nll, g = jax.value_and_grad(val_nll)(theta, task.val)
    phi_loss, solve = nll, None
    grad = MetaParams(g, jax.tree.map(jnp.zeros_like, params.log_sigma2))
    if row.gradient == "implicit":
      grad, _, solve = implicit_gradient(
        implicit, likelihood, labels, params.phi, white, task.train, z, g
      )
    if row.phi == "map" and row.sigma == "inf":  # sigma^2 times the gradient of -l_MAP
      grad = grad._replace(phi=jax.tree.map(lambda s, v: -s * v, white.scale, z))
      phi_loss = jnp.full_like(nll, jnp.nan)
    elif row.phi == "map":
      phi_grad, phi_loss = _map_gradient(likelihood, params.phi, white, task.train, z)
      grad = grad._replace(phi=phi_grad)
    return _TaskResult(grad, nll, phi_loss, info, solve)

  def pooled(params: MetaParams, task: Task, key: Any) -> _TaskResult:
    """phi for all tasks alike: the mean negative log-likelihood of both parts at theta = phi."""
    del key
    counts = [num_examples(part, _dtype(params.phi)) for part in task]

    def loss(phi: PyTree) -> jax.Array:
      total = sum(n * val_nll(phi, part) for n, part in zip(counts, task, strict=True))
      return total / jnp.maximum(sum(counts), 1.0)

    nll, g = jax.value_and_grad(loss)(params.phi)
    none = InnerInfo(jnp.zeros([], jnp.int32), nll, optax.tree.norm(g), jnp.zeros([], bool))
    grad = MetaParams(g, jax.tree.map(jnp.zeros_like, params.log_sigma2))
    return _TaskResult(grad, val_nll(params.phi, task.val), nll, none, None)

  by_gradient = {"unrolled": unrolled, "first_order": first_order}
  of_task = pooled if row.phi == "pooled" else by_gradient.get(row.gradient, stationary)

  def init(params: PyTree) -> MetaState:
    dtype = validate.parameters("params", params)
    modules.check_labels(labels, params)
    phi = jax.tree.map(jnp.array, params)  # copies: donation never reaches the caller's arrays
    log_s2 = {m: jnp.asarray(2.0 * math.log(s) if s else -jnp.inf, dtype) for m, s in sigma.items()}
    opt_state = OptState(phi_optimizer.init(phi), sigma_optimizer.init(log_s2))
    return MetaState(phi, log_s2, opt_state, jnp.zeros([], jnp.int32))

  def meta_gradient(
    state: MetaState, tasks: Task, key: jax.Array | None = None
  ) -> tuple[MetaParams, Metrics]:
    check_tasks(tasks)
    modules.check_labels(labels, state.phi)
    modules.check_modules("state.log_sigma2", state.log_sigma2, labels)
    validate.parameters("state.phi", state.phi)
    params = MetaParams(state.phi, state.log_sigma2)
    dtype = _dtype(state.phi)

    def one(shared: tuple[MetaParams, Any], indexed: tuple[jax.Array, Task]) -> tuple[Any, Any]:
      (params, key), (index, task) = shared, indexed
      result = of_task(params, task, None if key is None else jax.random.fold_in(key, index))
      counts = jnp.stack([num_examples(part, dtype) for part in task])
      finite = [jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves((result.grad, result.val_nll))]
      ok = jnp.all(jnp.stack(finite)) & jnp.all(counts > 0)
      kept = jax.tree.map(
        lambda x: jnp.where(ok, x, jnp.zeros_like(x)),
        (result.grad, result.val_nll, result.phi_loss, counts[1], jnp.ones([], jnp.int32)),
      )
      return kept, (result.val_nll, ~ok, result.inner, result.solve)

    indexed = (jnp.arange(num_tasks(tasks)), tasks)
    sums, (val_nll_t, failed, inner_info, solve_info) = over_tasks(
      one, (params, key), indexed, batching, mesh
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
    )
    return grad, metrics

  def update(
    state: MetaState, tasks: Task, key: jax.Array | None = None
  ) -> tuple[MetaState, Metrics]:
    grad, metrics = meta_gradient(state, tasks, key)
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
    validate.parameters("state.phi", state.phi)
    if row.gradient == "implicit" and not isinstance(steps, tuple):
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
      )
    modules.check_labels(labels, state.phi)
    check_batch("batch", batch)
    white = whitening(state.log_sigma2, labels, _dtype(state.phi))
    z, info = minimise(inner, likelihood, state.phi, white, batch, steps=steps, key=key)
    return to_theta(state.phi, white.scale, z), info

  return MetaLearner(init, update, adapt, meta_gradient, labels, row)


def _map_gradient(
  likelihood: Likelihood, phi: PyTree, white: Whitening, batch: Batch, z: PyTree
) -> tuple[PyTree, jax.Array]:
  """d/d phi of -l_MAP of one task, (phi - theta_hat) / sigma^2, without dividing by sigma.

  At the mode it equals both -z / s and G = grad -log p(D | theta), and so for every c >= 0
  (G - c s z) / (1 + c s^2), which is finite from sigma = 0 to sigma -> inf. The error of the first
  form, dz / s, and of the second, H s dz, of an inexact mode balance at c = H: c = N, a curvature
  of one an example, is taken. Also returns the negative log joint less its normaliser [].
  """

  def nll(theta: PyTree) -> jax.Array:
    return -masked_log_prob(likelihood, likelihood.predict(theta, batch.inputs), batch)

  value, g = jax.value_and_grad(nll)(to_theta(phi, white.scale, z))
  c = num_examples(batch, value.dtype)
  grad = jax.tree.map(lambda g, s, v: (g - c * s * v) / (1.0 + c * s * s), g, white.scale, z)
  return grad, value + 0.5 * optax.tree.norm(z, squared=True)


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
