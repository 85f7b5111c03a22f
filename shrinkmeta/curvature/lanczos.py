"""Lanczos' method: approximate a symmetric operator by K ~ V^T T V, with T tridiagonal [k, k].

The rows of V [k, D] are an orthonormal basis of the Krylov space of one start vector. Every new row
is orthogonalised against all earlier rows, twice. Without this, rounding in float32 destroys the
orthogonality once the first eigenvalue has converged.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from shrinkmeta.checks import validate
from shrinkmeta.curvature.solvers import exact


class Lanczos(NamedTuple):
  """V [k, D] and T [k, k] with V K V^T = T, on the Krylov space of a start vector v."""

  basis: jax.Array  # [k, D] V, orthonormal rows, the first v / |v|; 0 for a start of 0
  alpha: jax.Array  # [k] diagonal of T; 1 for a start of 0
  beta: jax.Array  # [k - 1] beside the diagonal; 0 where a Krylov space is exhausted

  def eigh(self) -> tuple[jax.Array, jax.Array]:
    """Eigenvalues [k] of T, ascending, and its eigenvectors as columns [k, k]."""
    return jnp.linalg.eigh(jnp.diag(self.alpha) + jnp.diag(self.beta, 1) + jnp.diag(self.beta, -1))


def lanczos(product: Callable[[jax.Array], jax.Array], start: jax.Array, steps: int) -> Lanczos:
  """Build V and T by `steps` products with K, at most D of them.

  The Krylov space of `start` has one direction for each eigenvalue, whatever its multiplicity. Once
  that space is exhausted, Lanczos begins anew with a random direction orthogonal to all earlier
  ones, with beta = 0 in between. So D steps find all eigenvectors of repeated eigenvalues too. The
  blocks of T have no connection: what a function of T says about the start is still exact.

  Args:
    product: v -> K v.
    start: [D].
    steps: the number of products.
  """
  validate.wide(start.dtype, "Lanczos' method")
  steps = min(steps, start.size)
  small = 10 * jnp.finfo(start.dtype).eps
  key = jax.random.key(0)
  norm = jnp.linalg.norm(start)
  alive = norm > 0

  def cleared(w: jax.Array, basis: jax.Array) -> jax.Array:  # of what lies in the basis
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
    size = jnp.maximum(size, jnp.linalg.norm(w))  # about |K|
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
