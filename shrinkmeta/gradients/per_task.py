"""The meta-gradient of one task: one function for each kind of algorithm.

Each function takes (spec, model, item, key) and returns a `TaskResult`: the gradient of the task's
meta-loss with respect to (phi, log sigma^2), and the numbers that the metrics report.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from shrinkmeta.base import InnerInfo, MetaParams, SolveInfo, WarmStart
from shrinkmeta.config import Spec
from shrinkmeta.gradients.evidence import evidence_at
from shrinkmeta.gradients.implicit import implicit_gradient
from shrinkmeta.mode.frozen import merge
from shrinkmeta.mode.optimise import Descent, Mode, absent, nll_and_gradient, posterior_mode
from shrinkmeta.mode.task_model import TaskModel
from shrinkmeta.model.likelihood import mean_nll
from shrinkmeta.model.tasks import Task, divisor, num_examples

PyTree = Any


class Item(NamedTuple):
  """One task as a learner sees it."""

  number: jax.Array  # [] its place among the T tasks of the update
  task: Task
  start: WarmStart | None
  end: Descent | None  # where its loop ended, if it has been run already


class Ends(NamedTuple):
  """What the joint gradient of sigma needs of every task."""

  z: PyTree  # the mode, of the modules that move
  g: PyTree  # d val_nll / d theta there


class TaskResult(NamedTuple):
  """What one task adds, and how it went."""

  grad: MetaParams
  val_nll: jax.Array  # [] nats per example; NaN without validation data
  phi_loss: jax.Array  # [] what phi follows
  inner: InnerInfo
  solve: SolveInfo | None = None
  warm: WarmStart | None = None
  ends: Ends | None = None


PerTaskGradient = Callable[[Spec, TaskModel, Item, Any], TaskResult]


def gradient_of(spec: Spec) -> PerTaskGradient:
  """Return the function of this file that belongs to an algorithm."""
  algorithm = spec.algorithm
  if algorithm.phi in ("pooled", "evidence"):
    return pooled if algorithm.phi == "pooled" else by_evidence
  if algorithm.gradient == "implicit":
    return joint if spec.sigma_gradient == "joint" else stationary
  return {"unrolled": unrolled, "first_order": first_order, "none": reptile}[algorithm.gradient]


def unrolled(spec: Spec, model: TaskModel, item: Item, key: Any) -> TaskResult:
  """Differentiate val_nll at theta_hat backwards through the inner steps."""
  mode_at = lambda params: posterior_mode(spec.inner, model.at(params), key=key, info_at_end=False)
  judged = lambda params: _judged(model, mode_at(params), item.task)
  (nll, mode), grad = jax.value_and_grad(judged, has_aux=True)(model.params)
  return TaskResult(grad, nll, nll, mode.info)


def first_order(spec: Spec, model: TaskModel, item: Item, key: Any) -> TaskResult:
  """Differentiate val_nll at theta = phi + s z with z held at z_hat."""
  mode = posterior_mode(spec.inner, model, key=key, info_at_end=False)
  loss = lambda params: _val_nll(model, model.at(params).theta(mode.z), item.task)
  nll, grad = jax.value_and_grad(loss)(model.params)
  return TaskResult(grad, nll, nll, mode.info)


def reptile(spec: Spec, model: TaskModel, item: Item, key: Any) -> TaskResult:
  """Return sigma^2 times the gradient of -l_MAP in phi: phi - theta_hat = -s z_hat."""
  mode = posterior_mode(spec.inner, model, key=key, info_at_end=False, **_from(item))
  d_phi = jax.tree.map(lambda s, v: -s * v, model.white.scale, mode.z)
  zero = optax.tree.zeros_like(model.params)
  nll = _val_nll(model, mode.theta, item.task)
  grad = zero._replace(phi=merge(d_phi, zero.phi))
  return TaskResult(grad, nll, absent(nll.dtype), mode.info)


def stationary(spec: Spec, model: TaskModel, item: Item, key: Any) -> TaskResult:
  """Differentiate val_nll implicitly, for sigma and, where phi follows l_PLL, for phi too."""
  start, follows_map = item.start, spec.algorithm.phi == "map"
  begin, needed = _from(item), spec.algorithm.phi != "map"
  mode = posterior_mode(spec.inner, model, key=key, info_at_end=needed, **begin)
  nll, g = jax.value_and_grad(lambda theta: _val_nll(model, theta, item.task))(mode.theta)
  from_w = None if start is None else start.w
  grad, w, solve = implicit_gradient(spec.implicit, model, mode.z, g, start=from_w, key=key)
  warm = None if start is None else WarmStart(mode.z, w)
  if not follows_map:
    return TaskResult(grad, nll, nll, mode.info, solve, warm)
  d_phi, phi_loss, info = _map_gradient(spec, model, mode, key)
  return TaskResult(grad._replace(phi=d_phi), nll, phi_loss, info, solve, warm)


def joint(spec: Spec, model: TaskModel, item: Item, key: Any) -> TaskResult:
  """Compute phi's gradient as `stationary` does; `joint.py` computes sigma's from all tasks."""
  mode = posterior_mode(spec.inner, model, key=key, info_at_end=False, **_from(item))
  nll, g = jax.value_and_grad(lambda theta: _val_nll(model, theta, item.task))(mode.theta)
  d_phi, phi_loss, info = _map_gradient(spec, model, mode, key)
  grad = optax.tree.zeros_like(model.params)._replace(phi=d_phi)
  return TaskResult(grad, nll, phi_loss, info, warm=_only_z(item, mode), ends=Ends(mode.z, g))


def by_evidence(spec: Spec, model: TaskModel, item: Item, key: Any) -> TaskResult:
  """Return the gradient of -log evidence of the training data, by Laplace's approximation."""
  probe_key = None if key is None else jax.random.split(key)[1]
  mode = posterior_mode(spec.inner, model, key=key_of_loop(spec, key), **_from(item))
  value, grad, info, _ = evidence_at(
    model, mode, implicit=spec.implicit, how=spec.log_det, key=probe_key
  )
  grad, warm = optax.tree.scale(-1.0, grad), _only_z(item, mode)
  nll = _val_nll(model, mode.theta, item.task)
  return TaskResult(grad, nll, -value, mode.info, info.solve, warm)


