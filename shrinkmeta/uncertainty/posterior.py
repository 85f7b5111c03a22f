"""The uncertainty of theta_hat: Laplace's posterior of one task, in whitened coordinates.

    z | D ~ N(z_hat, (I + s C s)^-1),   theta = phi + s z,   C the Gauss-Newton curvature.

s has the value sigma_m at every parameter of module m. Write s C s = V^T diag(lambda) V, where the
k rows of V [k, D] are orthonormal, k = min(R, D) for R outputs of all examples. The posterior
variance of z is 1 / (1 + lambda_i) along row i of V, and 1 orthogonal to all rows, as in the prior.
(V, lambda) come from a singular value decomposition of A = Lambda^(1/2) J s
(curvature/jacobian.py). If A is too large, Lanczos' method finds k < min(R, D) rows of V,
approximately. All other directions keep the variance 1, so the total variance is too large. The
variance along a single direction may still be too small.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.flatten_util import ravel_pytree

from shrinkmeta.checks import scalars, validate
from shrinkmeta.curvature.closed_over import open_likelihood
from shrinkmeta.curvature.products import curvature_product, linearise
from shrinkmeta.curvature.solvers import exact, split
from shrinkmeta.devices.keys import same_in_any_batch
from shrinkmeta.mode.frozen import merge
from shrinkmeta.model.likelihood import Likelihood, masked_log_prob, without_padding
from shrinkmeta.model.tasks import Batch, check_batch, check_inputs
from shrinkmeta.model.variants import with_constants
from shrinkmeta.uncertainty.inverse_root import inverse_root, root_of

PyTree = Any


class Predictive(NamedTuple):
  """The normal distribution of the outputs f of each example, without the noise of the targets.

  Attributes:
    mean: [N, ...] f(theta_hat).
    covariance: [N, C, C], over the C outputs of an example.
  """

  mean: jax.Array
  covariance: jax.Array

  @property
  def variance(self) -> jax.Array:
    """The variance of every output [N, ...]."""
    return jnp.diagonal(self.covariance, axis1=-2, axis2=-1).reshape(self.mean.shape)


# A field that is no array: part of the structure of the pytree.
_static = functools.partial(dataclasses.field, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Posterior:
  """The posterior of one task, a pytree: `jax.vmap` of `posterior` gives those of T tasks.

  Attributes:
    theta: the mode, a tree like phi.
    scale: s, one scalar [] for each leaf; None for frozen modules.
    basis: [k, D], V; it has no derivative if `exact`.
    eigenvalues: [k], lambda >= 0.
    batch: the data of the task; only derivatives read them.
    predict: the network of the likelihood.
    log_prob: the log density of the likelihood.
    constants: what `predict` takes as its third argument, or None.
    exact: False if Lanczos' method found V and lambda.
  """

  theta: PyTree
  scale: PyTree
  basis: jax.Array
  eigenvalues: jax.Array
  batch: Batch
  predict: Callable[..., jax.Array] = _static()
  log_prob: Callable[[jax.Array, PyTree], jax.Array] = _static()
  constants: PyTree = None
  exact: bool = _static(default=True)

  def sample(self, key: jax.Array, n: int) -> PyTree:
    """Draw theta n times.

    For one key, draws can be differentiated once with respect to the parameters, sigma and the
    data, also where s C s has equal eigenvalues. So can `outputs` and `log_predictive`. With a
    `rank` the derivative goes through Lanczos' method, and needs distinct eigenvalues.

    Args:
      key: a random key; consumed.
      n: the number of draws.

    Returns:
      a tree like phi, leaves [n, ...].

    Raises:
      TypeError, ValueError: an argument has the wrong type, or `n` is less than 1.

    >>> import jax.numpy as jnp
    >>> import shrinkmeta as sm
    >>> mean = sm.gaussian(lambda theta, x: x * theta["w"])
    >>> batch, prior = sm.Batch(jnp.ones(3), jnp.ones(3)), ({"w": 0.0}, {"w": 0.0})
    >>> found = sm.posterior(mean, {"w": "w"}, *prior, {"w": 0.75}, batch)
    >>> found.sample(jax.random.key(0), 5)["w"].shape
    (5,)
    """
    scalars.key("key", key, optional=False)
    n = validate.integer("n", n, least=1)
    part, rest = self._cut()
    moved = jax.tree.map(lambda t, d: t[None] + d, part, self._deviations(key, n))
    return merge(moved, jax.tree.map(lambda t: jnp.broadcast_to(t, (n, *t.shape)), rest))

  def predictive(self, inputs: PyTree) -> Predictive:
    """Return the normal distribution of the outputs of the network linearised around theta_hat.

        f(theta_hat) + J s (z - z_hat)

    This costs one gradient for every output of every example, taken one example after another.

    The covariance is differentiable, also where s C s has equal eigenvalues or is singular. Its
    derivative uses (I + s C s)^-1, and no derivative of an eigenvector.

    Args:
      inputs: what `predict` takes, leaves [N, ...].

    Returns:
      a Predictive: the mean [N, ...] and the covariance [N, C, C].

    Raises:
      TypeError, ValueError: `inputs` are not arrays [N, ...].

    >>> import jax.numpy as jnp
    >>> import shrinkmeta as sm
    >>> mean = sm.gaussian(lambda theta, x: x * theta["w"])
    >>> batch, prior = sm.Batch(jnp.ones(3), jnp.ones(3)), ({"w": 0.0}, {"w": 0.0})
    >>> found = sm.posterior(mean, {"w": "w"}, *prior, {"w": 0.75}, batch)
    >>> found.predictive(jnp.ones(1)).variance  # 1 / (1 + 3)
    Array([0.25], dtype=float32)
    """
    check_inputs(inputs)
    part, rest = self._cut()
    outputs, vjp = jax.vjp(lambda p: self._predict(merge(p, rest), inputs), part)

    def row(cotangent: jax.Array) -> jax.Array:
      g = jax.tree.map(jnp.multiply, self.scale, vjp(cotangent.reshape(outputs.shape))[0])
      return ravel_pytree(g)[0]

    covariance_of = self._covariance()
    n = outputs.shape[0]
    own = jnp.arange(math.prod(outputs.shape[1:]))  # the C outputs of an example

    def example(i: jax.Array) -> jax.Array:  # [C, C]
      rows = jax.vmap(row)(jax.nn.one_hot(i * len(own) + own, outputs.size, dtype=outputs.dtype))
      return covariance_of(rows)

    return Predictive(outputs, jax.lax.map(example, jnp.arange(n)))

  def outputs(self, key: jax.Array, inputs: PyTree, n: int, linearised: bool = True) -> jax.Array:
    """Draw the outputs n times, of the linearised network or of the network itself.

    The Gauss-Newton posterior belongs to the linearised network. At draws far from theta_hat, the
    network itself mostly predicts worse.

    Args:
      key: a random key; consumed.
      inputs: what `predict` takes, leaves [N, ...].
      n: the number of draws.
      linearised: False takes the network itself.

    Returns:
      [n, N, ...].

    Raises:
      TypeError, ValueError: an argument has the wrong type, or `n` is less than 1.

    >>> import jax.numpy as jnp
    >>> import shrinkmeta as sm
    >>> mean = sm.gaussian(lambda theta, x: x * theta["w"])
    >>> batch, prior = sm.Batch(jnp.ones(3), jnp.ones(3)), ({"w": 0.0}, {"w": 0.0})
    >>> found = sm.posterior(mean, {"w": "w"}, *prior, {"w": 0.75}, batch)
    >>> found.outputs(jax.random.key(0), jnp.ones(2), 5).shape
    (5, 2)
    """
    scalars.key("key", key, optional=False)
    check_inputs(inputs)
    n, linearised = validate.integer("n", n, least=1), scalars.flag("linearised", linearised)
    part, rest = self._cut()
    predict = lambda p: self._predict(merge(p, rest), inputs)
    deviations = self._deviations(key, n)
    if not linearised:
      return jax.vmap(lambda d: predict(jax.tree.map(jnp.add, part, d)))(deviations)
    f, jvp, _ = linearise(predict, part)
    return jax.vmap(lambda d: f + jvp(d))(deviations)

  def log_predictive(
    self, key: jax.Array, batch: Batch, n: int, linearised: bool = True
  ) -> jax.Array:
    """Return the log of the mean over n draws of p(y | f), for every example.

    Args:
      key: a random key; consumed.
      batch: examples, leaves [N, ...].
      n: the number of draws.
      linearised: as for `outputs`.

    Returns:
      [N] in nats; 0 for padding.

    Raises:
      TypeError, ValueError: an argument has the wrong type, or `n` is less than 1.

    >>> import jax.numpy as jnp
    >>> import shrinkmeta as sm
    >>> mean = sm.gaussian(lambda theta, x: x * theta["w"])
    >>> batch, prior = sm.Batch(jnp.ones(3), jnp.ones(3)), ({"w": 0.0}, {"w": 0.0})
    >>> found = sm.posterior(mean, {"w": "w"}, *prior, {"w": 0.75}, batch)
    >>> found.log_predictive(jax.random.key(0), batch, 5).shape
    (3,)
    """
    check_batch("batch", batch)
    f = self.outputs(key, batch.inputs, n, linearised)
    log_p = jax.vmap(lambda f: self.log_prob(*without_padding((f, batch.targets), batch)))(f)
    # log_p is NaN if a label is out of range. XLA can lose it: docs/hazards.md#logsumexp-nan.
    mean = jnp.where(
      jnp.isnan(log_p).any(0), jnp.nan, jax.scipy.special.logsumexp(log_p, 0) - jnp.log(n)
    )
    return without_padding(mean, batch)

  def _covariance(self) -> Callable[[jax.Array], jax.Array]:
    """Return a function from rows R [C, D] of J s to R K^-1 R^T [C, C], with K = I + s C s.

    Eigenvectors have no derivative where two eigenvalues agree, but K^-1 has one:

        d(K^-1 v) = K^-1 (dv - dK K^-1 v)

    `custom_linear_solve` applies this rule to derivatives of any order. A custom_jvp would lose its
    rule in the second derivative of `lax.map`.
    """
    k = self._times_k(self._network())
    basis, values = jax.lax.stop_gradient((self.basis, self.eigenvalues))

    def solve(_: Any, rows: jax.Array) -> jax.Array:  # R K^-1
      along, off = split(rows, basis)
      with exact():
        return off + (along / (1.0 + values)[None]) @ basis

    def covariance(rows: jax.Array) -> jax.Array:
      along, off = split(jax.lax.stop_gradient(rows), basis)
      w = jax.lax.custom_linear_solve(k, rows, solve, symmetric=True)
      with exact():
        value = off @ off.T + (along / (1.0 + values)[None]) @ along.T  # a sum of squares
        slope = 0.5 * (rows @ w.T + w @ rows.T)  # the same value, with derivatives
      return value + (slope - jax.lax.stop_gradient(slope))

    return covariance

  def _times_k(self, network: Likelihood) -> Callable[[jax.Array], jax.Array]:
    """Return the function from rows R [C, D] to R K [C, D], with K = I + s C s."""
    part, rest = self._cut()
    outputs_of = lambda p: network.predict(merge(p, rest), self.batch.inputs)
    loss_of = lambda f: -masked_log_prob(network, f, self.batch)
    _, unravel = ravel_pytree(part)

    def k(rows: jax.Array) -> jax.Array:
      product = curvature_product("gauss_newton", outputs_of, loss_of, part)
      scaled = lambda v: jax.tree.map(jnp.multiply, self.scale, v)
      curved = lambda v: scaled(product(scaled(v)))
      return jax.vmap(lambda v: v + ravel_pytree(curved(unravel(v)))[0])(rows)

    return k

  def _network(self) -> Likelihood:
    return with_constants(Likelihood(self.predict, self.log_prob), self.constants)

  def _predict(self, theta: PyTree, inputs: PyTree) -> jax.Array:
    return self._network().predict(theta, inputs)

  def _cut(self) -> tuple[PyTree, PyTree]:
    """Return theta in the task-specific modules, and theta in the frozen modules."""
    none = lambda x: x is None
    part = jax.tree.map(lambda s, t: None if s is None else t, self.scale, self.theta, is_leaf=none)
    rest = jax.tree.map(lambda s, t: t if s is None else None, self.scale, self.theta, is_leaf=none)
    return part, rest

  def _deviations(self, key: jax.Array, n: int) -> PyTree:
    """Draw s (z - z_hat) = s (I + s C s)^(-1/2) e n times, leaves [n, ...], with e ~ N(0, I)."""
    flat, unravel = ravel_pytree(self._cut()[0])
    noise = jax.random.normal(same_in_any_batch(key), (n, flat.size), flat.dtype)
    spread = jax.vmap(lambda v: jax.tree.map(jnp.multiply, self.scale, unravel(v)))
    if not self.exact or not any(isinstance(x, Tracer) for x in jax.tree.leaves(self)):
      # Without a traced value there is no derivative. That of Lanczos' rows goes through its steps.
      return spread(root_of(self.basis, self.eigenvalues, noise))
    consts, rebuild = open_likelihood(self._network(), self.theta, self.batch)
    k_of = lambda at: at[0]._times_k(rebuild(at[1]))
    none = jnp.zeros([])  # K depends on neither V nor lambda
    held = dataclasses.replace(self, basis=none, eigenvalues=none)
    z = inverse_root(k_of, (held, consts), self.basis, self.eigenvalues, noise)
    return spread(z)
