"""The gradient through the posterior mode of one task, by the implicit function theorem.

J(z) = -log p(D | theta) + P |z|^2 / 2 with theta = phi + s z, and s is sigma, spread over the
parameters. At the mode, grad_z J = 0. With g = d loss / d theta, C the curvature of
-log p(D | theta) and

    K w = s * g,                       K = P + s C s, P = 1 for finite sigma

the derivatives of the loss at the mode are

    d/d phi = g - C (s * w),           d/d log sigma_m^2 = <w, z> over the entries of module m.

They need the mode, not the path to it: memory does not grow with the number of inner steps, and
any optimiser may find the mode. Nothing is divided by sigma. Other gradients of sigma: `joint.py`
lets phi follow sigma, and `evidence.py` has that of the evidence.

The equation for w gives a second form, d/d phi = P w / s. Where the data dominate the prior, the
first form subtracts two large, nearly equal vectors. Where sigma is small, the second form divides
by a small number. `TaskModel.balance` combines both.

Derivation of the second formula: theta moves with log sigma_m^2 as s z_m / 2 + s dz. Stationarity,
s grad L + z = 0, gives (I + s C s) dz = z_m / 2 - s C s z_m / 2. Then g . s z_m / 2 equals
w . (I + s C s) z_m / 2, and the sum of the two is w . z_m.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.dtypes import float0

from shrinkmeta.arguments import check_types
from shrinkmeta.base import InnerInfo, MetaParams, SolveInfo
from shrinkmeta.checks import scalars
from shrinkmeta.config import Implicit, Inner, check_dual
from shrinkmeta.curvature import solvers
from shrinkmeta.curvature.closed_over import Consts, open_likelihood
from shrinkmeta.devices.keys import same_in_any_batch
from shrinkmeta.mode.frozen import freeze, merge
from shrinkmeta.mode.optimise import Descent, Steps, absent, draw_at_end, posterior_mode
from shrinkmeta.mode.task_model import TaskModel, task_model
from shrinkmeta.model import modules
from shrinkmeta.model.likelihood import Likelihood
from shrinkmeta.model.tasks import Batch, check_batch, divisor, num_rows, weights
from shrinkmeta.model.variants import with_constants

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

  Modules held at phi are left out of the solve. They have their share of phi's gradient, which goes
  through the exact Hessian's rows of these modules, under Gauss-Newton too.

  Args:
    implicit: how the linear system is solved.
    model: the task model.
    z: the mode in whitened coordinates, a part.
    g: d loss / d theta at the mode, a tree like phi.
    start: w to begin CG from, a part.
    key: for implicit.batch_size. It may be that of the mode's mini-batches: the draws are
      independent of theirs.

  Returns:
    the gradient, w (a part), and how the solve went.
  """
  b, precision = model.scaled(model.cut(g)), model.white.precision
  # Without a prior there is no sigma to depend on: precision 0.
  d_sigma = lambda w: model.by_module(jax.tree.map(lambda p, w, z: p * w * z, precision, w, z))
  if implicit.solver == "identity":
    rest = (jnp.full([], x) for x in (0, False, False))
    none = SolveInfo(absent(model.n.dtype), *rest)
    return MetaParams(g, d_sigma(b)), b, none

  here = model.around(model.theta(z))
  product_of = lambda task: task.product(implicit.curvature)
  column_of = lambda task: task.column(implicit.curvature)
  if implicit.batch_size is None:
    first, product = here, product_of(here)
    column = column_of(here) if model.frozen else product
  else:
    batches = _mini_batches(implicit, model.batch, key)
    first = here.on(jax.tree.map(lambda x: x[0], batches))
    product = _total(product_of, here, here.part, batches)
    column = _total(column_of, here, here.params.phi, batches) if model.frozen else product
  operator = lambda v: model.k_product(v, product(model.scaled(v)), implicit.damping)
  if implicit.solver == "cg":
    w, info = solvers.cg(operator, b, implicit.max_steps, implicit.tol, start)
  elif implicit.solver == "neumann":
    w, info = solvers.neumann(operator, b, implicit.max_steps, implicit.tol)
  else:
    w, info = _dual(implicit, first, operator, b)
  u = model.scaled(w)
  curved = column(u)
  by_prior = jax.tree.map(lambda p, w: (p + implicit.damping) * w, precision, w)
  # The curvature along u: that of a sharp likelihood is more than one an example.
  along, length = optax.tree.vdot(u, model.cut(curved)), optax.tree.vdot(u, u)
  along = jnp.where(length == 0, 0.0, along / jnp.where(length == 0, 1.0, length))
  direct = optax.tree.sub(g, curved)
  balanced = model.balance(direct, by_prior, jnp.maximum(model.count, along))

  # Without a prior the system has no solution where the data leave entries open, and nothing says
  # what s x is: theta stays at phi there, and x is what C does not reach of g.
  known = lambda p, d, x: d if p is None else jnp.where(p + implicit.damping > 0, x, d)
  none = lambda x: x is None
  d_phi = jax.tree.map(known, precision, direct, balanced, is_leaf=none)
  return MetaParams(d_phi, d_sigma(w)), w, info


