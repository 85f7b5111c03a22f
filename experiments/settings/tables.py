"""The tables of RESULTS.md as data: tasks, network, sizes and the settings of every arm.

Size "cpu" is for two CPU cores, "full" has the published sizes and is for a GPU; "smoke" is for
tests, and its figures mean nothing. "full" has not been run.

An arm has the settings that `experiments.tune` chose for it, tuned/TABLE-SIZE/ARM.json, and where
there are none the settings here, from which searches start.
"""

import functools
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ml_collections

from experiments.settings import schema
from experiments.settings.schema import Config

SIZES = ("cpu", "full", "smoke")
TUNED = "shrinkmeta.experiments.tuned/1"  # format of the files of chosen settings


def _table(size: str, **changes: Any) -> Config:
  """What the tables have in common."""
  config = schema.default().to_dict()
  kept = ("compute", "cg_steps", "cg_tol", "cg_batch", "arms")
  config = {key: config[key] for key in kept} | {
    "network": {"kind": "conv", "features": 64 if size == "full" else 16, "norm": "batch"},
    "meta_steps": 1_000 if size == "full" else 120,
    "meta_batch": 20 if size == "full" else 4,
    "validation_episodes": 8,
    "report_step": 100,  # of adaptation; by it settings are chosen
    "fixed": (),  # settings of arms that the protocol fixes, and searches leave
  }
  made: Config = ml_collections.ConfigDict(config | changes)
  if made.network.kind == "conv":
    # Seeds disagree on the order of norms by themselves, of 32 numbers each. meta_sgd and
    # sigma_maml, the same steps without a prior and with one, keep a rate a layer.
    for name in ("sigma_imaml", "sigma_reptile"):
      made.arms[name].modules = "block"
  return made


def _long(config: Config) -> Config:
  """Inner steps on batches of 20, as published for long adaptation.

  Arms with a prior begin with a rate that decays, since at the mode the gradients of single batches
  are not 0 and a constant rate ends in noise around it.
  """
  for name, arm in config.arms.items():
    arm.batch_size = 20
    if name in ("imaml", "sigma_imaml", "sigma_maml", "sigma_reptile"):
      arm.inner_decay = 10
  return config


def alphabets(size: str) -> Config:
  """Augmented Omniglot, long adaptation."""
  problem = {"name": "omniglot_alphabets", "train_alphabets": 25, "relabel": False, "size": 28}
  if size != "full":
    problem |= {"size": 14, "copies": 1}
  steps = (0, 1, 3, 10, 30, 100, 300)
  config = _table(size, problem=problem, test_episodes=10, adapt_steps=steps)
  config.update({"fixed": ("batch_size",), "cg_batch": 60})
  if size == "cpu":
    config.meta_steps = 240  # rotated drawings are hard: after 120 all arms are near chance
  return _long(config)


def small_data(shots: int, size: str) -> Config:
  """`shots` drawings of each character, without augmentation."""
  problem = {"name": "omniglot_alphabets", "train_alphabets": 25, "relabel": False}
  problem |= {"shots": shots, "augment": False, "size": 28 if size == "full" else 14}
  steps = (0, 1, 10, 100, 400, 1_000)
  return _long(_table(size, problem=problem, test_episodes=10, adapt_steps=steps, report_step=400))


def few_shot(size: str) -> Config:
  """5-way 1-shot episodes of Omniglot's characters."""
  return _episodes(size, {"name": "omniglot_few_shot", "size": 28 if size == "full" else 14}, True)


def photographs(name: str, pixels: int, size: str) -> Config:
  """5-way 1-shot episodes of a set of photographs of `pixels` x `pixels`."""
  return _episodes(size, {"name": name, "size": pixels if size == "full" else 32}, False)


def _episodes(size: str, problem: dict[str, Any], turns: bool) -> Config:
  shape = {"ways": 5, "shots": 1, "queries": 15, "turns": turns}
  return _table(
    size,
    problem=problem | {"shape": shape},
    meta_steps=2_000 if size == "full" else 250,
    test_episodes=600 if size == "full" else 200,
    validation_episodes=100,
    adapt_steps=(0, 1, 3, 5, 10, 30, 100),
    report_step=10,
  )


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
  config.arms.sigma_maml.inner_rate = 0.02
  # Short of the mode an implicit gradient is wrong: 5 examples, 30 steps, 3 to 10 nats; 120, 1.1.
  for name in ("imaml", "sigma_imaml", "sigma_reptile"):
    config.arms[name].inner_steps = 60
  config.arms.meta_sgd.update({"inner_rate": 1.0, "init_sigma": 0.002**0.5})
  return config


