"""How uncertain is theta_hat? Laplace's posterior of one task, in whitened coordinates.

    z | D ~ N(z_hat, (I + s C s)^-1),   theta = phi + s z,   C the Gauss-Newton curvature.

With s C s = V^T diag(lambda) V, rows of V orthonormal, everything follows from (V, lambda): the
prior's unit variance is left in all directions but those of V, where it is 1 / (1 + lambda).
Exact by a singular value decomposition of A = Lambda^(1/2) J s, or, where A is too large, of low
rank by Lanczos: directions not found keep the prior's variance, so that the total variance is too
large (along one direction it may be too small). Frozen modules have none.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jax.flatten_util import ravel_pytree

from shrinkmeta import validate
from shrinkmeta.base import MetaParams
from shrinkmeta.curvature.jacobian import indefinite
from shrinkmeta.curvature.lanczos import lanczos
from shrinkmeta.curvature.solvers import exact, split, thin_svd
from shrinkmeta.keys import same_in_any_batch
from shrinkmeta.mode.frozen import frozen_modules, merge
from shrinkmeta.mode.task_model import TaskModel, task_model
from shrinkmeta.model import modules
from shrinkmeta.model.likelihood import Likelihood, without_padding
from shrinkmeta.model.tasks import Batch, check_batch

PyTree = Any


class Predictive(NamedTuple):
  """Normal distribution of the outputs f of each example, noise of the targets not included."""

  mean: jax.Array  # [N, ...] f(theta_hat)
  covariance: jax.Array  # [N, C, C] over the C outputs of an example

  @property
  def variance(self) -> jax.Array:
    """Of every output, [N, ...]."""
    return jnp.diagonal(self.covariance, axis1=-2, axis2=-1).reshape(self.mean.shape)


@struct.dataclass
class Posterior:
  """What `posterior` returns; a pytree, so that `jax.vmap` over tasks gives one of T tasks."""

  theta: PyTree  # the mode, all of it
  scale: PyTree  # s, a scalar a leaf; None for frozen modules
  basis: jax.Array  # [R, D] V
  eigenvalues: jax.Array  # [R] lambda >= 0
  predict: Callable[[PyTree, PyTree], jax.Array] = struct.field(pytree_node=False)
  log_prob: Callable[[jax.Array, PyTree], jax.Array] = struct.field(pytree_node=False)

  def sample(self, key: jax.Array, n: int) -> PyTree:
    """n draws of theta, leaves [n, ...]."""
    part, rest = self._cut()
    moved = jax.tree.map(lambda t, d: t[None] + d, part, self._deviations(key, n))
    return merge(moved, jax.tree.map(lambda t: jnp.broadcast_to(t, (n, *t.shape)), rest))

  def predictive(self, inputs: PyTree) -> Predictive:
    """Of the outputs at `inputs`, linearised around theta_hat: f(theta_hat) + J s (z - z_hat).

    Costs one gradient for every output of every example; these are taken one after another.
    """
    part, rest = self._cut()
    outputs, vjp = jax.vjp(lambda p: self.predict(merge(p, rest), inputs), part)

    def row(cotangent: jax.Array) -> jax.Array:
      g = jax.tree.map(jnp.multiply, self.scale, vjp(cotangent.reshape(outputs.shape))[0])
      return ravel_pytree(g)[0]

    n = outputs.shape[0]
    own = jnp.arange(outputs.size // n)  # the C outputs of an example

    def example(i: jax.Array) -> jax.Array:  # [C, C]
      rows = jax.vmap(row)(jax.nn.one_hot(i * len(own) + own, outputs.size, dtype=outputs.dtype))
      along, off = split(rows, self.basis)
      with exact():
        return off @ off.T + (along / (1.0 + self.eigenvalues)[None]) @ along.T

    return Predictive(outputs, jax.lax.map(example, jnp.arange(n)))

  def outputs(self, key: jax.Array, inputs: PyTree, n: int, linearised: bool = True) -> jax.Array:
    """n draws of the outputs, [n, N, ...]; of the linearised network, or of the network itself.

    The Gauss-Newton posterior belongs to the linearised network; the network itself, drawn far from
    theta_hat, can do anything and is mostly worse.
    """
    part, rest = self._cut()
    predict = lambda p: self.predict(merge(p, rest), inputs)
    deviations = self._deviations(key, n)
    if not linearised:
      return jax.vmap(lambda d: predict(jax.tree.map(jnp.add, part, d)))(deviations)
    f, jvp = jax.linearize(predict, part)
    return jax.vmap(lambda d: f + jvp(d))(deviations)

  def log_predictive(
    self, key: jax.Array, batch: Batch, n: int, linearised: bool = True
  ) -> jax.Array:
    """log of the mean over n draws of p(y | f), for every example [N]; 0 for padding."""
    f = self.outputs(key, batch.inputs, n, linearised)
    log_p = jax.vmap(lambda f: self.log_prob(*without_padding((f, batch.targets), batch)))(f)
    # XLA on CPUs loses a NaN, the mark of a label out of range, in a sum of exponentials.
    mean = jnp.where(
      jnp.isnan(log_p).any(0), jnp.nan, jax.scipy.special.logsumexp(log_p, 0) - jnp.log(n)
    )
    return without_padding(mean, batch)

  def _cut(self) -> tuple[PyTree, PyTree]:
    """theta of the modules that move, and of the others."""
    none = lambda x: x is None
    part = jax.tree.map(lambda s, t: None if s is None else t, self.scale, self.theta, is_leaf=none)
    rest = jax.tree.map(lambda s, t: t if s is None else None, self.scale, self.theta, is_leaf=none)
    return part, rest

  def _deviations(self, key: jax.Array, n: int) -> PyTree:
    """n draws of s (z - z_hat), leaves [n, ...]: (I + s C s)^(-1/2) on standard normal noise."""
    flat, unravel = ravel_pytree(self._cut()[0])
    noise = jax.random.normal(same_in_any_batch(key), (n, flat.size), flat.dtype)
    change = jax.lax.rsqrt(1.0 + self.eigenvalues) - 1.0
    with exact():
      z = noise + ((noise @ self.basis.T) * change[None]) @ self.basis
    return jax.vmap(lambda v: jax.tree.map(jnp.multiply, self.scale, unravel(v)))(z)


def posterior(
  likelihood: Likelihood,
  labels: modules.Labels,
  phi: PyTree,
  log_sigma2: Mapping[str, jax.typing.ArrayLike],
  theta: PyTree,
  batch: Batch,
  *,
  rank: int | None = None,
  limit: int = 2**24,
  key: jax.Array | None = None,
) -> Posterior:
  """Laplace's posterior of one task around its mode `theta`; see the head of this file.

  Args:
    phi, log_sigma2: as everywhere; sigma finite, 0 for frozen modules.
    theta: the mode, from `map_estimate` or `learner.adapt`.
    batch: the data that theta was found on, without the T axis; `jax.vmap` for many tasks.
    rank: number of Lanczos steps, and of directions; None is exact where A, N C x D, has at most
      `limit` entries, and 64 else.
    key: of the vector from which Lanczos begins; None is `jax.random.key(0)`.

  >>> import jax, jax.numpy as jnp
  >>> import shrinkmeta as sm
  >>> mean = sm.gaussian(lambda theta, x: x * theta["w"])  # noise 1, prior N(0, 1), 3 examples
  >>> batch = sm.Batch(jnp.ones(3), jnp.array([0.0, 1.0, 2.0]))
  >>> theta, _ = sm.map_estimate(mean, {"w": "w"}, {"w": 0.0}, {"w": 0.0}, batch)
  >>> found = sm.posterior(mean, {"w": "w"}, {"w": 0.0}, {"w": 0.0}, theta, batch)
  >>> float(found.predictive(jnp.ones(1)).variance[0])  # 1 / (1 + 3)
  0.25
  """
  phi, theta = jax.tree.map(jnp.asarray, (phi, theta))
  known = modules.check_parameters("phi", phi, "log_sigma2", log_sigma2, labels)
  dtype = jnp.result_type(jax.tree.leaves(phi)[0])
  log_s2 = modules.finite_sigma(log_sigma2, "posterior of this kind")
  validate.same_shapes("theta", theta, "phi", phi)
  check_batch("batch", batch)
  if rank is not None and rank < 1:
    raise ValueError(f"rank must be positive, or None; got {rank}.")
  frozen = frozen_modules(known)
  at_mode = MetaParams(theta, {m: v.astype(dtype) for m, v in log_s2.items()})
  model = task_model(likelihood, labels, at_mode, batch, frozen)
  outputs = jax.eval_shape(model.outputs_at, model.part)
  size = sum(x.size for x in jax.tree.leaves(model.part))
  if rank is None and outputs.size * size > limit:
    rank = 64
  if rank is None:
    basis, values = _exact(model)
  else:
    key = jax.random.key(0) if key is None else same_in_any_batch(key)
    basis, values = _low_rank(model, rank, key)
  return Posterior(theta, model.white.scale, basis, values, likelihood.predict, likelihood.log_prob)


def _exact(model: TaskModel) -> tuple[jax.Array, jax.Array]:
  """Return (V [R, D], lambda [R]) by the singular values of A."""
  factor = model.factor()
  _, singular, basis = thin_svd(factor.a)
  return basis, jnp.where(factor.negative, jnp.nan, jnp.square(singular))


def _low_rank(model: TaskModel, rank: int, key: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Return (V [rank, D], lambda [rank]) by `rank` products with s C s."""
  flat, unravel = ravel_pytree(model.part)
  curved = model.product("gauss_newton")

  def product(v: jax.Array) -> jax.Array:
    return ravel_pytree(model.scaled(curved(model.scaled(unravel(v)))))[0]

  krylov = lanczos(product, jax.random.normal(key, flat.shape, flat.dtype), rank)
  values, vectors = krylov.eigh()
  values = jnp.where(indefinite(values), jnp.nan, jnp.maximum(values, 0.0))
  with exact():
    return vectors.T @ krylov.basis, values
