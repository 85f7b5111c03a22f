"""Random networks get the right keys, and no key is used twice."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import shrinkmeta as sm
from shrinkmeta.gradients import per_task
from shrinkmeta.mode import optimise

LABELS = {"w": "w"}
PARAMS = {"w": jnp.array([0.5, -0.2, 0.3])}
BATCH = sm.Batch(jnp.ones((2, 4, 3)), jnp.zeros((2, 4)))
TASKS = sm.Task(BATCH, BATCH)
KEY = jax.random.key(7)
STEPS = 3
INNER = sm.Inner(optax.sgd(0.1), STEPS)
LEARNERS = {
  "maml": (sm.maml, STEPS + 1),
  "fomaml": (sm.fomaml, STEPS + 1),
  "reptile": (sm.reptile, STEPS),  # its validation loss is only reported
  "fine_tuning": (sm.fine_tuning, 2),
}


def scale_of(key):
  return 1.0 + jax.random.uniform(key)


def spying(seen):
  """A network that hands the words of its key to the list `seen` when it runs."""

  def predict(theta, x, key=None):
    if key is None:
      return x @ theta["w"]
    jax.debug.callback(lambda words: seen.append(tuple(words.tolist())), jax.random.key_data(key))
    return scale_of(key) * (x @ theta["w"])

  return sm.with_randomness(sm.gaussian(predict))


@pytest.mark.parametrize("name", LEARNERS)
@pytest.mark.parametrize("batching", ["vmap", "sequential"])
def test_every_task_step_and_batch_has_a_key_of_its_own(name, batching):
  seen = []
  build, of_a_task = LEARNERS[name]
  learner = build(spying(seen), LABELS, inner=INNER, batching=batching)
  state = learner.init(PARAMS)
  jax.jit(learner.update)(state, TASKS, KEY)
  jax.effects_barrier()
  assert len(set(seen)) == 2 * of_a_task
  first = set(seen)
  seen.clear()
  jax.jit(learner.update)(state, TASKS, jax.random.fold_in(KEY, 1))
  jax.effects_barrier()
  assert not first & set(seen)


def test_what_is_folded_into_the_key_of_a_task_differs():
  streams = [optimise._NETWORK, optimise._AT_END, per_task._VALIDATION, per_task._POOLED]
  assert len(set(streams)) == 4 and min(streams) > 2**31  # steps are int32


def test_maml_is_the_plain_loop_with_these_draws():
  learner = sm.maml(spying([]), LABELS, inner=sm.Inner(optax.sgd(0.02), STEPS))
  one = jax.tree.map(lambda x: x[:1], TASKS)
  grad, metrics = jax.jit(learner.meta_gradient)(learner.init(PARAMS), one, KEY)
  of_task = jax.random.fold_in(KEY, 0)
  steps = [jax.random.fold_in(jax.random.fold_in(of_task, 2**32 - 4), i) for i in range(STEPS)]
  scales = [scale_of(key) for key in (*steps, jax.random.fold_in(of_task, 2**32 - 2))]

  def loss(w, scales):
    for scale in scales[:STEPS]:
      w = w - 0.02 * jax.grad(lambda w, s=scale: 0.5 * jnp.mean((s * (BATCH.inputs[0] @ w)) ** 2))(
        w
      )
    return 0.5 * jnp.mean((scales[STEPS] * (BATCH.inputs[0] @ w)) ** 2) + 0.5 * np.log(2 * np.pi)

  value, want = jax.value_and_grad(loss)(PARAMS["w"], scales)
  np.testing.assert_allclose(metrics.val_nll[0], value, rtol=1e-5)
  np.testing.assert_allclose(grad.phi["w"], want, rtol=1e-4)


@pytest.mark.parametrize("build", [sm.imaml, sm.sigma_imaml, sm.sigma_reptile, sm.empirical_bayes])
def test_a_mode_belongs_to_the_deterministic_network(build, recwarn):
  seen = []
  learner = build(spying(seen), LABELS, inner=INNER)
  plain = build(sm.gaussian(lambda theta, x: x @ theta["w"]), LABELS, inner=INNER)
  state = learner.init(PARAMS)
  new, _ = jax.jit(learner.update)(state, TASKS, KEY)
  want, _ = jax.jit(plain.update)(plain.init(PARAMS), TASKS, KEY)
  assert not seen and not recwarn.list
  jax.tree.map(np.testing.assert_array_equal, new, want)


def test_functions_of_one_task_use_the_deterministic_network():
  plain = sm.gaussian(lambda theta, x: x @ theta["w"])
  one = jax.tree.map(lambda x: x[0], BATCH)
  for f, settings in ((sm.map_estimate, [sm.Inner(optax.sgd(0.1), 3)]), (sm.log_evidence, [])):
    run = lambda likelihood, f=f, settings=settings: f(
      likelihood, LABELS, PARAMS, {"w": 0.0}, one, *settings, key=KEY
    )
    jax.tree.map(np.testing.assert_array_equal, run(spying([])), run(plain))


def test_without_a_key_the_network_is_deterministic_and_says_so():
  learner = sm.maml(spying([]), LABELS, inner=INNER)
  state = learner.init(PARAMS)
  with pytest.warns(UserWarning, match="there is no key: the deterministic network"):
    new, _ = learner.update(state, TASKS)
  plain = sm.maml(sm.gaussian(lambda theta, x: x @ theta["w"]), LABELS, inner=INNER)
  jax.tree.map(np.testing.assert_array_equal, new, plain.update(plain.init(PARAMS), TASKS)[0])
  one = jax.tree.map(lambda x: x[0], BATCH)
  theta, _ = learner.adapt(state, one, key=KEY)
  again, _ = learner.adapt(state, one, key=KEY)
  other, _ = learner.adapt(state, one)
  np.testing.assert_array_equal(theta["w"], again["w"])
  assert np.any(theta["w"] != other["w"])


def test_masks_of_linen_differ_between_tasks_and_reach_constants_and_precision():
  class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train):
      return nn.Dense(1)(nn.Dropout(0.5, deterministic=not train)(nn.Dense(16)(x)))[..., 0]

  net = Net()
  params = net.init(jax.random.key(0), jnp.ones((1, 3)), train=False)["params"]

  def predict(theta, x, unit, key=None):
    rngs = {} if key is None else {"dropout": key}
    return unit * net.apply({"params": theta}, x, train=key is not None, rngs=rngs)

  likelihood = sm.in_precision(sm.with_randomness(sm.gaussian(predict)), jnp.bfloat16)
  learner = sm.maml(likelihood, sm.by_layer(params), inner=sm.Inner(optax.sgd(0.1), 1))
  state = learner.init(params, constants=jnp.array(1.0))
  thetas, _ = jax.jit(learner.adapt_tasks)(state, BATCH, key=KEY)
  assert np.any(thetas["Dense_0"]["kernel"][0] != thetas["Dense_0"]["kernel"][1])
  without, _ = jax.jit(learner.adapt_tasks)(state, BATCH)
  np.testing.assert_array_equal(*without["Dense_0"]["kernel"])


def test_a_frozen_random_module_is_drawn_in_every_step():
  seen = []

  def predict(theta, x, key=None):
    hidden = x * theta["body"]
    if key is not None:
      jax.debug.callback(lambda words: seen.append(tuple(words.tolist())), jax.random.key_data(key))
      hidden = hidden * jax.random.bernoulli(key, 0.5, hidden.shape)
    return hidden @ theta["w"]

  likelihood = sm.with_randomness(sm.gaussian(predict))
  params = PARAMS | {"body": jnp.ones(3)}
  learner = sm.hand_picked(likelihood, sm.by_leaf(params), task_specific=["w"], inner=INNER)
  jax.jit(learner.adapt)(learner.init(params), jax.tree.map(lambda x: x[0], BATCH), key=KEY)
  jax.effects_barrier()
  assert len(set(seen)) >= STEPS


def test_predict_must_take_a_key():
  with pytest.raises(TypeError, match="must have the keyword key=None"):
    sm.with_randomness(sm.gaussian(lambda theta, x: x))
  with pytest.raises(TypeError, match="must have the keyword key=None"):
    sm.with_randomness(sm.gaussian(lambda theta, x, key: x))
