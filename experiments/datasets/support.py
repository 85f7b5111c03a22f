"""Tasks whose network takes its batch statistics from the support set alone.

The support set is the train part of a task, on which it adapts. The queries are its val part. The
support examples are put into the val part too, masked out. So a prediction depends on the support
set and on its own input, but on no other query.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from experiments.datasets.source import Problem, Source, example_weights
from shrinkmeta import Batch, Task


def beside(problem: Problem) -> Problem:
  """Return the problem with inputs {"x": [N, ...], "support": weights [N]}.

  The weight of a support example is its mask in train, and that of a query is 0. The val part
  begins with the examples of train, whose mask there is 0. A mini-batch of train has the statistics
  of the mini-batch.
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
