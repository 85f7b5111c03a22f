"""The task model: one task's objective and curvature, as functions of the whitened parameters z.

    theta(z) = phi + s z                                  s = sigma, whitened coordinates
    J(z)     = -log p(D | theta(z)) + P |z|^2 / 2          P = 1, the prior's precision in z
    K        = P + s C s                                  C the curvature of -log p(D | theta)

D are the examples of the task. z holds the parameters of the task-specific modules only. In a tree
like z, None takes the place of the leaves of frozen modules. For sigma = inf, s = 1 and P = 0: see
`whitening.py`. The mode, the implicit gradient, the joint solve, the determinant, the posterior and
the evidence are all computed from theta(z), J and K.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from shrinkmeta.base import MetaParams
from shrinkmeta.config import Curvature, Frozen
from shrinkmeta.curvature.jacobian import Factor, whitened_factor
from shrinkmeta.curvature.products import curvature_column, curvature_product
from shrinkmeta.curvature.vectors import vdot
from shrinkmeta.mode.frozen import merge, moving
from shrinkmeta.mode.hoist import hoist
from shrinkmeta.mode.whitening import Whitening, whitening
from shrinkmeta.model import modules
from shrinkmeta.model.likelihood import Likelihood, masked_log_prob, mean_nll
from shrinkmeta.model.tasks import Batch, divisor, num_examples, weights

PyTree = Any


@dataclasses.dataclass(frozen=True, eq=False)
class TaskModel:
  """The likelihood and the data of one task, with methods for J, C and K. Build it by `task_model`.

  In this class "a part" is a tree like phi with None in the frozen modules. z is a part. s and P
  are parts with one scalar [] for each leaf.
  """

  likelihood: Likelihood
  labels: modules.Labels
  params: MetaParams  # phi, whole, and log sigma^2
  part: PyTree  # of phi
  white: Whitening  # s and P
  batch: Batch  # D, without the T axis
  count: jax.Array  # [] N, the number of examples in D
  n: jax.Array  # [] the divisor of a sum over D: N, or 1 if no example counts
  frozen: Frozen  # modules that stay at phi
  free: Frozen  # modules with sigma = inf, known before compilation
  prior: bool  # False: no prior, sigma^2 is only a step size

  # The same task model with other parameters or on other data.

  def at(self, params: MetaParams) -> "TaskModel":
    """Return the same task with other phi and sigma."""
    white = _whitening(params, self.cut(self.labels), self.free, self.prior)
    return dataclasses.replace(self, params=params, part=self.cut(params.phi), white=white)

  def around(self, theta: PyTree) -> "TaskModel":
    """Return the same task with theta in the place of phi.

    Then theta(0) = theta, and C is taken at theta.
    """
    params = self.params._replace(phi=theta)
    return dataclasses.replace(self, params=params, part=self.cut(theta))

  def on(self, batch: Batch) -> "TaskModel":
    """Return the task model with the same parameters on other data."""
    count = num_examples(batch, self.count.dtype)
    return dataclasses.replace(self, batch=batch, count=count, n=divisor(count))

  def from_zero(self) -> "tuple[TaskModel, PyTree]":
    """Return (the same task with z = theta, the z of phi), where no module has a prior.

    theta = phi + z costs an addition for each array in each step. With 0 in the place of phi it
    costs none. A task with a prior stays as it is, and so does one in bfloat16 or float16, in which
    small steps would vanish beside a large theta. None then stands for z = 0.
    """
    wide = all(jnp.finfo(x.dtype).bits >= 32 for x in jax.tree.leaves(self.part))
    if not wide or not set(jax.tree.leaves(self.cut(self.labels))) <= self.free:
      return self, None
    return dataclasses.replace(self, part=optax.tree.zeros_like(self.part)), self.part

  def unfrozen(self) -> "TaskModel":
    """Return the same task with no module treated as frozen: its parts are whole trees."""
    return task_model(self.likelihood, self.labels, self.params, self.batch, prior=self.prior)

  def hoisted(self) -> "TaskModel":
    """Return the same task with the outputs of its frozen modules on D in place of the inputs.

    The outputs are computed here, once.
    """
    outputs_of = lambda part, inputs: self.likelihood.predict(self.whole(part), inputs)
    predict, features = hoist(outputs_of, self.part, self.batch.inputs)
    return dataclasses.replace(
      self,
      likelihood=self.likelihood._replace(predict=predict),
      labels=moving(self.labels, self.labels, self.frozen),
      params=self.params._replace(phi=self.part),
      batch=self.batch._replace(inputs=features),
      frozen=frozenset(),
    )

  # theta(z), and conversions between parts and whole trees.

  def theta_part(self, z: PyTree) -> PyTree:
    """Return phi + s z, a part."""
    return jax.tree.map(lambda p, s, v: p + s * v, self.part, self.white.scale, z)

  def whole(self, part: PyTree) -> PyTree:
    """Return the whole tree: `part`, with phi in the frozen modules."""
    return merge(part, self.params.phi) if self.frozen else part

  def theta(self, z: PyTree) -> PyTree:
    """Return phi + s z, a whole tree with phi in the frozen modules."""
    return self.whole(self.theta_part(z))

  def scaled(self, v: PyTree) -> PyTree:
    """Return s v for a part v."""
    return jax.tree.map(jnp.multiply, self.white.scale, v)

  def cut(self, tree: PyTree) -> PyTree:
    """Return the part of a tree like phi: None replaces the leaves of frozen modules."""
    return moving(tree, self.labels, self.frozen) if self.frozen else tree

  def by_module(self, part: PyTree) -> dict[str, jax.Array]:
    """Return {module: [] the sum of the entries of `part`}, with 0 for frozen modules."""
    zero = {m: jnp.zeros([], jnp.result_type(v)) for m, v in self.params.log_sigma2.items()}
    return zero | modules.gather(part, self.cut(self.labels))

  # J and its gradient.

  def objective(self, z: PyTree, batch: Batch) -> jax.Array:
    """Return J / N [], nats per example, with the likelihood estimated from `batch`.

    The prior's term is divided by the N of D, not by the number of examples in `batch`.
    """
    of_prior = self._neg_log_prior(z) / self.n
    return of_prior + self._share(batch) * mean_nll(self.likelihood, self.theta(z), batch)

  def value_and_grad(self, z: PyTree, batch: Batch) -> tuple[jax.Array, PyTree]:
    """Return (J / N [], its gradient in z), with the likelihood estimated from `batch`."""
    share, with_prior = self._share(batch), self.with_prior(z)
    loss = lambda part: share * mean_nll(self.likelihood, self.whole(part), batch)
    return with_prior(*jax.value_and_grad(loss)(self.theta_part(z)))

  def with_prior(self, z: PyTree) -> Callable[[jax.Array, PyTree], tuple[jax.Array, PyTree]]:
    """Return the function (nll, g) -> (J / N [], s g + P z / N), which adds the prior.

    The gradient of the prior's term is P z, so it needs no automatic differentiation. nll is the
    mean negative log-likelihood [] at theta(z), and g its gradient with respect to theta, a part.
    `with_prior(z)` computes the terms of the prior, before the network runs. The function that it
    returns adds them.
    """
    of_prior = self._neg_log_prior(z) / self.n
    pull = jax.tree.map(
      lambda p, v: 0.0 if _is_none(p) else p * v / self.n, self.white.precision, z
    )
    leaf = lambda s, g, pulled: s * g if isinstance(pulled, float) else s * g + pulled
    return lambda nll, g: (nll + of_prior, jax.tree.map(leaf, self.white.scale, g, pull))

  def _share(self, batch: Batch) -> jax.Array | float:
    """Return the factor [] that makes the mean NLL of `batch` an unbiased estimate of that of D.

    Mini-batches draw every example with the same probability, regardless of its weight. But
    `mean_nll` divides by the weights of the batch. The factor is the mean weight of an example in
    `batch`, divided by the mean weight of an example in D.
    """
    if batch is self.batch or self.batch.mask is None:
      return 1.0
    dtype = self.n.dtype
    return _mean_weight(batch, dtype) / _mean_weight(self.batch, dtype)

  def _neg_log_prior(self, z: PyTree) -> jax.Array:
    """Return P |z|^2 / 2 []."""
    half = lambda p, v: 0.0 if _is_none(p) else 0.5 * p * jnp.sum(jnp.square(v))
    return jnp.asarray(sum(jax.tree.leaves(jax.tree.map(half, self.white.precision, z))))

  # Products with K, and with the curvature C at phi.

  def product(self, curvature: Curvature) -> Callable[[PyTree], PyTree]:
    """Return v -> C v for parts v, with C taken at phi.

    For C at theta call `around(theta)` first.
    """
    loss_of = lambda outputs: -masked_log_prob(self.likelihood, outputs, self.batch)
    return curvature_product(curvature, self.outputs_at, loss_of, self.part)

  def column(self, curvature: Curvature) -> Callable[[PyTree], PyTree]:
    """Return v -> C v from parts to trees like phi, with C taken at phi.

    The rows of C in frozen modules are those of the exact Hessian: see `curvature_column`.
    """
    outputs_of = lambda theta: self.likelihood.predict(theta, self.batch.inputs)
    loss_of = lambda outputs: -masked_log_prob(self.likelihood, outputs, self.batch)
    return curvature_column(curvature, outputs_of, loss_of, self.whole, self.part)

  def outputs_at(self, part: PyTree) -> jax.Array:
    """Return the outputs on D [N, ...]."""
    return self.likelihood.predict(self.whole(part), self.batch.inputs)

  def k_product(self, v: PyTree, curved: PyTree, damping: float = 0.0) -> PyTree:
    """Return (K + damping) v = (P + damping) v + s C (s v), for a part v and `curved` = C (s v)."""
    row = lambda p, s, c, v: (p + damping) * v + s * c
    return jax.tree.map(row, self.white.precision, self.white.scale, curved, v)

  def factor(self) -> Factor:
    """Return the factor A of s C s = A^T A, with the Gauss-Newton C taken at phi."""
    return whitened_factor(
      self.likelihood, self.outputs_at, self.part, self.white.scale, self.batch
    )

  def curvature_along(self, u: PyTree, curved: PyTree) -> jax.Array:
    """Return the curvature <u, C u> / <u, u> [] along a part u, or N if that is larger.

    A sharp likelihood has a curvature far above its number of examples. `curved` is C u, a part.
    """
    along, length = vdot(u, curved), vdot(u, u)
    along = jnp.where(length == 0, 0.0, along / jnp.where(length == 0, 1.0, length))
    return jnp.maximum(self.count, along)

  def balance(self, direct: PyTree, scaled: PyTree, c: jax.Array) -> PyTree:
    """Combine two inexact forms of one quantity x: x = `direct` and s x = `scaled`.

        x = (direct + c s scaled) / (1 + c s^2)

    Where the data dominate the prior, a form such as g - C (s w) subtracts two large, nearly equal
    vectors. An error e in w then becomes an error C s e in x. The other form, `scaled` / s, turns
    the error into e / s. The formula holds for every c >= 0 and never divides by s. It equals
    `direct` at c = 0 and tends to `scaled` / s as c grows. At c = C the two errors cancel.

    Args:
      direct: a tree like phi. Leaves of frozen modules are returned unchanged.
      scaled: a part, s x computed from the prior's term. It is 0 in modules without a prior.
      c: [] the size of the curvature C: see `curvature_along`.
    """

    def leaf(s: Any, of_data: jax.Array, of_prior: Any) -> jax.Array:
      return of_data if s is None else (of_data + c * s * of_prior) / (1.0 + c * s * s)

    none = lambda x: x is None
    return jax.tree.map(leaf, self.white.scale, direct, scaled, is_leaf=none)


def task_model(
  likelihood: Likelihood,
  labels: modules.Labels,
  params: MetaParams,
  batch: Batch,
  frozen: Frozen = frozenset(),
  free: Frozen = frozenset(),
  prior: bool = True,
) -> TaskModel:
  """Build the task model of one task.

  Args:
    likelihood: predict and log_prob.
    labels: the module of every parameter.
    params: phi, and log sigma^2 {module: []}.
    batch: D, without the T axis.
    frozen: modules that stay at phi.
    free: modules with sigma = inf, known before compilation. Their log sigma^2 in `params` is
      ignored.
    prior: False drops the prior: see `whitening`.
  """
  part, names = params.phi, labels
  if frozen:
    part, names = moving(part, labels, frozen), moving(labels, labels, frozen)
  white = _whitening(params, names, free, prior)
  count = num_examples(batch, jnp.result_type(jax.tree.leaves(params.phi)[0]))
  n = divisor(count)
  return TaskModel(likelihood, labels, params, part, white, batch, count, n, frozen, free, prior)


def _whitening(params: MetaParams, names: modules.Labels, free: Frozen, prior: bool) -> Whitening:
  """Return the whitening of a part whose labels are `names`."""
  dtype = jnp.result_type(jax.tree.leaves(params.phi)[0])
  log_sigma2: Mapping[str, Any] = dict(params.log_sigma2) | dict.fromkeys(free, math.inf)
  return whitening(log_sigma2, names, dtype, prior)


def _mean_weight(batch: Batch, dtype: Any) -> jax.Array:
  """Return the mean weight [] of the examples that are not padding."""
  mask = weights(batch, dtype)
  return divisor(jnp.sum(mask)) / divisor(jnp.sum((mask != 0).astype(dtype)))


def _is_none(precision: jax.Array | float) -> bool:
  """Return whether the prior is known to be absent before compilation: see `Whitening`."""
  return isinstance(precision, float) and precision == 0.0
