"""Solve K w = b for a symmetric K that is given by its products v -> K v.

`cg` and `neumann` are iterative. They return the iterate w with the smallest residual |b - K w|.
`cg` stops at a search direction p with p^T K p <= 0, because a step divides by p^T K p. `dual`
computes w from the singular values of A, for K = I + A^T A. `cg` and `neumann` stop at the
`max_steps` or the `tol` of `sm.Implicit`.

On the way to v -> K v an operator may compute something else that is linear in v, such as C v. It
returns both, and the solver returns this value at w without one more product.

If K = I + s C s with a positive semi-definite C, no eigenvalue of K is below 1. The residual then
bounds the error: |w - K^-1 b| <= |b - K w|.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from shrinkmeta.base import SolveInfo
from shrinkmeta.curvature.one_by_one import one_by_one
from shrinkmeta.curvature.vectors import vdot

PyTree = Any
Operator = Callable[[PyTree], tuple[PyTree, PyTree]]  # v -> (K v, a linear function of v or None)


class Solution(NamedTuple):
  """The solution of K w = b."""

  w: PyTree
  beside: PyTree  # what the operator returns beside K w, for this w
  info: SolveInfo


class _At(NamedTuple):
  w: PyTree
  beside: PyTree
  square: jax.Array  # [] |b - K w|^2


class _CG(NamedTuple):
  w: PyTree
  beside: PyTree  # what the operator returns beside K w
  residual: PyTree  # b - K w
  direction: PyTree  # p, the next search direction
  square: jax.Array  # [] |residual|^2
  best: _At  # the w with the smallest residual until now
  steps: jax.Array  # [] int32, the number of products with K
  negative: jax.Array  # [] bool: p^T K p was <= 0
  broken: jax.Array  # [] bool: p^T K p was not finite


def _info(
  square: jax.Array, b: PyTree, steps: jax.Array, negative: jax.Array, tol: float
) -> SolveInfo:
  norm2 = vdot(b, b)
  residual = jnp.sqrt(square / jnp.where(norm2 == 0, 1.0, norm2))
  return SolveInfo(residual, steps, negative, residual <= tol)


def _zero(operator: Operator, b: PyTree) -> tuple[PyTree, PyTree]:
  """Return w = 0, and what the operator returns beside K w there."""
  beside = jax.eval_shape(operator, b)[1]
  return optax.tree.zeros_like(b), jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), beside)


def cg(
  operator: Operator, b: PyTree, max_steps: int, tol: float, start: PyTree | None = None
) -> Solution:
  """Solve K w = b by conjugate gradients.

  The loop stops at |b - K w| <= tol |b|, after `max_steps` products, at a search direction p with
  p^T K p <= 0, or at a product that is not finite.

  Args:
    operator: v -> (K v, anything else that is linear in v), for trees like b.
    b: the right-hand side, a pytree of arrays [...].
    max_steps: the largest number of products with K.
    tol: the relative residual at which the loop stops.
    start: the w to begin from, a tree like b. Its residual costs one of the products. The loop
      begins from 0 if `start` is None, or if |b - K start| is not less than |b|.

  Returns:
    a Solution; its w is a tree like b. The residual is NaN if a product was not finite.

  References: Hestenes, Stiefel, 1952; Steihaug, The conjugate gradient method and trust regions
    in large scale optimization, 1983 (the stop at negative curvature).
  """
  norm2 = vdot(b, b)

  def unfinished(s: _CG) -> jax.Array:
    return (s.steps < max_steps) & (s.square > tol**2 * norm2) & ~s.negative & ~s.broken

  def step(s: _CG) -> _CG:
    product, beside = operator(s.direction)
    curvature = vdot(s.direction, product)
    negative, broken = curvature <= 0, ~jnp.isfinite(curvature)
    stop = negative | broken
    alpha = jnp.where(stop, 0.0, s.square / jnp.where(stop, 1.0, curvature))
    w, beside = optax.tree.add_scale((s.w, s.beside), alpha, (s.direction, beside))
    residual = jax.tree.map(lambda r, p: jnp.where(stop, r, r - alpha * p), s.residual, product)
    square = vdot(residual, residual)
    direction = optax.tree.add_scale(residual, square / s.square, s.direction)
    best = optax.tree.where(square < s.best.square, _At(w, beside, square), s.best)
    return _CG(w, beside, residual, direction, square, best, s.steps + 1, negative, broken)

  (w, beside), residual, square = _zero(operator, b), b, norm2
  if start is not None:
    product, beside_start = operator(start)
    left = optax.tree.sub(b, product)
    nearer = vdot(left, left) < norm2
    w, beside = optax.tree.where(nearer, (start, beside_start), (w, beside))
    residual = optax.tree.where(nearer, left, b)
    square = jnp.where(nearer, vdot(left, left), norm2)
  steps, false = jnp.full([], 0 if start is None else 1, jnp.int32), jnp.zeros([], bool)
  best = _At(w, beside, square)
  begin = _CG(w, beside, residual, residual, square, best, steps, false, false)
  end = jax.lax.while_loop(unfinished, step, begin)
  square = jnp.where(end.broken, jnp.nan, end.best.square)
  info = _info(square, b, end.steps, end.negative, tol)
  return Solution(end.best.w, end.best.beside, info)


def neumann(operator: Operator, b: PyTree, max_steps: int, tol: float) -> Solution:
  """Solve K w = b by the Neumann series w_k = sum_{i <= k} (I - K)^i b.

  The series converges if the eigenvalues of K lie in (0, 2). This is rare for networks with a large
  sigma. The result is the partial sum with the smallest residual.

  Args:
    operator: v -> (K v, anything else that is linear in v), for trees like b.
    b: the right-hand side, a pytree of arrays [...].
    max_steps: the largest number of products with K.
    tol: the relative residual at which the loop stops.

  Returns:
    a Solution; its w is a tree like b.
  """
  norm2 = vdot(b, b)

  def unfinished(s: tuple[Any, ...]) -> jax.Array:
    _, _, square, _, steps = s
    return (steps < max_steps) & (square > tol**2 * norm2) & jnp.isfinite(square)

  def step(s: tuple[Any, ...]) -> tuple[Any, ...]:
    sums, residual, _, best, steps = s
    product, beside = operator(residual)
    sums = optax.tree.add(sums, (residual, beside))
    residual = optax.tree.sub(residual, product)
    square = vdot(residual, residual)
    best = optax.tree.where(square < best.square, _At(sums[0], sums[1], square), best)
    return sums, residual, square, best, steps + 1

  zero = _zero(operator, b)
  start = (zero, b, norm2, _At(zero[0], zero[1], norm2), jnp.zeros([], jnp.int32))
  _, _, square, best, steps = jax.lax.while_loop(unfinished, step, start)
  least = jnp.where(jnp.isnan(square), jnp.nan, best.square)
  info = _info(least, b, steps, jnp.zeros([], bool), tol)
  return Solution(best.w, best.beside, info)


def dual(
  a: jax.Array, operator: Operator, b: PyTree, shift: jax.typing.ArrayLike, tol: float
) -> Solution:
  """Solve (shift I + A^T A) w = b by the singular values d of A = U diag(d) V.

      w = (b - V^T V b) / shift + V^T (shift + d^2)^-1 V b

  A solve of the smaller system with shift I + A A^T [R, R] would be less work. But its rounding
  error is the float precision times the largest d^2, so in float32 it would lose the small entries
  of w.

  Args:
    a: A [R, D], with R = N C Jacobian rows, for N examples with C outputs.
    operator: v -> ((shift I + A^T A) v, anything else that is linear in v). One product measures
      the residual.
    b: the right-hand side, a pytree of arrays [...] with D entries in all.
    shift: 1 + damping.
    tol: the relative residual up to which the solve counts as converged.

  Returns:
    a Solution; its w is a tree like b.
  """
  flat, unravel = ravel_pytree(b)
  _, singular, basis = thin_svd(a)
  along, off = split(flat, basis)
  with exact():
    w = unravel(off / shift + (along / (shift + jnp.square(singular))) @ basis)
  product, beside = operator(w)
  residual = optax.tree.sub(b, product)
  false = jnp.zeros([], bool)
  info = _info(vdot(residual, residual), b, jnp.ones([], jnp.int32), false, tol)
  return Solution(w, beside, info)


# A context in which JAX multiplies float32 matrices in float32. By default accelerators round them
# to bfloat16 or TF32. A network tolerates this. Products with an orthogonal basis do not: an error
# of 1e-3 along a basis vector counts as much as the largest eigenvalue
# (docs/hazards.md#rounded-products).
exact = functools.partial(jax.default_matmul_precision, "highest")


@one_by_one
def thin_svd(a: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Return (U [R, k], the singular values [k], V [k, D]) of A [R, D], with k = min(R, D).

  If D > R, a QR factorisation first reduces A to a matrix [R, R]. On a CPU the factorisation of a
  25 x 112,000 matrix is then twenty times faster. A is a constant: see `one_by_one`.
  """
  if a.shape[0] >= a.shape[1]:
    u, singular, v = jnp.linalg.svd(a, full_matrices=False)
    return u, singular, v
  q, r = jnp.linalg.qr(a.T)
  with exact():
    u, singular, v = jnp.linalg.svd(r.T, full_matrices=False)
    return u, singular, v @ q.T


def split(v: jax.Array, basis: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Split vectors v into a part in the span of orthonormal vectors and an orthogonal rest.

  The projection is subtracted twice. After one subtraction, rounding leaves a small error in the
  rest, along the basis vectors. A solve divides the true part along a basis vector by its
  eigenvalue, but not this error. So if the eigenvalue is large, the error can exceed the true
  result.

  Args:
    v: the vectors [..., D].
    basis: R orthonormal vectors, the rows of an array [R, D].

  Returns:
    (the coordinates of v along the basis [..., R], the rest [..., D]).
  """
  with exact():
    along = v @ basis.T
    off = v - along @ basis
    return along, off - (off @ basis.T) @ basis
