"""Products C v with the curvature C of a loss l(f(theta)), without forming the D x D matrix C.

    hessian:       C = d^2 l / d theta^2
    gauss_newton:  C = J^T Lambda J,   J = d f / d theta,   Lambda = d^2 l / d f^2

Here f are the outputs of a network and l = -log p(D | f). Away from its optimum a network's Hessian
is indefinite. The Gauss-Newton matrix is positive semi-definite wherever log p is concave in the
outputs, as it is for the ready-made likelihoods. Products with K = P + s C s are
`TaskModel.k_product`, in mode/task_model.py.
"""

from collections.abc import Callable
from typing import Any

import jax

from shrinkmeta.config import Curvature

PyTree = Any


def curvature_product(
  curvature: Curvature,
  outputs_of: Callable[[PyTree], jax.Array],
  loss_of: Callable[[jax.Array], jax.Array],
  theta: PyTree,
) -> Callable[[PyTree], PyTree]:
  """Return v -> C v, linearised here once, so that each product is linear work.

  Args:
    curvature: "hessian" or "gauss_newton".
    outputs_of: theta -> f, of one task or of many.
    loss_of: f -> l(f) [].
    theta: where C is taken.

  Returns:
    a linear function from trees like theta to trees like theta.
  """
  if curvature == "hessian":
    return jax.linearize(jax.grad(lambda t: loss_of(outputs_of(t))), theta)[1]
  outputs, jvp = jax.linearize(outputs_of, theta)
  vjp = jax.linear_transpose(jvp, theta)
  output_hessian = jax.linearize(jax.grad(loss_of), outputs)[1]
  return lambda v: vjp(output_hessian(jvp(v)))[0]


def curvature_column(
  curvature: Curvature,
  outputs_of: Callable[[PyTree], jax.Array],
  loss_of: Callable[[jax.Array], jax.Array],
  embed: Callable[[PyTree], PyTree],
  part: PyTree,
) -> Callable[[PyTree], PyTree]:
  """Return v -> C v for a v that is 0 in the frozen modules; the result is on all of theta.

  The solve needs only the block of C in which rows and columns are task-specific. The gradient with
  respect to phi also needs the rows of the frozen modules, once for each task. These rows are those
  of the exact Hessian, also under Gauss-Newton: J^T Lambda J would leave out how a frozen module
  changes the derivative of the outputs with respect to the task-specific ones.

  Args:
    curvature: "hessian" or "gauss_newton", for the rows of the modules that move.
    outputs_of: theta -> f.
    loss_of: f -> l(f) [].
    embed: part -> theta, the leaves of `part` put into all of theta.
    part: those leaves of theta where C is taken, None elsewhere.

  Returns:
    a linear function from trees like `part` to trees like theta.
  """

  def outputs_and_gradient(part: PyTree) -> tuple[jax.Array, PyTree]:
    outputs, vjp = jax.vjp(outputs_of, embed(part))
    return outputs, vjp(jax.grad(loss_of)(outputs))[0]

  def column(v: PyTree) -> PyTree:
    (outputs, _), (along, hessian) = jax.jvp(outputs_and_gradient, (part,), (v,))
    if curvature == "hessian":
      return hessian
    curved = jax.jvp(jax.grad(loss_of), (outputs,), (along,))[1]
    rows = jax.vjp(lambda p: outputs_of(embed(p)), part)[1](curved)[0]
    is_none = lambda x: x is None
    return jax.tree.map(lambda r, h: h if r is None else r, rows, hessian, is_leaf=is_none)

  return column
