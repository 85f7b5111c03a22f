"""Running statistics are refreshed between updates, and agree on any number of devices."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import shrinkmeta as sm

X = 3.0 + jax.random.normal(jax.random.key(0), (3, 6, 2))
Y = jax.random.normal(jax.random.key(1), (3, 6))
TASKS = sm.Task(sm.Batch(X, Y), sm.Batch(X[:, ::-1], Y[:, ::-1]))
INNER = sm.Inner(optax.sgd(0.05), 2)


class Net(nn.Module):
  @nn.compact
  def __call__(self, x, train=False):
    x = nn.BatchNorm(use_running_average=not train, momentum=0.5)(nn.Dense(4)(x))
    return nn.Dense(1)(jnp.tanh(x))[..., 0]


NET = Net()
VARIABLES = NET.init(jax.random.key(2), X[0])
PARAMS, STATS = VARIABLES["params"], VARIABLES["batch_stats"]


def predict(theta, x, constants):
  return NET.apply({"params": theta, "batch_stats": constants["batch_stats"]}, x)


def statistics(phi, x, constants):
  variables = {"params": phi, "batch_stats": constants["batch_stats"]}
  return {
    "batch_stats": NET.apply(variables, x, train=True, mutable=["batch_stats"])[1]["batch_stats"]
  }


def learner_of(**keywords):
  return sm.maml(sm.gaussian(predict), sm.by_layer(PARAMS), inner=INNER, **keywords)


def start(learner):
  return learner.init(PARAMS, constants={"batch_stats": STATS, "table": jnp.arange(3)})


@pytest.mark.parametrize("batching", ["vmap", "sequential"])
def test_the_mean_over_tasks_of_what_batch_norm_computes(batching):
  learner = learner_of(batching=batching)
  state = jax.jit(lambda s, t: learner.refresh(s, t, statistics))(start(learner), TASKS)
  hidden = X @ PARAMS["Dense_0"]["kernel"] + PARAMS["Dense_0"]["bias"]
  want = 0.5 * 0.0 + 0.5 * hidden.mean(1).mean(0)
  np.testing.assert_allclose(state.constants["batch_stats"]["BatchNorm_0"]["mean"], want, rtol=1e-5)
  want = 0.5 * 1.0 + 0.5 * hidden.var(1).mean(0)
  np.testing.assert_allclose(state.constants["batch_stats"]["BatchNorm_0"]["var"], want, rtol=1e-4)
  np.testing.assert_array_equal(state.constants["table"], jnp.arange(3))


def test_the_mean_of_large_integers_is_not_rounded():
  """A counter of updates is the same in every task; a float32 sum of three would lose digits."""
  learner = sm.maml(sm.gaussian(lambda theta, x, c: x * theta["w"]), {"w": "w"}, inner=INNER)
  state = learner.init({"w": 1.0}, constants={"count": jnp.int32(5_592_406)})
  add = lambda phi, x, constants: {"count": constants["count"] + 1}
  assert learner.refresh(state, TASKS, add).constants["count"] == 5_592_407


@pytest.mark.parametrize(
  ("values", "dtype"),
  [
    ([1_000_000_000, 1_000_000_000, 1_000_000_000], "int32"),
    ([-(2**31), -(2**31) + 1, -(2**31)], "int32"),
    ([2**31 - 1, -(2**31), 2**31 - 2], "int32"),
    ([3_000_000_000, 2**32 - 1, 2_999_999_999], "uint32"),
    ([-128, -128, -127], "int8"),
    ([-30_000, 32_767, 32_766], "int16"),
    ([65_535, 65_533, 65_535], "uint16"),
    ([True, True, False], "bool"),
    ([100] * 60, "int8"),
    ([60_000] * 60, "uint16"),
  ],
)
@pytest.mark.parametrize("batching", ["vmap", "sequential"])
def test_no_sum_of_integers_overflows(values, dtype, batching):
  """The mean is exact, and rounds to the nearest integer."""
  assert int(refreshed(values, dtype, batching)) == np.floor(np.mean(values, dtype=float) + 0.5)


@pytest.mark.parametrize("dtype", ["int64", "uint64"])
def test_no_sum_of_long_integers_overflows(dtype):
  most = int(np.iinfo(dtype).max)
  with jax.enable_x64(True):
    assert int(refreshed([most, most - 1, most], dtype)) == most
    assert int(refreshed([most, 1, 1], dtype)) == (most + 3) // 3


@pytest.mark.parametrize("batching", ["vmap", "sequential"])
def test_no_sum_of_sixteen_bits_overflows_or_stops(batching):
  """float16 ends at 65,504, and in bfloat16 256 + 1 is 256."""
  assert refreshed([1_000.0] * 100, "float16", batching) == 1_000.0
  assert refreshed([1.0] * 257, "bfloat16", batching) == 1.0


def test_the_words_of_a_random_key_stay():
  """A raw key is two integers, and statistics that return it return it for every task."""
  learner = sm.maml(sm.gaussian(lambda theta, x, c: x * theta["w"]), {"w": "w"}, inner=INNER)
  words = jnp.asarray(np.array([4_000_000_001, 4_294_967_295], np.uint32))
  state = learner.init({"w": 1.0}, constants={"rng": words})
  new = learner.refresh(state, TASKS, lambda phi, x, constants: constants)
  np.testing.assert_array_equal(new.constants["rng"], words)
  assert new.constants["rng"].dtype == jnp.uint32


def refreshed(values, dtype, batching="vmap"):
  """The mean of `values`, one of each task, as `refresh` computes it."""
  linear, dtype = sm.gaussian(lambda theta, x, c: x * theta["w"]), jnp.dtype(dtype)
  learner = sm.maml(linear, {"w": "w"}, inner=INNER, batching=batching)
  state = learner.init({"w": 1.0}, constants={"value": jnp.zeros([], dtype)})
  one = sm.Batch(jnp.asarray(np.array(values, dtype)[:, None]), jnp.ones((len(values), 1)))
  new = learner.refresh(state, sm.Task(one, one), lambda phi, x, constants: {"value": x[0]})
  assert new.constants["value"].dtype == dtype
  return new.constants["value"]


def test_a_random_key_has_no_mean():
  learner = sm.maml(sm.gaussian(lambda theta, x, c: x * theta["w"]), {"w": "w"}, inner=INNER)
  state = learner.init({"w": 1.0}, constants={"rng": jax.random.key(0)})
  with pytest.raises(ValueError, match="statistics returned the random key 'rng'"):
    learner.refresh(state, TASKS, lambda phi, x, constants: constants)


def test_tasks_without_examples_or_with_nan_do_not_count():
  learner = learner_of()
  only = learner.refresh(start(learner), jax.tree.map(lambda x: x[:1], TASKS), statistics)
  mask = jnp.ones((3, 6)).at[1].set(0.0)
  inputs = X.at[2, 0].set(jnp.nan)
  tasks = sm.Task(sm.Batch(inputs, Y, mask), TASKS.val)
  some = learner.refresh(start(learner), tasks, statistics)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), some.constants, only.constants
  )
  none = sm.Task(sm.Batch(X, Y, jnp.zeros((3, 6))), TASKS.val)
  kept = learner.refresh(start(learner), none, statistics)
  jax.tree.map(np.testing.assert_array_equal, kept.constants, start(learner).constants)


def test_fit_refreshes_after_every_update_and_resumes(tmp_path):
  learner = learner_of()
  tasks = lambda first, count: jax.tree.map(lambda x: x[(first % 2) : (first % 2) + count], TASKS)
  state, update = start(learner), jax.jit(learner.update)
  for i in range(3):
    now = tasks(2 * i, 2)
    state, _ = update(state, now)
    state = learner.refresh(state, now, statistics)
  end = sm.fit(learner, start(learner), tasks, 3, meta_batch=2, refresh=statistics)
  close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
  jax.tree.map(close, (end.phi, end.constants), (state.phi, state.constants))
  kept = sm.Checkpoints(tmp_path / "run", every=1, constants=True)
  options = {"meta_batch": 2, "refresh": statistics, "checkpoints": kept}
  sm.fit(learner, start(learner), tasks, 2, **options)
  again = sm.fit(learner, start(learner), tasks, 3, **options)
  jax.tree.map(np.testing.assert_array_equal, again, end)


def test_what_does_not_fit_is_refused():
  learner = learner_of()
  tasks = lambda first, count: jax.tree.map(lambda x: x[:count], TASKS)
  fit = lambda **options: sm.fit(
    learner, start(learner), tasks, 1, **{"meta_batch": 2, "refresh": statistics} | options
  )
  with pytest.raises(ValueError, match="refresh needs micro_batches=1"):
    fit(micro_batches=2)
  with pytest.raises(ValueError, match=r"Checkpoints\(folder, constants=True\)"):
    fit(checkpoints=sm.Checkpoints("unused"))
  with pytest.raises(TypeError, match="refresh must be a function"):
    fit(refresh=3)
  with pytest.raises(ValueError, match="must return entries of the constants"):
    learner.refresh(start(learner), TASKS, lambda phi, x, c: {"other": c["table"]})
  with pytest.raises(ValueError, match="must agree"):
    learner.refresh(start(learner), TASKS, lambda phi, x, c: {"table": jnp.ones(2)})
  plain = sm.maml(sm.gaussian(lambda theta, x: x[..., 0] * theta["w"]), {"w": "w"})
  with pytest.raises(ValueError, match="no constants to refresh"):
    plain.refresh(plain.init({"w": 0.0}), TASKS, statistics)


def test_nnx_by_a_merge_that_copies():
  class Model(nnx.Module):
    def __init__(self, rngs):
      self.hidden, self.norm = (
        nnx.Linear(2, 4, rngs=rngs),
        nnx.BatchNorm(4, momentum=0.5, rngs=rngs),
      )
      self.out = nnx.Linear(4, 1, rngs=rngs)

    def __call__(self, x):
      return self.out(jnp.tanh(self.norm(self.hidden(x))))[..., 0]

  graph, params, stats = nnx.split(Model(nnx.Rngs(0)), nnx.Param, nnx.BatchStat)

  def network(theta, x, constants):
    model = nnx.merge(graph, theta, constants, copy=True)
    model.eval()
    return model(x)

  def moved(phi, x, constants):
    model = nnx.merge(graph, phi, constants, copy=True)
    model.train()
    model(x)
    return nnx.state(model, nnx.BatchStat)

  learner = sm.maml(sm.gaussian(network), sm.by_layer(params), inner=INNER)
  state = learner.init(params, constants=stats)
  state, _ = learner.update(state, TASKS)
  new = learner.refresh(state, TASKS, moved)
  phi = nnx.to_pure_dict(state.phi)
  hidden = X @ phi["hidden"]["kernel"] + phi["hidden"]["bias"]
  found = nnx.to_pure_dict(new.constants)["norm"]["mean"]
  np.testing.assert_allclose(found, 0.5 * hidden.mean((0, 1)), rtol=1e-5)


def test_one_task_in_the_place_of_many():
  learner = sm.maml(sm.gaussian(lambda w, x, constants: x * w["w"]), {"w": "w"})
  state = learner.init({"w": 1.0}, constants={"mean": jnp.array(0.0)})
  one = sm.Batch(jnp.array(1.0), jnp.array(1.0))
  with pytest.raises(ValueError, match="tasks.train"):
    learner.refresh(state, sm.Task(one, one), lambda phi, x, constants: constants)
