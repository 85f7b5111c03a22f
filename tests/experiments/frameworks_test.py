"""The same network in flax, equinox, haiku and plain functions, from the same parameters."""

import functools
import importlib.util

import jax
import numpy as np
import pytest

import shrinkmeta as sm
from experiments.datasets.source import Problem, Protocol, Source
from experiments.frameworks import plain, training

SHAPES = {
  "mlp": plain.Shape("mlp", (4, 4, 1), 3, features=4, blocks=1, dropout=0.5),
  "cnn": plain.Shape("cnn", (5, 5, 1), 3, features=4, blocks=1, dropout=0.5),
}


def draw(shape, data, number, key):
  """A task of random pictures with random classes."""
  x = jax.random.normal(key, (12, *shape))
  y = jax.random.randint(key, (12,), 0, 3)
  return sm.Task(sm.Batch(x[:6], y[:6]), sm.Batch(x[6:], y[6:]))


def problem(shape):
  tasks = Source(draw, shape, None)
  protocol = Protocol("", "", 3, 2, 2, "", "")
  return Problem(tasks, tasks, tasks, "categorical", 3, shape, protocol)


def written(name, kind):
  if name in ("equinox", "haiku") and importlib.util.find_spec(name) is None:
    pytest.skip(f"{name} is not installed")
  return training.frameworks()[name](SHAPES[kind], plain.start(SHAPES[kind], 0))


def loss(name, kind, norm="running", updates=3):
  network = written(name, kind)
  tasks = problem(SHAPES[kind].inputs)
  return training.train(network, tasks, norm, False, updates=updates, tasks=2, seed=0)[0]


@functools.cache
def of_plain(kind):
  return loss("plain", kind)


@pytest.mark.parametrize("kind", ["mlp", pytest.param("cnn", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ("linen", "nnx", "equinox", "haiku"))
def test_every_framework_learns_the_same(name, kind):
  """With running statistics: `refresh` takes those of the batch, `update` the running ones."""
  assert np.isfinite(of_plain(kind))
  assert abs(loss(name, kind) - of_plain(kind)) < 1e-5


def test_the_loss_depends_on_whose_statistics_are_taken():
  assert abs(loss("plain", "mlp", "batch") - of_plain("mlp")) > 1e-3


@pytest.mark.parametrize("name", ("plain", "linen", "nnx", "equinox", "haiku"))
def test_a_key_drops_features_and_none_does_not(name):
  network = written(name, "mlp")
  x = jax.random.normal(jax.random.key(0), (6, *SHAPES["mlp"].inputs))
  logits = lambda key: network.apply(network.params, x, network.statistics, key, True)[0]
  keys = jax.random.split(jax.random.key(1), 10_000)
  whole = network.apply(network.params, x, network.statistics, None, True)[0]
  drawn = np.asarray(jax.jit(jax.vmap(logits))(keys), float)
  # The head is linear, so the expectation over masks is the network without dropout. A mean of
  # 10,000 draws lies within 5 of its standard errors but once in a million.
  error = drawn.std(0) / np.sqrt(len(keys))
  assert (error > 0).all() and error.max() < 0.025
  assert (np.abs(drawn.mean(0) - whole) < 5 * error).all()


@pytest.mark.parametrize("kinds", ("", "rnn"))
def test_other_kinds_than_there_are(command, kinds):
  done = command("frameworks", f"--kinds={kinds}")
  told = " ".join((done.stderr + done.stdout).split())
  assert done.returncode == 1 and f"--kinds is a list of mlp and cnn; got '{kinds}'" in told
