"""Curvature products agree with dense matrices, for all four likelihoods."""

import functools

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
  weights = jnp.ones(len(batch.targets)) if batch.mask is None else batch.mask
  curvature = weights[:, None, None] * jax.vmap(lam)(outputs)
  return jnp.einsum("nci,ncd,ndj->ij", jacobian, curvature, jacobian)


def dense_hessian(likelihood, theta, batch):
  flat, unravel = ravel_pytree(theta)
  weights = jnp.ones(len(batch.targets)) if batch.mask is None else batch.mask
  loss = lambda v: -weights @ likelihood.log_prob(predict(unravel(v), batch.inputs), batch.targets)
  return jax.hessian(loss)(flat)


def dense(product, theta):
  """The matrix of a product, column by column."""
  flat, unravel = ravel_pytree(theta)
  return jax.vmap(lambda v: ravel_pytree(product(unravel(v)))[0])(jnp.eye(flat.size)).T


LIKELIHOODS = ("gaussian", "categorical", "bernoulli", "poisson")
MASKS = ("none", "padded", "weights")
SCALE = {
  "body": {"kernel": np.array(0.3), "bias": np.array(2.0)},
  "head": {"kernel": np.array(1e-3), "bias": np.array(0.0)},
}


@functools.cache
def matrices(name):
  """One program for all masks: batch -> products, factor and dense matrices of a likelihood."""
  likelihood, theta, _, lam = problem(name)

  @jax.jit
  def run(batch):
    model = model_of(likelihood, theta, batch)
    return {
      "gauss_newton": dense(model.product("gauss_newton"), theta),
      "hessian": dense(model.product("hessian"), theta),
      "factor": model_of(likelihood, theta, batch, SCALE).factor(),
      "dense_gauss_newton": dense_gauss_newton(theta, batch, lam),
      "dense_hessian": dense_hessian(likelihood, theta, batch),
    }

  def of(batch):
    batch = batch if batch.mask is not None else batch._replace(mask=jnp.ones(len(batch.targets)))
    return jax.tree.map(np.asarray, run(batch))

  return of


def close(got, want, rtol=1e-9):
  np.testing.assert_allclose(got, want, rtol=rtol, atol=1e-12 * np.abs(want).max())


@pytest.mark.parametrize("which", MASKS)
@pytest.mark.parametrize("name", LIKELIHOODS)
def test_gauss_newton_is_the_dense_matrix(name, which):
  found = matrices(name)(problem(name, which)[2])
  close(found["gauss_newton"], found["dense_gauss_newton"])
  eigenvalues = np.linalg.eigvalsh(found["gauss_newton"])
  assert eigenvalues.min() > -1e-10 * eigenvalues.max()


@pytest.mark.parametrize("which", MASKS)
@pytest.mark.parametrize("name", LIKELIHOODS)
def test_hessian_is_the_dense_matrix(name, which):
  found = matrices(name)(problem(name, which)[2])
  close(found["hessian"], found["dense_hessian"])
  # Away from the optimum the two curvatures are different, and this one indefinite.
  assert np.linalg.eigvalsh(found["hessian"]).min() < 0
  assert np.abs(found["hessian"] - found["dense_gauss_newton"]).max() > 0.1


@pytest.mark.parametrize("which", MASKS)
@pytest.mark.parametrize("name", LIKELIHOODS)
def test_the_whitened_factor_is_a_root_of_the_gauss_newton_matrix(name, which):
  _, theta, batch, _ = problem(name, which)
  found = matrices(name)(batch)
  factor = found["factor"]
  full = jax.tree.map(lambda s, x: np.full(x.shape, s), SCALE, theta)
  s = np.asarray(ravel_pytree(full)[0])
  close(factor.a.T @ factor.a, s[:, None] * found["dense_gauss_newton"] * s, rtol=1e-7)
  assert not factor.negative


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_no_mask_is_a_mask_of_ones(name):
  likelihood, theta, batch, _ = problem(name)
  ones = matrices(name)(batch)
  model = model_of(likelihood, theta, batch)
  rows = jax.jit(lambda: (dense(model.product("gauss_newton"), theta), model.factor().a))
  product, factor = rows()
  close(product, ones["gauss_newton"])
  close(factor.T @ factor, ones["gauss_newton"], rtol=1e-7)


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_what_lies_in_the_padding_does_not_matter(name):
  likelihood, theta, batch, lam = problem(name, "padded")
  kept = np.flatnonzero(batch.mask)
  short = sm.Batch(batch.inputs[kept], batch.targets[kept])

  @jax.jit
  def want():
    weights = jnp.ones(len(kept))
    return (
      dense_gauss_newton(theta, short._replace(mask=weights), lam),
      dense_hessian(likelihood, theta, short._replace(mask=weights)),
    )

  moved = batch._replace(inputs=batch.inputs.at[2].set(50.0))
  for padded in (batch, moved):
    found = matrices(name)(padded)
    for kind, matrix in zip(("gauss_newton", "hessian"), want(), strict=True):
      close(found[kind], np.asarray(matrix))


def test_the_whitened_factor_says_when_log_prob_is_not_concave():
  _, theta, batch, _ = problem("gaussian")
  convex = sm.Likelihood(predict, lambda f, y: 0.5 * jnp.sum(jnp.square(f - y), -1))
  one = jax.tree.map(lambda x: jnp.ones([]), theta)
  factor = jax.jit(lambda: model_of(convex, theta, batch, one).factor())()
  assert bool(factor.negative)
  np.testing.assert_array_equal(factor.a, 0.0)


def test_outputs_with_more_axes():
  """Outputs [N, 2, 2]: the trailing axes count as C."""
  _, theta, batch, lam = problem("gaussian", "padded")
  scale = jnp.array([[0.3, 1.0], [2.0, 0.7]])
  square = lambda t, x: predict(t, x).reshape(-1, 2, 2)
  likelihood = sm.gaussian(square, scale)
  batch = batch._replace(targets=batch.targets.reshape(N, 2, 2))
  one = jax.tree.map(lambda x: jnp.ones([]), theta)

  @jax.jit
  def run():
    product = dense(model_of(likelihood, theta, batch).product("gauss_newton"), theta)
    factor = model_of(likelihood, theta, batch, one).factor().a
    return product, factor.T @ factor, dense_gauss_newton(theta, batch, lam)

  product, square, want = run()
  np.testing.assert_allclose(product, want, rtol=1e-9, atol=1e-10)
  np.testing.assert_allclose(square, want, rtol=1e-7, atol=1e-10)
