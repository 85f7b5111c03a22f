"""A picture of tasks with the intervals of new observations."""

import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.figure
import numpy as np

from experiments.datasets.sinusoid import draw
from experiments.intervals.judge import NOISE, SHOTS, Predictor
from experiments.runs import files


def plot(
  path: pathlib.Path, predict: Predictor, state: Any, rows: Sequence[dict], seed: int
) -> None:
  """Draw two tasks at each number of shots, with the 95 % interval of new observations."""
  figure = matplotlib.figure.Figure(figsize=(9, 4.6), layout="constrained")
  axes = figure.subplots(2, len(SHOTS), sharex=True, sharey="row")
  x = jnp.linspace(-5, 5, 200)
  for column, (shots, row) in enumerate(zip(SHOTS, rows, strict=True)):
    data = draw(jax.random.fold_in(jax.random.key(seed), 3), 2, shots, NOISE)
    grid = jnp.broadcast_to(x[None, :, None], (2, x.size, 1))
    found = predict(state, data.train, grid)
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
