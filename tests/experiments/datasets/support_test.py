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

  # A task each: of the images that are judged those of `keep` [T, N + M], noise for the others.
  keep = np.concatenate([np.arange(N + M)[None] >= N, np.eye(N + M, dtype=bool)[N:]])
  x = tasks.val.inputs["x"]
  noise = 5.0 * jax.random.normal(jax.random.key(3), x.shape)
  kept = keep | (np.arange(N + M) < N)
  repeat = lambda tree: jax.tree.map(lambda x: jnp.repeat(x, len(keep), 0), tree)
  inputs = {
    **repeat(tasks.val.inputs),
    "x": jnp.where(kept[..., None, None, None], x, noise),
  }
  judged = sm.Batch(inputs, repeat(tasks.val.targets), jnp.asarray(keep, jnp.float32))
  only = sm.Task(repeat(tasks.train), judged)
  found = training.adapt(
    prepared.learner,
    prepared.model.likelihood,
    trained.state,
    lambda *_: only,
    len(keep),
    steps,
    len(keep),
    "a",
  )
  for scores in (found.accuracy, found.nll):  # [S, T]
    assert scores.shape == (len(steps), 1 + M)
    np.testing.assert_allclose(scores[:, 0], scores[:, 1:].mean(1), rtol=1e-5)
  assert set(np.unique(found.accuracy[:, 1:])) <= {0.0, 1.0}
