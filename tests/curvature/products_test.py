"""Curvature products against dense matrices, for all four likelihoods."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import shrinkmeta as sm
from tests.task_models import model_of

pytestmark = pytest.mark.usefixtures("x64")

N, IN, HIDDEN, OUT = 7, 3, 5, 4


def predict(params, x):
  h = jnp.tanh(x @ params["body"]["kernel"] + params["body"]["bias"])
  return h @ params["head"]["kernel"] + params["head"]["bias"]


def mask(which):
  return {
    "none": None,
    "padded": jnp.array([1.0, 1.0, 0.0, 1.0, 1.0, 0.0, 1.0]),
    "weights": jnp.array([1.0, 0.25, 0.0, 2.0, 1.0, 0.5, 1.0]),
  }[which]


def problem(name, which="none", seed=0):
  """(likelihood, theta, batch, Lambda(f) [C, C] of one example, worked out by hand)."""
  rng = np.random.default_rng(seed)
  array = lambda *shape: jnp.asarray(rng.normal(size=shape))
  theta = {
    "body": {"kernel": array(IN, HIDDEN), "bias": array(HIDDEN)},
    "head": {"kernel": array(HIDDEN, OUT), "bias": array(OUT)},
  }
  inputs = array(N, IN)
  if name == "gaussian":
    scale = jnp.array([0.3, 1.0, 2.0, 0.7])
    likelihood, targets = sm.gaussian(predict, scale), array(N, OUT)
    lam = lambda f: jnp.diag(scale**-2)
  elif name == "categorical":
    likelihood, targets = sm.categorical(predict), jnp.asarray(rng.integers(OUT, size=N))
    lam = lambda f: jnp.diag(jax.nn.softmax(f)) - jnp.outer(jax.nn.softmax(f), jax.nn.softmax(f))
  elif name == "bernoulli":
    likelihood, targets = sm.bernoulli(predict), jnp.asarray(rng.integers(2, size=(N, OUT)))
    lam = lambda f: jnp.diag(jax.nn.sigmoid(f) * jax.nn.sigmoid(-f))
  else:
    assert name == "poisson", name
    likelihood, targets = sm.poisson(predict), jnp.asarray(rng.poisson(2.0, size=(N, OUT)))
    lam = lambda f: jnp.diag(jnp.exp(f))
  return likelihood, theta, sm.Batch(inputs, targets, mask(which)), lam


def dense_gauss_newton(theta, batch, lam):
  flat, unravel = ravel_pytree(theta)
  outputs = predict(theta, batch.inputs)
  jacobian = jax.jacrev(lambda v: predict(unravel(v), batch.inputs))(flat)  # [N, C, D]
  weights = jnp.ones(N) if batch.mask is None else batch.mask
  return sum(weights[n] * jacobian[n].T @ lam(outputs[n]) @ jacobian[n] for n in range(N))


def dense_hessian(likelihood, theta, batch):
  flat, unravel = ravel_pytree(theta)
  weights = jnp.ones(N) if batch.mask is None else batch.mask
  loss = lambda v: -weights @ likelihood.log_prob(predict(unravel(v), batch.inputs), batch.targets)
  return jax.hessian(loss)(flat)


def dense(product, theta):
  """The matrix of a product, column by column."""
  flat, unravel = ravel_pytree(theta)
  columns = jax.jit(jax.vmap(lambda v: ravel_pytree(product(unravel(v)))[0]))
  return columns(jnp.eye(flat.size)).T


LIKELIHOODS = ("gaussian", "categorical", "bernoulli", "poisson")
MASKS = ("none", "padded", "weights")


@pytest.mark.parametrize("which", MASKS)
@pytest.mark.parametrize("name", LIKELIHOODS)
def test_gauss_newton_is_the_dense_matrix(name, which):
  likelihood, theta, batch, lam = problem(name, which)
  want = dense_gauss_newton(theta, batch, lam)
  got = dense(model_of(likelihood, theta, batch).product("gauss_newton"), theta)
  np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-12 * float(jnp.abs(want).max()))
  eigenvalues = np.linalg.eigvalsh(got)
  assert eigenvalues.min() > -1e-10 * eigenvalues.max()


@pytest.mark.parametrize("which", MASKS)
@pytest.mark.parametrize("name", LIKELIHOODS)
def test_hessian_is_the_dense_matrix(name, which):
  likelihood, theta, batch, lam = problem(name, which)
  want = dense_hessian(likelihood, theta, batch)
  got = dense(model_of(likelihood, theta, batch).product("hessian"), theta)
  np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-12 * float(jnp.abs(want).max()))
  # Away from the optimum the two curvatures are different, and this one indefinite.
  assert np.linalg.eigvalsh(got).min() < 0
  assert np.abs(got - dense_gauss_newton(theta, batch, lam)).max() > 0.1


@pytest.mark.parametrize("which", MASKS)
@pytest.mark.parametrize("name", LIKELIHOODS)
def test_the_whitened_factor_is_a_root_of_the_gauss_newton_matrix(name, which):
  likelihood, theta, batch, lam = problem(name, which)
  scale = {
    "body": {"kernel": jnp.asarray(0.3), "bias": jnp.asarray(2.0)},
    "head": {"kernel": jnp.asarray(1e-3), "bias": jnp.asarray(0.0)},
  }
  factor = model_of(likelihood, theta, batch, scale).factor()
  full = jax.tree.map(lambda s, x: jnp.full_like(x, s), scale, theta)
  s = ravel_pytree(full)[0]
  want = s[:, None] * dense_gauss_newton(theta, batch, lam) * s
  atol = 1e-12 * float(jnp.abs(want).max())
  np.testing.assert_allclose(factor.a.T @ factor.a, want, rtol=1e-7, atol=atol)
  assert not bool(factor.negative)


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_what_lies_in_the_padding_does_not_matter(name):
  likelihood, theta, batch, _ = problem(name, "padded")
  kept = jnp.flatnonzero(batch.mask)
  short = sm.Batch(batch.inputs[kept], batch.targets[kept])
  moved = batch._replace(inputs=batch.inputs.at[2].set(50.0))
  for kind in ("gauss_newton", "hessian"):
    want = dense(model_of(likelihood, theta, short).product(kind), theta)
    for padded in (batch, moved):
      got = dense(model_of(likelihood, theta, padded).product(kind), theta)
      np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-12 * float(jnp.abs(want).max()))


def test_the_whitened_factor_says_when_log_prob_is_not_concave():
  _, theta, batch, _ = problem("gaussian")
  convex = sm.Likelihood(predict, lambda f, y: 0.5 * jnp.sum(jnp.square(f - y), -1))
  one = jax.tree.map(lambda x: jnp.ones([]), theta)
  factor = model_of(convex, theta, batch, one).factor()
  assert bool(factor.negative)
  np.testing.assert_array_equal(factor.a, 0.0)


def test_outputs_with_more_axes():
  """Outputs [N, 2, 2]: the trailing axes count as C."""
  _, theta, batch, lam = problem("gaussian", "padded")
  scale = jnp.array([[0.3, 1.0], [2.0, 0.7]])
  square = lambda t, x: predict(t, x).reshape(-1, 2, 2)
  likelihood = sm.gaussian(square, scale)
  batch = batch._replace(targets=batch.targets.reshape(N, 2, 2))
  want = dense_gauss_newton(theta, batch, lam)
  product = model_of(likelihood, theta, batch).product("gauss_newton")
  np.testing.assert_allclose(dense(product, theta), want, rtol=1e-9, atol=1e-10)
  one = jax.tree.map(lambda x: jnp.ones([]), theta)
  a = model_of(likelihood, theta, batch, one).factor().a
  np.testing.assert_allclose(a.T @ a, want, rtol=1e-7, atol=1e-10)
