"""log det(I + s C s), C the Gauss-Newton curvature: what the evidence has beside the mode.

With A = Lambda^(1/2) J s, R x D (R = N C rows: examples times outputs; D entries that move),

    log det(I + s C s) = log det(I + A^T A) = sum_i log(1 + a_i^2),   a_i the singular values of A;

or, for an A that does not fit, stochastic Lanczos quadrature:
tr log K = E v^T log(K) v over random signs v, each by a few products with K. Its gradient is that
of E w^T K v with w = K^-1 v held, from the same Lanczos basis.

References: Ubaru, Chen, Saad, Fast estimation of tr(f(A)) via stochastic Lanczos quadrature, 2017.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from shrinkmeta.curvature.lanczos import lanczos
from shrinkmeta.curvature.products import by_example, curvature_product, whitened_factor
from shrinkmeta.curvature.solvers import exact, split, thin_svd
from shrinkmeta.model.likelihood import Likelihood
from shrinkmeta.model.tasks import Batch

PyTree = Any


@dataclasses.dataclass(frozen=True)
class LogDet:
  """How the log-determinant is found; static.

  Attributes:
    method: "exact"; "lanczos", an estimate with a standard error, from a key; "auto", exact where
      A has at most `limit` entries.
    limit: of the entries of A, R D. Exact work grows as min(R, D) R D.
    probes: random vectors of "lanczos"; the standard error falls with their square root. Rounding,
      up to D |K| times the precision, is no part of it.
    steps: products with K a probe, R + 1 at most for an exact quadrature.
  """

  method: Literal["auto", "exact", "lanczos"] = "auto"
  limit: int = 2**24
  probes: int = 16
  steps: int = 32

  def __post_init__(self) -> None:
    if self.method not in ("auto", "exact", "lanczos"):
      raise ValueError(f'method must be "auto", "exact" or "lanczos"; got {self.method!r}.')
    if self.limit < 1 or self.probes < 2 or self.steps < 1:
      raise ValueError(
        "limit and steps must be positive, probes at least 2 (for a standard error); got "
        f"{self.limit}, {self.steps}, {self.probes}."
      )


def log_det(
  how: LogDet,
  likelihood: Likelihood,
  theta: PyTree,
  scale: PyTree,
  batch: Batch,
  key: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
  """(log det(I + s C s) [], its standard error [], 0 if exact); differentiable in theta and scale.

  Args:
    theta, scale: of the modules that move, s a scalar a leaf.
    key: for the probes; consumed.
  """
  outputs = jax.eval_shape(likelihood.predict, theta, batch.inputs)
  if not isinstance(outputs, jax.ShapeDtypeStruct):
    raise ValueError("The log-determinant needs outputs in one array [N, ...].")
  entries = outputs.size * sum(x.size for x in jax.tree.leaves(theta))
  if how.method == "exact" or (how.method == "auto" and entries <= how.limit):
    return _exact(likelihood, theta, scale, batch), jnp.zeros([], outputs.dtype)
  if key is None:
    raise ValueError(
      f"This log-determinant ({entries} entries of A) is estimated from random probes: pass key="
      'jax.random.key(...), or set LogDet(method="exact").'
    )
  return _stochastic(how, likelihood, theta, scale, batch, key)


def _exact(likelihood: Likelihood, theta: PyTree, scale: PyTree, batch: Batch) -> jax.Array:
  """By the singular values of A: forming A^T A would lose what is small beside its largest entry.

  The gradient is tr K^-1 dK with K^-1 held, since that of singular vectors does not exist where two
  values agree: 2 tr (Lambda J s K^-1)^T d(J s) + tr (J s K^-1 s J^T) dLambda.
  """
  factor = whitened_factor(likelihood, theta, scale, batch)
  a, rows, root = jax.lax.stop_gradient((factor.a, factor.rows, factor.root))
  u, singular, v = thin_svd(a)
  square = jnp.square(singular)
  along, off = split(rows, v)
  shape = (*root.shape[:2], -1)
  off, along = off.reshape(shape), along.reshape(shape)
  with exact():
    solved = (u * (singular / (1.0 + square))) @ v  # A K^-1
    of_lam = jnp.einsum("nid,njd->nij", off, off)
    of_lam = of_lam + jnp.einsum("nid,d,njd->nij", along, 1.0 / (1.0 + square), along)
  of_rows = 2.0 * by_example(jnp.swapaxes(root, 1, 2), solved)
  slope = jnp.sum(of_rows * factor.rows) + jnp.sum(of_lam * factor.lam)
  value = jnp.sum(jnp.log1p(square)) + (slope - jax.lax.stop_gradient(slope))
  return jnp.where(factor.negative, jnp.nan, value)  # log p not concave: C is no curvature


def _stochastic(
  how: LogDet,
  likelihood: Likelihood,
  theta: PyTree,
  scale: PyTree,
  batch: Batch,
  key: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  flat, unravel = ravel_pytree(theta)
  held_theta, held_scale = jax.lax.stop_gradient((theta, scale))

  def product_at(theta: PyTree, scale: PyTree) -> Any:
    curved = curvature_product("gauss_newton", likelihood, theta, batch)

    def product(v: jax.Array) -> jax.Array:
      sv = jax.tree.map(jnp.multiply, scale, unravel(v))
      return v + ravel_pytree(jax.tree.map(jnp.multiply, scale, curved(sv)))[0]

    return product

  held = product_at(held_theta, held_scale)
  signs = jax.random.rademacher(key, (how.probes, flat.size), flat.dtype)

  def quadrature(v: jax.Array) -> tuple[jax.Array, jax.Array]:  # v^T log(K) v and K^-1 v
    krylov = lanczos(held, v, how.steps)
    values, vectors = krylov.eigh()
    concave = jnp.min(values) > 1.0 - 1e-4 * jnp.max(values)  # then those of K are 1 at least
    values = jnp.where(concave, jnp.maximum(values, 1.0), jnp.nan)
    first = vectors[0]  # e_1 in the eigenvectors of T
    norm = jnp.linalg.norm(v)
    with exact():
      solution = norm * (vectors @ (first / values)) @ krylov.basis
    return norm**2 * jnp.sum(first**2 * jnp.log(values)), solution

  estimates, solutions = jax.lax.stop_gradient(jax.vmap(quadrature)(signs))
  # Of value 0, and with the gradient of the log-determinant.
  product = product_at(theta, scale)
  slope = jnp.mean(jax.vmap(lambda w, v: w @ product(v))(solutions, signs))
  value = jnp.mean(estimates) + (slope - jax.lax.stop_gradient(slope))
  return value, jnp.std(estimates, ddof=1) / how.probes**0.5
