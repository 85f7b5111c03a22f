"""Lanczos' method: approximate a symmetric operator by K ~ V^T T V, with T tridiagonal [k, k].

The vectors v, K v, K^2 v, ... span the Krylov space of a start vector v. The rows of V [k, D] are
an orthonormal basis of this space. Every new row is orthogonalised twice against all earlier rows.
Otherwise rounding in float32 destroys the orthogonality once the first eigenvalue has converged.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from shrinkmeta.checks import validate
from shrinkmeta.curvature.one_by_one import eigh
from shrinkmeta.curvature.solvers import exact


class Lanczos(NamedTuple):
  """V [k, D] and the tridiagonal T = V K V^T [k, k], for a start vector v."""

  basis: jax.Array  # [k, D] V: orthonormal rows, of which the first is v / |v|; 0 if v = 0
  alpha: jax.Array  # [k] the diagonal of T; 1 if v = 0
  beta: jax.Array  # [k - 1] the entries beside the diagonal; 0 where a Krylov space is exhausted

  def eigh(self) -> tuple[jax.Array, jax.Array]:
    """Return the eigenvalues [k] of T, ascending, and the eigenvectors as columns [k, k].

    They have a derivative if no two eigenvalues are equal.
    """
    return _eigh(jnp.diag(self.alpha) + jnp.diag(self.beta, 1) + jnp.diag(self.beta, -1))


@jax.custom_jvp
def _eigh(t: jax.Array) -> tuple[jax.Array, jax.Array]:
  return eigh(t)


@_eigh.defjvp
def _(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> Any:
  """Return the derivative, with M = V^T dT V: M_ii, and V (M_ij / (t_j - t_i)) for i != j."""
  values, vectors = _eigh(*primals)
  with exact():
    m = vectors.T @ tangents[0] @ vectors
    own = jnp.eye(len(values), dtype=bool)
    turn = jnp.where(own, 0.0, m / jnp.where(own, 1.0, values[None] - values[:, None]))
    return (values, vectors), (jnp.diag(m), vectors @ turn)


def lanczos(product: Callable[[jax.Array], jax.Array], start: jax.Array, steps: int) -> Lanczos:
  """Return V and T, computed by `steps` products with K, or by D products if D is smaller.

  The Krylov space of `start` has at most one direction for each distinct eigenvalue of K. Once this
  space is exhausted, the method continues with a random direction orthogonal to all earlier rows.
  So D steps find all eigenvectors, also those of repeated eigenvalues. The entry of T between the
  old and the new direction is 0, so T is block diagonal. `start` lies in the span of the first
  block. Therefore the other blocks do not affect start^T f(K) start.

  Args:
    product: v -> K v, for vectors [D].
    start: the start vector [D].
    steps: the number of products.
  """
  validate.wide(start.dtype, "Lanczos' method")
  steps = min(steps, start.size)
  small = 10 * jnp.finfo(start.dtype).eps
  key = jax.random.key(0)
  norm = jnp.linalg.norm(start)
  alive = norm > 0

  def cleared(w: jax.Array, basis: jax.Array) -> jax.Array:  # w, orthogonal to the basis
    with exact():
      for _ in range(2):
        w = w - basis.T @ (basis @ w)
    return w

  def step(carry: tuple[jax.Array, ...], i: jax.Array) -> tuple[tuple[jax.Array, ...], jax.Array]:
    basis, direction, size = carry
    basis = basis.at[i].set(direction)
    w = product(direction)
    with exact():
      alpha = direction @ w
    size = jnp.maximum(size, jnp.linalg.norm(w))  # size estimates the norm |K|
    w = cleared(w, basis)
    beta = jnp.linalg.norm(w)
    goes_on = beta > small * size
    fresh = lambda: cleared(jax.random.normal(jax.random.fold_in(key, i), w.shape, w.dtype), basis)
    w = jax.lax.cond(goes_on | ~alive, lambda: w, fresh)
    length = jnp.linalg.norm(w)
    w = jnp.where(alive, w / jnp.where(length > 0, length, 1.0), 0.0)
    entry = jnp.stack([jnp.where(alive, alpha, 1.0), jnp.where(goes_on & alive, beta, 0.0)])
    return (basis, w, size), entry

  first = start / jnp.where(alive, norm, 1.0)
  empty = jnp.zeros((steps, start.size), start.dtype)
  begin = empty, first, jnp.zeros([], start.dtype)
  (basis, *_), entries = jax.lax.scan(step, begin, jnp.arange(steps))
  return Lanczos(basis, entries[:, 0], entries[:-1, 1])
