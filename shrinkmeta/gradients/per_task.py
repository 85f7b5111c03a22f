"""What one task adds to the meta-gradient, by the row of the table that a learner is.

Each function takes (spec, params, item, key, frozen) and returns a `TaskResult`: the gradient with
respect to (phi, log sigma^2) of what the row follows, and what people read.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from shrinkmeta.curvature.solvers import SolveInfo
from shrinkmeta.devices.batching import Batching
from shrinkmeta.gradients import evidence
from shrinkmeta.gradients.implicit import Implicit, MetaParams, implicit_gradient
from shrinkmeta.gradients.log_det import LogDet
from shrinkmeta.mode.frozen import Frozen, merge, moving
from shrinkmeta.mode.optimise import (
  Descent,
  Inner,
  InnerInfo,
  info_at,
  mean_nll,
  nll_and_gradient,
  value_and_grad_z,
)
from shrinkmeta.mode.task_model import Mode, Moving, moving_model, posterior_mode
from shrinkmeta.mode.warm_start import WarmStart
from shrinkmeta.mode.whitening import balance, to_theta
from shrinkmeta.model import modules
from shrinkmeta.model.likelihood import Likelihood
from shrinkmeta.model.tasks import Batch, Task, divisor, num_examples

PyTree = Any


class Algorithm(NamedTuple):
  """One line of the table of algorithms."""

  sigma: Literal["inf", "fixed", "learned"]  # "inf": only a mask tells which modules move
  phi: Literal[
    "predictive", "map", "evidence", "pooled"
  ]  # what phi follows (for "evidence", sigma too); "pooled": no adaptation in training
  gradient: Literal["unrolled", "first_order", "implicit", "none"]  # of theta_hat
  prior: bool = True  # False: finite sigma^2 are step sizes and nothing else


SigmaGradient = Literal["joint", "per_task", "diagonal"]


class Spec(NamedTuple):
  """What a learner was built from, but for its optimisers; static."""

  algorithm: Algorithm
  likelihood: Likelihood
  labels: modules.Labels
  inner: Inner
  implicit: Implicit
  log_det: LogDet
  sigma: dict[str, float]  # {module: sigma_m} at the start
  sigma_gradient: SigmaGradient
  restricted: Sequence[str]
  log_p_phi: Callable[[PyTree], jax.Array] | None
  log_p_sigma: Callable[[dict[str, jax.Array]], jax.Array] | None
  batching: Batching
  mesh: Mesh | None


class Item(NamedTuple):
  """One task as a learner sees it."""

  number: jax.Array  # [] its place among the T
  task: Task
  start: WarmStart | None
  end: Descent | None  # where its loop ended, if it has been run already


class Ends(NamedTuple):
  """What the joint gradient of sigma needs of every task."""

  z: PyTree  # the mode, of the modules that move
  g: PyTree  # d val_nll / d theta there


class TaskResult(NamedTuple):
  """Of one task."""

  grad: MetaParams
  val_nll: jax.Array  # [] NaN without validation data
  phi_loss: jax.Array  # [] what phi follows
  inner: InnerInfo
  solve: SolveInfo | None = None
  warm: WarmStart | None = None
  ends: Ends | None = None


def log_sigma2_of(spec: Spec, params: MetaParams) -> dict[str, Any]:
  """log sigma^2; as a number, known before compiling, where the row leaves no choice."""
  if spec.algorithm.sigma != "inf":
    return params.log_sigma2
  free = lambda module, value: math.inf if spec.sigma[module] == math.inf else value
  return {module: free(module, value) for module, value in params.log_sigma2.items()}


def moving_of(spec: Spec, params: MetaParams, frozen: Frozen) -> Moving:
  """The model of the modules that move."""
  log_sigma2 = log_sigma2_of(spec, params)
  prior = spec.algorithm.prior
  return moving_model(spec.likelihood, spec.labels, params.phi, log_sigma2, frozen, prior)


def mode_of(
  spec: Spec, params: MetaParams, batch: Batch, key: Any, frozen: Frozen, **keywords: Any
) -> Mode:
  """theta_hat of one task; keywords as for `minimise`."""
  return posterior_mode(
    spec.inner,
    spec.likelihood,
    spec.labels,
    params.phi,
    log_sigma2_of(spec, params),
    batch,
    frozen,
    key=key,
    prior=spec.algorithm.prior,
    **keywords,
  )


def _val_nll(spec: Spec, theta: PyTree, task: Task) -> jax.Array:
  nan = jnp.full([], jnp.nan, jnp.result_type(jax.tree.leaves(theta)[0]))
  return nan if task.val is None else mean_nll(spec.likelihood, theta, task.val)


def _adapted_nll(
  params: MetaParams, spec: Spec, item: Item, key: Any, frozen: Frozen
) -> tuple[jax.Array, Mode]:
  """(val_nll at theta_hat, mode), differentiable in params through the steps."""
  mode = mode_of(spec, params, item.task.train, key, frozen, info_at_end=False)
  return _val_nll(spec, mode.theta, item.task), mode


def unrolled(spec: Spec, params: MetaParams, item: Item, key: Any, frozen: Frozen) -> TaskResult:
  """Through the steps, backwards."""
  value_and_grad = jax.value_and_grad(_adapted_nll, has_aux=True)
  (nll, mode), grad = value_and_grad(params, spec, item, key, frozen)
  return TaskResult(grad, nll, nll, mode.info)


def first_order(spec: Spec, params: MetaParams, item: Item, key: Any, frozen: Frozen) -> TaskResult:
  """The gradient with z held, of a loss that itself still depends on params through z."""
  nll, mode = _adapted_nll(params, spec, item, key, frozen)

  def loss(params: MetaParams) -> jax.Array:
    model = moving_of(spec, params, frozen)
    theta = merge(to_theta(model.phi, model.white.scale, mode.z), params.phi)
    return _val_nll(spec, theta, item.task)

  return TaskResult(jax.grad(loss)(params), nll, nll, mode.info)


def _mode_of_item(
  spec: Spec, params: MetaParams, item: Item, key: Any, frozen: Frozen, info_at_end: bool = True
) -> Mode:
  return mode_of(
    spec,
    params,
    item.task.train,
    key,
    frozen,
    start=None if item.start is None else item.start.z,
    end=item.end,
    info_at_end=info_at_end,
  )


def reptile(spec: Spec, params: MetaParams, item: Item, key: Any, frozen: Frozen) -> TaskResult:
  """sigma^2 times the gradient of -l_MAP: phi - theta_hat."""
  model = moving_of(spec, params, frozen)
  mode = _mode_of_item(spec, params, item, key, frozen, info_at_end=False)
  d_phi = jax.tree.map(lambda s, v: -s * v, model.white.scale, mode.z)
  grad = optax.tree.zeros_like(params)
  grad = grad._replace(phi=merge(d_phi, grad.phi))
  nll = _val_nll(spec, mode.theta, item.task)
  return TaskResult(grad, nll, jnp.full_like(nll, jnp.nan), mode.info)


def stationary(spec: Spec, params: MetaParams, item: Item, key: Any, frozen: Frozen) -> TaskResult:
  """Gradients by the implicit function theorem, for sigma and, where phi follows it, l_PLL."""
  task, start = item.task, item.start
  follows_map = spec.algorithm.phi == "map"
  mode = _mode_of_item(spec, params, item, key, frozen, info_at_end=not follows_map)
  nll, g = jax.value_and_grad(lambda theta: _val_nll(spec, theta, task))(mode.theta)
  grad, w, solve = implicit_gradient(
    spec.implicit,
    spec.likelihood,
    spec.labels,
    params.phi,
    params.log_sigma2,
    task.train,
    mode.z,
    g,
    frozen=frozen,
    start=None if start is None else start.w,
    key=key,
  )
  warm = None if start is None else WarmStart(mode.z, w)
  if not follows_map:
    return TaskResult(grad, nll, nll, mode.info, solve, warm)
  d_phi, phi_loss, info = _map_gradient(spec, params, mode, task.train, key, frozen)
  return TaskResult(grad._replace(phi=d_phi), nll, phi_loss, info, solve, warm)


def joint(spec: Spec, params: MetaParams, item: Item, key: Any, frozen: Frozen) -> TaskResult:
  """phi's gradient as in `stationary`; sigma's is left to `joint.py`, which sees all tasks."""
  task = item.task
  mode = _mode_of_item(spec, params, item, key, frozen, info_at_end=False)
  nll, g = jax.value_and_grad(lambda theta: _val_nll(spec, theta, task))(mode.theta)
  d_phi, phi_loss, info = _map_gradient(spec, params, mode, task.train, key, frozen)
  grad = optax.tree.zeros_like(params)._replace(phi=d_phi)
  warm = _only_z(item, mode)
  return TaskResult(grad, nll, phi_loss, info, warm=warm, ends=Ends(mode.z, g))


def key_of_loop(spec: Spec, key: Any) -> Any:
  """What a task's inner loop draws with; the determinant of the evidence draws with another."""
  return jax.random.split(key)[0] if key is not None and spec.algorithm.phi == "evidence" else key


