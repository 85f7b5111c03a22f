"""Gradients of compiled functions: a rule must not close over values of an ended trace."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import shrinkmeta as sm

INNER = sm.Inner(sm.lbfgs(), steps=40, tol=1e-9)
EXACT = sm.Implicit(max_steps=50, tol=1e-13)
LABELS = {"w": "w"}


def _predict(theta, x, constants):
  return jnp.tanh(x @ constants["base"]) @ theta["w"]


def _problem():
  rng = np.random.default_rng(0)
  constants = {"base": jnp.asarray(rng.normal(size=(3, 4))), "table": jnp.arange(3)}
  batches = sm.Batch(jnp.asarray(rng.normal(size=(3, 8, 3))), jnp.asarray(rng.normal(size=(3, 8))))
  return constants, batches, jnp.asarray(rng.normal(size=4))


def _function(name, steps=None):
  """Return phi -> a number, from the function `name` with constants."""
  constants, batches, _ = _problem()
  one = jax.tree.map(lambda x: x[0], batches)
  likelihood = sm.gaussian(_predict)
  batching = 2 if name == "blocks" else "auto"
  learner = sm.sigma_imaml(likelihood, LABELS, inner=INNER, implicit=EXACT, batching=batching)
  state = learner.init({"w": jnp.zeros(4)}, constants=constants)
  given = {"labels": LABELS, "log_sigma2": {"w": 0.0}, "batch": one, "inner": INNER}

  def f(w):
    now = state._replace(phi={"w": w})
    if name == "log_evidence":
      return sm.log_evidence(likelihood, phi={"w": w}, constants=constants, **given)[0]
    if name == "map_estimate":
      theta, _ = sm.map_estimate(
        likelihood, phi={"w": w}, constants=constants, steps=steps, **given
      )
    elif name == "adapt":
      theta, _ = learner.adapt(now, one, steps)
    else:
      theta, _ = learner.adapt_tasks(now, batches, steps)
    return jnp.sum(jnp.sin(theta["w"]))

  return f


@pytest.mark.parametrize(
  ("name", "compiled"),
  (
    ("adapt", jax.checkpoint),
    ("adapt_tasks", jax.jit),
    ("blocks", jax.jit),
    ("map_estimate", jax.jit),
    ("log_evidence", jax.jit),
  ),
)
def test_the_gradient_of_a_compiled_function_with_constants(x64, name, compiled):
  f, phi = _function(name), _problem()[2]
  grad = jax.grad(compiled(f))(phi)
  chex.assert_trees_all_close(grad, jax.jit(jax.grad(f))(phi), rtol=1e-9)
  direction, step = jnp.asarray([0.3, -0.5, 0.2, 0.7]), 1e-5
  rise = (f(phi + step * direction) - f(phi - step * direction)) / (2 * step)
  chex.assert_trees_all_close(grad @ direction, rise, rtol=1e-5)


@pytest.mark.parametrize("name", ("adapt", "blocks"))
def test_the_gradient_with_a_traced_number_of_steps(x64, name):
  phi = _problem()[2]
  steps_traced = jax.jit(lambda phi, steps: _function(name, steps)(phi))
  got = jax.grad(steps_traced)(phi, jnp.asarray(40))
  chex.assert_trees_all_close(got, jax.grad(_function(name))(phi), rtol=1e-6)


def test_the_gradient_with_traced_values_in_the_likelihood(x64):
  """A float has a derivative, an integer and a key have none; constants have none either."""
  constants, batches, phi = _problem()
  one = jax.tree.map(lambda x: x[0], batches)

  def value(scale, phi, constants, order, key):
    noise = jax.random.normal(key, ())

    def predict(theta, x, constants):
      shift = jax.random.normal(key, ())  # the same number as `noise`
      return (_predict(theta, x, constants) + shift - noise) * order

    likelihood = sm.gaussian(predict, scale)
    run = functools.partial(sm.map_estimate, likelihood, LABELS, {"w": phi}, {"w": 0.0}, one, INNER)
    evidence = sm.log_evidence(
      likelihood, LABELS, {"w": phi}, {"w": 0.0}, one, INNER, constants=constants
    )[0]
    return evidence + jnp.sum(jnp.sin(run(constants=constants)[0]["w"]))

  arguments = (jnp.asarray(0.7), phi, constants, jnp.asarray(2), jax.random.key(0))
  grads = jax.grad(jax.jit(value), (0, 1, 2), allow_int=True)(*arguments)
  assert not np.any(grads[2]["base"])
  rise = lambda f, x, d, h=1e-5: (f(x + h * d) - f(x - h * d)) / (2 * h)
  of_scale = rise(lambda scale: value(scale, *arguments[1:]), arguments[0], 1.0)
  of_phi = rise(lambda phi: value(arguments[0], phi, *arguments[2:]), phi, jnp.ones(4))
  chex.assert_trees_all_close(grads[0], of_scale, rtol=1e-5)
  chex.assert_trees_all_close(jnp.sum(grads[1]), of_phi, rtol=1e-5)