def _total(
  make: Callable[[TaskModel], Linear], here: TaskModel, like: PyTree, batches: Batch
) -> Linear:
  """Return v -> the sum of make(task)(v) over mini-batches [B, n, ...], a tree like `like`."""
  if num_rows(batches) == 1:
    return make(here.on(jax.tree.map(lambda x: x[0], batches)))
  add = lambda v: lambda sum_, batch: (optax.tree.add(sum_, make(here.on(batch))(v)), None)
  return lambda v: jax.lax.scan(add(v), optax.tree.zeros_like(like), batches)[0]


def _dual(
  implicit: Implicit, here: TaskModel, operator: Linear, b: PyTree
) -> tuple[PyTree, SolveInfo]:
  """Solve K w = b by the singular values of A; `here` is the model around theta_hat."""
  # The evidence's g comes from a factorisation of its own, which this one must wait for.
  factor = here.around(solvers.after(b, here.params.phi)).factor()
  free = jnp.any(jnp.stack([jnp.isposinf(v) for v in here.params.log_sigma2.values()]))
  shift = jnp.where(free, jnp.nan, 1.0 + implicit.damping)  # see check_dual, for what it can know
  w, info = solvers.dual(factor.a, operator, b, shift, implicit.tol)
  return w, info._replace(negative_curvature=factor.negative)


def _mini_batches(implicit: Implicit, batch: Batch, key: jax.Array | None) -> Batch:
  """Draw the examples whose curvature is taken, [B, n, ...], weighted to estimate that of all."""
  size, count = implicit.batch_size, implicit.num_batches
  assert size is not None
  if key is None:
    raise ValueError("Implicit.batch_size draws examples: pass key=jax.random.key(...) along.")
  if size * (count or 1) > num_rows(batch):
    raise ValueError(
      f"Implicit asks for {count or 1} x {size} examples (num_batches x batch_size), but the task "
      f"has {num_rows(batch)} rows; choose less, or None for all examples."
    )
  drawn = draw_at_end(key, batch, size, count)
  mask = jnp.asarray(drawn.mask)
  counted = lambda mask_: jnp.sum((mask_ != 0).astype(mask.dtype))  # examples, whatever they weigh
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
  """Return (theta_hat, info) of one task, differentiable backwards, once, by the implicit rule.

  Args:
    inner: how the mode is found.
    implicit: how its gradient is found.
    model_of: (params, batch, consts) -> the task model. Its modules may not depend on these.
    params: phi and log sigma^2.
    batch: the task's training data. The rule covers its float leaves.
    consts: the traced floats that the likelihood closes over: see `open_likelihood`.
    steps: replaces inner.steps; no tuple.
    key: for inner.batch_size and implicit.batch_size; consumed.
    end: the end of the loop if it was run already.
  """

  # Only the part that moves leaves this function. Held leaves would be the same for all tasks of a
  # vmap: JAX would sum their cotangent over tasks before `backward` runs, and then once more after
  # it. So would a theta that is the same for all keys of a vmap, while `backward` draws by the key
  # (docs/hazards.md#custom-vjp-cotangents).
  def find(params: MetaParams, batch: Batch, consts: Consts, given: Any) -> tuple[Any, ...]:
    model = model_of(params, batch, consts)
    key, end = given
    mode = posterior_mode(inner, model, key=key, steps=steps, end=end)
    part = model.cut(mode.theta)
    if implicit.batch_size is not None and key is not None:
      zero = 0 * jax.random.key_data(key).ravel()[0]
      part = jax.tree.map(lambda x: x + zero.astype(x.dtype), part)
    return part, mode.info, mode.z

  @jax.custom_vjp
  def mode(
    params: MetaParams, batch: Batch, consts: Consts, given: Any
  ) -> tuple[PyTree, InnerInfo]:
    return find(params, batch, consts, given)[:2]

  def forward(params: MetaParams, batch: Batch, consts: Consts, given: Any) -> tuple[Any, Any]:
    part, info, z = find(params, batch, consts, given)
    return (part, info), (params, batch, consts, given, z)

  def backward(residuals: Any, cotangents: Any) -> tuple[Any, ...]:
    params, batch, consts, given, z = residuals
    model = model_of(params, batch, consts)
    g = merge(cotangents[0], optax.tree.zeros_like(params.phi))
    grad, w, _ = implicit_gradient(implicit, model, z, g, key=given[0])
    d_batch, d_consts = data_gradient(lambda *data: model_of(params, *data), z, w, batch, consts)
    return *differentiable_once("map_estimate and adapt", (grad, d_batch, d_consts)), None

  mode.defvjp(forward, backward)
  part, info = mode(params, batch, consts, (key, end))
  whole = jax.tree.structure(part) == jax.tree.structure(params.phi)
  return part if whole else merge(part, params.phi), info


