"""sm.clip_tasks scales the gradient of each task down to a norm, and changes nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import shrinkmeta as sm

LABELS = {"w": "body", "b": "head"}
PHI = {"w": np.array([0.5, -0.2]), "b": np.array(0.1)}
LINEAR = sm.gaussian(lambda theta, x: x @ theta["w"] + theta["b"])
INNER = sm.Inner(optax.sgd(0.2), 3)
T = 5
PREDICTIVE = sorted(name for name, one in sm.FAMILY.items() if one.phi == "predictive")


def make(name, **settings):
  settings |= {"phi_optimizer": optax.sgd(1.0)}
  if name != "no_adaptation":
    settings["inner"] = INNER
  if name == "hand_picked":
    settings["task_specific"] = ("head",)
  return getattr(sm, name)(LINEAR, LABELS, **settings)


def tasks_of(dtype=np.float64):
  """Tasks whose gradients differ by a factor of thousands."""
  rng = np.random.default_rng(0)
  size = np.array([0.1, 1.0, 3.0, 30.0, 300.0]).reshape(T, 1)
  batch = lambda: sm.Batch(
    jnp.asarray(rng.normal(size=(T, 4, 2)), dtype),
    jnp.asarray(size * rng.normal(size=(T, 4)), dtype),
  )
  return sm.Task(batch(), batch())


def start(learner, dtype=np.float64):
  return learner.init(jax.tree.map(lambda x: jnp.asarray(x, dtype), PHI))


def one_by_one(learner, state, tasks):
  """(gradients, norms [T]) of the tasks, each in a meta-batch of its own."""
  alone = lambda t: jax.tree.map(lambda x: x[t : t + 1], tasks)
  grads = [learner.meta_gradient(state, alone(t))[0] for t in range(T)]
  entries = [jax.tree.leaves(jax.tree.map(np.asarray, grad)) for grad in grads]
  return grads, np.sqrt([sum(np.sum(x**2) for x in leaves) for leaves in entries])


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", PREDICTIVE)
def test_the_gradient_is_the_mean_of_clipped_gradients(name):
  learner, tasks = make(name), tasks_of()
  state = start(learner)
  grads, norms = one_by_one(learner, state, tasks)
  most = float(np.median(norms))
  factors = np.minimum(1.0, most / norms)
  assert 1 < np.sum(factors < 1) < T
  want = jax.tree.map(lambda *g: sum(f * x for f, x in zip(factors, g, strict=True)) / T, *grads)
  got, metrics = jax.jit(sm.clip_tasks(learner, most).meta_gradient)(state, tasks)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), got, want)
  np.testing.assert_allclose(metrics.task_grad_norm, norms, rtol=1e-9)
  raw = learner.meta_gradient(state, tasks)[1].task_grad_norm
  np.testing.assert_allclose(raw, norms, rtol=1e-9)


@pytest.mark.parametrize("name", ["maml", "sigma_imaml"])
def test_a_norm_above_all_changes_no_bit(name):
  learner, tasks = make(name), tasks_of(np.float32)
  state = start(learner, np.float32)
  plain, clipped = (
    jax.jit(each.meta_gradient)(state, tasks)[0] for each in (learner, sm.clip_tasks(learner, 1e9))
  )
  jax.tree.map(np.testing.assert_array_equal, plain, clipped)


@pytest.mark.usefixtures("x64")
def test_a_failed_task_stays_failed_and_the_others_are_clipped():
  learner, tasks = make("maml"), tasks_of()
  bad = tasks._replace(val=tasks.val._replace(targets=tasks.val.targets.at[1].set(jnp.nan)))
  state, most = start(learner), 0.5
  grads, norms = one_by_one(learner, state, tasks)
  got, metrics = jax.jit(sm.clip_tasks(learner, most).meta_gradient)(state, bad)
  assert metrics.failed.tolist() == [False, True, False, False, False]
  kept = [t for t in range(T) if t != 1]
  want = sum(min(1.0, most / norms[t]) * grads[t].phi["w"] for t in kept) / len(kept)
  np.testing.assert_allclose(got.phi["w"], want, rtol=1e-9)


def test_a_gradient_whose_square_overflows_is_clipped_and_not_lost():
  likelihood = sm.Likelihood(
    lambda theta, x: x + jnp.sum(theta["level"]), lambda outputs, targets: 1e25 * outputs
  )
  learner = sm.maml(likelihood, {"level": "level"}, inner=sm.Inner(optax.sgd(0.0), 1))
  batch = sm.Batch(jnp.zeros([2, 3]), jnp.zeros([2, 3]))
  state = learner.init({"level": jnp.zeros([2])})  # of one entry XLA takes the root of no square
  grad, metrics = jax.jit(sm.clip_tasks(learner, 2.0).meta_gradient)(state, sm.Task(batch, batch))
  np.testing.assert_allclose(metrics.task_grad_norm, 1e25 * np.sqrt(2), rtol=1e-6)
  np.testing.assert_allclose(grad.phi["level"], -np.sqrt(2), rtol=1e-6)
  assert not metrics.failed.any()


@pytest.mark.usefixtures("x64")
def test_it_stays_with_micro_batches_and_with_kept_modules():
  learner, tasks = sm.clip_tasks(make("sigma_maml"), 0.3), tasks_of()
  state = start(learner)
  whole = learner.meta_gradient(state, tasks)[0]
  parts = [jax.tree.map(lambda x, s=s: x[s], tasks) for s in (slice(0, 2), slice(2, T))]
  sums, reports = zip(*(learner.sums(state, part) for part in parts), strict=True)
  joined = jax.tree.map(lambda *x: jnp.concatenate(x), *reports)
  after, metrics = learner.apply(state, jax.tree.map(lambda *x: sum(x), *sums), joined)
  assert metrics.task_grad_norm.shape == (T,)
  np.testing.assert_allclose(state.phi["w"] - after.phi["w"], whole.phi["w"], rtol=1e-9)
  kept, state = learner.keep(state, ["head"])
  assert kept.spec.clip == 0.3


@pytest.mark.parametrize(
  "name", sorted(name for name, one in sm.FAMILY.items() if one.phi != "predictive")
)
def test_learners_whose_phi_follows_something_else_are_refused(name):
  with pytest.raises(ValueError, match="phi follows the validation loss"):
    sm.clip_tasks(make(name), 1.0)


@pytest.mark.parametrize("norm", [0.0, -1.0, np.inf, np.nan])
def test_the_norm_is_positive_and_finite(norm):
  with pytest.raises(ValueError, match="norm must be positive and finite"):
    sm.clip_tasks(make("maml"), norm)


@pytest.mark.usefixtures("x64")
def test_the_check_of_gradients_wants_the_learner_before_it_clips():
  learner = sm.clip_tasks(make("maml"), 1.0)
  with pytest.raises(ValueError, match="derivative of no loss"):
    sm.check_meta_gradient(learner, start(learner), tasks_of())
