from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats

import shrinkmeta as sm

pytestmark = pytest.mark.usefixtures("x64")

LABELS = {"w": "body", "b": "head"}
LINEAR = sm.gaussian(lambda theta, x: x @ theta["w"] + theta["b"], scale=0.7)


def problem(num_tasks=3, rows=5):
  rng = np.random.default_rng(0)
  phi = {"w": jnp.array(rng.normal(size=2)), "b": jnp.array(rng.normal())}
  thetas = jax.tree.map(lambda p: p + jnp.array(rng.normal(size=(num_tasks, *p.shape))), phi)
  batches = sm.Batch(
    jnp.array(rng.normal(size=(num_tasks, rows, 2))), jnp.array(rng.normal(size=(num_tasks, rows)))
  )
  return phi, thetas, {"body": 0.4, "head": -1.3}, batches


def pick(tree, t):
  return jax.tree.map(lambda x: x[t], tree)


def scipy_prior(theta, phi, log_sigma2):
  return sum(
    np.sum(scipy.stats.norm.logpdf(theta[k], phi[k], np.exp(0.5 * log_sigma2[LABELS[k]])))
    for k in theta
  )


def test_log_prior():
  phi, thetas, log_sigma2, _ = problem()
  theta = pick(thetas, 0)
  want = scipy_prior(theta, phi, log_sigma2)
  np.testing.assert_allclose(sm.log_prior(theta, phi, log_sigma2, LABELS), want, rtol=1e-12)


def test_log_joint_and_predictive():
  phi, thetas, log_sigma2, batches = problem()
  mean = np.einsum("tni,ti->tn", batches.inputs, thetas["w"]) + np.asarray(thetas["b"])[:, None]
  data = np.sum(scipy.stats.norm.logpdf(batches.targets, mean, 0.7))
  np.testing.assert_allclose(sm.log_predictive(LINEAR, thetas, batches), data, rtol=1e-12)
  prior = sum(scipy_prior(pick(thetas, t), phi, log_sigma2) for t in range(3))
  joint = lambda *rest: sm.log_joint(LINEAR, LABELS, phi, thetas, log_sigma2, batches, *rest)
  np.testing.assert_allclose(joint(), prior + data, rtol=1e-12)
  on_phi = sum(np.sum(scipy.stats.norm.logpdf(p, 0.0, 2.0)) for p in phi.values())
  with_phi = joint(sm.priors.normal(2.0))
  np.testing.assert_allclose(with_phi, prior + data + on_phi, rtol=1e-12)


def test_padded_tasks_of_unequal_size():
  _, thetas, _, batches = problem()
  sizes = [5, 3, 1]
  mask = jnp.array([[n < size for n in range(5)] for size in sizes], jnp.float64)
  garbage = jnp.where(mask == 1, batches.targets, 1e6)
  padded = sm.log_predictive(LINEAR, thetas, sm.Batch(batches.inputs, garbage, mask))
  alone = sum(
    sm.log_likelihood(
      LINEAR, pick(thetas, t), sm.Batch(batches.inputs[t, :n], batches.targets[t, :n])
    )
    for t, n in enumerate(sizes)
  )
  np.testing.assert_allclose(padded, alone, rtol=1e-12)


def test_the_mask_keeps_padding_out_of_gradients_too():
  """exp overflows on padding; 0 times its derivative would be NaN."""
  poisson = sm.poisson(lambda theta, x: x * theta["w"])
  batch = sm.Batch(jnp.array([0.5, 1e4]), jnp.array([1, 0]), jnp.array([1.0, 0.0]))
  value, grad = jax.value_and_grad(lambda t: sm.log_likelihood(poisson, t, batch))(
    {"w": jnp.asarray(2.0)}
  )
  np.testing.assert_allclose(value, scipy.stats.poisson.logpmf(1, np.exp(1.0)), rtol=1e-12)
  np.testing.assert_allclose(grad["w"], 0.5 * (1 - np.exp(1.0)), rtol=1e-12)


