"""The factor A of the Gauss-Newton curvature in whitened coordinates: s C s = A^T A.

    A = Lambda^(1/2) J s,   J = d f / d theta,   Lambda_n = -d^2 log p(y_n | f_n) / d f_n^2

A has R = N C rows, one for every output of every example, and D columns, one for every
task-specific parameter. There are N examples with C outputs f_n [C] each. s is sigma, spread over
the parameters.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from shrinkmeta.checks import validate
from shrinkmeta.curvature.solvers import exact
from shrinkmeta.model.likelihood import Likelihood, without_padding
from shrinkmeta.model.tasks import Batch, weights

PyTree = Any


class Factor(NamedTuple):
  """The factor A = root J s, and the arrays that it is made of."""

  a: jax.Array  # [R, D]
  rows: jax.Array  # [R, D] J s
  lam: jax.Array  # [N, C, C]
  root: jax.Array  # [N, C, C], root^T root = lam
  negative: jax.Array  # [] bool: lam has a negative eigenvalue, which root cuts at 0


def whitened_factor(
  likelihood: Likelihood,
  outputs_of: Callable[[PyTree], jax.Array],
  part: PyTree,
  scale: PyTree,
  batch: Batch,
) -> Factor:
  """Return A at `part`.

  Args:
    likelihood: its log_prob gives Lambda.
    outputs_of: part -> outputs [N, ...].
    part: the parameters that move.
    scale: s, a scalar for each leaf of `part`.
    batch: the N examples.
  """
  outputs, rows = whitened_jacobian(outputs_of, part, scale)
  lam = output_curvature(likelihood, outputs, batch)
  root, negative = square_root(lam)
  return Factor(by_example(root, rows), rows, lam, root, negative)


def whitened_jacobian(
  outputs_of: Callable[[PyTree], jax.Array], part: PyTree, scale: PyTree
) -> tuple[jax.Array, jax.Array]:
  """Return (outputs [N, ...], J s [R, D]), in forward mode if D < R, else in reverse mode."""
  zero, unravel = ravel_pytree(jax.tree.map(jnp.zeros_like, part))

  shift = lambda t, s, d: t + s * d
  moved = lambda dz: outputs_of(jax.tree.map(shift, part, scale, unravel(dz)))
  outputs = moved(zero)
  if not isinstance(outputs, jax.Array):
    raise ValueError(
      f"predict returned {type(outputs).__name__}: a dual solve, a log-determinant, a posterior "
      "and a restriction need outputs in one array [N, ...]. An implicit gradient may use "
      'solver="cg".'
    )
  jacobian = jax.jacfwd if zero.size < outputs.size else jax.jacrev
  return outputs, jacobian(moved)(zero).reshape(outputs.size, zero.size)


def by_example(blocks: jax.Array, rows: jax.Array) -> jax.Array:
  """Multiply each example's block [N, C, C] with its rows [N C, D]."""
  shape = (*blocks.shape[:2], rows.shape[1])
  with exact():
    return jnp.einsum("nij,njd->nid", blocks, rows.reshape(shape)).reshape(rows.shape)


def square_root(lam: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Return the root of Lambda_n for every example, with negative eigenvalues replaced by 0.

  Args:
    lam: Lambda, symmetric [N, C, C].

  Returns:
    (root [N, C, C], with root_n^T root_n = Lambda_n; [] bool, whether an eigenvalue was negative).
  """
  if jnp.dtype(lam.dtype).itemsize < 4:
    validate.wide(lam.dtype, "A dual solve, a posterior or a log-determinant")
  values, vectors = jnp.linalg.eigh(lam)  # [N, C], [N, C, C]
  root = jnp.sqrt(jnp.maximum(values, 0.0))[:, :, None] * jnp.swapaxes(vectors, 1, 2)
  return root, indefinite(values)


def indefinite(values: jax.Array) -> jax.Array:
  """Return [] bool: whether an eigenvalue is below 0 by more than rounding.

  If so, log_prob is not concave in the outputs.
  """
  return jnp.any(values < -1e-4 * jnp.max(values))


def output_curvature(likelihood: Likelihood, outputs: jax.Array, batch: Batch) -> jax.Array:
  """Return Lambda_n = -d^2 log p(y_n | f_n) / d f_n^2, [N, C, C], and 0 for padding.

  Args:
    likelihood: its log_prob is differentiated.
    outputs: f, [N, ...].
    batch: the targets and the mask.
  """
  shape, n = outputs.shape[1:], outputs.shape[0]
  if batch.mask is not None:
    outputs = without_padding(outputs, batch)  # 0 times an overflow is no number
  one = lambda x: jax.tree.map(lambda leaf: leaf[None], x)
  loss = lambda f, target: -_only(likelihood.log_prob(f.reshape(1, *shape), one(target)))
  lam = jax.vmap(jax.hessian(loss))(outputs.reshape(n, -1), batch.targets)
  if batch.mask is None:
    return lam
  mask = weights(batch, outputs.dtype)
  return jnp.where(mask[:, None, None] != 0, mask[:, None, None] * lam, 0.0)


def _only(log_prob: jax.Array) -> jax.Array:
  """Return the number of one example."""
  if log_prob.shape != (1,):
    raise ValueError(
      "Likelihood.log_prob must return one number an example, and depend on that example alone: of "
      f"one it returned shape {log_prob.shape}. What belongs to an example, such as its noise "
      "scale, goes into the targets."
    )
  return log_prob[0]
