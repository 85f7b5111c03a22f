"""Sinusoid regression: how sure is a network after 5, 10 or 20 examples, and is it right to be?

    python -m experiments.sinusoid

Tasks are y = a sin(x - p) + noise, amplitude a in [0.1, 5], phase p in [0, pi], x in [-5, 5]. A
network 1-40-40-1 learns phi, sigma of every module and the noise from the evidence of tasks of 5 to
20 examples; on new tasks Laplace's posterior gives a 95 % interval for every further observation.
Prints how many fall inside, writes JSON and a picture.
"""

import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.figure
import numpy as np
import optax
from absl import app, flags
from tqdm import tqdm

import shrinkmeta as sm
from experiments.datasets.sinusoid import draw
from experiments.runs import files
from experiments.settings import machine

FLAGS = flags.FLAGS
NOISE, WIDTH, SHOTS = 0.3, 40, (5, 10, 20)
_LEVELS = (0.5, 0.8, 0.95)


def network(theta: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
  """(f [N], log sd of the noise []) for x [N, 1]."""
  h = jnp.tanh(x @ theta["hidden_0"]["kernel"] + theta["hidden_0"]["bias"])
  h = jnp.tanh(h @ theta["hidden_1"]["kernel"] + theta["hidden_1"]["bias"])
  return (h @ theta["out"]["kernel"] + theta["out"]["bias"])[:, 0], theta["log_noise"]


def init(key: jax.Array) -> Any:
  """Parameters of `network`."""
  sizes = (1, WIDTH, WIDTH, 1)
  params: dict[str, Any] = {"log_noise": jnp.zeros([])}
  names, keys = ("hidden_0", "hidden_1", "out"), jax.random.split(key, 3)
  for name, own, n, m in zip(names, keys, sizes[:-1], sizes[1:], strict=True):
    kernels, biases = jax.random.split(own)
    kernel = jax.random.normal(kernels, (n, m)) / n**0.5
    params[name] = {"kernel": kernel, "bias": 0.5 * jax.random.normal(biases, (m,))}
  return params


def make_learner(algorithm: str, params: Any, meta_steps: int) -> sm.MetaLearner:
  """The learner; the noise is a module with sigma 0, shared by all tasks."""
  labels = sm.by_path(params, {"log_noise": "noise", "hidden_0": "hidden_0", "hidden_1": "hidden_1",
                               "out": "out"})  # fmt: skip
  sigma = {"noise": 0.0, "hidden_0": 0.3, "hidden_1": 0.3, "out": 0.3}
  rate = optax.cosine_decay_schedule(3e-3, meta_steps, 0.05)
  clipped = optax.chain(optax.clip_by_global_norm(10.0), optax.adam(rate))
  # The evidence has its own gradient of the noise; the predictive likelihood needs the Hessian's,
  # which knows how theta_hat depends on it.
  own = {"empirical_bayes": {}, "sigma_imaml": {"implicit": sm.Implicit(curvature="hessian")}}
  return getattr(sm, algorithm)(
    sm.gaussian_with_scale(network),
    labels,
    inner=sm.Inner(optax.lbfgs(), steps=60, tol=1e-3),
    phi_optimizer=clipped,
    sigma_optimizer=optax.adam(1e-2),
    init_sigma=sigma,
    batching="vmap",
    **own[algorithm],
  )


class Judged(NamedTuple):
  """Of T tasks, at their validation rows."""

  mean: jax.Array  # [T, N]
  sd: jax.Array  # [T, N] of an observation, noise included
  noise: jax.Array  # []
  converged: jax.Array  # [T]


def judge(learner: sm.MetaLearner, state: sm.MetaState, train: sm.Batch, inputs: Any) -> Judged:
  """Mean and standard deviation of new observations at `inputs` [T, N, 1]."""
  likelihood = sm.gaussian_with_scale(network)
  # What is held is known here, so that the noise has no posterior.
  log_sigma2 = state.log_sigma2 | {"noise": -jnp.inf}

  def one(batch: sm.Batch, x: jax.Array) -> tuple[jax.Array, ...]:
    theta, info = learner.adapt(state, batch, 300)
    found = sm.posterior(likelihood, learner.labels, state.phi, log_sigma2, theta, batch)
    predictive = found.predictive(x)
    mean, noise = sm.mean_and_scale(predictive.mean)
    of_f = predictive.variance[:, 0] * noise**4  # from f / noise^2 to f
    return mean, jnp.sqrt(of_f + noise**2), noise[0], info.converged

  mean, sd, noise, converged = jax.jit(jax.vmap(one))(train, inputs)
  return Judged(mean, sd, noise[0], converged)


def train(algorithm: str, meta_steps: int, tasks: int, seed: int) -> tuple[Any, ...]:
  """(learner, state, last metrics)."""
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


def evaluate(learner: sm.MetaLearner, state: sm.MetaState, count: int, seed: int) -> list[dict]:
  """A row for each number of shots."""
  rows = []
  for shots in SHOTS:
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), 2), shots)
    data = draw(key, count, shots, NOISE)
    found = judge(learner, state, data.train, data.val.inputs)
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
        "coverage_95_half_width": float(1.96 * jnp.std(covered) / count**0.5),
        "coverage_without_posterior": float(
          sm.coverage(found.mean, jnp.full_like(y, found.noise), y)
        ),
        "modes_converged": float(jnp.mean(found.converged)),
      }
    )
  return rows