def pooled(spec: Spec, model: TaskModel, item: Item, key: Any) -> TaskResult:
  """Differentiate the mean NLL of all examples, train and val together, at theta = phi."""
  del spec, key
  counts = [num_examples(part, model.n.dtype) for part in item.task]

  def loss(phi: PyTree) -> jax.Array:
    parts = zip(counts, item.task, strict=True)
    total = sum(n * mean_nll(model.likelihood, phi, part) for n, part in parts)
    return total / divisor(jnp.asarray(sum(counts)))

  phi, log_sigma2 = model.params
  nll, g = jax.value_and_grad(loss)(phi)
  none = InnerInfo(jnp.zeros([], jnp.int32), nll, optax.tree.norm(g), jnp.zeros([], bool))
  grad = MetaParams(g, jax.tree.map(jnp.zeros_like, log_sigma2))
  return TaskResult(grad, _val_nll(model, phi, item.task), nll, none)


def key_of_loop(spec: Spec, key: Any) -> Any:
  """Return the key of a task's inner loop; the determinant of the evidence draws with another."""
  return jax.random.split(key)[0] if key is not None and spec.algorithm.phi == "evidence" else key


def _judged(model: TaskModel, mode: Mode, task: Task) -> tuple[jax.Array, Mode]:
  """Return (val_nll at a mode [], the mode)."""
  return _val_nll(model, mode.theta, task), mode


def _from(item: Item) -> dict[str, Any]:
  """Return where a task's loop begins, or ended, as keywords of `posterior_mode`."""
  return {"start": None if item.start is None else item.start.z, "end": item.end}


def _val_nll(model: TaskModel, theta: PyTree, task: Task) -> jax.Array:
  """Return the mean validation negative log-likelihood [], NaN without validation data."""
  if task.val is None:
    return absent(model.n.dtype)
  return mean_nll(model.likelihood, theta, task.val)


def _only_z(item: Item, mode: Mode) -> WarmStart | None:
  """Return a warm start for the mode alone: the solve begins at 0."""
  return None if item.start is None else WarmStart(mode.z, optax.tree.zeros_like(mode.z))


def _map_gradient(
  spec: Spec, model: TaskModel, mode: Mode, key: Any
) -> tuple[PyTree, jax.Array, InnerInfo]:
  """Return d/d phi of -l_MAP of one task, (phi - theta_hat) / sigma^2, without dividing by sigma.

  At the mode it equals both -P z / s and grad -log p(D | theta), of which `balance` makes one. Also
  returns the negative log joint without its normaliser [] and, because the gradient is at hand, how
  the inner loop ended.
  """
  mean, g = nll_and_gradient(spec.inner, model.unfrozen(), mode.theta, key)
  of_prior = jax.tree.map(lambda p, z: -p * z, model.white.precision, mode.z)
  grad = model.balance(optax.tree.scale(model.n, g), of_prior)
  value, of_z = model.with_prior(mode.z, mean, model.cut(g))
  norm = optax.tree.norm(jax.lax.stop_gradient(of_z))
  info = InnerInfo(mode.info.steps, value, norm, norm <= (spec.inner.tol or 1e-3))
  return grad, model.n * value, info
