"""The tables of results/, and the main job `glyphs`, as settings.

Size "cpu" is for two CPU cores. "full" has the published sizes and is for a GPU. Some algorithms
of few_shot and of alphabets have been run at size "full", no other table has. "smoke" is for tests,
and its figures mean nothing.

An arm has the settings that `experiments.tune` chose for it. Without a search, it has the settings
of arms.py and of this file, from which searches start.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import ml_collections

from experiments.settings import arms, schema, tuned
from experiments.settings.schema import Config

SIZES = ("cpu", "full", "smoke")


def _table(size: str, **changes: Any) -> Config:
  """Return the settings that all tables share, with `changes`."""
  config = {
    "compute": "float32",
    "cg_steps": 10,
    "cg_tol": 1e-3,
    "cg_batch": 0,
    "arms": arms.start(),
    "network": {"kind": "conv", "features": 64 if size == "full" else 16, "norm": "batch"},
    "meta_steps": 1_000 if size == "full" else 120,
    "meta_batch": 20 if size == "full" else 4,
    "validation_episodes": 8,
    "report_step": 100,
    "fixed": (),
  }
  return ml_collections.ConfigDict(config | changes)


def _blocks(config: Config) -> Config:
  """Give a layer and its norm one sigma in sigma_imaml and sigma_reptile.

  If each norm has its own sigma, seeds disagree on the order of the norms, which have 32 numbers
  each. meta_sgd and sigma_maml take the same steps, without and with a prior. They keep one rate
  for each layer.
  """
  for name in ("sigma_imaml", "sigma_reptile"):
    config.arms[name].modules = "block"
  return config


def glyphs(size: str) -> Config:
  """The main job: episodes of writing systems drawn from fonts; tests use unseen systems."""
  ways, shots, pixels = {"cpu": (20, 3, 14), "full": (20, 5, 28), "smoke": (5, 1, 8)}[size]
  problem = {"name": "writing_systems", "dataset": "glyphs", "ways": ways, "shots": shots}
  problem |= {"queries": 2 if size == "smoke" else shots, "size": pixels}
  episodes = 100 if size == "full" else 24
  config = _table(
    size,
    problem=problem,
    meta_steps=1_000 if size == "full" else 200,
    test_episodes=episodes,
    validation_episodes=episodes,
    adapt_steps=(0, 1, 3, 10, 30, 100, 300, 1_000),
    report_step=1_000,
    evaluation={"key": 20_000, "block": 8, "over": "writing systems"},
  )
  if size == "smoke":
    config.network.features = 4
  return config


def _long(config: Config) -> Config:
  """Use inner steps on batches of 20, as published for long adaptation.

  The inner rate of arms with a prior decays at the start of a search. At the mode, gradients of
  single batches are not 0, so a constant rate ends in noise around it.
  """
  for name, arm in config.arms.items():
    arm.batch_size = 20
    if name in ("imaml", "sigma_imaml", "sigma_maml", "sigma_reptile"):
      arm.inner_decay = 10
  return config


def alphabets(size: str) -> Config:
  """Omniglot's alphabets with augmentation and long adaptation."""
  problem = {"name": "omniglot_alphabets", "train_alphabets": 25, "relabel": False, "size": 28}
  if size != "full":
    problem |= {"size": 14, "copies": 1}
  steps = (0, 1, 3, 10, 30, 100, 300)
  config = _blocks(_table(size, problem=problem, test_episodes=10, adapt_steps=steps))
  config.update({"fixed": ("batch_size",), "cg_batch": 60})
  if size == "cpu":
    config.meta_steps = 240  # rotated drawings are hard: after 120 all arms are near chance
  return _long(config)


def small_data(shots: int, size: str) -> Config:
  """Omniglot's alphabets with `shots` drawings of each character, without augmentation."""
  problem = {"name": "omniglot_alphabets", "train_alphabets": 25, "relabel": False}
  problem |= {"shots": shots, "augment": False, "size": 28 if size == "full" else 14}
  steps = (0, 1, 10, 100, 400, 1_000)
  config = _table(size, problem=problem, test_episodes=10, adapt_steps=steps, report_step=400)
  return _long(_blocks(config))


def few_shot(size: str) -> Config:
  """5-way 1-shot episodes of Omniglot's characters."""
  return _episodes(size, {"name": "omniglot_few_shot", "size": 28 if size == "full" else 14}, True)


