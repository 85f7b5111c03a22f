"""The meta-gradient of one task: one function for each kind of algorithm.

Each function takes (spec, model, item, key) and returns a `TaskResult`: the gradient of the task's
meta-loss with respect to (phi, log sigma^2), and the numbers that the metrics report. `clipped`
limits the norm of such a gradient.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from shrinkmeta.base import InnerInfo, MetaParams, SolveInfo, WarmStart
from shrinkmeta.config import Spec
from shrinkmeta.curvature import vectors
from shrinkmeta.gradients.evidence import evidence_at
from shrinkmeta.gradients.implicit import curvature_at_mode, implicit_gradient
from shrinkmeta.mode.frozen import merge
from shrinkmeta.mode.optimise import (
  Descent,
  Mode,
  absent,
  converged,
  nll_and_gradient,
  posterior_mode,
)
from shrinkmeta.mode.task_model import TaskModel
from shrinkmeta.model.likelihood import mean_nll
from shrinkmeta.model.tasks import Task, divisor, num_examples
from shrinkmeta.model.variants import is_random, with_key

PyTree = Any

# What is folded into a task's key for a random network on validation and on pooled data.
_VALIDATION, _POOLED = 2**32 - 2, 2**32 - 3


class Item(NamedTuple):
  """One task of an update."""

  number: jax.Array  # [] the position of the task in the meta-batch
  task: Task
  start: WarmStart | None  # where its loop and its solve begin; None: at 0
  end: Descent | None  # the last state of its loop, if it was run before


class Ends(NamedTuple):
  """The values of every task that the joint gradient of sigma needs."""

  z: PyTree  # the mode, a tree with None in the frozen modules
  g: PyTree  # d val_nll / d theta at the mode


class TaskResult(NamedTuple):
  """The gradient and the losses of one task, and how its inner loop and its solve ended."""

  grad: MetaParams
  val_nll: jax.Array  # [] nats per example; NaN without validation data
  phi_loss: jax.Array  # [] the loss that phi follows
  inner: InnerInfo
  solve: SolveInfo | None = None
  warm: WarmStart | None = None
  ends: Ends | None = None


PerTaskGradient = Callable[[Spec, TaskModel, Item, Any], TaskResult]


def gradient_of(spec: Spec) -> PerTaskGradient:
  """Return the function of this file that computes the meta-gradient of an algorithm."""
  algorithm = spec.algorithm
  if algorithm.phi in ("pooled", "evidence"):
    return pooled if algorithm.phi == "pooled" else by_evidence
  if algorithm.gradient == "implicit":
    return joint if spec.sigma_gradient == "joint" else stationary
  return {"unrolled": unrolled, "first_order": first_order, "none": reptile}[algorithm.gradient]


def unrolled(spec: Spec, model: TaskModel, item: Item, key: Any) -> TaskResult:
  """Differentiate val_nll at theta_hat backwards through the inner steps."""

  def loss(params: MetaParams) -> tuple[jax.Array, Mode]:
    here, start = model.at(params).from_zero()
    mode = posterior_mode(spec.inner, here, key=key, start=start, info_at_end=False)
    return _val_nll(model, mode.theta, item.task, key), mode

  (nll, mode), grad = jax.value_and_grad(loss, has_aux=True)(model.params)
  return TaskResult(grad, nll, nll, mode.info)


def first_order(spec: Spec, model: TaskModel, item: Item, key: Any) -> TaskResult:
  """Differentiate val_nll at theta = phi + s z, with z held fixed at z_hat."""
  mode = posterior_mode(spec.inner, model, key=key, info_at_end=False)
  loss = lambda params: _val_nll(model, model.at(params).theta(mode.z), item.task, key)
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
  """Differentiate val_nll through the mode by the implicit rule.

  The rule gives sigma's gradient. It gives phi's gradient too if phi follows l_PLL. If phi follows
  l_MAP, `_map_gradient` gives phi's gradient.
  """
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
  """Compute the gradient of -l_MAP for phi; `joint.py` computes sigma's from all tasks."""
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
  del spec
  counts = [num_examples(part, model.n.dtype) for part in item.task]
  keys: Any = (None, None)
  if key is not None and is_random(model.likelihood):
    keys = jax.random.split(jax.random.fold_in(key, _POOLED))
  networks = [model.likelihood if k is None else with_key(model.likelihood, k) for k in keys]

  def loss(phi: PyTree) -> jax.Array:
    parts = zip(counts, networks, item.task, strict=True)
    total = sum(n * mean_nll(network, phi, part) for n, network, part in parts)
    return total / divisor(jnp.asarray(sum(counts)))

  phi, log_sigma2 = model.params
  nll, g = jax.value_and_grad(loss)(phi)
  none = InnerInfo(jnp.zeros([], jnp.int32), nll, vectors.norm(g), jnp.zeros([], bool))
  grad = MetaParams(g, jax.tree.map(jnp.zeros_like, log_sigma2))
  return TaskResult(grad, _val_nll(model, phi, item.task), nll, none)