def plot(path: pathlib.Path, learner: Any, state: Any, rows: Sequence[dict], seed: int) -> None:
  """Two tasks at each number of shots, with the interval of new observations."""
  figure = matplotlib.figure.Figure(figsize=(9, 4.6), layout="constrained")
  axes = figure.subplots(2, len(SHOTS), sharex=True, sharey="row")
  x = jnp.linspace(-5, 5, 200)
  for column, (shots, row) in enumerate(zip(SHOTS, rows, strict=True)):
    data = draw(jax.random.fold_in(jax.random.key(seed), 3), 2, shots, NOISE)
    grid = jnp.broadcast_to(x[None, :, None], (2, x.size, 1))
    found = judge(learner, state, data.train, grid)
    for i, ax in enumerate(axes[:, column]):
      seen = np.asarray(data.train.mask)[i] > 0
      low, high = (found.mean[i] + sign * 1.96 * found.sd[i] for sign in (-1, 1))
      ax.fill_between(x, low, high, color="tab:blue", alpha=0.2, linewidth=0, label="95 %")
      ax.plot(x, data.amplitude[i] * jnp.sin(x - data.phase[i]), color="0.5", label="truth")
      ax.plot(x, found.mean[i], color="tab:blue", label=r"$f(\hat\theta)$")
      ax.plot(data.train.inputs[i, seen, 0], data.train.targets[i, seen], "k.", label="examples")
    covered = 100 * row["coverage"]["0.95"]
    axes[0, column].set_title(f"{shots} examples: {covered:.1f} % inside", fontsize=10)
    axes[1, column].set_xlabel("x")
  handles, names = axes[0, 0].get_legend_handles_labels()
  figure.legend(handles, names, fontsize=9, loc="outside lower center", ncols=4)
  with files.atomic(path) as temporary:
    figure.savefig(temporary, dpi=150, format="png")


def define_flags() -> None:
  """The binary's flags; others who import this file have names of their own."""
  flags.DEFINE_enum(
    "algorithm", "empirical_bayes", ["empirical_bayes", "sigma_imaml"], "What learns sigma."
  )
  flags.DEFINE_integer("meta_steps", 1_500, "Updates.", 1)
  flags.DEFINE_integer("tasks", 20, "Tasks an update.", 1)
  flags.DEFINE_integer("test_tasks", 200, "Held-out tasks for each number of shots.", 1)
  flags.DEFINE_integer("seed", 0, "Of parameters and tasks.")
  flags.DEFINE_string("out", "runs/sinusoid_evidence", "Folder for JSON and picture.")


def main(argv: Sequence[str]) -> None:
  """Reads the flags, once."""
  if len(argv) > 1:
    raise app.UsageError(f"Unexpected arguments: {argv[1:]}.")
  machine.start_jax()
  learner, state, metrics = train(FLAGS.algorithm, FLAGS.meta_steps, FLAGS.tasks, FLAGS.seed)
  rows = evaluate(learner, state, FLAGS.test_tasks, FLAGS.seed)
  out = pathlib.Path(FLAGS.out)
  sigma = {m: float(jnp.exp(0.5 * v)) for m, v in state.log_sigma2.items()}
  noise = float(jnp.exp(state.phi["log_noise"]))
  print("| shots | mse | nats | nats without posterior | inside 95 %, % | without posterior, % |")
  print("|---|---|---|---|---|---|")
  for row in rows:
    print(
      f"| {row['shots']} | {row['mse']:.3f} | {row['nll']:.3f} | {row['nll_without_posterior']:.3f}"
      f" | {100 * row['coverage']['0.95']:.1f} ± {100 * row['coverage_95_half_width']:.1f} | "
      f"{100 * row['coverage_without_posterior']:.1f} |"
    )
  print(f"noise {noise:.3f} (truth {NOISE}), sigma", {m: round(s, 3) for m, s in sigma.items()})
  config = {
    "algorithm": FLAGS.algorithm,
    "meta_steps": FLAGS.meta_steps,
    "tasks": FLAGS.tasks,
    "test_tasks": FLAGS.test_tasks,
    "seed": FLAGS.seed,
  }
  content = {
    "rows": rows,
    "sigma": sigma,
    "noise": noise,
    "last_loss": float(metrics.phi_loss),
    "config": config,
  }
  files.write_document(out / "sinusoid.json", content)
  plot(out / "sinusoid.png", learner, state, rows, FLAGS.seed)


if __name__ == "__main__":
  define_flags()
  app.run(main)