def test_frozen_module():
  phi, thetas, log_sigma2, batches = problem()
  theta = {"w": phi["w"], "b": thetas["b"][0]}
  frozen = {**log_sigma2, "body": -jnp.inf}
  want = scipy.stats.norm.logpdf(theta["b"], phi["b"], np.exp(-0.65))
  prior = lambda *args: sm.log_prior(*args, LABELS)
  value, grads = jax.jit(jax.value_and_grad(prior, (0, 1, 2)))(theta, phi, frozen)
  np.testing.assert_allclose(value, want, rtol=1e-12)
  for grad in grads[:2]:
    np.testing.assert_array_equal(grad["w"], 0.0)
    assert np.isfinite(grad["b"]) and grad["b"] != 0
  assert grads[2]["body"] == 0.0 and grads[2]["head"] != 0
  elsewhere = sm.log_prior(pick(thetas, 0), phi, frozen, LABELS)
  assert elsewhere == -jnp.inf

  thetas = {**thetas, "w": jnp.broadcast_to(phi["w"], (3, 2))}
  joint = lambda p, t, s: sm.log_joint(LINEAR, LABELS, p, t, s, batches)
  value, grads = jax.jit(jax.value_and_grad(joint, (0, 1, 2)))(phi, thetas, frozen)
  assert all(jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves((value, grads)))
  likelihood = jax.jit(jax.grad(lambda t: sm.log_predictive(LINEAR, t, batches)))(thetas)
  np.testing.assert_allclose(grads[1]["w"], likelihood["w"], rtol=1e-12)  # no pull by the prior


def test_frozen_map_estimate_has_finite_gradients():
  phi, _, log_sigma2, batches = problem()
  batch = pick(batches, 0)
  frozen = {**log_sigma2, "body": -jnp.inf}

  inner = sm.Inner(optax.sgd(0.1), 20)  # finite for any z, at the mode or not

  def loss(phi, log_sigma2):
    theta, _ = sm.map_estimate(LINEAR, LABELS, phi, log_sigma2, batch, inner)
    return jnp.sum(theta["w"]) + theta["b"] ** 2

  @jax.jit
  def run(phi, frozen):
    theta, _ = sm.map_estimate(LINEAR, LABELS, phi, frozen, batch, inner)
    return theta, jax.grad(loss, (0, 1))(phi, frozen)

  theta, grads = run(phi, frozen)
  np.testing.assert_array_equal(theta["w"], phi["w"])
  assert all(jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(grads))
  assert grads[1]["body"] == 0.0 and grads[1]["head"] != 0.0


def test_trees_that_do_not_match():
  phi, thetas, log_sigma2, batches = problem()
  theta = pick(thetas, 0)
  with pytest.raises(ValueError, match=r"theta and phi.*'b' is in phi and not in theta"):
    sm.log_prior({"w": theta["w"]}, phi, log_sigma2, LABELS)
  with pytest.raises(ValueError, match=r"theta/w has shape \(3,\), phi/w has \(2,\)"):
    sm.log_prior({**theta, "w": jnp.ones([3])}, phi, log_sigma2, LABELS)
  with pytest.raises(ValueError, match=r"theta/w is float32, phi/w is float64"):
    sm.log_prior({**theta, "w": jnp.ones([2], jnp.float32)}, phi, log_sigma2, LABELS)
  with pytest.raises(ValueError, match=r"thetas/b has shape \(\), phi/b has \(\).*axis T"):
    sm.log_joint(LINEAR, LABELS, phi, theta, log_sigma2, batches)
  with pytest.raises(ValueError, match=r"no entry for module 'head' \(parameter 'b'\)"):
    sm.log_prior(theta, phi, {"body": 0.0}, LABELS)


