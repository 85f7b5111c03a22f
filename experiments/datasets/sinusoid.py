"""Sinusoids: y = a sin(x - p) + noise, a in [0.1, 5], p in [0, pi], x in [-5, 5], all uniform.

References: Finn, Abbeel and Levine, Model-agnostic meta-learning for fast adaptation of deep
  networks, ICML 2017, without noise.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from experiments.datasets.source import Problem, Protocol, Source
from shrinkmeta import Batch, Task

FEWEST, MOST = 5, 20  # examples to adapt on
QUERIES = 50  # examples to evaluate on


class Sinusoids(NamedTuple):
  """T tasks, each with MOST training examples (some may be masked) and QUERIES for evaluation."""

  train: Batch
  val: Batch
  amplitude: jax.Array  # [T]
  phase: jax.Array  # [T]


def draw(key: jax.Array, count: int, shots: int | None, noise: float) -> Sinusoids:
  """Draw `count` tasks of `shots` examples; None draws FEWEST to MOST for each task.

  With fewer shots, the tasks are the same and have fewer examples. `noise` is a standard deviation,
  in both parts.
  """
  keys = jax.random.split(key, 5)
  amplitude = jax.random.uniform(keys[0], (count,), minval=0.1, maxval=5.0)
  phase = jax.random.uniform(keys[1], (count,), maxval=jnp.pi)
  x = jax.random.uniform(keys[2], (count, MOST + QUERIES), minval=-5.0, maxval=5.0)
  y = amplitude[:, None] * jnp.sin(x - phase[:, None]) + noise * jax.random.normal(keys[3], x.shape)
  sizes = jax.random.randint(keys[4], (count,), FEWEST, MOST + 1)
  sizes = sizes if shots is None else jnp.full(count, shots)
  mask = (jnp.arange(MOST) < sizes[:, None]).astype(x.dtype)
  train = Batch(x[:, :MOST, None], y[:, :MOST], mask)
  return Sinusoids(train, Batch(x[:, MOST:, None], y[:, MOST:]), amplitude, phase)


@dataclasses.dataclass(frozen=True)
class _Config:
  shots: int | None
  noise: float


def _task(config: _Config, data: None, number: jax.Array, key: jax.Array) -> Task:
  del data, number  # made, not stored, and every index is another one
  train, val, _, _ = jax.tree.map(lambda x: x[0], draw(key, 1, config.shots, config.noise))
  if config.shots is not None:
    train = Batch(train.inputs[: config.shots], train.targets[: config.shots])
  return Task(train, val)


def problem(shots: int | None = 10, noise: float = 0.0, scale: float = 0.3) -> Problem:
  """Return regression tasks with a Gaussian likelihood.

  Train, validation and test share one source, so each needs its own key.

  Args:
    shots: the number of examples to adapt on, 1 to MOST; None draws FEWEST to MOST for each task.
    noise: the standard deviation of the noise in y, in both parts.
    scale: the standard deviation of the likelihood. Without noise, it sets how close a fit must be.
  """
  if shots is not None and not 1 <= shots <= MOST or noise < 0:
    raise ValueError(f"Sinusoids want 1 to {MOST} shots and noise >= 0; got {shots} and {noise}.")
  source = Source(_task, _Config(shots, noise), None)
  protocol = Protocol(
    data=f"sinusoids, noise {noise:g}, likelihood of standard deviation {scale:g}",
    split="none: every task is a new sinusoid",
    ways=None,
    shots=f"{FEWEST}-{MOST}" if shots is None else shots,
    queries=QUERIES,
    augmentation="none",
    evaluation="endless sinusoids, by index",
  )
  return Problem(source, source, source, "gaussian", 1, (1,), protocol, scale)
