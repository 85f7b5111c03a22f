"""The derivative of the validation loss with respect to sigma, through both phi_hat and theta_hat.

If phi follows l_MAP, the gradients in phi and in every z_t are 0 at the optimum:

    sum_t grad L_t(theta_t) - grad log p(phi) = 0,      s grad L_t(theta_t) + z_t = 0,

with L_t = -log p(D_t | theta) and theta_t = phi + s z_t. The Jacobian K of these conditions is an
arrowhead matrix. Its blocks are K_phiphi = sum_t C_t, K_phit = C_t s and K_tt = I + s C_t s, with
C_t the curvature of L_t. Blocks that couple two tasks are 0. A prior on phi adds the curvature of
-log p(phi) to K_phiphi. At sigma_m = inf there is no prior on theta: the term z_t and the identity
in K_tt are absent. Let (a, b_1:T) solve

    K (a, b_1:T) = (sum_t g_t, s g_1, ..., s g_T),      g_t = d loss / d theta_t.

The derivative of the loss is d/d log sigma_m^2 = sum_t <b_t, z_t> over the entries of module m.
This is the formula of `implicit.py`, with b_t in place of w_t. A product with K takes one product
of C_t with the direction a + s b_t for each task, and one sum over tasks.

The unknown a covers all of phi, frozen modules included. With "gauss_newton" every block of K is
approximated, the blocks of frozen modules too. K then stays positive semi-definite. With "hessian"
K is exact.

Derivation: from here on, z_t has its entries in module m and 0 elsewhere. The derivative has a
direct part, sum_t <g_t, s z_t> / 2. Its indirect part is

    sum_t (<b_t, z_t> - <a, C_t s z_t> - <b_t, s C_t s z_t>) / 2.

The product of row t of the system with z_t shows that the direct part and the two terms with C_t
add up to sum_t <b_t, z_t> / 2. The remaining term is the other half.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from shrinkmeta.base import SolveInfo
from shrinkmeta.config import Implicit
from shrinkmeta.curvature import solvers
from shrinkmeta.curvature.products import curvature_product
from shrinkmeta.mode.frozen import merge
from shrinkmeta.mode.task_model import TaskModel
from shrinkmeta.model.likelihood import masked_log_prob
from shrinkmeta.model.tasks import Batch, divisor, num_examples

PyTree = Any


def joint_sigma_gradient(
  implicit: Implicit,
  model: TaskModel,
  batches: Batch,
  z: PyTree,
  g: PyTree,
  *,
  log_p_phi: Callable[[PyTree], jax.Array] | None = None,
) -> tuple[dict[str, jax.Array], SolveInfo]:
  """Return d loss / d log sigma^2, {module: []}, and the SolveInfo of the one solve for all tasks.

  Args:
    implicit: its curvature, max_steps, tol and damping. The solver is CG. The system is singular
      along directions of phi that the data of no task determine. Except for rounding, CG does not
      move along these directions. A damping or log_p_phi makes the system regular.
    model: the task model of any one task. All tasks share its phi, sigma and modules.
    batches: training data, leaves [T, N, ...].
    z: the modes, trees like phi with None for frozen modules, leaves [T, ...].
    g: d loss / d theta_t, trees like phi, leaves [T, ...]. To leave out a task, pass 0 here
      and for its z, and a mask of 0 in `batches`.
    log_p_phi: phi -> [] the log prior of phi, or None.
  """
  phi, likelihood = model.params.phi, model.likelihood
  # K_phiphi is larger than K_tt by a factor of about `count`. To balance the blocks, the unknown is
  # a' with a = r a'.
  count = jnp.sum(jax.vmap(lambda batch: num_examples(batch, model.n.dtype))(batches))
  r = jax.lax.rsqrt(divisor(count))

  def direction(a: PyTree, b: PyTree) -> PyTree:
    """Return r a + s b for one task, the whole tree."""
    ra = optax.tree.scale(r, a)
    return merge(jax.tree.map(jnp.add, model.cut(ra), model.scaled(b)), ra)

  def outputs_of(thetas: PyTree) -> jax.Array:
    return jax.vmap(lambda theta, batch: likelihood.predict(theta, batch.inputs))(thetas, batches)

  def loss_of(outputs: jax.Array) -> jax.Array:
    log_p = jax.vmap(lambda f, batch: masked_log_prob(likelihood, f, batch))(outputs, batches)
    return -jnp.sum(log_p)

  thetas = jax.vmap(model.theta)(z)
  product = curvature_product(implicit.curvature, outputs_of, loss_of, thetas)

  def operator(v: tuple[PyTree, PyTree]) -> tuple[tuple[PyTree, PyTree], None]:
    a, b = v
    u = product(jax.vmap(direction, (None, 0))(a, b))
    top = jax.tree.map(lambda x: r * jnp.sum(x, 0), u)
    if log_p_phi is not None:
      curved = jax.jvp(jax.grad(log_p_phi), (phi,), (optax.tree.scale(r, a),))[1]
      top = optax.tree.add_scale(top, -r, curved)
    rows = jax.vmap(lambda b, u: model.k_product(b, model.cut(u), implicit.damping))(b, u)
    return (optax.tree.add_scale(top, implicit.damping, a), rows), None

  of_phi = jax.tree.map(lambda x: r * jnp.sum(x, 0), g)
  right = of_phi, jax.vmap(lambda g: model.scaled(model.cut(g)))(g)
  (_, b), _, info = solvers.cg(operator, right, implicit.max_steps, implicit.tol)
  own = jax.tree.map(lambda p, b, z: p * b * z, model.white.precision, b, z)
  return model.by_module(own), info
