"""The curvature C of the loss at theta_hat: products C v, never the D x D matrix; and a root.

    hessian:       C = H = d^2/dtheta^2 of -log p(D | theta)
    gauss_newton:  C = J^T Lambda J, J = d outputs / d theta, Lambda = -d^2 log p / d outputs^2

Away from its optimum a network's Hessian is indefinite; the Gauss-Newton matrix is positive
semi-definite wherever log_prob is concave in the outputs, as the ready-made ones are. It then has
a root: in whitened coordinates s C s = A^T A, A = Lambda^(1/2) J s, with a row for every output of
every example.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from shrinkmeta import validate
from shrinkmeta.curvature.solvers import exact
from shrinkmeta.mode.frozen import merge
from shrinkmeta.model.density import masked_log_prob, without_padding
from shrinkmeta.model.likelihood import Likelihood
from shrinkmeta.model.tasks import Batch, weights

PyTree = Any
Curvature = Literal["gauss_newton", "hessian"]


def curvature_product(
  curvature: Curvature, likelihood: Likelihood, theta: PyTree, batch: Batch
) -> Callable[[PyTree], PyTree]:
  """v -> C v, for trees like theta. Linearised here, once, so that each product is linear work."""

  return product_of(
    curvature,
    lambda theta: likelihood.predict(theta, batch.inputs),
    lambda outputs: -masked_log_prob(likelihood, outputs, batch),
    theta,
  )


def product_of(
  curvature: Curvature,
  outputs_of: Callable[[PyTree], jax.Array],
  loss_of_outputs: Callable[[jax.Array], jax.Array],
  theta: PyTree,
) -> Callable[[PyTree], PyTree]:
  """v -> C v of the loss `loss_of_outputs(outputs_of(theta))`, however many tasks that spans."""
  if curvature == "hessian":
    return jax.linearize(jax.grad(lambda t: loss_of_outputs(outputs_of(t))), theta)[1]
  outputs, jvp = jax.linearize(outputs_of, theta)
  vjp = jax.linear_transpose(jvp, theta)
  output_hessian = jax.linearize(jax.grad(loss_of_outputs), outputs)[1]
  return lambda v: vjp(output_hessian(jvp(v)))[0]


def curvature_column(
  curvature: Curvature, likelihood: Likelihood, theta: PyTree, part: PyTree, batch: Batch
) -> Callable[[PyTree], PyTree]:
  """v -> C v, all of it, for v that is 0 outside a part of theta.

  The solve needs the square of C that belongs to the moving modules; the gradient of phi needs
  their whole column once.

  Args:
    theta: all parameters.
    part: those of the moving modules, None elsewhere; v is a tree like it.
  """

  def outputs_of(theta: PyTree) -> jax.Array:
    return likelihood.predict(theta, batch.inputs)

  def loss_of_outputs(outputs: jax.Array) -> jax.Array:
    return -masked_log_prob(likelihood, outputs, batch)

  if curvature == "hessian":
    gradient = jax.grad(lambda t: loss_of_outputs(outputs_of(t)))
    return lambda v: jax.jvp(lambda p: gradient(merge(p, theta)), (part,), (v,))[1]
  outputs, vjp = jax.vjp(outputs_of, theta)

  def column(v: PyTree) -> PyTree:
    along = jax.jvp(lambda p: outputs_of(merge(p, theta)), (part,), (v,))[1]
    return vjp(jax.jvp(jax.grad(loss_of_outputs), (outputs,), (along,))[1])[0]

  return column


def whitened_jacobian(
  likelihood: Likelihood, theta: PyTree, scale: PyTree, batch: Batch
) -> tuple[jax.Array, jax.Array]:
  """(outputs [N, ...], J s [N C, D]); forwards where D is smaller than N C, else backwards."""
  zero, unravel = ravel_pytree(jax.tree.map(jnp.zeros_like, theta))

  def outputs_of(dz: jax.Array) -> jax.Array:
    moved = jax.tree.map(lambda t, s, d: t + s * d, theta, scale, unravel(dz))
    return likelihood.predict(moved, batch.inputs)

  outputs = outputs_of(zero)
  if not isinstance(outputs, jax.Array):
    raise ValueError('solver="dual" needs outputs in one array [N, ...]; use solver="cg".')
  jacobian = jax.jacfwd if zero.size < outputs.size else jax.jacrev
  return outputs, jacobian(outputs_of)(zero).reshape(outputs.size, zero.size)


class Factor(NamedTuple):
  """A = Lambda^(1/2) J s and what it is made of; R = N C rows."""

  a: jax.Array  # [R, D]
  rows: jax.Array  # [R, D] J s
  lam: jax.Array  # [N, C, C]
  root: jax.Array  # [N, C, C], root^T root = lam
  negative: jax.Array  # [] whether lam has a negative eigenvalue, cut at 0 in root


def whitened_factor(likelihood: Likelihood, theta: PyTree, scale: PyTree, batch: Batch) -> Factor:
  """A, of which s C s = A^T A."""
  outputs, rows = whitened_jacobian(likelihood, theta, scale, batch)
  lam = output_curvature(likelihood, outputs, batch)
  root, negative = square_root(lam)
  return Factor(by_example(root, rows), rows, lam, root, negative)


def by_example(blocks: jax.Array, rows: jax.Array) -> jax.Array:
  """[N, C, C] times [N C, D]."""
  shape = (*blocks.shape[:2], rows.shape[1])
  with exact():
    return jnp.einsum("nij,njd->nid", blocks, rows.reshape(shape)).reshape(rows.shape)


def square_root(lam: jax.Array) -> tuple[jax.Array, jax.Array]:
  """R_n with R_n^T R_n = Lambda_n, [N, C, C], negative eigenvalues cut at 0; and if any were."""
  validate.wide(lam.dtype, "A dual solve, a posterior or a log-determinant")
  values, vectors = jnp.linalg.eigh(lam)  # [N, C], [N, C, C]
  root = jnp.sqrt(jnp.maximum(values, 0.0))[:, :, None] * jnp.swapaxes(vectors, 1, 2)
  return root, indefinite(values)


def indefinite(values: jax.Array) -> jax.Array:
  """Whether some eigenvalue is below 0, beyond rounding []: log_prob is not concave."""
  return jnp.any(values < -1e-4 * jnp.max(values))


def output_curvature(likelihood: Likelihood, outputs: jax.Array, batch: Batch) -> jax.Array:
  """Lambda_n = -d^2 log p(y_n | f_n) / d f_n^2, [N, C, C]; 0 for padding. outputs: [N, ...]."""
  mask = weights(batch, outputs.dtype)
  shape, n = outputs.shape[1:], outputs.shape[0]
  outputs = without_padding(outputs, batch)  # 0 times an overflow is no number

  def loss_hessian(f: jax.Array, target: PyTree) -> jax.Array:  # [C] -> [C, C]
    row = lambda x: jax.tree.map(lambda leaf: leaf[None], x)
    loss = lambda flat: -_only(likelihood.log_prob(flat.reshape(1, *shape), row(target)))
    return jax.hessian(loss)(f)

  lam = jax.vmap(loss_hessian)(outputs.reshape(n, -1), batch.targets)
  return jnp.where(mask[:, None, None] != 0, mask[:, None, None] * lam, 0.0)


def _only(log_prob: jax.Array) -> jax.Array:
  """The number of one example."""
  if log_prob.shape != (1,):
    raise ValueError(
      "Likelihood.log_prob must return one number an example, and depend on that example alone: of "
      f"one it returned shape {log_prob.shape}. What belongs to an example, such as its noise "
      "scale, goes into the targets."
    )
  return log_prob[0]
