"""The settings of a run: their names and meanings, their checks, and changes by --set."""

import ast
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from experiments.settings import arms

# An ml_collections.ConfigDict. Its attributes have no types that a checker could use.
Config: TypeAlias = Any

SETTINGS = {  # setting -> its meaning
  "table": "name of the table that the settings come from",
  "size": "cpu, full or smoke: for which machine",
  "problem": "name of the problem, and the arguments of its function in experiments/datasets",
  "network": 'kind "conv" with features and norm, or kind "mlp" (ReLU) or "tanh_mlp" with width',
  "compute": "float32 or bfloat16: dtype of the network; everything else is float32",
  "meta_steps": "updates of phi and sigma",
  "meta_batch": "tasks per meta-step",
  "validation_episodes": "validation tasks that a trained arm is adapted to",
  "test_episodes": "test tasks that a trained arm is adapted to",
  "adapt_steps": "numbers of adaptation steps after which a task is evaluated, ascending",
  "report_step": "one of adapt_steps: searches and tables compare arms after it",
  "cg_steps": "most steps of conjugate gradients in an implicit gradient",
  "cg_tol": "relative residual at which they stop",
  "cg_batch": "examples of which the solve takes the curvature; 0: all of them",
  "fixed": "settings of arms that the protocol fixes, so that searches leave them",
  "arms": "algorithm -> the settings of its arm, see arms.py",
}
OPTIONAL = {
  "evaluation": "key: seed of the tasks to adapt to; block: tasks adapted at a time; over: what "
  "these tasks are, in the plural. Rounds through them are averaged, a column a task.",
}
OF_SEARCH = ("trials", "searched_with")  # these describe the search for an arm's settings

_NOT_BY_HAND = ("table", "size", *OF_SEARCH)  # these describe where the other settings come from
_DTYPES = ("float32", "bfloat16")
_WHOLE = {  # whole number, of a table or of an arm -> its least value
  **dict.fromkeys(("meta_steps", "meta_batch", "test_episodes", "validation_episodes"), 1),
  **dict.fromkeys(("inner_steps", "cg_steps", "network.width", "network.features"), 1),
  **dict.fromkeys(("batch_size", "cg_batch", "inner_decay", "report_step"), 0),
  **{"evaluation.key": 0, "evaluation.block": 1},
}
_POSITIVE = ("inner_rate", "outer_rate", "sigma_rate", "init_sigma", "cg_tol")
_NETWORKS = {
  "conv": ("features", "norm"),
  "mlp": ("width",),
  "tanh_mlp": ("width",),
}  # kind -> its settings
_EVALUATION = {"key", "block", "over"}


def check(config: Config) -> Config:
  """Return `config`, or raise ValueError for settings that would fail in or after training."""
  _check_names("A table", config, SETTINGS, OPTIONAL)
  for name, arm in config.arms.items():
    _check_names(f"arms.{name}", arm, arms.ARM, arms.OWN)
  _check_numbers(config)
  if config.compute not in _DTYPES:
    raise ValueError(f"compute is {' or '.join(_DTYPES)}; got {config.compute!r}.")
  network = config.network
  if set(network) != {"kind", *_NETWORKS.get(network.kind, ())}:
    raise ValueError(
      'A network has kind "conv", features and norm, or kind "mlp" or "tanh_mlp" and width; got '
      f"{network.to_dict()}. For another kind change experiments/settings/tables.py."
    )
  if "evaluation" in config and set(config.evaluation) != _EVALUATION:
    raise ValueError(
      f"evaluation has {', '.join(sorted(_EVALUATION))}; got {config.evaluation.to_dict()}."
    )
  steps = list(config.adapt_steps)
  whole = all(type(step) is int and step >= 0 for step in steps)
  if not steps or not whole or steps != sorted(set(steps)):
    raise ValueError(
      f"adapt_steps are ascending numbers of steps, as in --set=adapt_steps=(0,10); got {steps}."
    )
  if config.report_step not in steps:
    raise ValueError(
      f"report_step is one of adapt_steps, {', '.join(map(str, steps))}; got {config.report_step}. "
      "Change --set=report_step, or --set=adapt_steps with it."
    )
  return config


def _check_numbers(config: Config) -> None:
  """Raise ValueError unless counts are whole numbers, and rates are positive and finite."""
  for name, value in flat(config.to_dict()).items():
    setting = name.rpartition(".")[2] if name.startswith("arms.") else name
    number = isinstance(value, int | float) and not isinstance(value, bool)
    wanted = ""
    if setting in _WHOLE and not (number and isinstance(value, int)):
      wanted = "a whole number"
    elif setting in _WHOLE and value < _WHOLE[setting]:
      wanted = f"at least {_WHOLE[setting]}"
    elif setting == "clip" and not (number and 0 <= value < math.inf):
      wanted = "a finite number of at least 0"
    elif setting in _POSITIVE and not (number and 0 < value < math.inf):
      wanted = "a finite number above 0"
    if wanted:
      raise ValueError(f"{name} is {wanted}; got {value}. Change --set={name}.")


