"""Solves K w = b for symmetric K given by products, and says how it went.

Written as plain loops: they stop at negative curvature instead of dividing by it, and keep the
best iterate. "Best" is the smallest residual: with K = I + s C s, C >= 0, no eigenvalue of K is
below 1, so |w - K^-1 b| <= |b - K w|, and the residual is a bound on the error.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from shrinkmeta.base import SolveInfo

PyTree = Any
Operator = Callable[[PyTree], PyTree]


class _CG(NamedTuple):
  w: PyTree
  residual: PyTree  # b - K w
  direction: PyTree
  square: jax.Array  # [] |residual|^2
  best: PyTree
  best_square: jax.Array  # []
  steps: jax.Array  # [] int32
  negative: jax.Array  # [] bool
  broken: jax.Array  # [] bool, a product was not finite


def _vdot(a: PyTree, b: PyTree) -> jax.Array:
  return jnp.asarray(optax.tree.vdot(a, b))


def _info(
  square: jax.Array, b: PyTree, steps: jax.Array, negative: jax.Array, tol: float
) -> SolveInfo:
  norm2 = _vdot(b, b)
  residual = jnp.sqrt(square / jnp.where(norm2 == 0, 1.0, norm2))
  return SolveInfo(residual, steps, negative, residual <= tol)


def cg(
  operator: Operator, b: PyTree, max_steps: int, tol: float, start: PyTree | None = None
) -> tuple[PyTree, SolveInfo]:
  """Conjugate gradients until |b - K w| <= tol |b|, `max_steps`, or p^T K p <= 0.

  Args:
    start: w to begin from, at the price of one more product; 0 is taken instead, as with None,
      where that is nearer: where |b - K start| > |b|.

  References: Hestenes, Stiefel, 1952; Steihaug, The conjugate gradient method and trust regions
    in large scale optimization, 1983 (the stop at negative curvature).
  """
  norm2 = _vdot(b, b)

  def unfinished(s: _CG) -> jax.Array:
    return (s.steps < max_steps) & (s.square > tol**2 * norm2) & ~s.negative & ~s.broken

  def step(s: _CG) -> _CG:
    product = operator(s.direction)
    curvature = _vdot(s.direction, product)
    negative, broken = curvature <= 0, ~jnp.isfinite(curvature)
    stop = negative | broken
    alpha = jnp.where(stop, 0.0, s.square / jnp.where(stop, 1.0, curvature))
    w = optax.tree.add_scale(s.w, alpha, s.direction)
    residual = jax.tree.map(lambda r, p: jnp.where(stop, r, r - alpha * p), s.residual, product)
    square = _vdot(residual, residual)
    direction = optax.tree.add_scale(residual, square / s.square, s.direction)
    better = square < s.best_square
    return _CG(
      w,
      residual,
      direction,
      square,
      optax.tree.where(better, w, s.best),
      jnp.where(better, square, s.best_square),
      s.steps + 1,
      negative,
      broken,
    )

  w, residual, square = optax.tree.zeros_like(b), b, norm2
  if start is not None:
    left = optax.tree.sub(b, operator(start))
    nearer = _vdot(left, left) < norm2
    w = optax.tree.where(nearer, start, w)
    residual = optax.tree.where(nearer, left, b)
    square = jnp.where(nearer, _vdot(left, left), norm2)
  steps, false = jnp.full([], 0 if start is None else 1, jnp.int32), jnp.zeros([], bool)
  begin = _CG(w, residual, residual, square, w, square, steps, false, false)
  end = jax.lax.while_loop(unfinished, step, begin)
  square = jnp.where(end.broken, jnp.nan, end.best_square)
  return end.best, _info(square, b, end.steps, end.negative, tol)


def neumann(operator: Operator, b: PyTree, max_steps: int, tol: float) -> tuple[PyTree, SolveInfo]:
  """w_k = sum_{i <= k} (I - K)^i b, which converges where the eigenvalues of K lie in (0, 2).

  That is rare for networks with a large sigma; the best partial sum is kept, and its residual says.
  """
  norm2 = _vdot(b, b)

  def unfinished(s: tuple[Any, ...]) -> jax.Array:
    _, _, square, _, _, steps = s
    return (steps < max_steps) & (square > tol**2 * norm2) & jnp.isfinite(square)

  def step(s: tuple[Any, ...]) -> tuple[Any, ...]:
    w, residual, _, best, best_square, steps = s
    w = optax.tree.add(w, residual)
    residual = optax.tree.sub(residual, operator(residual))
    square = _vdot(residual, residual)
    better = square < best_square
    best = optax.tree.where(better, w, best)
    return w, residual, square, best, jnp.where(better, square, best_square), steps + 1

  zero = optax.tree.zeros_like(b)
  start = (zero, b, norm2, zero, norm2, jnp.zeros([], jnp.int32))
  _, _, square, best, best_square, steps = jax.lax.while_loop(unfinished, step, start)
  best_square = jnp.where(jnp.isnan(square), jnp.nan, best_square)
  return best, _info(best_square, b, steps, jnp.zeros([], bool), tol)


def dual(
  a: jax.Array, operator: Operator, b: PyTree, shift: jax.typing.ArrayLike, tol: float
) -> tuple[PyTree, SolveInfo]:
  """(shift I + A^T A)^-1 b, by the singular values of A: see `split`.

      = (b - V^T V b) / shift + V^T (shift + a^2)^-1 V b,   A = U diag(a) V

  The small system with shift I + A A^T takes less work, but loses in float32 what of w is small
  beside b: it is accurate to the precision times the largest a^2.

  Args:
    a: A [R, D], R = N C rows; D the entries of b, flat.
    operator: v -> (shift I + A^T A) v, used once, to measure the residual.
    b: right-hand side, leaves [...].
    shift: 1 + damping.
  """
  flat, unravel = ravel_pytree(b)
  _, singular, basis = thin_svd(a)
  along, off = split(flat, basis)
  with exact():
    w = unravel(off / shift + (along / (shift + jnp.square(singular))) @ basis)
  residual = optax.tree.sub(b, operator(w))
  false = jnp.zeros([], bool)
  return w, _info(_vdot(residual, residual), b, jnp.ones([], jnp.int32), false, tol)


# On accelerators a product of float32 matrices is by default one of rounded ones, bfloat16 or TF32.
# A network may bear that. An orthogonal basis does not: what is off by 1e-3 along a row counts as
# much as the largest eigenvalue says.
exact = functools.partial(jax.default_matmul_precision, "highest")


def thin_svd(a: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
  """(U [R, K], singular values [K], V [K, D]) of A [R, D], K the smaller of R and D.

  Long rows are first turned by QR: 25 x 112,000 then takes a twentieth of the time on a CPU.
  """
  if a.shape[0] >= a.shape[1]:
    u, singular, v = jnp.linalg.svd(a, full_matrices=False)
    return u, singular, v
  q, _ = jnp.linalg.qr(a.T)
  with exact():
    turned = a @ q  # R^T, but after Q: see `after`
    u, singular, v = jnp.linalg.svd(turned, full_matrices=False)
    return u, singular, v @ q.T


def after(first: PyTree, then: PyTree) -> PyTree:
  """`then`, which XLA cannot begin to use before `first` is known: NaN where `first` has a NaN.

  Under vmap LAPACK's calls on a CPU hold a thread of XLA's pool while they wait for others of it:
  as many at once as there are cores, two on a small machine, wait for ever (jaxlib 0.10.2). So no
  two factorisations may be free to run side by side. An optimization_barrier does not order them.
  """
  known = ~jnp.isnan(sum(jnp.sum(x) for x in jax.tree.leaves(first)))
  return jax.tree.map(lambda x: jnp.where(known, x, jnp.nan), then)


def split(v: jax.Array, basis: jax.Array) -> tuple[jax.Array, jax.Array]:
  """v [..., D] as what lies along orthonormal rows [R, D], [..., R], and what does not, [..., D].

  What does not is cleared twice: where an eigenvalue is large the rest of one subtraction, of the
  size of v's rounding, would be more than all that is left along that row.
  """
  with exact():
    along = v @ basis.T
    off = v - along @ basis
    return along, off - (off @ basis.T) @ basis
