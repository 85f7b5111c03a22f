"""Curves that tests of the report share."""

import math

import numpy as np

from experiments.runs.results import Curve


def curve(algorithm="sigma_imaml", seed=0, num_episodes=6, **changes):
  rng = np.random.default_rng([seed, len(algorithm)])
  full = Curve(
    algorithm=algorithm,
    seed=seed,
    steps=np.array([0, 1, 10]),
    accuracy=rng.uniform(size=(3, num_episodes)),
    nll=rng.uniform(size=(3, num_episodes)),
    sigma={"head": math.inf, "conv_0": 0.0, "norm_0": 0.25},
    moved={"head": 0.5, "conv_0": 0.0, "norm_0": 0.125},
    sizes={"head": 1290, "conv_0": 320, "norm_0": 64},
    seconds={"train": 1.5},
    history={"step": [0, 10], "loss": [2.5, math.nan]},
  )
  return full._replace(**changes)


def rows(table):
  """Return the cells of the first Markdown table in a text, by their first column."""
  lines = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in table.splitlines()
    if line.startswith("|")
  ]
  return {line[0]: line[1:] for line in lines}
