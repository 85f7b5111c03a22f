"""Lanczos agrees with dense eigenvalues, also if the Krylov space is exhausted."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shrinkmeta.curvature.lanczos import lanczos

pytestmark = pytest.mark.usefixtures("x64")


def matrix(rng, eigenvalues):
  q = np.linalg.qr(rng.normal(size=(len(eigenvalues),) * 2))[0]
  return jnp.asarray(q * eigenvalues @ q.T)


@functools.partial(jax.jit, static_argnums=2)
def program(k, start, steps):
  found = lanczos(lambda v: k @ v, start, steps)
  return found, found.eigh()


def run(k, start, steps):
  """What Lanczos finds, and the eigenvalues and eigenvectors of its T, in NumPy's arrays."""
  return jax.tree.map(np.asarray, program(k, start, steps))


def test_the_basis_is_orthonormal_and_tridiagonalises():
  rng = np.random.default_rng(0)
  k = matrix(rng, np.geomspace(1.0, 1e6, 60))
  found = run(k, jnp.asarray(rng.normal(size=60)), 40)[0]
  np.testing.assert_allclose(found.basis @ found.basis.T, np.eye(40), atol=1e-12)
  want = np.diag(found.alpha) + np.diag(found.beta, 1) + np.diag(found.beta, -1)
  np.testing.assert_allclose(found.basis @ k @ found.basis.T, want, atol=1e-8)


def test_all_steps_give_all_eigenvalues():
  rng = np.random.default_rng(1)
  values = np.geomspace(1.0, 50.0, 12)
  k = matrix(rng, values)
  found, eigen = run(k, jnp.asarray(rng.normal(size=12)), 100)
  assert found.alpha.shape == (12,)
  np.testing.assert_allclose(eigen[0], values, rtol=1e-10)


@pytest.mark.parametrize("rank", (0, 1, 5))
def test_a_small_krylov_space_is_exhausted_and_still_exact(rank):
  rng = np.random.default_rng(2)
  k = matrix(rng, np.concatenate([np.ones(30 - rank), np.linspace(3.0, 9.0, rank)]))
  v = jnp.asarray(rng.normal(size=30))
  values, vectors = run(k, v, 20)[1]
  got = float(v @ v) * np.sum(vectors[0] ** 2 * np.log(values))
  dense_values, dense = np.linalg.eigh(k)
  want = np.sum((dense.T @ v) ** 2 * np.log(np.maximum(dense_values, 1.0)))
  np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-9)


def test_a_zero_start_is_no_number_and_no_error():
  found, eigen = run(2.0 * jnp.eye(5), jnp.zeros(5), 3)
  np.testing.assert_array_equal(found.basis, np.zeros((3, 5)))
  np.testing.assert_array_equal(eigen[0], np.ones(3))


@pytest.mark.parametrize("values", (np.full(12, 5.0), np.repeat([1.0, 4.0, 9.0], 4), np.zeros(12)))
def test_all_directions_of_repeated_eigenvalues_are_found(values):
  rng = np.random.default_rng(3)
  k = matrix(rng, values)
  found, eigen = run(k, jnp.asarray(rng.normal(size=12)), 12)
  np.testing.assert_allclose(found.basis @ found.basis.T, np.eye(12), atol=1e-12)
  np.testing.assert_allclose(eigen[0], values, atol=1e-12)
  t = np.diag(found.alpha) + np.diag(found.beta, 1) + np.diag(found.beta, -1)
  np.testing.assert_allclose(found.basis.T @ t @ found.basis, k, atol=1e-12)


def test_a_direction_that_repeats_leaves_the_solution_of_the_start_exact():
  """K^-1 v by the first row of T's eigenvectors, where both blocks of T share an eigenvalue."""
  rng = np.random.default_rng(4)
  k = matrix(rng, np.repeat([2.0, 7.0], 5))
  v = jnp.asarray(rng.normal(size=10))
  found, (values, vectors) = run(k, v, 6)
  got = np.linalg.norm(v) * (vectors @ (vectors[0] / values)) @ found.basis
  np.testing.assert_allclose(got, np.linalg.solve(k, v), rtol=1e-10)
