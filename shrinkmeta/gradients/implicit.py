"""The gradient through the posterior mode of one task, by the implicit function theorem.

At the mode, grad_z J = 0. With g = d loss / d theta, C the curvature of -log p(D | theta) and

    K w = s * g,                       K = P + s C s, P = 1 for finite sigma

the derivatives of the loss at the mode are

    d/d phi = g - C (s * w),           d/d log sigma_m^2 = <w, z> over the entries of module m.

They need the mode, not the path to it: memory does not grow with the number of inner steps, and
any optimiser may find the mode. Nothing is divided by sigma.

By the equation for w, d/d phi is P w / s too. Where the data dominate the prior, the first form
subtracts two large, nearly equal vectors; where sigma is small, the second divides by a small
number. `TaskModel.balance` makes one of both.

Derivation of the second formula: theta moves with log sigma_m^2 as s z_m / 2 + s dz. Stationarity,
s grad L + z = 0, gives (I + s C s) dz = z_m / 2 - s C s z_m / 2. Then g . s z_m / 2 equals
w . (I + s C s) z_m / 2, and the sum of the two is w . z_m.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from shrinkmeta import validate
from shrinkmeta.base import InnerInfo, MetaParams, SolveInfo
from shrinkmeta.config import Implicit, Inner, check_dual
from shrinkmeta.curvature import solvers
from shrinkmeta.mode.frozen import freeze, merge
from shrinkmeta.mode.optimise import Mode, Steps, draw_at_end, posterior_mode
from shrinkmeta.mode.task_model import TaskModel, task_model
from shrinkmeta.model import modules
from shrinkmeta.model.likelihood import Likelihood
from shrinkmeta.model.tasks import Batch, check_batch, divisor, num_examples, num_rows

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
  through the curvature too.

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
  b = model.scaled(model.cut(g))
  precision = model.white.precision

  def result(d_phi: PyTree, w: PyTree, info: SolveInfo) -> tuple[MetaParams, PyTree, SolveInfo]:
    # Without a prior there is no sigma to depend on: precision 0.
    d_sigma = model.by_module(jax.tree.map(lambda p, w, z: p * w * z, precision, w, z))
    return MetaParams(d_phi, d_sigma), w, info

  if implicit.solver == "identity":
    return result(g, b, SolveInfo(*(jnp.full([], x) for x in (jnp.nan, 0, False, False))))

  here = model.around(model.theta(z))
  batches = _batches(implicit, model.batch, key)
  product = _total(lambda mini: mini.product(implicit.curvature), here, batches, here.part)
  operator = lambda v: model.k(v, product(model.scaled(v)), implicit.damping)
  w, info = _solve(implicit, here, batches, operator, b, start)
  column = product
  if model.frozen:
    of_column = lambda mini: mini.column(implicit.curvature)
    column = _total(of_column, here, batches, here.params.phi)
  u = model.scaled(w)
  curved = column(u)
  by_prior = jax.tree.map(lambda p, w: (p + implicit.damping) * w, precision, w)
  # The curvature along u: that of a sharp likelihood is more than one an example.
  along, length = optax.tree.vdot(u, model.cut(curved)), optax.tree.vdot(u, u)
  along = jnp.where(length == 0, 0.0, along / jnp.where(length == 0, 1.0, length))
  direct = optax.tree.sub(g, curved)
  balanced = model.balance(direct, by_prior, jnp.maximum(model.count, along))

  def known(p: Any, direct: jax.Array, balanced: jax.Array) -> jax.Array:
    # Without a prior the system has no solution where the data leave entries open, and nothing
    # tells s x: theta stays at phi there, and x is what C does not reach of g.
    return direct if p is None else jnp.where(p + implicit.damping > 0, balanced, direct)

  none = lambda x: x is None
  return result(jax.tree.map(known, precision, direct, balanced, is_leaf=none), w, info)


def _total(
  make: Callable[[TaskModel], Linear], model: TaskModel, batches: Batch, like: PyTree
) -> Linear:
  """Return v -> the sum over mini-batches [B, n, ...] of make(mini-batch)(v), like `like`."""
  if num_rows(batches) == 1:
    return make(model.on(jax.tree.map(lambda x: x[0], batches)))
  add = lambda v: lambda sum_, mini: (optax.tree.add(sum_, make(model.on(mini))(v)), None)
  return lambda v: jax.lax.scan(add(v), optax.tree.zeros_like(like), batches)[0]


def _solve(
  implicit: Implicit,
  here: TaskModel,
  batches: Batch,
  operator: Linear,
  b: PyTree,
  start: PyTree | None,
) -> tuple[PyTree, SolveInfo]:
  """Solve K w = b by the method of `implicit`; `here` is the model around theta_hat."""
  if implicit.solver == "dual":
    # The evidence's g comes from a factorisation of its own, which this one must wait for.
    first = here.on(jax.tree.map(lambda x: x[0], batches))
    factor = first.around(solvers.after(b, first.params.phi)).factor()
    free = jnp.any(jnp.stack([jnp.isposinf(v) for v in here.params.log_sigma2.values()]))
    shift = jnp.where(free, jnp.nan, 1.0 + implicit.damping)  # see check_dual, for what it can know
    w, info = solvers.dual(factor.a, operator, b, shift, implicit.tol)
    return w, info._replace(negative_curvature=factor.negative)
  if implicit.solver == "neumann":
    return solvers.neumann(operator, b, implicit.max_steps, implicit.tol)
  return solvers.cg(operator, b, implicit.max_steps, implicit.tol, start)


def _batches(implicit: Implicit, batch: Batch, key: jax.Array | None) -> Batch:
  """Return the examples whose curvature is taken, [B, n, ...], with weights that sum to N."""
  size, count = implicit.batch_size, implicit.num_batches
  if size is None:
    return jax.tree.map(lambda x: x[None], batch)
  if key is None:
    raise ValueError("Implicit.batch_size draws examples: pass key=jax.random.key(...) along.")
  if size * (count or 1) > num_rows(batch):
    raise ValueError(
      f"Implicit asks for {count or 1} x {size} examples (num_batches x batch_size), but the task "
      f"has {num_rows(batch)} rows; choose less, or None for all examples."
    )
  drawn = draw_at_end(key, batch, size, count)
  mask = jnp.asarray(drawn.mask)
  share = num_examples(batch, mask.dtype) / divisor(jnp.sum(mask))
  return drawn._replace(mask=share * mask)


def differentiable_mode(
  inner: Inner,
  implicit: Implicit,
  model: TaskModel,
  steps: Steps = None,
  key: jax.Array | None = None,
) -> tuple[PyTree, InnerInfo]:
  """Return (theta_hat, info) of one task, differentiable backwards by the implicit rule.

  Args:
    inner: how the mode is found.
    implicit: how its gradient is found.
    model: the task model. The rule covers its phi, log sigma^2 and data.
    steps: replaces inner.steps; no tuple.
    key: for inner.batch_size and implicit.batch_size; consumed.
  """

  def find(params: MetaParams, batch: Batch, key: Any) -> tuple[TaskModel, Mode]:
    task = model.at(params, batch)
    return task, posterior_mode(inner, task, key=key, steps=steps)

  # Only the part that moves leaves this function. Held leaves would be the same for all tasks of a
  # vmap: JAX would sum their cotangent over tasks before `backward` runs, and then once more after
  # it. So would a theta that is the same for all keys of a vmap, while `backward` draws by the key.
  def part_of(found: Mode, key: Any) -> PyTree:
    part = model.cut(found.theta)
    if implicit.batch_size is None or key is None:
      return part
    zero = 0 * jax.random.key_data(key).ravel()[0]
    return jax.tree.map(lambda x: x + zero.astype(x.dtype), part)

  @jax.custom_vjp
  def mode(params: MetaParams, batch: Batch, key: Any) -> tuple[PyTree, InnerInfo]:
    found = find(params, batch, key)[1]
    return part_of(found, key), found.info

  def forward(params: MetaParams, batch: Batch, key: Any) -> tuple[Any, Any]:
    found = find(params, batch, key)[1]
    return (part_of(found, key), found.info), (params, batch, key, found.z)

  def backward(residuals: Any, cotangents: Any) -> tuple[Any, ...]:
    params, batch, key, z = residuals
    task = model.at(params, batch)
    g = merge(cotangents[0], optax.tree.zeros_like(params.phi))
    grad, w, _ = implicit_gradient(implicit, task, z, g, key=key)

    def stationarity(batch: Batch) -> PyTree:  # grad_z J, a sum over examples
      moved = task.on(batch)
      of_z = jax.grad(lambda z: moved.objective(z, batch))(z)
      return jax.tree.map(lambda x: divisor(moved.count) * x, of_z)

    d_batch = jax.vjp(stationarity, batch)[1](optax.tree.scale(-1.0, w))[0]
    return grad, d_batch, None

  mode.defvjp(forward, backward)
  part, info = mode(model.params, model.batch, key)
  return model.whole(part), info


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
) -> tuple[PyTree, InnerInfo]:
  """Return theta_hat = argmax_theta log p(D | theta) + log p(theta | phi, sigma), for one task.

  It is differentiable backwards in phi, log_sigma2 and the float leaves of `batch`, by the implicit
  rule. The derivative is that of the exact mode: `info` and the solver's residual say how far the
  result is from it.

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

  Returns:
    (theta, info): a tree like phi, and an InnerInfo, whose derivative is zero.

  Raises:
    ValueError: arguments that do not fit each other, or values that are not finite.

  >>> import jax.numpy as jnp
  >>> import shrinkmeta as sm
  >>> linear = sm.gaussian(lambda theta, x: x @ theta["w"])
  >>> batch = sm.Batch(jnp.eye(2), jnp.array([1.0, 2.0]))
  >>> theta, info = sm.map_estimate(linear, {"w": "w"}, {"w": jnp.zeros(2)}, {"w": 0.0}, batch)
  >>> [round(float(v), 4) for v in theta["w"]], bool(info.converged)
  ([0.5, 1.0], True)
  """
  dtype = validate.parameters("phi", phi)
  modules.check_labels(labels, phi)
  modules.check_modules("log_sigma2", log_sigma2, labels)
  check_batch("batch", batch)
  check_dual(implicit, log_sigma2)
  phi, taken = freeze(jax.tree.map(jnp.asarray, phi), log_sigma2, labels, frozen)
  params = MetaParams(phi, {m: jnp.asarray(v, dtype) for m, v in log_sigma2.items()})
  model = task_model(likelihood, labels, params, batch, taken)
  return differentiable_mode(inner, implicit, model, steps, key)
