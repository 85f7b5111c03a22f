"""The factor A of the Gauss-Newton curvature in whitened coordinates: s C s = A^T A.

    A = Lambda^(1/2) J s,   J = d f / d theta,   Lambda_n = -d^2 log p(y_n | f_n) / d f_n^2

There are N examples with C outputs f_n [C] each, and D task-specific parameters. A is [R, D]: it
has R = N C Jacobian rows, one for every output of every example. s has the value sigma_m at every
parameter of module m.

In the formula s C s = A^T A, the letter C is the curvature matrix. In shapes such as [N, C, C], it
is the number of outputs of an example.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from shrinkmeta.checks import validate
from shrinkmeta.curvature.one_by_one import eigh
from shrinkmeta.curvature.solvers import exact
from shrinkmeta.model.likelihood import Likelihood, without_padding
from shrinkmeta.model.tasks import Batch, weights

PyTree = Any


class Factor(NamedTuple):
  """The factor A = root J s, and the arrays that it is made of. The root has no derivative."""

  a: jax.Array  # [R, D] A
  rows: jax.Array  # [R, D] J s
  lam: jax.Array  # [N, C, C] Lambda
  root: jax.Array  # [N, C, C] with root_n^T root_n = lam_n
  negative: jax.Array  # [] bool: lam has a negative eigenvalue; root is made with 0 instead


def whitened_factor(
  likelihood: Likelihood,
  outputs_of: Callable[[PyTree], jax.Array],
  part: PyTree,
  scale: PyTree,
  batch: Batch,
) -> Factor:
  """Return the factor A, with J and Lambda taken at the parameters `part`.

  Args:
    likelihood: the likelihood, whose log_prob gives Lambda.
    outputs_of: part -> outputs [N, ...].
    part: the task-specific parameters, a pytree of arrays [...].
    scale: s, a scalar [] for each leaf of `part`.
    batch: the N examples.
  """
  outputs, rows = whitened_jacobian(outputs_of, part, scale)
  lam = output_curvature(likelihood, outputs, batch)
  root, negative = square_root(jax.lax.stop_gradient(lam))
  return Factor(by_example(root, rows), rows, lam, root, negative)


def whitened_jacobian(
  outputs_of: Callable[[PyTree], jax.Array], part: PyTree, scale: PyTree
) -> tuple[jax.Array, jax.Array]:
  """Return (outputs [N, ...], J s [R, D]) at the parameters `part`.

  J is computed in forward mode if D < R, otherwise in reverse mode.

  Raises:
    ValueError: if the outputs are not one array.
  """
  zero, unravel = ravel_pytree(jax.tree.map(jnp.zeros_like, part))

  shift = lambda t, s, d: t + s * d
  moved = lambda dz: outputs_of(jax.tree.map(shift, part, scale, unravel(dz)))
  outputs = moved(zero)
  if not isinstance(outputs, jax.Array):
    one_output_array(outputs)
  if zero.size < outputs.size:
    columns = jnp.eye(zero.size, dtype=zero.dtype)
    # J v is the transpose of J^T u: a network with a custom_vjp has no other forward mode.
    vjp = jax.vjp(moved, zero)[1]
    jvp = jax.linear_transpose(lambda u: vjp(u)[0], outputs)
    jacobian = jax.vmap(lambda v: jvp(v)[0], out_axes=-1)(columns)
  else:
    jacobian = jax.jacrev(moved)(zero)
  return outputs, jacobian.reshape(outputs.size, zero.size)


def one_output_array(outputs: Any) -> None:
  """Raise ValueError unless the outputs of a network are one array [N, ...].

  Args:
    outputs: what predict returned, or its shapes.
  """
  if not isinstance(outputs, (jax.Array, jax.ShapeDtypeStruct)):
    raise ValueError(
      f"predict returned {type(outputs).__name__}: a dual solve, a log-determinant, a posterior "
      "and a restriction need outputs in one array [N, ...]. An implicit gradient may use "
      'solver="cg".'
    )


def by_example(blocks: jax.Array, rows: jax.Array) -> jax.Array:
  """Multiply the block of each example, [N, C, C], with its Jacobian rows, [N C, D]."""
  shape = (*blocks.shape[:2], rows.shape[1])
  with exact():
    return jnp.einsum("nij,njd->nid", blocks, rows.reshape(shape)).reshape(rows.shape)


def square_root(lam: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Return a matrix root of Lambda_n for every example n, with negative eigenvalues set to 0.

  Args:
    lam: Lambda [N, C, C], symmetric.

  Returns:
    (root [N, C, C] with root_n^T root_n = Lambda_n, a bool []). The bool is True if an eigenvalue
    is negative: see `indefinite`.
  """
  if jnp.dtype(lam.dtype).itemsize < 4:
    validate.wide(lam.dtype, "A dual solve, a posterior or a log-determinant")
  if lam.shape[1] == 1:
    values, vectors = lam[:, 0], jnp.ones_like(lam)
  else:
    values, vectors = jax.vmap(eigh)(lam)  # [N, C], [N, C, C]
  root = jnp.sqrt(jnp.maximum(values, 0.0))[:, :, None] * jnp.swapaxes(vectors, 1, 2)
  return root, indefinite(values)


def indefinite(values: jax.Array) -> jax.Array:
  """Tell, as a bool [], whether an eigenvalue is below 0 by more than rounding.

  If Lambda has such an eigenvalue, log_prob is not concave in the outputs.

  Args:
    values: the eigenvalues of one matrix [C], or of many [N, C]. Each matrix is compared with its
      own largest eigenvalue, because a sharp example may stand beside a flat one.
  """
  own = jnp.max(jnp.abs(values), axis=-1, keepdims=True)
  rounding = 100 * jnp.finfo(values.dtype).eps * jnp.max(own, initial=0.0)
  return jnp.any(values < -(1e-4 * own + rounding))


def output_curvature(likelihood: Likelihood, outputs: jax.Array, batch: Batch) -> jax.Array:
  """Return Lambda_n = -d^2 log p(y_n | f_n) / d f_n^2 of every example, [N, C, C].

  Lambda_n is multiplied by the weight of example n, so it is 0 for padding.

  Args:
    likelihood: the likelihood, whose log_prob is differentiated.
    outputs: f, the outputs of the network [N, ...].
    batch: the examples. Only their targets and mask are used.
  """
  shape, n = outputs.shape[1:], outputs.shape[0]
  if batch.mask is not None:
    outputs = without_padding(outputs, batch)  # 0 times an overflow would be NaN
  one = lambda x: jax.tree.map(lambda leaf: leaf[None], x)
  loss = lambda f, target: -_only(likelihood.log_prob(f.reshape(1, *shape), one(target)))
  lam = jax.vmap(jax.hessian(loss))(outputs.reshape(n, -1), batch.targets)
  if batch.mask is None:
    return lam
  mask = weights(batch, outputs.dtype)
  return jnp.where(mask[:, None, None] != 0, mask[:, None, None] * lam, 0.0)


def _only(log_prob: jax.Array) -> jax.Array:
  """Return the log-probability [] of a batch of one example, [1]."""
  if log_prob.shape != (1,):
    raise ValueError(
      "Likelihood.log_prob must return one number an example, and depend on that example alone: of "
      f"one it returned shape {log_prob.shape}. What belongs to an example, such as its noise "
      "scale, goes into the targets."
    )
  return log_prob[0]
