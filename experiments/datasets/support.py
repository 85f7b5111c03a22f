"""Tasks in which a network normalises by the statistics of the training examples alone.

The training examples (the support set) are added to the val part, with mask 0. So a prediction for
a val example (a query) depends on the training examples and its own input, and not on other
queries.
"""

import jax
import jax.numpy as jnp

from experiments.datasets.source import Problem, example_weights
from shrinkmeta import Batch, Task


def beside(problem: Problem) -> Problem:
  """Return the problem with inputs {"x": [N, ...], "support": weights [N]}.

  The weight of a training example is its mask, and that of a query is 0. The val part begins with
  the training examples, which have mask 0 there. A mini-batch of training examples is normalised by
  its own statistics.
  """
  sources = (problem.train, problem.validation, problem.test)
  train, validation, test = (source.mapped(_beside) for source in sources)
  return problem._replace(train=train, validation=validation, test=test)


def _beside(task: Task) -> Task:
  train, val = task
  support, judged = (example_weights(batch, jnp.float32) for batch in (train, val))
  join = lambda a, b: jax.tree.map(lambda *x: jnp.concatenate(x), a, b)
  inputs = {
    "x": join(train.inputs, val.inputs),
    "support": join(support, jnp.zeros_like(judged)),
  }
  both = Batch(inputs, join(train.targets, val.targets), join(jnp.zeros_like(support), judged))
  return Task(train._replace(inputs={"x": train.inputs, "support": support}), both)
