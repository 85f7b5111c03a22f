"""With "rbg" keys, a task draws the same numbers in every batch of tasks."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import shrinkmeta as sm
from experiments.datasets import sinusoid
from shrinkmeta.devices.keys import same_in_any_batch

LINEAR = sm.gaussian(lambda theta, x: x @ theta["w"])
PARAMS = {"w": jnp.zeros(2)}
INPUTS = jax.random.normal(jax.random.key(1), (4, 8, 2))
PART = sm.Batch(INPUTS, jax.random.normal(jax.random.key(2), (4, 8)))
RBG = jax.random.key(0, impl="rbg")


def draws(key):
  return jax.random.normal(same_in_any_batch(key), (3,))


@pytest.mark.parametrize("impl", ["rbg", "unsafe_rbg"])
def test_what_a_key_draws_does_not_depend_on_its_batch(impl):
  keys = jax.vmap(
    lambda i: jax.random.wrap_key_data(i + jnp.arange(4, dtype=jnp.uint32), impl=impl)
  )(jnp.arange(5, dtype=jnp.uint32))
  alone = jnp.stack([draws(keys[i]) for i in range(5)])
  chex.assert_trees_all_equal(jax.vmap(draws)(keys), alone)
  assert len(np.unique(np.asarray(alone))) == alone.size  # every word of a key counts


def test_a_threefry_key_stays_as_it_is():
  for key in (None, jax.random.key(3), jax.random.PRNGKey(3)):
    assert same_in_any_batch(key) is key


def test_an_array_of_words_is_a_key_of_the_default_kind():
  with jax.default_prng_impl("rbg"):
    raw = jax.random.PRNGKey(3)
    chex.assert_trees_all_equal(draws(raw), draws(jax.random.key(3)))


@pytest.mark.parametrize(
  ("make", "batchings"),
  [
    (lambda **k: sm.sigma_imaml(LINEAR, {"w": "w"}, **k), ("vmap", "sequential", 3)),
    (lambda **k: sm.maml(LINEAR, {"w": "w"}, **k), ("vmap", "sequential")),
    (
      lambda **k: sm.empirical_bayes(
        LINEAR, {"w": "w"}, log_det=sm.LogDet("lanczos", probes=2, steps=2), **k
      ),
      ("vmap", "sequential"),
    ),
  ],
  ids=["sigma_imaml", "maml", "empirical_bayes"],
)
def test_a_learner_gives_the_same_in_every_batching(make, batchings):
  inner = sm.Inner(optax.sgd(0.1), steps=3, batch_size=3)
  found = []
  for batching in batchings:
    learner = make(inner=inner, batching=batching)

    @jax.jit
    def run(state, learner=learner):
      metrics = learner.update(state, sm.Task(PART, PART), RBG)[1]
      thetas = learner.adapt_tasks(state, PART, key=RBG)[0]
      return metrics.val_nll, metrics.phi_loss, thetas

    found.append(run(learner.init(PARAMS)))
  for other in found[1:]:
    chex.assert_trees_all_close(other, found[0], rtol=1e-5)


def test_estimates_of_one_task_are_the_same_under_vmap():
  keys = jax.random.split(RBG, 4)
  inner = sm.Inner(optax.sgd(0.1), steps=3, batch_size=3)
  probes, ls2 = sm.LogDet("lanczos", probes=2, steps=2), {"w": 0.0}
  learner = sm.sigma_imaml(LINEAR, {"w": "w"}, inner=inner)
  state = learner.init(PARAMS)

  def one(key, batch):
    theta = sm.map_estimate(LINEAR, {"w": "w"}, PARAMS, ls2, batch, inner, key=key)[0]
    value = sm.log_evidence(LINEAR, {"w": "w"}, PARAMS, ls2, batch, inner, log_det=probes, key=key)[
      0
    ]
    found = sm.posterior(LINEAR, {"w": "w"}, PARAMS, ls2, theta, batch, rank=1, key=key)
    drawn = found.sample(key, 2), found.outputs(key, batch.inputs, 2)
    return theta, value, found.eigenvalues, drawn, learner.adapt(state, batch, key=key)[0]

  batched, single = jax.jit(jax.vmap(one))(keys, PART), jax.jit(one)
  for i in range(4):
    alone = single(keys[i], jax.tree.map(lambda x, i=i: x[i], PART))
    chex.assert_trees_all_close(jax.tree.map(lambda x, i=i: x[i], batched), alone, rtol=1e-4)


def test_episode_i_of_an_rbg_key_is_the_same_in_every_batch():
  train = sinusoid.problem().train
  many, alone = train.sample(RBG, 0, 8), train.sample(RBG, 4, 1)
  chex.assert_trees_all_close(jax.tree.map(lambda x: x[4:5], many), alone, rtol=1e-5)
