"""Constants: what the network takes beside its parameters, neither adapted nor trained."""

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
LEARNERS = {
  "maml": lambda likelihood: sm.maml(likelihood, LABELS, inner=FEW),
  "sigma_imaml": lambda likelihood: sm.sigma_imaml(likelihood, LABELS, inner=FEW),
  "blocks": lambda likelihood: sm.imaml(
    likelihood, LABELS, inner=sm.Inner(optax.sgd(0.05), 9, tol=0.3), batching=2
  ),
  "joint": lambda likelihood: sm.sigma_reptile(
    likelihood, LABELS, inner=FEW, sigma_gradient="joint"
  ),
  "empirical_bayes": lambda likelihood: sm.empirical_bayes(likelihood, LABELS, inner=FEW),
  "fine_tuning": lambda likelihood: sm.fine_tuning(likelihood, LABELS, inner=FEW),
}


def network(theta, inputs, constants):
  features = jnp.tanh(inputs @ constants["kernel"] + theta["shift"])
  return (features * constants["scale"].astype(inputs.dtype)) @ theta["head"]


TAKING = sm.gaussian(network)
CLOSING = sm.gaussian(lambda theta, inputs: network(theta, inputs, BASE))


def equal(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("name", LEARNERS)
def test_gradients_are_those_of_a_closure_to_the_bit(name):
  taking, closing = LEARNERS[name](TAKING), LEARNERS[name](CLOSING)
  state, other = taking.init(PARAMS, constants=BASE), closing.init(PARAMS)
  grad, _ = jax.jit(taking.meta_gradient)(state, TASKS)
  want, _ = jax.jit(lambda state, tasks: closing.meta_gradient(state, tasks))(other, TASKS)
  close = lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-7)
  jax.tree.map(close, grad, want)  # XLA folds what it knows of a closure
  held = lambda state, base, tasks: LEARNERS[name](
    sm.gaussian(lambda theta, inputs: network(theta, inputs, base))
  ).meta_gradient(state, tasks)[0]
  if name not in ("sigma_imaml", "blocks", "joint", "empirical_bayes"):
    # A closure over an argument is the same program; an implicit rule makes it an argument again.
    equal(grad, jax.jit(held)(other, BASE, TASKS))


@pytest.mark.parametrize("name", ["maml", "sigma_imaml", "blocks"])
def test_theta_hat_and_an_update(name):
  taking, closing = LEARNERS[name](TAKING), LEARNERS[name](CLOSING)
  state, other = taking.init(PARAMS, BASE), closing.init(PARAMS)
  close = lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-7)
  jax.tree.map(close, taking.adapt(state, ONE)[0], closing.adapt(other, ONE)[0])
  thetas = [
    learner.adapt_tasks(s, TASKS.train)[0] for learner, s in ((taking, state), (closing, other))
  ]
  jax.tree.map(close, *thetas)
  new, _ = taking.update(state, TASKS)
  want, _ = closing.update(other, TASKS)
  jax.tree.map(close, (new.phi, new.log_sigma2), (want.phi, want.log_sigma2))
  equal(new.constants, BASE)
  assert jax.tree.structure(new.opt_state) == jax.tree.structure(want.opt_state)


