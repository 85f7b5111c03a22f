"""One meta-learner for the whole family: a row of choices, and what follows from it.

The meta-loss is the mean over tasks of the mean validation negative log-likelihood at theta_hat;
where phi follows l_MAP it is the mean over tasks of the training negative log joint, and where phi
and sigma follow the evidence, of the negative log evidence of the training data. Each task gives
its gradient with respect to (phi, log sigma^2); a task whose loss or gradient is not finite
is left out of the step and counted.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from shrinkmeta import validate
from shrinkmeta.base import MetaLearner, MetaState, Metrics, OptState
from shrinkmeta.devices.batching import Batching, check_batching, num_tasks, over_tasks
from shrinkmeta.gradients.implicit import (
  Implicit,
  MetaParams,
  check_dual,
  check_whole,
  map_estimate,
)
from shrinkmeta.gradients.log_det import LogDet
from shrinkmeta.gradients.per_task import (
  Algorithm,
  Item,
  SigmaGradient,
  Spec,
  check_row,
  check_sigma_gradient,
  mode_of,
)
from shrinkmeta.gradients.total import (
  PerTask,
  Sums,
  in_blocks,
  key_of,
  needs_validation,
  run_first,
  sums_over_tasks,
)
from shrinkmeta.mode.frozen import Frozen, as_built, frozen_modules, moving
from shrinkmeta.mode.optimise import Inner, InnerInfo
from shrinkmeta.mode.warm_start import WarmStart, check_start, no_start
from shrinkmeta.model import modules
from shrinkmeta.model.likelihood import Likelihood
from shrinkmeta.model.priors import SigmaPrior
from shrinkmeta.model.tasks import Batch, Task, check_batch, check_tasks, divisor

PyTree = Any


def make_learner(
  row: Algorithm,
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
  """Builds the learner of a row; `algorithms.py` names the rows and their defaults.

  Args:
    init_sigma: sigma_m at the start (fixed rows: for good); a number for all modules or one each.
      Modules that start at 0 are frozen for good: their parameters are held at phi, have no task
      axis and no part in the inner loop. (Outside jit, so are those whose log_sigma2 is -inf.)
    log_p_phi, log_p_sigma: log densities added to the meta-loss, negated, once for the tasks of a
      step and in its units: over the number of their validation examples (pooled rows: of all their
      examples; phi following l_MAP, and both following the evidence: over the number of tasks).
    log_det, restricted: of rows that follow the evidence. `restricted` names modules of phi that
      are integrated out too (REML), for linear-Gaussian models: see `restriction`.
    sigma_gradient: of sigma where phi follows l_MAP: through both levels, "joint" (see `joint.py`);
      with phi held, "per_task"; without the curvature of the loss, "diagonal".
    batching, mesh: see `over_tasks`. With Inner.tol and blocks of tasks, a task that has converged
      leaves its block to the next: see `queue.py`.
  """
  check_row(row)
  check_batching(batching)
  sigma = _sigma_by_module(init_sigma, labels)
  log_sigma2 = {m: 2.0 * math.log(s) if s else -math.inf for m, s in sigma.items()}
  built_frozen = frozen_modules(log_sigma2)
  if row.gradient == "unrolled" and inner.tol is not None:
    raise ValueError(
      "A gradient through the steps needs their number: set Inner.tol=None, or take an implicit "
      "row."
    )
  if not row.prior and row.gradient not in ("unrolled", "first_order"):
    raise ValueError("Without a prior there is no mode: the gradient goes through the steps.")
  if restricted and row.phi != "evidence":
    raise ValueError("restricted belongs to empirical_bayes, the row that follows the evidence.")
  if log_det != LogDet() and row.phi != "evidence":
    raise ValueError("log_det belongs to empirical_bayes, the row that follows the evidence.")
  if log_p_sigma is not None and row.sigma != "learned":
    raise ValueError("log_p_sigma is a prior on a sigma that is learned; this row has a fixed one.")
  if isinstance(restricted, str) or not set(restricted) <= set(modules.names(labels)):
    raise ValueError(
      f"restricted must be a tuple of modules; got {restricted!r}, and the modules are "
      f"{modules.names(labels)}."
    )
  if row.sigma == "inf" and not set(sigma.values()) <= {0.0, math.inf}:
    raise ValueError(
      f"This row has no finite sigma: init_sigma is 0, for what is frozen, or inf; got {sigma}."
    )
  check_sigma_gradient(row, sigma_gradient)
  if row.phi == "evidence" or sigma_gradient == "joint":
    check_whole(implicit)
  if sigma_gradient == "joint" and implicit.solver != "cg":
    raise ValueError(
      f'sigma_gradient="joint" is solved by CG: implicit.solver is {implicit.solver!r}.'
    )
  if sigma_gradient == "diagonal":
    implicit = dataclasses.replace(implicit, solver="identity", batch_size=None, num_batches=1)
  if row.gradient == "implicit":
    check_dual(implicit, log_sigma2)
  if row.phi == "evidence" and math.inf in sigma.values():
    raise ValueError("Without a prior on theta there is no evidence: init_sigma must be finite.")

  spec = Spec(
    row,
    likelihood,
    labels,
    inner,
    implicit,
    log_det,
    sigma,
    sigma_gradient,
    tuple(restricted),
    log_p_phi,
    log_p_sigma,
    batching,
    mesh,
  )
  has_mode = row.gradient == "implicit"

  def init(params: PyTree) -> MetaState:
    dtype = validate.parameters("params", params)
    modules.check_labels(labels, params)
    # Copies, as donation never reaches the caller's arrays; of a type that no step changes, where
    # params holds Python's numbers.
    phi = jax.tree.map(lambda p: jnp.array(p, dtype), params)
    log_s2 = {m: jnp.asarray(v, dtype) for m, v in log_sigma2.items()}
    opt_state = OptState(phi_optimizer.init(phi), sigma_optimizer.init(log_s2))
    return MetaState(phi, log_s2, opt_state, jnp.zeros([], jnp.int32))

  def checked(state: MetaState) -> tuple[MetaParams, Frozen]:
    """The parameters, after checks, and the modules that need no work."""
    validate.parameters("state.phi", state.phi)
    modules.check_labels(labels, state.phi)
    modules.check_modules("state.log_sigma2", state.log_sigma2, labels)
    frozen = frozen_modules(state.log_sigma2, built_frozen)
    built = {m: s for m, s in sigma.items() if m in built_frozen or row.sigma == "inf"}
    phi = as_built(state.phi, state.log_sigma2, labels, built)
    return MetaParams(phi, state.log_sigma2), frozen

  def sums(
    state: MetaState,
    tasks: Task,
    key: jax.Array | None = None,
    warm: WarmStart | None = None,
    first: jax.typing.ArrayLike = 0,
  ) -> tuple[Sums, PerTask]:
    check_tasks(tasks, needs_val=needs_validation(row))
    params, frozen = checked(state)
    if warm is not None:
      if not has_mode:
        raise ValueError(
          "A warm start is for rows with a mode: imaml, sigma_imaml, sigma_reptile, "
          "empirical_bayes."
        )
      frozen = built_frozen  # as in no_start
      check_start(warm, moving(params.phi, labels, frozen), num_tasks(tasks))
    return sums_over_tasks(spec, params, frozen, tasks, key, warm, first)

  def gradient_from(state: MetaState, sums: Sums, per_task: PerTask) -> tuple[MetaParams, Metrics]:
    """The mean over sound tasks, with the priors on phi and sigma."""
    dtype = sums.loss.dtype
    count = jnp.maximum(sums.sound, 1).astype(dtype)
    grad, loss, phi_loss, mean_inner, mean_solve = jax.tree.map(
      lambda x: x / count, (sums.grad, sums.loss, sums.phi_loss, sums.inner, sums.solve)
    )
    by_tasks, by_examples = 1.0 / count, 1.0 / divisor(sums.judged)
    prior_weight = by_examples if row.phi in ("predictive", "pooled") else by_tasks
    if log_p_phi is not None:
      value, prior = jax.value_and_grad(log_p_phi)(state.phi)
      grad = grad._replace(phi=optax.tree.add_scale(grad.phi, -prior_weight, prior))
      phi_loss = phi_loss - prior_weight * value
    if log_p_sigma is not None:
      prior = jax.grad(log_p_sigma)(state.log_sigma2)
      sigma_weight = -by_tasks if row.phi == "evidence" else -by_examples
      grad = grad._replace(log_sigma2=optax.tree.add_scale(grad.log_sigma2, sigma_weight, prior))
    if row.sigma != "learned":
      grad = grad._replace(log_sigma2=optax.tree.zeros_like(grad.log_sigma2))
    metrics = Metrics(
      loss=jnp.where(sums.sound > 0, loss, jnp.nan),
      phi_loss=jnp.where(sums.sound > 0, phi_loss, jnp.nan),
      val_nll=per_task.val_nll,
      failed=per_task.failed,
      num_failed=sums.tasks - sums.sound,
      num_sound=sums.sound,
      inner=per_task.inner,
      solve=per_task.solve,
      mean_inner=mean_inner,
      mean_solve=mean_solve,
      phi_grad_norm=optax.tree.norm(grad.phi),
      sigma_grad=grad.log_sigma2,
      warm=per_task.warm,
    )
    return grad, metrics

  def meta_gradient(
    state: MetaState,
    tasks: Task,
    key: jax.Array | None = None,
    warm: WarmStart | None = None,
  ) -> tuple[MetaParams, Metrics]:
    return gradient_from(state, *sums(state, tasks, key, warm))

  def apply(state: MetaState, sums: Sums, per_task: PerTask) -> tuple[MetaState, Metrics]:
    grad, metrics = gradient_from(state, sums, per_task)
    phi_step, phi_opt = phi_optimizer.update(grad.phi, state.opt_state.phi, state.phi)
    phi, log_s2 = optax.apply_updates(state.phi, phi_step), state.log_sigma2
    sigma_opt = state.opt_state.log_sigma2
    if row.sigma == "learned":
      sigma_step, sigma_opt = sigma_optimizer.update(grad.log_sigma2, sigma_opt, log_s2)
      moved = cast(dict[str, jax.Array], optax.apply_updates(log_s2, sigma_step))
      # Frozen and free modules stay: with weight decay a step from -inf is NaN.
      keep = lambda old, new: jnp.where(jnp.isfinite(old), new, old)
      log_s2 = jax.tree.map(keep, log_s2, moved)
    new = MetaState(phi, log_s2, OptState(phi_opt, sigma_opt), state.step)
    # A step on nothing must move nothing, nor one by a prior's or a sum's gradient of no number.
    moves = (sums.sound > 0) & jnp.isfinite(metrics.phi_grad_norm)
    moves &= jnp.isfinite(optax.tree.norm(metrics.sigma_grad))
    new = jax.tree.map(lambda a, b: jnp.where(moves, a, b), new, state)
    return new._replace(step=state.step + 1), metrics

  def update(
    state: MetaState,
    tasks: Task,
    key: jax.Array | None = None,
    warm: WarmStart | None = None,
  ) -> tuple[MetaState, Metrics]:
    return apply(state, *sums(state, tasks, key, warm))

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
    mode = mode_of(spec, params, batch, key, frozen, steps=steps)
    return mode.theta, mode.info

  def adapt_tasks(
    state: MetaState,
    batches: Batch,
    steps: int | jax.Array | tuple[int, ...] | None = None,
    key: jax.Array | None = None,
  ) -> tuple[PyTree, InnerInfo]:
    params, frozen = checked(state)
    check_batch("batches", batches, ("T", "N"))

    def one(shared: tuple[MetaParams, Any], item: Item) -> tuple[tuple[()], Any]:
      params, key = shared
      own = key_of(key, item.number)
      mode = mode_of(spec, params, item.task.train, own, frozen, steps=steps, end=item.end)
      return (), (moving(mode.theta, labels, frozen), mode.info)

    items = Item(jnp.arange(num_tasks(batches)), Task(batches, None), None, None)
    queued = in_blocks(spec) and not isinstance(steps, tuple)
    first = functools.partial(run_first, spec, frozen, steps, lambda key: key) if queued else None
    return over_tasks(one, (params, key), items, batching, mesh, first)[1]

  def fresh(state: MetaState, count: int) -> WarmStart:
    return no_start(moving(state.phi, labels, built_frozen), count)

  return MetaLearner(init, update, adapt, meta_gradient, adapt_tasks, fresh, sums, apply, spec)


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
