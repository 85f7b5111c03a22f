import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from shrinkmeta.model import priors

pytestmark = pytest.mark.usefixtures("x64")

PRIORS = {
  "flat": (priors.flat(), lambda s: np.zeros_like(s)),
  "log_normal": (
    priors.log_normal(0.2, 1.5),
    lambda s: scipy.stats.lognorm.logpdf(s, 1.5, scale=0.2),
  ),
  "half_cauchy": (
    priors.half_cauchy(0.3),
    lambda s: scipy.stats.halfcauchy.logpdf(s, scale=0.3),
  ),
  "exponential": (
    priors.exponential(0.3),
    lambda s: scipy.stats.expon.logpdf(s, scale=0.3),
  ),
}


@pytest.mark.parametrize("name", PRIORS)
def test_against_scipy(name):
  log_p, want = PRIORS[name]
  sigma = np.array([1e-4, 0.3, 1.0, 50.0])
  log_sigma2 = {str(i): jnp.asarray(2 * np.log(s)) for i, s in enumerate(sigma)}
  np.testing.assert_allclose(log_p(log_sigma2), want(sigma).sum(), rtol=1e-10)


@pytest.mark.parametrize("name", PRIORS)
def test_frozen_modules_add_nothing(name):
  log_p, want = PRIORS[name]
  log_sigma2 = {"a": jnp.asarray(-jnp.inf), "b": jnp.asarray(2 * np.log(0.5))}
  value, grad = jax.value_and_grad(log_p)(log_sigma2)
  np.testing.assert_allclose(value, want(np.array(0.5)), rtol=1e-10)
  assert grad["a"] == 0.0 and np.isfinite(grad["b"])
  assert (grad["b"] == 0.0) == (name == "flat")


def test_normal_prior_on_phi():
  phi = {"w": jnp.array([1.0, -2.0]), "b": jnp.array(0.5)}
  centre = {"w": jnp.array([1.0, 1.0]), "b": jnp.array(0.0)}
  got = priors.normal(2.0, centre)(phi)
  want = scipy.stats.norm.logpdf([0.0, -3.0, 0.5], scale=2.0).sum()
  np.testing.assert_allclose(got, want, rtol=1e-12)
  want = scipy.stats.norm.logpdf([1.0, -2.0, 0.5], scale=2.0).sum()
  np.testing.assert_allclose(priors.normal(2.0)(phi), want, rtol=1e-12)


@pytest.mark.parametrize(
  "make",
  [
    lambda: priors.half_cauchy(0.0),
    lambda: priors.exponential(-1.0),
    lambda: priors.log_normal(1.0, 0.0),
    lambda: priors.normal(float("nan")),
  ],
)
def test_scales_are_positive(make):
  with pytest.raises(ValueError, match=r"(scale|spread) must be positive; got"):
    make()
