"""The settings of a run: their names, meanings, presets and checks."""

from collections.abc import Sequence
from typing import Any

import ml_collections

from experiments.settings import schema
from experiments.settings.schema import Config

MEANINGS = {
  "data": '"digits", the spoken Arabic digits, or "synthetic", artificial speakers',
  "network": "dilations of the layers, channels, channels of the skips, and those inside the head",
  "pieces": "of each recording the `count` loudest pieces of `length` predicted samples",
  "base": "steps, pieces a step, and the largest rate of Adam",
  "meta": "updates of sigma (steps) on so many speakers each; recordings to adapt on; inner steps, "
  "pieces of a step and the rate r of z, which is r / (1 + t / decay) after t steps; rate of log "
  "sigma^2; sigma at the start; most steps and tolerance of conjugate gradients",
  "adapt": "numbers of recordings; steps after which new speakers are evaluated; pieces of a step; "
  "the rate is r / (1 + t / decay) after t steps",
  "tune": "recordings and steps, some of adapt.steps, at which rates are compared on the "
  "validation speakers",
  "rates": "method -> the rates r to choose from",
  "methods": "which methods are compared",
  "samples": "samples of sound that an adapted network draws",
}
METHODS = ("sigma_imaml", "fine_tuning", "head", "biases")  # in the order of the tables
NEEDED = ("sigma_imaml", "fine_tuning")  # tables and samples compare them
PRESETS = ("cpu", "synthetic")


def _cpu() -> dict[str, Any]:
  """Return sizes for one or two CPU cores: 28,576 parameters, half an hour of one core."""
  return {
    "data": "digits",
    "network": {
      "dilations": tuple(2**i for i in range(8)),
      "channels": 16,
      "skip": 32,
      "hidden": 32,
    },
    "pieces": {"count": 6, "length": 256},
    "base": {"steps": 4_000, "pieces": 16, "rate": 6e-3},
    "meta": {
      "steps": 30,
      "speakers": 3,
      "recordings": 10,
      "inner_steps": 200,
      "pieces": 2,
      "z_rate": 0.1,
      "decay": 50,
      "sigma_rate": 0.25,
      "init_sigma": 0.03,
      "cg_steps": 8,
      "cg_tol": 1e-2,
    },
    "adapt": {
      "recordings": (10, 40),
      "steps": (0, 1, 3, 10, 30, 100, 300, 1_000),
      "pieces": 2,
      "decay": 100,
    },
    "tune": {"recordings": 10, "steps": (0, 1, 3, 10, 30, 100, 300, 1_000)},
    "rates": {
      "sigma_imaml": (0.03, 0.1),
      "fine_tuning": (1e-4, 3e-4, 1e-3),
      "head": (1e-4, 3e-4),
      "biases": (3e-3, 1e-2),
    },
    "methods": METHODS,
    "samples": 8_000,
  }


def _synthetic() -> dict[str, Any]:
  """Return sizes for a test of the program; its figures mean nothing."""
  config = _cpu()
  config["data"] = "synthetic"
  config["network"] = {"dilations": (1, 2, 4), "channels": 4, "skip": 6, "hidden": 8}
  config["pieces"] = {"count": 2, "length": 16}
  config["base"] = {"steps": 60, "pieces": 8, "rate": 1e-2}
  config["meta"] |= {"steps": 2, "speakers": 2, "inner_steps": 3, "cg_steps": 2}
  config["adapt"] |= {"recordings": (10, 20), "steps": (0, 1, 5)}
  config["tune"] = {"recordings": 10, "steps": (0, 1, 5)}
  config["rates"] = {name: rates[-1:] for name, rates in config["rates"].items()}
  config["samples"] = 50
  return config


def load(preset: str, overrides: Sequence[str] = ()) -> Config:
  """Return the settings of a preset with changes such as "meta.steps=100".

  Raises:
    ValueError: a name or a value is wrong.
  """
  makers = {"cpu": _cpu, "synthetic": _synthetic}
  if preset not in makers:
    raise ValueError(f"A preset is one of {', '.join(makers)}; got {preset!r}.")
  config = schema.override(ml_collections.ConfigDict(makers[preset]()), overrides)
  _check(config)
  return config


def _check(config: Config) -> None:
  """Raise ValueError for settings that would fail only after training."""
  adapt, tune, meta = config.adapt, config.tune, config.meta
  for name, values in (
    ("adapt.steps", adapt.steps),
    ("adapt.recordings", adapt.recordings),
    ("tune.steps", tune.steps),
    ("network.dilations", config.network.dilations),
  ):
    schema.check_ascending(name, values)
  if adapt.steps[0] != 0 or len(adapt.steps) < 2:
    raise ValueError(f"adapt.steps begin with 0, the base without adaptation; got {adapt.steps}.")
  if other := [steps for steps in tune.steps if steps not in adapt.steps]:
    raise ValueError(
      f"tune.steps are some of adapt.steps, {adapt.steps}, because the test speakers are evaluated "
      f"at the best of them; got {other[0]}."
    )
  if config.network.dilations[0] == 0:
    raise ValueError(f"network.dilations are at least 1; got {config.network.dilations}.")
  for name, values in (
    ("adapt.recordings", adapt.recordings),
    ("tune.recordings", (tune.recordings,)),
    ("meta.recordings", (meta.recordings,)),
  ):
    if wrong := [n for n in values if n not in (10, 20, 30, 40)]:
      raise ValueError(
        f"{name} is 10, 20, 30 or 40, whole rounds of the ten digits, because a speaker is "
        f"evaluated on the last two of six rounds; got {wrong[0]}."
      )
  most = 10 * config.pieces.count
  for name, count in (("meta.pieces", meta.pieces), ("adapt.pieces", adapt.pieces)):
    if count > most:
      raise ValueError(f"{name} is at most {most}, the pieces of ten recordings; got {count}.")
  if config.samples < config.pieces.length:
    raise ValueError(
      f"samples is at least pieces.length, {config.pieces.length}, because drawn sound is compared "
      f"with pieces of recordings; got {config.samples}."
    )
  if config.data not in ("digits", "synthetic"):
    raise ValueError(f'data is "digits" or "synthetic"; got {config.data!r}.')
  schema.check_methods(config, METHODS, NEEDED)
  schema.check_positive(config)
