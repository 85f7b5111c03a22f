"""Train, and measure the share of new observations that lie in the intervals."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

import shrinkmeta as sm
from experiments.datasets.sinusoid import draw
from experiments.intervals.model import init, make_learner, network
from experiments.report import statistics

NOISE, SHOTS = 0.3, (5, 10, 20)  # standard deviation of y; examples of a test task
_LEVELS = (0.5, 0.8, 0.95)


def train(algorithm: str, meta_steps: int, tasks: int, seed: int) -> tuple[Any, ...]:
  """Return (learner, state, metrics of the last update)."""
  key = jax.random.key(seed)
  params = init(jax.random.fold_in(key, 0))
  learner = make_learner(algorithm, params, meta_steps)

  @jax.jit
  def step(state: sm.MetaState) -> tuple[sm.MetaState, sm.Metrics]:
    data = draw(jax.random.fold_in(jax.random.fold_in(key, 1), state.step), tasks, None, NOISE)
    return learner.update(state, sm.Task(data.train, data.val))

  state, metrics = learner.init(params), None
  bar = tqdm(range(meta_steps), mininterval=5.0)
  for number in bar:
    state, metrics = step(state)
    if number % 100 == 0:
      bar.set_postfix(loss=f"{float(metrics.phi_loss):.3f}", failed=int(metrics.num_failed))
  return learner, state, metrics


class Judged(NamedTuple):
  """Predictions for T tasks at N inputs each."""

  mean: jax.Array  # [T, N]
  sd: jax.Array  # [T, N] of an observation, noise included
  noise: jax.Array  # []
  converged: jax.Array  # [T]


Predictor = Callable[[sm.MetaState, sm.Batch, jax.Array], Judged]


def predictor(learner: sm.MetaLearner) -> Predictor:
  """Return f(state, train, inputs [T, N, 1]), which predicts new observations at the inputs.

  It is compiled once for each shape of its arguments: batches of any number of examples are padded
  to one shape.
  """
  likelihood = sm.gaussian_with_scale(network)

  def one(state: sm.MetaState, batch: sm.Batch, x: jax.Array) -> tuple[jax.Array, ...]:
    # With sigma 0 the noise counts as known, and gets no posterior.
    log_sigma2 = state.log_sigma2 | {"noise": -jnp.inf}
    theta, info = learner.adapt(state, batch, 300)
    found = sm.posterior(likelihood, learner.labels, state.phi, log_sigma2, theta, batch)
    predictive = found.predictive(x)
    mean, noise = sm.mean_and_scale(predictive.mean)
    of_f = predictive.variance[:, 0] * noise**4  # from f / noise^2 to f
    return mean, jnp.sqrt(of_f + noise**2), noise[0], info.converged

  @jax.jit
  def predict(state: sm.MetaState, train: sm.Batch, inputs: jax.Array) -> Judged:
    mean, sd, noise, converged = jax.vmap(one, in_axes=(None, 0, 0))(state, train, inputs)
    return Judged(mean, sd, noise[0], converged)

  return predict


def evaluate(predict: Predictor, state: sm.MetaState, count: int, seed: int) -> list[dict]:
  """Return a record for each number of shots."""
  rows = []
  for shots in SHOTS:
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), 2), shots)
    data = draw(key, count, shots, NOISE)
    found = predict(state, data.train, data.val.inputs)
    y = data.val.targets
    by_task = lambda level, found=found, y=y: jax.vmap(lambda m, s, y: sm.coverage(m, s, y, level))(
      found.mean, found.sd, y
    )
    covered = by_task(0.95)
    rows.append(
      {
        "shots": shots,
        "mse": float(jnp.mean((found.mean - y) ** 2)),
        "nll": float(-jnp.mean(jax.scipy.stats.norm.logpdf(y, found.mean, found.sd))),
        "nll_without_posterior": float(
          -jnp.mean(jax.scipy.stats.norm.logpdf(y, found.mean, found.noise))
        ),
        "coverage": {str(level): float(jnp.mean(by_task(level))) for level in _LEVELS},
        "coverage_95_half_width": statistics.interval(np.asarray(covered))[1],
        "coverage_without_posterior": float(
          sm.coverage(found.mean, jnp.full_like(y, found.noise), y)
        ),
        "modes_converged": float(jnp.mean(found.converged)),
      }
    )
  return rows
