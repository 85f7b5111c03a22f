"""The posterior mode of one task and its gradient by the implicit function theorem.

At the mode, grad_z J = 0. With g = d loss / d theta, C the curvature of -log p(D | theta) and

    (P + s C s) w = s * g,             P = precision, 1 for finite sigma

the derivatives of the loss at the mode are

    d/d phi = g - C (s * w),           d/d log sigma_m^2 = <w, z> over the entries of module m.

They need the mode, not the path to it: memory does not grow with the number of inner steps, and
any optimiser may find the mode. Nothing is divided by sigma.

Where the data say more than the prior, the first is a small difference of large numbers, which the
error of an inexact w enters as many times as C s has it. P w / s is the same number by the equation
for w, and inexact where sigma is small: `whitening.balance` takes of each where it is good.

Derivation of the second: theta moves with log sigma_m^2 as s z_m / 2 + s dz, where stationarity,
s grad L + z = 0, gives (I + s C s) dz = z_m / 2 - s C s z_m / 2. Then g . s z_m / 2 equals
w . (I + s C s) z_m / 2, and the sum of the two is w . z_m.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from shrinkmeta import validate
from shrinkmeta.curvature import solvers
from shrinkmeta.curvature.products import (
  Curvature,
  curvature_column,
  curvature_product,
  whitened_factor,
)
from shrinkmeta.curvature.solvers import SolveInfo
from shrinkmeta.mode.frozen import Frozen, freeze, merge, moving
from shrinkmeta.mode.optimise import Inner, InnerInfo, draw_at_end, objective
from shrinkmeta.mode.task_model import Mode, moving_model, posterior_mode
from shrinkmeta.mode.whitening import balance, to_theta
from shrinkmeta.model import modules
from shrinkmeta.model.likelihood import Likelihood
from shrinkmeta.model.tasks import Batch, check_batch, divisor, num_examples, num_rows

PyTree = Any


class MetaParams(NamedTuple):
  """What all tasks share, or a gradient with respect to it."""

  phi: PyTree  # mean of theta
  log_sigma2: dict[str, jax.Array]  # {module: []} log variance of theta around phi


@dataclasses.dataclass(frozen=True)
class Implicit:
  """How the implicit gradient is solved for; static.

  Attributes:
    curvature: "gauss_newton", positive semi-definite, or "hessian", exact and possibly indefinite.
    solver: "cg"; "dual", exact, by the singular values of an N C x D matrix (N examples, C outputs,
      Gauss-Newton only), which costs N C gradients where CG ends in N C + 1 products or, mostly,
      long before; "neumann"; "identity", which drops C from both formulas: w = s * g, d/d phi = g.
    max_steps: limit of CG and Neumann iterations.
    tol: relative residual at which they stop, and under which a solve counts as converged.
    damping: added to the operator's diagonal; biases the gradient towards "identity" / damping.
    batch_size: None is the curvature of all examples at once; else that of `num_batches` batches of
      as many, drawn once a solve with a key that the caller passes and scaled to all. (Under batch
      statistics outputs in a batch are others than in the whole: the curvature is theirs, as are
      the gradients of inner steps on batches.)
    num_batches: with 1 a solve's cost does not grow with N. Noise goes with the mean over tasks, a
      bias stays: in directions that no drawn example determines w is that of "identity". Take as
      many as determine what N examples do. None: as many as hold all examples, nothing being left
      to chance but which go together. More than one are taken in turn and linearised anew in every
      product, in the memory of one: about 1.5 times the work.
  """

  curvature: Curvature = "gauss_newton"
  solver: Literal["cg", "dual", "neumann", "identity"] = "cg"
  max_steps: int = 30
  tol: float = 1e-4
  damping: float = 0.0
  batch_size: int | None = None
  num_batches: int | None = 1

  def __post_init__(self) -> None:
    if self.curvature not in ("gauss_newton", "hessian"):
      raise ValueError(f'curvature must be "gauss_newton" or "hessian"; got {self.curvature!r}.')
    if self.solver not in ("cg", "dual", "neumann", "identity"):
      raise ValueError(
        f'solver must be "cg", "dual", "neumann" or "identity"; got {self.solver!r}.'
      )
    if self.solver == "dual" and self.curvature == "hessian":
      raise ValueError(
        'solver="dual" factorises J^T Lambda J: use curvature="gauss_newton" or solver="cg".'
      )
    if self.max_steps < 1 or not self.tol >= 0 or not self.damping >= 0:
      raise ValueError(
        "max_steps must be positive, tol and damping not negative; got "
        f"{self.max_steps}, {self.tol}, {self.damping}."
      )
    if self.batch_size is not None and self.batch_size < 1:
      raise ValueError(f"Implicit.batch_size must be positive, or None; got {self.batch_size}.")
    if self.batch_size is not None and self.solver == "identity":
      raise ValueError('solver="identity" takes no curvature: leave Implicit.batch_size None.')
    if self.num_batches is not None and self.num_batches < 1:
      raise ValueError(f"Implicit.num_batches must be positive, or None; got {self.num_batches}.")
    if self.num_batches != 1 and (self.batch_size is None or self.solver == "dual"):
      raise ValueError(
        f"Implicit.num_batches is {self.num_batches}: it goes with a batch_size, and with the "
        f'solvers "cg" and "neumann"; got batch_size={self.batch_size} and solver={self.solver!r}.'
      )


def implicit_gradient(
  implicit: Implicit,
  likelihood: Likelihood,
  labels: modules.Labels,
  phi: PyTree,
  log_sigma2: Mapping[str, jax.Array],
  batch: Batch,
  z: PyTree,
  g: PyTree,
  *,
  frozen: Frozen = frozenset(),
  start: PyTree | None = None,
  key: jax.Array | None = None,
) -> tuple[MetaParams, PyTree, SolveInfo]:
  """The two formulas at the head of this file, for one task.

  Args:
    z: the mode in whitened coordinates, a tree like the moving part of phi.
    g: d loss / d theta at the mode, a tree like phi.
    frozen: modules held at phi. The solve leaves them out; of the gradient with respect to phi
      they have their share, which goes through the curvature too.
    start: w to begin CG from.
    key: for implicit.batch_size; may be that of the mode's mini-batches, from which it draws apart.

  Returns:
    the gradient of the loss with respect to (phi, log_sigma2), w, and how the solve went.
  """
  model = moving_model(likelihood, labels, phi, log_sigma2, frozen)
  s, g_moving = model.white.scale, moving(g, labels, frozen)
  b = jax.tree.map(jnp.multiply, s, g_moving)

  def result(d_phi: PyTree, w: PyTree, info: SolveInfo) -> tuple[MetaParams, PyTree, SolveInfo]:
    zero = {m: jnp.zeros([], jnp.result_type(v)) for m, v in log_sigma2.items()}
    # Without a prior there is no sigma to depend on: precision 0.
    own = jax.tree.map(lambda p, w, z: p * w * z, model.white.precision, w, z)
    d_sigma = modules.gather(own, model.labels)
    return MetaParams(d_phi, zero | d_sigma), w, info

  if implicit.solver == "identity":
    return result(g, b, SolveInfo(*(jnp.full([], x) for x in (jnp.nan, 0, False, False))))

  batches = _batches(implicit, batch, key)
  first = jax.tree.map(lambda x: x[0], batches)
  theta = to_theta(model.phi, s, z)

  def total(make: Callable[[Batch], Callable[[PyTree], PyTree]], like: PyTree) -> Callable:
    """v -> sum over the batches of make(batch)(v), a tree like `like`."""
    if len(jax.tree.leaves(batches.targets)[0]) == 1:
      return make(first)
    add = lambda v: lambda sum_, mini: (optax.tree.add(sum_, make(mini)(v)), None)
    return lambda v: jax.lax.scan(add(v), optax.tree.zeros_like(like), batches)[0]

  product = total(
    lambda mini: curvature_product(implicit.curvature, model.likelihood, theta, mini), theta
  )

  def operator(v: PyTree) -> PyTree:
    curved = product(jax.tree.map(jnp.multiply, s, v))
    return jax.tree.map(
      lambda p, s, c, v: (p + implicit.damping) * v + s * c, model.white.precision, s, curved, v
    )

  if implicit.solver == "dual":
    # The evidence's g is by a factorisation of its own.
    factor = whitened_factor(model.likelihood, solvers.after(b, theta), s, first)
    free = jnp.any(jnp.stack([jnp.isposinf(jnp.asarray(v)) for v in log_sigma2.values()]))
    shift = jnp.where(free, jnp.nan, 1.0 + implicit.damping)  # see check_dual, for what it can know
    w, info = solvers.dual(factor.a, operator, b, shift, implicit.tol)
    info = info._replace(negative_curvature=factor.negative)
  elif implicit.solver == "neumann":
    w, info = solvers.neumann(operator, b, implicit.max_steps, implicit.tol)
  else:
    w, info = solvers.cg(operator, b, implicit.max_steps, implicit.tol, start)
  column = product
  if frozen:
    whole = merge(theta, phi)
    column = total(
      lambda mini: curvature_column(implicit.curvature, likelihood, whole, theta, mini), whole
    )
  u = jax.tree.map(jnp.multiply, s, w)
  curved = column(u)
  by_prior = jax.tree.map(lambda p, w: (p + implicit.damping) * w, model.white.precision, w)
  # The curvature along u: that of a sharp likelihood is more than one an example.
  along, length = optax.tree.vdot(u, moving(curved, labels, frozen)), optax.tree.vdot(u, u)
  along = jnp.where(length == 0, 0.0, along / jnp.where(length == 0, 1.0, length))
  c = jnp.maximum(num_examples(batch, along.dtype), along)
  direct = optax.tree.sub(g, curved)

  def known(p: Any, direct: jax.Array, balanced: jax.Array) -> jax.Array:
    # Without a prior the system has no solution where the data leave entries open, and nothing
    # tells s x: theta stays at phi there, and x is what C does not reach of g.
    return direct if p is None else jnp.where(p + implicit.damping > 0, balanced, direct)

  balanced = balance(s, c, direct, by_prior)
  none = lambda x: x is None
  d_phi = jax.tree.map(known, model.white.precision, direct, balanced, is_leaf=none)
  return result(d_phi, w, info)


def check_whole(implicit: Implicit) -> None:
  """Raises ValueError where the curvature is sampled: the evidence and the joint solve need all."""
  if implicit.batch_size is not None:
    raise ValueError(
      f"Implicit.batch_size is {implicit.batch_size}: it is for imaml, sigma_imaml and "
      'sigma_reptile, with a solve a task. The evidence and sigma_gradient="joint" take all '
      "examples: leave it None."
    )


def check_dual(implicit: Implicit, log_sigma2: Mapping[str, Any]) -> None:
  """Raises ValueError where a sigma is known to be inf: dual solves have a prior in every entry."""
  if implicit.solver == "dual":
    modules.finite_sigma(log_sigma2, 'dual solve: use solver="cg"')


def _batches(implicit: Implicit, batch: Batch, key: jax.Array | None) -> Batch:
  """The examples of which the curvature is taken, [B, n, ...], with weights that sum to N."""
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
  """theta_hat = argmax_theta log p(D | theta) + log p(theta | phi, sigma), for one task.

  Differentiable backwards in phi, log_sigma2 and the float leaves of `batch`, by the implicit
  rule. The derivative is that of the exact mode: as good as `info` and the solver's residual say.

  Args:
    log_sigma2: {module: scalar}; -inf holds a module at phi, +inf takes its prior away.
    batch: one task's training data, without the T axis; `jax.vmap` over it for many.
    steps: replaces inner.steps.
    key: for inner.batch_size and implicit.batch_size; consumed.
    frozen: modules to leave out of the work beside those whose log_sigma2 is known here to be
      -inf; for use under jit, where log_sigma2 is not known.

  Returns:
    (theta, info): a tree like phi, and an InnerInfo, whose derivative is zero.

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

  def solve(phi: PyTree, log_s2: PyTree, batch: Batch, key: Any) -> Mode:
    return posterior_mode(
      inner, likelihood, labels, phi, log_s2, batch, taken, steps=steps, key=key
    )

  # Of theta only what moves leaves this function. What is held would be the same for all tasks of a
  # vmap, its cotangent summed over tasks before `backward` runs, and then once more after it.
  # So would a theta that is the same for all keys of a vmap, while `backward` draws by the key.
  def part_of(found: Mode, key: Any) -> PyTree:
    part = moving(found.theta, labels, taken)
    if implicit.batch_size is None or key is None:
      return part
    zero = 0 * jax.random.key_data(key).ravel()[0]
    return jax.tree.map(lambda x: x + zero.astype(x.dtype), part)

  @jax.custom_vjp
  def mode(phi: PyTree, log_s2: PyTree, batch: Batch, key: Any) -> tuple[PyTree, InnerInfo]:
    found = solve(phi, log_s2, batch, key)
    return part_of(found, key), found.info

  def forward(phi: PyTree, log_s2: PyTree, batch: Batch, key: Any) -> tuple[Any, Any]:
    found = solve(phi, log_s2, batch, key)
    return (part_of(found, key), found.info), (phi, log_s2, batch, key, found.z)

  def backward(residuals: Any, cotangents: Any) -> tuple[Any, ...]:
    phi, log_s2, batch, key, z = residuals
    g = merge(cotangents[0], optax.tree.zeros_like(phi))
    grad, w, _ = implicit_gradient(
      implicit, likelihood, labels, phi, log_s2, batch, z, g, frozen=taken, key=key
    )
    model = moving_model(likelihood, labels, phi, log_s2, taken)

    def stationarity(batch: Batch) -> PyTree:  # grad_z J, a sum over examples
      loss = objective(model.likelihood, model.phi, model.white, batch)
      n = divisor(num_examples(batch, dtype))
      return jax.tree.map(lambda x: n * x, jax.grad(lambda z: loss(z, batch))(z))

    d_batch = jax.vjp(stationarity, batch)[1](optax.tree.scale(-1.0, w))[0]
    return grad.phi, grad.log_sigma2, d_batch, None

  mode.defvjp(forward, backward)
  log_s2 = {m: jnp.asarray(v, dtype) for m, v in log_sigma2.items()}
  part, info = mode(phi, log_s2, batch, key)
  return merge(part, phi), info
