"""L-BFGS always ends, and it finds the mode."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import shrinkmeta as sm

MEAN = {"level": 3.0, "slope": 1.0, "curve": -0.4}


def curve(theta, x):
  return theta["level"] + theta["slope"] * x + theta["curve"] * x**2


def line_tasks():
  """A hundred tasks of five examples around a parabola."""
  keys = jax.random.split(jax.random.key(0), 5)
  spread = {"level": 1.0, "slope": 0.3, "curve": 0.0}
  theta = {
    name: MEAN[name] + spread[name] * jax.random.normal(key, (100, 1))
    for name, key in zip(MEAN, keys, strict=False)
  }
  x = jax.random.uniform(keys[3], (100, 10), minval=-2.0, maxval=2.0)
  y = curve(theta, x) + 0.5 * jax.random.normal(keys[4], x.shape)
  return sm.Batch(x[:, :5], y[:, :5])


def test_every_task_ends_in_single_precision(optimising_jit):
  """With XLA's optimisations, at a point where another line search once went on for ever."""
  params = dict.fromkeys(MEAN, jnp.zeros([]))
  learner = sm.sigma_imaml(sm.gaussian(curve, 0.5), sm.by_leaf(params))
  state = learner.init(params)._replace(
    phi={"level": jnp.float32(0.5968983), "slope": jnp.float32(0.58936346),
         "curve": jnp.float32(-0.57582605)},
    log_sigma2={"level": jnp.float32(-2.208762), "slope": jnp.float32(-2.2421505),
                "curve": jnp.float32(-2.6034482)},
  )  # fmt: skip
  _, info = optimising_jit(jax.vmap(learner.adapt, (None, 0)))(state, line_tasks())
  assert info.converged.all() and info.steps.max() <= 20
  assert info.grad_norm.max() <= 1e-4


@pytest.mark.parametrize("shift", (0.0, -1e4, 1e4), ids=("", "negative", "positive"))
def test_minimum_of_a_badly_scaled_quadratic(x64, shift):
  """The objective's size hides the last digits of a step's gain, and not those of the gradient."""
  scales, centre = jnp.logspace(0, 4, 6), jnp.arange(6.0)
  loss = lambda z: jnp.sum(scales * jnp.square(z - centre)) / 2 + shift
  z, norm = jax.jit(lambda z: solved(loss, z, 60))(jnp.zeros(6))
  np.testing.assert_allclose(z, centre, atol=1e-6)
  assert norm < 1e-4


def test_negative_curvature_does_not_stop_it(x64):
  """From beside a maximum of a double well: pairs of steps there have negative curvature."""
  loss = lambda z: jnp.sum(jnp.square(jnp.square(z) - 1))
  z, norm = jax.jit(lambda z: solved(loss, z, 40))(jnp.array([0.05, -0.02, 0.4]))
  np.testing.assert_allclose(jnp.abs(z), 1, atol=1e-8)
  assert norm < 1e-7


def rosenbrock(tree):
  x, y = tree["x"], tree["y"]
  return jnp.sum(jnp.square(1 - x) + 100 * jnp.square(y - jnp.square(x)))


def test_one_vector_and_many_leaves_take_the_same_steps(x64, monkeypatch):
  start = {"x": jnp.array([-1.2, 0.3]), "y": jnp.array([1.0, -0.5])}
  joined = solved(rosenbrock, start, 12)
  monkeypatch.setattr("shrinkmeta.quasi_newton._ONE_VECTOR", 3)
  apart = solved(rosenbrock, start, 12)
  assert rosenbrock(joined[0]) < 0.1 * rosenbrock(start)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), joined, apart)


@pytest.mark.parametrize("most", (2**20, 3), ids=("one vector", "leaves"))
def test_stored_value_and_gradient_are_those_after_the_step(x64, monkeypatch, most):
  monkeypatch.setattr("shrinkmeta.quasi_newton._ONE_VECTOR", most)
  optimizer = sm.lbfgs()
  z = {"x": jnp.array([-1.2, 0.3]), "y": jnp.array([1.0, -0.5])}
  state = optimizer.init(z)
  for _ in range(8):
    value, grad = optax.value_and_grad_from_state(rosenbrock)(z, state=state)
    np.testing.assert_allclose(value, rosenbrock(z), rtol=1e-12)
    want = jax.grad(rosenbrock)(z)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9), grad, want)
    step, state = optimizer.update(
      grad, state, z, value=value, grad=grad, value_fn=rosenbrock, store_grad=True
    )
    assert np.isfinite(state.value)
    z = optax.apply_updates(z, step)
  step, state = optimizer.update(grad, state, z, value=value, grad=grad, value_fn=rosenbrock)
  assert jax.tree.structure(state) == jax.tree.structure(optimizer.init(z))


def test_without_a_step_the_stored_gradient_stays(x64):
  """Outside [-1, 1] the objective is NaN, and no step of the search is small enough."""
  loss = lambda z: jnp.where(jnp.abs(z) <= 1, -z, jnp.nan)
  z, optimizer = jnp.ones([]), sm.lbfgs()
  given = {"value": loss(z), "grad": jax.grad(loss)(z), "value_fn": loss}
  step, state = optimizer.update(given["grad"], optimizer.init(z), z, **given, store_grad=True)
  assert (step, state.value, state.grad) == (0, -1, -1)


def test_an_update_that_stores_nothing_leaves_nothing_to_read(x64):
  """`optax.value_and_grad_from_state` computes both anew where the value is inf."""
  z, optimizer = jnp.array([3.0, -2.0]), sm.lbfgs()
  loss = lambda z: jnp.sum(jnp.square(z))
  given = {"value": loss(z), "grad": jax.grad(loss)(z), "value_fn": loss}
  _, state = optimizer.update(given["grad"], optimizer.init(z), z, **given, store_grad=True)
  assert np.isfinite(state.value)
  _, state = optimizer.update(given["grad"], state, z, **given)
  value, grad = optax.value_and_grad_from_state(loss)(z, state=state)
  assert value == 13 and (grad == 2 * z).all()


def solved(loss, z, steps):
  """z and the norm of its gradient after some steps."""
  optimizer = sm.lbfgs()

  def step(carry, _):
    z, state = carry
    value, grad = jax.value_and_grad(loss)(z)
    update, state = optimizer.update(grad, state, z, value=value, grad=grad, value_fn=loss)
    return (optax.apply_updates(z, update), state), None

  z, _ = jax.lax.scan(step, (z, optimizer.init(z)), length=steps)[0]
  return z, optax.tree.norm(jax.grad(loss)(z))
