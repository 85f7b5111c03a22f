"""Settings of the experiments: what is run, not how."""

import ast
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import ml_collections

# An ml_collections.ConfigDict. Its attributes have no types that a checker could use.
Config: TypeAlias = Any


def _arm(
  inner: str, rate: float, steps: int, outer: str, outer_rate: float, **own: float | str
) -> Config:
  return ml_collections.ConfigDict(
    {
      "inner": inner,  # optimiser of theta, or of z where sigma is finite
      "inner_rate": rate,
      "inner_steps": steps,  # in training
      "inner_decay": 0,  # n: inner_rate / (1 + t / n) after t steps; 0: constant
      "batch_size": 0,  # of inner steps; 0: all examples
      "modules": "layer",  # or "block", a layer with its norm: what has one sigma, or one rate
      "trials": 0,  # of the search that chose these settings; 0: none did
      "searched_with": "",  # where it had other tasks or training: what differed
      "outer": outer,  # optimiser of phi
      "outer_rate": outer_rate,
      # init_sigma; sigma_rate, the rate of Adam on log sigma^2; task_specific, a module
      **own,
    }
  )


def default() -> Config:
  """Two CPU cores, at most ten minutes for three algorithms."""
  return ml_collections.ConfigDict(
    {
      "ways": 20,
      "shots": 3,
      "queries": 3,
      "size": 14,  # pixels
      "features": 16,  # channels of each of the four blocks
      "norm": "batch",
      "compute": "float32",  # or bfloat16: of the network; all else stays in float32
      "meta_steps": 200,
      "meta_batch": 4,  # tasks a meta-step
      "test_episodes": 24,
      "adapt_steps": (0, 1, 3, 10, 30, 100, 300, 1000),
      "cg_steps": 10,
      "cg_tol": 1e-3,
      "cg_batch": 0,  # examples of which the solve takes the curvature; 0: all
      "arms": {
        "sigma_imaml": _arm("adam", 0.3, 30, "adam", 1e-2, init_sigma=0.3, sigma_rate=6e-2),
        "sigma_reptile": _arm("adam", 0.3, 30, "adam", 1e-2, init_sigma=0.3, sigma_rate=6e-2),
        "sigma_maml": _arm("sgd", 5.0, 10, "adam", 1e-2, init_sigma=0.3, sigma_rate=6e-2),
        "imaml": _arm("adam", 0.3, 30, "adam", 1e-2, init_sigma=0.5),
        "reptile": _arm("sgd", 0.5, 30, "sgd", 0.5),
        "fomaml": _arm("sgd", 0.5, 10, "adam", 1e-2),
        "maml": _arm("sgd", 0.5, 5, "adam", 1e-2),
        "anil": _arm("sgd", 0.5, 5, "adam", 1e-2),
        "boil": _arm("sgd", 0.5, 5, "adam", 1e-2),
        "meta_sgd": _arm("sgd", 1.0, 5, "adam", 1e-2, init_sigma=0.7, sigma_rate=6e-2),
        "hand_picked": _arm("sgd", 0.5, 5, "adam", 1e-2, task_specific="conv_3"),
        "fine_tuning": _arm("sgd", 0.5, 30, "adam", 1e-2),
      },
    }
  )


def full() -> Config:
  """One GPU: 28 x 28, 64 channels, 1000 meta-steps of 20 tasks."""
  config = default()
  config.update(
    {
      "shots": 5,
      "queries": 5,
      "size": 28,
      "features": 64,
      "meta_steps": 1000,
      "meta_batch": 20,
      "test_episodes": 100,
    }
  )
  return config


def smoke() -> Config:
  """Seconds: for tests, and to see that everything runs. Its figures mean nothing."""
  config = default()
  config.update(
    {
      "ways": 5,
      "shots": 1,
      "queries": 2,
      "size": 8,
      "features": 4,
      "meta_steps": 3,
      "meta_batch": 2,
      "test_episodes": 4,
      "adapt_steps": (0, 1, 3),
      "cg_steps": 3,
    }
  )
  for arm in config.arms.values():
    arm.inner_steps = 2
  return config


_NETWORKS = {"conv": ("features", "norm"), "mlp": ("width",)}  # kind -> its settings
PRESETS = {"default": default, "full": full, "smoke": smoke}


def load(preset: str, overrides: Sequence[str] = ()) -> Config:
  """The preset with `overrides` such as "meta_steps=100" or "arms.reptile.inner_rate=0.2"."""
  if preset not in PRESETS:
    raise ValueError(f"{preset!r} is no preset; choose of {', '.join(PRESETS)}.")
  return check(override(PRESETS[preset](), overrides))


def check(config: Config) -> Config:
  """`config` as it came, or ValueError where training would be over before its error is noticed."""
  for name in ("meta_steps", "meta_batch", "test_episodes", "validation_episodes"):
    if config.get(name, 1) < 1:
      raise ValueError(f"{name} is at least 1; got {config[name]}. Change --set={name}.")
  network = config.get("network")
  if network is not None and set(network) != {"kind", *_NETWORKS.get(network.kind, ())}:
    raise ValueError(
      'A network has kind "conv", features and norm, or kind "mlp" and width; got '
      f"{network.to_dict()}. Another kind is another entry of experiments/tables.py."
    )
  steps = list(config.adapt_steps)
  whole = all(isinstance(step, int) and step >= 0 for step in steps)
  if not steps or not whole or steps != sorted(set(steps)):
    raise ValueError(
      f"adapt_steps are ascending numbers of steps, as in --set=adapt_steps=(0,10); got {steps}."
    )
  if config.get("report_step", steps[-1]) not in steps:
    raise ValueError(
      f"report_step is one of adapt_steps, {', '.join(map(str, steps))}; got {config.report_step}. "
      "Change --set=report_step, or --set=adapt_steps with it."
    )
  return config


def override(config: Config, overrides: Sequence[str]) -> Config:
  """`config`, locked, with changes in the words of the flag --set; unknown names are errors."""
  config.lock()
  changes = {}
  for change in overrides:
    name, equals, text = change.partition("=")
    if not equals:
      raise ValueError(f"--set wants name=value, as in --set=meta_steps=100; got {change!r}.")
    try:
      changes[name] = ast.literal_eval(text)
    except (ValueError, SyntaxError):
      changes[name] = text
  try:
    config.update_from_flattened_dict(changes)
  except (KeyError, TypeError, ValueError) as error:
    raise ValueError(f"--set={','.join(overrides)} does not fit the settings: {error}") from error
  return config


OF_SEARCH = ("trials", "searched_with")  # how an arm's settings were searched for, no settings


def without_search(arm: Mapping[str, Any]) -> dict[str, Any]:
  """An arm's settings, without what is told of the search for them."""
  return {k: v for k, v in arm.items() if k not in OF_SEARCH}


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  """{dotted path: value} of nested mappings."""
  found: dict[str, Any] = {}
  for key, value in tree.items():
    name = f"{prefix}{key}"
    found |= flat(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
  return found
