"""The inverse square root of K = I + s C s, times vectors, with a derivative.

K^(-1/2) is a smooth function of K. Its eigenvectors are not: they have no derivative where two
eigenvalues agree. The derivative of the root needs none (Daleckii and Krein). Let u_i be the
eigenvectors of K and a_i its eigenvalues. Then

    u_i . d(K^(-1/2)) u_j = F_ij u_i . dK u_j,       F_ij = -1 / (r_i r_j (r_i + r_j)),  r = a^(1/2)

F is the difference quotient of a^(-1/2), written without the difference. Orthogonal to the rows of
V, which are the eigenvectors of s C s with eigenvalue lambda > 0, K is the identity and r = 1.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from shrinkmeta.curvature.solvers import exact

PyTree = Any


def root_of(basis: jax.Array, eigenvalues: jax.Array, rows: jax.Array) -> jax.Array:
  """Return R K^(-1/2) [n, D] for rows R [n, D], from V [k, D] and lambda [k]."""
  change = jax.lax.rsqrt(1.0 + eigenvalues) - 1.0
  with exact():
    return rows + ((rows @ basis.T) * change[None]) @ basis


def inverse_root(
  k_of: Callable[[PyTree], Callable[[jax.Array], jax.Array]],
  point: PyTree,
  basis: jax.Array,
  eigenvalues: jax.Array,
  rows: jax.Array,
) -> jax.Array:
  """Return R K^(-1/2) for rows R, differentiable once with respect to `point`.

  A derivative costs k + n products with the derivative of K.

  Args:
    k_of: point -> the function from rows R [m, D] to R K [m, D].
    point: everything that K depends on.
    basis: V [k, D], orthonormal; no derivative goes through it.
    eigenvalues: lambda [k] of s C s, of the same rows; no derivative goes through them. All
      eigenvalues above 0 are among them.
    rows: R [n, D].

  Returns:
    [n, D].

  Raises:
    NotImplementedError: the result is differentiated twice.

  Reference: Higham, Functions of Matrices, 2008, theorem 3.11.

  >>> k_of = lambda point: lambda rows: rows * (1.0 + point)  # s C s = diag(point)
  >>> root = lambda point: inverse_root(k_of, point, jnp.eye(2), jnp.full(2, 3.0), jnp.ones((1, 2)))
  >>> root(jnp.full(2, 3.0))  # (1 + 3)^(-1/2)
  Array([[0.5, 0.5]], dtype=float32)
  >>> jax.grad(lambda point: root(point).sum())(jnp.full(2, 3.0)).tolist()  # -(1 + 3)^(-3/2) / 2
  [-0.0625, -0.0625]
  """
  basis, eigenvalues, rows = jax.lax.stop_gradient((basis, eigenvalues, rows))

  @jax.custom_jvp
  def root(point: PyTree, basis: jax.Array, eigenvalues: jax.Array, rows: jax.Array) -> jax.Array:
    return root_of(basis, eigenvalues, rows)

  @root.defjvp
  def _(primals: Any, tangents: Any) -> Any:
    point, basis, eigenvalues, rows = primals
    r = jnp.sqrt(1.0 + eigenvalues)[None]  # [1, k]
    f = -1.0 / (r.T * r * (r.T + r))  # both vectors in V
    f_mixed = -1.0 / (r * (1.0 + r))  # one of them orthogonal to V
    with exact():
      along = rows @ basis.T
      both = jnp.concatenate([basis, rows - along @ basis])
    moved = _moved(lambda point: k_of(point)(both), point, tangents[0])
    of_basis, of_rest = moved[: len(basis)], moved[len(basis) :]  # dK u, and dK times the rest
    with exact():
      inner, back = of_basis @ basis.T, of_rest @ basis.T
      in_basis = along @ (f * inner) + back * f_mixed
      # There is no term of the rest with itself: A of s C s = A^T A is 0 there.
      slope = in_basis @ basis + (along * f_mixed) @ (of_basis - inner @ basis)
    # V and lambda are held: the derivative of `slope` would be wrong.
    return root(*primals), slope * _once(point)

  return root(point, basis, eigenvalues, rows)


def _moved(f: Callable[[PyTree], jax.Array], point: PyTree, tangent: PyTree) -> jax.Array:
  """Return the derivative of f at `point` along `tangent`, without forward mode.

  It transposes the backward pass, because a network with a `jax.custom_vjp` has no other.
  """
  leaves, structure = jax.tree.flatten(point)
  floating = [jnp.issubdtype(jnp.result_type(x), jnp.inexact) for x in leaves]

  def of_floats(floats: list[jax.Array]) -> jax.Array:
    now = iter(floats)
    filled = [next(now) if own else x for x, own in zip(leaves, floating, strict=True)]
    return f(structure.unflatten(filled))

  only = lambda tree: [x for x, own in zip(jax.tree.leaves(tree), floating, strict=True) if own]
  value, pull = jax.vjp(of_floats, only(point))
  return jax.linear_transpose(lambda u: pull(u)[0], value)(only(tangent))[0]


@jax.custom_jvp
def _once(point: PyTree) -> float:
  """Return 1, and raise an error if `point` is differentiated."""
  return 1.0


@_once.defjvp
def _(primals: Any, tangents: Any) -> Any:
  raise NotImplementedError(
    "Draws of a posterior can be differentiated once. Take central differences of the gradient, or "
    "the covariance of Posterior.predictive, which has derivatives of any order."
  )