def test_functions_of_one_task():
  prior = (PARAMS, {"head": 0.0, "shift": -1.0})
  close = lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6)
  inner = sm.Inner(optax.sgd(0.1), 60)
  theta, _ = sm.map_estimate(TAKING, LABELS, *prior, ONE, inner, constants=BASE)
  want, _ = sm.map_estimate(CLOSING, LABELS, *prior, ONE, inner)
  jax.tree.map(close, theta, want)
  close(
    sm.log_evidence(TAKING, LABELS, *prior, ONE, inner, constants=BASE)[0],
    sm.log_evidence(CLOSING, LABELS, *prior, ONE, inner)[0],
  )
  close(
    sm.restriction(TAKING, LABELS, *prior, TASKS.train, ("head",), constants=BASE),
    sm.restriction(CLOSING, LABELS, *prior, TASKS.train, ("head",)),
  )
  found = sm.posterior(TAKING, LABELS, *prior, want, ONE, constants=BASE)
  other = sm.posterior(CLOSING, LABELS, *prior, want, ONE)
  close(found.predictive(X[1]).covariance, other.predictive(X[1]).covariance)
  key = jax.random.key(3)
  close(found.log_predictive(key, ONE, 4), other.log_predictive(key, ONE, 4))
  many = jax.vmap(lambda batch: sm.posterior(TAKING, LABELS, *prior, want, batch, constants=BASE))
  assert many(TASKS.train).basis.shape[0] == 3
  close(
    sm.log_likelihood(sm.with_constants(TAKING, BASE), PARAMS, ONE),
    sm.log_likelihood(CLOSING, PARAMS, ONE),
  )


def test_evaluation_choice_deltas_and_the_check():
  learner = LEARNERS["sigma_imaml"](TAKING)
  state = learner.init(PARAMS, BASE)
  other = LEARNERS["sigma_imaml"](CLOSING)
  start = other.init(PARAMS)
  found, want = sm.evaluate(learner, state, TASKS), sm.evaluate(other, start, TASKS)
  np.testing.assert_allclose(found.val_nll, want.val_nll, rtol=1e-5)
  chosen = sm.choose_modules(learner, state, TASKS, tolerance=0.0, repeats=1)
  assert chosen.modules == sm.choose_modules(other, start, TASKS, tolerance=0.0, repeats=0).modules
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
def test_memory_of_a_task_does_not_grow_with_the_base(name, optimising_jit):
  def compiled(width, count):
    base = {"kernel": jnp.ones((3, width)), "read": jnp.ones((width, 4)), "scale": BASE["scale"]}

    def wide(theta, inputs, constants):
      inner = {"kernel": constants["kernel"] @ constants["read"], "scale": constants["scale"]}
      return network(theta, inputs, inner)

    learner = LEARNERS[name](sm.gaussian(wide))
    state = learner.init(PARAMS, base)
    batch = sm.Batch(jnp.ones((count, 5, 3)), jnp.ones((count, 5)))
    run = optimising_jit(learner.update, donate_argnums=0)
    return sm.program_cost(run.lower(state, sm.Task(batch, batch)).compile())

  small, large = ([compiled(width, count) for count in (4, 12)] for width in (50, 5_000))
  of_a_task = [(b.bytes - a.bytes) / 8 for a, b in (small, large)]
  assert of_a_task[1] < of_a_task[0] + 400  # a copy of the base would be 140,000 bytes
  assert large[0].arguments - small[0].arguments == 4_950 * 7 * 4
  assert large[0].outputs == small[0].outputs  # donated: no second copy


def test_constants_are_arguments_of_the_program():
  learner = LEARNERS["sigma_imaml"](TAKING)
  text = jax.jit(learner.update).lower(learner.init(PARAMS, BASE), TASKS).as_text()
  number = f"{float(BASE['kernel'][0, 0]):.5f}"[:6]
  assert number not in text
  closing = LEARNERS["maml"](CLOSING)
  assert number in jax.jit(closing.update).lower(closing.init(PARAMS), TASKS).as_text()


def test_fit_neither_copies_nor_donates_them(tmp_path):
  learner = LEARNERS["sigma_imaml"](TAKING)
  state = learner.init(PARAMS, BASE)
  tasks = lambda first, count: jax.tree.map(lambda x: x[:count], TASKS)
  end = sm.fit(learner, state, tasks, 2, meta_batch=2)
  assert end.constants["kernel"] is state.constants["kernel"]
  want = sm.fit(learner, state, tasks, 2, meta_batch=2, micro_batches=2)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), end.phi, want.phi
  )


@pytest.mark.parametrize("by_value", [False, True])
def test_a_run_that_resumes(tmp_path, by_value):
  learner = LEARNERS["sigma_imaml"](TAKING)
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
