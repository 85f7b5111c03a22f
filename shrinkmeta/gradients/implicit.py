"""The gradient through the posterior mode of one task, by the implicit function theorem.

J(z) = -log p(D | theta) + P |z|^2 / 2 with theta = phi + s z. s has the value sigma_m at every
parameter of module m. At the mode, grad_z J = 0. Let g = d loss / d theta at the mode, let C be the
curvature of -log p(D | theta), and let w solve

    K w = s * g,                       K = P + s C s, P = 1 for finite sigma.

The derivatives of the loss at the mode are

    d/d phi = g - C (s * w),           d/d log sigma_m^2 = <w, z> over the entries of module m.

They need the mode, not the path to it. So memory does not grow with the number of inner steps, and
any optimiser may find the mode. Nothing is divided by sigma. Two files have other gradients of
sigma: `joint.py` also goes through the optimal phi, and `evidence.py` has those of the evidence.

The equation for w gives a second form, d/d phi = P w / s. Where the data dominate the prior, the
first form subtracts two large, nearly equal vectors. Where sigma is small, the second form divides
by a small number. `TaskModel.balance` combines both.

Derivation of the formula for sigma: the derivative of theta with respect to log sigma_m^2 is
s z_m / 2 + s dz. Here z_m is z in module m and 0 elsewhere, and dz is the derivative of the mode.
Stationarity, s grad L + z = 0 with L = -log p(D | theta), gives
(I + s C s) dz = z_m / 2 - s C s z_m / 2. So g . s dz = w . (z_m - s C s z_m) / 2, and
g . s z_m / 2 = w . (z_m + s C s z_m) / 2. Their sum is w . z_m.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from shrinkmeta.arguments import check_types
from shrinkmeta.base import InnerInfo, MetaParams, SolveInfo
from shrinkmeta.checks import scalars
from shrinkmeta.config import Implicit, Inner, check_dual
from shrinkmeta.curvature import solvers
from shrinkmeta.curvature.closed_over import Consts, open_likelihood
from shrinkmeta.devices.keys import same_in_any_batch
from shrinkmeta.gradients.twice.newton import check_twice, newton_mode
from shrinkmeta.gradients.twice.refusals import differentiable_once
from shrinkmeta.mode.frozen import freeze, merge
from shrinkmeta.mode.optimise import Descent, Steps, absent, draw_at_end, posterior_mode
from shrinkmeta.mode.task_model import TaskModel, task_model
from shrinkmeta.model import modules
from shrinkmeta.model.likelihood import Likelihood
from shrinkmeta.model.tasks import Batch, check_batch, divisor, num_rows, weights
from shrinkmeta.model.variants import deterministic, with_constants

PyTree = Any
Linear = Callable[[PyTree], PyTree]


def implicit_gradient(
  implicit: Implicit,
  model: TaskModel,
  z: PyTree,
  g: PyTree,
  *,
  start: PyTree | None = None,
  key: jax.Array | None = None,
) -> tuple[MetaParams, PyTree, SolveInfo]:
  """Return the gradient of a loss with respect to (phi, log sigma^2), through the mode of one task.

  The solve leaves frozen modules out. Their phi has a gradient nevertheless. It uses the rows of
  the exact Hessian in these modules, also if `implicit.curvature` is "gauss_newton".

  Args:
    implicit: how the linear system is solved.
    model: the task model.
    z: the mode in whitened coordinates, a part (a tree like phi, with None in frozen modules).
    g: d loss / d theta at the mode, a tree like phi.
    start: the w from which CG begins, a part.
    key: draws the mini-batches of implicit.batch_size. It may be the key of the inner loop: these
      draws are independent of those of the inner steps.

  Returns:
    (the gradient, w as a part, the SolveInfo).
  """
  b, precision = model.scaled(model.cut(g)), model.white.precision
  # In modules without a prior p is 0, and so is the gradient of log sigma^2.
  d_sigma = lambda w: model.by_module(jax.tree.map(lambda p, w, z: p * w * z, precision, w, z))
  if implicit.solver == "identity":
    rest = (jnp.full([], x) for x in (0, False, False))
    none = SolveInfo(absent(model.n.dtype), *rest)
    return MetaParams(g, d_sigma(b)), b, none

  here, batches = model.around(model.theta(z)), _mini_batches(implicit, model.batch, key)
  product = _total(lambda task: task.product(implicit.curvature), here, here.part, batches)

  def operator(v: PyTree) -> tuple[PyTree, PyTree]:
    curved = product(model.scaled(v))
    return model.k_product(v, curved, implicit.damping), None if model.frozen else curved

  if implicit.solver == "cg":
    w, curved, info = solvers.cg(operator, b, implicit.max_steps, implicit.tol, start)
  elif implicit.solver == "neumann":
    w, curved, info = solvers.neumann(operator, b, implicit.max_steps, implicit.tol)
  else:
    first = here if batches is None else here.on(jax.tree.map(lambda x: x[0], batches))
    w, curved, info = _dual(implicit, first, operator, b)
  u = model.scaled(w)
  by_prior = jax.tree.map(lambda p, w: (p + implicit.damping) * w, precision, w)
  if model.frozen:  # C u has rows in the frozen modules too
    column = lambda task: task.column(implicit.curvature)
    curved = _total(column, here, here.params.phi, batches)(u)
  direct = optax.tree.sub(g, curved)
  balanced = model.balance(direct, by_prior, model.curvature_along(u, model.cut(curved)))

  # Modules without a prior have the first form alone: `by_prior` is 0. In directions that the data
  # do not determine, theta_hat stays at phi, and that form is the part of g outside C's range.
  known = lambda p, d, x: d if p is None else jnp.where(p + implicit.damping > 0, x, d)
  d_phi = jax.tree.map(known, precision, direct, balanced, is_leaf=lambda x: x is None)
  return MetaParams(d_phi, d_sigma(w)), w, info


def curvature_at_mode(
  implicit: Implicit, model: TaskModel, z: PyTree, key: jax.Array | None = None
) -> jax.Array:
  """Return the Gauss-Newton curvature [] along s z at the mode, or N for the solver "identity"."""
  if implicit.solver == "identity":
    return model.count  # it takes no product, so log_prob needs no second derivative
  batches = _mini_batches(implicit, model.batch, key)
  here, u = model.around(model.theta(z)), model.scaled(z)
  product = _total(lambda task: task.product("gauss_newton"), here, here.part, batches)
  return model.curvature_along(u, product(u))


def _total(
  make: Callable[[TaskModel], Linear], here: TaskModel, like: PyTree, batches: Batch | None
) -> Linear:
  """Return v -> the sum of make(task)(v) over mini-batches [B, n, ...], a tree like `like`."""
  if batches is None:
    return make(here)
  if num_rows(batches) == 1:
    return make(here.on(jax.tree.map(lambda x: x[0], batches)))
  add = lambda v: lambda sum_, batch: (optax.tree.add(sum_, make(here.on(batch))(v)), None)
  return lambda v: jax.lax.scan(add(v), optax.tree.zeros_like(like), batches)[0]


def _dual(
  implicit: Implicit, here: TaskModel, operator: solvers.Operator, b: PyTree
) -> solvers.Solution:
  """Solve K w = b by the singular values of A; `here` is the model around theta_hat."""
  factor = here.factor()
  free = jnp.any(jnp.stack([jnp.isposinf(v) for v in here.params.log_sigma2.values()]))
  shift = jnp.where(free, jnp.nan, 1.0 + implicit.damping)  # outside jit check_dual raises
  found = solvers.dual(factor.a, operator, b, shift, implicit.tol)
  return found._replace(info=found.info._replace(negative_curvature=factor.negative))


def _mini_batches(implicit: Implicit, batch: Batch, key: jax.Array | None) -> Batch | None:
  """Draw mini-batches [B, n, ...] whose curvatures sum to an estimate of that of all examples.

  None takes all examples at once.
  """
  size, count = implicit.batch_size, implicit.num_batches
  if size is None:
    return None
  if key is None:
    raise ValueError("Implicit.batch_size draws examples: pass key=jax.random.key(...) along.")
  if size * (count or 1) > num_rows(batch):
    raise ValueError(
      f"Implicit asks for {count or 1} x {size} examples (num_batches x batch_size), but the task "
      f"has {num_rows(batch)} rows; choose less, or None for all examples."
    )
  drawn = draw_at_end(key, batch, size, count)
  mask = jnp.asarray(drawn.mask)
  counted = lambda mask_: jnp.sum((mask_ != 0).astype(mask.dtype))  # examples, each counted once
  share = counted(weights(batch)) / divisor(counted(mask))
  return drawn._replace(mask=share * mask)


def differentiable_mode(
  inner: Inner,
  implicit: Implicit,
  model_of: Callable[[MetaParams, Batch, Consts], TaskModel],
  params: MetaParams,
  batch: Batch,
  consts: Consts,
  steps: Steps = None,
  key: jax.Array | None = None,
  end: Descent | None = None,
) -> tuple[PyTree, InnerInfo]:
  """Return (theta_hat, info) of one task, differentiable once, backwards, by the implicit rule.

  Args:
    inner: how the mode is found.
    implicit: how the gradient of the mode is computed.
    model_of: (params, batch, consts) -> the task model. Which modules are frozen must not depend on
      these arguments.
    params: phi and log sigma^2.
    batch: the task's training data. The rule covers its float leaves.
    consts: what the likelihood depends on beside its arguments: see `open_likelihood`.
    steps: replaces inner.steps. A tuple is not allowed.
    key: for inner.batch_size and implicit.batch_size; consumed.
    end: the last state of the loop, if it was run before.
  """

  # `find` returns only the task-specific part of theta, as one vector. Under vmap a frozen leaf, or
  # one that no example reaches, has no task axis of its own: JAX would sum its cotangent over tasks
  # before `backward` runs, and once more after it (docs/hazards.md#custom-vjp-cotangents). Under a
  # vmap over keys, theta may have no key axis, although `backward` draws with the key. So the key
  # is added, times 0.
  _, unravel = ravel_pytree(model_of(params, batch, consts).part)

  def find(params: MetaParams, batch: Batch, consts: Consts, given: Any) -> tuple[Any, ...]:
    model = model_of(params, batch, consts)
    key, end, until = given
    mode = posterior_mode(inner, model, key=key, steps=steps if until is None else until, end=end)
    part = ravel_pytree(model.cut(mode.theta))[0]
    if implicit.batch_size is not None and key is not None:
      part += (0 * jax.random.key_data(key).ravel()[0]).astype(part.dtype)
    return part, mode.info, mode.z

  @jax.custom_vjp
  def mode(
    params: MetaParams, batch: Batch, consts: Consts, given: Any
  ) -> tuple[jax.Array, InnerInfo]:
    return find(params, batch, consts, given)[:2]

  def forward(params: MetaParams, batch: Batch, consts: Consts, given: Any) -> tuple[Any, Any]:
    part, info, z = find(params, batch, consts, given)
    return (part, info), (params, batch, consts, given, z)

  def backward(residuals: Any, cotangents: Any) -> tuple[Any, ...]:
    params, batch, consts, given, z = residuals
    model = model_of(params, batch, consts)
    g = merge(unravel(cotangents[0]), optax.tree.zeros_like(params.phi))
    grad, w, _ = implicit_gradient(implicit, model, z, g, key=given[0])
    d_batch, d_consts = data_gradient(lambda *data: model_of(params, *data), z, w, batch, consts)
    return *differentiable_once("map_estimate and adapt", (grad, d_batch, d_consts)), None

  mode.defvjp(forward, backward)
  traced = steps if isinstance(steps, jax.Array) else None  # a rule closes over no traced value
  flat, info = mode(params, batch, consts, (key, end, traced))
  part = unravel(flat)
  whole = jax.tree.structure(part) == jax.tree.structure(params.phi)
  return part if whole else merge(part, params.phi), info


def data_gradient(
  model_of: Callable[[Batch, Consts], TaskModel],
  z: PyTree,
  w: PyTree,
  batch: Batch,
  consts: Consts,
) -> tuple[Batch, Consts]:
  """Return the gradient through the mode with respect to the data and the likelihood's floats.

      -<w, d/d data grad_z J>

  Args:
    model_of: (batch, consts) -> the task model.
    z: the mode, a part.
    w: K^-1 (s g), a part.
    batch: the task's data.
    consts: what the likelihood depends on beside its arguments.
  """

  def stationarity(batch: Batch, floats: Any) -> PyTree:  # grad_z J, a sum over examples
    model = model_of(batch, consts._replace(floats=floats))
    of_z = jax.grad(lambda z: model.objective(z, batch))(z)
    return jax.tree.map(lambda x: model.n * x, of_z)

  pull = jax.vjp(stationarity, batch, consts.floats)[1]
  d_batch, d_floats = pull(optax.tree.scale(-1.0, w))
  return d_batch, Consts(d_floats)


def map_estimate(
  likelihood: Likelihood,
  labels: modules.Labels,
  phi: PyTree,
  log_sigma2: Mapping[str, jax.typing.ArrayLike],
  batch: Batch,
  inner: Inner = Inner(),  # noqa: B008 (frozen)
  implicit: Implicit = Implicit(),  # noqa: B008 (frozen)
  *,
  steps: int | jax.Array | None = None,
  key: jax.Array | None = None,
  frozen: Iterable[str] = (),
  constants: PyTree = None,
  twice: bool = False,
) -> tuple[PyTree, InnerInfo]:
  """Return theta_hat = argmax_theta log p(D | theta) + log p(theta | phi, sigma), for one task.

  By the implicit rule, theta_hat is differentiable in reverse mode with respect to phi, log_sigma2,
  the float leaves of `batch` and the floats that the likelihood closes over, such as the scale of
  `sm.gaussian(predict, scale)`. A weight of 0 has derivative 0, so that what it masks may be
  any finite number. The rule is exact at the mode; `info` shows how near theta is.
  With twice=True, theta_hat is differentiable twice, forwards and backwards.

  Args:
    likelihood: predict and log_prob.
    labels: the module of every parameter.
    phi: the parameters that all tasks share.
    log_sigma2: {module: [] log sigma_m^2}; -inf: frozen at phi, +inf: no prior.
    batch: one task's training data [N, ...], without the T axis; for many tasks use `jax.vmap`.
    inner: how the mode is found.
    implicit: how the gradient of the mode is computed.
    steps: replaces inner.steps.
    key: a random key for inner.batch_size and implicit.batch_size; consumed.
    frozen: modules with log_sigma2 = -inf. Name them under jit, where the value is not known.
    constants: what predict takes as its third argument, or None; it has no derivative.
    twice: True for exact first and second derivatives, at most 1,000 task-specific parameters, and
      no random key. Newton steps with the exact Hessian, whatever implicit.curvature is, first
      improve the mode. theta is NaN if the Hessian is not positive definite, up to rounding, at the
      end of the loop or one Newton step later. The data must determine a module with sigma = inf.

  Returns:
    (theta, info): a tree like phi, and an InnerInfo, whose derivative is zero.

  Raises:
    ValueError: the arguments do not fit each other, or a value is not finite.
    NotImplementedError: a second derivative without twice=True, or a third derivative.

  >>> import jax.numpy as jnp
  >>> import shrinkmeta as sm
  >>> linear = sm.gaussian(lambda theta, x: x @ theta["w"])
  >>> batch = sm.Batch(jnp.eye(2), jnp.array([1.0, 2.0]))
  >>> theta, info = sm.map_estimate(linear, {"w": "w"}, {"w": jnp.zeros(2)}, {"w": 0.0}, batch)
  >>> [round(float(v), 4) for v in theta["w"]], bool(info.converged)
  ([0.5, 1.0], True)
  """
  check_types(likelihood=likelihood, inner=inner, implicit=implicit, key=key)
  known = modules.check_parameters("phi", phi, "log_sigma2", log_sigma2, labels)
  check_batch("batch", batch)
  steps = None if steps is None else scalars.count("steps", steps)
  check_dual(implicit, log_sigma2)
  phi, taken = freeze(jax.tree.map(jnp.asarray, phi), log_sigma2, known, labels, frozen)
  dtype = jnp.result_type(jax.tree.leaves(phi)[0])
  params = MetaParams(phi, {m: jnp.asarray(v, dtype) for m, v in log_sigma2.items()})
  if twice := scalars.flag("twice", twice):
    check_twice(inner, implicit, key)
    constants = jax.lax.stop_gradient(constants)  # they have no derivative
  network = with_constants(deterministic(likelihood), constants)
  consts, rebuild = open_likelihood(network, phi, batch)

  def model_of(params: MetaParams, batch: Batch, consts: Consts) -> TaskModel:
    return task_model(rebuild(consts), labels, params, batch, taken)

  if twice:
    model, z, info = newton_mode(inner, model_of, params, batch, consts, steps)
    return model.theta(z), info
  given = (params, batch, consts, steps, same_in_any_batch(key))
  return differentiable_mode(inner, implicit, model_of, *given)
