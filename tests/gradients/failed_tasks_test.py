"""Bad input is an error outside jit; under jit, the task is left out and counted."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import shrinkmeta as sm

pytestmark = pytest.mark.usefixtures("x64")

LABELS = {"w": "body", "b": "head"}
PHI = {"w": jnp.array([0.5, -0.2], jnp.float32), "b": jnp.array(0.1, jnp.float32)}


def predict(theta, x):
  """sqrt is NaN where the fourth input is negative: a fault inside the network."""
  return x[:, :2] @ theta["w"] + theta["b"] * jnp.sqrt(x[:, 2])


LINEAR = sm.gaussian(predict)
LEARNERS = {
  name: functools.partial(getattr(sm, name), phi_optimizer=optax.adam(0.1))
  for name in (
    "maml fomaml imaml reptile sigma_maml sigma_imaml sigma_reptile anil boil fine_tuning"
    " meta_sgd no_adaptation"
  ).split()
}


def learner_of(name, **keywords):
  if name != "no_adaptation":
    keywords["inner"] = sm.Inner(optax.sgd(0.1), 2)
  return LEARNERS[name](LINEAR, LABELS, **keywords)


def tasks_of(t, dtype=jnp.float64):
  rng = np.random.default_rng(0)
  batch = lambda: sm.Batch(
    jnp.array(rng.uniform(0.1, 1.0, size=(t, 4, 3)), dtype),
    jnp.array(rng.normal(size=(t, 4)), dtype),
    jnp.ones([t, 4], dtype),
  )
  return sm.Task(batch(), batch())


# Tasks 0 and 2 are left of four. Twice each they have the same mean, in a program of four tasks.
BAD, REST, FAILED = np.array([1, 3]), np.array([0, 0, 2, 2]), [False, True, False, True]


def nan_inside(tasks):
  bad = tasks.train.inputs.at[BAD, 0, 2].set(-1.0)
  return tasks._replace(train=tasks.train._replace(inputs=bad))


def masked_train(tasks):
  return tasks._replace(train=tasks.train._replace(mask=tasks.train.mask.at[BAD].set(0.0)))


def masked_val(tasks):
  return tasks._replace(val=tasks.val._replace(mask=tasks.val.mask.at[BAD].set(0.0)))


def double(tree):
  return jax.tree.map(lambda x: x.astype(jnp.float64), tree)


def close(a, b):
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
  ("name", "batching"),
  [(name, "vmap") for name in LEARNERS]
  + [(name, "sequential") for name in ("maml", "sigma_imaml", "reptile")],
)
def test_the_step_is_that_of_the_other_tasks(name, batching):
  learner = learner_of(name, batching=batching)
  state = learner.init(double(PHI))
  tasks = tasks_of(4)
  update = jax.jit(learner.update)
  want, want_metrics = update(state, jax.tree.map(lambda x: x[REST], tasks))
  assert want_metrics.num_failed == 0
  assert not np.array_equal(want.phi["w"], state.phi["w"])
  faults = [nan_inside, masked_train, masked_val] if batching == "vmap" else [nan_inside]
  for fault in faults:
    got, metrics = update(state, fault(tasks))
    assert metrics.failed.tolist() == FAILED and metrics.num_failed == 2, fault
    close((got.phi, got.log_sigma2, got.opt_state), (want.phi, want.log_sigma2, want.opt_state))
    close(metrics.loss, want_metrics.loss)
    assert got.step == state.step + 1


@pytest.mark.parametrize("name", ["maml", "sigma_imaml"])
def test_nothing_moves_if_all_tasks_fail(name):
  learner = learner_of(name, log_p_phi=sm.priors.normal(1.0))
  state = learner.init(double(PHI))
  tasks = tasks_of(2)
  update = jax.jit(learner.update)
  moved, _ = update(state, tasks)
  bad = tasks.train._replace(mask=jnp.zeros_like(tasks.train.mask))
  got, metrics = update(moved, tasks._replace(train=bad))
  assert metrics.num_failed == 2 and np.isnan(metrics.loss)
  for a, b in zip(jax.tree.leaves(got[:3]), jax.tree.leaves(moved[:3]), strict=True):
    np.testing.assert_array_equal(a, b)
  assert got.step == moved.step + 1 == 2


def test_a_label_out_of_range_under_jit():
  likelihood = sm.categorical(lambda theta, x: x @ theta["w"])
  learner = sm.maml(likelihood, {"w": "w"}, inner=sm.Inner(optax.sgd(0.1), 1))
  state = learner.init({"w": jnp.ones([2, 3])})
  batch = sm.Batch(jnp.ones([3, 4, 2]), jnp.zeros([3, 4], int).at[1, 2].set(3))
  _, metrics = jax.jit(learner.update)(state, sm.Task(batch, batch))
  assert metrics.failed.tolist() == [False, True, False]


@pytest.mark.parametrize("name", ["maml", "sigma_imaml", "fine_tuning"])
def test_errors_of_update(name):
  learner = learner_of(name)
  state, tasks = learner.init(PHI), tasks_of(4, jnp.float32)
  cases = [
    (tasks._replace(val=None), r"tasks.val is None.*split the data"),
    (tasks._replace(val=jax.tree.map(lambda x: x[:, :0], tasks.val)), r"tasks.val is empty"),
    (tasks._replace(val=jax.tree.map(lambda x: x[:1], tasks.val)), r"4 tasks and tasks.val 1"),
    (masked_val(tasks), r"tasks.val.mask of tasks \[1, 3\] is 0 everywhere"),
    (
      tasks._replace(train=tasks.train._replace(targets=tasks.train.targets.at[1, 0].set(np.nan))),
      r"tasks.train/targets .*index \(1, 0\): nan",
    ),
  ]
  for bad, message in cases:
    with pytest.raises(ValueError, match=message):
      learner.update(state, bad)
  with pytest.raises(ValueError, match=r"state.phi/w .*index \(0,\): nan"):
    learner.update(state._replace(phi={**PHI, "w": PHI["w"].at[0].set(jnp.nan)}), tasks)
  with pytest.raises(ValueError, match=r"state.log_sigma2 has no entry for module 'head'"):
    learner.update(state._replace(log_sigma2={"body": jnp.zeros([])}), tasks)


def test_errors_of_init_and_of_the_constructors():
  learner = learner_of("maml")
  with pytest.raises(ValueError, match=r"params mixes dtypes: .*params/w is float64"):
    learner.init({**PHI, "w": jnp.ones([2])})
  with pytest.raises(ValueError, match=r"params/w has dtype int"):
    learner.init({**PHI, "w": jnp.ones([2], int)})
  with pytest.raises(ValueError, match=r"params/w .*inf"):
    learner.init({**PHI, "w": jnp.array([1.0, jnp.inf], jnp.float32)})
  with pytest.raises(ValueError, match=r"'c' is in params and not in labels"):
    learner.init({**PHI, "c": PHI["b"]})
  for sigma, message in [
    ({"body": 1.0}, r"init_sigma has no entry for module 'head'"),
    ({"body": 1.0, "head": 1.0, "neck": 1.0}, r"init_sigma has an entry for 'neck'"),
    ({"body": 1.0, "head": -1.0}, r"standard deviation; got -1.0 for module 'head'"),
    (-0.5, r"standard deviation; got -0.5"),
    (float("nan"), r"standard deviation; got nan"),
  ]:
    with pytest.raises(ValueError, match=message):
      sm.sigma_maml(LINEAR, LABELS, init_sigma=sigma)
  with pytest.raises(ValueError, match=r"set Inner.tol=None"):
    sm.maml(LINEAR, LABELS, inner=sm.Inner(optax.sgd(0.1), tol=1e-3))
  with pytest.raises(ValueError, match=r"head is 'neck', which is no module; the modules are"):
    sm.anil(LINEAR, LABELS, head="neck")
  with pytest.raises(ValueError, match=r"head is 'neck', which is no module; the modules are"):
    sm.boil(LINEAR, LABELS, head="neck")


def test_errors_of_adapt():
  tasks = tasks_of(2, jnp.float32)
  one = jax.tree.map(lambda x: x[0], tasks.train)
  for name in ("maml", "sigma_imaml"):
    learner = learner_of(name)
    state = learner.init(PHI)
    with pytest.raises(ValueError, match=r"steps must be at least 0; got -1"):
      learner.adapt(state, one, steps=-1)
    with pytest.raises(ValueError, match=r"batch.mask is 0 everywhere"):
      learner.adapt(state, one._replace(mask=jnp.zeros([4])))
    with pytest.raises(ValueError, match=r"outputs of shape .* the targets have shape"):
      learner.adapt(state, one._replace(targets=one.targets[:, None]))


@pytest.mark.parametrize(
  "name", ("maml", "fomaml", "reptile", "sigma_imaml", "sigma_reptile", "empirical_bayes")
)
def test_a_label_out_of_range_in_the_training_part_is_a_failed_task(name):
  """Its gradient is finite, its likelihood is not."""
  rng = np.random.default_rng(0)
  likelihood = sm.categorical(lambda theta, x: x @ theta["w"])
  params = {"w": jnp.asarray(rng.normal(size=(3, 4)))}
  part = lambda: sm.Batch(
    jnp.asarray(rng.normal(size=(4, 5, 3))), jnp.asarray(rng.integers(0, 4, (4, 5)))
  )
  tasks = sm.Task(part(), part())
  learner = getattr(sm, name)(likelihood, {"w": "w"}, inner=sm.Inner(optax.sgd(0.1), 3))
  state, update = learner.init(params), jax.jit(learner.update)
  assert int(update(state, tasks)[1].num_failed) == 0
  bad = tasks._replace(train=tasks.train._replace(targets=tasks.train.targets.at[BAD, 0].set(7)))
  got, metrics = update(state, bad)
  assert metrics.failed.tolist() == FAILED
  want, want_metrics = update(state, jax.tree.map(lambda x: x[REST], tasks))
  close(got.phi, want.phi)
  close(got.log_sigma2, want.log_sigma2)
  close(metrics.phi_loss, want_metrics.phi_loss)


@pytest.mark.parametrize(
  "make", [sm.no_adaptation, sm.imaml, sm.empirical_bayes, sm.fomaml, sm.reptile]
)
def test_an_infinite_loss_fails_also_in_a_task_without_inner_steps(make):
  """The mode is at phi, so that no loop takes a step."""

  def log_prob(output, target):
    return jnp.where(target > 9.0, -jnp.inf, -0.5 * (output - target) ** 2)

  likelihood = sm.Likelihood(lambda theta, x: x * theta["w"], log_prob)
  keywords = {} if make is sm.no_adaptation else {"inner": sm.Inner(optax.sgd(0.1), 5, tol=1e-3)}
  learner = make(likelihood, {"w": "w"}, **keywords)
  good = sm.Batch(jnp.ones([2, 1]), jnp.array([[0.0], [0.0]]))
  bad = good._replace(targets=jnp.array([[0.0], [10.0]]))
  _, metrics = jax.jit(learner.update)(learner.init({"w": 0.0}), sm.Task(bad, good))
  assert metrics.inner.steps.tolist() == [0, 0]
  assert metrics.failed.tolist() == [False, True]
  assert np.isfinite(float(metrics.loss))


def test_a_task_fails_if_its_gradient_alone_is_not_finite():
  """|w| as a root has the value 0 and no derivative at w = 0. It enters where x is positive."""

  def predict(theta, x):
    rooted = x > 0
    return jnp.where(rooted, jnp.sqrt(jnp.where(rooted, theta["w"] ** 2, 1.0)), theta["w"])

  learner = sm.no_adaptation(sm.gaussian(predict), {"w": "w"}, phi_optimizer=optax.sgd(0.1))
  batch = sm.Batch(jnp.array([[1.0], [-1.0]]), jnp.ones([2, 1]))
  new, metrics = jax.jit(learner.update)(learner.init({"w": 0.0}), sm.Task(batch, batch))
  assert np.isfinite(metrics.val_nll).all() and np.isfinite(metrics.inner.objective).all()
  assert metrics.failed.tolist() == [True, False]
  close(new.phi["w"], 0.1)  # the step of the second task alone


@pytest.mark.parametrize(
  "learner",
  [
    sm.sigma_reptile(LINEAR, LABELS, sigma_gradient="joint"),
    sm.empirical_bayes(LINEAR, LABELS, restricted=("head",)),
  ],
)
def test_a_second_micro_batch_is_refused_where_tasks_are_joined(learner):
  state, tasks = learner.init(PHI), tasks_of(2, jnp.float32)
  sums, reports = learner.sums(state, tasks, first=np.int64(0))
  assert int(learner.apply(state, sums, reports)[0].step) == 1
  with pytest.raises(ValueError, match="micro-batches. Call `sums` once"):
    learner.sums(state, tasks, first=2)
  with pytest.raises(TypeError, match="first must be an integer"):
    learner.sums(state, tasks, first=True)


def test_reml_of_a_phi_that_the_tasks_leave_open_moves_nothing():
  likelihood = sm.gaussian(lambda theta, x: x @ theta["w"] + theta["b"])
  params = {"w": jnp.zeros(2), "b": jnp.zeros([])}
  batch = sm.Batch(jnp.ones([1, 2, 2]), jnp.ones([1, 2]))
  learner = sm.empirical_bayes(
    likelihood, {"w": "w", "b": "b"}, restricted=("w", "b"), inner=sm.Inner(optax.sgd(0.1), 3)
  )
  state = learner.init(params)
  new, metrics = jax.jit(learner.update)(state, sm.Task(batch, None))
  assert int(metrics.num_failed) == 0 and int(metrics.mean_inner.steps) == 3  # no task is to blame
  assert not np.isfinite(float(metrics.phi_loss))
  with pytest.raises(FloatingPointError, match="With `restricted`, the tasks of an update must"):
    sm.fit(learner, state, sm.Task(batch, None), 1, meta_batch=1)
  close(new.phi, state.phi)
  close(new.log_sigma2, state.log_sigma2)
  with pytest.raises(ValueError, match="restricted has 'nobody', which is no module"):
    sm.empirical_bayes(likelihood, {"w": "w", "b": "b"}, restricted=("nobody",))


@pytest.mark.parametrize("name", ["maml", "sigma_imaml"])
def test_data_in_another_precision_than_the_parameters(name):
  """As under jax_enable_x64, where NumPy's data are float64 and a network's parameters float32."""
  params = {"w": jnp.ones(2, jnp.float32)}
  learner = getattr(sm, name)(sm.gaussian(lambda p, x: x @ p["w"]), sm.by_leaf(params))
  batch = sm.Batch(np.ones([2, 3, 2]), np.ones([2, 3]))
  with pytest.raises(ValueError, match="is float64, the parameters are float32.*Cast inputs"):
    learner.update(learner.init(params), sm.Task(batch, batch))


@pytest.mark.parametrize(
  "row",
  [
    sm.Algorithm("learned", "map", "unrolled"),
    sm.Algorithm("Learned", "predictive", "unrolled"),
    sm.Algorithm("learned", "joint", "implicit"),
    sm.Algorithm("learned", "map", "none"),
  ],
)
def test_there_is_no_such_row(row):
  with pytest.raises(ValueError, match="There is no Algorithm.*: unrolled or first_order"):
    sm.make_learner(
      row,
      sm.gaussian(lambda p, x: x),
      {"w": "w"},
      inner=sm.Inner(),
      implicit=sm.Implicit(),
      phi_optimizer=optax.sgd(0.1),
      sigma_optimizer=optax.sgd(0.1),
      init_sigma=1.0,
    )


JOINT_X = np.random.default_rng(0).normal(size=(3, 6, 2)).astype(np.float32)


def joint_gradient(predict, batch, val):
  learner = sm.sigma_reptile(
    sm.gaussian(predict),
    {"w": "w"},
    inner=sm.Inner(optax.sgd(0.1, momentum=0.5), 30),
    sigma_gradient="joint",
    sigma_optimizer=optax.sgd(1.0),
  )
  state = learner.init({"w": jnp.ones(2)})
  new, metrics = jax.jit(learner.update)(state, sm.Task(batch, val))
  return float(new.log_sigma2["w"] - state.log_sigma2["w"]), int(metrics.num_failed)


def test_a_gradient_of_one_task_that_is_no_number_spares_the_joint_solve():
  """sqrt(x^2 w^2) at x = 0: its value is 0, its derivative NaN."""
  predict = lambda theta, x: jnp.sqrt((x @ theta["w"]) ** 2)
  batch = sm.Batch(jnp.asarray(JOINT_X), jnp.ones((3, 6)))
  val = batch._replace(inputs=batch.inputs.at[1].set(0.0))
  step, failed = joint_gradient(predict, batch, val)
  assert failed == 1 and np.isfinite(step) and step != 0.0


def test_a_failed_task_needs_no_derivative_at_zero_in_the_joint_solve():
  predict = lambda theta, x: (x / jnp.linalg.norm(x, axis=-1, keepdims=True)) @ theta["w"]
  batch = sm.Batch(jnp.asarray(JOINT_X), jnp.ones((3, 6)).at[2].set(jnp.nan))
  two = jax.tree.map(lambda x: x[:2], batch)
  step, failed = joint_gradient(predict, batch, batch)
  alone, _ = joint_gradient(predict, two, two)
  assert failed == 1 and step != 0.0
  np.testing.assert_allclose(step, alone, rtol=1e-5)
