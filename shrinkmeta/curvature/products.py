"""Products with the curvature C of a loss l(f(theta)) and the Jacobian J, without forming them.

    hessian:       C = d^2 l / d theta^2
    gauss_newton:  C = J^T Lambda J,   J = d f / d theta,   Lambda = d^2 l / d f^2

Here f are the outputs of a network and l = -log p(D | f). Away from an optimum the Hessian of a
network is indefinite. The Gauss-Newton matrix is positive semi-definite if log p is concave in the
outputs, as it is for the ready-made likelihoods. `TaskModel.k_product` in mode/task_model.py
computes products with K = P + s C s. Here s has the value sigma_m at every parameter of module m,
and P is the precision of the prior in whitened coordinates.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import jaxprs_in_params

from shrinkmeta.config import Curvature

PyTree = Any


def curvature_product(
  curvature: Curvature,
  outputs_of: Callable[[PyTree], jax.Array],
  loss_of: Callable[[jax.Array], jax.Array],
  theta: PyTree,
) -> Callable[[PyTree], PyTree]:
  """Return the function v -> C v, with C taken at theta.

  The network is linearised here once. A product then only evaluates linear functions.

  Args:
    curvature: "hessian" or "gauss_newton".
    outputs_of: theta -> f, the outputs of one task or of many.
    loss_of: f -> l(f) [], in nats.
    theta: the point at which C is taken, a pytree of arrays [...].

  Returns:
    A linear function from trees like theta to trees like theta.
  """
  if curvature == "hessian":
    return jax.linearize(jax.grad(lambda t: loss_of(outputs_of(t))), theta)[1]
  outputs, jvp, vjp = linearise(outputs_of, theta)
  output_hessian = jax.linearize(jax.grad(loss_of), outputs)[1]
  return lambda v: vjp(output_hessian(jvp(v)))


def curvature_column(
  curvature: Curvature,
  outputs_of: Callable[[PyTree], jax.Array],
  loss_of: Callable[[jax.Array], jax.Array],
  embed: Callable[[PyTree], PyTree],
  part: PyTree,
) -> Callable[[PyTree], PyTree]:
  """Return the function v -> C v, in which v has entries only for the task-specific modules.

  The result C v also has entries for the frozen modules. The linear solve does not need these
  entries: it uses only the task-specific rows and columns of C. The gradient with respect to phi
  needs them, once for each task. The rows of the frozen modules are those of the exact Hessian,
  also with "gauss_newton". J^T Lambda J would leave out how a frozen module changes the derivative
  of the outputs with respect to the task-specific modules.

  Args:
    curvature: "hessian" or "gauss_newton", for the rows of the task-specific modules.
    outputs_of: theta -> f.
    loss_of: f -> l(f) [], in nats.
    embed: part -> theta, which fills in the parameters of the frozen modules.
    part: the task-specific parameters at which C is taken, with None in the frozen modules.

  Returns:
    A linear function from trees like `part` to trees like theta.
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


def linearise(
  f: Callable[[PyTree], PyTree], theta: PyTree
) -> tuple[PyTree, Callable[[PyTree], PyTree], Callable[[PyTree], PyTree]]:
  """Return (f(theta), the function v -> J v, the function u -> J^T u), with J = d f / d theta.

  Forward mode computes J v. An operation with a `jax.custom_vjp` has a rule for J^T u alone. There,
  J v is the transpose of the linear function u -> J^T u.

  Args:
    f: theta -> outputs.
    theta: the point at which J is taken, a pytree of arrays [...].

  >>> square = jax.custom_vjp(lambda x: x**2)
  >>> square.defvjp(lambda x: (x**2, x), lambda x, u: (2.0 * x * u,))
  >>> outputs, jvp, vjp = linearise(square, 3.0)
  >>> float(outputs), float(jvp(1.0)), float(vjp(1.0))
  (9.0, 6.0, 6.0)
  """
  outputs, jvp = jax.linearize(f, theta)
  programs = [jax.make_jaxpr(jvp)(theta).jaxpr]
  for program in programs:  # the list grows by the programs inside
    programs += [inner for eqn in program.eqns for inner in jaxprs_in_params(eqn.params)]
  # JAX's name for the linear part of a custom_vjp: docs/hazards.md#jaxpr-names.
  if all(eqn.primitive.name != "custom_lin" for program in programs for eqn in program.eqns):
    vjp = jax.linear_transpose(jvp, theta)
    return outputs, jvp, lambda u: vjp(u)[0]
  outputs, vjp = jax.vjp(f, theta)
  transposed = jax.linear_transpose(lambda u: vjp(u)[0], outputs)
  return outputs, lambda v: transposed(v)[0], lambda u: vjp(u)[0]
