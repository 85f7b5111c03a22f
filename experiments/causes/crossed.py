"""The shared parameters of one run, adapted as another run adapts, with sigma multiplied.

If an algorithm predicts badly, either its phi or the way it adapts is at fault. Crossing two runs
tells which: the row (phi of A, adapted as B) has the phi of A, and the inner loop and sigma of B.
Multiplying sigma tells whether a different shrinkage would have predicted better from the same phi.
"""

import json
import math
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

import shrinkmeta as sm
from experiments.runs import pipeline, problems, store, training


class Row(NamedTuple):
  """Means over the tasks of a split, after a number of adaptation steps."""

  phi_of: str  # name of a run, ALGORITHM-SEED
  adapted_as: str
  sigma_factor: float
  step: int
  accuracy_percent: float
  nll_nats_per_example: float


def _common(run: store.Run) -> str:
  """Return the settings that crossed runs must share, as text."""
  config = run.config.to_dict()
  return json.dumps({name: config[name] for name in ("problem", "network")}, sort_keys=True)


def scaled(state: sm.MetaState, factor: float) -> sm.MetaState:
  """Return the state with every sigma multiplied by `factor`; 0 and infinity stay as they are."""
  change = lambda log_sigma2: log_sigma2 + 2 * math.log(factor)
  return state._replace(log_sigma2=jax.tree.map(change, state.log_sigma2))


def restored(
  folders: Sequence[pathlib.Path], data_dir: str | None
) -> tuple[list[store.Run], list[pipeline.Prepared], list[sm.MetaState]]:
  """Return (runs of one problem and one network, what they train, their last states).

  Raises:
    ValueError: the runs have different problems or networks, were trained on other data, or are not
      trained.
  """
  runs, abouts = zip(*map(store.read, folders), strict=True)
  for other in runs[1:]:
    if _common(other) != _common(runs[0]):
      raise ValueError(
        f"{runs[0].folder} and {other.folder} have different problems or networks: wanted runs of "
        "one table. Name runs from one folder."
      )
  problem = problems.make_problem(runs[0].config.problem.to_dict(), data_dir)
  for run, about in zip(runs, abouts, strict=True):
    store.check_data(run, about, problem)
  arms = [pipeline.prepare(run.arm, run.config, problem) for run in runs]
  return list(runs), arms, [store.restore(r, a).state for r, a in zip(runs, arms, strict=True)]


def cross(
  folders: Sequence[pathlib.Path],
  factors: Sequence[float],
  split: str,
  data_dir: str | None = None,
) -> list[Row]:
  """Adapt the phi of every run as every run adapts.

  Args:
    folders: runs of `experiments.train` on one problem with one network.
    factors: multiply sigma of the run that adapts; runs without a sigma have factor 1 alone.
    split: "validation" or "test".
    data_dir: the folder of the data.

  Raises:
    ValueError: the runs do not fit each other, or are not trained.
  """
  runs, arms, states = restored(folders, data_dir)
  rows: list[Row] = []
  for run, arm, own in zip(runs, arms, states, strict=True):
    has_sigma = sm.FAMILY[run.arm].sigma != "inf"
    for factor in factors if has_sigma else (1.0,):
      for other, learned in zip(runs, states, strict=True):
        state = scaled(own._replace(phi=learned.phi), factor)
        names = other.folder.name, run.folder.name
        found = pipeline.evaluate(arm, state, run.config, split, " as ".join(names))
        rows += _rows(names, factor, run.config.adapt_steps, found)
  return rows


def _rows(
  names: tuple[str, str], factor: float, steps: Sequence[int], found: training.Adapted
) -> list[Row]:
  means: Any = zip(steps, found.accuracy.mean(1), found.nll.mean(1), strict=True)
  return [Row(*names, factor, step, 100 * float(a), float(n)) for step, a, n in means]
