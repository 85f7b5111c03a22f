from typing import Any

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


@pytest.mark.parametrize("name", [name for name in PRIORS if name != "flat"])
def test_a_sigma_that_is_no_number_is_no_frozen_module(name):
  assert np.isnan(PRIORS[name][0]({"a": jnp.nan, "b": 0.0}))


@pytest.mark.parametrize("name", PRIORS)
def test_frozen_modules_add_nothing(name):
  log_p, want = PRIORS[name]
  log_sigma2 = {"a": jnp.asarray(-jnp.inf), "b": jnp.asarray(2 * np.log(0.5))}
  value, grad = jax.value_and_grad(log_p)(log_sigma2)
  np.testing.assert_allclose(value, want(np.array(0.5)), rtol=1e-10)
  assert grad["a"] == 0.0 and np.isfinite(grad["b"])
  assert (grad["b"] == 0.0) == (name == "flat")


ANY: Any = priors  # for arguments of wrong types


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda: ANY.half_cauchy("wide"), r"scale must be a positive number; got 'wide'"),
    (lambda: ANY.log_normal(1.0, [1.0]), r"spread must be a positive number; got a list of 1"),
    (lambda: ANY.normal(None), r"scale must be a positive number; got None"),
    (lambda: ANY.normal(1.0, "zero"), r"centre must be a pytree of arrays.*got 'zero'"),
    (lambda: ANY.normal(1.0)(None), r"phi must be a pytree of arrays.*got None"),
    (lambda: ANY.flat()(jnp.zeros(3)), r"log_sigma2 must be a dict .*; got an array float64\[3\]"),
    (lambda: ANY.flat()({"a": "b"}), r"log_sigma2\['a'\] must be a number; got 'b'"),
  ],
)
def test_what_is_no_prior(call, message):
  with pytest.raises(TypeError, match=message):
    call()


def test_a_centre_of_another_structure():
  with pytest.raises(
    ValueError, match="must have the same structure: 'w' is in phi and not in the centre"
  ):
    priors.normal(1.0, jnp.zeros(2))({"w": jnp.zeros(2)})


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
    lambda: priors.normal(np.ones(2)),
    lambda: priors.half_cauchy(float("inf")),
  ],
)
def test_scales_are_positive(make):
  with pytest.raises(ValueError, match=r"(scale|spread) must be positive, one finite number"):
    make()


def test_a_centre_of_another_shape():
  prior = priors.normal(1.0, {"w": jnp.ones(3)})
  with pytest.raises(ValueError, match="phi/w"):
    prior({"w": jnp.zeros((3, 1))})
  whole = priors.normal(1.0, {"w": np.array([1, 2])})({"w": jnp.zeros(2)})  # of another dtype
  np.testing.assert_allclose(whole, scipy.stats.norm.logpdf([1, 2]).sum(), rtol=1e-12)
