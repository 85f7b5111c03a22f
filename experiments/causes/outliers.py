"""How far does the gradient of one task drown the others?

An update follows the mean of the gradients of some tasks. If a few of these are many times as long
as the rest, the mean points where those few point. This module measures how long the gradients of
single tasks are, and how well the means over two halves of the tasks agree. The gradients are those
of each run's algorithm, at the first parameters and at the phi of each run.
"""

import math
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.flatten_util import ravel_pytree

import shrinkmeta as sm
from experiments.causes import crossed
from experiments.datasets.source import sample_tasks
from experiments.runs import pipeline

TASKS = 192
_START, _TASKS = 31_000, 32_000  # seeds of the first parameters and of the tasks


class Row(NamedTuple):
  """The gradients of one algorithm at one phi.

  Attributes:
    phi_of: the name of a run, ALGORITHM-SEED, or "start".
    gradient_of: the name of the run whose algorithm, sigma and clip give the gradients.
    clip: the largest norm of the gradient of a task in an update; 0: no limit.
    median_norm: the median of |g_t| over tasks, before it is clipped.
    largest_over_median: the largest |g_t|, divided by the median.
    cosine_of_halves: between the means over two halves of the tasks, clipped as in an update.
    tasks_until_signal: the number of tasks at which the variance of their mean gradient is as large
      as the square of the expected gradient; NaN if the two halves point away from each other.
  """

  phi_of: str
  gradient_of: str
  clip: float
  median_norm: float
  largest_over_median: float
  cosine_of_halves: float
  tasks_until_signal: float


def compare(
  folders: Sequence[pathlib.Path], tasks: int = TASKS, data_dir: str | None = None
) -> list[Row]:
  """Measure the gradients of every run's algorithm, at the start and at the phi of every run.

  Args:
    folders: runs of `experiments.train` on one problem with one network.
    tasks: the number of training tasks, an even one.
    data_dir: the folder of the data.

  Raises:
    ValueError: the number is odd, or the runs do not fit each other or are not trained.
  """
  if tasks % 2:
    raise ValueError(f"--tasks is an even number, for two halves; got {tasks}.")
  runs, arms, states = crossed.restored(folders, data_dir)
  start = arms[0].model.init(jax.random.key(_START))
  phis = {"start": start} | {r.folder.name: s.phi for r, s in zip(runs, states, strict=True)}
  rows = []
  for run, arm, own in zip(runs, arms, states, strict=True):
    gradient = jax.jit(arm.learner.meta_gradient)
    for name, phi in phis.items():
      found = _measured(arm, gradient, own._replace(phi=phi), tasks, run.config.arms[run.arm])
      rows.append(Row(name, run.folder.name, *found))
  return rows


def _measured(
  arm: pipeline.Prepared, gradient: Any, state: sm.MetaState, tasks: int, settings: Any
) -> tuple[float, ...]:
  """Return the numbers of a Row."""
  half, keys = tasks // 2, jax.random.split(jax.random.key(_TASKS))
  mesh = arm.learner.spec.mesh
  devices = 1 if mesh is None else mesh.size
  share = -(-half // devices) * devices  # tasks without examples fill up the devices, and fail
  state, of_batches = sm.place_state((state, keys[1]), mesh)
  drawn = [sample_tasks(arm.problem.train, keys[0], first, half) for first in (0, half)]
  placed = [sm.place_tasks(part, mesh, share) for part in drawn]
  means, reports = zip(*(gradient(state, part, of_batches) for part in placed), strict=True)
  a, b = (np.asarray(ravel_pytree(mean)[0], np.float64) for mean in means)
  norms = np.concatenate([np.asarray(r.task_grad_norm, np.float64)[~r.failed] for r in reports])
  clip = settings.get("clip", 0.0)
  signal = float(a @ b)  # its expectation is the square of the expected gradient
  spread = float(np.mean(np.minimum(norms, clip or math.inf) ** 2)) - signal
  median = float(np.median(norms))
  cosine = signal / float(np.linalg.norm(a) * np.linalg.norm(b))
  return clip, median, norms.max() / median, cosine, spread / signal if signal > 0 else math.nan
