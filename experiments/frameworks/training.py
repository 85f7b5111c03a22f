"""Train the network of a framework on tasks; the learner is the same in every framework."""

import importlib.util
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import shrinkmeta as sm
from experiments.datasets.source import Problem, sample_tasks
from experiments.frameworks import plain, with_flax
from experiments.frameworks.plain import Shape, Written

PyTree = Any
# Compiled once for all frameworks.


def frameworks() -> dict[str, Callable[[Shape, PyTree], Written]]:
  """Return the frameworks that are installed; flax always is, because the library needs it."""
  found = {"plain": plain.build, "linen": with_flax.linen, "nnx": with_flax.in_nnx}
  if importlib.util.find_spec("equinox"):
    from experiments.frameworks import with_equinox

    found["equinox"] = with_equinox.build
  if importlib.util.find_spec("haiku"):
    from experiments.frameworks import with_haiku

    found["haiku"] = with_haiku.build
  return found


def likelihood(written: Written, norm: str, dropout: bool) -> sm.Likelihood:
  """Return the likelihood of a network, with batch norm by the batch or by running statistics."""

  def by_batch(theta: PyTree, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
    return written.apply(theta, x, written.statistics, key, True)[0]

  def by_constants(
    theta: PyTree, x: jax.Array, constants: PyTree, key: jax.Array | None = None
  ) -> jax.Array:
    return written.apply(theta, x, constants, key, False)[0]

  made = sm.categorical(by_constants if norm == "running" else by_batch)
  return sm.with_randomness(made) if dropout else made


def train(
  written: Written, problem: Problem, norm: str, dropout: bool, updates: int, tasks: int, seed: int
) -> tuple[float, sm.MetaState]:
  """Run sigma_maml, and return the last validation loss in nats per example and the state.

  `norm` is "batch" or "running". An update first renews the running statistics from its training
  inputs, and then changes phi.
  """
  learner = sm.sigma_maml(
    likelihood(written, norm, dropout),
    sm.by_layer(written.params),
    inner=sm.Inner(optax.sgd(0.05), 3),
    phi_optimizer=optax.sgd(0.05),
    sigma_optimizer=optax.sgd(0.05),
  )
  running = norm == "running"
  state = learner.init(written.params, written.statistics if running else None)

  def statistics(phi: PyTree, x: jax.Array, constants: PyTree) -> PyTree:
    return written.apply(phi, x, constants, None, True)[1]

  @jax.jit
  def update(
    state: sm.MetaState, batch: sm.Task, key: jax.Array | None
  ) -> tuple[sm.MetaState, jax.Array]:
    state = learner.refresh(state, batch, statistics) if running else state
    state, metrics = learner.update(state, batch, key)
    return state, metrics.loss

  loss = jnp.nan
  for number in range(updates):
    batch = sample_tasks(problem.train, jax.random.key(seed), jnp.asarray(number * tasks), tasks)
    key = jax.random.fold_in(jax.random.key(seed + 1), number) if dropout else None
    state, loss = update(state, batch, key)
  return float(loss), state
