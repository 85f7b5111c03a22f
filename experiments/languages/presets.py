"""The settings of a run: their names, meanings, presets and checks."""

from collections.abc import Sequence
from typing import Any

import ml_collections

from experiments.settings import schema
from experiments.settings.schema import Config

MEANINGS = {
  "data": '"udhr", the file declarations.jsonl.gz, or "synthetic", artificial languages',
  "languages": "numbers of languages to learn sigma on, to choose on and to test on; the base is "
  "trained on the others",
  "network": "layers, width, hidden (of the MLP) and heads",
  "context": "bytes of a window",
  "base": "steps, windows a step, and the largest rate of Adam",
  "rank": "rank of the adapters, everywhere",
  "qv_rank": "rank of the adapters on q_proj and v_proj alone",
  "meta": "updates of phi and sigma (steps) on so many languages each; articles and windows to "
  "adapt on; inner steps and their rate (of z, and of theta for fomaml and reptile); rates of phi "
  "and sigma; sigma at the start; most steps of conjugate gradients",
  "choice": "how many kernels, those with the largest sigma, choose_modules compares",
  "adapt": "articles and steps after which new languages are judged; more than tune.steps steps "
  "for the numbers of articles in `long` alone; windows of a step; the rate is r / (1 + t / decay) "
  "after t steps",
  "tune": "articles and steps at which rates are compared on the validation languages",
  "rates": "method -> the rates r to choose from",
  "methods": "which methods are compared",
}
NEEDED = ("sigma_imaml_chosen", "fine_tuning")  # tables compare with them
METHODS = (  # in the order of the tables
  "sigma_imaml",
  "sigma_imaml_chosen",
  "fine_tuning",
  "qv",
  "head",
  "reptile",
  "fomaml",
)
PRESETS = ("cpu", "full", "synthetic")


def _cpu() -> dict[str, Any]:
  """Return sizes for two CPU cores."""
  return {
    "data": "udhr",
    "languages": {"meta": 60, "validation": 6, "test": 6},
    "network": {"layers": 3, "width": 64, "hidden": 128, "heads": 2},
    "context": 128,
    "base": {"steps": 1_000, "windows": 16, "rate": 4e-3},
    "rank": 4,
    "qv_rank": 8,
    "meta": {
      "steps": 40,
      "languages": 3,
      "articles": 5,
      "windows": 6,
      "inner_steps": 12,
      "z_rate": 0.3,
      "theta_rate": 0.02,
      "phi_rate": 5e-3,
      "sigma_rate": 0.15,
      "init_sigma": 0.1,
      "cg_steps": 6,
    },
    "choice": {"candidates": 21},  # all kernels, because sigma does not rank them
    "adapt": {
      "articles": (2, 5, 10, 20),
      "steps": (0, 1, 10, 100, 1_000),
      "long": (2, 5, 10, 20),
      "windows": 2,
      "decay": 100,
    },
    "tune": {"articles": 5, "steps": 100},
    "rates": {
      "sigma_imaml": (0.1, 0.3),
      "sigma_imaml_chosen": (0.1, 0.3),
      "fine_tuning": (1e-3, 4e-3),
      "qv": (3e-3, 1e-2),
      "head": (3e-3, 1e-2),
      "reptile": (3e-3, 1e-2),
      "fomaml": (3e-3, 1e-2),
    },
    "methods": METHODS,
  }


def _full() -> dict[str, Any]:
  """Return sizes for one GPU: 6.5 million parameters. This preset has not been run."""
  config = _cpu()
  config["languages"] = {"meta": 80, "validation": 20, "test": 40}
  config["network"] = {"layers": 8, "width": 256, "hidden": 704, "heads": 8}
  config["context"] = 512
  config["base"] = {"steps": 20_000, "windows": 64, "rate": 1e-3}
  config["rank"] = 8
  config["meta"] |= {"steps": 400, "languages": 16, "windows": 4, "inner_steps": 30, "cg_steps": 10}
  config["choice"] = {"candidates": 56}
  config["adapt"] |= {"steps": (0, 1, 3, 10, 30, 100, 300, 1_000)}
  return config


def _synthetic() -> dict[str, Any]:
  """Return sizes for a test of the program; its figures mean nothing."""
  config = _cpu()
  config["data"] = "synthetic"
  config["languages"] = {"meta": 6, "validation": 2, "test": 2}
  config["network"] = {"layers": 2, "width": 16, "hidden": 16, "heads": 2}
  config["context"] = 32
  config["base"] = {"steps": 60, "windows": 8, "rate": 1e-2}
  config["rank"] = config["qv_rank"] = 2
  config["meta"] |= {"steps": 2, "languages": 2, "windows": 4, "inner_steps": 3, "cg_steps": 2}
  config["choice"] = {"candidates": 2}
  config["adapt"] = {"articles": (2, 20), "steps": (0, 1, 5), "windows": 2}
  config["adapt"] |= {"long": (20,), "decay": 100}
  config["tune"] = {"articles": 2, "steps": 1}
  config["rates"] = {name: rates[-1:] for name, rates in config["rates"].items()}
  return config


def load(preset: str, overrides: Sequence[str] = ()) -> Config:
  """Return the settings of a preset with changes such as "meta.steps=100".

  Raises:
    ValueError: a name or a value is wrong.
  """
  makers = {"cpu": _cpu, "full": _full, "synthetic": _synthetic}
  if preset not in makers:
    raise ValueError(f"A preset is one of {', '.join(makers)}; got {preset!r}.")
  config = schema.override(ml_collections.ConfigDict(makers[preset]()), overrides)
  _check(config)
  return config


def _check(config: Config) -> None:
  """Raise ValueError for settings that would fail only after training."""
  adapt, tune = config.adapt, config.tune
  schema.check_ascending("adapt.steps", adapt.steps)
  schema.check_ascending("adapt.articles", adapt.articles)
  if adapt.steps[0] != 0 or len(adapt.steps) < 2:
    raise ValueError(f"adapt.steps begin with 0, the model without adaptation; got {adapt.steps}.")
  numbers = (*adapt.articles, tune.articles, config.meta.articles)
  if not 1 <= min(numbers) <= max(numbers) <= 20:
    raise ValueError(
      "A language is adapted on 1 to 20 articles, because it is judged on the last ten of 30; got "
      f"adapt.articles={adapt.articles}, tune.articles={tune.articles}, "
      f"meta.articles={config.meta.articles}."
    )
  if config.languages.validation < 2:
    raise ValueError(
      "languages.validation must be at least 2, because one language gives no standard error; got "
      f"{config.languages.validation}."
    )
  if config.data not in ("udhr", "synthetic"):
    raise ValueError(f'data is "udhr" or "synthetic"; got {config.data!r}.')
  if config.network.width % (2 * config.network.heads):
    raise ValueError(
      f"network.width must be a multiple of 2 network.heads, for rotary positions; got "
      f"{config.network.width} and {config.network.heads}."
    )
  schema.check_methods(config, METHODS, NEEDED)
  schema.check_positive(config)
  kernels = 7 * config.network.layers
  if not 1 <= config.choice.candidates <= kernels:
    raise ValueError(
      f"choice.candidates is 1 to {kernels}, the number of kernels; got {config.choice.candidates}."
    )