def data_gradient(
  model_of: Callable[[Batch, Consts], TaskModel],
  z: PyTree,
  w: PyTree,
  batch: Batch,
  consts: Consts,
) -> tuple[Batch, Consts]:
  """Return the gradient through the mode with respect to the data and to what a likelihood holds.

      -<w, d/d data grad_z J>

  Args:
    model_of: (batch, consts) -> the task model.
    z: the mode, a part.
    w: K^-1 (s g), a part.
    batch: the task's data.
    consts: the floats that the likelihood closes over.
  """

  def stationarity(
    batch: Batch, consts: list[jax.Array]
  ) -> PyTree:  # grad_z J, a sum over examples
    model = model_of(batch, consts)
    of_z = jax.grad(lambda z: model.objective(z, batch))(z)
    return jax.tree.map(lambda x: model.n * x, of_z)

  return jax.vjp(stationarity, batch, consts)[1](optax.tree.scale(-1.0, w))


def differentiable_once(name: str, gradient: PyTree) -> PyTree:
  """Return a gradient whose own derivative is an error.

  Differentiated again, the rule of the mode would be that of its solver's steps: a number, and a
  wrong one.

  Args:
    name: the functions that the gradient belongs to, for the error.
    gradient: what the backward pass returns.

  Raises:
    NotImplementedError: where the result is differentiated.
  """

  @jax.custom_jvp
  def once(x: PyTree) -> PyTree:
    return x

  @once.defjvp
  def _(primals: Any, tangents: Any) -> Any:
    raise NotImplementedError(
      f"{name} can be differentiated once: jax.hessian, or a gradient of a gradient, is not "
      "available. Take central differences of the gradient g in float64, "
      "(g(x + h) - g(x - h)) / (2 h) with h about 1e-4, and a mode found to Inner(tol=1e-10)."
    )

  leaves, structure = jax.tree.flatten(gradient)
  floats = iter(once([x for x in leaves if x.dtype != float0]))
  return structure.unflatten([x if x.dtype == float0 else next(floats) for x in leaves])


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
) -> tuple[PyTree, InnerInfo]:
  """Return theta_hat = argmax_theta log p(D | theta) + log p(theta | phi, sigma), for one task.

  It is differentiable backwards in phi, log_sigma2, the float leaves of `batch` and what the
  likelihood closes over, such as the scale of `sm.gaussian(predict, scale)`, by the implicit rule.
  The derivative is that of the exact mode: `info` and the solver's residual say how far the result
  is from it. Second derivatives are not available.

  Args:
    likelihood: predict and log_prob.
    labels: the module of every parameter.
    phi: the parameters that all tasks share.
    log_sigma2: {module: [] log sigma_m^2}; -inf holds a module at phi, +inf takes its prior away.
    batch: one task's training data [N, ...], without the T axis; `jax.vmap` over it for many.
    inner: how the mode is found.
    implicit: how its gradient is found.
    steps: replaces inner.steps.
    key: for inner.batch_size and implicit.batch_size; consumed.
    frozen: modules to leave out of the work beside those whose log_sigma2 is known here to be
      -inf; for use under jit, where log_sigma2 is not known.
    constants: what predict takes as its third argument, or None; it has no derivative.

  Returns:
    (theta, info): a tree like phi, and an InnerInfo, whose derivative is zero.

  Raises:
    ValueError: arguments that do not fit each other, or values that are not finite.
    NotImplementedError: the gradient is differentiated again.

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
  consts, rebuild = open_likelihood(with_constants(likelihood, constants), phi, batch)

  def model_of(params: MetaParams, batch: Batch, consts: Consts) -> TaskModel:
    return task_model(rebuild(consts), labels, params, batch, taken)

  given = (params, batch, consts, steps, same_in_any_batch(key))
  return differentiable_mode(inner, implicit, model_of, *given)
