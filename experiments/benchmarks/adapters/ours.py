"""What this library does with the adapters of many tasks, as calls that can be timed."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import shrinkmeta as sm
from experiments.benchmarks.adapters.problem import Problem, log_prob
from experiments.networks import llama

Calls = dict[str, Callable[[], Any]]


def calls(problem: Problem) -> Calls:
  """Return {name: call}. A call returns logits [T, S, vocabulary], or the mean loss [].

  "base" is the base alone, and "mixed" one batch with a row of every task. "base, one token" and
  "mixed, one token" are the same with the first token of each row. "adapt" takes all steps of all
  tasks.
  """
  sizes, data = problem.sizes, problem.data
  network = lambda params, tokens: llama.apply(problem.config, params, tokens)
  likelihood = sm.Likelihood(sm.lora.attach(network), log_prob)
  learner = sm.reptile(
    likelihood,
    sm.lora.labels(problem.start),
    inner=sm.Inner(optax.sgd(sizes.rate), steps=sizes.steps),
    batching=8,  # eight tasks share each product with the base
  )
  state = learner.init(problem.start, constants=problem.base)
  own = sm.deltas(learner, state, problem.adapters, range(sizes.tasks)).anonymous()
  index = jnp.arange(sizes.tasks)
  base = jax.jit(network)
  mixed = jax.jit(lambda state, own, rows: sm.predict_tasks(likelihood, state, own, index, rows))
  one = problem.rows[:, :1]
  batch = sm.Batch(data[..., :-1], data[..., 1:])

  @jax.jit
  def adapt(state: sm.MetaState, batch: sm.Batch) -> jax.Array:
    thetas, _ = learner.adapt_tasks(state, batch)
    predict = lambda theta, inputs: likelihood.predict(theta, inputs, state.constants)
    losses = jax.vmap(lambda theta, b: -log_prob(predict(theta, b.inputs), b.targets))
    return jnp.mean(losses(thetas, batch))

  found = {
    "base": lambda: base(problem.base, problem.rows),
    "mixed": lambda: mixed(state, own, problem.rows),
    "base, one token": lambda: base(problem.base, one),
    "mixed, one token": lambda: mixed(state, own, one),
    "adapt": lambda: adapt(state, batch),
  }
  return {name: lambda call=call: np.asarray(call()) for name, call in found.items()}
