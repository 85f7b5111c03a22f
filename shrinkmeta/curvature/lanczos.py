"""Lanczos: a symmetric operator seen from one vector, K ~ V^T T V, T a small tridiagonal matrix.

Every new direction is orthogonalised against all earlier ones, twice: in float32 the short
recurrence alone loses orthogonality after the first eigenvalue has converged.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from shrinkmeta import validate
from shrinkmeta.curvature.solvers import exact


class Lanczos(NamedTuple):
  """V K V^T = T on the Krylov space of a start v."""

  basis: jax.Array  # [k, D] V, orthonormal rows, the first v / |v|; 0 once the space is exhausted
  alpha: jax.Array  # [k] diagonal of T; 1 once exhausted
  beta: jax.Array  # [k - 1] beside the diagonal; 0 once exhausted

  def eigh(self) -> tuple[jax.Array, jax.Array]:
    """Eigenvalues [k] of T, ascending, and its eigenvectors as columns [k, k]."""
    return jnp.linalg.eigh(jnp.diag(self.alpha) + jnp.diag(self.beta, 1) + jnp.diag(self.beta, -1))


def lanczos(product: Callable[[jax.Array], jax.Array], start: jax.Array, steps: int) -> Lanczos:
  """`steps` products with K, or fewer that matter where the Krylov space of `start` [D] is smaller.

  An exhausted space leaves T in two blocks without connection: what a function of T says about the
  start is then exact.
  """
  validate.wide(start.dtype, "Lanczos' method")
  steps = min(steps, start.size)
  small = 10 * jnp.finfo(start.dtype).eps

  def step(carry: tuple[jax.Array, ...], i: jax.Array) -> tuple[tuple[jax.Array, ...], jax.Array]:
    basis, direction, alive, size = carry
    basis = basis.at[i].set(direction)
    w = product(direction)
    with exact():
      alpha = direction @ w
    size = jnp.maximum(size, jnp.linalg.norm(w))  # about |K|
    with exact():
      for _ in range(2):
        w = w - basis.T @ (basis @ w)
    beta = jnp.linalg.norm(w)
    goes_on = alive & (beta > small * size)
    w = jnp.where(goes_on, w / jnp.where(goes_on, beta, 1.0), 0.0)
    entry = jnp.stack([jnp.where(alive, alpha, 1.0), jnp.where(goes_on, beta, 0.0)])
    return (basis, w, goes_on, size), entry

  norm = jnp.linalg.norm(start)
  first = start / jnp.where(norm > 0, norm, 1.0)
  empty = jnp.zeros((steps, start.size), start.dtype)
  begin = empty, first, norm > 0, jnp.zeros([], start.dtype)
  (basis, *_), entries = jax.lax.scan(step, begin, jnp.arange(steps))
  return Lanczos(basis, entries[:, 0], entries[:-1, 1])
