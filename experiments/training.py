"""Trains one learner on episodes, and adapts it to episodes of unseen writing systems."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

import shrinkmeta as sm
from shrinkmeta.modules import gather

PyTree = Any
Episodes = Callable[[Any, int], sm.Task]  # (first index, number of tasks) -> tasks [T]
Log = Callable[[int, dict[str, float]], None]


class Trained(NamedTuple):
  """A trained state with its history."""

  state: sm.MetaState
  history: dict[str, list[float]]
  seconds: dict[str, float]


class Adapted(NamedTuple):
  """E test episodes at S adaptation steps."""

  accuracy: np.ndarray  # [S, E]
  nll: np.ndarray  # [S, E] nats an example
  moved: dict[str, float]  # module -> rms(theta - phi) after the last step
  seconds: dict[str, float]


def host_mesh(num_tasks: int) -> jax.sharding.Mesh | None:
  """A mesh of the largest number of devices that divides num_tasks; None where that is one."""
  count = max(d for d in range(1, jax.device_count() + 1) if num_tasks % d == 0)
  return None if count == 1 else sm.task_mesh(jax.devices()[:count])


def train(
  learner: sm.MetaLearner,
  params: PyTree,
  episodes: Episodes,
  meta_steps: int,
  meta_batch: int,
  name: str,
  log: Log,
) -> Trained:
  """`meta_steps` updates; update i sees episodes i * meta_batch to (i + 1) * meta_batch - 1."""
  state = learner.init(params)
  if (mesh := host_mesh(meta_batch)) is not None:
    # Where update leaves it, so that it compiles once and not twice.
    state = jax.device_put(state, jax.NamedSharding(mesh, jax.P()))
  update = jax.jit(learner.update)
  history: dict[str, list[float]] = {}
  begin, compiled = time.perf_counter(), 0.0
  with tqdm.trange(meta_steps, desc=f"{name}: train", unit="step", dynamic_ncols=True) as bar:
    for i in bar:
      state, metrics = update(state, episodes(i * meta_batch, meta_batch))
      # Reading the metrics waits for the step. On a CPU two programs with a collective must not
      # be in flight at once: host devices share one thread pool and could wait for each other.
      row = _row(state, metrics)
      if i == 0:
        compiled = time.perf_counter() - begin
      for key, value in row.items():
        history.setdefault(key, []).append(value)
      log(i, row)
      bar.set_postfix(loss=f"{row['loss']:.3f}", refresh=False)
      if row["failed"] == meta_batch:
        raise FloatingPointError(
          f"{name}: no task of meta-step {i} gave a finite gradient. Lower the inner step size "
          f"(--set=arms.{name}.inner_rate=...), or init_sigma; a gradient through Adam's steps "
          "needs inner=smooth_adam."
        )
  seconds = {"compile": compiled, "train": time.perf_counter() - begin - compiled}
  return Trained(state, {"step": [float(i) for i in range(meta_steps)], **history}, seconds)


def _row(state: sm.MetaState, metrics: sm.Metrics) -> dict[str, float]:
  """The numbers of one meta-step that are logged and kept."""
  metrics, log_sigma2 = jax.device_get((metrics, state.log_sigma2))
  row = {
    "loss": metrics.loss,
    "failed": metrics.num_failed,
    "phi_grad_norm": metrics.phi_grad_norm,
    "inner_objective": metrics.inner.objective.mean(),
  }
  if metrics.solve is not None:  # a row with a mode
    row["inner_grad_norm"] = metrics.inner.grad_norm.mean()
    row["solve_residual"] = metrics.solve.residual.mean()
    row["solve_steps"] = metrics.solve.steps.mean()
    row["negative_curvature"] = metrics.solve.negative_curvature.sum()
  sigma = {module: np.exp(0.5 * v) for module, v in log_sigma2.items()}
  row |= {f"sigma/{module}": value for module, value in sigma.items() if np.isfinite(value)}
  return {key: float(value) for key, value in row.items()}


def adapt(
  learner: sm.MetaLearner,
  likelihood: sm.Likelihood,
  state: sm.MetaState,
  episodes: Episodes,
  num_episodes: int,
  steps: tuple[int, ...],
  block: int,
  name: str,
) -> Adapted:
  """One run of adaptation an episode, judged on its val part at each of `steps`."""

  def one(state: sm.MetaState, task: sm.Task) -> tuple[tuple[()], Any]:
    thetas, _ = learner.adapt(state, task.train, steps)

    def judge(theta: PyTree) -> tuple[jax.Array, jax.Array]:
      logits = likelihood.predict(theta, task.val.inputs)
      right = jnp.argmax(logits, -1) == task.val.targets
      return jnp.mean(right), -jnp.mean(likelihood.log_prob(logits, task.val.targets))

    accuracy, nll = jax.lax.map(judge, thetas)  # in sequence: see batching.py on CPUs
    last = jax.tree.map(lambda x, p: jnp.mean(jnp.square(x[-1] - p)), thetas, state.phi)
    return (), (accuracy, nll, last)

  begin = time.perf_counter()
  starts = range(0, num_episodes, block)
  mesh = host_mesh(block)

  @jax.jit
  def run(state: sm.MetaState, tasks: sm.Task) -> Any:
    return sm.over_tasks(one, state, tasks, mesh=mesh)[1]

  blocks = []
  for start in tqdm.tqdm(starts, desc=f"{name}: adapt", unit="block", dynamic_ncols=True):
    blocks.append(jax.device_get(run(state, episodes(start, block))))
  accuracy, nll, square = jax.tree.map(lambda *x: np.concatenate(x)[:num_episodes], *blocks)
  sizes = gather(jax.tree.map(jnp.size, state.phi), learner.labels)
  total = jax.tree.map(lambda s, p: p.size * s.mean(), square, state.phi)
  total = gather(total, learner.labels)
  moved = {m: float(np.sqrt(total[m] / sizes[m])) for m in sizes}
  return Adapted(accuracy.T, nll.T, moved, {"adapt": time.perf_counter() - begin})