def by_evidence(spec: Spec, params: MetaParams, item: Item, key: Any, frozen: Frozen) -> TaskResult:
  """phi and sigma both follow the log evidence of the training data, Laplace's."""
  probe_key = None if key is None else jax.random.split(key)[1]
  mode = _mode_of_item(spec, params, item, key_of_loop(spec, key), frozen)
  value, grad, info = evidence.evidence_at(
    spec.likelihood,
    spec.labels,
    params.phi,
    params.log_sigma2,
    item.task.train,
    mode,
    implicit=spec.implicit,
    log_det=spec.log_det,
    frozen=frozen,
    key=probe_key,
  )
  nll = _val_nll(spec, mode.theta, item.task)
  grad = optax.tree.scale(-1.0, grad)
  return TaskResult(grad, nll, -value, mode.info, info.solve, _only_z(item, mode))


def _only_z(item: Item, mode: Mode) -> WarmStart | None:
  """A warm start for the mode alone: the solve begins at 0."""
  return None if item.start is None else WarmStart(mode.z, optax.tree.zeros_like(mode.z))


def pooled(spec: Spec, params: MetaParams, item: Item, key: Any, frozen: Frozen) -> TaskResult:
  """phi for all tasks alike: the mean negative log-likelihood of both parts at theta = phi."""
  del key, frozen
  dtype = jnp.result_type(jax.tree.leaves(params.phi)[0])
  counts = [num_examples(part, dtype) for part in item.task]

  def loss(phi: PyTree) -> jax.Array:
    parts = zip(counts, item.task, strict=True)
    total = sum(n * mean_nll(spec.likelihood, phi, part) for n, part in parts)
    return total / divisor(jnp.asarray(sum(counts)))

  nll, g = jax.value_and_grad(loss)(params.phi)
  none = InnerInfo(jnp.zeros([], jnp.int32), nll, optax.tree.norm(g), jnp.zeros([], bool))
  grad = MetaParams(g, jax.tree.map(jnp.zeros_like, params.log_sigma2))
  return TaskResult(grad, _val_nll(spec, params.phi, item.task), nll, none)


