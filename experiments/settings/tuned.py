"""Settings that searches chose, in experiments/tuned/TABLE-SIZE/ALGORITHM.json."""

import json
import pathlib
from collections.abc import Collection, Mapping
from typing import Any

from experiments.settings import schema

FORMAT = "shrinkmeta.experiments.tuned/1"

# Settings of a problem that may differ from those of a search. Their change does not move a task on
# which the search chose into the test tasks: the form of an episode and relabel leave the classes
# where they are (writing systems are split by their names), another data set has other classes, and
# the sinusoids, which have noise, are drawn endlessly.
_EPISODE = {"ways", "shots", "queries", "size"}
_HARMLESS = _EPISODE | {"train_alphabets", "relabel", "dataset", "noise"}


def file_of(table: str, size: str, algorithm: str) -> pathlib.Path:
  """Return the path of an algorithm's chosen settings and of the search that chose them."""
  return pathlib.Path(__file__).parents[1] / "tuned" / f"{table}-{size}" / f"{algorithm}.json"


def apply(config: schema.Config, names: Collection[str]) -> dict[str, Any]:
  """Set arms of `config` to the settings that searches chose; return {algorithm: search}.

  Args:
    config: the settings of a table.
    names: the algorithms whose arms are set.

  Raises:
    ValueError: a file cannot be read, or the names of its settings are not those of its arm.
  """
  searches = {}
  for name in names:
    file = file_of(config.table, config.size, name)
    if file.exists():
      searches[name] = found = _read(file)
      settings = _settings(found)
      wanted = schema.without_search(config.arms[name].to_dict())
      if unlike := sorted(set(settings) ^ set(wanted)):
        raise ValueError(
          f"{file}: the settings of {name} are {', '.join(wanted)}; {', '.join(unlike)} is in one "
          "of the two alone. Search anew."
        )
      config.arms[name].update(settings)
  return searches


def describe(config: schema.Config, searches: Mapping[str, Any]) -> None:
  """Note the search's length and differing settings in each arm that kept its chosen settings.

  Raises:
    ValueError: settings may have been chosen on the test tasks.
  """
  for name, found in searches.items():
    arm = config.arms[name]
    kept = {key for key, value in _settings(found).items() if arm[key] == value}
    whole = len(kept) == len(_settings(found))
    # A single chosen setting carries what the search saw of its tasks.
    start, chosen = found["start"], found["chosen"]
    if whole or any(key in kept and value != start.get(key) for key, value in chosen.items()):
      differs = _difference(found["config"], config.to_dict(), name)
      if whole:
        arm.update({"trials": len(found["trials"]), "searched_with": differs})


def _read(file: pathlib.Path) -> dict[str, Any]:
  try:
    found = json.loads(file.read_text(encoding="utf-8-sig"))
  except ValueError as error:
    raise ValueError(f"{file} cannot be read: {error}. Search anew, or --tuned=false.") from error
  form = found.get("format") if isinstance(found, dict) else None
  if form != FORMAT:
    raise ValueError(f"{file}: format is {form!r}; wanted {FORMAT!r}.")
  return found


def _settings(found: Mapping[str, Any]) -> dict[str, Any]:
  """Return the settings that a search chose, and those that it did not vary."""
  return schema.without_search(found["start"] | found["chosen"])


def _difference(searched: Mapping[str, Any], now: Mapping[str, Any], algorithm: str) -> str:
  """Return the settings in which a search differed, as text, if its result may still be used.

  Args:
    searched: the settings of the search that all arms share.
    now: the settings of the table. The settings of the evaluation are not compared.
    algorithm: the algorithm of the arm that was searched.
  """
  then, problem = schema.flat(searched["problem"]), schema.flat(now["problem"])
  changed = {key for key in {*then, *problem} if then.get(key) != problem.get(key)}
  fewer = then.get("train_alphabets", 0) >= problem.get("train_alphabets", 0)
  shapes = {key for key in changed if key.startswith("shape.")}  # of episodes of the same classes
  if changed - shapes - _HARMLESS or not fewer:
    raise ValueError(
      f"The settings of {algorithm} were chosen on {then}, and the problem is {problem}: its "
      "test tasks may be among those they were chosen on. Search anew with experiments.tune, or "
      "take the settings that searches start from, experiments.train --tuned=false."
    )
  training = ("meta_steps", "meta_batch", "network", "compute", "cg_steps", "cg_tol", "cg_batch")
  differs = {key: searched[key] for key in training if searched.get(key, now[key]) != now[key]}
  return ", ".join(
    f"{k}={v}" for k, v in sorted(({k: then.get(k) for k in changed} | differs).items())
  )
