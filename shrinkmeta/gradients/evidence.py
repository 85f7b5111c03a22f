"""The evidence of one task: the probability of its data D, with theta integrated out.

    log p(D | phi, sigma) ~ log p(D | theta_hat) - |z_hat|^2 / 2 - log det(I + s C s) / 2

Here theta_hat = phi + s z_hat is the mode, and C is the Gauss-Newton curvature. s has the value
sigma_m at every parameter of module m. The formula is Laplace's approximation of the integral over
z, at the mode. The integral's power of 2 pi and the normaliser of the prior on z cancel. The
approximation is exact for linear-Gaussian models. The hierarchical model is then a linear mixed
model, and the evidence is its marginal likelihood. The phi and sigma that maximise the evidence are
the maximum-likelihood fit. The evidence needs no validation data.

Gradient: z_hat maximises the sum of the first two terms. So their gradient is computed with z_hat
held fixed: it is g for phi and <s g, z_hat> / 2 over module m for log sigma_m^2, where g is
d log p(D | theta) / d theta at the mode. The third term also depends on theta_hat, and theta_hat
depends on (phi, sigma): `implicit.py` has the derivative. The gradient of the approximation is
exact for linear-Gaussian models. For other models it is exact if `Implicit.curvature` is "hessian".
With "gauss_newton" it was off by some tenths of a percent on a small network. `implicit.py` also
has the gradient of the validation loss, which is another objective.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.dtypes import float0

from shrinkmeta.arguments import check_types
from shrinkmeta.base import EvidenceInfo, MetaParams
from shrinkmeta.checks import scalars
from shrinkmeta.config import Implicit, Inner, LogDet, check_whole
from shrinkmeta.curvature.closed_over import Consts, open_likelihood
from shrinkmeta.devices.keys import same_in_any_batch
from shrinkmeta.gradients.implicit import curvature_at_mode, data_gradient, implicit_gradient
from shrinkmeta.gradients.log_det import log_det, log_det_twice
from shrinkmeta.gradients.twice.newton import check_twice, newton_mode
from shrinkmeta.gradients.twice.refusals import differentiable_once
from shrinkmeta.mode.frozen import freeze
from shrinkmeta.mode.optimise import Mode, posterior_mode
from shrinkmeta.mode.task_model import TaskModel, task_model
from shrinkmeta.model import modules
from shrinkmeta.model.likelihood import Likelihood, masked_log_prob
from shrinkmeta.model.tasks import Batch, check_batch
from shrinkmeta.model.variants import deterministic, with_constants

PyTree = Any
Data = tuple[Batch, Consts]


def _fit(model: TaskModel, theta: PyTree, z: PyTree) -> jax.Array:
  """Return log p(D | theta) - |z|^2 / 2 []."""
  outputs = model.likelihood.predict(theta, model.batch.inputs)
  log_p = masked_log_prob(model.likelihood, outputs, model.batch)
  return log_p - 0.5 * optax.tree.norm(z, squared=True)


def _gradient_of_fit(implicit: Implicit, model: TaskModel, g: PyTree, z: PyTree) -> MetaParams:
  """Return the gradient of `_fit` with z held: g for phi, <s g, z> / 2 for log sigma^2.

  At the exact mode s g = z. At an inexact mode, z is more accurate than s g where the data dominate
  the prior. So `balance` combines g and z.

  Args:
    implicit: how the gradient through the mode is computed.
    model: the task model.
    g: the derivative of `_fit` with respect to theta, a tree like phi.
    z: the mode, a part.
  """
  g = model.balance(g, z, curvature_at_mode(implicit, model, z))
  half = jax.tree.map(lambda s, g, z: 0.5 * s * g * z, model.white.scale, model.cut(g), z)
  return MetaParams(g, model.by_module(half))


def evidence_at(
  model: TaskModel,
  mode: Mode,
  *,
  implicit: Implicit,
  how: LogDet,
  key: jax.Array | None = None,
) -> tuple[jax.Array, MetaParams, EvidenceInfo, PyTree]:
  """Return the log evidence of one task and its gradient, given the mode.

  Args:
    model: the task model.
    mode: theta_hat and z_hat.
    implicit: how the gradient through the mode is computed.
    how: how the determinant is computed.
    key: draws the random vectors of a stochastic determinant; consumed.

  Returns:
    (the log evidence [] in nats, its gradient, an EvidenceInfo, w). w is a tree like phi, with None
    in the frozen modules. It solves K w = s h, where h is the derivative of log det K with respect
    to theta_hat.
  """
  fit, g = jax.value_and_grad(lambda theta: _fit(model, theta, mode.z))(mode.theta)
  grad = _gradient_of_fit(implicit, model, g, mode.z)
  # log det K is taken at theta_hat, so theta_hat is in the place of phi here. Its gradient in
  # theta_hat then goes through the mode to phi and sigma.
  here = MetaParams(mode.theta, model.params.log_sigma2)
  determinant = jax.value_and_grad(lambda p: log_det(how, model.at(p), key), has_aux=True)
  (value, error), slope = determinant(here)
  through_mode, w, solve = implicit_gradient(implicit, model, mode.z, slope.phi)
  d_sigma = optax.tree.add(through_mode.log_sigma2, slope.log_sigma2)
  grad = optax.tree.add_scale(grad, -0.5, MetaParams(through_mode.phi, d_sigma))
  return fit - 0.5 * value, grad, EvidenceInfo(mode.info, solve, value, error), w


def log_evidence(
  likelihood: Likelihood,
  labels: modules.Labels,
  phi: PyTree,
  log_sigma2: Mapping[str, jax.typing.ArrayLike],
  batch: Batch,
  inner: Inner = Inner(tol=1e-4),  # noqa: B008 (frozen)
  implicit: Implicit = Implicit(),  # noqa: B008 (frozen)
  log_det: LogDet = LogDet(),  # noqa: B008 (frozen)
  *,
  key: jax.Array | None = None,
  frozen: Iterable[str] = (),
  constants: PyTree = None,
  twice: bool = False,
) -> tuple[jax.Array, EvidenceInfo]:
  """Return log p(D | phi, sigma) of one task, with theta integrated out.

      log p(D | theta_hat) - |z_hat|^2 / 2 - log det(I + s C s) / 2

  Here theta_hat = phi + s z_hat is the mode, and C is the Gauss-Newton curvature. s has the value
  sigma_m at every parameter of module m. The log evidence is differentiable in reverse mode with
  respect to phi, log_sigma2, the float leaves of `batch` and the arrays that the likelihood closes
  over. A weight of 0 has derivative 0. With twice=True it is differentiable twice, forwards and
  backwards. Put a parameter of the likelihood, such as the scale of `sm.gaussian_with_scale`, into
  a module with sigma = 0. Its entry of phi has a gradient, like all other entries.

  Args:
    likelihood: predict and log_prob.
    labels: the module of every parameter.
    phi: the parameters that all tasks share.
    log_sigma2: {module: [] log sigma_m^2}, finite, or -inf for frozen modules.
    batch: one task's data [N, ...], without the T axis; for many tasks use `jax.vmap`.
    inner: how the mode is found. If the mode has an error e, the first two terms are too small by a
      multiple of e^2. The third term and the gradient are wrong by a multiple of e.
    implicit: how the derivative of the mode is computed.
    log_det: how the determinant is computed.
    key: a random key for a stochastic log-determinant and for inner.batch_size; consumed.
    frozen: modules with sigma = 0, as for `map_estimate`.
    constants: what predict takes as its third argument, or None; it has no derivative.
    twice: True for exact first and second derivatives of the formula above, at most 1,000
      task-specific parameters, and no random key. Newton steps with the exact Hessian, whatever
      implicit.curvature is, first improve the mode. So the gradient is exact for all models. The
      determinant keeps the Gauss-Newton C. The result is NaN if log_prob is not concave in the
      outputs, or if the Hessian is not positive definite, up to rounding, at the end of the loop
      or one Newton step later.

  Returns:
    (the log evidence [] in nats, an EvidenceInfo whose derivative is zero).

  Raises:
    ValueError: a sigma is known to be inf, or the arguments do not fit each other.
    NotImplementedError: a second derivative without twice=True, or a third derivative.

  >>> import jax.numpy as jnp
  >>> import shrinkmeta as sm
  >>> linear = sm.gaussian(lambda theta, x: x * theta["w"])
  >>> batch = sm.Batch(jnp.ones(1), jnp.array([2.0]))
  >>> value, info = sm.log_evidence(linear, {"w": "w"}, {"w": 0.0}, {"w": 0.0}, batch)
  >>> exact = -0.5 * (4.0 / 2.0 + jnp.log(2 * jnp.pi * 2.0))  # y ~ N(0, 1 + 1)
  >>> bool(jnp.allclose(value, exact))
  True
  """
  check_types(likelihood=likelihood, inner=inner, implicit=implicit, log_det=log_det, key=key)
  known = modules.check_parameters("phi", phi, "log_sigma2", log_sigma2, labels)
  log_s2 = modules.finite_sigma(log_sigma2, "evidence")
  check_whole(implicit)
  check_batch("batch", batch)
  phi, taken = freeze(jax.tree.map(jnp.asarray, phi), log_sigma2, known, labels, frozen)
  dtype = jnp.result_type(jax.tree.leaves(phi)[0])
  params = MetaParams(phi, {m: v.astype(dtype) for m, v in log_s2.items()})
  if twice := scalars.flag("twice", twice):
    check_twice(inner, implicit, key)
    constants = jax.lax.stop_gradient(constants)  # they have no derivative
  network = with_constants(deterministic(likelihood), constants)
  model = task_model(network, labels, params, batch, taken)
  if twice:
    return _evidence_twice(inner, log_det, model)
  return differentiable_evidence(inner, implicit, log_det, model, same_in_any_batch(key))


def differentiable_evidence(
  inner: Inner, implicit: Implicit, how: LogDet, model: TaskModel, key: jax.Array | None
) -> tuple[jax.Array, EvidenceInfo]:
  """Return `log_evidence` of a task model, with its gradient rule.

  The gradient with respect to the data needs the derivative of the determinant with respect to the
  data. It is computed only if JAX differentiates with respect to the data.
  """
  mode_key, probe_key = (None, None) if key is None else jax.random.split(key)

  consts, task = _opened(model)

  @jax.custom_vjp
  def value(params: MetaParams, data: Data, keys: Any) -> tuple[jax.Array, EvidenceInfo]:
    here = task(params, *data)
    mode = posterior_mode(inner, here, key=keys[0])
    determinant, error = log_det(how, here.around(mode.theta), keys[1])
    info = EvidenceInfo(mode.info, None, determinant, error)
    return _fit(here, mode.theta, mode.z) - 0.5 * determinant, info

  def forward(*perturbed: Any) -> tuple[Any, Any]:
    is_leaf = lambda x: hasattr(x, "perturbed")
    params, data, keys = jax.tree.map(lambda x: x.value, perturbed, is_leaf=is_leaf)
    wanted = any(x.perturbed for x in jax.tree.leaves(perturbed[1], is_leaf=is_leaf))
    here = task(params, *data)
    mode = posterior_mode(inner, here, key=keys[0])
    result, grad, info, w = evidence_at(here, mode, implicit=implicit, how=how, key=keys[1])
    kept = (params, data, keys, mode, w) if wanted else None
    return (result, info._replace(solve=None)), (grad, kept)

  def of_data(params: MetaParams, data: Data, keys: Any, mode: Mode, w: PyTree) -> Data:
    batch, consts = data

    def held(batch: Batch, floats: Any) -> jax.Array:  # the evidence with theta_hat held fixed
      here = task(params, batch, consts._replace(floats=floats))
      determinant = log_det(how, here.around(mode.theta), keys[1])[0]
      return _fit(here, mode.theta, mode.z) - 0.5 * determinant

    d_batch, d_floats = jax.vjp(held, batch, consts.floats)[1](jnp.ones([], model.n.dtype))
    direct = d_batch, Consts(d_floats)
    moved = data_gradient(lambda *data: task(params, *data), mode.z, w, *data)
    return jax.tree.map(lambda a, b: a if a.dtype == float0 else a - 0.5 * b, direct, moved)

  def backward(residuals: Any, cotangents: Any) -> tuple[Any, ...]:
    grad, kept = residuals
    data = None if kept is None else of_data(*kept)
    along = cotangents[0]  # a symbolic zero if only the info is differentiated
    along = along if isinstance(along, jax.Array) else jnp.zeros(along.shape, along.dtype)
    scaled = lambda x: x if x.dtype == float0 else along * x
    gradient = jax.tree.map(scaled, (grad, data))
    return *differentiable_once("log_evidence", gradient), None

  value.defvjp(forward, backward, symbolic_zeros=True)
  return value(model.params, (model.batch, consts), (mode_key, probe_key))


def _opened(model: TaskModel) -> tuple[Consts, Callable[[MetaParams, Batch, Consts], TaskModel]]:
  """Return what the likelihood closes over, and (params, batch, that) -> the task model."""
  consts, rebuild = open_likelihood(model.likelihood, model.params.phi, model.batch)

  def task(params: MetaParams, batch: Batch, consts: Consts) -> TaskModel:
    return dataclasses.replace(model.at(params).on(batch), likelihood=rebuild(consts))

  return consts, task


def _evidence_twice(inner: Inner, how: LogDet, model: TaskModel) -> tuple[jax.Array, EvidenceInfo]:
  """Return `log_evidence` of a task model, with exact first and second derivatives."""
  consts, task = _opened(model)
  model, z, info = newton_mode(inner, task, model.params, model.batch, consts)
  theta = model.theta(z)
  determinant = log_det_twice(how, model.around(theta))
  held = jax.lax.stop_gradient(determinant)
  info = EvidenceInfo(info, None, held, jnp.zeros_like(held))
  return _fit(model, theta, z) - 0.5 * determinant, info
