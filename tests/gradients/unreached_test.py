"""Leaves that no training example reaches, and batches of NumPy arrays."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import shrinkmeta as sm

RNG = np.random.default_rng(0)
DRAW = lambda *shape: RNG.normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("batching", ["vmap", "sequential", 2])
@pytest.mark.parametrize("optimiser", [optax.sgd(0.1), optax.adam(0.1), sm.lbfgs()])
def test_a_head_that_only_validation_uses_has_the_gradient_of_a_loop(batching, optimiser):
  """Training never reads "new". Its theta is phi, so the gradient is the mean over tasks."""
  params = {"w": jnp.array([0.3, -0.2]), "new": jnp.array(1.5)}

  def predict(theta, x):
    return x["train"] @ theta["w"] if "train" in x else x["val"] @ theta["w"] * theta["new"]

  train = sm.Batch({"train": DRAW(5, 6, 2)}, DRAW(5, 6))
  x, y = DRAW(5, 4, 2), DRAW(5, 4)
  learner = sm.imaml(
    sm.gaussian(predict), sm.by_leaf(params), inner=sm.Inner(optimiser, 40), batching=batching
  )
  state = learner.init(params)

  def loss(theta, x, y):
    return jnp.mean(jnp.square(predict(theta, {"val": x}) - y))

  def all_at_once(phi):
    thetas, _ = learner.adapt_tasks(state._replace(phi=phi), train)
    return jnp.mean(jax.vmap(loss)(thetas, x, y))

  def one_by_one(phi):
    at = lambda t: jax.tree.map(lambda leaf: leaf[t], train)
    adapted = [learner.adapt(state._replace(phi=phi), at(t))[0] for t in range(5)]
    return sum(loss(theta, x[t], y[t]) for t, theta in enumerate(adapted)) / 5

  found, want = jax.grad(all_at_once)(params), jax.grad(one_by_one)(params)
  chex.assert_trees_all_close(found, want, rtol=1e-4, atol=1e-5)
  thetas, _ = learner.adapt_tasks(state, train)  # d loss / d new, with theta held
  direct = np.mean(
    [
      jax.grad(lambda new, t=t: loss({"w": thetas["w"][t], "new": new}, x[t], y[t]))(params["new"])
      for t in range(5)
    ]
  )
  np.testing.assert_allclose(found["new"], direct, rtol=1e-4)


MINI = sm.Inner(optax.sgd(0.1), 3, batch_size=3)
ENDED = sm.Inner(optax.sgd(0.1), 9, tol=1e-3)


@pytest.mark.parametrize(
  ("algorithm", "settings"),
  [
    (sm.fomaml, {"inner": MINI}),
    (sm.sigma_imaml, {"inner": MINI, "implicit": sm.Implicit(batch_size=2, num_batches=3)}),
    (sm.sigma_imaml, {"inner": ENDED, "batching": 2}),
  ],
)
def test_batches_of_numpy_are_batches_of_jax(algorithm, settings):
  params = {"body": DRAW(2, 4), "head": DRAW(4)}
  network = sm.gaussian(lambda theta, x: jnp.tanh(x @ theta["body"]) @ theta["head"])
  learner = algorithm(network, sm.by_leaf(params), **settings)
  state, key = learner.init(params), jax.random.key(0)
  numpy = sm.Task(
    sm.Batch(DRAW(5, 6, 2), DRAW(5, 6), np.ones((5, 6), np.float32)),
    sm.Batch(DRAW(5, 6, 2), DRAW(5, 6)),
  )
  ours = jax.tree.map(jnp.asarray, numpy)
  first = lambda tasks: jax.tree.map(lambda x: x[0], tasks.train)
  uses = (
    lambda tasks: learner.update(state, tasks, key)[0].phi,
    lambda tasks: learner.adapt(state, first(tasks), key=key)[0],
    lambda tasks: learner.adapt_tasks(state, tasks.train, key=key)[0],
  )
  for use in uses:
    chex.assert_trees_all_close(use(numpy), use(ours), rtol=1e-5, atol=1e-6)