def spoken_digits(size: str) -> Config:
  """Ten spoken words, a task a voice, of which there are 6 to validate and 6 to test."""
  problem = {"name": "spoken_digits", "shots": 1}
  steps = (0, 1, 3, 10, 30, 100, 300)
  return _table(size, problem=problem, validation_episodes=6, test_episodes=6, adapt_steps=steps)


TABLES: dict[str, Callable[[str], Config]] = {
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


def chosen_file(table: str, size: str, arm: str) -> pathlib.Path:
  """Where the settings that were chosen for an arm are kept, with the search that chose them."""
  return pathlib.Path(__file__).parents[1] / "tuned" / f"{table}-{size}" / f"{arm}.json"


def load(table: str, size: str, overrides: Sequence[str] = (), tuned: bool = True) -> Config:
  """The settings of a table with `overrides` such as "meta_steps=100" or "problem.shots=3".

  Args:
    tuned: False for the settings that searches start from.

  Raises:
    ValueError: among others where the test tasks may be among those that settings were chosen on.
  """
  if table not in TABLES or size not in SIZES:
    raise ValueError(
      f"A table is one of {', '.join(TABLES)} and a size one of {', '.join(SIZES)}; got "
      f"{table!r} and {size!r}."
    )
  config = TABLES[table](size)
  config.table, config.size = table, size
  if size == "smoke":
    steps = tuple(config.adapt_steps[:3])
    small = {"meta_steps": 3, "test_episodes": 4, "validation_episodes": 2, "cg_steps": 3}
    config.update({**small, "meta_batch": 2, "adapt_steps": steps, "report_step": steps[-1]})
    for arm in config.arms.values():
      arm.inner_steps = 2
  searches = {}
  for name in config.arms if tuned else ():
    file = chosen_file(table, size, name)
    if file.exists():
      try:
        searches[name] = found = json.loads(file.read_text(encoding="utf-8"))
      except ValueError as error:
        raise ValueError(
          f"{file} cannot be read: {error}. Search anew, or --tuned=false."
        ) from error
      form = found.get("format") if isinstance(found, dict) else None
      if form != TUNED:
        raise ValueError(f"{file}: format is {form!r}; wanted {TUNED!r}.")
      settings = _settings(found)
      wanted = schema.without_search(config.arms[name].to_dict())
      if unlike := sorted(set(settings) ^ set(wanted)):
        raise ValueError(
          f"{file}: the settings of {name} are {', '.join(wanted)}; {', '.join(unlike)} is in one "
          "of the two alone. Search anew."
        )
      config.arms[name].update(settings)
  schema.check(schema.override(config, overrides))
  for name, found in searches.items():
    arm = config.arms[name]
    if all(arm[key] == value for key, value in _settings(found).items()):
      arm.trials = len(found["trials"])
      arm.searched_with = _difference(found["config"], config.to_dict(), name)
  return config


def _settings(found: Mapping[str, Any]) -> dict[str, Any]:
  """What a search chose, and beside it what it was started with."""
  return schema.without_search(found["start"] | found["chosen"])


def _difference(searched: Mapping[str, Any], now: Mapping[str, Any], arm: str) -> str:
  """What a search had otherwise, where its settings may be used all the same.

  Args:
    searched, now: settings that arms share; those of the evaluation differ always.
  """
  then, problem = schema.flat(searched["problem"]), schema.flat(now["problem"])
  changed = {key for key in {*then, *problem} if then.get(key) != problem.get(key)}
  fewer = then.get("train_alphabets", 0) >= problem.get("train_alphabets", 0)
  shapes = {key for key in changed if key.startswith("shape.")}  # of episodes of the same classes
  if changed - shapes - {"shots", "train_alphabets", "relabel"} or not fewer:
    raise ValueError(
      f"The settings of {arm} were chosen on {then}, and the problem is {problem}: its "
      "test tasks may be among those they were chosen on. Search anew with experiments.tune, or "
      "take the settings that searches start from, experiments.train --tuned=false."
    )
  training = ("meta_steps", "meta_batch", "network", "compute", "cg_steps", "cg_tol", "cg_batch")
  told = {key: searched[key] for key in training if searched.get(key, now[key]) != now[key]}
  return ", ".join(
    f"{k}={v}" for k, v in sorted(({k: then.get(k) for k in changed} | told).items())
  )
