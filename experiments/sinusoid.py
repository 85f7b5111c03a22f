"""Sinusoid regression: how sure is a network after 5, 10 or 20 examples, and is it right to be?

    python -m experiments.sinusoid

Tasks are y = a sin(x - p) + noise, with amplitude a in [0.1, 5], phase p in [0, pi] and x in [-5,
5]. A network 1-40-40-1 learns phi, sigma of every module and the noise. It maximises the evidence
of tasks with 5 to 20 examples. On new tasks Laplace's posterior gives a 95 % interval for every
further observation. The command prints how many observations lie in their interval, and writes JSON
and a picture.

The algorithm is empirical_bayes (the default) or sigma_imaml. By default an update has 20 tasks,
and the results go into runs/sinusoid_evidence.
"""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from absl import app, flags

from experiments.intervals import judge, picture
from experiments.intervals.model import ALGORITHMS
from experiments.runs import files
from experiments.settings import flags as shared
from experiments.settings import machine

_ALGORITHM = shared.algorithm()
_TASKS = shared.tasks()
_SEED = shared.seed()
_OUT = shared.out()
_META_STEPS = flags.DEFINE_integer("meta_steps", 1_500, "Number of updates.", 1)
_TEST_TASKS = flags.DEFINE_integer("test_tasks", 200, "New tasks for each number of shots.", 1)


def text(records: Sequence[Mapping[str, Any]]) -> str:
  """Return the records as a Markdown table."""
  lines = [
    "| shots | mse | nats | nats without posterior | inside 95 %, % | without posterior, % |",
    "|---|---|---|---|---|---|",
  ]
  for one in records:
    lines.append(
      f"| {one['shots']} | {one['mse']:.3f} | {one['nll']:.3f} | {one['nll_without_posterior']:.3f}"
      f" | {100 * one['coverage']['0.95']:.1f} ± {100 * one['coverage_95_half_width']:.1f} | "
      f"{100 * one['coverage_without_posterior']:.1f} |"
    )
  return "\n".join(lines)


def main(argv: Sequence[str]) -> None:
  """Read the flags, train, and count the observations in their intervals."""
  shared.no_arguments(argv)
  config = {
    "algorithm": shared.or_default(_ALGORITHM, ALGORITHMS[0]),
    "meta_steps": _META_STEPS.value,
    "tasks": shared.or_default(_TASKS, 20),
    "test_tasks": _TEST_TASKS.value,
    "seed": _SEED.value,
  }
  if config["algorithm"] not in ALGORITHMS:
    raise app.UsageError(
      f"--algorithm is one of {', '.join(ALGORITHMS)}; got {config['algorithm']!r}."
    )
  machine.start_jax()
  seed = config["seed"]
  learner, state, metrics = judge.train(
    config["algorithm"], config["meta_steps"], config["tasks"], seed
  )
  predict = judge.predictor(learner)
  records = judge.evaluate(predict, state, config["test_tasks"], seed)
  out = pathlib.Path(shared.or_default(_OUT, "runs/sinusoid_evidence"))
  sigma = {m: float(jnp.exp(0.5 * v)) for m, v in state.log_sigma2.items()}
  noise = float(jnp.exp(state.phi["log_noise"]))
  print(text(records))
  rounded = {m: round(s, 3) for m, s in sigma.items()}
  print(f"noise {noise:.3f} (truth {judge.NOISE}), sigma", rounded)
  content = {
    "rows": records,
    "sigma": sigma,
    "noise": noise,
    "last_loss": float(metrics.phi_loss),
    "config": config,
  }
  files.write_document(out / "sinusoid.json", content)
  picture.plot(out / "sinusoid.png", predict, state, records, seed)


if __name__ == "__main__":
  app.run(main)
