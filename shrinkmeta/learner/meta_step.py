"""One step of phi and sigma, from the sums over the tasks of a meta-batch."""

from typing import Any, cast

import jax
import jax.numpy as jnp
import optax

from shrinkmeta.base import MetaParams, MetaState, Metrics, OptState, PerTask, Sums
from shrinkmeta.checks import validate
from shrinkmeta.config import Spec
from shrinkmeta.curvature import vectors
from shrinkmeta.learner.sigma import finite_or_zero, of_finite
from shrinkmeta.model.tasks import divisor

PyTree = Any


def gradient_from(
  spec: Spec, state: MetaState, sums: Sums, per_task: PerTask
) -> tuple[MetaParams, Metrics]:
  """Return (the gradient that an update follows, the metrics).

  The gradient is the mean over the tasks that did not fail, minus the gradients of log_p_phi / n
  and log_p_sigma / n: see `make_learner`.
  """
  algorithm, dtype = spec.algorithm, sums.loss.dtype
  count = jnp.maximum(sums.sound, 1).astype(dtype)
  grad, loss, phi_loss, mean_inner, mean_solve = jax.tree.map(
    lambda x: x / count, (sums.grad, sums.loss, sums.phi_loss, sums.inner, sums.solve)
  )
  by_tasks, by_examples = 1.0 / count, 1.0 / divisor(sums.judged)
  if spec.log_p_phi is not None:
    weight = by_examples if algorithm.phi in ("predictive", "pooled") else by_tasks
    value, prior = jax.value_and_grad(spec.log_p_phi)(state.phi)
    grad = grad._replace(phi=optax.tree.add_scale(grad.phi, -weight, prior))
    phi_loss = phi_loss - weight * value
  if spec.log_p_sigma is not None:
    prior = jax.grad(of_finite(spec.log_p_sigma))(state.log_sigma2)
    weight = -by_tasks if algorithm.phi == "evidence" else -by_examples
    grad = grad._replace(log_sigma2=optax.tree.add_scale(grad.log_sigma2, weight, prior))
  if algorithm.sigma != "learned":
    grad = grad._replace(log_sigma2=optax.tree.zeros_like(grad.log_sigma2))
  # The sums have at least 32 bits. The means take the dtypes of the parameters and losses.
  narrow = lambda x, like: x.astype(jnp.result_type(like))
  grad = jax.tree.map(narrow, grad, MetaParams(state.phi, state.log_sigma2))
  loss = loss.astype(per_task.val_nll.dtype)
  phi_loss = phi_loss.astype(jnp.result_type(per_task.val_nll, per_task.inner.objective))
  any_of_phi = jax.tree.leaves(state.phi)[0]
  mean_inner, mean_solve = jax.tree.map(lambda x: narrow(x, any_of_phi), (mean_inner, mean_solve))
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
    phi_grad_norm=vectors.norm(grad.phi),
    task_grad_norm=per_task.grad_norm,
    sigma_grad=grad.log_sigma2,
    warm=per_task.warm,
  )
  return grad, metrics


def apply(spec: Spec, state: MetaState, sums: Sums, per_task: PerTask) -> tuple[MetaState, Metrics]:
  """Take one step of phi and sigma from the sums over all tasks of a meta-batch.

  Optimisers that need the loss (`reduce_on_plateau`, Polyak's step sizes) get it as `value`. For
  phi it is metrics.phi_loss. For sigma it is metrics.loss, or metrics.phi_loss if sigma follows the
  evidence.

  Args:
    state: the MetaState at which the sums were computed.
    sums: the Sums of all tasks of the meta-batch.
    per_task: the PerTask of the same tasks.

  Returns:
    (the next MetaState, Metrics). If every task failed, or the gradient is not finite, only `step`
    changes.

  Raises:
    TypeError: an argument has the wrong type.

  >>> import shrinkmeta as sm
  >>> learner = sm.maml(sm.gaussian(lambda theta, x: x * theta["w"]), {"w": "w"})
  >>> batch = sm.Batch(jnp.ones([3, 4]), jnp.ones([3, 4]))  # three tasks of four examples
  >>> state = learner.init({"w": 0.0})
  >>> new, metrics = learner.apply(state, *learner.sums(state, sm.Task(batch, batch)))
  >>> int(new.step)
  1
  """
  for name, value, kind in (
    ("state", state, MetaState),
    ("sums", sums, Sums),
    ("per_task", per_task, PerTask),
  ):
    if not isinstance(value, kind):
      hint = "Pass what learner.init, and learner.sums, returned."
      validate.instance(name, value, kind, f"a {kind.__name__}", hint)
  grad, metrics = gradient_from(spec, state, sums, per_task)
  optimizer = optax.with_extra_args_support(spec.phi_optimizer)
  phi_step, phi_opt = optimizer.update(
    grad.phi, state.opt_state.phi, state.phi, value=metrics.phi_loss, grad=grad.phi
  )
  phi, log_s2 = optax.apply_updates(state.phi, phi_step), state.log_sigma2
  sigma_opt = state.opt_state.log_sigma2
  if spec.algorithm.sigma == "learned":
    optimizer, finite = optax.with_extra_args_support(spec.sigma_optimizer), finite_or_zero(log_s2)
    value = metrics.phi_loss if spec.algorithm.phi == "evidence" else metrics.loss
    # Log sigma^2 = -inf and +inf stay as they are. The optimiser sees 0 there: a norm over all
    # modules, or weight decay, would make the others NaN (docs/hazards.md#weight-decay-infinity).
    known = lambda old, new: jnp.where(jnp.isfinite(old), new, jnp.zeros_like(new))
    slope = jax.tree.map(known, log_s2, grad.log_sigma2)
    sigma_step, sigma_opt = optimizer.update(slope, sigma_opt, finite, value=value, grad=slope)
    moved = cast(dict[str, jax.Array], optax.apply_updates(finite, sigma_step))
    keep = lambda old, new: jnp.where(jnp.isfinite(old), new, old)
    log_s2 = jax.tree.map(keep, log_s2, moved)
  new = MetaState(phi, log_s2, OptState(phi_opt, sigma_opt), state.step)
  state, constants = state._replace(constants=None), state.constants
  # Take no step if every task failed, or if the gradient is not finite. The gradients of the tasks
  # in the sum are finite, but their sum and the gradient of a prior may not be.
  moves = (sums.sound > 0) & jnp.isfinite(metrics.phi_grad_norm)
  moves &= jnp.isfinite(vectors.norm(metrics.sigma_grad))
  new = jax.tree.map(lambda a, b: jnp.where(moves, a, b), new, state)
  return new._replace(step=state.step + 1, constants=constants), metrics