def test_no_prior_adds_nothing():
  theta, phi = (
    {"a": jnp.array([1.0, 2.0]), "b": jnp.array(3.0)},
    {"a": jnp.zeros(2), "b": jnp.array(0.0)},
  )
  labels = {"a": "a", "b": "b"}
  value = lambda phi, s: sm.log_prior(theta, phi, {"a": s, "b": 0.3}, labels)
  alone = sm.log_prior({"b": theta["b"]}, {"b": phi["b"]}, {"b": 0.3}, {"b": "b"})
  np.testing.assert_allclose(value(phi, jnp.inf), alone, rtol=1e-6)
  of_phi, of_sigma = jax.grad(value, argnums=(0, 1))(phi, jnp.inf)
  assert not of_phi["a"].any() and of_sigma == 0.0


def test_a_tiny_sigma_has_a_density():
  w = {"w": jnp.ones(2, jnp.float32)}
  for log_sigma2 in (-150.0, -180.0):  # at -180 the precision overflows
    at_phi = lambda v: sm.log_prior(w, w, {"w": v}, {"w": "w"})
    value, slope = jax.value_and_grad(at_phi)(log_sigma2)
    np.testing.assert_allclose(value, -log_sigma2 - np.log(2 * np.pi), rtol=1e-6)
    np.testing.assert_allclose(slope, -1.0, rtol=1e-6)
  away = sm.log_prior({"w": 1.0 + w["w"]}, w, {"w": -180.0}, {"w": "w"})
  assert away == -np.inf


@pytest.mark.usefixtures("x64")
def test_a_prior_on_phi_keeps_float32():
  assert sm.priors.normal(1.0)({"w": jnp.ones(2, jnp.float32)}).dtype == jnp.float32


ANY: Any = sm  # for arguments of wrong types


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"likelihood": lambda theta, x: x}, r"likelihood must be a shrinkmeta.Likelihood"),
    ({"labels": "phi"}, r"labels must have the structure of the parameters; got the string 'phi'"),
    ({"labels": {"w": jnp.zeros(2), "b": 0.0}}, r"labels/b must be a string, .*; got 0.0"),
    ({"phi": None}, r"phi must be a pytree of arrays, .*; got None"),
    ({"thetas": "phi"}, r"thetas must be a pytree of arrays, .*; got 'phi'"),
    (
      {"log_sigma2": jnp.zeros(2)},
      r"log_sigma2 must be a dict {module: scalar}; got an array float",
    ),
    ({"log_sigma2": [0.0, 0.0]}, r"log_sigma2 must be a dict {module: scalar}; got a list of 2"),
    ({"batches": [1, 2]}, r"batches must be a shrinkmeta.Batch.*; got a list of 2 items"),
    ({"log_p_phi": 1.0}, r"log_p_phi must be a function, phi -> log p\(phi\) \[\]; got 1.0"),
  ],
)
def test_arguments_of_wrong_types(change, message):
  phi, thetas, log_sigma2, batches = problem()
  arguments = {
    "likelihood": LINEAR,
    "labels": LABELS,
    "phi": phi,
    "thetas": thetas,
    "log_sigma2": log_sigma2,
    "batches": batches,
  }
  with pytest.raises(TypeError, match=message):
    ANY.log_joint(**{**arguments, **change})


def test_parameters_of_another_number_of_tasks():
  _, thetas, _, batches = problem()
  with pytest.raises(ValueError, match=r"thetas/b must lead with the axis of the 3 tasks.* \(2,\)"):
    sm.log_predictive(LINEAR, pick(thetas, slice(2)), batches)


def test_integer_parameters_keep_the_variance_whole():
  log_sigma2, labels = {"m": 0.9}, {"w": "m"}
  got = sm.log_prior({"w": 1}, {"w": 0}, log_sigma2, labels)
  np.testing.assert_allclose(got, scipy.stats.norm.logpdf(1, 0, np.exp(0.45)), rtol=1e-12)
  assert sm.log_prior({"w": 1}, {"w": 1}, {"m": -jnp.inf}, labels) == 0
