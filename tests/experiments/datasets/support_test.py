import jax
import jax.numpy as jnp
import numpy as np
import pytest

import shrinkmeta as sm
from experiments.datasets import support
from experiments.datasets.source import Problem, Protocol, Source
from experiments.runs import pipeline, training
from experiments.settings import tables

N, M = 6, 9


def draw(config, data, number, key):
  del config, number
  inputs = data[jax.random.permutation(key, len(data))[: N + M]]
  targets = jnp.arange(N + M, dtype=jnp.int32) % 3
  train_mask = jnp.full(N, 0.5)
  return sm.Task(sm.Batch(inputs[:N], targets[:N], train_mask), sm.Batch(inputs[N:], targets[N:]))


@pytest.fixture
def problem():
  images = jax.random.uniform(jax.random.key(0), (40, 8, 8, 1))
  source = Source(draw, None, images)
  protocol = Protocol("noise", "none", 3, 2, 3, "none", "endless")
  return Problem(source, source, source, "categorical", 3, (8, 8, 1), protocol)


def test_train_stands_before_what_is_judged_and_is_masked_out(problem):
  plain = problem.train.sample(jax.random.key(1), 0, 2)
  train, val = support.beside(problem).train.sample(jax.random.key(1), 0, 2)
  np.testing.assert_array_equal(train.inputs["x"], plain.train.inputs)
  np.testing.assert_array_equal(train.inputs["support"], np.full((2, N), 0.5))
  np.testing.assert_array_equal(train.mask, plain.train.mask)
  np.testing.assert_array_equal(val.inputs["x"][:, :N], plain.train.inputs)
  np.testing.assert_array_equal(val.inputs["x"][:, N:], plain.val.inputs)
  np.testing.assert_array_equal(val.inputs["support"], np.repeat([[0.5] * N + [0.0] * M], 2, 0))
  np.testing.assert_array_equal(val.mask, np.repeat([[0.0] * N + [1.0] * M], 2, 0))
  np.testing.assert_array_equal(val.targets[:, N:], plain.val.targets)


def test_what_is_judged_by_is_judged_one_by_one(problem):
  """With the statistics of the support, one image at a time gives the same as all at once."""
  config = tables.load("few_shot", "smoke", ["network.norm=support", "network.features=4"])
  prepared = pipeline.prepare("reptile", config, problem)
  assert pipeline.protocol(config, problem)["batch norm"] == "statistics of the support set"
  trained = pipeline.train(prepared, "reptile", 0, config)
  tasks = prepared.problem.test.sample(jax.random.key(2), 0, 1)
  steps = tuple(config.adapt_steps)

  def judge(keep):
    """Of the images that are judged those of `keep` [N + M]; noise stands for the others."""
    kept = keep | (jnp.arange(N + M) < N)
    x = tasks.val.inputs["x"]
    noise = 5.0 * jax.random.normal(jax.random.key(3), x.shape)
    inputs = {**tasks.val.inputs, "x": jnp.where(kept[None, :, None, None, None], x, noise)}
    only = tasks._replace(val=sm.Batch(inputs, tasks.val.targets, keep[None].astype(jnp.float32)))
    found = training.adapt(
      prepared.learner, prepared.model.likelihood, trained.state, lambda *_: only, 1, steps, 1, "a"
    )
    return np.array([found.accuracy[:, 0], found.nll[:, 0]])

  together = judge(jnp.arange(N + M) >= N)
  alone = np.mean([judge(jnp.arange(N + M) == i) for i in range(N, N + M)], 0)
  np.testing.assert_allclose(together, alone, rtol=1e-5)
  assert set(np.unique(judge(jnp.arange(N + M) == N)[0])) <= {0.0, 1.0}