def gradient_of(spec: Spec) -> Callable[..., TaskResult]:
  """The function of this file that belongs to a row."""
  row = spec.algorithm
  if row.phi in ("pooled", "evidence"):
    return pooled if row.phi == "pooled" else by_evidence
  if row.gradient == "implicit":
    return joint if spec.sigma_gradient == "joint" else stationary
  return {"unrolled": unrolled, "first_order": first_order, "none": reptile}[row.gradient]


_GRADIENTS = {
  "predictive": ("unrolled", "first_order", "implicit"),
  "map": ("implicit", "none"),
  "evidence": ("implicit",),
  "pooled": ("none",),
}


def check_row(row: Algorithm) -> None:
  """Raises ValueError unless there is such a row: `gradient_of` would take another for it."""
  fits = row.sigma in ("inf", "fixed", "learned") and row.gradient in _GRADIENTS.get(row.phi, ())
  if not fits or (row.sigma == "learned" and row.gradient == "none"):
    choices = "; ".join(f"{phi}: {' or '.join(own)}" for phi, own in _GRADIENTS.items())
    raise ValueError(
      f"There is no {row}. sigma is inf, fixed or, but for gradient none, learned; phi goes with a "
      f"gradient so: {choices}. See sm.FAMILY."
    )


def check_sigma_gradient(row: Algorithm, sigma_gradient: SigmaGradient) -> None:
  """Raises ValueError unless the row has that choice."""
  if sigma_gradient not in ("joint", "per_task", "diagonal"):
    raise ValueError(
      f'sigma_gradient must be "joint", "per_task" or "diagonal"; got {sigma_gradient!r}.'
    )
  if sigma_gradient != "per_task" and row != Algorithm("learned", "map", "implicit"):
    raise ValueError(
      f"sigma_gradient={sigma_gradient!r} is for sigma_reptile, in which phi follows l_MAP."
    )


def _map_gradient(
  spec: Spec, params: MetaParams, mode: Mode, batch: Batch, key: Any, frozen: Frozen
) -> tuple[PyTree, jax.Array, InnerInfo]:
  """d/d phi of -l_MAP of one task, (phi - theta_hat) / sigma^2, without dividing by sigma.

  At the mode it equals both -P z / s, P the precision, and G = grad -log p(D | theta), of which
  `balance` makes one. Also returns the negative log joint less its normaliser [] and, as G is at
  hand, how the inner loop ended.
  """
  model = moving_of(spec, params, frozen)
  mean, g = nll_and_gradient(spec.inner, spec.likelihood, mode.theta, batch, key)
  count = num_examples(batch, mean.dtype)
  n = divisor(count)  # by which the means divide
  of_prior = jax.tree.map(lambda p, z: -p * z, model.white.precision, mode.z)
  grad = balance(model.white.scale, count, optax.tree.scale(n, g), of_prior)
  own = moving(g, spec.labels, frozen)
  judged = value_and_grad_z(model.white, mode.z, mean, own, n)
  info = info_at(spec.inner, mode.info.steps, judged)
  return grad, n * judged[0], info