def norm_of(spec: Spec, grad: MetaParams) -> jax.Array:
  """Return the norm [] of a task's gradient in phi and, if sigma is learned, log sigma^2.

  The norm is infinite if the square of an entry overflows, and the task then fails. A gradient that
  is to be clipped must not fail: each entry is first divided by the largest one.
  """
  followed = grad if spec.algorithm.sigma == "learned" else grad.phi
  wide = jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), followed)
  if spec.clip is None:
    return vectors.norm(wide)
  largest = optax.tree.norm(wide, ord="inf")
  scale = jnp.where(largest > 0, largest, 1.0)
  return scale * vectors.norm(jax.tree.map(lambda x: x / scale, wide))


def clipped(grad: MetaParams, norm: jax.Array, most: float) -> MetaParams:
  """Return the gradient of a task, scaled down to the norm `most` if its norm is larger.

  A gradient that is not finite stays as it is, so that its task counts as failed.
  """
  larger = jnp.isfinite(norm) & (norm > most)
  factor = jnp.where(larger, most / jnp.where(larger, norm, 1.0), 1.0)
  return jax.tree.map(lambda x: factor.astype(x.dtype) * x, grad)


def key_of_loop(spec: Spec, key: Any) -> Any:
  """Return the key of a task's inner loop.

  If phi follows the evidence, the task's key is split in two: the inner loop draws with the first,
  and the determinant with the second.
  """
  return jax.random.split(key)[0] if key is not None and spec.algorithm.phi == "evidence" else key


def _from(item: Item) -> dict[str, Any]:
  """Return the keywords `start` and `end` of `posterior_mode` for one task."""
  return {"start": None if item.start is None else item.start.z, "end": item.end}


def _val_nll(
  model: TaskModel, theta: PyTree, task: Task, key: jax.Array | None = None
) -> jax.Array:
  """Return the mean validation NLL [], nats per example; NaN without validation data."""
  if task.val is None:
    return absent(model.n.dtype)
  likelihood = model.likelihood
  if key is not None and is_random(likelihood):
    likelihood = with_key(likelihood, jax.random.fold_in(key, _VALIDATION))
  return mean_nll(likelihood, theta, task.val)


def _only_z(item: Item, mode: Mode) -> WarmStart | None:
  """Return a warm start from which the loop begins at z_hat and the solve at 0, or None."""
  return None if item.start is None else WarmStart(mode.z, optax.tree.zeros_like(mode.z))


def _map_gradient(
  spec: Spec, model: TaskModel, mode: Mode, key: Any
) -> tuple[PyTree, jax.Array, InnerInfo]:
  """Return d/d phi of -l_MAP of one task, (phi - theta_hat) / sigma^2, without dividing by sigma.

  At the mode the gradient equals both -P z / s and the gradient of -log p(D | theta). `balance`
  combines these two forms.

  Returns:
    (the gradient, a tree like phi; the negative log joint [] in nats without its normaliser; the
    InnerInfo at the mode, which takes no further gradient).
  """
  mean, g = nll_and_gradient(spec.inner, model.unfrozen(), mode.theta, key)
  of_prior = jax.tree.map(lambda p, z: -p * z, model.white.precision, mode.z)
  along = curvature_at_mode(spec.implicit, model, mode.z, key)
  grad = model.balance(optax.tree.scale(model.n, g), of_prior, along)
  value, of_z = model.with_prior(mode.z)(mean, model.cut(g))
  norm = vectors.norm(jax.lax.stop_gradient(of_z))
  info = InnerInfo(mode.info.steps, value, norm, converged(spec.inner, norm))
  return grad, model.n * value, info
