"""Constants are inputs of the network that are neither adapted nor trained."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import shrinkmeta as sm

LABELS = {"head": "head", "shift": "shift"}
PARAMS = {"head": jnp.array([0.3, -0.2, 0.1, 0.4]), "shift": jnp.array([0.1, 0.0, -0.1, 0.2])}
BASE = {
  "kernel": jax.random.normal(jax.random.key(0), (3, 4)),
  "scale": jnp.array([2, 1, 3, 1], jnp.int8),
}
X = jax.random.normal(jax.random.key(1), (3, 5, 3))
Y = jax.random.normal(jax.random.key(2), (3, 5))
TASKS = sm.Task(sm.Batch(X, Y), sm.Batch(X[:, ::-1], Y[:, ::-1] + 0.1))
ONE = sm.Batch(X[0], Y[0])
FEW = sm.Inner(optax.sgd(0.05), 3)
SGD = {"phi_optimizer": optax.sgd(1.0, momentum=0.9)}  # an update is the gradient
LEARNED = SGD | {"sigma_optimizer": optax.sgd(1.0, momentum=0.9)}
LEARNERS = {
  "maml": lambda likelihood: sm.maml(likelihood, LABELS, inner=FEW, **SGD),
  "sigma_imaml": lambda likelihood: sm.sigma_imaml(likelihood, LABELS, inner=FEW, **LEARNED),
  "blocks": lambda likelihood: sm.imaml(
    likelihood, LABELS, inner=sm.Inner(optax.sgd(0.05), 9, tol=0.3), batching=2, **SGD
  ),
  "joint": lambda likelihood: sm.sigma_reptile(
    likelihood, LABELS, inner=FEW, sigma_gradient="joint", **LEARNED
  ),
  "empirical_bayes": lambda likelihood: sm.empirical_bayes(
    likelihood, LABELS, inner=FEW, **LEARNED
  ),
  "fine_tuning": lambda likelihood: sm.fine_tuning(likelihood, LABELS, inner=FEW, **SGD),
}


def network(theta, inputs, constants):
  features = jnp.tanh(inputs @ constants["kernel"] + theta["shift"])
  return (features * constants["scale"].astype(inputs.dtype)) @ theta["head"]


TAKING = sm.gaussian(network)
CLOSING = sm.gaussian(lambda theta, inputs: network(theta, inputs, BASE))


def equal(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("name", LEARNERS)
def test_updates_and_thetas_are_those_of_a_closure(name):
  taking, closing = LEARNERS[name](TAKING), LEARNERS[name](CLOSING)
  state, other = taking.init(PARAMS, constants=BASE), closing.init(PARAMS)

  def run(learner, state):
    new, metrics = learner.update(state, TASKS)
    thetas = None
    if name in ("maml", "sigma_imaml"):
      thetas = learner.adapt(state, ONE)[0]
    elif name == "blocks":
      thetas = learner.adapt_tasks(state, TASKS.train)[0]
    return new, (metrics.val_nll, metrics.phi_loss, thetas)

  new, numbers = jax.jit(functools.partial(run, taking))(state)
  want, wanted = jax.jit(functools.partial(run, closing))(other)
  close = lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-7)
  jax.tree.map(close, (new.phi, new.log_sigma2, numbers), (want.phi, want.log_sigma2, wanted))
  equal(new.constants, BASE)
  assert jax.tree.structure(new.opt_state) == jax.tree.structure(want.opt_state)
  assert all(np.any(new.phi[name] != PARAMS[name]) for name in PARAMS)


@pytest.mark.parametrize("name", LEARNERS)
def test_gradients_are_those_of_a_closure_to_the_bit(name):
  """A closure over an argument is the same program; implicit rules make it an argument again."""
  taking = LEARNERS[name](TAKING)
  grad, _ = jax.jit(taking.meta_gradient)(taking.init(PARAMS, BASE), TASKS)
  held = lambda state, base: LEARNERS[name](
    sm.gaussian(lambda theta, inputs: network(theta, inputs, base))
  ).meta_gradient(state, TASKS)[0]
  equal(grad, jax.jit(held)(LEARNERS[name](CLOSING).init(PARAMS), BASE))


def test_functions_of_one_task():
  prior = (PARAMS, {"head": 0.0, "shift": -1.0})
  inner, key = sm.Inner(optax.sgd(0.1), 60), jax.random.key(3)

  @functools.partial(jax.jit, static_argnums=0)
  def run(likelihood, **taken):
    theta, _ = sm.map_estimate(likelihood, LABELS, *prior, ONE, inner, **taken)
    found = sm.posterior(likelihood, LABELS, *prior, theta, ONE, **taken)
    bound = sm.with_constants(likelihood, BASE) if taken else likelihood
    return (
      theta,
      sm.log_evidence(likelihood, LABELS, *prior, ONE, inner, **taken)[0],
      sm.restriction(likelihood, LABELS, *prior, TASKS.train, ("head",), **taken),
      found.predictive(X[1]).covariance,
      found.log_predictive(key, ONE, 4),
      sm.log_likelihood(bound, PARAMS, ONE),
    )

  close = lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6)
  jax.tree.map(close, run(TAKING, constants=BASE), run(CLOSING))
  many = jax.vmap(lambda batch: sm.posterior(TAKING, LABELS, *prior, PARAMS, batch, constants=BASE))
  assert jax.eval_shape(many, TASKS.train).basis.shape[0] == 3


def test_evaluation_choice_deltas_and_the_check():
  learner = LEARNERS["sigma_imaml"](TAKING)
  state = learner.init(PARAMS, BASE)
  other = LEARNERS["sigma_imaml"](CLOSING)
  start = other.init(PARAMS)
  found, want = sm.evaluate(learner, state, TASKS), sm.evaluate(other, start, TASKS)
  np.testing.assert_allclose(found.val_nll, want.val_nll, rtol=1e-5)
  chosen = sm.choose_modules(learner, state, TASKS, tolerance=0.0, repeats=1)
  whole = chosen.curve[-1]
  assert set(whole.modules) == set(PARAMS)
  np.testing.assert_allclose(whole.loss, np.mean(want.val_nll), rtol=1e-5)
  thetas, _ = learner.adapt_tasks(state, TASKS.train)
  deltas = sm.deltas(learner, state, thetas, ["a", "b", "c"])
  rows = sm.predict_tasks(TAKING, state, deltas, jnp.array([2, 0]), X[0, :2])
  of_task = lambda t, n: network(jax.tree.map(lambda x: x[t], thetas), X[0, n : n + 1], BASE)[0]
  np.testing.assert_allclose(rows, [of_task(2, 0), of_task(0, 1)], rtol=1e-5)
  moved = state._replace(constants=BASE | {"kernel": BASE["kernel"] + 1.0})
  with pytest.raises(ValueError, match="constants/kernel"):
    sm.predict_tasks(TAKING, moved, deltas, jnp.array([0]), X[0, :1])


def test_check_meta_gradient_takes_constants(x64):
  wide = lambda tree: jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), tree)
  base = {"kernel": wide(BASE["kernel"]), "scale": BASE["scale"]}
  learner = sm.sigma_maml(TAKING, LABELS, inner=sm.Inner(optax.sgd(0.05), 1))
  empty = learner.init(wide(PARAMS), base)._replace(constants=None)
  found = sm.check_meta_gradient(learner, empty, wide(TASKS), constants=base)
  assert found.verdict.startswith("fine")


@pytest.mark.parametrize("name", ["maml", "sigma_imaml", "empirical_bayes"])
def test_memory_of_a_task_does_not_grow_with_the_base(name):
  def wide(theta, inputs, constants):
    inner = {"kernel": constants["kernel"] @ constants["read"], "scale": constants["scale"]}
    return network(theta, inputs, inner)

  def cost(width):
    base = {"kernel": jnp.ones((3, width)), "read": jnp.ones((width, 4)), "scale": BASE["scale"]}
    learner = LEARNERS[name](sm.gaussian(wide))
    batch = sm.Batch(jnp.ones((12, 5, 3)), jnp.ones((12, 5)))
    arguments = learner.init(PARAMS, base), sm.Task(batch, batch)
    return sm.program_cost(jax.jit(learner.update, donate_argnums=0).lower(*arguments).compile())

  small, large = cost(5_000), cost(20_000)
  # One small base is 140,000 bytes; copies of the tasks would be 12 of them.
  assert 140_000 < small.arguments < 150_000
  assert large.arguments - small.arguments == 28 * 15_000
  assert small.temporaries == large.temporaries < 20_000
  assert small.outputs == large.outputs < 2_000  # donated: no second copy


def test_constants_are_arguments_of_the_program():
  learner = LEARNERS["sigma_imaml"](TAKING)
  text = jax.jit(learner.update).lower(learner.init(PARAMS, BASE), TASKS).as_text()
  number = f"{float(BASE['kernel'][0, 0]):.5f}"[:6]
  assert number not in text
  closing = LEARNERS["maml"](CLOSING)
  assert number in jax.jit(closing.update).lower(closing.init(PARAMS), TASKS).as_text()


def test_fit_neither_copies_nor_donates_them():
  learner = LEARNERS["maml"](TAKING)
  state = learner.init(PARAMS, BASE)
  tasks = lambda first, count: jax.tree.map(lambda x: x[(first + np.arange(count)) % 3], TASKS)
  end = sm.fit(learner, state, tasks, 2, meta_batch=2)
  assert end.constants["kernel"] is state.constants["kernel"]
  want = sm.fit(learner, state, tasks, 2, meta_batch=2, micro_batches=2)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), end.phi, want.phi
  )


@pytest.mark.parametrize("by_value", [False, True])
def test_a_run_that_resumes(tmp_path, by_value):
  learner = LEARNERS["fine_tuning"](TAKING)
  state = learner.init(PARAMS, BASE)
  tasks = lambda first, count: jax.tree.map(lambda x: x[:count], TASKS)
  kept = sm.Checkpoints(tmp_path / "run", every=1, constants=by_value)
  whole = sm.fit(learner, state, tasks, 3, meta_batch=2)
  sm.fit(learner, state, tasks, 1, meta_batch=2, checkpoints=kept)
  end = sm.fit(learner, state, tasks, 3, meta_batch=2, checkpoints=kept)
  equal(end, whole)
  moved = state._replace(constants=BASE | {"kernel": BASE["kernel"].at[1, 2].add(1e-6)})
  if by_value:
    equal(sm.restore(kept, learner, moved), whole)
    return
  stored = sum(f.stat().st_size for f in (tmp_path / "run").rglob("*") if f.is_file())
  assert stored > 0
  equal(sm.restore(kept, learner, state), whole)
  with pytest.raises(ValueError, match="constant kernel.*fingerprint"):
    sm.restore(kept, learner, moved)
  with pytest.raises(ValueError, match="constant kernel"):
    sm.fit(learner, moved, tasks, 4, meta_batch=2, checkpoints=kept)


def test_both_forms_of_predict_are_told_apart():
  with pytest.raises(
    TypeError, match=r"takes \(theta, inputs, constants\).*there are no constants"
  ):
    sm.maml(TAKING, LABELS).init(PARAMS)
  with pytest.raises(TypeError, match="There are constants, and predict takes"):
    sm.maml(CLOSING, LABELS).init(PARAMS, constants=BASE)
  with pytest.raises(TypeError, match="constants/act must be an array"):
    sm.maml(TAKING, LABELS).init(PARAMS, constants={"act": jnp.tanh})
  with pytest.raises(TypeError, match="there are no constants"):
    sm.map_estimate(TAKING, LABELS, PARAMS, {"head": 0.0, "shift": 0.0}, ONE)


def test_lower_precision_reaches_constants():
  half = sm.in_precision(TAKING, jnp.bfloat16)
  seen = []
  spy = lambda theta, x, c: seen.append(c["kernel"].dtype) or network(theta, x, c)
  sm.in_precision(sm.gaussian(spy), jnp.bfloat16).predict(PARAMS, X[0], BASE)
  assert seen == [jnp.bfloat16]
  with pytest.raises(TypeError, match="there are no constants"):
    sm.maml(half, LABELS).init(PARAMS)


def test_derivatives_do_not_reach_constants():
  learner = LEARNERS["maml"](TAKING)
  state = learner.init(PARAMS, {"kernel": BASE["kernel"], "scale": jnp.ones(4)})

  def loss(constants):
    return learner.adapt(state._replace(constants=constants), ONE)[1].objective

  assert not any(np.any(g) for g in jax.tree.leaves(jax.grad(loss)(state.constants)))


def test_constants_are_placed_and_cut_by_rules():
  learner = LEARNERS["maml"](TAKING)
  state = learner.init(PARAMS, BASE)
  mesh = sm.task_mesh(jax.devices()[:1])
  placed = sm.place_state(state, mesh, {"constants/kernel": jax.sharding.PartitionSpec(None, None)})
  assert placed.constants["kernel"].sharding.mesh == mesh
  with pytest.raises(ValueError, match="matches the rules"):
    sm.place_state(state, mesh, {"constants/nothing": jax.sharding.PartitionSpec()})