def _check_names(
  what: str, given: Mapping[str, Any], wanted: Mapping[str, str], optional: Mapping[str, str]
) -> None:
  missing, unknown = set(wanted) - set(given), set(given) - set(wanted) - set(optional)
  if missing or unknown:
    raise ValueError(
      f"{what} has the settings {', '.join(wanted)}; missing are {sorted(missing)}, unknown are "
      f"{sorted(unknown)}."
    )


def check_changes(overrides: Sequence[str]) -> None:
  """Raise ValueError if --set changes what only says where the settings of a table come from."""
  for name in (change.partition("=")[0].strip() for change in overrides):
    if name in _NOT_BY_HAND or name.rpartition(".")[2] in OF_SEARCH:
      raise ValueError(
        f"--set={name} would change how the settings are described, and not the run. Choose the "
        "table and its size by flags of the command, and settings by their own names."
      )


def override(config: Config, overrides: Sequence[str]) -> Config:
  """Apply changes in the form of the flag --set, and lock `config`; unknown names are errors."""
  config.lock()
  changes = {}
  for change in overrides:
    name, equals, text = change.partition("=")
    if not equals:
      raise ValueError(f"--set wants name=value, as in --set=meta_steps=100; got {change!r}.")
    changes[name] = _value(text)
    whole = isinstance(changes[name], float) and changes[name].is_integer()
    if whole and type(flat(config.to_dict()).get(name)) is int:  # 1e3 steps, 100.0 of a spreadsheet
      changes[name] = int(changes[name])
  try:
    config.update_from_flattened_dict(changes)
  except (KeyError, TypeError, ValueError) as error:
    raise ValueError(
      f"--set={','.join(overrides)} does not fit the settings: {error}{_meant(config, changes)}"
    ) from error
  return config


def _value(text: str) -> Any:
  """Return the value that a text denotes in Python, NumPy or JSON, or the text itself."""
  own = re.sub(r"\b(?:np|numpy)\.\w+\(([^()]*)\)", r"\1", text)  # np.float64(0.1)
  own = {"true": "True", "false": "False", "null": "None"}.get(own.strip().lower(), own)
  try:
    return ast.literal_eval(own.strip())
  except (ValueError, SyntaxError):
    return text


def _meant(config: Config, changes: Mapping[str, Any]) -> str:
  """Suggest full names for settings given by their last part, as problem.ways for ways."""
  names = flat(config.to_dict())
  near = [f for f in names for c in changes if c not in names and f.rpartition(".")[2] == c]
  return f" Did you mean {' or '.join(near)}?" if near else ""


def check_ascending(name: str, values: Any) -> None:
  """Raise ValueError unless `values` is a tuple of ascending whole numbers from 0 on."""
  whole = isinstance(values, tuple) and all(isinstance(v, int) and v >= 0 for v in values)
  if not whole or not values or list(values) != sorted(set(values)):
    raise ValueError(f"{name} are ascending numbers, as in --set={name}=(1,10); got {values}.")


def check_methods(config: Config, known: Sequence[str], needed: Sequence[str]) -> None:
  """Raise ValueError unless `config.methods` are some of `known`, with all of `needed`."""
  if unknown := set(config.methods) - set(known) or set(needed) - set(config.methods):
    raise ValueError(
      f"methods are some of {', '.join(known)}, and {' and '.join(needed)} are among them; got "
      f"{config.methods}: look at {', '.join(sorted(unknown))}."
    )


def check_positive(config: Config) -> None:
  """Raise ValueError unless all numbers and all `config.rates` are above 0."""
  for name, rates in config.rates.items():
    if not isinstance(rates, tuple) or not rates or min(rates) <= 0:
      raise ValueError(f"rates.{name} are positive numbers, as in (0.1,); got {rates!r}.")
  numbers = {k: v for k, v in flat(config.to_dict()).items() if isinstance(v, int | float)}
  if wrong := [name for name, value in numbers.items() if not value > 0]:
    raise ValueError(f"{wrong[0]} is a positive number; got {numbers[wrong[0]]}.")


def without_search(arm: Mapping[str, Any]) -> dict[str, Any]:
  """Return the settings of an arm, without those that describe the search for them."""
  return {k: v for k, v in arm.items() if k not in OF_SEARCH}


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  """Return {dotted path: value} of nested mappings."""
  found: dict[str, Any] = {}
  for key, value in tree.items():
    name = f"{prefix}{key}"
    found |= flat(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
  return found
