"""The log-determinant of K = I + s C s, with the Gauss-Newton curvature C: a term of the evidence.

Let A = Lambda^(1/2) J s [R, D], where R counts the outputs of all examples and D the task-specific
parameters (curvature/jacobian.py):

    log det(I + s C s) = log det(I + A^T A) = sum_i log(1 + a_i^2),   a_i the singular values of A.

If A is too large, stochastic Lanczos quadrature estimates tr log K = E v^T log(K) v. The entries of
v are random signs, +1 or -1. Each v takes a few products with K. The gradient is that of E w^T K v,
with w = K^-1 v treated as a constant; w comes from the same Lanczos basis.

References: Ubaru, Chen, Saad, Fast estimation of tr(f(A)) via stochastic Lanczos quadrature, 2017.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from shrinkmeta.config import LogDet
from shrinkmeta.curvature.jacobian import (
  Factor,
  by_example,
  one_output_array,
  output_curvature,
  square_root,
  whitened_jacobian,
)
from shrinkmeta.curvature.lanczos import lanczos
from shrinkmeta.curvature.solvers import exact, split, thin_svd
from shrinkmeta.mode.task_model import TaskModel

PyTree = Any


def log_det(
  how: LogDet, model: TaskModel, key: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
  """Return (log det K [], its standard error []), with C taken at the model's phi.

  The standard error of the exact method is 0. The log-determinant is differentiable in phi and
  log sigma^2. For the log-determinant at theta_hat pass `model.around(theta_hat)`.

  Args:
    how: the method and its settings.
    model: the task model.
    key: draws the random signs, and is consumed. The exact method needs none.
  """
  entries, dtype = _size(model)
  if _is_exact(how, entries):
    return _exact(model.factor()), jnp.zeros([], dtype)
  if key is None:
    raise ValueError(
      f"This log-determinant ({entries} entries of A) is estimated from random probes: pass key="
      'jax.random.key(...), or set LogDet(method="exact").'
    )
  return _stochastic(how, model, key)


def log_det_twice(how: LogDet, model: TaskModel) -> jax.Array:
  """Return log det K [], with exact first and second derivatives in phi, log sigma^2 and the data.

  The value is that of the exact method of `log_det`. Let E = K - K_0, where K_0 is K at the present
  arguments, as a constant. To second order in E,

      log det K = log det K_0 + tr M - tr M^2 / 2,   M = K_0^-1/2 E K_0^-1/2

  M is W^T Lambda W - W_0^T Lambda_0 W_0 with W = J s K_0^-1/2. So K_0^-1 never multiplies E, whose
  entries are far larger than those of M where the data dominate the prior.

  Args:
    how: the method and its settings. The stochastic method has no second derivatives.
    model: the task model.

  Raises:
    ValueError: the settings ask for the stochastic method.
  """
  entries, _ = _size(model)
  if not _is_exact(how, entries):
    raise ValueError(
      f"twice=True needs an exact log-determinant. log_det has method={how.method!r} and limit="
      f'{how.limit}, and would estimate this one ({entries} entries of A). Set LogDet("exact").'
    )
  outputs, rows = whitened_jacobian(model.outputs_at, model.part, model.white.scale)
  lam = output_curvature(model.likelihood, outputs, model.batch)
  rows_0, lam_0 = jax.lax.stop_gradient((rows, lam))
  root, negative = square_root(lam_0)
  _, singular, v = thin_svd(by_example(root, rows_0))
  square = jnp.square(singular)

  def curvature(rows: jax.Array, lam: jax.Array) -> jax.Array:  # W^T Lambda W [D, D]
    along, off = split(rows, v)
    with exact():
      w = off + (along / jnp.sqrt(1.0 + square)) @ v
      return w.T @ by_example(lam, w)

  m = curvature(rows, lam) - curvature(rows_0, lam_0)
  log_det_0 = jnp.sum(jnp.log1p(square))
  second_order = log_det_0 + jnp.trace(m) - 0.5 * jnp.sum(m * m)
  return jnp.where(negative, jnp.nan, second_order)  # log p is not concave: A^T A is not s C s


def _is_exact(how: LogDet, entries: int) -> bool:
  """Return whether the settings ask for the exact method for so many entries of A."""
  return how.method == "exact" or (how.method == "auto" and entries <= how.limit)


def _size(model: TaskModel) -> tuple[int, Any]:
  """Return (the number of entries of A, the dtype of the outputs)."""
  outputs = jax.eval_shape(model.outputs_at, model.part)
  one_output_array(outputs)
  return outputs.size * sum(x.size for x in jax.tree.leaves(model.part)), outputs.dtype


def _exact(factor: Factor) -> jax.Array:
  """Return sum_i log(1 + a_i^2) [], from the singular values a_i of A.

  Forming A^T A instead would lose eigenvalues that are small beside the largest one. The gradient
  is tr K^-1 dK with K^-1 held fixed:

      2 tr (Lambda J s K^-1)^T d(J s) + tr (J s K^-1 s J^T) dLambda
  """
  # JAX's gradient of an SVD is NaN where two singular values agree: docs/hazards.md#svd-gradient.
  a, rows, root = jax.lax.stop_gradient((factor.a, factor.rows, factor.root))
  u, singular, v = thin_svd(a)
  square = jnp.square(singular)
  along, off = split(rows, v)
  shape = (*root.shape[:2], -1)
  off, along = off.reshape(shape), along.reshape(shape)
  with exact():
    solved = (u * (singular / (1.0 + square))[None]) @ v  # A K^-1
    of_lam = jnp.einsum("nid,njd->nij", off, off)
    of_lam = of_lam + jnp.einsum("nid,d,njd->nij", along, 1.0 / (1.0 + square), along)
  of_rows = 2.0 * by_example(jnp.swapaxes(root, 1, 2), solved)
  slope = jnp.sum(of_rows * factor.rows) + jnp.sum(of_lam * factor.lam)
  value = jnp.sum(jnp.log1p(square)) + (slope - jax.lax.stop_gradient(slope))
  return jnp.where(factor.negative, jnp.nan, value)  # log p is not concave: A^T A is not s C s


def _stochastic(how: LogDet, model: TaskModel, key: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Estimate tr log K by Lanczos quadrature: return (estimate [], standard error [])."""
  flat, unravel = ravel_pytree(model.part)

  def product_of(model: TaskModel) -> Any:
    curved = model.product("gauss_newton")

    def product(v: jax.Array) -> jax.Array:  # K v
      part = unravel(v)
      return ravel_pytree(model.k_product(part, curved(model.scaled(part))))[0]

    return product

  held = product_of(model.at(jax.lax.stop_gradient(model.params)))
  signs = jax.random.rademacher(key, (how.probes, flat.size), flat.dtype)

  def quadrature(v: jax.Array) -> tuple[jax.Array, jax.Array]:  # v^T log(K) v and K^-1 v
    krylov = lanczos(held, v, how.steps)
    values, vectors = krylov.eigh()
    # If log p is concave in the outputs, no eigenvalue of K is below 1.
    concave = jnp.min(values) > 1.0 - 1e-4 * jnp.max(values)
    values = jnp.where(concave, jnp.maximum(values, 1.0), jnp.nan)
    first = vectors[0]  # the first entry of each eigenvector
    norm = jnp.linalg.norm(v)
    with exact():
      solution = norm * (vectors @ (first / values)) @ krylov.basis
    return norm**2 * jnp.sum(first**2 * jnp.log(values)), solution

  estimates, solutions = jax.lax.stop_gradient(jax.vmap(quadrature)(signs))
  # slope - stop_gradient(slope) is 0, and has the gradient of the log-determinant.
  product = product_of(model)
  slope = jnp.mean(jax.vmap(lambda w, v: w @ product(v))(solutions, signs))
  value = jnp.mean(estimates) + (slope - jax.lax.stop_gradient(slope))
  return value, jnp.std(estimates, ddof=1) / how.probes**0.5
