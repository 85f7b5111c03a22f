"""The evidence of one task: how probable are its data, theta integrated out?

    log p(D | phi, sigma) ~ log p(D | theta_hat) - |z_hat|^2 / 2 - log det(I + s C s) / 2

Laplace's approximation at the mode with C the Gauss-Newton curvature, in whitened coordinates, in
which no normaliser of the prior is left over. Exact for linear-Gaussian models: the hierarchical
model is then a linear mixed model, this its marginal likelihood, and the maximum its
maximum-likelihood fit. It needs no validation data.

Gradient: at the mode the first two terms depend on (phi, sigma) as if z_hat were fixed. The third
depends on theta_hat as well, whose own dependence is that of `implicit.py`: exact for
linear-Gaussian models, and with the exact Hessian; Gauss-Newton there is off by some tenths of a
percent on a small network.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from shrinkmeta import validate
from shrinkmeta.curvature.products import output_curvature, whitened_jacobian
from shrinkmeta.curvature.solvers import SolveInfo, exact
from shrinkmeta.gradients.implicit import Implicit, MetaParams, check_whole, implicit_gradient
from shrinkmeta.gradients.log_det import LogDet, log_det
from shrinkmeta.mode.frozen import Frozen, freeze, merge, moving
from shrinkmeta.mode.optimise import Inner, InnerInfo
from shrinkmeta.mode.task_model import Mode, moving_model, posterior_mode
from shrinkmeta.mode.whitening import balance
from shrinkmeta.model import modules
from shrinkmeta.model.density import masked_log_prob
from shrinkmeta.model.likelihood import Likelihood
from shrinkmeta.model.tasks import Batch, check_batch, num_examples

PyTree = Any


class EvidenceInfo(NamedTuple):
  """How a log evidence was found."""

  inner: InnerInfo  # of the mode
  solve: SolveInfo | None  # of the gradient through the mode; None from `log_evidence`
  log_det: jax.Array  # [] log det(I + s C s)
  log_det_error: jax.Array  # [] its standard error; 0 where it is exact


class _Pieces(NamedTuple):
  likelihood: Likelihood
  labels: modules.Labels
  batch: Batch
  frozen: Frozen

  def fit(self, theta: PyTree, z: PyTree) -> jax.Array:
    """log p(D | theta) - |z|^2 / 2 []."""
    outputs = self.likelihood.predict(theta, self.batch.inputs)
    log_p = masked_log_prob(self.likelihood, outputs, self.batch)
    return log_p - 0.5 * optax.tree.norm(z, squared=True)

  def gradient_of_fit(self, params: MetaParams, g: PyTree, z: PyTree) -> MetaParams:
    """With z held, g = d fit / d theta: g for phi, <s g, z> / 2 for log sigma^2.

    At the mode s g is z; of an inexact mode, z is the better of the two where the data say most.
    """
    model = moving_model(self.likelihood, self.labels, params.phi, params.log_sigma2, self.frozen)
    g = balance(model.white.scale, num_examples(self.batch, jax.tree.leaves(g)[0].dtype), g, z)
    own = moving(g, self.labels, self.frozen)
    half = jax.tree.map(lambda s, g, z: 0.5 * s * g * z, model.white.scale, own, z)
    zero = {m: jnp.zeros_like(v) for m, v in params.log_sigma2.items()}
    return MetaParams(g, zero | modules.gather(half, model.labels))

  def log_det(
    self, theta: PyTree, log_sigma2: PyTree, how: LogDet, key: jax.Array | None
  ) -> tuple[jax.Array, jax.Array]:
    """As `log_det`, for all of theta."""
    model = moving_model(self.likelihood, self.labels, theta, log_sigma2, self.frozen)
    return log_det(how, model.likelihood, model.phi, model.white.scale, self.batch, key)


def evidence_at(
  likelihood: Likelihood,
  labels: modules.Labels,
  phi: PyTree,
  log_sigma2: Mapping[str, Any],
  batch: Batch,
  mode: Mode,
  *,
  implicit: Implicit,
  log_det: LogDet,
  frozen: Frozen = frozenset(),
  key: jax.Array | None = None,
) -> tuple[jax.Array, MetaParams, EvidenceInfo]:
  """(log evidence [], its gradient, how it went), given the mode; arguments as `log_evidence`."""
  pieces = _Pieces(likelihood, labels, batch, frozen)
  params = MetaParams(phi, dict(log_sigma2))
  fit, g = jax.value_and_grad(pieces.fit)(mode.theta, mode.z)
  grad = pieces.gradient_of_fit(params, g, mode.z)
  determinant = jax.value_and_grad(pieces.log_det, argnums=(0, 1), has_aux=True)
  (value, error), (g, d_sigma) = determinant(mode.theta, params.log_sigma2, log_det, key)
  through_mode, _, solve = implicit_gradient(
    implicit, likelihood, labels, phi, params.log_sigma2, batch, mode.z, g, frozen=frozen
  )
  of_log_det = through_mode._replace(log_sigma2=optax.tree.add(through_mode.log_sigma2, d_sigma))
  grad = optax.tree.add_scale(grad, -0.5, of_log_det)
  return fit - 0.5 * value, grad, EvidenceInfo(mode.info, solve, value, error)


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
) -> tuple[jax.Array, EvidenceInfo]:
  """log p(D | phi, sigma) of one task [], theta integrated out; see the head of this file.

  Differentiable backwards in phi and log_sigma2. A parameter of the likelihood, such as the scale
  of `sm.gaussian_with_scale`, is a module frozen at sigma = 0: its entry of phi has a gradient as
  all others have.

  Args:
    log_sigma2: {module: scalar}, finite, or -inf for modules without a task-specific part.
    batch: one task's data, without the T axis; `jax.vmap` over it for many.
    inner, implicit, log_det: how mode, its derivative and the determinant are found. A mode short
      of its tolerance makes the value too small, in second order, and the gradient wrong in first.
    key: for a stochastic log-determinant and for inner.batch_size; consumed.
    frozen: as for `map_estimate`.

  >>> import jax.numpy as jnp
  >>> import shrinkmeta as sm
  >>> linear = sm.gaussian(lambda theta, x: x * theta["w"])
  >>> batch = sm.Batch(jnp.ones(1), jnp.array([2.0]))
  >>> value, info = sm.log_evidence(linear, {"w": "w"}, {"w": 0.0}, {"w": 0.0}, batch)
  >>> exact = -0.5 * (4.0 / 2.0 + jnp.log(2 * jnp.pi * 2.0))  # y ~ N(0, 1 + 1)
  >>> bool(jnp.allclose(value, exact))
  True
  """
  dtype = validate.parameters("phi", phi)
  modules.check_labels(labels, phi)
  modules.check_modules("log_sigma2", log_sigma2, labels)
  log_s2 = modules.finite_sigma(log_sigma2, "evidence")
  check_whole(implicit)
  check_batch("batch", batch)
  phi, taken = freeze(jax.tree.map(jnp.asarray, phi), log_sigma2, labels, frozen)
  mode_key, probe_key = (None, None) if key is None else jax.random.split(key)

  def find(phi: PyTree, log_s2: PyTree) -> Mode:
    return posterior_mode(inner, likelihood, labels, phi, log_s2, batch, taken, key=mode_key)

  @jax.custom_vjp
  def value(phi: PyTree, log_s2: PyTree) -> tuple[jax.Array, EvidenceInfo]:
    mode, pieces = find(phi, log_s2), _Pieces(likelihood, labels, batch, taken)
    determinant, error = pieces.log_det(mode.theta, log_s2, log_det, probe_key)
    info = EvidenceInfo(mode.info, None, determinant, error)
    return pieces.fit(mode.theta, mode.z) - 0.5 * determinant, info

  def forward(phi: PyTree, log_s2: PyTree) -> tuple[Any, MetaParams]:
    result, grad, info = evidence_at(
      likelihood,
      labels,
      phi,
      log_s2,
      batch,
      find(phi, log_s2),
      implicit=implicit,
      log_det=log_det,
      frozen=taken,
      key=probe_key,
    )
    return (result, info._replace(solve=None)), grad

  def backward(grad: MetaParams, cotangents: Any) -> tuple[Any, ...]:
    return tuple(optax.tree.scale(cotangents[0], part) for part in grad)

  value.defvjp(forward, backward)
  return value(phi, {m: v.astype(dtype) for m, v in log_s2.items()})


def restriction(
  likelihood: Likelihood,
  labels: modules.Labels,
  phi: PyTree,
  log_sigma2: Mapping[str, Any],
  batches: Batch,
  integrated: Sequence[str],
  frozen: Iterable[str] = (),
) -> jax.Array:
  """What REML adds to the sum of T log evidences: P log(2 pi) / 2 - log det(sum_t F_t) / 2 [].

  F_t = X^T (Lambda^-1 + J s^2 J^T)^-1 X, [P, P], is what task t tells about the P entries of phi
  in the modules `integrated`, X = d outputs / d those entries. For a linear-Gaussian model phi is
  thereby integrated out, with a flat prior: the sum is the restricted likelihood where phi is its
  maximiser. For other models it is Laplace's approximation, taken at theta = phi. Differentiable.

  Args:
    batches: leaves lead with [T].
    integrated: modules of phi; a variance parameter, such as a log scale, is none of them.
  """
  modules.check_labels(labels, phi)
  modules.check_modules("log_sigma2", log_sigma2, labels)
  log_s2 = modules.finite_sigma(log_sigma2, "evidence")
  if isinstance(integrated, str):
    raise ValueError(f"integrated is a sequence of modules; got the string {integrated!r}.")
  for module in integrated:
    if module not in modules.names(labels):
      raise ValueError(f"{module!r} is no module; the modules are {modules.names(labels)}.")
  phi, taken = freeze(phi, log_sigma2, labels, frozen)
  model = moving_model(likelihood, labels, phi, log_s2, taken)
  part = jax.tree.map(lambda label, p: p if label in integrated else None, labels, phi)
  ones = jax.tree.map(lambda p: jnp.ones([], jnp.result_type(p)), part)
  fixed = likelihood._replace(predict=lambda p, x: likelihood.predict(merge(p, phi), x))

  def information(batch: Batch) -> jax.Array:
    outputs, x = whitened_jacobian(fixed, part, ones, batch)  # [R, P]
    _, rows = whitened_jacobian(model.likelihood, model.phi, model.white.scale, batch)  # [R, D]
    lam = output_curvature(likelihood, outputs, batch)
    weigh = lambda v: jnp.einsum("nij,njd->nid", lam, v.reshape(*lam.shape[:2], -1)).reshape(
      v.shape
    )
    # X^T (Lambda^-1 + A A^T)^-1 X, the least of |X - A Z|^2_Lambda + |Z|^2: a sum of squares, where
    # Woodbury's difference would lose in float32 what a large sigma leaves of it.
    with exact():
      inner = jnp.eye(rows.shape[1], dtype=rows.dtype) + rows.T @ weigh(rows)
      z = jnp.linalg.solve(inner, rows.T @ weigh(x))
      left = x - rows @ z
      return left.T @ weigh(left) + z.T @ z

  total = jnp.sum(jax.vmap(information)(batches), 0)
  factor = jnp.linalg.cholesky(total)
  half = jnp.sum(jnp.log(jnp.diag(factor)))
  # phi is NaN where `frozen` contradicts a traced sigma, which a linear model would not show.
  contradicted = sum(jnp.sum(0.0 * p) for p in jax.tree.leaves(phi))
  return 0.5 * total.shape[0] * jnp.log(2 * jnp.pi) - half + contradicted
