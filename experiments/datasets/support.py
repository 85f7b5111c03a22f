"""Tasks whose network may take batch statistics from the support set alone.

The support set is what a task adapts on. Its examples stand beside those to be judged by, masked
out, so that a prediction depends on them and on its own input, but on no other to be judged by.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from experiments.datasets.source import Problem, Source, example_weights
from shrinkmeta import Batch, Task


def beside(problem: Problem) -> Problem:
  """Inputs become {"x": [N, ...], "support": weights [N]}; val leads with the rows of train.

  A support weight is a row's mask in train, and 0 for what is judged; the mask of val is 0 for the
  rows of train. Mini-batches of train have the statistics of the mini-batch.
  """
  train, validation, test = map(_beside, (problem.train, problem.validation, problem.test))
  return problem._replace(train=train, validation=validation, test=test)


def _beside(source: Source) -> Source:
  return dataclasses.replace(source, draw=_draw, config=(source.draw, source.config))


def _draw(config: Any, data: Any, number: jax.Array, key: jax.Array) -> Task:
  draw, own = config
  train, val = draw(own, data, number, key)
  support, judged = (example_weights(batch, jnp.float32) for batch in (train, val))
  join = lambda a, b: jax.tree.map(lambda *x: jnp.concatenate(x), a, b)
  inputs = {
    "x": join(train.inputs, val.inputs),
    "support": join(support, jnp.zeros_like(judged)),
  }
  both = Batch(inputs, join(train.targets, val.targets), join(jnp.zeros_like(support), judged))
  return Task(train._replace(inputs={"x": train.inputs, "support": support}), both)