def photographs(name: str, pixels: int, size: str) -> Config:
  """5-way 1-shot episodes of a set of photographs, `pixels` x `pixels` in size "full"."""
  return _episodes(size, {"name": name, "size": pixels if size == "full" else 32}, False)


def _episodes(size: str, problem: dict[str, Any], turns: bool) -> Config:
  shape = {"ways": 5, "shots": 1, "queries": 15, "turns": turns}
  config = _table(
    size,
    problem=problem | {"shape": shape},
    meta_steps=2_000 if size == "full" else 250,
    test_episodes=600 if size == "full" else 200,
    validation_episodes=100,
    adapt_steps=(0, 1, 3, 5, 10, 30, 100),
    report_step=10,
  )
  return _blocks(config)


def sinusoid(size: str) -> Config:
  """Regression of sinusoids."""
  config = _table(
    size,
    problem={"name": "sinusoid", "shots": 10, "noise": 0.0, "scale": 0.3},
    network={"kind": "mlp", "width": 40},
    meta_steps=10_000 if size == "full" else 2_000,
    meta_batch=25,
    test_episodes=200,
    validation_episodes=100,
    adapt_steps=(0, 1, 5, 10, 30, 100, 300, 1_000),
    report_step=100,
  )
  config.arms.hand_picked.task_specific = "out"
  # Where a likelihood has a standard deviation of 0.3, 0.002 is a rate of 0.01 for squared errors.
  for arm in config.arms.values():
    if arm.inner == "sgd":
      arm.inner_rate = 0.002
  # Short of the mode an implicit gradient is wrong: 5 examples, 30 steps, 3 to 10 nats; 120, 1.1.
  for name in ("imaml", "sigma_imaml", "sigma_reptile"):
    config.arms[name].inner_steps = 60
  config.arms.meta_sgd.update({"inner_rate": 1.0, "init_sigma": 0.002**0.5})
  return config


def spoken_digits(size: str) -> Config:
  """Ten spoken words; a task is one of 30 voices, 6 for validation and 6 for tests."""
  problem = {"name": "spoken_digits", "shots": 1, "pool": 1 if size == "full" else 2}
  steps = (0, 1, 3, 10, 30, 100, 300)
  config = _table(size, problem=problem, validation_episodes=6, test_episodes=6, adapt_steps=steps)
  return _blocks(config)


TABLES: dict[str, Callable[[str], Config]] = {
  "glyphs": glyphs,
  "alphabets": alphabets,
  "small_data": functools.partial(small_data, 5),
  "more_data": functools.partial(small_data, 10),
  "few_shot": few_shot,
  "sinusoid": sinusoid,
  "grocery": functools.partial(photographs, "grocery", 84),
  "mini_imagenet": functools.partial(photographs, "mini_imagenet", 84),
  "tiered_imagenet": functools.partial(photographs, "tiered_imagenet", 84),
  "cifar_fs": functools.partial(photographs, "cifar_fs", 32),
  "spoken_digits": spoken_digits,
}


def load(
  table: str,
  size: str,
  overrides: Sequence[str] = (),
  use_tuned: bool = True,
  names: Sequence[str] | None = None,
) -> Config:
  """Return the settings of a table with `overrides` such as "meta_steps=100" or "problem.shots=3".

  Args:
    table: one of TABLES.
    size: one of SIZES.
    overrides: changes in the form of the flag --set.
    use_tuned: False takes the settings from which searches start.
    names: the algorithms that are trained; None stands for all. The other arms have the settings
      from which searches start, so their searches are no reason to refuse a problem.

  Raises:
    ValueError: a name or value is wrong, or settings may have been chosen on the test tasks.
  """
  if table not in TABLES or size not in SIZES:
    raise ValueError(
      f"A table is one of {', '.join(TABLES)} and a size one of {', '.join(SIZES)}; got "
      f"{table!r} and {size!r}."
    )
  schema.check_changes(overrides)
  config = TABLES[table](size)
  config.table, config.size = table, size
  if size == "smoke":
    steps = tuple(config.adapt_steps[:3])
    small = {"meta_steps": 3, "test_episodes": 4, "validation_episodes": 2, "cg_steps": 3}
    config.update({**small, "meta_batch": 2, "adapt_steps": steps, "report_step": steps[-1]})
    for arm in config.arms.values():
      arm.inner_steps = 2
  searches = tuned.apply(config, list(config.arms) if names is None else names) if use_tuned else {}
  schema.check(schema.override(config, overrides))
  tuned.describe(config, searches)
  return config
